// Captures and replays of what torch enqueues on a stream: CUDA graphs as far as operators go.
//
// A graph has no share in a tensor. It runs the operators again over the same addresses, and writes
// what they return to where it was at first.

#ifndef TORCHCALL_STANDIN_TORCH_GRAPH_H_
#define TORCHCALL_STANDIN_TORCH_GRAPH_H_

#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "torch_memory.h"
// After the memory:
#include "torch_step.h"
#include "torch_streams.h"

namespace standin {

struct Graph : Capture {
  c10::DeviceIndex device;
  std::mutex mutex;  // of the steps: backward passes are captured from their own threads
  std::vector<Step> steps;

  void Replay() noexcept {
    const OnDevice on_device(device);
    for (const Step& step : steps) {
      const std::string name = step.name();
      try {
        Note("replay", name, device);
        step.Run();
      } catch (const std::exception&) {
        Note("error", name, device);
      }
    }
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
  Step step(op, arguments, results);
  const std::lock_guard lock(graph->mutex);
  graph->steps.push_back(std::move(step));
}

}  // namespace standin

#endif  // TORCHCALL_STANDIN_TORCH_GRAPH_H_
