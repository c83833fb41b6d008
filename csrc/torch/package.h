// An AOTInductor package: machine code that torch compiled ahead of time. It takes and returns flat
// lists of tensors. Its call spec maps them to arguments and results.

#ifndef TORCHCALL_TORCH_PACKAGE_H_
#define TORCHCALL_TORCH_PACKAGE_H_

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../engine.h"
#include "model.h"
#include "place.h"
#include "plan.h"
#include "tree.h"

namespace torchcall {

// Changes when the file is replaced or written to.
struct FileState {
  uint64_t inode = 0;
  int64_t size = 0;
  int64_t seconds = 0;  // of the last modification
  int64_t nanoseconds = 0;

  // The default value if there is no such file.
  static FileState Of(const std::string& path);
  // Throws std::invalid_argument if the file's state is another one now.
  void RequireOf(const std::string& path) const;
  bool operator==(const FileState&) const = default;
};

// The programs that a package may contain.
enum class Program {
  kModel,
  // The model's outputs and a vector-Jacobian product. It takes the model's inputs and one
  // cotangent per output of floats, and returns the outputs and one gradient per differentiable
  // input.
  kDerivative,
};

// A package's code and weights on one device. The derivative is loaded when it is first used.
class PackageLoader {
 public:
  // `state` is that of the file whose model this is.
  PackageLoader(const std::string& path, const FileState& state, c10::Device device,
                int32_t num_runners);

  // Throws what torch throws, and std::invalid_argument if the derivative can no longer be loaded,
  // because the file has changed.
  std::vector<at::Tensor> Run(Program program, const std::vector<at::Tensor>& arguments);
  void Load(Program program) { CodeOf(program); }
  std::vector<std::string> call_spec() { return model_->loader.get_call_spec(); }

 private:
  struct Code {
    std::mutex mutex;
    bool ran = false;
    torch::inductor::AOTIModelPackageLoader loader;
  };

  std::unique_ptr<Code> LoadCode(const std::string& name) const;
  Code& CodeOf(Program program);

  const std::string path_;
  const FileState state_;
  const c10::Device device_;
  // True except on a CPU. With several runners, torch's loader queries CUDA events to find a free
  // one, which is forbidden during a capture. Calls only enqueue work there, so one suffices.
  const bool one_at_a_time_;
  const int32_t num_runners_;
  const std::unique_ptr<Code> model_;
  std::mutex mutex_;
  std::unique_ptr<Code> derivative_;
};

class PackageModel : public Model {
 public:
  // The caller has checked that the package was compiled for this machine. Throws what torch
  // throws.
  PackageModel(const std::string& path, c10::Device home, int32_t num_runners);

  // `schema` holds the two lines of the call spec: torch's pytrees of the arguments, a tuple of a
  // tuple and a dict, and of the results.
  TcModelInfo info() const override;
  // Throws std::invalid_argument if the call specs differ.
  void Replace(const Model& fresh) override;
  std::string Serialize() const override;
  void CheckArguments(const TcNode* nodes, int64_t count, int64_t num_inputs) const override;
  std::unique_ptr<Plan> NewPlan(const TcPlanSpec& spec) override;

  // Throws std::invalid_argument for a device of another kind than the package's, and if the file
  // is no longer the one that was loaded first.
  std::shared_ptr<PackageLoader> loader(c10::Device device) const;
  // Loads the derivative on the device for which the model was loaded first.
  void LoadDerivative() const { loader(home_)->Load(Program::kDerivative); }
  // The loader for a graph that is about to be captured. Also releases replaced loaders.
  std::shared_ptr<PackageLoader> Hold(c10::Device device) const;

 private:
  std::string path_;
  FileState state_;  // before the first load
  c10::Device home_;
  int32_t num_runners_;
  PerDevice<PackageLoader> loaders_;
  std::string schema_;
};

// An argument of a package's program.
struct PackageArgument {
  struct Size {
    int64_t input;    // -1: the size is `integer`
    int64_t integer;  // else: the axis of the input that has the size, as the model sees it
  };

  explicit PackageArgument(const Tree& node);

  int64_t input = -1;  // of the plan; -1: zeros
  c10::ScalarType dtype = c10::ScalarType::Undefined;
  std::vector<Size> shape;
};

class PackagePlan : public ContextPlan {
 public:
  // With a derivative, the plan runs the package's. Then arguments and results are the
  // derivative's. `spec.arguments` is a tuple of the inputs in the program's order. In the place of
  // a tensor, a list stands for zeros: of a dtype, and the sizes: a number, or a tuple of an input
  // and an axis. `spec.results` is a tuple of its results, with None for those that the plan does
  // not use.
  PackagePlan(std::shared_ptr<PackageModel> model, const TcPlanSpec& spec);

  std::shared_ptr<const void> Hold(DLDevice device) const override {
    return model_->Hold(DeviceOf(device));
  }

 private:
  class Context;
  std::unique_ptr<CallContext> NewContext(TcPlace place) const override;
  // Replaces the position of an argument in torch's error text by the input's name.
  std::string WithNames(std::string text) const;

  std::shared_ptr<PackageModel> model_;
  Program program_;
  std::vector<PackageArgument> arguments_;
  std::vector<int64_t> wanted_;  // per result of the program: the output, or -1 if unused
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_PACKAGE_H_
