// A call plan as the handler runs it, and the registry through which an XLA executable finds it.

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
#include "torch_half.h"
#include "xla/ffi/api/ffi.h"

namespace torchcall {

struct ArraySpec {
  const DtypeEntry* dtype;
  const DtypeEntry* cast;  // nullptr: none
  std::vector<int64_t> shape;
  std::string name;
  TcNarrowing narrowing;
  bool copied;  // the model gets a private copy

  size_t Bytes(const DtypeEntry& as) const;
};

class CallPlan {
 public:
  // What the torch half needs besides the operands and outputs; read at once.
  struct Structure {
    std::vector<TcLength> lengths;
    std::vector<TcNode> arguments;
    std::vector<TcNode> results;
    bool selects_outputs;
    std::vector<TcIndexCheck> index_checks;
    TcCallable callable;  // taken over
    GraphMode graph_mode;
    std::string graph_refusal;  // see PlanCalls
  };

  // Throws std::invalid_argument with torch's words.
  CallPlan(std::string model_name, TcModel* model, std::shared_ptr<CallCounters> counters,
           std::vector<ArraySpec> inputs, std::vector<ArraySpec> outputs,
           const Structure& structure);

  // Thread-safe; needs no GIL. On a CUDA device it enqueues on the stream.
  xla::ffi::Error Run(xla::ffi::RemainingArgs operands, xla::ffi::RemainingRets results,
                      TcPlace place);
  // The same over buffers whose shapes and dtypes the caller answers for. Throws what went wrong.
  void RunOn(void* const* inputs, void* const* outputs, TcPlace place);

  // Digest of the model's code and weights as they are now; see CallCounters.
  std::string content() const { return counters_->content(); }

 private:
  // The model itself. Throws what went wrong; returns what an observed call tells.
  std::string RunPlainly(void* const* inputs, void* const* outputs, TcPlace place) const;

  std::string model_name_;
  std::shared_ptr<CallCounters> counters_;
  std::vector<ArraySpec> inputs_;
  std::vector<ArraySpec> outputs_;
  std::vector<DLTensor> input_tensors_;  // templates: all but the data pointer
  std::vector<DLTensor> output_tensors_;
  int64_t bytes_copied_per_call_ = 0;
  PlanHandle plan_;
  std::unique_ptr<CudaCalls> cuda_calls_;  // after the plan: its graphs go first
};

// Plans by the two integers that stand in a compiled program: `id`, a hash of what the plan does,
// and `ordinal`, which tells registered plans of equal ids apart. Both are the same in every
// process that registers the same plans in the same order, so that a program compiles to the same
// text there.
//
// Where weights have a digest, it is part of the id. Plans of equal ids then compute the same, and
// a program from another process may use any of them. Over live weights only the exact plan serves;
// such programs never leave their process. An executable takes its share of the plan when it is
// instantiated.
class PlanRegistry {
 public:
  static PlanRegistry& Get();

  // Returns the plan's ordinal.
  int64_t Add(int64_t id, std::shared_ptr<CallPlan> plan);
  void Remove(int64_t id, int64_t ordinal);
  // Throws std::invalid_argument where there is no such plan, or its model has other weights now.
  std::shared_ptr<CallPlan> Find(int64_t id, int64_t ordinal) const;

 private:
  struct Entry {
    std::shared_ptr<CallPlan> plan;
    std::string content;  // of the model when the plan was registered
  };

  mutable std::shared_mutex mutex_;
  std::map<std::pair<int64_t, int64_t>, Entry> plans_;
};

}  // namespace torchcall

#endif  // TORCHCALL_XLA_CALL_PLAN_H_
