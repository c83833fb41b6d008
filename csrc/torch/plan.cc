#include "plan.h"

#include <algorithm>
#include <exception>
#include <stdexcept>

#include "place.h"

namespace torchcall {
namespace {

// A pool larger than the number of concurrent calls would only waste memory.
constexpr size_t kMaxPooled = 64;

}  // namespace

Plan::Plan(std::shared_ptr<Model> model, const TcPlanSpec& spec, CallForm form, Autograd autograd)
    : model_(std::move(model)),
      form_(std::move(form)),
      index_checks_(spec, form_),
      autograd_(autograd) {
  for (const CallForm::Input& input : form_.inputs) copied_per_call_ += input.copied;
}

std::string Plan::Run(const DLTensor* inputs, const DLTensor* outputs, TcPlace place) {
  const ThreadScope threads(threads_.load(std::memory_order_relaxed));
  const StreamScope stream(place);
  const TorchStateGuard guard(autograd_);
  if (copied_per_call_ > 0) model_->Count(0, copied_per_call_);
  const bool retained = Compute(inputs, outputs, place);
  if (!retained || place.purpose == TC_COMPUTE) return "";
  if (place.purpose == TC_RECORD) throw std::runtime_error(kRetainsInput);
  return kRetainsInput;
}

ContextPlan::ContextPlan(std::shared_ptr<Model> model, const TcPlanSpec& spec, CallForm form,
                         Autograd autograd, bool pools)
    : Plan(std::move(model), spec, std::move(form), autograd), pools_(pools) {
  if (pools_) pool_.reserve(kMaxPooled);
}

std::unique_ptr<CallContext> ContextPlan::Acquire(TcPlace place) {
  if (pools_ && place.purpose != TC_RECORD) {
    const std::lock_guard<std::mutex> lock(pool_mutex_);
    const auto found =
        std::find_if(pool_.rbegin(), pool_.rend(), [&](const std::unique_ptr<CallContext>& free) {
          return free->place.stream == place.stream &&
                 free->place.device.device_type == place.device.device_type &&
                 free->place.device.device_id == place.device.device_id;
        });
    if (found != pool_.rend()) {
      std::swap(*found, pool_.back());
      std::unique_ptr<CallContext> context = std::move(pool_.back());
      pool_.pop_back();
      return context;
    }
  }
  return NewContext(place);
}

void ContextPlan::ReturnToPool(std::unique_ptr<CallContext> context) noexcept {
  if (!pools_ || context->place.purpose == TC_RECORD) return;
  const std::lock_guard<std::mutex> lock(pool_mutex_);
  if (pool_.size() < kMaxPooled) pool_.push_back(std::move(context));  // within its capacity
}

void ContextPlan::Invoke(CallContext& call, const DLTensor* inputs, const DLTensor* outputs) {
  const c10::Device device = DeviceOf(call.place.device);
  form().ReadLengths(inputs, device, call.sizes);
  call.inputs.Point(inputs, call.sizes);
  // On other devices, reading an entry would wait for the device.
  if (device.is_cpu()) {
    index_checks().Run(form(), [&](int64_t i) { return call.inputs[i]; });
  }
  call.Invoke();
  const int64_t written = call.inputs.FindUnexpectedWrite();
  if (written >= 0) {
    throw std::runtime_error(form().inputs[written].name +
                             ": expected to be read only, got an in-place write by the model");
  }
  for (size_t i = 0; i < form().outputs.size(); ++i) {
    form().CopyOut(form().outputs[i], *call.outputs[i], call.sizes, device, outputs[i].data);
  }
}

bool ContextPlan::Compute(const DLTensor* inputs, const DLTensor* outputs, TcPlace place) {
  std::unique_ptr<CallContext> call = Acquire(place);
  // Inputs that a failing model retained must not dangle either: release them before rethrowing.
  std::exception_ptr failure;
  try {
    Invoke(*call, inputs, outputs);
  } catch (...) {
    failure = std::current_exception();
  }
  const CallInputs::Retained retained = call->Release();
  if (retained.count > 0) CountRetained(retained.count);
  if (failure) std::rethrow_exception(failure);
  if (retained.lost >= 0) {
    throw std::invalid_argument(
        form().inputs[retained.lost].name +
        ": expected memory for a copy of this input, which the model retained after the call, got "
        "none; the retained tensor cannot be read");
  }
  if (retained.count == 0) ReturnToPool(std::move(call));
  return retained.count > 0;
}

}  // namespace torchcall
