// An AOTInductor package: machine code that torch compiled ahead of time. It takes and returns flat
// lists of tensors; which argument each is, the caller knows from the package's call spec.

#ifndef TORCHCALL_TORCH_PACKAGE_H_
#define TORCHCALL_TORCH_PACKAGE_H_

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

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

// A package's code and weights on one device.
class PackageLoader {
 public:
  PackageLoader(const std::string& path, c10::Device device, int32_t num_runners);

  // Throws what torch throws.
  std::vector<at::Tensor> Run(const std::vector<at::Tensor>& arguments);
  std::vector<std::string> call_spec() { return loader_.get_call_spec(); }

 private:
  const c10::Device device_;
  // Elsewhere than on a CPU a call only enqueues, and the loader's own bookkeeping of several
  // runners asks the device for events, which a capture forbids: one call at a time.
  const bool one_at_a_time_;
  bool ran_ = false;
  std::mutex mutex_;
  torch::inductor::AOTIModelPackageLoader loader_;
};

class PackageModel : public Model {
 public:
  // The package must have been compiled for this machine: its code runs as it is. Throws what torch
  // throws.
  PackageModel(const std::string& path, c10::Device home, int32_t num_runners);

  // `schema` holds the two lines of the call spec: torch's pytree of the arguments, as a tuple of
  // a tuple and a dict, and that of the results.
  TcModelInfo info() const override;
  // A package of another call spec is another model.
  void Replace(const Model& fresh) override;
  std::string Serialize() const override;
  void CheckArguments(const TcNode* nodes, int64_t count, int64_t num_inputs) const override;
  std::unique_ptr<Plan> NewPlan(const TcPlanSpec& spec) override;

  // Throws std::invalid_argument for a device of another kind than the package's.
  std::shared_ptr<PackageLoader> loader(c10::Device device) const;
  // The one of a graph that is about to be captured; a good time to let go of old ones.
  std::shared_ptr<PackageLoader> Hold(c10::Device device) const;

 private:
  std::string path_;
  c10::Device home_;
  int32_t num_runners_;
  PerDevice<PackageLoader> loaders_;
  std::string schema_;
};

class PackagePlan : public ContextPlan {
 public:
  // `spec.arguments` is a tuple of the operands in the package's order, `spec.results` one of its
  // results, None where nobody asks for one.
  PackagePlan(std::shared_ptr<PackageModel> model, const TcPlanSpec& spec);

  std::shared_ptr<const void> Hold(DLDevice device) const override {
    return model_->Hold(DeviceOf(device));
  }

 private:
  class Context;
  std::unique_ptr<CallContext> NewContext(TcPlace place) const override;
  // The package's own checks count its arguments; a user knows the operands.
  std::string WithNames(std::string text) const;

  std::shared_ptr<PackageModel> model_;
  std::vector<int64_t> order_;   // the operand of each of the package's arguments
  std::vector<int64_t> wanted_;  // the output that each of its results is, -1: none
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_PACKAGE_H_
