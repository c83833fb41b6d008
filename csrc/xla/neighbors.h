// The neighbour list's two sequential stages on a CPU: picking set bits out of a mask, and keeping
// the candidate pairs that are closer than the cutoff. XLA has no loop that writes a varying number
// of entries; everywhere else they are gathers and scatters in JAX.

#ifndef TORCHCALL_XLA_NEIGHBORS_H_
#define TORCHCALL_XLA_NEIGHBORS_H_

#include "xla/ffi/api/c_api.h"

namespace torchcall {

XLA_FFI_Handler* CompactBitsHandler();
XLA_FFI_Handler* KeepCloseHandler();

}  // namespace torchcall

#endif  // TORCHCALL_XLA_NEIGHBORS_H_
