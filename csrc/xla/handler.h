// The XLA FFI handlers of the custom call "torchcall", for registration.

#ifndef TORCHCALL_XLA_HANDLER_H_
#define TORCHCALL_XLA_HANDLER_H_

#include <nanobind/nanobind.h>

namespace torchcall {

// Python's functions `handlers` and `state_type`.
void BindHandlers(nanobind::module_& m);

}  // namespace torchcall

#endif  // TORCHCALL_XLA_HANDLER_H_
