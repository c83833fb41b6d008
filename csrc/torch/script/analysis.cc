// Finds the inputs that a graph may write to, by following where each value comes from.
//
// torch's alias analysis is too coarse: it puts everything that ever enters a container into one
// set. A model that puts tensors accumulated in place into its result dict would seem to write to
// its inputs, and every call would copy all of them.
//
// Each value has two sets of graph inputs. `self`: the value may be that input, a part of it, or a
// view of a part. `content`: something inside the value may be. What is stored in containers and
// attributes may be read under another name, so all stored contents form one set for the whole
// graph, which every read returns. The sets grow until nothing changes.

#include "analysis.h"

#include <ATen/core/alias_info.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/jit/ir/ir.h>
#include <torch/csrc/jit/runtime/operator.h>

#include <string_view>
#include <unordered_map>
#include <unordered_set>

namespace torchcall {
namespace {

using c10::AliasInfo;
using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

using InputSet = std::unordered_set<size_t>;

struct Origin {
  InputSet self;
  InputSet content;
};

bool Insert(InputSet& into, const InputSet& from) {
  const size_t before = into.size();
  into.insert(from.begin(), from.end());
  return into.size() != before;
}

bool IsContainer(const Value* value) {
  const auto kind = value->type()->kind();
  return kind == c10::TypeKind::ListType || kind == c10::TypeKind::DictType ||
         kind == c10::TypeKind::ClassType;
}

std::string_view NameOf(const Node* node) { return node->kind().toQualString(); }

bool OneOf(std::string_view name, std::initializer_list<std::string_view> names) {
  for (const std::string_view candidate : names) {
    if (name == candidate) return true;
  }
  return false;
}

// Only sets a flag of the call's own tensor. Nearly every force model does it.
bool WritesOnlyFlags(std::string_view op) {
  return OneOf(op, {"aten::requires_grad_", "aten::retain_grad"});
}

bool Differentiates(std::string_view op) {
  return OneOf(op, {"aten::grad", "aten::backward", "aten::_backward"});
}

// Changes which elements a container has, not the elements.
bool ChangesMembers(std::string_view op) {
  return OneOf(op, {"aten::append", "aten::insert", "aten::extend", "aten::_set_item",
                    "aten::Delete", "aten::pop", "aten::popitem", "aten::clear", "aten::remove",
                    "aten::reverse", "aten::sort", "aten::setdefault", "aten::update"});
}

// Batch and instance norms update these in training mode, and their schemas do not say so. Updates
// of the module's own statistics are allowed.
bool IsRunningStatistic(std::string_view argument) {
  return OneOf(argument, {"running_mean", "running_var"});
}

// Schemas declare which outputs are views of which inputs, except for operators composed of others:
// `dropout` in eval mode, `type_as` and `einsum` may return an input. Operators with their own
// kernels allocate every output that the schema calls new. Those named unsafe may return views.
bool MayReturnAnInput(const c10::FunctionSchema& schema) {
  if (schema.name().find("unsafe_") != std::string::npos) return true;
  const auto handle = c10::Dispatcher::singleton().findSchema(schema.operator_name());
  return handle && handle->hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd);
}

// Nodes without a schema whose outputs are new objects that contain the inputs.
bool Builds(std::string_view op) {
  return OneOf(op, {"prim::TupleConstruct", "prim::ListConstruct", "prim::DictConstruct"});
}

// Nodes without a schema whose outputs are inputs, or parts of them.
bool Reads(std::string_view op) {
  return OneOf(op, {"prim::TupleUnpack", "prim::ListUnpack", "prim::TupleIndex", "prim::TupleSlice",
                    "prim::GetAttr", "prim::unchecked_cast", "prim::unchecked_unwrap_optional"});
}

// Nodes without a schema that neither write nor return an input.
bool IsInert(std::string_view op) {
  return OneOf(op, {"prim::Constant", "prim::Print", "prim::RaiseException", "prim::CreateObject",
                    "prim::isinstance", "prim::Uninitialized", "prim::device", "prim::dtype",
                    "prim::shape", "prim::min", "prim::max", "prim::unchecked_unwrap"});
}

bool Intersect(const AliasInfo& a, const AliasInfo& b) {
  for (const auto& symbol : a.beforeSets()) {
    if (b.beforeSets().count(symbol) > 0) return true;
  }
  for (const AliasInfo& inner : a.containedTypes()) {
    if (Intersect(inner, b)) return true;
  }
  for (const AliasInfo& inner : b.containedTypes()) {
    if (Intersect(a, inner)) return true;
  }
  return false;
}

bool IsWildcard(const AliasInfo& info) {
  if (info.isWildcardBefore() || info.isWildcardAfter()) return true;
  for (const AliasInfo& inner : info.containedTypes()) {
    if (IsWildcard(inner)) return true;
  }
  return false;
}

bool IsWrite(const AliasInfo& info) {
  if (info.isWrite()) return true;
  for (const AliasInfo& inner : info.containedTypes()) {
    if (IsWrite(inner)) return true;
  }
  return false;
}

class Follower {
 public:
  explicit Follower(Graph& graph) : graph_(graph) {
    use_.inputs.resize(graph.inputs().size());
    for (size_t i = 0; i < graph.inputs().size(); ++i) {
      origins_[graph.inputs()[i]] = {{i}, {i}};
    }
  }

  GraphUse Run() {
    do {
      changed_ = false;
      Visit(graph_.block());
    } while (changed_);
    for (size_t i = 0; i < use_.inputs.size(); ++i) {
      if (IsSelf(i) && (use_.inputs[i].tensors_written || use_.inputs[i].containers_written)) {
        use_.changes_state = true;
      }
    }
    return use_;
  }

 private:
  bool IsSelf(size_t input) const {
    return graph_.inputs()[input]->type()->kind() == c10::TypeKind::ClassType;
  }

  void Visit(Block* block) {
    for (Node* node : block->nodes()) Visit(node);
  }

  void Visit(Node* node) {
    const std::string_view op = NameOf(node);
    use_.differentiates = use_.differentiates || Differentiates(op);
    use_.draws_random_numbers = use_.draws_random_numbers || node->isNondeterministic();
    if (op == "prim::If") {
      for (Block* branch : node->blocks()) {
        Visit(branch);
        for (size_t i = 0; i < node->outputs().size(); ++i) {
          Flow(branch->outputs()[i], node->outputs()[i]);
        }
      }
    } else if (op == "prim::Loop") {
      VisitLoop(node);
    } else if (op == "prim::SetAttr") {
      Store(node->inputs()[1], node->inputs()[0]);
      WriteContainer(node->inputs()[0]);
    } else if (Builds(op)) {
      for (Value* input : node->inputs()) Grow(node->output(), {}, All(input));
    } else if (Reads(op)) {
      for (Value* input : node->inputs()) {
        for (Value* output : node->outputs()) Read(input, output);
      }
    } else if (!IsInert(op)) {
      VisitOperator(node, op);
    }
  }

  // Inputs: trip count, condition, carried values. Body: counter, carried values → condition,
  // carried.
  void VisitLoop(Node* node) {
    Block* body = node->blocks()[0];
    for (size_t i = 0; i < node->outputs().size(); ++i) {
      Flow(node->inputs()[i + 2], body->inputs()[i + 1]);
      Flow(node->inputs()[i + 2], node->outputs()[i]);
      Flow(body->outputs()[i + 1], body->inputs()[i + 1]);
      Flow(body->outputs()[i + 1], node->outputs()[i]);
    }
    Visit(body);
  }

  void VisitOperator(Node* node, std::string_view op) {
    const torch::jit::Operator* found = node->maybeOperator();
    const bool by_schema =
        found != nullptr && found->aliasAnalysisKind() != c10::AliasAnalysisKind::CONSERVATIVE &&
        found->aliasAnalysisKind() != c10::AliasAnalysisKind::INTERNAL_SPECIAL_CASE;
    if (!by_schema) {
      VisitUnknown(node);
      return;
    }
    const c10::FunctionSchema& schema = found->schema();
    const auto& arguments = schema.arguments();
    for (size_t i = 0; i < arguments.size() && i < node->inputs().size(); ++i) {
      const AliasInfo* info = arguments[i].alias_info();
      if (IsRunningStatistic(arguments[i].name())) UpdateStatistic(node->inputs()[i]);
      if (info == nullptr || !IsWrite(*info) || WritesOnlyFlags(op)) continue;
      Value* target = node->inputs()[i];
      if (!IsContainer(target)) {
        WriteTensor(target);
        continue;
      }
      WriteContainer(target);
      if (!ChangesMembers(op)) WriteContents(target);
      for (size_t k = 0; k < node->inputs().size(); ++k) {
        if (k != i) Store(node->inputs()[k], target);
      }
    }
    if (op == "aten::set_" && node->inputs().size() > 1) {
      Flow(node->inputs()[1], node->inputs()[0]);  // they share memory from here on
    }
    for (size_t k = 0; k < schema.returns().size() && k < node->outputs().size(); ++k) {
      const AliasInfo* returned = schema.returns()[k].alias_info();
      if (returned == nullptr) {
        if (Differentiates(op)) {
          // Gradients are new, except the ones passed in, which may be returned.
          if (node->inputs().size() > 2) Grow(node->outputs()[k], {}, All(node->inputs()[2]));
        } else {
          ReturnUnannotated(node, node->outputs()[k], schema);
        }
        continue;
      }
      for (size_t i = 0; i < arguments.size() && i < node->inputs().size(); ++i) {
        const AliasInfo* info = arguments[i].alias_info();
        if (IsWildcard(*returned)) {
          Read(node->inputs()[i], node->outputs()[k]);
        } else if (info != nullptr && Intersect(*returned, *info)) {
          Flow(node->inputs()[i], node->outputs()[k]);
          // The returned list is new, its elements are views.
          Grow(node->outputs()[k], {}, All(node->inputs()[i]));
        }
      }
    }
  }

  // A new container may contain parts of the inputs, for example `list(x)`.
  void ReturnUnannotated(Node* node, const Value* output, const c10::FunctionSchema& schema) {
    const bool may_be_input = MayReturnAnInput(schema);
    for (Value* input : node->inputs()) {
      if (may_be_input) Grow(output, All(input), All(input));
      if (IsContainer(output)) Grow(output, {}, All(input));
    }
  }

  // An unknown call may write to all of its inputs, and return any of them.
  void VisitUnknown(Node* node) {
    for (Value* input : node->inputs()) {
      WriteTensor(input);
      WriteContainer(input);
      WriteContents(input);
      Grow(stored_, All(input));
      for (Value* output : node->outputs()) {
        Grow(output, All(input), All(input));
        Read(input, output);
      }
    }
    for (Block* block : node->blocks()) Visit(block);
  }

  InputSet All(const Value* value) {
    const Origin& origin = origins_[value];
    InputSet all = origin.self;
    Insert(all, origin.content);
    return all;
  }

  void Grow(InputSet& into, const InputSet& from) { changed_ = Insert(into, from) || changed_; }

  void Grow(const Value* value, const InputSet& self, const InputSet& content) {
    Origin& origin = origins_[value];
    Grow(origin.self, self);
    Grow(origin.content, content);
  }

  // `to` may be the same object as `from`.
  void Flow(const Value* from, const Value* to) {
    const Origin origin = origins_[from];
    Grow(to, origin.self, origin.content);
  }

  // `to` may be something inside `from`.
  void Read(const Value* from, const Value* to) {
    InputSet content = All(from);
    Insert(content, stored_);
    Grow(to, content, content);
  }

  void Store(const Value* value, const Value* container) {
    const InputSet all = All(value);
    Grow(stored_, all);
    Grow(container, {}, all);
  }

  void UpdateStatistic(const Value* value) {
    for (const size_t input : origins_[value].self) {
      if (IsSelf(input)) {
        use_.updates_statistics = true;
      } else {
        use_.inputs[input].tensors_written = true;
      }
    }
  }
  void WriteTensor(const Value* value) {
    for (const size_t input : origins_[value].self) use_.inputs[input].tensors_written = true;
  }
  void WriteContainer(const Value* value) {
    for (const size_t input : origins_[value].self) use_.inputs[input].containers_written = true;
  }
  void WriteContents(const Value* value) {
    for (const size_t input : origins_[value].content) use_.inputs[input].tensors_written = true;
  }

  Graph& graph_;
  GraphUse use_;
  std::unordered_map<const Value*, Origin> origins_;
  InputSet stored_;
  bool changed_ = false;
};

}  // namespace

GraphUse AnalyseGraph(const std::shared_ptr<Graph>& graph) { return Follower(*graph).Run(); }

}  // namespace torchcall
