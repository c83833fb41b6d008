// Derivatives of a model's outputs with respect to its inputs, by torch's autograd.

#ifndef TORCHCALL_TORCH_DERIVATIVES_H_
#define TORCHCALL_TORCH_DERIVATIVES_H_

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "../engine.h"
#include "call_form.h"
#include "tree.h"

namespace torchcall {

// The derivatives of a plan, applied one after the other; see TcDerivative. Immutable.
class Derivatives {
 public:
  // `results` is the structure of the model's outputs. `strict`: the model differentiates inside,
  // so a missing gradient by an argument is an error. It is what a model returns that detaches its
  // inputs or differentiates without create_graph, and zero would look right.
  Derivatives(const TcPlanSpec& spec, const Tree& results, bool strict);

  bool empty() const { return levels_.empty(); }
  size_t num_model_outputs() const { return num_model_outputs_; }

  // The inputs, of which those that any derivative needs are leaves that require grad.
  std::vector<at::Tensor> Leaves(const std::vector<at::Tensor>& inputs) const;
  // What the model gets of the leaves: copies of inputs that it writes to, and no cotangents.
  std::vector<at::Tensor> ModelInputs(const std::vector<at::Tensor>& leaves,
                                      const CallForm& form) const;
  // The plan's outputs. Throws std::invalid_argument where a cotangent does not fit its output, or
  // a gradient is missing.
  std::vector<at::Tensor> Gradients(const std::vector<const at::Tensor*>& outputs,
                                    const std::vector<at::Tensor>& leaves,
                                    const CallForm& form) const;

 private:
  struct Level {
    std::vector<int64_t> inputs;   // differentiated with respect to these inputs of the plan
    std::vector<int64_t> outputs;  // of the level before
    size_t first_cotangent;        // position among the plan's inputs
    bool keeps_outputs;            // whether the level returns the outputs before the gradients
  };

  std::vector<at::Tensor> Apply(const Level& level, std::vector<at::Tensor> outputs,
                                const std::vector<at::Tensor>& leaves, const CallForm& form) const;

  std::vector<Level> levels_;
  size_t num_model_inputs_;
  size_t num_model_outputs_;
  size_t num_parameters_;  // inputs before the model's arguments
  bool strict_;
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_DERIVATIVES_H_
