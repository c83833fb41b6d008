// Loops over the threads of a pool.

#ifndef TORCHCALL_XLA_NEIGHBORS_PARALLEL_H_
#define TORCHCALL_XLA_NEIGHBORS_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

namespace torchcall {

struct Threads {
  int64_t count = 1;
  // Hands a function to another thread, which calls it at some time or never.
  std::function<void(std::function<void()>)> schedule;
};

// Calls task(0) … task(n − 1) on this thread and on those that come to help. Returns when all are
// done, without waiting for a thread that has not begun: the pool may be busy with this very call.
// Rethrows an exception of a task.
template <typename Task>
void ForEach(const Threads& threads, int64_t n, const Task& task) {
  struct Shared {
    std::atomic<int64_t> next = 0;
    std::mutex mutex;
    std::condition_variable changed;
    int64_t done = 0;
    std::exception_ptr error;
  };
  if (threads.count <= 1 || n <= 1) {
    for (int64_t i = 0; i < n; ++i) task(i);
    return;
  }
  const auto shared = std::make_shared<Shared>();
  // A thread that comes late finds no task left; then it does not touch `task`, which is gone.
  const auto work = [shared, n, &task] {
    for (int64_t i = shared->next++; i < n; i = shared->next++) {
      std::exception_ptr error;
      try {
        task(i);
      } catch (...) {
        error = std::current_exception();
      }
      const std::lock_guard<std::mutex> lock(shared->mutex);
      if (error) shared->error = error;
      if (++shared->done == n) shared->changed.notify_all();
    }
  };
  for (int64_t t = 1; t < std::min(threads.count, n); ++t) threads.schedule(work);
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->changed.wait(lock, [&] { return shared->done == n; });
  if (shared->error) std::rethrow_exception(shared->error);
}

// Calls task(begin, end) for parts of [0, n) of at most `part` numbers.
template <typename Task>
void ForEachPart(const Threads& threads, int64_t n, int64_t part, const Task& task) {
  ForEach(threads, (n + part - 1) / part,
          [&](int64_t t) { task(t * part, std::min((t + 1) * part, n)); });
}

}  // namespace torchcall

#endif  // TORCHCALL_XLA_NEIGHBORS_PARALLEL_H_
