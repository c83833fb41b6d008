// Eager models: the Python code behind the seam's TcEager. Only these calls take the GIL.

#ifndef TORCHCALL_XLA_EAGER_H_
#define TORCHCALL_XLA_EAGER_H_

#include <nanobind/nanobind.h>

#include "../engine.h"

namespace torchcall {

// `runner.bind(device)` returns `make`, `templates` and `run`. Each call makes its tensors by
// `make(template)`; a template is None for a length. `run(list of these)` returns a tuple of
// tensors, or an error message (str).
// `runner.held(device)` returns the objects that a graph captured now will read. The caller must
// release the TcEager. Needs the GIL.
TcEager EagerCode(nanobind::object runner);

}  // namespace torchcall

#endif  // TORCHCALL_XLA_EAGER_H_
