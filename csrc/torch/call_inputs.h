// The tensors through which a model sees one call's buffers. They are made once and pointed at the
// buffers of each call; used by one thread at a time.

#ifndef TORCHCALL_TORCH_CALL_INPUTS_H_
#define TORCHCALL_TORCH_CALL_INPUTS_H_

#include <ATen/core/Tensor.h>

#include <vector>

#include "call_form.h"

namespace torchcall {

inline c10::StorageImpl* StorageOf(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
}

// Gives a storage its own copy of the memory that it refers to. Where the copy fails, the storage
// refers to nothing, and whoever reads it gets an error. Returns whether there is a copy.
bool OwnMemory(c10::StorageImpl* storage, c10::Device device) noexcept;

class CallInputs {
 public:
  // Which inputs the model retained: refers to after the call.
  struct Retained {
    int64_t count = 0;
    // The position of one that there was no memory for a copy of, or -1.
    int64_t lost = -1;
  };

  // On `device`. `dense`: the model wants contiguous inputs also where they are narrowed.
  CallInputs(const CallForm& form, c10::Device device, bool dense);

  // What the model gets; undefined for a length.
  std::vector<at::Tensor> Tensors() const;
  const at::Tensor& operator[](size_t i) const { return inputs_[i].given; }

  // Counts the present references, those of a model that retains nothing. Called once, when all
  // that refers to the tensors between calls is built and the caller holds none itself.
  void CountUses();

  // Points the tensors at this call's buffers, narrowed to `sizes`, cast and copied where wanted.
  void Point(const DLTensor* buffers, const std::vector<int64_t>& sizes);

  // The position of an input that was written to although the plan foresaw none, or -1.
  int64_t FindUnforeseenWrite() const;

  // Ends the call, on the stream that it ran on: no tensor refers to a caller's buffer any more.
  // Inputs that the model retained now own a copy, or raise where they are read; then the tensors
  // must not be used for another call. `all`: whether each of them counts as retained.
  Retained Finish(bool all) noexcept;

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

  bool IsRetained(const Input& input) const;
  // Whether the model resized, transposed or exchanged its input in place, which the next call must
  // not see.
  bool Reshaped(const Input& input, const CallForm::Operand& operand) const;
  void Narrow(const Input& input, const TcNarrowing& narrowing, int64_t size);
  void Repoint(const at::Tensor& shell, void* data) const;

  const CallForm& form_;
  c10::Device device_;
  std::vector<Input> inputs_;
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_CALL_INPUTS_H_
