// A CUDA graph of one call on one device. Copies the inputs into the graph's buffers, launches it
// and copies the outputs out, all on the caller's stream. No Python, no torch, no synchronisation.
//
// Not yet run on a GPU: tested on simulated devices.

#ifndef TORCHCALL_XLA_CUDA_REPLAY_H_
#define TORCHCALL_XLA_CUDA_REPLAY_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

#include "driver.h"

namespace torchcall {

// Memory that a captured graph reads an input from or writes an output to.
struct StaticBuffer {
  CudaAddress address;
  size_t bytes;
};

class Replay {
 public:
  // Instantiates `graph`, which was captured over the buffers, in the context of `stream`.
  // `release` frees the buffers, the graph and the weights it uses. It is called once: after the
  // last replay has finished, or when this throws CudaError.
  Replay(const CudaDriver& driver, CudaStream stream, CudaGraph graph,
         std::vector<StaticBuffer> inputs, std::vector<StaticBuffer> outputs,
         std::function<void()> release);
  // Waits for the last replay.
  ~Replay();
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;

  // Enqueues one replay on the caller's buffers. Thread-safe: replays on several streams are
  // ordered. Throws CudaError.
  void Launch(void* const* inputs, void* const* outputs, CudaStream stream);

  // The number of launches of all graphs in the process.
  static uint64_t Launches();
  // The value of Launches() at the last launch, or at construction.
  uint64_t last_used() const { return last_used_.load(std::memory_order_relaxed); }

 private:
  void Enqueue(void* const* inputs, void* const* outputs, CudaStream stream);
  void Release() noexcept;

  const CudaDriver& driver_;
  std::vector<StaticBuffer> inputs_;
  std::vector<StaticBuffer> outputs_;
  std::function<void()> release_;
  CudaContext context_ = nullptr;
  CudaGraphExec exec_ = nullptr;
  CudaEvent event_ = nullptr;

  std::mutex mutex_;
  bool recorded_ = false;  // whether the event marks the end of a replay
  CudaStream last_stream_ = nullptr;
  std::atomic<uint64_t> last_used_;
};

}  // namespace torchcall

#endif  // TORCHCALL_XLA_CUDA_REPLAY_H_
