// The one table that relates XLA's dtypes to DLPack's and to NumPy's names.

#ifndef TORCHCALL_XLA_DTYPE_H_
#define TORCHCALL_XLA_DTYPE_H_

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "../dlpack.h"
#include "xla/ffi/api/ffi.h"

namespace torchcall {

struct DtypeEntry {
  xla::ffi::DataType xla;
  DLDataType dl;
  const char* name;
  size_t bytes;
};

// nullptr for a dtype that the two sides do not share.
const DtypeEntry* FindDtype(std::string_view numpy_name);
// A name for any XLA dtype, shared or not.
std::string DtypeName(xla::ffi::DataType dtype);
std::vector<std::string> SharedDtypeNames();

// A Python tuple: "()", "(4,)", "(2, 3)".
std::string ShapeText(const int64_t* dims, size_t rank);

}  // namespace torchcall

#endif  // TORCHCALL_XLA_DTYPE_H_
