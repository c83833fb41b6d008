#include "plan.h"

#include <algorithm>
#include <stdexcept>

#include "place.h"

namespace torchcall {
namespace {

// More contexts than threads that can be inside a call at once would only hold memory.
constexpr size_t kMostPooled = 64;

}  // namespace

Plan::Plan(std::shared_ptr<Model> model, const TcPlanSpec& spec, CallForm form, Autograd autograd,
           bool pools)
    : model_(std::move(model)),
      form_(std::move(form)),
      index_checks_(spec, form_),
      autograd_(autograd),
      pools_(pools) {
  for (const CallForm::Operand& operand : form_.operands) copied_per_call_ += operand.copied;
}

std::unique_ptr<CallContext> Plan::Acquire(TcPlace place) {
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

void Plan::GiveBack(std::unique_ptr<CallContext> context) {
  if (!pools_ || context->place.purpose == TC_RECORD) return;
  const std::lock_guard<std::mutex> lock(pool_mutex_);
  if (pool_.size() < kMostPooled) pool_.push_back(std::move(context));
}

std::string Plan::Run(const DLTensor* inputs, const DLTensor* outputs, TcPlace place) {
  ApplyThreadBudget();
  const StreamScope stream(place);
  const TorchStateGuard guard(autograd_);
  const c10::Device device = DeviceOf(place.device);
  std::unique_ptr<CallContext> context = Acquire(place);
  // Runs when the model raises too: what it kept until then must not dangle either.
  struct Finisher {
    Plan* plan;
    std::unique_ptr<CallContext> context;
    ~Finisher() { Finish(/*succeeded=*/false); }
    int64_t Finish(bool succeeded) {
      if (context == nullptr) return 0;
      const int64_t kept = context->Release();
      if (kept + plan->copied_per_call_ > 0) plan->model_->Count(kept, plan->copied_per_call_);
      if (succeeded && kept == 0) plan->GiveBack(std::move(context));
      context.reset();
      return kept;
    }
  } finisher{this, std::move(context)};

  CallContext& call = *finisher.context;
  form_.ReadLengths(inputs, device, call.sizes);
  call.inputs.Point(inputs, call.sizes);
  // Elsewhere to read an entry would mean to wait for the device.
  if (device.is_cpu()) index_checks_.Run(form_, call.inputs);
  call.Invoke();
  const int64_t written = call.inputs.FindUnforeseenWrite();
  if (written >= 0) {
    throw std::runtime_error(form_.operands[written].name +
                             ": expected to be read only, but the model wrote to it in place");
  }
  for (size_t i = 0; i < form_.outputs.size(); ++i) {
    form_.CopyOut(form_.outputs[i], *call.outputs[i], call.sizes, device, outputs[i].data);
  }
  const bool kept = finisher.Finish(/*succeeded=*/true) > 0;
  const std::string reason = kept ? "it keeps an input after the call" : "";
  if (kept && place.purpose == TC_RECORD) throw std::runtime_error(reason);
  return place.purpose == TC_OBSERVE ? reason : "";
}

}  // namespace torchcall
