// Captures CUDA graphs through a Python function, because torch's capture API is Python.

#ifndef TORCHCALL_XLA_CUDA_CAPTURE_H_
#define TORCHCALL_XLA_CUDA_CAPTURE_H_

#include <nanobind/nanobind.h>

namespace torchcall {

// Adds `Recording`, `set_graph_tools`, `set_graph_limit` and `between_captures` to the module.
void BindCapture(nanobind::module_& m);

}  // namespace torchcall

#endif  // TORCHCALL_XLA_CUDA_CAPTURE_H_
