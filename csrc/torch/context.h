// The tensors, containers and stack of one call under way. Used by one thread at a time.

#ifndef TORCHCALL_TORCH_CONTEXT_H_
#define TORCHCALL_TORCH_CONTEXT_H_

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <memory>
#include <vector>

#include "plan.h"

namespace torchcall {

class CallContext {
 public:
  explicit CallContext(const Plan& plan);

  // Points the inputs at this call's buffers and leaves the arguments on the stack.
  std::vector<c10::IValue>& Prepare(const DLTensor* inputs, const ModelInstance& instance);

  // Ends the call: no tensor refers to a caller's buffer any more. Returns how many inputs the
  // model kept; each of those now owns a copy, and the context must not be used again.
  int64_t Finish();

  // The position of an input that was written to although the plan foresaw none, or -1.
  int64_t FindUnforeseenWrite() const;

  // What each of the plan's lengths comes to in this call; set before Prepare.
  std::vector<int64_t>& sizes() { return sizes_; }
  std::vector<const at::Tensor*>& outputs() { return outputs_; }
  std::vector<c10::IValue>& stack() { return stack_; }

 private:
  struct Input {
    // Both undefined for a length, which the model does not see.
    at::Tensor shell;  // refers to the caller's buffer while the call runs
    at::Tensor given;  // what the model gets: the shell, or its cast or copied twin
    size_t tensor_uses = 0;
    size_t storage_uses = 0;
    uint32_t version = 0;
  };

  bool Kept(const Input& input) const;
  void Narrow(const Input& input, const TcNarrowing& narrowing);

  const Plan& plan_;
  std::vector<Input> inputs_;
  std::vector<int64_t> sizes_;
  std::vector<c10::IValue> containers_;
  std::vector<size_t> container_uses_;
  std::vector<c10::IValue> arguments_;
  std::vector<c10::IValue> stack_;
  std::vector<const at::Tensor*> outputs_;
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_CONTEXT_H_
