#include "eager.h"

#include <algorithm>
#include <string>

#include "fingerprint.h"
#include "place.h"

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

namespace {

at::Tensor TensorAt(void* address) {
  return at::Tensor(c10::intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl>::reclaim_copy(
      static_cast<at::TensorImpl*>(address)));
}

// Keeps the error that a callable writes.
class Words {
 public:
  TcSink sink() {
    return {this, [](void* self, const char* text, size_t size) {
              static_cast<Words*>(self)->text_.assign(text, size);
            }};
  }
  void RaiseIf(TcStatus status) const {
    if (status != TC_OK) throw CallableError(text_);
  }

 private:
  std::string text_;
};

}  // namespace

class CallablePlan::Context : public CallContext {
 public:
  Context(const CallablePlan& plan, TcPlace place, Frame frame)
      : CallContext(place,
                    CallInputs(plan.form(), DeviceOf(place.device), /*dense=*/false,
                               std::move(frame.tensors)),
                    plan.form().lengths.size(), plan.form().outputs.size()),
        callable_(plan.callable_),
        frame_(frame.address),
        raw_(outputs.size()),
        results_(outputs.size()),
        kept_(inputs.size()) {
    inputs.CountUses();
  }
  ~Context() override { callable_->table.close(callable_->table.self, frame_); }

  void Invoke() override {
    Words error;
    ran_ = true;
    error.RaiseIf(callable_->table.run(callable_->table.self, frame_, raw_.data(),
                                       static_cast<int64_t>(raw_.size()), error.sink()));
    for (size_t i = 0; i < raw_.size(); ++i) {
      results_[i] = TensorAt(raw_[i]);
      outputs[i] = &results_[i];
    }
  }

  int64_t Release() override {
    for (at::Tensor& result : results_) result.reset();
    if (!ran_) return inputs.Finish(/*all_kept=*/false);
    ran_ = false;
    std::fill(kept_.begin(), kept_.end(), 0);
    callable_->table.finish(callable_->table.self, frame_, kept_.data());
    return inputs.Finish(/*all_kept=*/false, kept_.data());
  }

 private:
  std::shared_ptr<const Callable> callable_;
  void* frame_;
  bool ran_ = false;
  std::vector<void*> raw_;
  std::vector<at::Tensor> results_;
  std::vector<int32_t> kept_;
};

CallablePlan::CallablePlan(std::shared_ptr<CallableModel> model, const TcPlanSpec& spec)
    : Plan(model, spec, CallForm(spec), model->autograd(), /*pools=*/true),
      callable_(std::make_shared<Callable>(spec.callable)) {}

CallablePlan::Frame CallablePlan::Open(DLDevice device) const {
  Frame frame;
  std::vector<void*> addresses(form().operands.size(), nullptr);
  Words error;
  const TorchStateGuard guard(Autograd::kOff);  // ordinary tensors, whatever mode the caller is in
  error.RaiseIf(callable_->table.open(callable_->table.self, device,
                                      static_cast<int64_t>(addresses.size()), &frame.address,
                                      addresses.data(), error.sink()));
  for (void* address : addresses) {
    frame.tensors.push_back(address == nullptr ? at::Tensor() : TensorAt(address));
  }
  return frame;
}

std::unique_ptr<CallContext> CallablePlan::NewContext(TcPlace place) const {
  return std::make_unique<Context>(*this, place, Open(place.device));
}

std::shared_ptr<const void> CallablePlan::Hold(DLDevice device) const {
  Words error;
  void* held = nullptr;
  error.RaiseIf(callable_->table.hold(callable_->table.self, device, &held, error.sink()));
  return {held, [callable = callable_](void* address) {
            callable->table.let_go(callable->table.self, address);
          }};
}

}  // namespace torchcall
