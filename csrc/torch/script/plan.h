// Calls of a TorchScript model. torch's interpreter runs the graph without the profiling executor.

#ifndef TORCHCALL_TORCH_SCRIPT_PLAN_H_
#define TORCHCALL_TORCH_SCRIPT_PLAN_H_

#include <memory>

#include "../derivatives.h"
#include "../plan.h"
#include "../tree.h"
#include "model.h"
#include "parameters.h"
#include "values.h"

namespace torchcall {

class ScriptPlan : public ContextPlan {
 public:
  // Throws std::invalid_argument, naming the input or output.
  static std::unique_ptr<ScriptPlan> Make(std::shared_ptr<ScriptModel> model,
                                          const TcPlanSpec& spec);

  std::shared_ptr<const void> Hold(DLDevice device) const override {
    return model_->Hold(DeviceOf(device));
  }

 private:
  class Context;
  class DerivativeContext;
  struct Arguments {
    Arguments(const ScriptModel& model, const TcPlanSpec& spec);
    Tree call;
    ArgumentBuilder builder;  // points into `call`
    ParameterSlots parameters;
    // Build the arguments for every call, because the model changes a container or an input.
    bool rebuild = false;
    bool owns_state = false;  // calls get a copy of everything that the module may change
  };

  ScriptPlan(std::shared_ptr<ScriptModel> model, const TcPlanSpec& spec, CallForm form,
             std::unique_ptr<Arguments> arguments);
  // Marks in `form` the inputs that the model may write to.
  static std::unique_ptr<Arguments> Analyse(const ScriptModel& model, const TcPlanSpec& spec,
                                            CallForm& form);
  std::unique_ptr<CallContext> NewContext(TcPlace place) const override;
  // The module of a call whose parameters are inputs.
  BoundModule Bind(const ModelInstance& instance, const std::vector<at::Tensor>& inputs) const;

  std::shared_ptr<ScriptModel> model_;
  std::unique_ptr<Arguments> arguments_;
  Tree result_;
  Derivatives derivatives_;
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_SCRIPT_PLAN_H_
