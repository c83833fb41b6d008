// One call, settled when the JAX program is traced: how operands become the model's arguments and
// how its result becomes XLA's outputs. Contexts (tensor shells, containers, stack) are pooled and
// repointed at each call's buffers.

#ifndef TORCHCALL_TORCH_PLAN_H_
#define TORCHCALL_TORCH_PLAN_H_

#include <ATen/core/Tensor.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../engine.h"
#include "model.h"
#include "tree.h"

namespace torchcall {

class CallContext;

class Plan {
 public:
  Plan(std::shared_ptr<Model> model, const TcPlanSpec& spec);
  ~Plan();

  void Run(const DLTensor* inputs, const DLTensor* outputs, TcPlace place);
  double TimeForward(const DLTensor* inputs, int64_t iterations) const;

 private:
  friend class CallContext;

  struct Operand {
    std::string name;
    std::vector<int64_t> shape;
    c10::ScalarType dtype;
    std::optional<c10::ScalarType> cast;
    TcNarrowing narrowing;
    bool is_length = false;  // read by the plan, not passed to the model
    bool written = false;    // the model may write to it: it gets a copy
    size_t bytes;
  };
  struct Output {
    std::string name;
    std::vector<int64_t> shape;
    c10::ScalarType dtype;
    TcNarrowing narrowing;
    size_t bytes;
  };

  std::unique_ptr<CallContext> Acquire();
  void GiveBack(std::unique_ptr<CallContext> context);
  void AddOperand(const TcPlanSpec& spec, int64_t i);
  void AddOutput(const TcPlanSpec& spec, int64_t i);
  // An axis that a length narrows limits it.
  void LimitLength(const TcNarrowing& narrowing, const std::vector<int64_t>& shape);
  // Throws std::invalid_argument where a length is negative or exceeds its capacity.
  void ReadLengths(const DLTensor* inputs, std::vector<int64_t>& sizes) const;
  void CopyOut(const Output& output, const at::Tensor& tensor, const std::vector<int64_t>& sizes,
               void* destination) const;

  std::shared_ptr<Model> model_;
  std::vector<Operand> operands_;
  std::vector<Output> outputs_;
  std::vector<TcLength> lengths_;
  std::vector<int64_t> capacities_;  // of the axes that each length narrows
  Tree call_;
  Tree result_;
  ArgumentBuilder builder_;
  bool selects_outputs_ = false;  // further keys are dropped, floats are cast
  // Arguments are built anew for each call: the model changes a container or writes to an input.
  bool rebuild_ = false;
  int64_t copied_per_call_ = 0;  // operands that the model may write to

  std::mutex pool_mutex_;
  std::vector<std::unique_ptr<CallContext>> pool_;
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_PLAN_H_
