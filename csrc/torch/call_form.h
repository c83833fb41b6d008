// The form of one call, settled when the JAX program is traced: what is known of each operand and
// output, whatever engine runs the model.

#ifndef TORCHCALL_TORCH_CALL_FORM_H_
#define TORCHCALL_TORCH_CALL_FORM_H_

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "../engine.h"

namespace torchcall {

// A tensor on memory that it does not own.
at::Tensor View(void* data, c10::IntArrayRef sizes, c10::ScalarType dtype, c10::Device device);

struct CallForm {
  struct Operand {
    std::string name;
    std::vector<int64_t> shape;
    c10::ScalarType dtype;
    std::optional<c10::ScalarType> cast;
    TcNarrowing narrowing;
    bool is_length = false;  // read by the plan, not passed to the model
    bool copied = false;     // the model gets a private copy
  };
  struct Output {
    std::string name;
    std::vector<int64_t> shape;
    c10::ScalarType dtype;
    TcNarrowing narrowing;
    size_t bytes;
  };

  // Throws std::invalid_argument naming the operand or output that is at fault.
  explicit CallForm(const TcPlanSpec& spec);

  // What each length comes to in this call: its capacity where reading it would mean waiting for a
  // device. Throws std::invalid_argument where one is negative or exceeds its capacity.
  void ReadLengths(const DLTensor* inputs, c10::Device device, std::vector<int64_t>& sizes) const;
  // The shape of an operand as the model sees it in this call.
  std::vector<int64_t> ShapeSeen(const Operand& operand, const std::vector<int64_t>& sizes) const;
  // Fills `destination`, contiguous memory on `device`, with what the model gets of XLA's buffer.
  void CopyIn(const Operand& operand, const void* buffer, const std::vector<int64_t>& sizes,
              c10::Device device, void* destination) const;
  // Copies a result into XLA's buffer on `device`. Throws std::invalid_argument where the tensor is
  // not what the output says.
  void CopyOut(const Output& output, const at::Tensor& tensor, const std::vector<int64_t>& sizes,
               c10::Device device, void* destination) const;

  std::vector<Operand> operands;
  std::vector<Output> outputs;
  std::vector<TcLength> lengths;
  std::vector<int64_t> capacities;  // of the axes that each length narrows
  bool selects_outputs;             // dicts may hold further keys, floats are cast

 private:
  void AddOperand(const TcPlanSpec& spec, int64_t i);
  void AddOutput(const TcPlanSpec& spec, int64_t i);
  // An axis that a length narrows limits it.
  void LimitLength(const TcNarrowing& narrowing, const std::vector<int64_t>& shape);
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_CALL_FORM_H_
