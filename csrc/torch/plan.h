// A plan: everything about one call that is fixed when the JAX program is traced.

#ifndef TORCHCALL_TORCH_PLAN_H_
#define TORCHCALL_TORCH_PLAN_H_

#include <ATen/core/Tensor.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../engine.h"
#include "call_form.h"
#include "call_inputs.h"
#include "guards.h"
#include "index_checks.h"
#include "model.h"

namespace torchcall {

// Why a call that retains an input cannot be captured.
inline constexpr const char* kRetainsInput = "it retains an input after the call";

class Plan {
 public:
  virtual ~Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Thread-safe. Where the place's purpose is to observe the call: returns why such calls cannot be
  // captured. Otherwise, or if no reason is known, returns an empty string.
  std::string Run(const DLTensor* inputs, const DLTensor* outputs, TcPlace place);
  // Torch's threads in later calls, 0: the process's budget. Thread-safe.
  void SetThreads(int threads) { threads_.store(threads, std::memory_order_relaxed); }
  // Shares ownership of the weights that calls on the device use now.
  virtual std::shared_ptr<const void> Hold(DLDevice device) const = 0;

 protected:
  Plan(std::shared_ptr<Model> model, const TcPlanSpec& spec, CallForm form, Autograd autograd);

  // Runs the model on the place's device and stream, and copies its results to `outputs`. Returns
  // whether the model retained an input.
  virtual bool Compute(const DLTensor* inputs, const DLTensor* outputs, TcPlace place) = 0;
  const CallForm& form() const { return form_; }
  const IndexChecks& index_checks() const { return index_checks_; }
  void CountRetained(int64_t inputs) const { model_->Count(inputs, 0); }

 private:
  std::shared_ptr<Model> model_;
  CallForm form_;
  IndexChecks index_checks_;
  Autograd autograd_;
  std::atomic<int> threads_{0};
  int64_t copied_per_call_ = 0;  // inputs of which the model gets a private copy
};

// The tensors, containers and results of one call. Used by one thread at a time and on one stream
// only, so that the stream orders all uses of its memory.
class CallContext {
 public:
  CallContext(TcPlace place, CallInputs inputs, size_t num_lengths, size_t num_outputs)
      : place(place), inputs(std::move(inputs)), sizes(num_lengths), outputs(num_outputs) {}
  virtual ~CallContext() = default;
  CallContext(const CallContext&) = delete;
  CallContext& operator=(const CallContext&) = delete;

  // Runs the model on `inputs` and stores the addresses of its results in `outputs`.
  virtual void Invoke() = 0;
  // Releases everything that Invoke made. Also called if Invoke threw or was not called.
  virtual CallInputs::Retained Release() noexcept = 0;

  const TcPlace place;
  CallInputs inputs;
  std::vector<int64_t> sizes;  // the value of each of the plan's lengths in this call
  std::vector<const at::Tensor*> outputs;
};

// A plan with a pool of contexts. A context's tensors and containers are made once; each call
// points the tensors at its own buffers.
class ContextPlan : public Plan {
 protected:
  // `pools`: whether later calls may reuse a context.
  ContextPlan(std::shared_ptr<Model> model, const TcPlanSpec& spec, CallForm form,
              Autograd autograd, bool pools);

  // Called on the place's device and stream.
  virtual std::unique_ptr<CallContext> NewContext(TcPlace place) const = 0;
  // Returns a context to the pool.
  void ReturnToPool(std::unique_ptr<CallContext> context) noexcept;

 private:
  bool Compute(const DLTensor* inputs, const DLTensor* outputs, TcPlace place) override;
  void Invoke(CallContext& call, const DLTensor* inputs, const DLTensor* outputs);
  std::unique_ptr<CallContext> Acquire(TcPlace place);

  bool pools_;
  std::mutex pool_mutex_;
  std::vector<std::unique_ptr<CallContext>> pool_;
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_PLAN_H_
