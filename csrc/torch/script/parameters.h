// Calls of a TorchScript module that get its parameters as inputs.

#ifndef TORCHCALL_TORCH_SCRIPT_PARAMETERS_H_
#define TORCHCALL_TORCH_SCRIPT_PARAMETERS_H_

#include <ATen/core/Tensor.h>
#include <torch/csrc/jit/api/module.h>

#include <string>
#include <vector>

#include "../../engine.h"

namespace torchcall {

// A copy of a module object whose parameters are inputs of a call, also where other attributes and
// lists refer to them. Its code and its other tensors are the module's, unless it owns its state.
class BoundModule {
 public:
  const torch::jit::ObjectPtr& object() const { return object_; }
  // Throws std::invalid_argument, naming the buffer, if a call changed one.
  void CheckBuffers() const;

 private:
  friend class ModuleBinder;
  struct Buffer {
    std::string name;
    torch::jit::ObjectPtr owner;
    size_t slot;
    at::Tensor tensor;
    at::Tensor before;  // of equal values
    uint32_t version;
  };
  torch::jit::ObjectPtr object_;
  std::vector<Buffer> buffers_;  // of a module that owns its state
};

// Which inputs of a plan are parameters, and the slots that hold them. Immutable.
class ParameterSlots {
 public:
  // Throws std::invalid_argument if the module has no such parameter.
  ParameterSlots(const TcPlanSpec& spec, const torch::jit::Module* module);

  bool empty() const { return slots_.empty(); }
  size_t num_inputs() const { return num_inputs_; }
  // `owns_state`: copies everything that the module's code may change.
  BoundModule Bind(const torch::jit::Module& module, const std::vector<at::Tensor>& inputs,
                   bool owns_state) const;

 private:
  struct Slot {
    int64_t input;
    std::vector<size_t> path;  // slots of submodules, then the parameter's own
  };
  std::vector<Slot> slots_;
  size_t num_inputs_ = 0;
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_SCRIPT_PARAMETERS_H_
