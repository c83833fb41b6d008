#include "plan.h"

#include <algorithm>
#include <stdexcept>

#include "../place.h"

namespace torchcall {
namespace {

// Removes the graph of the call from the state that the model keeps. Otherwise it would grow with
// each call.
void DetachState(const ModelInstance& instance) {
  if (!instance.module) return;
  for (const c10::IValue& value : instance.module->attributes(/*recurse=*/true)) {
    if (!value.isTensor()) continue;
    const at::Tensor& tensor = value.toTensor();
    if (tensor.defined() && !tensor.is_leaf() && !tensor.is_view()) tensor.detach_();
  }
}

}  // namespace

// Holds the argument containers and the interpreter's stack, besides the input tensors.
class ScriptPlan::Context : public CallContext {
 public:
  Context(const ScriptPlan& plan, TcPlace place)
      : CallContext(place, CallInputs(plan.form(), DeviceOf(place.device), /*dense=*/false),
                    plan.form().lengths.size(), plan.form().outputs.size()),
        plan_(plan) {
    arguments_ = plan.arguments_->builder.Build(inputs.Tensors(), containers_);
    if (!plan.arguments_->parameters.empty()) {
      bound_to_ = plan.model_->instance(DeviceOf(place.device));
      bound_ = plan.Bind(*bound_to_, inputs.Tensors());
    }
    inputs.CountUses();
    for (const c10::IValue& container : containers_) {
      container_uses_.push_back(container.use_count());
    }
  }

  void Invoke() override {
    instance_ = plan_.model_->instance(DeviceOf(place.device));
    if (bound_) {
      if (bound_to_ != instance_) Rebind();
      stack_.emplace_back(bound_->object());
    } else if (instance_->module) {
      stack_.emplace_back(instance_->module->_ivalue());
    }
    stack_.insert(stack_.end(), arguments_.begin(), arguments_.end());
    torch::jit::InterpreterState(instance_->code).run(stack_);
    if (stack_.size() != 1) {
      throw std::runtime_error("expected one result, got " + std::to_string(stack_.size()));
    }
    if (bound_) bound_->CheckBuffers();
    FlattenResult(stack_.back(), plan_.result_, plan_.form().selects_outputs, outputs);
  }

  CallInputs::Retained Release() noexcept override {
    stack_.clear();
    bool container_retained = false;
    for (size_t i = 0; i < containers_.size(); ++i) {
      container_retained = container_retained || containers_[i].use_count() > container_uses_[i];
    }
    const CallInputs::Retained retained = inputs.Finish(/*all=*/container_retained);
    instance_.reset();
    return retained;
  }

 private:
  // The weights were reloaded. The new object refers to each input as often as the old one.
  void Rebind() {
    bound_.reset();
    bound_to_ = instance_;
    bound_ = plan_.Bind(*bound_to_, inputs.Tensors());
  }

  const ScriptPlan& plan_;
  std::shared_ptr<const ModelInstance> instance_;
  std::shared_ptr<const ModelInstance> bound_to_;
  std::optional<BoundModule> bound_;  // where parameters are inputs
  std::vector<c10::IValue> containers_;
  std::vector<size_t> container_uses_;
  std::vector<c10::IValue> arguments_;
  std::vector<c10::IValue> stack_;
};

// The model's inputs that are differentiated become leaves of a graph that lasts for one call.
class ScriptPlan::DerivativeContext : public CallContext {
 public:
  DerivativeContext(const ScriptPlan& plan, TcPlace place)
      : CallContext(place, CallInputs(plan.form(), DeviceOf(place.device), /*dense=*/false),
                    plan.form().lengths.size(), plan.form().outputs.size()),
        plan_(plan) {
    inputs.CountUses();
  }

  void Invoke() override {
    instance_ = plan_.model_->instance(DeviceOf(place.device));
    const Derivatives& derivatives = plan_.derivatives_;
    const std::vector<at::Tensor> leaves = derivatives.Leaves(inputs.Tensors());
    const std::vector<at::Tensor> given = derivatives.ModelInputs(leaves, plan_.form());
    std::vector<c10::IValue> containers;
    std::vector<c10::IValue> stack;
    std::optional<BoundModule> bound;
    if (!plan_.arguments_->parameters.empty()) {
      bound = plan_.Bind(*instance_, given);
      stack.emplace_back(bound->object());
    } else if (instance_->module) {
      stack.emplace_back(instance_->Detached()._ivalue());
    }
    for (c10::IValue& argument : plan_.arguments_->builder.Build(given, containers)) {
      stack.push_back(std::move(argument));
    }
    torch::jit::InterpreterState(instance_->code).run(stack);
    if (stack.size() != 1) {
      throw std::runtime_error("expected one result, got " + std::to_string(stack.size()));
    }
    if (bound) bound->CheckBuffers();
    std::vector<const at::Tensor*> results(derivatives.num_model_outputs());
    FlattenResult(stack.back(), plan_.result_, plan_.form().selects_outputs, results);
    gradients_ = derivatives.Gradients(results, leaves, plan_.form());
    for (size_t i = 0; i < gradients_.size(); ++i) outputs[i] = &gradients_[i];
    if (!bound && plan_.model_->use().changes_state) DetachState(*instance_);
  }

  CallInputs::Retained Release() noexcept override {
    gradients_.clear();
    const CallInputs::Retained retained = inputs.Finish(/*all=*/false);
    instance_.reset();
    return retained;
  }

 private:
  const ScriptPlan& plan_;
  std::shared_ptr<const ModelInstance> instance_;
  std::vector<at::Tensor> gradients_;
};

ScriptPlan::Arguments::Arguments(const ScriptModel& model, const TcPlanSpec& spec)
    : call(ParseTree(spec.arguments, spec.num_arguments)),
      builder(call, model.schema(), model.is_method()),
      parameters(spec, model.module()) {}

BoundModule ScriptPlan::Bind(const ModelInstance& instance,
                             const std::vector<at::Tensor>& inputs) const {
  return arguments_->parameters.Bind(*instance.module, inputs, arguments_->owns_state);
}

std::unique_ptr<ScriptPlan::Arguments> ScriptPlan::Analyse(const ScriptModel& model,
                                                           const TcPlanSpec& spec, CallForm& form) {
  auto arguments = std::make_unique<Arguments>(model, spec);
  const size_t first = arguments->parameters.num_inputs();
  if (first > 0 && (model.use().changes_state || model.use().updates_statistics)) {
    arguments->owns_state = arguments->rebuild = true;
    for (size_t i = 0; i < first; ++i) form.inputs.at(i).copied = true;
  }
  const size_t given = arguments->builder.argument_of_input().size();  // not the cotangents
  for (size_t i = first; i < std::min(given, form.inputs.size()); ++i) {
    if (form.inputs[i].is_length) continue;
    const size_t argument = arguments->builder.argument_of_input().at(i);
    const InputUse& use = model.use().inputs.at(argument);
    form.inputs[i].copied = form.inputs[i].copied || use.tensors_written;
    arguments->rebuild = arguments->rebuild || use.tensors_written || use.containers_written;
  }
  return arguments;
}

std::unique_ptr<ScriptPlan> ScriptPlan::Make(std::shared_ptr<ScriptModel> model,
                                             const TcPlanSpec& spec) {
  CallForm form(spec);
  std::unique_ptr<Arguments> arguments = Analyse(*model, spec, form);
  std::unique_ptr<ScriptPlan> plan(
      new ScriptPlan(std::move(model), spec, std::move(form), std::move(arguments)));
  // Build the arguments once, so that a structure that does not fit the signature fails here.
  plan->ReturnToPool(plan->NewContext(kCpuPlace));
  return plan;
}

ScriptPlan::ScriptPlan(std::shared_ptr<ScriptModel> model, const TcPlanSpec& spec, CallForm form,
                       std::unique_ptr<Arguments> arguments)
    : ContextPlan(model, spec, std::move(form),
                  spec.num_derivatives > 0 ? Autograd::kRecord : model->autograd(),
                  /*pools=*/!arguments->rebuild),
      model_(std::move(model)),
      arguments_(std::move(arguments)),
      result_(ParseTree(spec.results, spec.num_results)),
      derivatives_(spec, result_, model_->differentiates()) {}

std::unique_ptr<Plan> ScriptModel::NewPlan(const TcPlanSpec& spec) {
  return ScriptPlan::Make(std::static_pointer_cast<ScriptModel>(shared_from_this()), spec);
}

std::unique_ptr<CallContext> ScriptPlan::NewContext(TcPlace place) const {
  if (!derivatives_.empty()) return std::make_unique<DerivativeContext>(*this, place);
  return std::make_unique<Context>(*this, place);
}

}  // namespace torchcall
