// Reaches the C++ object behind one of torch's Python objects through pybind11's conduit protocol,
// without sharing pybind11's internals with torch.

#ifndef TORCHCALL_XLA_CONDUIT_H_
#define TORCHCALL_XLA_CONDUIT_H_

#include <nanobind/nanobind.h>

namespace torchcall {

// The C++ object of type `type_info` (a `const std::type_info*` from the torch half) that `object`
// holds, or nullptr where the conduit does not answer. Valid while `object` lives.
const void* ConduitPointer(nanobind::handle object, const void* type_info);

}  // namespace torchcall

#endif  // TORCHCALL_XLA_CONDUIT_H_
