// A TorchScript model: its code, its weights per device, and what its graph does.

#ifndef TORCHCALL_TORCH_SCRIPT_MODEL_H_
#define TORCHCALL_TORCH_SCRIPT_MODEL_H_

#include <torch/csrc/jit/api/compilation_unit.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/runtime/interpreter.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "../../engine.h"
#include "../guards.h"
#include "../model.h"
#include "../place.h"
#include "analysis.h"

namespace torchcall {

// The source of a model: a module, or a function with the compilation unit that owns it.
struct ModelOrigin {
  std::optional<torch::jit::Module> module;
  std::optional<torch::jit::StrongFunctionPtr> function;
  c10::Device home = c10::kCPU;  // the device of the weights; the CPU if they are on several
};

// Code and weights on one device. Immutable.
struct ModelInstance {
  std::optional<torch::jit::Module> module;           // of a ScriptModule
  std::shared_ptr<torch::jit::CompilationUnit> unit;  // owns a script function
  torch::jit::Function* function = nullptr;           // `forward`, or the script function
  torch::jit::Code code;                              // the plain graph, inlined
  std::shared_ptr<torch::jit::Graph> graph;           // the source of `code`

  // The module with weights that do not require grad, for calls that record gradients: otherwise
  // these would record a graph over the weights. Made at the first use.
  const torch::jit::Module& Detached() const;

 private:
  mutable std::once_flag detached_once_;
  mutable std::optional<torch::jit::Module> detached_;
};

class ScriptModel : public Model {
 public:
  static std::shared_ptr<Model> FromModule(torch::jit::Module module, TcModelOptions options);
  static std::shared_ptr<Model> FromFunction(const torch::jit::StrongFunctionPtr& function,
                                             TcModelOptions options);

  TcModelInfo info() const override;
  void Replace(const Model& fresh) override;
  std::string Serialize() const override;
  void CheckArguments(const TcNode* nodes, int64_t count, int64_t num_inputs) const override;
  // Defined in plan.cc: plans depend on models, and models on no plan.
  std::unique_ptr<Plan> NewPlan(const TcPlanSpec& spec) override;

  // On the home device the weights are shared with the source. On other devices they are copies,
  // made at the first call.
  std::shared_ptr<const ModelInstance> instance(c10::Device device) const;
  // The instance for a CUDA graph that is about to be captured. Also releases replaced instances.
  std::shared_ptr<const ModelInstance> Hold(c10::Device device) const;
  const c10::FunctionSchema& schema() const { return *schema_; }
  bool is_method() const { return is_method_; }
  // The source, null for a function.
  const torch::jit::Module* module() const { return origin_.module ? &*origin_.module : nullptr; }
  const GraphUse& use() const { return use_; }
  Autograd autograd() const { return autograd_; }
  // Whether the model differentiates inside.
  bool differentiates() const { return options_.requires_grad != 0; }

 private:
  ScriptModel(ModelOrigin origin, std::string name, uint64_t fingerprint, TcModelOptions options);

  ModelOrigin origin_;
  TcModelOptions options_;
  PerDevice<const ModelInstance> instances_;
  std::string name_;
  std::optional<c10::FunctionSchema> schema_;
  uint64_t fingerprint_;
  std::string schema_text_;
  bool is_method_;
  bool training_;
  GraphUse use_;
  Autograd autograd_;
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_SCRIPT_MODEL_H_
