#include "model.h"

#include <torch/csrc/jit/passes/autocast.h>
#include <torch/csrc/jit/passes/common_subexpression_elimination.h>
#include <torch/csrc/jit/passes/constant_pooling.h>
#include <torch/csrc/jit/passes/constant_propagation.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>
#include <torch/csrc/jit/passes/erase_number_types.h>
#include <torch/csrc/jit/passes/inliner.h>
#include <torch/csrc/jit/passes/shape_analysis.h>

#include <sstream>
#include <stdexcept>
#include <unordered_map>

#include "../fingerprint.h"
#include "values.h"

namespace torchcall {
namespace {

using torch::jit::Graph;
using torch::jit::Module;

// Copies a module object, with the tensors' memory shared and requires_grad off. Otherwise every
// call of a model that differentiates would record a graph over its weights. The caller's module
// does not change.
class DetachingCopier {
 public:
  c10::intrusive_ptr<c10::ivalue::Object> Copy(
      const c10::intrusive_ptr<c10::ivalue::Object>& object) {
    const auto known = copies_.find(object.get());
    if (known != copies_.end()) return known->second;
    auto copy = object->copy();
    copies_.emplace(object.get(), copy);
    for (size_t i = 0; i < copy->slots().size(); ++i) {
      const c10::IValue& slot = copy->getSlot(i);
      if (slot.isModule()) {
        copy->setSlot(i, Copy(slot.toObject()));
      } else if (slot.isTensor() && slot.toTensor().defined() && slot.toTensor().requires_grad()) {
        copy->setSlot(i, slot.toTensor().detach());
      }
    }
    return copy;
  }

 private:
  std::unordered_map<const c10::ivalue::Object*, c10::intrusive_ptr<c10::ivalue::Object>> copies_;
};

bool HasTrainableWeights(const Module& module) {
  for (const at::Tensor& weight : module.parameters()) {
    if (weight.requires_grad()) return true;
  }
  return false;
}

void RefuseMetaTensors(const Module& module) {
  const auto check = [](const torch::jit::NameTensor& entry) {
    if (entry.value.is_meta()) {
      throw std::invalid_argument("weight '" + entry.name +
                                  "': expected data, got a tensor on the meta device");
    }
  };
  for (const auto& entry : module.named_parameters()) check(entry);
  for (const auto& entry : module.named_buffers()) check(entry);
}

// The device of all weights; the CPU if they are on several devices or there are none.
c10::Device HomeOf(const Module& module) {
  std::optional<c10::Device> home;
  const auto visit = [&](const at::Tensor& weight) {
    if (home && *home != weight.device()) {
      home = c10::kCPU;
    } else if (!home) {
      home = weight.device();
    }
  };
  for (const at::Tensor& weight : module.parameters()) visit(weight);
  for (const at::Tensor& buffer : module.buffers()) visit(buffer);
  const bool known = home && (home->is_cpu() || home->is_cuda());
  return known ? *home : c10::Device(c10::kCPU);
}

// Whether all weights are on `device`. A module without weights is judged by the tensors among its
// attributes, except scalars, which may stay on the CPU.
bool LivesOn(const Module& module, c10::Device device) {
  bool has_weights = false;
  bool there = true;
  const auto visit = [&](const at::Tensor& weight) {
    has_weights = true;
    there = there && weight.device() == device;
  };
  for (const at::Tensor& weight : module.parameters()) visit(weight);
  for (const at::Tensor& buffer : module.buffers()) visit(buffer);
  if (has_weights) return there;
  for (const c10::IValue& value : module.attributes()) {
    if (value.isTensor() && value.toTensor().defined() && value.toTensor().dim() > 0) {
      visit(value.toTensor());
    }
  }
  return there;
}

// Tracing writes the example's device into the code: as device constants and as the device of
// constant tensors. Scalar tensors stay on the CPU, where code may read them without waiting.
void MoveConstants(torch::jit::Block* block, c10::Device device) {
  for (torch::jit::Node* node : block->nodes()) {
    for (torch::jit::Block* inner : node->blocks()) MoveConstants(inner, device);
    if (node->kind() != torch::jit::prim::Constant) continue;
    if (node->output()->type()->kind() == c10::TypeKind::DeviceObjType) {
      const c10::Device baked(node->s(torch::jit::attr::value));
      if (baked.is_cpu() || baked.is_cuda()) node->s_(torch::jit::attr::value, device.str());
    } else if (node->hasAttribute(torch::jit::attr::value) &&
               node->kindOf(torch::jit::attr::value) == torch::jit::AttributeKind::t) {
      const at::Tensor constant = node->t(torch::jit::attr::value);
      if (constant.dim() > 0) node->t_(torch::jit::attr::value, constant.to(device));
    }
  }
}

std::shared_ptr<Graph> PlainGraph(torch::jit::Function& function) {
  torch::jit::GraphFunction* graph_function = torch::jit::tryToGraphFunction(function);
  if (graph_function == nullptr) {
    throw std::invalid_argument("'" + function.name() + "' is not TorchScript code");
  }
  std::shared_ptr<Graph> graph = graph_function->graph()->copy();
  torch::jit::Inline(*graph);
  // A traced graph contains the example's shapes, which may differ from the call's.
  torch::jit::EraseShapeInformation(graph);
  return graph;
}

// Only passes that keep results bitwise equal. torch's profiling executor is not used: it
// recompiles during the first calls, and its fusions gain nothing for these models on a CPU.
std::shared_ptr<Graph> Simplified(const std::shared_ptr<Graph>& plain) {
  std::shared_ptr<Graph> graph = plain->copy();
  torch::jit::Autocast(graph);  // implements `with torch.autocast(...)` in the model
  // Immutable types only: a tensor made by the model must be new in each call.
  torch::jit::ConstantPropagationImmutableTypes(graph);
  torch::jit::EliminateCommonSubexpression(graph);
  torch::jit::ConstantPooling(graph);
  torch::jit::EliminateDeadCode(graph);
  return graph;
}

std::shared_ptr<ModelInstance> MakeInstance(torch::jit::Function& function, c10::Device device) {
  auto instance = std::make_shared<ModelInstance>();
  instance->function = &function;
  const std::shared_ptr<Graph> plain = PlainGraph(function);
  MoveConstants(plain->block(), device);
  instance->graph = Simplified(plain);
  instance->code = torch::jit::Code(instance->graph, function.name());
  return instance;
}

// Removes the numbers that distinguish types of one name: they depend on what was scripted before.
std::string WithoutMangling(std::string text) {
  static const std::string kMark = "___torch_mangle_";
  for (size_t at = text.find(kMark); at != std::string::npos; at = text.find(kMark, at)) {
    const size_t end = text.find('.', at);
    text.erase(at, end == std::string::npos ? end : end + 1 - at);
  }
  return text;
}

// Identifies the code without the weights, so it must run before freezing.
uint64_t FingerprintOf(torch::jit::Function& function) {
  return Fingerprint(WithoutMangling(PlainGraph(function)->toString(false)));
}

void RefuseHooks(const Module& module) {
  const auto type = module.type();
  if (type->getForwardHooks().empty() && type->getForwardPreHooks().empty()) return;
  throw std::invalid_argument(
      "expected a module without forward hooks, got one with hooks, which C++ does not run; make "
      "it "
      "the submodule of a module whose forward calls it");
}

std::string LastPart(const std::string& qualified_name) {
  return qualified_name.substr(qualified_name.rfind('.') + 1);
}

bool IsTraining(const Module& module) {
  return module.hasattr("training") && module.attr("training").isBool() && module.is_training();
}

// A module that assigns attributes must assign to itself, not to a copy.
Module WithoutTrainableWeights(const Module& module) {
  if (!HasTrainableWeights(module)) return module;
  const GraphUse use = AnalyseGraph(PlainGraph(module.get_method("forward").function()));
  return use.changes_state ? module : Module(DetachingCopier().Copy(module._ivalue()));
}

// The module that calls on `device` run.
Module Prepared(Module module, c10::Device device, TcModelOptions options) {
  if (!LivesOn(module, device)) module = module.deepcopy(device);
  if (options.freeze) return torch::jit::freeze(module);
  return options.requires_grad ? WithoutTrainableWeights(module) : module;
}

std::shared_ptr<const ModelInstance> NewInstance(const ModelOrigin& origin, c10::Device device,
                                                 TcModelOptions options) {
  const TorchStateGuard guard(Autograd::kOff);
  if (!origin.module) {
    const auto instance = MakeInstance(*origin.function->function_, device);
    instance->unit = origin.function->cu_;
    return instance;
  }
  Module module = Prepared(*origin.module, device, options);
  const auto instance = MakeInstance(module.get_method("forward").function(), device);
  instance->module = std::move(module);
  return instance;
}

}  // namespace

const Module& ModelInstance::Detached() const {
  std::call_once(detached_once_, [&] { detached_ = WithoutTrainableWeights(*module); });
  return *detached_;
}

std::shared_ptr<Model> ScriptModel::FromModule(Module module, TcModelOptions options) {
  const std::string name = LastPart(module.type()->name()->qualifiedName());
  if (!module.find_method("forward")) {
    throw std::invalid_argument("the module has no method 'forward'");
  }
  RefuseHooks(module);
  RefuseMetaTensors(module);
  if (options.freeze && IsTraining(module)) {
    throw std::invalid_argument(
        "freeze=True: expected a module in eval mode, got one in training mode; call "
        "module.eval() first");
  }
  // Frozen code shares its constants with the module that it was made from.
  if (options.freeze) module = module.deepcopy();
  const uint64_t fingerprint = FingerprintOf(module.get_method("forward").function());
  const c10::Device home = HomeOf(module);
  return std::shared_ptr<Model>(
      new ScriptModel({std::move(module), std::nullopt, home}, name, fingerprint, options));
}

std::shared_ptr<Model> ScriptModel::FromFunction(const torch::jit::StrongFunctionPtr& function,
                                                 TcModelOptions options) {
  if (options.freeze) throw std::invalid_argument("freeze=True: expected a module, got a function");
  return std::shared_ptr<Model>(new ScriptModel({std::nullopt, function, c10::kCPU},
                                                function.function_->name(),
                                                FingerprintOf(*function.function_), options));
}

ScriptModel::ScriptModel(ModelOrigin origin, std::string name, uint64_t fingerprint,
                         TcModelOptions options)
    : origin_(std::move(origin)),
      options_(options),
      name_(std::move(name)),
      fingerprint_(fingerprint),
      is_method_(origin_.module.has_value()),
      training_(is_method_ && IsTraining(*origin_.module)) {
  const std::shared_ptr<const ModelInstance> at_home = instance(origin_.home);
  schema_ = at_home->function->getSchema();
  schema_text_ = c10::toString(*schema_);
  use_ = AnalyseGraph(at_home->graph);
  autograd_ = options.requires_grad ? Autograd::kRecord
              // Tensors made in inference mode must not be stored in a module that others use.
              : use_.changes_state ? Autograd::kOff
                                   : Autograd::kInference;
}

std::shared_ptr<const ModelInstance> ScriptModel::instance(c10::Device device) const {
  return instances_.Get(device, [&] { return NewInstance(origin_, device, options_); });
}

std::shared_ptr<const ModelInstance> ScriptModel::Hold(c10::Device device) const {
  instances_.ReleaseReplaced();
  return instance(device);
}

void ScriptModel::Replace(const Model& fresh) {
  const auto* script = dynamic_cast<const ScriptModel*>(&fresh);
  if (script == nullptr || script->fingerprint_ != fingerprint_) {
    throw std::invalid_argument(
        "refresh: expected the same code with new weights, got other code; make a new wrapper");
  }
  const c10::Device home = script->origin_.home;
  instances_.Replace([&] { origin_ = script->origin_; }, home, script->instance(home));
}

TcModelInfo ScriptModel::info() const {
  return {name_.c_str(),      schema_text_.c_str(),      fingerprint_, use_.differentiates,
          use_.changes_state, use_.draws_random_numbers, training_};
}

std::string ScriptModel::Serialize() const {
  const TorchStateGuard guard(Autograd::kOff);
  const std::shared_ptr<const ModelInstance> held = instance(c10::kCPU);
  if (!held->module) throw std::invalid_argument("expected a module, got a script function");
  std::ostringstream stream;
  held->module->save(stream);
  return stream.str();
}

void ScriptModel::CheckArguments(const TcNode* nodes, int64_t count, int64_t num_inputs) const {
  const Tree call = ParseTree(nodes, count);
  const ArgumentBuilder builder(call, *schema_, is_method_);
  std::vector<c10::IValue> containers;
  builder.Build(std::vector<at::Tensor>(num_inputs), containers);
}

}  // namespace torchcall
