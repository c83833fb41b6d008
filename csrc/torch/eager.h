// Eager models and their calls. The JAX half runs the models' Python code.

#ifndef TORCHCALL_TORCH_EAGER_H_
#define TORCHCALL_TORCH_EAGER_H_

#include <memory>
#include <stdexcept>
#include <string>

#include "../engine.h"
#include "guards.h"
#include "model.h"
#include "plan.h"

namespace torchcall {

// An error that the model's code reported.
class EagerError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Each plan contains the code that runs it.
class EagerModel : public Model {
 public:
  EagerModel(std::string name, TcModelOptions options);

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

// Each call gets its own tensors, so a model may write to its inputs and retain them. An input that
// is neither copied nor cast is shared: its tensor refers to XLA's buffer, and the model must
// neither retain nor write to it.
class EagerPlan : public Plan {
 public:
  EagerPlan(std::shared_ptr<EagerModel> model, const TcPlanSpec& spec);

  std::shared_ptr<const void> Hold(DLDevice device) const override;

 private:
  class Frame;
  // Released when its last owner is destroyed.
  struct Code {
    explicit Code(const TcEager& eager) : table(eager) {}
    ~Code() { table.release(table.self); }
    Code(const Code&) = delete;
    Code& operator=(const Code&) = delete;
    const TcEager table;
  };

  bool Compute(const DLTensor* inputs, const DLTensor* outputs, TcPlace place) override;

  std::shared_ptr<const Code> code_;
  bool shares_ = false;  // whether any input is shared
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_EAGER_H_
