#include "plan.h"

#include <stdexcept>

namespace torchcall {
namespace {

// More contexts than threads that can be inside a call at once would only hold memory.
constexpr size_t kMostPooled = 64;

}  // namespace

Plan::Plan(std::shared_ptr<Model> model, CallForm form, Autograd autograd, bool pools)
    : model_(std::move(model)), form_(std::move(form)), autograd_(autograd), pools_(pools) {
  for (const CallForm::Operand& operand : form_.operands) copied_per_call_ += operand.copied;
}

std::unique_ptr<CallContext> Plan::Acquire() {
  if (pools_) {
    const std::lock_guard<std::mutex> lock(pool_mutex_);
    if (!pool_.empty()) {
      std::unique_ptr<CallContext> context = std::move(pool_.back());
      pool_.pop_back();
      return context;
    }
  }
  return NewContext();
}

void Plan::GiveBack(std::unique_ptr<CallContext> context) {
  if (!pools_) return;
  const std::lock_guard<std::mutex> lock(pool_mutex_);
  if (pool_.size() < kMostPooled) pool_.push_back(std::move(context));
}

void Plan::Run(const DLTensor* inputs, const DLTensor* outputs, TcPlace place) {
  (void)place;
  ApplyThreadBudget();
  std::unique_ptr<CallContext> context = Acquire();
  // Runs when the model raises too: what it kept until then must not dangle either.
  struct Finisher {
    Plan* plan;
    std::unique_ptr<CallContext>& context;
    bool succeeded = false;
    ~Finisher() {
      const int64_t kept = context->Release();
      if (kept + plan->copied_per_call_ > 0) plan->model_->Count(kept, plan->copied_per_call_);
      if (succeeded && kept == 0) plan->GiveBack(std::move(context));
    }
  } finisher{this, context};

  const TorchStateGuard guard(autograd_);
  form_.ReadLengths(inputs, context->sizes);
  context->inputs.Point(inputs, context->sizes);
  context->Invoke();
  const int64_t written = context->inputs.FindUnforeseenWrite();
  if (written >= 0) {
    throw std::runtime_error(form_.operands[written].name +
                             ": expected to be read only, but the model wrote to it in place");
  }
  for (size_t i = 0; i < form_.outputs.size(); ++i) {
    form_.CopyOut(form_.outputs[i], *context->outputs[i], context->sizes, outputs[i].data);
  }
  finisher.succeeded = true;
}

}  // namespace torchcall
