// Eager models: the Python code behind the seam's TcEager. A call takes the GIL only here.

#ifndef TORCHCALL_XLA_EAGER_H_
#define TORCHCALL_XLA_EAGER_H_

#include <nanobind/nanobind.h>

#include "../engine.h"

namespace torchcall {

// `runner.bind(device)` returns `make`, `templates` and `run`. Each call makes its tensors by
// `make(template)`; a template is None for a length. `run(list of these)` returns a tuple of
// tensors, or a str that says what went wrong.
// `runner.held(device)` returns what a graph that is captured now will use. The caller must
// release the TcEager. Needs the GIL.
TcEager EagerCode(nanobind::object runner);

}  // namespace torchcall

#endif  // TORCHCALL_XLA_EAGER_H_
