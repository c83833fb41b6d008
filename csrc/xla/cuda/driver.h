// The CUDA driver's entry points for capturing and replaying graphs, looked up at run time: this
// library links no CUDA and also runs on machines without it.

#ifndef TORCHCALL_XLA_CUDA_DRIVER_H_
#define TORCHCALL_XLA_CUDA_DRIVER_H_

#include <cstddef>
#include <stdexcept>
#include <string>

namespace torchcall {

// Opaque handles.
using CudaContext = void*;
using CudaStream = void*;
using CudaEvent = void*;
using CudaGraph = void*;
using CudaGraphExec = void*;
using CudaAddress = unsigned long long;
using CudaResult = int;  // 0: success

class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct CudaDriver {
  CudaResult (*stream_create)(CudaStream*, unsigned int flags);
  CudaResult (*stream_get_context)(CudaStream, CudaContext*);
  CudaResult (*stream_synchronize)(CudaStream);
  CudaResult (*stream_wait_event)(CudaStream, CudaEvent, unsigned int);
  CudaResult (*context_push)(CudaContext);
  CudaResult (*context_pop)(CudaContext*);
  CudaResult (*copy_on_device)(CudaAddress to, CudaAddress from, size_t bytes, CudaStream);
  CudaResult (*graph_instantiate)(CudaGraphExec*, CudaGraph, unsigned long long flags);
  CudaResult (*graph_launch)(CudaGraphExec, CudaStream);
  CudaResult (*graph_exec_destroy)(CudaGraphExec);
  CudaResult (*event_create)(CudaEvent*, unsigned int flags);
  CudaResult (*event_record)(CudaEvent, CudaStream);
  CudaResult (*event_synchronize)(CudaEvent);
  CudaResult (*event_destroy)(CudaEvent);
  CudaResult (*error_name)(CudaResult, const char**);
  CudaResult (*error_string)(CudaResult, const char**);

  // Throws CudaError with the failed action and the driver's name and description of the error.
  void Check(CudaResult result, const char* action) const;
};

// This machine's driver. Throws CudaError if there is none.
const CudaDriver& Driver();
// Loads the entry points from another library.
void LoadDriver(const std::string& path);

CudaContext ContextOf(const CudaDriver& driver, CudaStream stream);

// Makes a context current on this thread for the guard's lifetime.
class CudaContextScope {
 public:
  CudaContextScope(const CudaDriver& driver, CudaContext context);
  ~CudaContextScope();
  CudaContextScope(const CudaContextScope&) = delete;
  CudaContextScope& operator=(const CudaContextScope&) = delete;

 private:
  const CudaDriver& driver_;
};

}  // namespace torchcall

#endif  // TORCHCALL_XLA_CUDA_DRIVER_H_
