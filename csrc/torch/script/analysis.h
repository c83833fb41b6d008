// Side effects of a TorchScript graph: which inputs it may write to, whether it differentiates,
// changes the module or draws random numbers. Computed once, when a model is loaded.

#ifndef TORCHCALL_TORCH_SCRIPT_ANALYSIS_H_
#define TORCHCALL_TORCH_SCRIPT_ANALYSIS_H_

#include <torch/csrc/jit/ir/ir.h>

#include <memory>
#include <vector>

namespace torchcall {

struct InputUse {
  bool tensors_written = false;     // a tensor in this argument may be written in place
  bool containers_written = false;  // a list or dict in this argument may be changed
};

struct GraphUse {
  std::vector<InputUse> inputs;  // per graph input, `self` included
  bool differentiates = false;
  bool changes_state = false;       // writes to something reachable from `self`
  bool updates_statistics = false;  // of a norm, in training mode: running means and variances
  bool draws_random_numbers = false;
};

// Conservative: a write that a schema does not exclude is assumed.
GraphUse AnalyseGraph(const std::shared_ptr<torch::jit::Graph>& graph);

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_SCRIPT_ANALYSIS_H_
