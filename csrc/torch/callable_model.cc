#include "callable_model.h"

#include "callable_plan.h"
#include "fingerprint.h"

namespace torchcall {

// Never in inference mode: the callable may keep what it computes.
CallableModel::CallableModel(std::string name, TcModelOptions options)
    : name_(std::move(name)),
      autograd_(options.requires_grad ? Autograd::kRecord : Autograd::kOff) {}

TcModelInfo CallableModel::info() const {
  TcModelInfo info{};
  info.name = name_.c_str();
  info.schema = "";
  info.fingerprint = Fingerprint(name_);
  return info;
}

// The callable is the caller's own; what it computes with is not held here.
void CallableModel::Replace(const Model&) {}

std::string CallableModel::Serialize() const {
  throw std::invalid_argument("expected a TorchScript module, got a Python callable");
}

void CallableModel::CheckArguments(const TcNode*, int64_t, int64_t) const {}

std::unique_ptr<Plan> CallableModel::NewPlan(const TcPlanSpec& spec) {
  return std::make_unique<CallablePlan>(std::static_pointer_cast<CallableModel>(shared_from_this()),
                                        spec);
}

}  // namespace torchcall
