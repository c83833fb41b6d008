// A model whose code runs on the other side of the seam, where Python is, and its calls.

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

// What the code reported.
class EagerError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Every plan brings the code that runs it.
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

// Each call gets tensors of its own, so what the model does with an input, or retains of it,
// reaches nobody else. An input that is neither copied nor cast is shared: its tensor refers to
// XLA's buffer, and the model must neither retain nor write to it.
class EagerPlan : public Plan {
 public:
  EagerPlan(std::shared_ptr<EagerModel> model, const TcPlanSpec& spec);

  std::shared_ptr<const void> Hold(DLDevice device) const override;

 private:
  class Frame;
  // Released when the last who holds it is gone.
  struct Code {
    explicit Code(const TcEager& eager) : table(eager) {}
    ~Code() { table.release(table.self); }
    Code(const Code&) = delete;
    Code& operator=(const Code&) = delete;
    const TcEager table;
  };

  bool Compute(const DLTensor* inputs, const DLTensor* outputs, TcPlace place) override;

  std::shared_ptr<const Code> code_;
  bool shares_ = false;  // some input
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_EAGER_H_
