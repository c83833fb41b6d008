// A TorchScript model as the plans use it: its code, its weights, and what its graph does.

#ifndef TORCHCALL_TORCH_MODEL_H_
#define TORCHCALL_TORCH_MODEL_H_

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

namespace torchcall {

// The part that `refresh` replaces: code and weights, immutable once built.
struct ModelInstance {
  std::optional<torch::jit::Module> module;           // of a ScriptModule
  std::shared_ptr<torch::jit::CompilationUnit> unit;  // keeps a script function alive
  torch::jit::Function* function = nullptr;           // `forward`, or the script function
  torch::jit::Code code;                              // the plain graph, inlined
  std::shared_ptr<torch::jit::Graph> graph;           // what `code` was made from
};

class Model {
 public:
  static std::unique_ptr<Model> FromModule(torch::jit::Module module, TcModelOptions options);
  static std::unique_ptr<Model> FromFunction(const torch::jit::StrongFunctionPtr& function,
                                             TcModelOptions options);

  std::shared_ptr<const ModelInstance> instance() const { return instance_.load(); }
  // Throws std::invalid_argument where `fresh` has other code than this model.
  void Replace(const Model& fresh);

  const c10::FunctionSchema& schema() const { return schema_; }
  bool is_method() const { return is_method_; }
  const GraphUse& use() const { return use_; }
  Autograd autograd() const { return autograd_; }
  TcModelInfo info() const;
  TcModelCounters counters() const { return {kept_inputs_.load(), copied_inputs_.load()}; }
  void Count(int64_t kept_inputs, int64_t copied_inputs) {
    kept_inputs_ += kept_inputs;
    copied_inputs_ += copied_inputs;
  }

 private:
  Model(ModelInstance instance, std::string name, uint64_t fingerprint, TcModelOptions options);

  std::atomic<std::shared_ptr<const ModelInstance>> instance_;
  std::string name_;
  c10::FunctionSchema schema_;
  uint64_t fingerprint_;
  std::string schema_text_;
  bool is_method_;
  bool training_;
  GraphUse use_;
  Autograd autograd_;
  std::atomic<int64_t> kept_inputs_{0};
  std::atomic<int64_t> copied_inputs_{0};
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_MODEL_H_
