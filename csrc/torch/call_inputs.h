// The tensors through which a model sees one call's buffers. They are made once and pointed at the
// buffers of each call; used by one thread at a time.

#ifndef TORCHCALL_TORCH_CALL_INPUTS_H_
#define TORCHCALL_TORCH_CALL_INPUTS_H_

#include <ATen/core/Tensor.h>

#include <vector>

#include "call_form.h"

namespace torchcall {

class CallInputs {
 public:
  // On `device`. `dense`: the model wants contiguous inputs also where they are narrowed. `given`,
  // where there are any, are the tensors that the model gets, made elsewhere: of the operands'
  // shapes, of the dtypes that they are cast to; undefined for a length.
  CallInputs(const CallForm& form, c10::Device device, bool dense,
             std::vector<at::Tensor> given = {});

  // What the model gets; undefined for a length.
  std::vector<at::Tensor> Tensors() const;
  const at::Tensor& operator[](size_t i) const { return inputs_[i].given; }
  size_t size() const { return inputs_.size(); }

  // Takes the present references as those that a model may leave behind. Called once, when all
  // that refers to the tensors between calls is built and the caller holds none itself.
  void CountUses();

  // Points the tensors at this call's buffers, narrowed to `sizes`, cast and copied where wanted.
  void Point(const DLTensor* buffers, const std::vector<int64_t>& sizes);

  // The position of an input that was written to although the plan foresaw none, or -1.
  int64_t FindUnforeseenWrite() const;

  // Ends the call, on the stream that it ran on: no tensor refers to a caller's buffer any more.
  // Returns how many inputs the model kept; each of those now owns a copy, and the tensors must not
  // be used for another call. `kept`, where given, adds what only its maker can tell, per input.
  int64_t Finish(bool all_kept, const int32_t* kept = nullptr);

 private:
  struct Input {
    // Both undefined for a length, which the model does not see.
    at::Tensor shell;  // refers to the caller's buffer while the call runs
    at::Tensor given;  // what the model gets: the shell, or its cast or copied twin
    size_t tensor_uses = 0;
    size_t storage_uses = 0;
    uint32_t version = 0;
    // As they are at rest; a model may replace them in place.
    const void* storage = nullptr;
    c10::ScalarType dtype = c10::ScalarType::Undefined;
    std::vector<int64_t> strides;
  };

  bool Kept(const Input& input) const;
  // Whether the model resized, transposed or exchanged its input in place, which the next call must
  // not see.
  bool Reshaped(const Input& input, const CallForm::Operand& operand) const;
  void Narrow(const Input& input, const TcNarrowing& narrowing, int64_t size);
  void Repoint(const at::Tensor& shell, void* data) const;
  // Gives a storage its own copy of the data that it refers to.
  void Detach(c10::StorageImpl* storage) const;

  const CallForm& form_;
  c10::Device device_;
  std::vector<Input> inputs_;
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_CALL_INPUTS_H_
