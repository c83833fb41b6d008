// The tensors that a model gets as inputs. They are made once; each call points them at its
// buffers. Used by one thread at a time.

#ifndef TORCHCALL_TORCH_CALL_INPUTS_H_
#define TORCHCALL_TORCH_CALL_INPUTS_H_

#include <ATen/core/Tensor.h>

#include <vector>

#include "call_form.h"

namespace torchcall {

inline c10::StorageImpl* StorageOf(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
}

// Changes with each write to the tensor in place.
inline uint32_t VersionOf(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->version_counter().current_version();
}

// Replaces the memory that a storage refers to by a copy that it owns. Returns false if the copy
// fails; the storage then has no memory, and reading it throws.
bool OwnMemory(c10::StorageImpl* storage, c10::Device device) noexcept;

class CallInputs {
 public:
  // The inputs that the model retained, which means that it refers to them after the call.
  struct Retained {
    int64_t count = 0;
    // The position of a retained input that could not be copied for lack of memory, or -1.
    int64_t lost = -1;
  };

  // `dense`: whether narrowed inputs must be contiguous, too.
  CallInputs(const CallForm& form, c10::Device device, bool dense);

  // The tensors that the model gets; undefined for a length.
  std::vector<at::Tensor> Tensors() const;
  const at::Tensor& operator[](size_t i) const { return inputs_[i].given; }

  // Records the tensors' use counts for a model that retains nothing. Called once, after everything
  // that refers to the tensors between calls has been made, while the caller refers to none.
  void CountUses();

  // Points the tensors at this call's buffers, narrowed to `sizes`. Casts and copies inputs where
  // the plan says so.
  void Point(const DLTensor* buffers, const std::vector<int64_t>& sizes);

  // The position of an input that was written to although the plan expects no write, or -1.
  int64_t FindUnexpectedWrite() const;

  // Ends the call, on its stream. Afterwards no tensor refers to a caller's buffer: an input that
  // the model retained owns a copy, or throws when it is read. If any was retained, these tensors
  // must not be used for another call. `all`: treats every input as retained.
  Retained Finish(bool all) noexcept;

 private:
  struct Input {
    // Both are undefined for a length, which the model does not get.
    at::Tensor shell;  // refers to the caller's buffer while the call runs
    at::Tensor given;  // what the model gets: the shell, or a tensor for a cast or copy of it
    size_t tensor_uses = 0;
    size_t storage_uses = 0;
    uint32_t version = 0;
    // The values between calls. A model may change them in place.
    const void* storage = nullptr;
    c10::ScalarType dtype = c10::ScalarType::Undefined;
    std::vector<int64_t> strides;
  };

  bool IsRetained(const Input& input) const;
  // Whether the model resized or transposed its input, or replaced its data, in place. The next
  // call must not get such a tensor.
  bool Reshaped(const Input& input, const CallForm::Input& described) const;
  void Narrow(const Input& input, const TcNarrowing& narrowing, int64_t size);
  void Repoint(const at::Tensor& shell, void* data) const;

  const CallForm& form_;
  c10::Device device_;
  std::vector<Input> inputs_;
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_CALL_INPUTS_H_
