// What the calls of one model did, over all its plans.

#ifndef TORCHCALL_XLA_COUNTERS_H_
#define TORCHCALL_XLA_COUNTERS_H_

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>

namespace torchcall {

class CallCounters {
 public:
  std::atomic<int64_t> calls{0};
  std::atomic<int64_t> bytes_copied{0};
  std::atomic<int64_t> graph_captures{0};
  std::atomic<int64_t> graph_replays{0};
  std::atomic<bool> on_cpu{false};        // whether there was a call on the CPU
  std::atomic<uint64_t> cuda_devices{0};  // bit i: there was one on CUDA device i
  // Raised when code or weights are replaced: what was captured before is stale.
  std::atomic<int64_t> generation{0};

  // Why calls are not replays of a CUDA graph; the first reason stays.
  void NoteFallback(const std::string& reason) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (fallback_.empty()) fallback_ = reason;
  }
  // One plan more, or one less, whose graph was let go of.
  void NoteEvicted(int plans) { evicted_.fetch_add(plans); }
  std::string fallback() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!fallback_.empty() || evicted_.load() == 0) return fallback_;
    return "a CUDA graph was let go of, for there were too many of them; its calls run without "
           "until another lies idle";
  }

 private:
  mutable std::mutex mutex_;
  std::string fallback_;
  std::atomic<int> evicted_{0};
};

}  // namespace torchcall

#endif  // TORCHCALL_XLA_COUNTERS_H_
