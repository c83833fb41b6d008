#include "context.h"

#include <ATen/Functions.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>

#include <cstring>

namespace torchcall {
namespace {

c10::DataPtr Borrowed(void* data) { return {data, c10::Device(c10::kCPU)}; }

void Repoint(const at::Tensor& shell, void* data) {
  shell.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl()->set_data_ptr_noswap(
      Borrowed(data));
}

uint32_t VersionOf(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->version_counter().current_version();
}

size_t StorageUses(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->unsafe_storage().use_count();
}

}  // namespace

CallContext::CallContext(const Plan& plan)
    : plan_(plan), sizes_(plan.lengths_.size()), outputs_(plan.outputs_.size()) {
  // Ordinary tensors, whatever mode the calls run in: an inference tensor could not be
  // differentiated by a model that keeps it.
  const TorchStateGuard guard(Autograd::kOff);
  std::vector<at::Tensor> given;
  for (const Plan::Operand& operand : plan.operands_) {
    Input input;
    if (operand.is_length) {
      given.emplace_back();
      inputs_.push_back(std::move(input));
      continue;
    }
    const auto options = at::TensorOptions().dtype(operand.dtype).device(c10::kCPU);
    input.shell = at::from_blob(nullptr, operand.shape, options);
    const bool twin = operand.cast || operand.written;
    input.given =
        twin ? at::empty(operand.shape, options.dtype(operand.cast.value_or(operand.dtype)))
             : input.shell;
    given.push_back(input.given);
    inputs_.push_back(std::move(input));
  }
  arguments_ = plan.builder_.Build(given, containers_);
  given.clear();
  for (Input& input : inputs_) {
    if (!input.given.defined()) continue;
    input.tensor_uses = input.given.use_count();
    input.storage_uses = StorageUses(input.given);
  }
  for (const c10::IValue& container : containers_) {
    container_uses_.push_back(container.use_count());
  }
}

std::vector<c10::IValue>& CallContext::Prepare(const DLTensor* inputs,
                                               const ModelInstance& instance) {
  for (size_t i = 0; i < inputs_.size(); ++i) {
    Input& input = inputs_[i];
    if (!input.given.defined()) continue;
    Repoint(input.shell, inputs[i].data);
    if (plan_.operands_[i].narrowing.length >= 0) Narrow(input, plan_.operands_[i].narrowing);
    if (!input.given.is_same(input.shell)) input.given.copy_(input.shell);
    input.version = VersionOf(input.given);
  }
  if (instance.module) stack_.emplace_back(instance.module->_ivalue());
  stack_.insert(stack_.end(), arguments_.begin(), arguments_.end());
  return stack_;
}

// A prefix of the buffer along one axis: a strided view for the shell, dense for its twin, whose
// memory has room for the whole.
void CallContext::Narrow(const Input& input, const TcNarrowing& narrowing) {
  c10::TensorImpl* shell = input.shell.unsafeGetTensorImpl();
  auto sizes = shell->sizes().vec();
  const auto strides = shell->strides().vec();
  sizes[narrowing.axis] = sizes_[narrowing.length];
  shell->set_sizes_and_strides(sizes, strides);
  if (!input.given.is_same(input.shell)) {
    input.given.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  }
}

int64_t CallContext::FindUnforeseenWrite() const {
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const Input& input = inputs_[i];
    if (!input.given.defined()) continue;
    if (input.given.is_same(input.shell) && VersionOf(input.given) != input.version) {
      return static_cast<int64_t>(i);
    }
  }
  return -1;
}

bool CallContext::Kept(const Input& input) const {
  return input.given.use_count() > input.tensor_uses ||
         StorageUses(input.given) > input.storage_uses;
}

int64_t CallContext::Finish() {
  stack_.clear();
  bool container_kept = false;
  for (size_t i = 0; i < containers_.size(); ++i) {
    container_kept = container_kept || containers_[i].use_count() > container_uses_[i];
  }
  int64_t kept = 0;
  for (Input& input : inputs_) {
    if (!input.given.defined()) continue;
    // Drops the flag and the graph that `requires_grad_()` may have left.
    if (input.given.unsafeGetTensorImpl()->autograd_meta() != nullptr && !Kept(input)) {
      input.given.unsafeGetTensorImpl()->set_autograd_meta(nullptr);
    }
    if (!container_kept && !Kept(input)) {
      Repoint(input.shell, nullptr);
      continue;
    }
    ++kept;
    if (input.given.is_same(input.shell)) {
      // Views made by the model share this storage, so it is the storage that gets the copy; of the
      // whole buffer, for the input may be a narrowed view of it.
      auto* storage = input.shell.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
      c10::DataPtr copy = c10::GetCPUAllocator()->allocate(storage->nbytes());
      if (storage->nbytes() > 0) std::memcpy(copy.get(), storage->data(), storage->nbytes());
      storage->set_data_ptr_noswap(std::move(copy));
    } else {
      Repoint(input.shell, nullptr);
    }
  }
  return kept;
}

}  // namespace torchcall
