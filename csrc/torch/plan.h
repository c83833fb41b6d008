// One call, settled when the JAX program is traced, and what every engine's plans share: contexts
// (the tensors, containers and results of one call under way) are pooled and used again.

#ifndef TORCHCALL_TORCH_PLAN_H_
#define TORCHCALL_TORCH_PLAN_H_

#include <ATen/core/Tensor.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../engine.h"
#include "call_form.h"
#include "call_inputs.h"
#include "guards.h"
#include "index_checks.h"
#include "model.h"

namespace torchcall {

// Used by one thread at a time, and on one stream: what it owns is used in that stream's order.
class CallContext {
 public:
  CallContext(TcPlace place, CallInputs inputs, size_t num_lengths, size_t num_outputs)
      : place(place), inputs(std::move(inputs)), sizes(num_lengths), outputs(num_outputs) {}
  virtual ~CallContext() = default;
  CallContext(const CallContext&) = delete;
  CallContext& operator=(const CallContext&) = delete;

  // Runs the model on `inputs`, and leaves the addresses of its results in `outputs`.
  virtual void Invoke() = 0;
  // Lets go of all that Invoke made, also where it threw, or was not reached. Returns how many
  // inputs the model kept.
  virtual int64_t Release() = 0;

  const TcPlace place;
  CallInputs inputs;
  std::vector<int64_t> sizes;  // what each of the plan's lengths comes to in this call
  std::vector<const at::Tensor*> outputs;
};

class Plan {
 public:
  virtual ~Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Thread-safe.
  // Of an observed call: why calls like it cannot be captured, empty where nothing tells.
  std::string Run(const DLTensor* inputs, const DLTensor* outputs, TcPlace place);
  // A share of what calls on the device compute with now.
  virtual std::shared_ptr<const void> Hold(DLDevice device) const = 0;

 protected:
  // `pools`: whether a context may serve another call.
  Plan(std::shared_ptr<Model> model, const TcPlanSpec& spec, CallForm form, Autograd autograd,
       bool pools);

  // Called on the place's device and stream.
  virtual std::unique_ptr<CallContext> NewContext(TcPlace place) const = 0;
  // Keeps a context for a later call.
  void GiveBack(std::unique_ptr<CallContext> context);
  const CallForm& form() const { return form_; }

 private:
  std::unique_ptr<CallContext> Acquire(TcPlace place);
  std::shared_ptr<Model> model_;
  CallForm form_;
  IndexChecks index_checks_;
  Autograd autograd_;
  bool pools_;
  int64_t copied_per_call_ = 0;  // operands that the model may write to

  std::mutex pool_mutex_;
  std::vector<std::unique_ptr<CallContext>> pool_;
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_PLAN_H_
