// The interface of a model, for every engine.

#ifndef TORCHCALL_TORCH_MODEL_H_
#define TORCHCALL_TORCH_MODEL_H_

#include <atomic>
#include <memory>
#include <string>

#include "../engine.h"

namespace torchcall {

class Plan;

class Model : public std::enable_shared_from_this<Model> {
 public:
  virtual ~Model() = default;

  virtual TcModelInfo info() const = 0;
  // Replaces code and weights by those of `fresh`. Throws std::invalid_argument if `fresh` is not
  // the same model.
  virtual void Replace(const Model& fresh) = 0;
  // The bytes of a TorchScript archive. Throws std::invalid_argument for other engines and for
  // script functions.
  virtual std::string Serialize() const = 0;
  // Throws std::invalid_argument if the arguments do not match the model's signature.
  virtual void CheckArguments(const TcNode* nodes, int64_t count, int64_t num_inputs) const = 0;
  virtual std::unique_ptr<Plan> NewPlan(const TcPlanSpec& spec) = 0;

  TcModelCounters counters() const { return {retained_inputs_.load(), copied_inputs_.load()}; }
  void Count(int64_t retained_inputs, int64_t copied_inputs) {
    retained_inputs_ += retained_inputs;
    copied_inputs_ += copied_inputs;
  }

 private:
  std::atomic<int64_t> retained_inputs_{0};
  std::atomic<int64_t> copied_inputs_{0};
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_MODEL_H_
