// The call log of both simulations: one line per call, in order, thread-safe.

#ifndef TORCHCALL_STANDIN_RECORD_H_
#define TORCHCALL_STANDIN_RECORD_H_

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <mutex>
#include <string>

#define STANDIN_EXPORT extern "C" __attribute__((visibility("default")))

namespace standin {

class Record {
 public:
  // Appends "nanoseconds\tthread\tline". All libraries use the same clock, so logs can be merged.
  void Add(const std::string& line) {
    const std::lock_guard lock(mutex_);
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    text_ += std::to_string(std::chrono::nanoseconds(now).count()) + '\t' +
             std::to_string(syscall(SYS_gettid)) + '\t' + line + '\n';
  }
  // Copies up to `size` bytes and returns the size of the whole log.
  size_t Copy(char* to, size_t size) const {
    const std::lock_guard lock(mutex_);
    if (to != nullptr) std::memcpy(to, text_.data(), std::min(size, text_.size()));
    return text_.size();
  }
  void Clear() {
    const std::lock_guard lock(mutex_);
    text_.clear();
  }

 private:
  mutable std::mutex mutex_;
  std::string text_;
};

}  // namespace standin

#endif  // TORCHCALL_STANDIN_RECORD_H_
