// A call plan as the handler runs it, and the registry through which an XLA executable finds it.

#ifndef TORCHCALL_XLA_CALL_PLAN_H_
#define TORCHCALL_XLA_CALL_PLAN_H_

#include <cstdint>
#include <memory>
#include <shared_mutex>
#include <string>
#include <unordered_map>
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

// Plans by the integer that stands in the compiled program. The integer is a hash of what the plan
// does, moved on where a live plan has it already, so that a program compiles to the same text in
// every process. An executable takes its share of the plan when it is instantiated.
class PlanRegistry {
 public:
  static PlanRegistry& Get();

  int64_t Add(int64_t wanted, std::shared_ptr<CallPlan> plan);
  void Remove(int64_t id);
  std::shared_ptr<CallPlan> Find(int64_t id) const;
  size_t size() const;

 private:
  mutable std::shared_mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<CallPlan>> plans_;
};

}  // namespace torchcall

#endif  // TORCHCALL_XLA_CALL_PLAN_H_
