#include "driver.h"

#include <dlfcn.h>

#include <atomic>
#include <mutex>

namespace torchcall {
namespace {

std::atomic<const CudaDriver*> loaded{nullptr};
std::mutex load_mutex;

template <typename Function>
void Find(void* library, const char* name, Function& entry) {
  entry = reinterpret_cast<Function>(dlsym(library, name));
  if (entry == nullptr) throw CudaError(std::string("the CUDA driver has no ") + name);
}

const CudaDriver* Load(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    throw CudaError("cannot load the CUDA driver: " + std::string(reason ? reason : path));
  }
  CudaDriver found;
  Find(library, "cuStreamCreate", found.stream_create);
  Find(library, "cuStreamGetCtx", found.stream_get_context);
  Find(library, "cuStreamSynchronize", found.stream_synchronize);
  Find(library, "cuStreamWaitEvent", found.stream_wait_event);
  Find(library, "cuCtxPushCurrent_v2", found.context_push);
  Find(library, "cuCtxPopCurrent_v2", found.context_pop);
  Find(library, "cuMemcpyDtoDAsync_v2", found.copy_on_device);
  Find(library, "cuGraphInstantiateWithFlags", found.graph_instantiate);
  Find(library, "cuGraphLaunch", found.graph_launch);
  Find(library, "cuGraphExecDestroy", found.graph_exec_destroy);
  Find(library, "cuEventCreate", found.event_create);
  Find(library, "cuEventRecord", found.event_record);
  Find(library, "cuEventSynchronize", found.event_synchronize);
  Find(library, "cuEventDestroy_v2", found.event_destroy);
  Find(library, "cuGetErrorName", found.error_name);
  Find(library, "cuGetErrorString", found.error_string);
  // Leaked, like the library: graphs may be destroyed while the process exits.
  return new CudaDriver(found);
}

// Errors that corrupt the process's context, per the driver's documentation.
bool IsFault(CudaResult result) { return result == 700 || (result >= 714 && result <= 719); }

}  // namespace

void CudaDriver::Check(CudaResult result, const char* action) const {
  if (result == 0) return;
  const char* name = nullptr;
  const char* description = nullptr;
  error_name(result, &name);
  error_string(result, &description);
  std::string text = std::string(action) + " failed with " + (name ? name : "an unknown error") +
                     " (" + std::to_string(result) + "): " + (description ? description : "");
  if (IsFault(result)) {
    text +=
        "; earlier work failed on the device, and this process cannot use the device any more: "
        "restart it with CUDA_LAUNCH_BLOCKING=1 to find the failing operation";
  }
  throw CudaError(text);
}

const CudaDriver& Driver() {
  if (const CudaDriver* driver = loaded.load()) return *driver;
  const std::lock_guard<std::mutex> lock(load_mutex);
  if (loaded.load() == nullptr) loaded.store(Load("libcuda.so.1"));
  return *loaded.load();
}

void LoadDriver(const std::string& path) {
  const std::lock_guard<std::mutex> lock(load_mutex);
  loaded.store(Load(path));
}

CudaContext ContextOf(const CudaDriver& driver, CudaStream stream) {
  CudaContext context = nullptr;
  driver.Check(driver.stream_get_context(stream, &context), "finding the stream's context");
  return context;
}

CudaContextScope::CudaContextScope(const CudaDriver& driver, CudaContext context)
    : driver_(driver) {
  driver_.Check(driver_.context_push(context), "making the stream's context current");
}

CudaContextScope::~CudaContextScope() {
  CudaContext popped = nullptr;
  driver_.context_pop(&popped);
}

}  // namespace torchcall
