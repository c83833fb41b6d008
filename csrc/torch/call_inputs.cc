#include "call_inputs.h"

#include <ATen/Functions.h>

#include "guards.h"

namespace torchcall {
namespace {

size_t StorageUses(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->unsafe_storage().use_count();
}

}  // namespace

bool OwnMemory(c10::StorageImpl* storage, c10::Device device) noexcept {
  try {
    const TorchStateGuard guard(Autograd::kOff);
    const int64_t bytes = static_cast<int64_t>(storage->nbytes());
    const at::Tensor copy =
        View(storage->mutable_data(), {bytes}, c10::ScalarType::Byte, device).clone();
    storage->set_data_ptr_noswap(StorageOf(copy)->set_data_ptr({nullptr, device}));
    return true;
  } catch (...) {  // torch's allocator throws c10::Error
    storage->set_data_ptr_noswap({nullptr, device});
  }
  try {
    storage->release_data_and_set_meta_custom_data_ptr_error_msg_(
        "torchcall: an input that the model retained after its call cannot be read: there was no "
        "memory for a copy");
  } catch (...) {
    storage->set_throw_on_mutable_data_ptr();
  }
  return false;
}

CallInputs::CallInputs(const CallForm& form, c10::Device device, bool dense)
    : form_(form), device_(device) {
  // Not inference tensors, whatever mode the calls run in: a model that retains an input may
  // differentiate with respect to it.
  const TorchStateGuard guard(Autograd::kOff);
  for (size_t i = 0; i < form.inputs.size(); ++i) {
    const CallForm::Input& described = form.inputs[i];
    Input& input = inputs_.emplace_back();
    if (described.is_length) continue;
    const bool strided = described.narrowing.length >= 0 && described.narrowing.axis > 0;
    const bool separate = described.cast || described.copied || (dense && strided);
    const auto options = at::TensorOptions().device(device);
    input.shell = View(nullptr, described.shape, described.dtype, device);
    input.given = separate ? at::empty(described.shape,
                                       options.dtype(described.cast.value_or(described.dtype)))
                           : input.shell;
  }
}

std::vector<at::Tensor> CallInputs::Tensors() const {
  std::vector<at::Tensor> tensors;
  for (const Input& input : inputs_) tensors.push_back(input.given);
  return tensors;
}

void CallInputs::CountUses() {
  for (Input& input : inputs_) {
    if (!input.given.defined()) continue;
    input.tensor_uses = input.given.use_count();
    input.storage_uses = StorageUses(input.given);
    input.storage = StorageOf(input.given);
    input.dtype = input.given.scalar_type();
    input.strides = input.given.strides().vec();
  }
}

void CallInputs::Point(const DLTensor* buffers, const std::vector<int64_t>& sizes) {
  for (size_t i = 0; i < inputs_.size(); ++i) {
    Input& input = inputs_[i];
    if (!input.given.defined()) continue;
    Repoint(input.shell, buffers[i].data);
    const TcNarrowing& narrowing = form_.inputs[i].narrowing;
    if (narrowing.length >= 0) Narrow(input, narrowing, sizes[narrowing.length]);
    if (!input.given.is_same(input.shell)) {
      input.given.copy_(input.shell, /*non_blocking=*/true);
    }
    input.version = VersionOf(input.given);
  }
}

// Narrows an input to a prefix along one axis. The shell becomes a strided view of the buffer; a
// separate tensor stays contiguous, in memory that fits the whole input.
void CallInputs::Narrow(const Input& input, const TcNarrowing& narrowing, int64_t size) {
  c10::TensorImpl* shell = input.shell.unsafeGetTensorImpl();
  auto sizes = shell->sizes().vec();
  const auto strides = shell->strides().vec();
  sizes[narrowing.axis] = size;
  shell->set_sizes_and_strides(sizes, strides);
  if (!input.given.is_same(input.shell)) {
    input.given.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  }
}

int64_t CallInputs::FindUnexpectedWrite() const {
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const Input& input = inputs_[i];
    if (!input.given.defined()) continue;
    if (input.given.is_same(input.shell) && VersionOf(input.given) != input.version) {
      return static_cast<int64_t>(i);
    }
  }
  return -1;
}

bool CallInputs::IsRetained(const Input& input) const {
  return input.given.use_count() > input.tensor_uses ||
         StorageUses(input.given) > input.storage_uses;
}

bool CallInputs::Reshaped(const Input& input, const CallForm::Input& described) const {
  const at::Tensor& given = input.given;
  if (given.layout() != at::kStrided ||
      given.dim() != static_cast<int64_t>(described.shape.size()) ||
      given.scalar_type() != input.dtype || given.storage_offset() != 0 ||
      StorageOf(given) != input.storage) {
    return true;
  }
  // Each call sets the sizes of narrowed inputs, and the strides too where `given` is separate.
  if (described.narrowing.length < 0) {
    return given.sizes() != c10::IntArrayRef(described.shape) ||
           given.strides() != c10::IntArrayRef(input.strides);
  }
  return given.is_same(input.shell) && given.strides() != c10::IntArrayRef(input.strides);
}

void CallInputs::Repoint(const at::Tensor& shell, void* data) const {
  StorageOf(shell)->set_data_ptr_noswap({data, device_});
}

CallInputs::Retained CallInputs::Finish(bool all) noexcept {
  Retained retained;
  for (size_t i = 0; i < inputs_.size(); ++i) {
    Input& input = inputs_[i];
    if (!input.given.defined()) continue;
    // Removes the flag and the autograd graph that the model's `requires_grad_()` may have left.
    if (input.given.unsafeGetTensorImpl()->autograd_meta() != nullptr && !IsRetained(input)) {
      input.given.unsafeGetTensorImpl()->set_autograd_meta(nullptr);
    }
    if (!all && !Reshaped(input, form_.inputs[i]) && !IsRetained(input)) {
      Repoint(input.shell, nullptr);
      continue;
    }
    ++retained.count;
    if (!input.given.is_same(input.shell)) {
      Repoint(input.shell, nullptr);
      continue;
    }
    // The model's views of the input share its storage, so the storage gets the copy. The copy is
    // of the whole buffer, of which the input may be a narrowed view.
    if (!OwnMemory(StorageOf(input.shell), device_)) retained.lost = static_cast<int64_t>(i);
  }
  return retained;
}

}  // namespace torchcall
