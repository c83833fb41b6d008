// Pytrees on the torch side: the arguments that a plan builds for a model, and the structure that
// the model's result must have.

#ifndef TORCHCALL_TORCH_TREE_H_
#define TORCHCALL_TORCH_TREE_H_

#include <ATen/core/function_schema.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/jit_type.h>

#include <string>
#include <vector>

#include "../engine.h"

namespace torchcall {

struct Tree {
  TcNodeKind kind = TC_NONE;
  int64_t integer = 0;  // of TC_TENSOR: which operand or output
  c10::IValue scalar;   // of TC_INT … TC_STRING
  // Of a container. A dict's keys stand beside its children.
  std::vector<Tree> children;
  std::vector<c10::IValue> keys;
};

// Parses `count` nodes in preorder into one tree.
Tree ParseTree(const TcNode* nodes, int64_t count);

// The position of every operand below `tree`.
void CollectTensors(const Tree& tree, std::vector<int64_t>& positions);

// Builds the model's arguments, one per schema argument after `self`, from a tree that holds a
// tuple (positional) and a dict (keywords). Containers that were made are appended to `containers`.
// Throws std::invalid_argument naming the argument where the schema wants something else.
class ArgumentBuilder {
 public:
  ArgumentBuilder(const Tree& call, const c10::FunctionSchema& schema, bool is_method);

  std::vector<c10::IValue> Build(const std::vector<at::Tensor>& tensors,
                                 std::vector<c10::IValue>& containers) const;
  // Per operand: the index of the schema argument that it is part of.
  const std::vector<size_t>& argument_of_operand() const { return argument_of_operand_; }

 private:
  struct Slot {
    const Tree* tree;  // nullptr: the default below
    c10::IValue default_value;
    c10::TypePtr type;
    std::string path;
  };
  std::vector<Slot> slots_;
  std::vector<size_t> argument_of_operand_;
};

// Walks a model's result along `tree` and stores a pointer to each tensor at its output position.
// Throws std::invalid_argument naming the place where the structure differs; a dict may hold keys
// that the tree lacks where `selects`.
void FlattenResult(const c10::IValue& result, const Tree& tree, bool selects,
                   std::vector<const at::Tensor*>& outputs);

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_TREE_H_
