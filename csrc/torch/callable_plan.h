// A call of a model on the other side of the seam.

#ifndef TORCHCALL_TORCH_CALLABLE_PLAN_H_
#define TORCHCALL_TORCH_CALLABLE_PLAN_H_

#include <memory>

#include "callable_model.h"
#include "plan.h"

namespace torchcall {

class CallablePlan : public Plan {
 public:
  CallablePlan(std::shared_ptr<CallableModel> model, const TcPlanSpec& spec);

  double TimeForward(const DLTensor* inputs, int64_t iterations) const override;
  std::shared_ptr<const void> Hold(DLDevice device) const override;

 private:
  class Context;
  // A frame of the callable's and the tensors that it gave.
  struct Frame {
    void* address = nullptr;
    std::vector<at::Tensor> tensors;  // undefined for a length
  };
  // Released when the last context is gone.
  struct Callable {
    explicit Callable(const TcCallable& callable) : table(callable) {}
    ~Callable() { table.release(table.self); }
    Callable(const Callable&) = delete;
    Callable& operator=(const Callable&) = delete;
    const TcCallable table;
  };

  std::unique_ptr<CallContext> NewContext(TcPlace place) const override;
  Frame Open(DLDevice device) const;

  std::shared_ptr<const Callable> callable_;
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_CALLABLE_PLAN_H_
