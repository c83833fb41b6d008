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
  bool operator==(const FileState&) const = default;
};

// A package's code and weights on one device.
class PackageLoader {
 public:
  PackageLoader(const std::string& path, c10::Device device, int32_t num_runners);

  // Throws what torch throws.
  std::vector<at::Tensor> Run(const std::vector<at::Tensor>& arguments);
  std::vector<std::string> call_spec() { return loader_.get_call_spec(); }

 private:
  const c10::Device device_;
  // True except on a CPU. With several runners, torch's loader queries CUDA events to find a free
  // one, which is forbidden during a capture. Calls only enqueue work there, so one suffices.
  const bool one_at_a_time_;
  bool ran_ = false;
  std::mutex mutex_;
  torch::inductor::AOTIModelPackageLoader loader_;
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

class PackagePlan : public ContextPlan {
 public:
  // `spec.arguments` is a tuple of the inputs in the package's order. `spec.results` is a tuple
  // of its results, with None for those that the program does not use.
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
  std::vector<int64_t> order_;   // per argument of the package: the input
  std::vector<int64_t> wanted_;  // per result of the package: the output, or -1 if unused
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_PACKAGE_H_
