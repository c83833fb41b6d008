// The XLA FFI handlers of the custom call "torchcall", for registration.

#ifndef TORCHCALL_XLA_HANDLER_H_
#define TORCHCALL_XLA_HANDLER_H_

#include "xla/ffi/api/c_api.h"

namespace torchcall {

XLA_FFI_Handler* InstantiateHandler();
XLA_FFI_Handler* CpuHandler();
XLA_FFI_Handler* CudaHandler();

// Of the state that an executable holds for each call.
XLA_FFI_TypeId* StateTypeId();
const XLA_FFI_TypeInfo* StateTypeInfo();

}  // namespace torchcall

#endif  // TORCHCALL_XLA_HANDLER_H_
