// Redirects one operator from a simulated CUDA device to the CPU: relabels its arguments as CPU
// tensors over the same memory, and its results as CUDA tensors. Results that are views of
// arguments stay views.

#ifndef TORCHCALL_STANDIN_TORCH_REDIRECT_H_
#define TORCHCALL_STANDIN_TORCH_REDIRECT_H_

#include <ATen/core/Generator.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/core/StorageImpl.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "torch_memory.h"

namespace standin {

// Which tensors an operator accepts besides those of its device. CPU scalars are always accepted.
enum class ForeignTensors { kNone, kCpu, kAny };

inline ForeignTensors ForeignTensorsOf(const std::string& name) {
  if (name == "aten::copy_") return ForeignTensors::kAny;
  if (name == "aten::index.Tensor" || name == "aten::index.Tensor_out" ||
      name == "aten::index_put_" || name == "aten::_index_put_impl_") {
    return ForeignTensors::kCpu;
  }
  return ForeignTensors::kNone;
}

class Redirect {
 public:
  explicit Redirect(ForeignTensors allowed) : allowed_(allowed) {}

  c10::DeviceIndex device() const { return device_.value_or(thread_device); }
  // Whether CPU tensors must be copied to the device.
  bool has_cpu_tensors() const { return has_cpu_tensors_; }
  bool indexes_by_mask() const { return indexes_by_mask_; }

  c10::IValue ToCpu(const c10::IValue& value) {
    if (value.isTensor()) return ToCpu(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(ToCpu(tensor));
      return list;
    }
    if (value.isList() && IsOfOptionalTensors(value.toListRef())) {
      c10::List<std::optional<at::Tensor>> list;
      for (const c10::IValue& item : value.toListRef()) list.push_back(IndexToCpu(item));
      return list;
    }
    // Random numbers come from the CPU's generator.
    if (value.isGenerator() && value.toGenerator().device().is_cuda()) return {};
    if (value.isDevice() && value.toDevice().is_cuda()) {
      device_ = IndexOf(value.toDevice());
      return c10::Device(c10::kCPU);
    }
    return value;
  }

  // Transfers the new shape and memory of resized arguments.
  void Return() {
    for (auto& [original, alias] : storages_) Return(original, *alias.unsafeGetStorageImpl());
    for (auto& [original, alias] : tensors_) {
      c10::TensorImpl* impl = original.unsafeGetTensorImpl();
      if (original.sizes() == alias.sizes() && original.strides() == alias.strides() &&
          original.storage_offset() == alias.storage_offset()) {
        continue;
      }
      impl->set_storage_offset(alias.storage_offset());
      impl->set_sizes_and_strides(alias.sizes(), alias.strides());
    }
  }

  c10::IValue ToCuda(const c10::IValue& value) {
    if (value.isTensor()) return ToCuda(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(ToCuda(tensor));
      return list;
    }
    return value;
  }

 private:
  struct Pair {
    at::Tensor original;
    at::Tensor alias;
  };

  // TorchScript's lists of optional tensors carry no element type.
  static bool IsOfOptionalTensors(c10::ArrayRef<c10::IValue> items) {
    return std::any_of(items.begin(), items.end(), [](const auto& i) { return i.isTensor(); }) &&
           std::all_of(items.begin(), items.end(),
                       [](const auto& i) { return i.isTensor() || i.isNone(); });
  }

  std::optional<at::Tensor> IndexToCpu(const c10::IValue& index) {
    if (index.isNone()) return std::nullopt;
    const at::Tensor& tensor = index.toTensor();
    indexes_by_mask_ |= tensor.defined() && tensor.is_cuda() &&
                        (tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte);
    return ToCpu(tensor);
  }

  at::Tensor ToCpu(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      TORCH_CHECK(allowed_ != ForeignTensors::kNone || tensor.dim() == 0, Mixed("cpu"));
      has_cpu_tensors_ |= allowed_ != ForeignTensors::kNone;
      cpu_tensors_.push_back(tensor);
      return tensor;
    }
    const c10::DeviceIndex index = tensor.device().index();
    TORCH_CHECK(allowed_ == ForeignTensors::kAny || !device_ || *device_ == index,
                Mixed(Cuda(index).str()));
    if (!device_) device_ = index;
    for (const Pair& pair : tensors_) {
      if (pair.original.is_same(tensor)) return pair.alias;
    }
    at::Tensor alias = New(AliasOf(tensor.storage()), c10::DispatchKey::CPU, tensor);
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
      alias.unsafeGetTensorImpl()->set_wrapped_number(true);
    }
    tensors_.push_back({tensor, alias});
    return alias;
  }

  std::string Mixed(const std::string& other) const {
    return "Expected all tensors to be on the same device, but found at least two devices, cuda:" +
           std::to_string(device()) + " and " + other + "!";
  }

  static at::Tensor Shaped(at::Tensor tensor, const at::Tensor& like) {
    tensor.unsafeGetTensorImpl()->set_storage_offset(like.storage_offset());
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
    return tensor;
  }

  static at::Tensor New(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
    return Shaped(at::detail::make_tensor<c10::TensorImpl>(std::move(storage),
                                                           c10::DispatchKeySet(key), like.dtype()),
                  like);
  }

  c10::Storage AliasOf(const c10::Storage& storage) {
    for (const auto& [original, alias] : storages_) {
      if (original.is_alias_of(storage)) return alias;
    }
    c10::StorageImpl* impl = storage.unsafeGetStorageImpl();
    c10::Storage alias = c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), impl->nbytes(),
        c10::DataPtr(impl->mutable_data(), c10::Device(c10::kCPU)), c10::GetCPUAllocator(),
        impl->resizable());
    storages_.emplace_back(storage, alias);
    return alias;
  }

  static void Return(const c10::Storage& original, c10::StorageImpl& alias) {
    c10::StorageImpl* impl = original.unsafeGetStorageImpl();
    if (alias.nbytes() == impl->nbytes() && alias.data() == impl->mutable_data()) return;
    impl->set_data_ptr_noswap(CopyToDevice(alias));
    impl->set_nbytes(alias.nbytes());
  }

  static c10::DataPtr CopyToDevice(c10::StorageImpl& storage) {
    c10::DataPtr data = Allocator().allocate(storage.nbytes());
    if (storage.nbytes() == 0) return data;
    if (storage.data() == nullptr) {  // a ZeroTensor
      std::memset(data.get(), 0, storage.nbytes());
    } else {
      std::memcpy(data.get(), storage.data(), storage.nbytes());
    }
    return data;
  }

  at::Tensor ToCuda(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    for (const at::Tensor& given : cpu_tensors_) {
      if (given.is_same(tensor)) return tensor;
    }
    for (const Pair& pair : tensors_) {
      if (pair.alias.is_same(tensor)) return pair.original;
    }
    // A view has the keys of its base, as in torch: a view of an ordinary tensor is no inference
    // tensor, even in inference mode.
    for (const Pair& pair : tensors_) {
      if (!pair.alias.storage().is_alias_of(tensor.storage())) continue;
      return Shaped(at::detail::make_tensor<c10::TensorImpl>(
                        c10::TensorImpl::VIEW, c10::Storage(pair.original.storage()),
                        pair.original.key_set(), tensor.dtype()),
                    tensor);
    }
    for (const auto& [storage, from] : storages_) {
      if (from.is_alias_of(tensor.storage())) return New(storage, c10::DispatchKey::CUDA, tensor);
    }
    c10::StorageImpl* impl = tensor.storage().unsafeGetStorageImpl();
    c10::Storage storage =
        c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), impl->nbytes(),
                                              CopyToDevice(*impl), &Allocator(), true);
    storages_.emplace_back(storage, tensor.storage());
    return New(storage, c10::DispatchKey::CUDA, tensor);
  }

  const ForeignTensors allowed_;
  bool has_cpu_tensors_ = false;
  bool indexes_by_mask_ = false;
  std::optional<c10::DeviceIndex> device_;
  std::vector<at::Tensor> cpu_tensors_;
  std::vector<Pair> tensors_;
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_;  // CUDA, CPU
};

// Whether the operator synchronises with the device: its result is a number or has a data-dependent
// shape, or CPU tensors are copied.
inline bool Synchronizes(const std::string& name, const Redirect& redirect) {
  static const std::unordered_set<std::string> always = {
      "aten::_local_scalar_dense",
      "aten::_unique2",
      "aten::bincount",
      "aten::equal",
      "aten::masked_select",
      "aten::masked_select.out",
      "aten::nonzero",
      "aten::nonzero.out",
      "aten::repeat_interleave.Tensor",
      "aten::unique_consecutive",
      "aten::unique_dim",
  };
  return always.count(name) > 0 || redirect.indexes_by_mask() || redirect.has_cpu_tensors();
}

}  // namespace standin

#endif  // TORCHCALL_STANDIN_TORCH_REDIRECT_H_
