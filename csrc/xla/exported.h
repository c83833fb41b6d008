// The XLA FFI handlers of the custom call "torchcall_exported", a call of a torch model in a
// program that `jax.export` wrote.
//
// Its attribute describes the call and identifies the model by content. Python makes the plan from
// both when XLA loads the executable, or at the first call if the description lacks sizes.

#ifndef TORCHCALL_XLA_EXPORTED_H_
#define TORCHCALL_XLA_EXPORTED_H_

#include <nanobind/nanobind.h>

namespace torchcall {

// Python's functions `exported_handlers` and `set_exported_loader`.
void BindExported(nanobind::module_& m);

}  // namespace torchcall

#endif  // TORCHCALL_XLA_EXPORTED_H_
