// A call of a TorchScript model: torch's interpreter runs the plain graph.

#ifndef TORCHCALL_TORCH_SCRIPT_PLAN_H_
#define TORCHCALL_TORCH_SCRIPT_PLAN_H_

#include <memory>

#include "../plan.h"
#include "../tree.h"
#include "model.h"

namespace torchcall {

class ScriptPlan : public Plan {
 public:
  // Throws std::invalid_argument naming the operand or output that is at fault.
  static std::unique_ptr<ScriptPlan> Make(std::shared_ptr<ScriptModel> model,
                                          const TcPlanSpec& spec);

  std::shared_ptr<const void> Hold(DLDevice device) const override {
    return model_->Hold(DeviceOf(device));
  }

 private:
  class Context;
  struct Arguments {
    Arguments(const ScriptModel& model, const TcPlanSpec& spec);
    Tree call;
    ArgumentBuilder builder;  // points into `call`
    // Built anew for each call: the model changes a container or writes to an input.
    bool rebuild = false;
  };

  ScriptPlan(std::shared_ptr<ScriptModel> model, const TcPlanSpec& spec, CallForm form,
             std::unique_ptr<Arguments> arguments);
  // Marks in `form` the operands that the model may write to.
  static std::unique_ptr<Arguments> Analyse(const ScriptModel& model, const TcPlanSpec& spec,
                                            CallForm& form);
  std::unique_ptr<CallContext> NewContext(TcPlace place) const override;

  std::shared_ptr<ScriptModel> model_;
  std::unique_ptr<Arguments> arguments_;
  Tree result_;
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_SCRIPT_PLAN_H_
