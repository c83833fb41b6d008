// A pytree that crossed the C ABI: the arguments of a call, or the structure of its results.

#ifndef TORCHCALL_TORCH_TREE_H_
#define TORCHCALL_TORCH_TREE_H_

#include <ATen/core/ivalue.h>

#include <vector>

#include "../engine.h"

namespace torchcall {

struct Tree {
  TcNodeKind kind = TC_NONE;
  int64_t integer = 0;            // TC_TENSOR: index of the input or output
  c10::IValue scalar;             // TC_INT, TC_FLOAT, TC_BOOL, TC_STRING: the value
  std::vector<Tree> children;     // of a container
  std::vector<c10::IValue> keys;  // TC_DICT: the key of each child
};

// Parses `count` nodes in preorder. Throws std::invalid_argument if they are not one tree.
Tree ParseTree(const TcNode* nodes, int64_t count);

// Appends the index of every tensor in `tree` to `indices`, in preorder.
void CollectTensors(const Tree& tree, std::vector<int64_t>& indices);

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_TREE_H_
