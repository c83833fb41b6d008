// The part of the DLPack C structures that crosses the seam between the two halves.
//
// Layout and names are those of the DLPack specification (version 1), and the include guard is the
// official header's, so that a translation unit that also sees the official header (torch bundles
// one) keeps a single definition.

#ifndef DLPACK_DLPACK_H_
#define DLPACK_DLPACK_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { kDLCPU = 1, kDLCUDA = 2 } DLDeviceType;

typedef struct {
  DLDeviceType device_type;
  int32_t device_id;
} DLDevice;

typedef enum {
  kDLInt = 0U,
  kDLUInt = 1U,
  kDLFloat = 2U,
  kDLBfloat = 4U,
  kDLComplex = 5U,
  kDLBool = 6U,
} DLDataTypeCode;

typedef struct {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
} DLDataType;

typedef struct {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // NULL: C-contiguous
  uint64_t byte_offset;
} DLTensor;

#ifdef __cplusplus
}
#endif

#endif  // DLPACK_DLPACK_H_
