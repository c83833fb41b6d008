// The calls of one plan on CUDA devices: the first one plainly, then replays of a CUDA graph where
// the model can be captured. Not yet run on a GPU.

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

// What a plan is to its calls.
struct PlanCalls {
  std::string name;  // the model's
  GraphMode mode;
  std::string refusal;  // why the model cannot be captured, as far as is known without trying
  std::vector<size_t> input_bytes;
  std::vector<size_t> output_bytes;
  std::shared_ptr<CallCounters> counters;
  // Enqueues the model itself. Throws what went wrong, without the model's name; returns why calls
  // cannot be captured, where it was to be observed and anything tells.
  std::function<std::string(void* const* inputs, void* const* outputs, TcPlace place)> run;
  // A share of what the model computes with on a device; it is let go of by the function returned.
  std::function<std::function<void()>(DLDevice device)> hold;
};

// A call that is being captured, as whoever captures it sees it.
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
  // Makes the call, as if nothing were captured. Returns why calls like it cannot be, or nothing.
  std::string Call();
  bool called() const { return called_; }
  // What Call threw.
  std::exception_ptr failure() const { return failure_; }
  // Ctrl-C came. Nobody in here has a use for it: it is passed on when the recording ends.
  void Interrupt() { interrupted_ = true; }
  // A stream on the device that is nobody else's, the same for all captures there.
  CudaStream OwnStream() const;
  // Copies the call's inputs into other buffers on the same device, and waits for them.
  void CopyInputs(const std::vector<CudaAddress>& to) const;
  // Enqueues the model itself on a stream.
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
    kRefused,      // calls like this one cannot be captured
    kVoid,         // perhaps not by the model's doing: another attempt may do better
    kInterrupted,  // this attempt was given up
  };
  Kind kind;
  std::string reason;
};

struct Captured {
  std::optional<NoCapture> failure;
  CudaGraph graph = nullptr;
  std::vector<CudaAddress> inputs;
  std::vector<CudaAddress> outputs;
  std::function<void()> owner;  // lets go of the graph and its buffers
};

// torch's tools for capture are Python's.
struct GraphTools {
  std::function<Captured(Recording&)> capture;
  // Tells the user that calls of a model are not replays.
  std::function<void(const std::string& model, const std::string& reason)> warn;
  // Interrupts the program once it is back in the user's code.
  std::function<void()> interrupt;
};
void SetGraphTools(GraphTools tools);
// Graphs that may be there at once; the one whose last launch is longest ago goes first.
void SetMostGraphs(size_t most);

// First calls, which move weights and wait, and captures, during which nobody else may wait for the
// device: one at a time in the process. So are models made and refreshed. Taken without the GIL,
// and before it.
std::recursive_mutex& OneAtATime();

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
    std::atomic<int64_t> generation{0};   // of the weights that the replay, or a plain call, has
    std::atomic<int64_t> plain_calls{0};  // until an attempt at a capture; 0: none is to be made
    std::atomic<int> void_captures{0};    // in a row
    std::atomic<bool> is_evicted{false};  // its graph made room for another
    std::atomic<uint64_t> looked{0};      // for a graph that lies idle: when, in launches of all
    std::string failure;                  // set before `next` becomes kRefused

    // Counts a plain call. Whether it is time for an attempt instead.
    bool IsDue() {
      return plain_calls.load(std::memory_order_relaxed) > 0 &&
             plain_calls.fetch_sub(1, std::memory_order_relaxed) == 1;
    }
  };

  bool TryReplay(Device& device, void* const* inputs, void* const* outputs, CudaStream stream);
  // Must not be called with a lock held that a thread with the GIL may wait for.
  void FallBack(Device& device, const std::string& reason);
  void Refuse(Device& device, const std::string& reason);
  // Of a plain call that is due: whether it is to attempt a capture.
  static bool PrepareRetry(Device& device);
  // Makes the call, and its graph for later ones, or a refusal, or a later attempt. Throws what the
  // call throws.
  void CaptureOnce(Device& device, Recording& recording, CudaStream stream);
  // Throws NoCapture, CudaError or what the torch half says.
  std::shared_ptr<Replay> Capture(Recording& recording, CudaStream stream) const;
  void Fail(Device& device, const NoCapture& failure);

  const PlanCalls plan_;
  std::array<std::atomic<Device*>, 32> devices_{};
};

}  // namespace torchcall

#endif  // TORCHCALL_XLA_CUDA_CALLS_H_
