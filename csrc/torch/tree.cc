#include "tree.h"

#include <stdexcept>

namespace torchcall {
namespace {

Tree ParseNode(const TcNode* nodes, int64_t count, int64_t& next) {
  if (next >= count) throw std::invalid_argument("internal: a pytree ends too early");
  const TcNode& node = nodes[next++];
  Tree tree;
  tree.kind = node.kind;
  tree.integer = node.integer;
  switch (node.kind) {
    case TC_TENSOR:
    case TC_NONE:
      break;
    case TC_INT:
      tree.scalar = node.integer;
      break;
    case TC_FLOAT:
      tree.scalar = node.real;
      break;
    case TC_BOOL:
      tree.scalar = node.integer != 0;
      break;
    case TC_STRING:
      tree.scalar = std::string(node.text, node.size);
      break;
    case TC_LIST:
    case TC_TUPLE:
      for (int64_t i = 0; i < node.size; ++i) {
        tree.children.push_back(ParseNode(nodes, count, next));
      }
      break;
    case TC_DICT:
      for (int64_t i = 0; i < node.size; ++i) {
        tree.keys.push_back(ParseNode(nodes, count, next).scalar);
        tree.children.push_back(ParseNode(nodes, count, next));
      }
      break;
    default:
      throw std::invalid_argument("internal: unknown pytree node");
  }
  return tree;
}

}  // namespace

Tree ParseTree(const TcNode* nodes, int64_t count) {
  int64_t next = 0;
  Tree tree = ParseNode(nodes, count, next);
  if (next != count) throw std::invalid_argument("internal: a pytree has more nodes than its root");
  return tree;
}

void CollectTensors(const Tree& tree, std::vector<int64_t>& indices) {
  if (tree.kind == TC_TENSOR) indices.push_back(tree.integer);
  for (const Tree& child : tree.children) CollectTensors(child, indices);
}

}  // namespace torchcall
