// Trees as TorchScript values: builds a model's arguments, and takes its result apart.

#ifndef TORCHCALL_TORCH_SCRIPT_VALUES_H_
#define TORCHCALL_TORCH_SCRIPT_VALUES_H_

#include <ATen/core/function_schema.h>
#include <ATen/core/ivalue.h>

#include <string>
#include <vector>

#include "../tree.h"

namespace torchcall {

// Builds one value per schema argument (without `self`). `call` is a tuple of positional arguments
// and a dict of keyword arguments, and must outlive the builder. Throws std::invalid_argument,
// naming the argument, if the schema expects something else.
class ArgumentBuilder {
 public:
  ArgumentBuilder(const Tree& call, const c10::FunctionSchema& schema, bool is_method);

  // Appends every list, tuple and dict that it makes to `containers`.
  std::vector<c10::IValue> Build(const std::vector<at::Tensor>& tensors,
                                 std::vector<c10::IValue>& containers) const;
  // Per input: the index of the schema argument that contains it.
  const std::vector<size_t>& argument_of_input() const { return argument_of_input_; }

 private:
  struct Slot {
    const Tree* tree;  // nullptr: use the default
    c10::IValue default_value;
    c10::TypePtr type;
    std::string path;
  };
  std::vector<Slot> slots_;
  std::vector<size_t> argument_of_input_;
};

// Stores a pointer to each tensor of `result` at its output index in `tree`. Throws
// std::invalid_argument, naming the path, if the structures differ. With `selects`, dicts in
// `result` may have keys that `tree` lacks.
void FlattenResult(const c10::IValue& result, const Tree& tree, bool selects,
                   std::vector<const at::Tensor*>& outputs);

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_SCRIPT_VALUES_H_
