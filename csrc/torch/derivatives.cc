#include "derivatives.h"

#include <ATen/Functions.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <stdexcept>

#include "dtype.h"

namespace torchcall {
namespace {

// JAX's cotangents of complex numbers are the conjugates of torch's gradients.
at::Tensor Conjugate(const at::Tensor& tensor) {
  return tensor.is_complex() ? tensor.conj() : tensor;
}

}  // namespace

Derivatives::Derivatives(const TcPlanSpec& spec, const Tree& results, bool strict)
    : num_model_inputs_(spec.num_inputs),
      num_parameters_(spec.num_parameters > 0 ? spec.parameters[spec.num_parameters - 1].input + 1
                                              : 0),
      strict_(strict) {
  std::vector<int64_t> outputs;
  CollectTensors(results, outputs);
  num_model_outputs_ = outputs.size();
  for (int64_t k = 0; k < spec.num_derivatives; ++k) {
    num_model_inputs_ -= spec.derivatives[k].num_outputs;
  }
  size_t first = num_model_inputs_;
  for (int64_t k = 0; k < spec.num_derivatives; ++k) {
    const TcDerivative& derivative = spec.derivatives[k];
    levels_.push_back({{derivative.inputs, derivative.inputs + derivative.num_inputs},
                       {derivative.outputs, derivative.outputs + derivative.num_outputs},
                       first,
                       derivative.keeps_outputs != 0});
    first += derivative.num_outputs;
  }
}

std::vector<at::Tensor> Derivatives::Leaves(const std::vector<at::Tensor>& inputs) const {
  std::vector<at::Tensor> leaves = inputs;
  for (const Level& level : levels_) {
    for (const int64_t i : level.inputs) {
      at::Tensor& leaf = leaves.at(i);
      if (!leaf.requires_grad()) leaf = leaf.detach().requires_grad_();
    }
  }
  return leaves;
}

std::vector<at::Tensor> Derivatives::ModelInputs(const std::vector<at::Tensor>& leaves,
                                                 const CallForm& form) const {
  std::vector<at::Tensor> inputs(leaves.begin(), leaves.begin() + num_model_inputs_);
  for (size_t i = 0; i < inputs.size(); ++i) {
    // torch refuses writes to leaves.
    if (form.inputs[i].copied && inputs[i].requires_grad()) inputs[i] = inputs[i].clone();
  }
  return inputs;
}

std::vector<at::Tensor> Derivatives::Gradients(const std::vector<const at::Tensor*>& outputs,
                                               const std::vector<at::Tensor>& leaves,
                                               const CallForm& form) const {
  std::vector<at::Tensor> found;
  for (const at::Tensor* output : outputs) found.push_back(*output);
  for (const Level& level : levels_) found = Apply(level, std::move(found), leaves, form);
  return found;
}

std::vector<at::Tensor> Derivatives::Apply(const Level& level, std::vector<at::Tensor> outputs,
                                           const std::vector<at::Tensor>& leaves,
                                           const CallForm& form) const {
  const bool is_first = &level == &levels_.front();
  const bool is_last = &level == &levels_.back();
  std::vector<at::Tensor> roots;
  std::vector<at::Tensor> cotangents;
  for (size_t j = 0; j < level.outputs.size(); ++j) {
    const at::Tensor& output = outputs.at(level.outputs[j]);
    const CallForm::Input& described = form.inputs.at(level.first_cotangent + j);
    const at::Tensor& cotangent = leaves.at(level.first_cotangent + j);
    if (output.sizes() != cotangent.sizes()) {
      throw std::invalid_argument(described.name + ": expected the output's shape " +
                                  TypeAndShape(output.scalar_type(), output.sizes()) + ", got " +
                                  TypeAndShape(cotangent.scalar_type(), cotangent.sizes()));
    }
    if (!output.requires_grad()) {
      if (strict_ && is_first) {
        throw std::invalid_argument(
            described.name +
            ": expected an output with a gradient, got one without, although the model "
            "differentiates inside; pass create_graph=True to torch.autograd.grad there");
      }
      continue;  // constant
    }
    roots.push_back(output);
    cotangents.push_back(Conjugate(cotangent.to(output.scalar_type())));
  }
  std::vector<at::Tensor> wrt;
  for (const int64_t i : level.inputs) wrt.push_back(leaves.at(i));
  std::vector<at::Tensor> gradients(wrt.size());
  if (!roots.empty()) {
    gradients = torch::autograd::grad(roots, wrt, cotangents, /*retain_graph=*/!is_last,
                                      /*create_graph=*/!is_last, /*allow_unused=*/true);
  }
  if (!level.keeps_outputs) outputs.clear();
  for (size_t i = 0; i < gradients.size(); ++i) {
    // Before a cast, an input has another dtype.
    const c10::ScalarType dtype = form.inputs.at(level.inputs[i]).dtype;
    if (gradients[i].defined()) {
      outputs.push_back(Conjugate(gradients[i].to(dtype)));
      continue;
    }
    // Forces do not depend on all parameters.
    const bool is_argument = static_cast<size_t>(level.inputs[i]) >= num_parameters_;
    if (strict_ && is_first && is_argument) {
      throw std::invalid_argument(
          form.inputs.at(level.inputs[i]).name +
          ": expected outputs that depend on it, got no gradient: the model, which differentiates "
          "inside, does not use it or detaches it; remove detach() there, or pass "
          "jax.lax.stop_gradient of it");
    }
    outputs.push_back(at::zeros_like(wrt[i], wrt[i].options().dtype(dtype)));
  }
  return outputs;
}

}  // namespace torchcall
