// What the driver's entry points have in common.

#ifndef TORCHCALL_STANDIN_CUDA_ENTRY_H_
#define TORCHCALL_STANDIN_CUDA_ENTRY_H_

#include "device.h"

#define EXPORT extern "C" __attribute__((visibility("default")))
#define ENTRY EXPORT CUresult

namespace standin {

struct Context {
  int device;
};
inline Context contexts[kDevices] = {{0}, {1}};

inline CUcontext Handle(Context* context) { return reinterpret_cast<CUcontext>(context); }
inline Machine& M() { return Machine::Get(); }
inline void* Pointer(CUdeviceptr address) { return reinterpret_cast<void*>(address); }
inline CUdeviceptr Address(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

}  // namespace standin

using namespace standin;  // NOLINT

#endif  // TORCHCALL_STANDIN_CUDA_ENTRY_H_
