// How CUDA graphs are captured: by a Python function, for torch's tools are Python's.

#ifndef TORCHCALL_XLA_CUDA_CAPTURE_H_
#define TORCHCALL_XLA_CUDA_CAPTURE_H_

#include <nanobind/nanobind.h>

namespace torchcall {

// Adds `Recording`, `set_graph_tools`, `set_most_graphs` and `between_captures` to the Python
// module.
void BindCapture(nanobind::module_& m);

}  // namespace torchcall

#endif  // TORCHCALL_XLA_CUDA_CAPTURE_H_
