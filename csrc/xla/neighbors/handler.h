// The neighbour list as a custom call and as functions of Python. On other platforms than the CPU,
// the list is made of gathers and scatters in JAX.

#ifndef TORCHCALL_XLA_NEIGHBORS_HANDLER_H_
#define TORCHCALL_XLA_NEIGHBORS_HANDLER_H_

#include <nanobind/nanobind.h>

namespace torchcall {

void BindNeighbors(nanobind::module_& m);

}  // namespace torchcall

#endif  // TORCHCALL_XLA_NEIGHBORS_HANDLER_H_
