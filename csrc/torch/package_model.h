// An AOTInductor package: machine code that torch compiled ahead of time. It takes and returns flat
// lists of tensors; which argument each is, the caller knows from the package's call spec.

#ifndef TORCHCALL_TORCH_PACKAGE_MODEL_H_
#define TORCHCALL_TORCH_PACKAGE_MODEL_H_

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <atomic>
#include <memory>
#include <string>

#include "../engine.h"
#include "model.h"

namespace torchcall {

class PackageModel : public Model {
 public:
  using Loader = torch::inductor::AOTIModelPackageLoader;

  // `num_runners` calls can be under way at once. The package must have been compiled for this
  // machine: its code runs as it is. Throws what torch throws.
  PackageModel(const std::string& path, int32_t num_runners);

  // `schema` holds the two lines of the call spec: torch's pytree of the arguments, as a tuple of
  // a tuple and a dict, and that of the results.
  TcModelInfo info() const override;
  // A package of another call spec is another model.
  void Replace(const Model& fresh) override;
  std::string Serialize() const override;
  void CheckArguments(const TcNode* nodes, int64_t count, int64_t num_inputs) const override;
  std::unique_ptr<Plan> NewPlan(const TcPlanSpec& spec) override;

  std::shared_ptr<Loader> loader() const { return loader_.load(); }

 private:
  std::atomic<std::shared_ptr<Loader>> loader_;
  std::string schema_;
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_PACKAGE_MODEL_H_
