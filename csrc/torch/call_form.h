// The static description of one call, fixed when the JAX program is traced: its inputs and its
// outputs, for every engine.

#ifndef TORCHCALL_TORCH_CALL_FORM_H_
#define TORCHCALL_TORCH_CALL_FORM_H_

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "../engine.h"

namespace torchcall {

// A tensor over memory that it does not own.
at::Tensor View(void* data, c10::IntArrayRef sizes, c10::ScalarType dtype, c10::Device device);

struct CallForm {
  struct Input {
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

  // Throws std::invalid_argument, which names the invalid input or output.
  explicit CallForm(const TcPlanSpec& spec);

  // Sets `sizes` to the lengths of this call; on CUDA to their capacities, because reading a length
  // would synchronize. Throws std::invalid_argument if one is negative or exceeds its capacity.
  void ReadLengths(const DLTensor* inputs, c10::Device device, std::vector<int64_t>& sizes) const;
  // The shape of an input as the model sees it in this call.
  std::vector<int64_t> ShapeSeen(const Input& input, const std::vector<int64_t>& sizes) const;
  // Copies the model's input out of XLA's buffer into `destination`, contiguous memory on `device`.
  void CopyIn(const Input& input, const void* buffer, const std::vector<int64_t>& sizes,
              c10::Device device, void* destination) const;
  // Copies a result into XLA's buffer on `device`. Throws std::invalid_argument if the tensor has
  // another shape, dtype, layout or device than the output.
  void CopyOut(const Output& output, const at::Tensor& tensor, const std::vector<int64_t>& sizes,
               c10::Device device, void* destination) const;

  std::vector<Input> inputs;
  std::vector<Output> outputs;
  std::vector<TcLength> lengths;
  std::vector<int64_t> capacities;  // smallest of the axes that each length narrows
  bool selects_outputs;             // ignores extra keys of dicts, casts floats

 private:
  void AddInput(const TcPlanSpec& spec, int64_t i);
  void AddOutput(const TcPlanSpec& spec, int64_t i);
  // Limits a length's capacity to the size of an axis that it narrows.
  void LimitLength(const TcNarrowing& narrowing, const std::vector<int64_t>& shape);
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_CALL_FORM_H_
