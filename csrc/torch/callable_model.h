// A model whose code runs on the other side of the seam, where Python is.

#ifndef TORCHCALL_TORCH_CALLABLE_MODEL_H_
#define TORCHCALL_TORCH_CALLABLE_MODEL_H_

#include <memory>
#include <stdexcept>
#include <string>

#include "../engine.h"
#include "guards.h"
#include "model.h"

namespace torchcall {

// What the callable said went wrong, in its own words.
class CallableError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Every plan brings the callable that runs it.
class CallableModel : public Model {
 public:
  CallableModel(std::string name, TcModelOptions options);

  TcModelInfo info() const override;
  void Replace(const Model& fresh) override;
  std::string Serialize() const override;
  void CheckArguments(const TcNode* nodes, int64_t count, int64_t num_inputs) const override;
  std::unique_ptr<Plan> NewPlan(const TcPlanSpec& spec) override;

  Autograd autograd() const { return autograd_; }

 private:
  std::string name_;
  Autograd autograd_;
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_CALLABLE_MODEL_H_
