// Operators of torch's CUDA build, computed on the CPU over the memory of devices that are played,
// in the order of the current stream. Memory, streams, events, captures, views, copies to and from
// the host and generators of random numbers stay torch's own.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/ops/copy_native.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

#include "torch_place.h"
// After the place:
#include "torch_step.h"

namespace standin {
namespace {

constexpr int kAssertFailed = 710;  // what a kernel that finds a bad index leaves behind

bool Draws(const std::string& name) {
  static const std::unordered_set<std::string> some = {
      "aten::bernoulli_.float", "aten::bernoulli_.Tensor", "aten::bernoulli.out",
      "aten::cauchy_",          "aten::exponential_",      "aten::geometric_",
      "aten::log_normal_",      "aten::multinomial",       "aten::native_dropout",
      "aten::normal_",          "aten::uniform_",
  };
  return some.count(name) > 0 || name.rfind("aten::random_", 0) == 0 ||
         name.rfind("aten::randperm", 0) == 0 || name.rfind("aten::normal.", 0) == 0;
}

// What torch's kernels do to the device's generator. The numbers are the CPU's.
void Draw(c10::DeviceIndex device) {
  auto* generator =
      at::check_generator<at::CUDAGeneratorImpl>(at::cuda::detail::getDefaultCUDAGenerator(device));
  const std::lock_guard lock(generator->mutex_);
  generator->philox_cuda_state(4);
}

void Replay(void* step) {
  try {
    static_cast<Step*>(step)->Run();
  } catch (const std::exception& error) {
    standin_cuda_note((std::string("error\t") + error.what()).c_str());
    standin_cuda_fault(kAssertFailed);
  }
}

void Drop(void* step) { delete static_cast<Step*>(step); }

void RunOnCpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string name = c10::toString(op.operator_name());
  Crossing crossing(TakenBy(name));
  const size_t arguments = op.schema().arguments().size();
  const std::vector<c10::IValue> given(stack->end() - arguments, stack->end());
  for (auto value = stack->end() - arguments; value != stack->end(); ++value) {
    *value = crossing.ToCpu(*value);
  }
  const c10::cuda::CUDAGuard on_device(crossing.device());
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  if (Draws(name)) Draw(crossing.device());
  if (Waits(name, crossing)) c10::cuda::stream_synchronize(stream);
  standin_cuda_drain(stream);
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  crossing.Return();
  const size_t results = op.schema().returns().size();
  for (auto value = stack->end() - results; value != stack->end(); ++value) {
    *value = crossing.ToCuda(*value);
  }
  auto step = std::make_unique<Step>(
      op, given, std::vector<c10::IValue>(stack->end() - results, stack->end()));
  const int error = standin_cuda_node(stream, name.c_str(), &Replay, step.release(), &Drop);
  C10_CUDA_CHECK(static_cast<cudaError_t>(error));
}

at::Tensor& Copy(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
  if (!to.is_cuda() || !from.is_cuda() || to.device() != from.device()) {
    return at::native::copy_(to, from, non_blocking);
  }
  torch::jit::Stack stack{to, from, non_blocking};
  RunOnCpu(op, &stack);
  return to;
}

bool StaysTorchs(const std::string& name) {
  static const std::unordered_set<std::string> own = {
      "aten::_copy_from",
      "aten::_copy_from_and_resize",
      "aten::_efficientzerotensor",
      "aten::_local_scalar_dense",
      "aten::_pin_memory",
      "aten::_reshape_alias",
      "aten::as_strided",
      "aten::copy_",
      "aten::empty.memory_format",
      "aten::empty_strided",
      "aten::is_pinned",
      "aten::is_set_to",
      "aten::record_stream",
      "aten::resize_",
      "aten::unfold",
      "aten::view",
      "aten::view_as_complex",
      "aten::view_as_real",
  };
  return own.count(name) > 0 || name.rfind("aten::set_", 0) == 0;
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("copy_", &Copy);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNamesForDispatchKey(c10::DispatchKey::CPU)) {
    const auto op = dispatcher.findOp(name);
    const std::string full = c10::toString(name);
    if (name.name.rfind("aten::", 0) != 0 || !op || !op->hasSchema() || StaysTorchs(full)) continue;
    m.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&RunOnCpu>());
  }
}

}  // namespace
}  // namespace standin
