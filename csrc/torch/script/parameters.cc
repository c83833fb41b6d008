#include "parameters.h"

#include <algorithm>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <unordered_map>

#include "../call_inputs.h"
#include "../guards.h"

namespace torchcall {

using torch::jit::ObjectPtr;

namespace {

// torch counts writes to tensors, except those of batch norms to their statistics. Elsewhere than
// on a CPU, comparing values would mean waiting for the device.
bool IsChanged(const at::Tensor& tensor, const at::Tensor& before, uint32_t version) {
  if (VersionOf(tensor) != version) return true;
  if (!tensor.is_cpu() || !tensor.is_contiguous() || tensor.nbytes() == 0) return false;
  const at::Tensor expected = before.contiguous();
  return std::memcmp(tensor.const_data_ptr(), expected.const_data_ptr(), tensor.nbytes()) != 0;
}

// Whether inputs replace the parameter; others are constants.
bool IsReplaced(const c10::ClassType& type, size_t slot, const at::Tensor& tensor) {
  return type.is_parameter(slot) && (tensor.is_floating_point() || tensor.is_complex());
}

std::vector<size_t> PathOf(const std::string& name, const torch::jit::Module& module) {
  std::vector<size_t> path;
  ObjectPtr owner = module._ivalue();
  std::istringstream parts(name);
  for (std::string part; std::getline(parts, part, '.');) {
    const auto slot = owner ? owner->type()->findAttributeSlot(part) : std::nullopt;
    if (!slot) throw std::invalid_argument("the module has no parameter '" + name + "'");
    path.push_back(*slot);
    const c10::IValue& value = owner->getSlot(*slot);
    owner = value.isModule() ? value.toObject() : ObjectPtr();
  }
  return path;
}

ObjectPtr OwnerOf(ObjectPtr module, const std::vector<size_t>& path) {
  for (size_t i = 0; i + 1 < path.size(); ++i) module = module->getSlot(path[i]).toObject();
  return module;
}

}  // namespace

// Inputs in place of parameters, which attributes may refer to: the weights of torch's recurrent
// networks are also in a list. In an archive these are other tensors with the same memory.
class Replacements {
 public:
  void Add(const at::Tensor& parameter, const at::Tensor& input) {
    if (parameter.numel() > 0) entries_.emplace_back(parameter, input);
  }

  // The input in place of a tensor; undefined if it is no parameter.
  at::Tensor Of(const at::Tensor& tensor) const {
    for (const auto& [parameter, input] : entries_) {
      if (tensor.is_same(parameter) || IsAlias(tensor, parameter)) return input;
    }
    return {};
  }

  // A copy of the value that refers to inputs. Its other tensors are copied if `deep`.
  c10::IValue Replace(const c10::IValue& value, bool deep) const {
    c10::IValue::HashIdentityIValueMap memo;
    bool any = false;
    value.visit([&](const c10::IValue& part) {
      if (!part.isTensor() || !part.toTensor().defined()) return false;
      const at::Tensor input = Of(part.toTensor());
      any = any || input.defined();
      if (input.defined()) memo.emplace(part, input);
      if (!input.defined() && !deep) memo.emplace(part, part);
      return false;
    });
    return any || deep ? value.deepcopy(memo) : value;
  }

 private:
  static bool IsAlias(const at::Tensor& a, const at::Tensor& b) {
    // A detached one is a constant.
    return a.device() == b.device() && a.dtype() == b.dtype() && a.layout() == b.layout() &&
           a.layout() == at::kStrided && a.requires_grad() == b.requires_grad() &&
           a.const_data_ptr() == b.const_data_ptr() && a.sizes() == b.sizes() &&
           a.strides() == b.strides();
  }

  std::vector<std::pair<at::Tensor, at::Tensor>> entries_;
};

class ModuleBinder {
 public:
  ModuleBinder(const Replacements& replacements, bool owns_state)
      : replacements_(replacements), owns_state_(owns_state) {}

  BoundModule Bind(const ObjectPtr& object) {
    bound_.object_ = Copy(object, "");
    return std::move(bound_);
  }

 private:
  ObjectPtr Copy(const ObjectPtr& object, const std::string& prefix) {
    const auto known = copies_.find(object.get());
    if (known != copies_.end()) return known->second;
    ObjectPtr copy = object->copy();
    copies_.emplace(object.get(), copy);
    const c10::ClassType& type = *copy->type();
    for (size_t i = 0; i < copy->slots().size(); ++i) {
      const c10::IValue value = copy->getSlot(i);
      const std::string name = prefix + type.getAttributeName(i);
      if (value.isModule()) {
        copy->setSlot(i, Copy(value.toObject(), name + "."));
      } else if (value.isTensor() && value.toTensor().defined()) {
        CopyTensor(copy, i, name);
      } else if (value.isPtrType() && !value.isString()) {
        copy->setSlot(i, replacements_.Replace(value, owns_state_));
      }
    }
    return copy;
  }

  void CopyTensor(const ObjectPtr& owner, size_t slot, const std::string& name) {
    const at::Tensor tensor = owner->getSlot(slot).toTensor();
    if (IsReplaced(*owner->type(), slot, tensor)) return;
    if (!owner->type()->is_buffer(slot)) {
      const at::Tensor input = replacements_.Of(tensor);
      if (input.defined()) return owner->setSlot(slot, input);
    }
    if (!owns_state_) {
      if (tensor.requires_grad()) owner->setSlot(slot, tensor.detach());
      return;
    }
    const at::Tensor own = tensor.detach().clone(c10::MemoryFormat::Contiguous);
    owner->setSlot(slot, own);
    if (owner->type()->is_buffer(slot)) {
      bound_.buffers_.push_back({name, owner, slot, own, tensor.detach(), VersionOf(own)});
    }
  }

  const Replacements& replacements_;
  bool owns_state_;
  BoundModule bound_;
  std::unordered_map<const c10::ivalue::Object*, ObjectPtr> copies_;
};

void BoundModule::CheckBuffers() const {
  for (const Buffer& buffer : buffers_) {
    const c10::IValue& now = buffer.owner->getSlot(buffer.slot);
    if (now.isTensor() && now.toTensor().is_same(buffer.tensor) &&
        !IsChanged(buffer.tensor, buffer.before, buffer.version)) {
      continue;
    }
    throw std::invalid_argument(
        "buffer '" + buffer.name +
        "': expected a module that does not change its buffers, got one that does; call .eval() on "
        "it before torchcall.functional, or return the new value");
  }
}

ParameterSlots::ParameterSlots(const TcPlanSpec& spec, const torch::jit::Module* module) {
  for (int64_t k = 0; k < spec.num_parameters; ++k) {
    if (module == nullptr) throw std::invalid_argument("expected a module, got a script function");
    const TcParameter& parameter = spec.parameters[k];
    slots_.push_back({parameter.input, PathOf(parameter.name, *module)});
    num_inputs_ = std::max(num_inputs_, static_cast<size_t>(parameter.input) + 1);
  }
}

BoundModule ParameterSlots::Bind(const torch::jit::Module& module,
                                 const std::vector<at::Tensor>& inputs, bool owns_state) const {
  // Not inference tensors: they would have no versions.
  const TorchStateGuard guard(Autograd::kOff);
  Replacements replacements;
  for (const Slot& slot : slots_) {
    const ObjectPtr owner = OwnerOf(module._ivalue(), slot.path);
    replacements.Add(owner->getSlot(slot.path.back()).toTensor(), inputs.at(slot.input));
  }
  BoundModule bound = ModuleBinder(replacements, owns_state).Bind(module._ivalue());
  for (const Slot& slot : slots_) {
    OwnerOf(bound.object(), slot.path)->setSlot(slot.path.back(), inputs.at(slot.input));
  }
  return bound;
}

}  // namespace torchcall
