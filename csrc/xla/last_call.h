// The last call of a plan, to answer an equal one in the same execution of a program.

#ifndef TORCHCALL_XLA_LAST_CALL_H_
#define TORCHCALL_XLA_LAST_CALL_H_

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace torchcall {

// XLA merges equal calls of one program, but not those of two iterations of a loop. Buffers are on
// the host.
class LastCall {
 public:
  LastCall(std::vector<size_t> operand_bytes, std::vector<size_t> result_bytes);

  // Fills the results if the last call of this execution had the same operands, bit for bit.
  bool Recall(int64_t run_id, void* const* operands, void* const* results);
  void Remember(int64_t run_id, void* const* operands, void* const* results);

 private:
  static constexpr int64_t kNone = INT64_MIN;

  const std::vector<size_t> operand_bytes_;
  const std::vector<size_t> result_bytes_;
  std::mutex mutex_;  // never waited for: a call that finds it locked runs the model
  int64_t run_id_ = kNone;
  std::vector<std::vector<char>> operands_;
  std::vector<std::vector<char>> results_;
};

}  // namespace torchcall

#endif  // TORCHCALL_XLA_LAST_CALL_H_
