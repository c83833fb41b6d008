#include "call_inputs.h"

#include <ATen/Functions.h>

#include "guards.h"

namespace torchcall {
namespace {

c10::StorageImpl* StorageOf(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
}

uint32_t VersionOf(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->version_counter().current_version();
}

size_t StorageUses(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->unsafe_storage().use_count();
}

}  // namespace

CallInputs::CallInputs(const CallForm& form, c10::Device device, bool dense,
                       std::vector<at::Tensor> given)
    : form_(form), device_(device) {
  // Ordinary tensors, whatever mode the calls run in: an inference tensor could not be
  // differentiated by a model that keeps it.
  const TorchStateGuard guard(Autograd::kOff);
  for (size_t i = 0; i < form.operands.size(); ++i) {
    const CallForm::Operand& operand = form.operands[i];
    Input& input = inputs_.emplace_back();
    if (operand.is_length) continue;
    const bool strided = operand.narrowing.length >= 0 && operand.narrowing.axis > 0;
    const bool twin = operand.cast || operand.copied || (dense && strided);
    if (given.empty()) {
      const auto options = at::TensorOptions().device(device);
      input.shell = View(nullptr, operand.shape, operand.dtype, device);
      input.given =
          twin ? at::empty(operand.shape, options.dtype(operand.cast.value_or(operand.dtype)))
               : input.shell;
    } else {
      input.given = std::move(given[i]);
      input.shell = twin ? View(nullptr, operand.shape, operand.dtype, device) : input.given;
      StorageOf(input.shell)->set_resizable(false);
    }
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
    const TcNarrowing& narrowing = form_.operands[i].narrowing;
    if (narrowing.length >= 0) Narrow(input, narrowing, sizes[narrowing.length]);
    if (!input.given.is_same(input.shell)) {
      input.given.copy_(input.shell, /*non_blocking=*/true);
    }
    input.version = VersionOf(input.given);
  }
}

// A prefix of the buffer along one axis: a strided view for the shell, dense for its twin, whose
// memory has room for the whole.
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

int64_t CallInputs::FindUnforeseenWrite() const {
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const Input& input = inputs_[i];
    if (!input.given.defined()) continue;
    if (input.given.is_same(input.shell) && VersionOf(input.given) != input.version) {
      return static_cast<int64_t>(i);
    }
  }
  return -1;
}

bool CallInputs::Kept(const Input& input) const {
  return input.given.use_count() > input.tensor_uses ||
         StorageUses(input.given) > input.storage_uses;
}

bool CallInputs::Reshaped(const Input& input, const CallForm::Operand& operand) const {
  const at::Tensor& given = input.given;
  if (given.dim() != static_cast<int64_t>(operand.shape.size()) ||
      given.scalar_type() != input.dtype || given.storage_offset() != 0 ||
      StorageOf(given) != input.storage) {
    return true;
  }
  // Narrowed tensors get their sizes anew in each call, twins of them their strides too.
  if (operand.narrowing.length < 0) {
    return given.sizes() != c10::IntArrayRef(operand.shape) ||
           given.strides() != c10::IntArrayRef(input.strides);
  }
  return given.is_same(input.shell) && given.strides() != c10::IntArrayRef(input.strides);
}

void CallInputs::Repoint(const at::Tensor& shell, void* data) const {
  StorageOf(shell)->set_data_ptr_noswap({data, device_});
}

void CallInputs::Detach(c10::StorageImpl* storage) const {
  const TorchStateGuard guard(Autograd::kOff);
  const int64_t bytes = static_cast<int64_t>(storage->nbytes());
  const at::Tensor copy =
      View(storage->mutable_data(), {bytes}, c10::ScalarType::Byte, device_).clone();
  storage->set_data_ptr_noswap(StorageOf(copy)->set_data_ptr({nullptr, device_}));
}

int64_t CallInputs::Finish(bool all_kept, const int32_t* kept) {
  int64_t count = 0;
  for (size_t i = 0; i < inputs_.size(); ++i) {
    Input& input = inputs_[i];
    if (!input.given.defined()) continue;
    // Drops the flag and the graph that `requires_grad_()` may have left.
    if (input.given.unsafeGetTensorImpl()->autograd_meta() != nullptr && !Kept(input)) {
      input.given.unsafeGetTensorImpl()->set_autograd_meta(nullptr);
    }
    const bool reshaped = Reshaped(input, form_.operands[i]);
    if (!all_kept && !reshaped && !(kept != nullptr && kept[i] != 0) && !Kept(input)) {
      Repoint(input.shell, nullptr);
      continue;
    }
    ++count;
    if (input.given.is_same(input.shell)) {
      // Views made by the model share this storage, so it is the storage that gets the copy; of the
      // whole buffer, for the input may be a narrowed view of it.
      Detach(StorageOf(input.shell));
    } else {
      Repoint(input.shell, nullptr);
    }
  }
  return count;
}

}  // namespace torchcall
