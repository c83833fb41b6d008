// Simulates the devices "cuda:0" and "cuda:1" in a CPU build of torch, for tests without a GPU.
//
// A CUDA tensor is labelled cuda:i and holds host memory. Operators run on the CPU and are logged
// with the current device and stream. torch's guards and autograd engine see simulated devices,
// streams and events; work is complete when a call returns. Loading this library changes the
// process permanently. Load it before the first backward pass, which starts a thread per device.

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/set_native.h>
#include <torch/csrc/inductor/aoti_runner/model_container_runner_cpu.h>
#include <torch/library.h>

#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "torch_graph.h"
#include "torch_memory.h"
#include "torch_redirect.h"
#include "torch_streams.h"

namespace standin {
namespace {

struct Failure {
  std::string name;  // "*": any operator
  int remaining;     // calls until it fails, including that one
  std::string message;
};
std::mutex failures_mutex;
std::vector<Failure>& Failures() {
  static auto* failures = new std::vector<Failure>;
  return *failures;
}

// Packages for CUDA load with a library that is a CPU's. They do not run.
const torch::inductor::RegisterAOTIModelRunner cuda_packages(
    "cuda",
    [](const std::string& library, size_t runners, const std::string&, const std::string&,
       bool single_threaded) -> std::unique_ptr<torch::inductor::AOTIModelContainerRunner> {
      return std::make_unique<torch::inductor::AOTIModelContainerRunnerCpu>(library, runners,
                                                                            single_threaded);
    });

void FailIfPlanned(const std::string& name) {
  const std::lock_guard lock(failures_mutex);
  for (Failure& failure : Failures()) {
    if (failure.name != "*" && failure.name != name) continue;
    TORCH_CHECK(--failure.remaining != 0, failure.message);
  }
}

void RunOnCpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string name = c10::toString(op.operator_name());
  Redirect redirect(ForeignTensorsOf(name));
  const size_t arguments = op.schema().arguments().size();
  const std::vector<c10::IValue> given(stack->end() - arguments, stack->end());
  for (auto value = stack->end() - arguments; value != stack->end(); ++value) {
    *value = redirect.ToCpu(*value);
  }
  const DeviceScope scope(redirect.device());
  LogEvent("op", name, redirect.device());
  FailIfPlanned(name);
  CheckCaptureIsValid(redirect.device(), thread_streams[redirect.device()]);
  const bool synchronizes = Synchronizes(name, redirect);
  if (synchronizes) RejectDuringCapture(redirect.device(), thread_streams[redirect.device()]);
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  redirect.Return();
  const size_t results = op.schema().returns().size();
  for (auto value = stack->end() - results; value != stack->end(); ++value) {
    *value = redirect.ToCuda(*value);
  }
  if (synchronizes) LogEvent("sync", name, redirect.device());
  CaptureStep(op, given, {stack->end() - results, stack->end()});
}

at::Tensor Empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  const DeviceScope scope(device ? IndexOf(*device) : thread_device);
  return at::detail::empty_generic(size, &Allocator(), c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor EmptyStrided(at::IntArrayRef size, at::IntArrayRef stride,
                        std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                        std::optional<at::Device> device, std::optional<bool>) {
  const DeviceScope scope(device ? IndexOf(*device) : thread_device);
  return at::detail::empty_strided_generic(size, stride, &Allocator(),
                                           c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

at::Tensor& SetStorage(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                       at::IntArrayRef stride) {
  c10::TensorImpl* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset);
  if (stride.empty()) {
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride);
  }
  return self;
}

at::Tensor& SetNothing(at::Tensor& self) {
  const DeviceScope scope(self.device().index());
  return SetStorage(self, {c10::Storage::use_byte_size_t{}, 0, &Allocator(), true}, 0, {0}, {});
}

void RecordStream(at::Tensor&, at::Stream stream) {
  LogEvent("event", "record_stream", stream.device_index(), stream.id());
}

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

const bool is_registered = [] {
  c10::SetAllocator(c10::kCUDA, &Allocator());
  // torch creates its hooks once, during import: they are replaced in place. Neither class has
  // members.
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks;
  return true;
}();

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&RunOnCpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &Empty);
  m.impl("empty_strided", &EmptyStrided);
  m.impl("set_.source_Storage_storage_offset", &SetStorage);
  m.impl("set_.source_Storage",
         static_cast<at::Tensor& (*)(at::Tensor&, at::Storage)>(&at::native::set_));
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("set_", &SetNothing);
  m.impl("record_stream", &RecordStream);
  m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&RunOnCpu>());
  // torch prefers decompositions to the fallback. Every operator with a CPU kernel is therefore
  // registered for CUDA too: the same kernels run, and no decomposition calls missing CUDA code.
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNamesForDispatchKey(c10::DispatchKey::CPU)) {
    const auto op = dispatcher.findOp(name);
    if (name.name.rfind("aten::", 0) != 0 || !op || !op->hasSchema() ||
        op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) {
      continue;
    }
    m.impl(c10::toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&RunOnCpu>());
  }
}

}  // namespace
}  // namespace standin

// The interface for tests.

using namespace standin;  // NOLINT

STANDIN_EXPORT void standin_device_reset() {
  Log().Clear();
  {
    const std::lock_guard lock(failures_mutex);
    Failures().clear();
  }
  const std::lock_guard lock(M().mutex);
  M().limit.fill(SIZE_MAX);
}

STANDIN_EXPORT size_t standin_device_log(char* to, size_t size) { return Log().Copy(to, size); }

// The n-th next call of the operator ("aten::add.out"), or of any with "*", raises.
STANDIN_EXPORT void standin_device_fail(const char* name, int nth, const char* message) {
  const std::lock_guard lock(failures_mutex);
  Failures().push_back({name, nth, message});
}

STANDIN_EXPORT size_t standin_device_live_bytes(int device) {
  const std::lock_guard lock(M().mutex);
  return M().live[device];
}

// Allocations that would exceed so many live bytes raise torch's out-of-memory error.
STANDIN_EXPORT void standin_device_limit(int device, size_t bytes) {
  const std::lock_guard lock(M().mutex);
  M().limit[device] = bytes;
}

// Of the calling thread.
STANDIN_EXPORT int standin_device_current() { return thread_device; }
STANDIN_EXPORT int64_t standin_device_stream(int device) { return thread_streams[device]; }
STANDIN_EXPORT void standin_device_set_stream(int device, int64_t stream) {
  thread_streams[device] = stream;
}
STANDIN_EXPORT void standin_device_set_current(int device) {
  thread_device = static_cast<c10::DeviceIndex>(device);
}

// Starts to capture a stream. Operators of all threads are captured.
STANDIN_EXPORT void* standin_graph_begin(int device, int64_t stream) {
  return BeginCapture(static_cast<c10::DeviceIndex>(device), stream);
}

STANDIN_EXPORT int standin_graph_is_capturing() {
  return CaptureOn(thread_device, thread_streams[thread_device]) != nullptr ? 1 : 0;
}

// The number of captured operators; -1 if the capture was invalidated.
STANDIN_EXPORT int64_t standin_graph_end(void* graph) {
  return EndCapture(static_cast<Graph*>(graph));
}

// A callback for the simulated driver.
STANDIN_EXPORT void standin_graph_launch(void* graph) { static_cast<Graph*>(graph)->Replay(); }

// The launch callback of a graph whose memory was released: logs an error.
STANDIN_EXPORT void standin_graph_released(void*) {
  LogEvent("error", "graph was released", thread_device);
}

// The graph's memory lives on while tensors use it.
STANDIN_EXPORT void standin_graph_release(void* graph) { delete static_cast<Graph*>(graph); }
