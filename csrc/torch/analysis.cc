#include "analysis.h"

#include <torch/csrc/jit/ir/alias_analysis.h>

#include <string_view>

namespace torchcall {
namespace {

using torch::jit::AliasDb;
using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

template <typename Visitor>
void ForEachNode(Block* block, const Visitor& visit) {
  for (auto it = block->nodes().begin(); it != block->nodes().end();) {
    Node* node = *it++;  // the visitor may destroy the node
    for (Block* inner : node->blocks()) ForEachNode(inner, visit);
    visit(node);
  }
}

// `x.requires_grad_()` is a write to the alias analysis, but only sets a flag on the tensor that
// the call owns. Nearly every force model does it, so it must not cost a copy of every input.
std::shared_ptr<Graph> WithoutRequiresGrad(const std::shared_ptr<Graph>& graph) {
  std::shared_ptr<Graph> copy = graph->copy();
  static const auto kRequiresGrad = c10::Symbol::fromQualString("aten::requires_grad_");
  ForEachNode(copy->block(), [](Node* node) {
    if (node->kind() != kRequiresGrad) return;
    node->output()->replaceAllUsesWith(node->input(0));
    node->destroy();
  });
  return copy;
}

bool IsContainer(const Value* value) {
  const auto kind = value->type()->kind();
  return kind == c10::TypeKind::ListType || kind == c10::TypeKind::DictType;
}

bool Differentiates(std::string_view op) {
  return op == "aten::grad" || op == "aten::backward" || op == "aten::_backward";
}

}  // namespace

GraphUse AnalyseGraph(const std::shared_ptr<Graph>& original) {
  const std::shared_ptr<Graph> graph = WithoutRequiresGrad(original);
  const AliasDb aliases(graph);
  GraphUse use;
  use.inputs.resize(graph->inputs().size());

  std::vector<Value*> written;
  const auto note_if_written = [&](Value* value) {
    if (aliases.hasWriters(value)) written.push_back(value);
  };
  for (Value* input : graph->inputs()) note_if_written(input);
  ForEachNode(graph->block(), [&](Node* node) {
    const std::string_view op = node->kind().toQualString();
    use.differentiates = use.differentiates || Differentiates(op);
    use.keeps_state = use.keeps_state || node->kind() == torch::jit::prim::SetAttr;
    use.draws_random_numbers = use.draws_random_numbers || node->isNondeterministic();
    for (Value* output : node->outputs()) note_if_written(output);
  });

  for (size_t i = 0; i < graph->inputs().size(); ++i) {
    Value* input = graph->inputs()[i];
    for (Value* value : written) {
      if (value != input && !aliases.mayContainAlias(input, value)) continue;
      // A scalar or tensor inside a container counts as the container's content.
      if (IsContainer(value)) {
        use.inputs[i].containers_written = true;
      } else {
        use.inputs[i].tensors_written = true;
      }
    }
    const bool is_self = input->type()->kind() == c10::TypeKind::ClassType;
    // Anything reachable from `self` that is written outlives the call.
    if (is_self && (use.inputs[i].containers_written || use.inputs[i].tensors_written)) {
      use.keeps_state = true;
    }
  }
  return use;
}

}  // namespace torchcall
