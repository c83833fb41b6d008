// The one table that relates DLPack dtypes to torch's, and how both are named to a user.

#ifndef TORCHCALL_TORCH_DTYPE_H_
#define TORCHCALL_TORCH_DTYPE_H_

#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>

#include <optional>
#include <string>

#include "../dlpack.h"

namespace torchcall {

// nullopt for a dtype that the two sides do not share.
std::optional<c10::ScalarType> ScalarTypeFromDl(DLDataType dtype);

// NumPy's name where there is one, torch's otherwise.
std::string DtypeName(c10::ScalarType dtype);

// A Python tuple: "()", "(4,)", "(2, 3)".
std::string ShapeText(c10::IntArrayRef shape);

// "float32 (4,)"
std::string TypeAndShape(c10::ScalarType dtype, c10::IntArrayRef shape);

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_DTYPE_H_
