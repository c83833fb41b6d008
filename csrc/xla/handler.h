// The XLA FFI handlers of the custom call "torchcall", for registration.

#ifndef TORCHCALL_XLA_HANDLER_H_
#define TORCHCALL_XLA_HANDLER_H_

#include "xla/ffi/api/c_api.h"

namespace torchcall {

struct CallHandlers {
  XLA_FFI_Handler* instantiate;
  XLA_FFI_Handler* execute;
  // Of the state that an executable holds for each call.
  XLA_FFI_TypeId* state;
  const XLA_FFI_TypeInfo* state_info;
};

CallHandlers CpuHandlers();
CallHandlers CudaHandlers();

}  // namespace torchcall

#endif  // TORCHCALL_XLA_HANDLER_H_
