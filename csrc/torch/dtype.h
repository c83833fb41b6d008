// DLPack dtypes as torch dtypes, and the names of dtypes and shapes in messages.

#ifndef TORCHCALL_TORCH_DTYPE_H_
#define TORCHCALL_TORCH_DTYPE_H_

#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>

#include <optional>
#include <string>

#include "../dlpack.h"

namespace torchcall {

// nullopt: torch has no such dtype, or JAX has none.
std::optional<c10::ScalarType> ScalarTypeFromDl(DLDataType dtype);

// nullopt: not NumPy's name of a dtype in the table.
std::optional<c10::ScalarType> ScalarTypeFromName(const std::string& name);

// NumPy's name, or torch's if NumPy has none.
std::string DtypeName(c10::ScalarType dtype);

// A Python tuple: "()", "(4,)", "(2, 3)".
std::string ShapeText(c10::IntArrayRef shape);

// "float32 (4,)"
std::string TypeAndShape(c10::ScalarType dtype, c10::IntArrayRef shape);

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_DTYPE_H_
