// A call of an AOTInductor package.

#ifndef TORCHCALL_TORCH_PACKAGE_PLAN_H_
#define TORCHCALL_TORCH_PACKAGE_PLAN_H_

#include <memory>
#include <string>
#include <vector>

#include "package_model.h"
#include "plan.h"
#include "tree.h"

namespace torchcall {

class PackagePlan : public Plan {
 public:
  // `spec.arguments` is a tuple of the operands in the package's order, `spec.results` one of its
  // results, None where nobody asks for one.
  PackagePlan(std::shared_ptr<PackageModel> model, const TcPlanSpec& spec);

  double TimeForward(const DLTensor* inputs, int64_t iterations) const override;
  std::shared_ptr<const void> Hold(DLDevice device) const override {
    return model_->Hold(DeviceOf(device));
  }

 private:
  class Context;
  std::unique_ptr<CallContext> NewContext(TcPlace place) const override;
  // Code compiled ahead of time follows an index wherever it points. Throws std::invalid_argument.
  void CheckIndices(const CallInputs& inputs) const;

  // The package's own checks count its arguments; a user knows the operands.
  std::string WithNames(std::string text) const;

  std::shared_ptr<PackageModel> model_;
  std::vector<int64_t> order_;   // the operand of each of the package's arguments
  std::vector<int64_t> wanted_;  // the output that each of its results is, -1: none
  std::vector<TcIndexCheck> checks_;
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_PACKAGE_PLAN_H_
