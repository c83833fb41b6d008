// A CUDA graph of one call on one device: inputs are copied into its own buffers, the graph is
// launched, outputs are copied out, all on the caller's stream. No Python, no torch, no waiting.
//
// Not yet run on a GPU: tested over played devices.

#ifndef TORCHCALL_XLA_CUDA_REPLAY_H_
#define TORCHCALL_XLA_CUDA_REPLAY_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

#include "driver.h"

namespace torchcall {

// Memory that a captured graph reads its input from, or leaves an output in.
struct StaticBuffer {
  CudaAddress address;
  size_t bytes;
};

class Replay {
 public:
  // Instantiates `graph`, which was captured over the buffers, for the context of `stream`. `owner`
  // lets go of the buffers, the graph and what it computes with; it is called once, after the last
  // replay is through, or when this throws CudaError.
  Replay(const CudaDriver& driver, CudaStream stream, CudaGraph graph,
         std::vector<StaticBuffer> inputs, std::vector<StaticBuffer> outputs,
         std::function<void()> owner);
  // Waits for the last replay.
  ~Replay();
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;

  // Enqueues one replay. Thread-safe: replays on several streams follow each other. `inputs` and
  // `outputs` are the callers' buffers. Throws CudaError.
  void Launch(void* const* inputs, void* const* outputs, CudaStream stream);

  // How often any of them was launched.
  static uint64_t Launches();
  // When it was launched last, or made, in launches of this process.
  uint64_t last_used() const { return last_used_.load(std::memory_order_relaxed); }

 private:
  void Enqueue(void* const* inputs, void* const* outputs, CudaStream stream);
  void Release() noexcept;

  const CudaDriver& driver_;
  std::vector<StaticBuffer> inputs_;
  std::vector<StaticBuffer> outputs_;
  std::function<void()> owner_;
  CudaContext context_ = nullptr;
  CudaGraphExec exec_ = nullptr;
  CudaEvent event_ = nullptr;

  std::mutex mutex_;
  bool recorded_ = false;  // the event, at the end of the last replay
  CudaStream last_stream_ = nullptr;
  std::atomic<uint64_t> last_used_;
};

}  // namespace torchcall

#endif  // TORCHCALL_XLA_CUDA_REPLAY_H_
