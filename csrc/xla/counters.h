// Counts the calls of one model, over all its plans.

#ifndef TORCHCALL_XLA_COUNTERS_H_
#define TORCHCALL_XLA_COUNTERS_H_

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>

namespace torchcall {

class CallCounters {
 public:
  std::atomic<int64_t> calls{0};
  std::atomic<int64_t> reused{0};  // answered with the results of the call before
  std::atomic<int64_t> bytes_copied{0};
  std::atomic<int64_t> graph_captures{0};
  std::atomic<int64_t> graph_replays{0};
  std::atomic<bool> on_cpu{false};        // whether any call ran on the CPU
  std::atomic<uint64_t> cuda_devices{0};  // bit i: a call ran on CUDA device i
  // Incremented when code or weights are replaced: earlier graphs are stale.
  std::atomic<int64_t> generation{0};
  // Incremented before and after code, weights and digest are replaced: odd meanwhile.
  std::atomic<int64_t> replacements{0};

  // Records why calls run without a CUDA graph. The first reason is retained.
  void NoteFallback(const std::string& reason) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (fallback_.empty()) fallback_ = reason;
  }
  // Adds to the number of plans whose graph is evicted (+1 or -1).
  void NoteEvicted(int plans) { evicted_.fetch_add(plans); }
  // Digest of the model's code and weights; empty over live weights, which may change at any time.
  void set_content(std::string content) {
    const std::lock_guard<std::mutex> lock(mutex_);
    content_ = std::move(content);
  }
  std::string content() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return content_;
  }
  std::string fallback() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!fallback_.empty() || evicted_.load() == 0) return fallback_;
    return "a CUDA graph was evicted because there were too many; its calls run without one until "
           "another graph is idle";
  }

 private:
  mutable std::mutex mutex_;
  std::string fallback_;
  std::string content_;
  std::atomic<int> evicted_{0};
};

}  // namespace torchcall

#endif  // TORCHCALL_XLA_COUNTERS_H_
