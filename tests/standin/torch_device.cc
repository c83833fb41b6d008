// Makes "cuda:0" and "cuda:1" usable in a CPU build of torch, for tests on machines without a GPU.
//
// A CUDA tensor's storage says cuda:i and holds host memory. Operators run on the CPU over the same
// memory and are recorded with the device and stream that were current. Devices, streams and events
// are what torch's guards and autograd engine see; work is done before a call returns. Loading this
// library changes the process for good, and has to come before the process's first backward pass,
// which starts a thread per device.

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/set_native.h>
#include <torch/library.h>

#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "torch_memory.h"
#include "torch_streams.h"
// After the memory:
#include "torch_graph.h"

namespace standin {
namespace {

struct Failure {
  std::string name;  // "*": any operator
  int remaining;     // until it happens, that one included
  std::string message;
};
std::mutex failures_mutex;
std::vector<Failure>& Failures() {
  static auto* failures = new std::vector<Failure>;
  return *failures;
}

void FailIfPlanned(const std::string& name) {
  const std::lock_guard lock(failures_mutex);
  for (Failure& failure : Failures()) {
    if (failure.name != "*" && failure.name != name) continue;
    TORCH_CHECK(--failure.remaining != 0, failure.message);
  }
}

void RunOnCpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string name = c10::toString(op.operator_name());
  Crossing crossing(TakenBy(name));
  const size_t arguments = op.schema().arguments().size();
  const std::vector<c10::IValue> given(stack->end() - arguments, stack->end());
  for (auto value = stack->end() - arguments; value != stack->end(); ++value) {
    *value = crossing.ToCpu(*value);
  }
  const OnDevice on_device(crossing.device());
  Note("op", name, crossing.device());
  FailIfPlanned(name);
  ForbidInVoidCapture(crossing.device(), this_threads_streams[crossing.device()]);
  const bool waits = Waits(name, crossing);
  if (waits) ForbidInCapture(crossing.device(), this_threads_streams[crossing.device()]);
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  crossing.Return();
  const size_t results = op.schema().returns().size();
  for (auto value = stack->end() - results; value != stack->end(); ++value) {
    *value = crossing.ToCuda(*value);
  }
  if (waits) Note("sync", name, crossing.device());
  CaptureStep(op, given, {stack->end() - results, stack->end()});
}

at::Tensor Empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  const OnDevice on_device(device ? IndexOf(*device) : this_device);
  return at::detail::empty_generic(size, &Allocator(), c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor EmptyStrided(at::IntArrayRef size, at::IntArrayRef stride,
                        std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                        std::optional<at::Device> device, std::optional<bool>) {
  const OnDevice on_device(device ? IndexOf(*device) : this_device);
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
  const OnDevice on_device(self.device().index());
  return SetStorage(self, {c10::Storage::use_byte_size_t{}, 0, &Allocator(), true}, 0, {0}, {});
}

void RecordStream(at::Tensor&, at::Stream stream) {
  Note("event", "record_stream", stream.device_index(), stream.id());
}

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

const bool is_registered = [] {
  c10::SetAllocator(c10::kCUDA, &Allocator());
  // torch makes its hooks once, while it is imported: theirs become ours where they are. Neither
  // has a member.
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
  // A fallback comes after torch's decompositions. Whatever has a kernel for the CPU has one for
  // CUDA by this, so that the same kernels run and no decomposition looks for code that is not
  // there.
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

// What tests ask for.

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

// The n-th call from now on of that operator ("aten::add.out"), or of any with "*", raises.
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
STANDIN_EXPORT int standin_device_current() { return this_device; }
STANDIN_EXPORT int64_t standin_device_stream(int device) { return this_threads_streams[device]; }
STANDIN_EXPORT void standin_device_set_stream(int device, int64_t stream) {
  this_threads_streams[device] = stream;
}
STANDIN_EXPORT void standin_device_set_current(int device) {
  this_device = static_cast<c10::DeviceIndex>(device);
}

// Captures what runs on a stream from now on, on any thread.
STANDIN_EXPORT void* standin_graph_begin(int device, int64_t stream) {
  return BeginCapture(static_cast<c10::DeviceIndex>(device), stream);
}

STANDIN_EXPORT int standin_graph_is_capturing() {
  return CaptureOn(this_device, this_threads_streams[this_device]) != nullptr ? 1 : 0;
}

// How many operators were captured; -1 where the capture is void.
STANDIN_EXPORT int64_t standin_graph_end(void* graph) {
  return EndCapture(static_cast<Graph*>(graph));
}

// Has the signature of the driver stand-in's callbacks.
STANDIN_EXPORT void standin_graph_launch(void* graph) { static_cast<Graph*>(graph)->Replay(); }

// What launches an instance of a graph whose memory is gone.
STANDIN_EXPORT void standin_graph_gone(void*) { Note("error", "graph is gone", this_device); }

// Memory of the graph's lives on where tensors use it.
STANDIN_EXPORT void standin_graph_release(void* graph) { delete static_cast<Graph*>(graph); }
