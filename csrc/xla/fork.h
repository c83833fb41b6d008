// Whether this process is a fork of the one that loaded the library. torch's thread pools and CUDA
// contexts do not survive a fork: calls are refused, and device memory is left to the parent.

#ifndef TORCHCALL_XLA_FORK_H_
#define TORCHCALL_XLA_FORK_H_

#include <pthread.h>

#include <atomic>

namespace torchcall {

inline std::atomic<bool> forked{false};
inline const int fork_hook = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

inline bool IsForked() { return forked.load(std::memory_order_relaxed); }

}  // namespace torchcall

#endif  // TORCHCALL_XLA_FORK_H_
