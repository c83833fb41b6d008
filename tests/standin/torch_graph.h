// Simulated CUDA graphs: captures the operators that run on a stream and replays them.
//
// A graph retains no tensor. A replay runs the operators on the same addresses.

#ifndef TORCHCALL_STANDIN_TORCH_GRAPH_H_
#define TORCHCALL_STANDIN_TORCH_GRAPH_H_

#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "torch_memory.h"
#include "torch_step.h"
#include "torch_streams.h"

namespace standin {

struct Graph : Capture {
  c10::DeviceIndex device;
  std::mutex mutex;  // of the steps: backward passes are captured from their own threads
  std::vector<Step> steps;

  void Replay() noexcept {
    const DeviceScope scope(device);
    for (const Step& step : steps) {
      const std::string name = step.name();
      try {
        LogEvent("replay", name, device);
        step.Run();
      } catch (const std::exception&) {
        LogEvent("error", name, device);
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
  return graph->is_invalidated ? -1 : static_cast<int64_t>(graph->steps.size());
}

// Adds an operator that has just run to the graph that captures the current stream, if any.
inline void CaptureStep(const c10::OperatorHandle& op, const std::vector<c10::IValue>& arguments,
                        const std::vector<c10::IValue>& results) {
  auto* graph = static_cast<Graph*>(CaptureOn(thread_device, thread_streams[thread_device]));
  if (graph == nullptr) return;
  Step step(op, arguments, results);
  const std::lock_guard lock(graph->mutex);
  graph->steps.push_back(std::move(step));
}

}  // namespace standin

#endif  // TORCHCALL_STANDIN_TORCH_GRAPH_H_
