#include "values.h"

#include <ATen/core/Dict.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/jit_type.h>

#include <stdexcept>

namespace torchcall {
namespace {

const char* KindName(TcNodeKind kind) {
  switch (kind) {
    case TC_TENSOR:
      return "an array";
    case TC_INT:
      return "an int";
    case TC_FLOAT:
      return "a float";
    case TC_BOOL:
      return "a bool";
    case TC_STRING:
      return "a str";
    case TC_NONE:
      return "None";
    case TC_LIST:
      return "a list";
    case TC_TUPLE:
      return "a tuple";
    case TC_DICT:
      return "a dict";
  }
  return "something else";
}

std::string KeyText(const c10::IValue& key) {
  return key.isString() ? "'" + key.toStringRef() + "'" : std::to_string(key.toInt());
}

[[noreturn]] void Refuse(const std::string& path, const c10::Type& type, const Tree& got) {
  throw std::invalid_argument("operand " + path + ": expected " + type.annotation_str() +
                              " (from the model's signature), got " + KindName(got.kind));
}

c10::IValue BuildValue(const Tree& tree, const c10::TypePtr& type, const std::string& path,
                       const std::vector<at::Tensor>& tensors,
                       std::vector<c10::IValue>& containers);

c10::IValue BuildList(const Tree& tree, const c10::TypePtr& type, const std::string& path,
                      const std::vector<at::Tensor>& tensors,
                      std::vector<c10::IValue>& containers) {
  const c10::TypePtr& element = type->expectRef<c10::ListType>().getElementType();
  c10::impl::GenericList list(element);
  for (size_t i = 0; i < tree.children.size(); ++i) {
    list.push_back(BuildValue(tree.children[i], element, path + "[" + std::to_string(i) + "]",
                              tensors, containers));
  }
  // Typed lists such as List[Tensor] have the same representation as generic ones.
  containers.emplace_back(list);
  return containers.back();
}

c10::IValue BuildTuple(const Tree& tree, const c10::TypePtr& type, const std::string& path,
                       const std::vector<at::Tensor>& tensors,
                       std::vector<c10::IValue>& containers) {
  const auto& tuple_type = type->expectRef<c10::TupleType>();
  const auto elements = tuple_type.elements();
  if (elements.size() != tree.children.size()) {
    throw std::invalid_argument("operand " + path + ": expected " + type->annotation_str() +
                                " (from the model's signature), got a tuple of " +
                                std::to_string(tree.children.size()));
  }
  std::vector<c10::IValue> values;
  for (size_t i = 0; i < elements.size(); ++i) {
    values.push_back(BuildValue(tree.children[i], elements[i], path + "[" + std::to_string(i) + "]",
                                tensors, containers));
  }
  containers.push_back(tuple_type.schema()
                           ? c10::IValue(c10::ivalue::Tuple::createNamed(
                                 std::move(values), type->cast<c10::TupleType>()))
                           : c10::IValue(c10::ivalue::Tuple::create(std::move(values))));
  return containers.back();
}

c10::IValue BuildDict(const Tree& tree, const c10::TypePtr& type, const std::string& path,
                      const std::vector<at::Tensor>& tensors,
                      std::vector<c10::IValue>& containers) {
  const auto& dict_type = type->expectRef<c10::DictType>();
  c10::impl::GenericDict dict(dict_type.getKeyType(), dict_type.getValueType());
  for (size_t i = 0; i < tree.children.size(); ++i) {
    const c10::IValue& key = tree.keys[i];
    const std::string key_path = path + "[" + KeyText(key) + "]";
    if (key.isString() != (dict_type.getKeyType()->kind() == c10::TypeKind::StringType)) {
      throw std::invalid_argument("operand " + key_path + ": expected a key of type " +
                                  dict_type.getKeyType()->annotation_str() + ", got " +
                                  KeyText(key));
    }
    dict.insert(
        key, BuildValue(tree.children[i], dict_type.getValueType(), key_path, tensors, containers));
  }
  containers.emplace_back(dict);
  return containers.back();
}

c10::IValue BuildUnion(const Tree& tree, const c10::TypePtr& type, const std::string& path,
                       const std::vector<at::Tensor>& tensors,
                       std::vector<c10::IValue>& containers) {
  const auto choices = type->expectRef<c10::UnionType>().containedTypes();
  // An int matches float only if the union has no int.
  if (tree.kind == TC_INT) {
    for (const c10::TypePtr& choice : choices) {
      if (choice->kind() == c10::TypeKind::IntType) return tree.scalar;
    }
  }
  for (const c10::TypePtr& choice : choices) {
    const size_t made = containers.size();
    try {
      return BuildValue(tree, choice, path, tensors, containers);
    } catch (const std::invalid_argument&) {
      containers.resize(made);
    }
  }
  Refuse(path, *type, tree);
}

c10::IValue BuildValue(const Tree& tree, const c10::TypePtr& type, const std::string& path,
                       const std::vector<at::Tensor>& tensors,
                       std::vector<c10::IValue>& containers) {
  switch (type->kind()) {
    case c10::TypeKind::OptionalType:
      if (tree.kind == TC_NONE) return {};
      return BuildValue(tree, type->expectRef<c10::OptionalType>().getElementType(), path, tensors,
                        containers);
    case c10::TypeKind::UnionType:
      return BuildUnion(tree, type, path, tensors, containers);
    case c10::TypeKind::TensorType:
      if (tree.kind == TC_TENSOR) return tensors.at(tree.integer);
      break;
    case c10::TypeKind::IntType:
      if (tree.kind == TC_INT) return tree.scalar;
      break;
    case c10::TypeKind::FloatType:
      if (tree.kind == TC_FLOAT) return tree.scalar;
      if (tree.kind == TC_INT) return static_cast<double>(tree.integer);
      break;
    case c10::TypeKind::BoolType:
      if (tree.kind == TC_BOOL) return tree.scalar;
      break;
    case c10::TypeKind::NumberType:
      if (tree.kind == TC_INT || tree.kind == TC_FLOAT || tree.kind == TC_BOOL) return tree.scalar;
      break;
    case c10::TypeKind::StringType:
      if (tree.kind == TC_STRING) return tree.scalar;
      break;
    case c10::TypeKind::NoneType:
      if (tree.kind == TC_NONE) return {};
      break;
    case c10::TypeKind::ListType:
      if (tree.kind == TC_LIST || tree.kind == TC_TUPLE) {
        return BuildList(tree, type, path, tensors, containers);
      }
      break;
    case c10::TypeKind::TupleType:
      if (tree.kind == TC_TUPLE) return BuildTuple(tree, type, path, tensors, containers);
      break;
    case c10::TypeKind::DictType:
      if (tree.kind == TC_DICT) return BuildDict(tree, type, path, tensors, containers);
      break;
    default:
      break;
  }
  Refuse(path, *type, tree);
}

// The path to a value, a linked list on the stack. It becomes text only in an error.
struct Path {
  const Path* parent = nullptr;
  const c10::IValue* key = nullptr;  // of a dict; nullptr: `index` is used
  size_t index = 0;

  std::string Text() const {
    if (parent == nullptr) return "";
    return parent->Text() + "[" + (key ? KeyText(*key) : std::to_string(index)) + "]";
  }
};

[[noreturn]] void RefuseResult(const Path& path, const std::string& expected,
                               const std::string& got) {
  const std::string text = path.Text();
  throw std::invalid_argument("output" + (text.empty() ? "" : " " + text) + ": expected " +
                              expected + ", got " + got);
}

std::string KindOf(const c10::IValue& value) {
  return value.isNone() ? "None" : value.type()->annotation_str();
}

std::string KeysOf(const c10::impl::GenericDict& dict) {
  std::string keys;
  for (const auto& entry : dict) keys += (keys.empty() ? "" : ", ") + KeyText(entry.key());
  return "a dict with keys [" + keys + "]";
}

class Flattener {
 public:
  Flattener(bool selects, std::vector<const at::Tensor*>& outputs)
      : selects_(selects), outputs_(outputs) {}

  void Walk(const c10::IValue& value, const Tree& tree, const Path& path) {
    switch (tree.kind) {
      case TC_TENSOR:
        if (!value.isTensor()) RefuseResult(path, "a tensor", KindOf(value));
        if (!value.toTensor().defined()) RefuseResult(path, "a tensor", "an undefined tensor");
        outputs_[tree.integer] = &value.toTensor();
        return;
      case TC_NONE:
        if (!value.isNone()) RefuseResult(path, "None", KindOf(value));
        return;
      case TC_TUPLE:
        if (!value.isTuple()) RefuseResult(path, "a tuple", KindOf(value));
        WalkSequence(value.toTupleRef().elements(), tree, path, "a tuple of ");
        return;
      case TC_LIST:
        if (!value.isList()) RefuseResult(path, "a list", KindOf(value));
        WalkSequence(value.toListRef(), tree, path, "a list of ");
        return;
      case TC_DICT:
        if (!value.isGenericDict()) RefuseResult(path, "a dict", KindOf(value));
        WalkDict(value.toGenericDict(), tree, path);
        return;
      default:
        RefuseResult(path, KindName(tree.kind), KindOf(value));
    }
  }

 private:
  template <typename Sequence>
  void WalkSequence(const Sequence& elements, const Tree& tree, const Path& path,
                    const char* what) {
    if (elements.size() != tree.children.size()) {
      RefuseResult(path, what + std::to_string(tree.children.size()),
                   what + std::to_string(elements.size()));
    }
    for (size_t i = 0; i < elements.size(); ++i) {
      Walk(elements[i], tree.children[i], Path{&path, nullptr, i});
    }
  }

  void WalkDict(const c10::impl::GenericDict& dict, const Tree& tree, const Path& path) {
    for (size_t i = 0; i < tree.children.size(); ++i) {
      const Path here{&path, &tree.keys[i], 0};
      const auto found = dict.find(tree.keys[i]);
      if (found == dict.end()) RefuseResult(here, "this key", KeysOf(dict));
      Walk(found->value(), tree.children[i], here);
    }
    if (!selects_ && dict.size() != tree.children.size()) {
      RefuseResult(path, std::to_string(tree.children.size()) + " keys", KeysOf(dict));
    }
  }

  bool selects_;
  std::vector<const at::Tensor*>& outputs_;
};

}  // namespace

ArgumentBuilder::ArgumentBuilder(const Tree& call, const c10::FunctionSchema& schema,
                                 bool is_method) {
  const Tree& positional = call.children.at(0);
  const Tree& keywords = call.children.at(1);
  const size_t first = is_method ? 1 : 0;
  const auto& declared = schema.arguments();
  if (positional.children.size() > declared.size() - first) {
    throw std::invalid_argument("expected at most " + std::to_string(declared.size() - first) +
                                " positional arguments (from the model's signature), got " +
                                std::to_string(positional.children.size()));
  }
  std::vector<bool> used(keywords.children.size(), false);
  for (size_t i = first; i < declared.size(); ++i) {
    const c10::Argument& argument = declared[i];
    Slot slot{nullptr, {}, argument.type(), "args[" + std::to_string(i - first) + "]"};
    const bool by_position = i - first < positional.children.size();
    if (by_position) slot.tree = &positional.children[i - first];
    for (size_t k = 0; k < keywords.keys.size(); ++k) {
      if (keywords.keys[k].toStringRef() != argument.name()) continue;
      if (by_position) {
        throw std::invalid_argument("operand kwargs['" + argument.name() +
                                    "']: expected one value, got two, by position and by name");
      }
      used[k] = true;
      slot.tree = &keywords.children[k];
      slot.path = "kwargs['" + argument.name() + "']";
    }
    if (slot.tree == nullptr) {
      if (!argument.default_value()) {
        throw std::invalid_argument("argument '" + argument.name() + "': expected " +
                                    argument.type()->annotation_str() +
                                    " (from the model's signature), got nothing");
      }
      slot.default_value = *argument.default_value();
    } else {
      std::vector<int64_t> inputs;
      CollectTensors(*slot.tree, inputs);
      for (int64_t input : inputs) {
        if (argument_of_input_.size() <= static_cast<size_t>(input)) {
          argument_of_input_.resize(input + 1);
        }
        argument_of_input_[input] = i;
      }
    }
    slots_.push_back(std::move(slot));
  }
  for (size_t k = 0; k < used.size(); ++k) {
    if (!used[k]) {
      throw std::invalid_argument(
          "operand kwargs[" + KeyText(keywords.keys[k]) +
          "]: expected an argument of the model's signature, got an unknown name");
    }
  }
}

std::vector<c10::IValue> ArgumentBuilder::Build(const std::vector<at::Tensor>& tensors,
                                                std::vector<c10::IValue>& containers) const {
  std::vector<c10::IValue> values;
  values.reserve(slots_.size());
  for (const Slot& slot : slots_) {
    values.push_back(slot.tree == nullptr
                         ? slot.default_value
                         : BuildValue(*slot.tree, slot.type, slot.path, tensors, containers));
  }
  return values;
}

void FlattenResult(const c10::IValue& result, const Tree& tree, bool selects,
                   std::vector<const at::Tensor*>& outputs) {
  Flattener(selects, outputs).Walk(result, tree, Path{});
}

}  // namespace torchcall
