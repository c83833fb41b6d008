// Two stages of the neighbour list on the CPU: listing the set bits of a mask, and selecting the
// candidate pairs within the cutoff. XLA has no loop that writes a variable number of entries; on
// other platforms these stages are gathers and scatters in JAX.

#ifndef TORCHCALL_XLA_NEIGHBORS_H_
#define TORCHCALL_XLA_NEIGHBORS_H_

#include "xla/ffi/api/c_api.h"

namespace torchcall {

XLA_FFI_Handler* CompactBitsHandler();
XLA_FFI_Handler* SelectCloseHandler();

}  // namespace torchcall

#endif  // TORCHCALL_XLA_NEIGHBORS_H_
