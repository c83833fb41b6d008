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

// What the callable reported, in its own words.
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

// Each call gets tensors of its own, so what the model does with an input, or retains of it,
// reaches nobody else. An operand that is neither copied nor cast is shared: its tensor refers to
// XLA's buffer, and the model must neither retain nor write to it.
class CallablePlan : public Plan {
 public:
  CallablePlan(std::shared_ptr<CallableModel> model, const TcPlanSpec& spec);

  std::shared_ptr<const void> Hold(DLDevice device) const override;

 private:
  class Frame;
  // Released when the last who holds it is gone.
  struct Callable {
    explicit Callable(const TcCallable& callable) : table(callable) {}
    ~Callable() { table.release(table.self); }
    Callable(const Callable&) = delete;
    Callable& operator=(const Callable&) = delete;
    const TcCallable table;
  };

  bool Compute(const DLTensor* inputs, const DLTensor* outputs, TcPlace place) override;

  std::shared_ptr<const Callable> callable_;
  bool shares_ = false;  // any operand
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_EAGER_H_
