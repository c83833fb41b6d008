// Captures and replays of what torch enqueues on a stream: CUDA graphs as far as operators go.
//
// A graph has no share in a tensor. It runs the operators again over the same addresses, and writes
// what they return to where it was at first.

#ifndef TORCHCALL_STANDIN_TORCH_GRAPH_H_
#define TORCHCALL_STANDIN_TORCH_GRAPH_H_

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "torch_crossing.h"
#include "torch_memory.h"
#include "torch_streams.h"

namespace standin {

struct Graph : Capture {
  struct Step {
    c10::OperatorHandle op;
    std::vector<c10::IValue> arguments;  // as the CPU sees them
    std::vector<c10::IValue> results;
  };

  c10::DeviceIndex device;
  std::mutex mutex;  // of the steps: backward passes are captured from their own threads
  std::vector<Step> steps;

  void Replay() noexcept {
    const c10::impl::ForceDispatchKeyGuard defaults(c10::default_included_set,
                                                    c10::default_excluded_set);
    const at::AutoDispatchBelowADInplaceOrView below;
    const OnDevice on_device(device);
    for (const Step& step : steps) {
      const std::string name = c10::toString(step.op.operator_name());
      try {
        Note("replay", name, device);
        Run(step);
      } catch (const std::exception&) {
        Note("error", name, device);
      }
    }
  }

 private:
  static void Run(const Step& step) {
    torch::jit::Stack stack = step.arguments;
    step.op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
    for (size_t i = 0; i < step.results.size(); ++i) Write(stack[i], step.results[i]);
  }

  static void Write(const c10::IValue& value, const c10::IValue& to) {
    if (value.isTensor()) Write(value.toTensor(), to.toTensor());
    if (!value.isTensorList()) return;
    const auto tensors = value.toTensorVector();
    const auto places = to.toTensorVector();
    for (size_t i = 0; i < tensors.size(); ++i) Write(tensors[i], places[i]);
  }
  static void Write(const at::Tensor& tensor, const at::Tensor& to) {
    if (tensor.defined() && tensor.data_ptr() != to.data_ptr()) to.copy_(tensor);
  }
};

inline Graph* BeginCapture(c10::DeviceIndex device, c10::StreamId stream) {
  auto* graph = new Graph;
  graph->device = device;
  graph->pool = std::make_shared<Pool>();
  const std::lock_guard lock(C().mutex);
  C().by_stream[{device, stream}] = graph;
  return graph;
}

inline int64_t EndCapture(Graph* graph) {
  const std::lock_guard lock(C().mutex);
  std::erase_if(C().by_stream, [&](const auto& entry) { return entry.second == graph; });
  return graph->is_void ? -1 : static_cast<int64_t>(graph->steps.size());
}

// Of an operator that has run on the current device and stream, where these are captured.
inline void CaptureStep(const c10::OperatorHandle& op, const std::vector<c10::IValue>& arguments,
                        const std::vector<c10::IValue>& results) {
  auto* graph = static_cast<Graph*>(CaptureOn(this_device, this_threads_streams[this_device]));
  if (graph == nullptr) return;
  Crossing crossing(Beside::kAnything);
  Graph::Step step{op, {}, {}};
  for (const c10::IValue& value : arguments) step.arguments.push_back(crossing.ToCpu(value));
  for (const c10::IValue& value : results) step.results.push_back(crossing.ToCpu(value));
  const std::lock_guard lock(graph->mutex);
  graph->steps.push_back(std::move(step));
}

}  // namespace standin

#endif  // TORCHCALL_STANDIN_TORCH_GRAPH_H_
