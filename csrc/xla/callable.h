// Python callables behind the seam's TcCallable: the GIL is taken here, and nowhere else in a call.

#ifndef TORCHCALL_XLA_CALLABLE_H_
#define TORCHCALL_XLA_CALLABLE_H_

#include <nanobind/nanobind.h>

#include "../engine.h"

namespace torchcall {

// `make_tensors()` returns the list of tensors of one call at a time, None for a length;
// `run(list)` returns a tuple of tensors, or a str that says what went wrong. Whoever gets the
// TcCallable must see to its release. Needs the GIL.
TcCallable PythonCallable(nanobind::object make_tensors, nanobind::object run);

}  // namespace torchcall

#endif  // TORCHCALL_XLA_CALLABLE_H_
