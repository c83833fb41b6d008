// Python callables behind the seam's TcCallable: the GIL is taken here, and nowhere else in a call.

#ifndef TORCHCALL_XLA_EAGER_H_
#define TORCHCALL_XLA_EAGER_H_

#include <nanobind/nanobind.h>

#include "../engine.h"

namespace torchcall {

// `runner.open(device)` returns the list of tensors of one call at a time, None for a length, and
// `run`: `run(list)` returns a tuple of tensors, or a str that says what went wrong.
// `runner.held(device)` returns what a graph that is captured now goes on using. Whoever gets the
// TcCallable must see to its release. Needs the GIL.
TcCallable PythonCallable(nanobind::object runner);

}  // namespace torchcall

#endif  // TORCHCALL_XLA_EAGER_H_
