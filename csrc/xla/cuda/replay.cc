#include "replay.h"

#include "../fork.h"

namespace torchcall {
namespace {

constexpr unsigned int kDisableTiming = 2;  // CU_EVENT_DISABLE_TIMING
// CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH, as in torch: with cudaMallocAsync, memory left
// allocated by the capture would forbid a second launch.
constexpr unsigned long long kAutoFree = 1;

std::atomic<uint64_t> launches{0};

CudaAddress AddressOf(void* data) {
  return static_cast<CudaAddress>(reinterpret_cast<uintptr_t>(data));
}

}  // namespace

Replay::Replay(const CudaDriver& driver, CudaStream stream, CudaGraph graph,
               std::vector<StaticBuffer> inputs, std::vector<StaticBuffer> outputs,
               std::function<void()> release)
    : driver_(driver),
      inputs_(std::move(inputs)),
      outputs_(std::move(outputs)),
      release_(std::move(release)),
      last_used_(launches.load(std::memory_order_relaxed)) {
  try {
    context_ = ContextOf(driver_, stream);
    const CudaContextScope scope(driver_, context_);
    driver_.Check(driver_.event_create(&event_, kDisableTiming), "creating an event");
    driver_.Check(driver_.graph_instantiate(&exec_, graph, kAutoFree),
                  "instantiating the CUDA graph");
  } catch (...) {
    Release();
    throw;
  }
}

Replay::~Replay() { Release(); }

// Also runs at process exit, when the driver may be gone: errors are ignored. In a forked child,
// graph and weights belong to the parent.
void Replay::Release() noexcept {
  if (IsForked()) return;
  const bool pushed = context_ != nullptr && driver_.context_push(context_) == 0;
  if (recorded_) driver_.event_synchronize(event_);
  if (exec_ != nullptr) driver_.graph_exec_destroy(exec_);
  if (event_ != nullptr) driver_.event_destroy(event_);
  if (release_) release_();
  CudaContext popped = nullptr;
  if (pushed) driver_.context_pop(&popped);
}

uint64_t Replay::Launches() { return launches.load(std::memory_order_relaxed); }

void Replay::Launch(void* const* inputs, void* const* outputs, CudaStream stream) {
  last_used_.store(launches.fetch_add(1, std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  const std::lock_guard<std::mutex> lock(mutex_);
  const CudaContextScope scope(driver_, context_);
  if (recorded_ && stream != last_stream_) {
    driver_.Check(driver_.stream_wait_event(stream, event_, 0), "waiting for the last replay");
  }
  // Records the event after a failure too: enqueued work must finish before the buffers are freed.
  struct Recorder {
    Replay* replay;
    CudaStream stream;
    bool done = false;
    CudaResult Record() {
      done = true;
      const CudaResult result = replay->driver_.event_record(replay->event_, stream);
      replay->recorded_ = replay->recorded_ || result == 0;
      replay->last_stream_ = stream;
      return result;
    }
    ~Recorder() {
      if (!done) Record();
    }
  } recorder{this, stream};
  Enqueue(inputs, outputs, stream);
  driver_.Check(recorder.Record(), "marking the end of a replay");
}

void Replay::Enqueue(void* const* inputs, void* const* outputs, CudaStream stream) {
  for (size_t i = 0; i < inputs_.size(); ++i) {
    if (inputs_[i].bytes == 0) continue;
    driver_.Check(
        driver_.copy_on_device(inputs_[i].address, AddressOf(inputs[i]), inputs_[i].bytes, stream),
        "copying an input");
  }
  driver_.Check(driver_.graph_launch(exec_, stream), "launching the CUDA graph");
  for (size_t i = 0; i < outputs_.size(); ++i) {
    if (outputs_[i].bytes == 0) continue;
    driver_.Check(driver_.copy_on_device(AddressOf(outputs[i]), outputs_[i].address,
                                         outputs_[i].bytes, stream),
                  "copying an output");
  }
}

}  // namespace torchcall
