// The calls of one plan on CUDA devices. The first call runs the model; the second captures it into
// a CUDA graph, if that is possible; later ones replay the graph. Not yet run on a GPU.

#ifndef TORCHCALL_XLA_CUDA_CALLS_H_
#define TORCHCALL_XLA_CUDA_CALLS_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "../../engine.h"
#include "../counters.h"
#include "driver.h"
#include "replay.h"

namespace torchcall {

enum class GraphMode { kAuto, kOff, kRequire };

// What the calls need from their plan.
struct PlanCalls {
  std::string name;  // of the model
  GraphMode mode;
  std::string refusal;  // why the model cannot be captured, if that is known in advance
  std::vector<size_t> input_bytes;
  std::vector<size_t> output_bytes;
  std::shared_ptr<CallCounters> counters;
  // Enqueues the model. Throws errors without the model's name. With TC_OBSERVE, returns why such
  // calls cannot be captured, or an empty string.
  std::function<std::string(void* const* inputs, void* const* outputs, TcPlace place)> run;
  // Retains the model's replica on a device. The returned function releases it.
  std::function<std::function<void()>(DLDevice device)> hold;
};

// A call during its capture: the interface for the capturing code.
class Recording {
 public:
  Recording(const PlanCalls& plan, int ordinal, CudaStream stream, void* const* inputs,
            void* const* outputs)
      : plan_(plan), ordinal_(ordinal), stream_(stream), inputs_(inputs), outputs_(outputs) {}
  ~Recording();
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

  int ordinal() const { return ordinal_; }
  const PlanCalls& plan() const { return plan_; }
  // Makes the call without capturing it. Returns why such calls cannot be captured, or an empty
  // string.
  std::string Call();
  bool called() const { return called_; }
  // The exception that Call threw.
  std::exception_ptr failure() const { return failure_; }
  // Records a Ctrl-C. The destructor raises it again, in the user's code.
  void Interrupt() { interrupted_ = true; }
  // The device's capture stream, which nothing else uses.
  CudaStream OwnStream() const;
  // Copies the call's inputs to other buffers on the device, and synchronises.
  void CopyInputs(const std::vector<CudaAddress>& to) const;
  // Enqueues the model on a stream.
  void Run(const std::vector<CudaAddress>& inputs, const std::vector<CudaAddress>& outputs,
           CudaStream stream) const;

 private:
  const PlanCalls& plan_;
  int ordinal_;
  CudaStream stream_;
  void* const* inputs_;
  void* const* outputs_;
  bool called_ = false;
  bool interrupted_ = false;
  std::exception_ptr failure_;
};

// Why there is no graph.
struct NoCapture {
  enum class Kind {
    kRefused,      // such calls cannot be captured
    kInvalidated,  // perhaps not caused by the model; worth another attempt
    kInterrupted,  // by KeyboardInterrupt or SystemExit: the call fails
  };
  Kind kind;
  std::string reason;
};

struct Captured {
  std::optional<NoCapture> failure;
  CudaGraph graph = nullptr;
  std::vector<CudaAddress> inputs;
  std::vector<CudaAddress> outputs;
  std::function<void()> release;  // frees the graph and its buffers
};

// Implemented in Python, as torch's capture API is.
struct GraphTools {
  std::function<Captured(Recording&)> capture;
  // Warns the user that calls of a model run without a graph.
  std::function<void(const std::string& model, const std::string& reason)> warn;
  // Raises KeyboardInterrupt once the program is back in the user's code.
  std::function<void()> interrupt;
};
void SetGraphTools(GraphTools tools);
// The number of graphs in the process. Beyond it, the least recently launched one is evicted.
void SetGraphLimit(size_t limit);

// Serialises, in the process: captures, during which no other thread may synchronise with the
// device; first calls, which copy weights and synchronise; loading and refreshing models. Lock
// order: this one before the GIL.
std::recursive_mutex& SetupMutex();

class CudaCalls {
 public:
  explicit CudaCalls(PlanCalls plan) : plan_(std::move(plan)) {}
  ~CudaCalls();
  CudaCalls(const CudaCalls&) = delete;
  CudaCalls& operator=(const CudaCalls&) = delete;

  // Enqueues a call. Thread-safe; must not be called with the GIL held.
  void Run(void* const* inputs, void* const* outputs, int ordinal, CudaStream stream);

 private:
  friend class GraphBudget;
  enum class Next { kFirstCall, kCapture, kPlain, kRefused };
  struct Device {
    std::atomic<Next> next{Next::kFirstCall};
    std::atomic<std::shared_ptr<Replay>> replay;
    std::atomic<int64_t> generation{0};        // of the weights on the device
    std::atomic<int64_t> plain_calls{0};       // until the next capture attempt; 0: no attempt
    std::atomic<int> invalidated_captures{0};  // in a row
    std::atomic<bool> is_evicted{false};       // its graph was evicted for another
    std::atomic<uint64_t> last_room_check{0};  // in launches of all graphs
    std::string failure;                       // set before `next` becomes kRefused

    // Counts a call without a graph. Returns whether a capture is due instead.
    bool IsDue() {
      return plain_calls.load(std::memory_order_relaxed) > 0 &&
             plain_calls.fetch_sub(1, std::memory_order_relaxed) == 1;
    }
  };

  bool TryReplay(Device& device, void* const* inputs, void* const* outputs, CudaStream stream);
  // Takes the GIL: the caller must hold no lock that a thread with the GIL may wait for.
  void FallBack(Device& device, const std::string& reason);
  void Refuse(Device& device, const std::string& reason);
  // Whether a call that is due for a capture may attempt one.
  static bool PrepareRetry(Device& device);
  // Makes the call and tries to capture it. A failed capture leads to a refusal or a later attempt.
  // Throws what the call throws.
  void CaptureOnce(Device& device, Recording& recording, CudaStream stream);
  // Throws NoCapture, CudaError or the torch half's error.
  std::shared_ptr<Replay> Capture(Recording& recording, CudaStream stream) const;
  void Fail(Device& device, const NoCapture& failure);

  const PlanCalls plan_;
  std::array<std::atomic<Device*>, 32> devices_{};
};

}  // namespace torchcall

#endif  // TORCHCALL_XLA_CUDA_CALLS_H_
