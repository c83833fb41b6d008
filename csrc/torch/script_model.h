// A TorchScript model as the plans use it: its code, its weights, and what its graph does.

#ifndef TORCHCALL_TORCH_SCRIPT_MODEL_H_
#define TORCHCALL_TORCH_SCRIPT_MODEL_H_

#include <torch/csrc/jit/api/compilation_unit.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/runtime/interpreter.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>

#include "../engine.h"
#include "analysis.h"
#include "guards.h"
#include "model.h"

namespace torchcall {

// The part that `refresh` replaces: code and weights, immutable once built.
struct ModelInstance {
  std::optional<torch::jit::Module> module;           // of a ScriptModule
  std::shared_ptr<torch::jit::CompilationUnit> unit;  // keeps a script function alive
  torch::jit::Function* function = nullptr;           // `forward`, or the script function
  torch::jit::Code code;                              // the plain graph, inlined
  std::shared_ptr<torch::jit::Graph> graph;           // what `code` was made from
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
  std::unique_ptr<Plan> NewPlan(const TcPlanSpec& spec) override;

  std::shared_ptr<const ModelInstance> instance() const { return instance_.load(); }
  const c10::FunctionSchema& schema() const { return schema_; }
  bool is_method() const { return is_method_; }
  const GraphUse& use() const { return use_; }
  Autograd autograd() const { return autograd_; }

 private:
  ScriptModel(ModelInstance instance, std::string name, uint64_t fingerprint,
              TcModelOptions options);

  std::atomic<std::shared_ptr<const ModelInstance>> instance_;
  std::string name_;
  c10::FunctionSchema schema_;
  uint64_t fingerprint_;
  std::string schema_text_;
  bool is_method_;
  bool training_;
  GraphUse use_;
  Autograd autograd_;
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_SCRIPT_MODEL_H_
