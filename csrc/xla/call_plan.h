// A plan as the handler runs it, and the registry in which an XLA executable finds it.

#ifndef TORCHCALL_XLA_CALL_PLAN_H_
#define TORCHCALL_XLA_CALL_PLAN_H_

#include <cstdint>
#include <map>
#include <memory>
#include <shared_mutex>
#include <string>
#include <utility>
#include <vector>

#include "counters.h"
#include "cuda/calls.h"
#include "dtype.h"
#include "last_call.h"
#include "torch_half.h"
#include "xla/ffi/api/ffi.h"

namespace torchcall {

struct ArraySpec {
  const DtypeEntry* dtype;
  const DtypeEntry* cast;  // nullptr: none
  std::vector<int64_t> shape;
  std::string name;
  TcNarrowing narrowing;
  bool copied;                       // the model gets a private copy
  std::vector<int64_t> buffer = {};  // XLA's shape: the sizes of its loops, then `shape`

  size_t Bytes(const DtypeEntry& as) const;
};

// The calls of a mapped axis: its size, and per operand whether it has this axis.
using BatchLoop = std::pair<int64_t, std::vector<bool>>;

// Whether calls on a CUDA device may replay a graph, and the reason if not.
struct GraphOption {
  GraphMode mode;
  std::string refusal;  // see PlanCalls
};

class NativePlan {
 public:
  // Completes `spec`, which lacks the arrays, and takes over its eager code. Throws
  // std::invalid_argument with torch's message.
  NativePlan(std::string model_name, TcModel* model, std::shared_ptr<CallCounters> counters,
             std::vector<ArraySpec> operands, std::vector<ArraySpec> results, TcPlanSpec spec,
             const std::vector<BatchLoop>& loops, GraphOption graph, bool reuses_last);

  // Thread-safe; needs no GIL. On a CUDA device it enqueues on the stream. `run_id` is that of the
  // program's execution, on a CPU.
  xla::ffi::Error Run(xla::ffi::RemainingArgs operands, xla::ffi::RemainingRets results,
                      TcPlace place, int64_t run_id);
  // The same on buffers whose shapes and dtypes the caller guarantees. Calls the model once per
  // element of the mapped axes. Throws on failure.
  void RunOn(void* const* operands, void* const* results, TcPlace place, int64_t run_id);

  // Torch's threads in later calls; see TcEngineApi.
  void SetThreads(int threads) { TorchHalf().plan_set_threads(plan_.get(), threads); }

  const std::string& model_name() const { return model_name_; }
  // Digest of the model's code and weights as they are now; see CallCounters.
  std::string content() const { return counters_->content(); }
  // See CallCounters.
  int64_t replacements() const { return counters_->replacements.load(); }

 private:
  struct Loop {
    int64_t size;
    std::vector<int64_t> operand_steps;  // bytes from one element to the next, 0: not mapped
    std::vector<int64_t> result_steps;
  };
  // Moves all buffers by `elements` of the loop.
  static void Move(const Loop& loop, int64_t elements, void** operands, void** results);
  // The loops from `level` on.
  void RunLoops(size_t level, void** operands, void** results, TcPlace place, int64_t run_id);
  void CallOnce(void* const* operands, void* const* results, TcPlace place, int64_t run_id);
  // Runs the model. Throws on failure. Returns why an observed call cannot be captured, or "".
  std::string RunPlainly(void* const* operands, void* const* results, TcPlace place) const;

  std::string model_name_;
  std::shared_ptr<CallCounters> counters_;
  std::vector<ArraySpec> operands_;
  std::vector<ArraySpec> results_;
  std::vector<Loop> loops_;                // outermost first
  std::vector<DLTensor> operand_tensors_;  // templates: all but the data pointer
  std::vector<DLTensor> result_tensors_;
  int64_t bytes_copied_per_call_ = 0;
  PlanHandle plan_;
  std::unique_ptr<LastCall> last_call_;    // if calls on a CPU may reuse the last results
  std::unique_ptr<CudaCalls> cuda_calls_;  // after the plan: its graphs go first
};

// `Run` with every exception as an error.
xla::ffi::Error Execute(NativePlan& plan, xla::ffi::RemainingArgs operands,
                        xla::ffi::RemainingRets results, TcPlace place, int64_t run_id);

// Plans by the two integers that a compiled program contains: `id`, a hash of what the plan does,
// and `ordinal`, which distinguishes registered plans of equal ids. Both are the same in every
// process that registers the same plans in the same order, so that a program compiles to the same
// text there.
//
// If the weights have a digest, it is part of the id. Plans of equal ids then compute the same, and
// a program from another process may use any of them. With live weights a program needs the exact
// plan, and cannot be serialised. An executable shares ownership of the plan once instantiated.
class PlanRegistry {
 public:
  static PlanRegistry& Get();

  // Returns the plan's ordinal.
  int64_t Add(int64_t id, std::shared_ptr<NativePlan> plan);
  void Remove(int64_t id, int64_t ordinal);
  // Throws std::invalid_argument where there is no such plan, or its model has other weights now.
  std::shared_ptr<NativePlan> Find(int64_t id, int64_t ordinal) const;

 private:
  struct Entry {
    std::shared_ptr<NativePlan> plan;
    std::string content;  // of the model when the plan was registered; empty: unknown
  };

  mutable std::shared_mutex mutex_;
  std::map<std::pair<int64_t, int64_t>, Entry> plans_;
};

}  // namespace torchcall

#endif  // TORCHCALL_XLA_CALL_PLAN_H_
