#include "calls.h"

#include <algorithm>
#include <mutex>
#include <stdexcept>

#include "../fork.h"

namespace torchcall {
namespace {

constexpr unsigned int kNonBlocking = 1;  // CU_STREAM_NON_BLOCKING

// Calls between an invalidated capture and the next attempt. The last attempt waits longer, in case
// the other thread keeps synchronising for a while.
constexpr std::array<int64_t, 2> kCallsUntilRetry = {1, 32};

// A plan whose graph was evicted checks after so many calls whether another graph has been idle
// since, and replaces it. The interval keeps captures a small part of the work.
constexpr int64_t kCallsUntilRoomCheck = 256;

DLDevice Cuda(int ordinal) { return {kDLCUDA, ordinal}; }

std::vector<void*> Pointers(const std::vector<CudaAddress>& addresses) {
  std::vector<void*> pointers;
  for (const CudaAddress address : addresses) {
    pointers.push_back(reinterpret_cast<void*>(static_cast<uintptr_t>(address)));
  }
  return pointers;
}

std::vector<StaticBuffer> Buffers(const std::vector<CudaAddress>& addresses,
                                  const std::vector<size_t>& bytes) {
  std::vector<StaticBuffer> buffers;
  for (size_t i = 0; i < bytes.size(); ++i) buffers.push_back({addresses[i], bytes[i]});
  return buffers;
}

GraphTools& Tools() {
  static auto* tools = new GraphTools;
  return *tools;
}

}  // namespace

std::recursive_mutex& SetupMutex() {
  static auto* mutex = new std::recursive_mutex;
  return *mutex;
}

// The graphs of the process, limited in number.
class GraphBudget {
 public:
  static GraphBudget& Get() {
    static auto* budget = new GraphBudget;
    return *budget;
  }
  void SetLimit(size_t limit) {
    const std::lock_guard<std::mutex> lock(mutex_);
    limit_ = limit;
  }
  void Add(const PlanCalls& plan, CudaCalls::Device* device) {
    std::vector<std::shared_ptr<Replay>> evicted;  // outlives the lock: destruction synchronises
    const std::lock_guard<std::mutex> lock(mutex_);
    // A graph of replaced weights is never launched again, but retains them.
    std::erase_if(entries_, [&](const Entry& entry) {
      if (entry.device->generation.load() == entry.plan->counters->generation.load()) return false;
      evicted.push_back(entry.device->replay.exchange(nullptr));
      return true;
    });
    entries_.push_back({&plan, device});
    while (entries_.size() > limit_) {
      const auto oldest = Oldest();
      evicted.push_back(oldest->device->replay.exchange(nullptr));
      if (oldest->plan->mode != GraphMode::kRequire) {
        if (!oldest->device->is_evicted.exchange(true)) oldest->plan->counters->NoteEvicted(1);
        oldest->device->last_room_check.store(Replay::Launches());
        oldest->device->next.store(CudaCalls::Next::kPlain);
        oldest->device->plain_calls.store(kCallsUntilRoomCheck);
      }
      entries_.erase(oldest);
    }
  }
  // Whether another graph fits without evicting one that was launched since `since` (in launches).
  bool HasRoom(uint64_t since) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return entries_.size() < limit_ || (!entries_.empty() && LastUse(*Oldest()) <= since);
  }
  void Remove(const CudaCalls::Device* device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::erase_if(entries_, [&](const Entry& entry) { return entry.device == device; });
  }

 private:
  struct Entry {
    const PlanCalls* plan;
    CudaCalls::Device* device;
  };
  static uint64_t LastUse(const Entry& entry) {
    const std::shared_ptr<Replay> replay = entry.device->replay.load();
    return replay == nullptr ? 0 : replay->last_used();
  }

  std::vector<Entry>::iterator Oldest() {
    return std::min_element(entries_.begin(), entries_.end(),
                            [](const Entry& a, const Entry& b) { return LastUse(a) < LastUse(b); });
  }

  std::mutex mutex_;
  size_t limit_ = 64;
  std::vector<Entry> entries_;
};

void SetGraphTools(GraphTools tools) { Tools() = std::move(tools); }

void SetGraphLimit(size_t limit) { GraphBudget::Get().SetLimit(limit); }

CudaStream Recording::OwnStream() const {
  static std::array<CudaStream, 32> streams{};  // never destroyed; guarded by SetupMutex
  CudaStream& stream = streams.at(ordinal_);
  if (stream == nullptr) {
    const CudaDriver& driver = Driver();
    const CudaContextScope scope(driver, ContextOf(driver, stream_));
    driver.Check(driver.stream_create(&stream, kNonBlocking), "creating a stream for captures");
  }
  return stream;
}

void Recording::CopyInputs(const std::vector<CudaAddress>& to) const {
  const CudaDriver& driver = Driver();
  const CudaContextScope scope(driver, ContextOf(driver, stream_));
  for (size_t i = 0; i < plan_.input_bytes.size(); ++i) {
    if (plan_.input_bytes[i] == 0) continue;
    const auto from = static_cast<CudaAddress>(reinterpret_cast<uintptr_t>(inputs_[i]));
    driver.Check(driver.copy_on_device(to.at(i), from, plan_.input_bytes[i], stream_),
                 "copying an input");
  }
  driver.Check(driver.stream_synchronize(stream_), "waiting for the inputs of a capture");
}

Recording::~Recording() {
  if (interrupted_) Tools().interrupt();
}

std::string Recording::Call() {
  try {
    const std::string reason = plan_.run(inputs_, outputs_, {Cuda(ordinal_), stream_, TC_OBSERVE});
    called_ = true;
    return reason;
  } catch (...) {
    failure_ = std::current_exception();
    throw;
  }
}

void Recording::Run(const std::vector<CudaAddress>& inputs, const std::vector<CudaAddress>& outputs,
                    CudaStream stream) const {
  plan_.run(Pointers(inputs).data(), Pointers(outputs).data(), {Cuda(ordinal_), stream, TC_RECORD});
}

CudaCalls::~CudaCalls() {
  if (IsForked()) return;  // a thread of the parent may have held the budget's lock
  for (std::atomic<Device*>& slot : devices_) {
    if (const Device* device = slot.load()) {
      GraphBudget::Get().Remove(device);
      if (device->is_evicted.load()) plan_.counters->NoteEvicted(-1);
      delete device;
    }
  }
}

bool CudaCalls::TryReplay(Device& device, void* const* inputs, void* const* outputs,
                          CudaStream stream) {
  // Generation first: a new capture removes the old graph before it sets the generation.
  if (device.generation.load() != plan_.counters->generation.load()) return false;
  const std::shared_ptr<Replay> replay = device.replay.load();
  if (replay == nullptr) return false;
  replay->Launch(inputs, outputs, stream);
  plan_.counters->graph_replays.fetch_add(1, std::memory_order_relaxed);
  return true;
}

void CudaCalls::FallBack(Device& device, const std::string& reason) {
  plan_.counters->NoteFallback(reason);
  device.next.store(Next::kPlain);
  Tools().warn(plan_.name, reason);
}

void CudaCalls::Run(void* const* inputs, void* const* outputs, int ordinal, CudaStream stream) {
  if (ordinal < 0 || ordinal >= static_cast<int>(devices_.size())) {
    throw std::runtime_error("expected one of the first " + std::to_string(devices_.size()) +
                             " CUDA devices, got cuda:" + std::to_string(ordinal));
  }
  std::atomic<Device*>& slot = devices_[ordinal];
  if (slot.load() == nullptr) {
    const std::lock_guard<std::recursive_mutex> lock(SetupMutex());
    if (slot.load() == nullptr) slot.store(new Device);
    plan_.counters->cuda_devices.fetch_or(uint64_t{1} << ordinal);
  }
  Device& device = *slot.load();
  const TcPlace place = {Cuda(ordinal), stream, TC_COMPUTE};
  if (TryReplay(device, inputs, outputs, stream)) return;
  // The first call after a refresh copies the weights again.
  const int64_t generation = plan_.counters->generation.load();
  if (device.next.load() == Next::kPlain && device.generation.load() == generation) {
    if (!device.IsDue() || !PrepareRetry(device)) {
      plan_.run(inputs, outputs, place);
      return;
    }
  }

  const std::lock_guard<std::recursive_mutex> lock(SetupMutex());
  if (device.next.load() == Next::kFirstCall) {
    if (plan_.mode == GraphMode::kOff) {
      plan_.run(inputs, outputs, place);
      device.generation.store(generation);
      device.next.store(Next::kPlain);
      return;
    }
    if (plan_.refusal.empty()) {
      // On real data. The model creates its lazily initialised state here.
      plan_.run(inputs, outputs, place);
      device.next.store(Next::kCapture);
      return;
    }
    Refuse(device, plan_.refusal);
  }
  if (device.next.load() == Next::kCapture) {
    if (TryReplay(device, inputs, outputs, stream)) return;
    Recording recording(plan_, ordinal, stream, inputs, outputs);
    CaptureOnce(device, recording, stream);
    if (recording.called() && device.next.load() != Next::kRefused) return;
  }
  if (device.next.load() == Next::kRefused) throw std::runtime_error(device.failure);
  plan_.run(inputs, outputs, place);
  if (device.next.load() == Next::kPlain) device.generation.store(generation);
}

void CudaCalls::Refuse(Device& device, const std::string& reason) {
  if (plan_.mode != GraphMode::kRequire) return FallBack(device, reason);
  device.failure = "cuda_graph='require': the call cannot be captured: " + reason;
  device.next.store(Next::kRefused);
}

bool CudaCalls::PrepareRetry(Device& device) {
  if (device.invalidated_captures == 0 &&
      !GraphBudget::Get().HasRoom(device.last_room_check.load())) {
    device.last_room_check.store(Replay::Launches());
    device.plain_calls.store(kCallsUntilRoomCheck);
    return false;
  }
  device.next.store(Next::kCapture);
  return true;
}

void CudaCalls::CaptureOnce(Device& device, Recording& recording, CudaStream stream) {
  GraphBudget::Get().Remove(&device);
  device.replay.store(nullptr);
  device.generation.store(plan_.counters->generation.load());
  NoCapture failure{NoCapture::Kind::kRefused, ""};
  try {
    device.replay.store(Capture(recording, stream));
    device.invalidated_captures = 0;
    if (device.is_evicted.exchange(false)) plan_.counters->NoteEvicted(-1);
    plan_.counters->graph_captures.fetch_add(1);
    GraphBudget::Get().Add(plan_, &device);
    return;
  } catch (const NoCapture& none) {
    failure = none;
  } catch (const std::exception& e) {
    failure.reason = e.what();
    // The driver refuses some operations while another thread captures.
    if (failure.reason.find("_STREAM_CAPTURE_") != std::string::npos) {
      failure.kind = NoCapture::Kind::kInvalidated;
    }
  }
  // An error of the call itself is not attributed to the capture: the next call tries again.
  if (recording.failure()) std::rethrow_exception(recording.failure());
  Fail(device, failure);
}

void CudaCalls::Fail(Device& device, const NoCapture& failure) {
  // The next call tries again.
  if (failure.kind == NoCapture::Kind::kInterrupted) throw std::runtime_error(failure.reason);
  if (failure.kind == NoCapture::Kind::kRefused) return Refuse(device, failure.reason);
  const auto attempts = static_cast<size_t>(++device.invalidated_captures);
  if (attempts > kCallsUntilRetry.size()) {
    return Refuse(device, "all " + std::to_string(attempts) +
                              " captures were invalidated, for example by another thread that "
                              "synchronised with the device: " +
                              failure.reason);
  }
  device.next.store(Next::kPlain);
  device.plain_calls.store(kCallsUntilRetry[attempts - 1]);
}

std::shared_ptr<Replay> CudaCalls::Capture(Recording& recording, CudaStream stream) const {
  std::function<void()> release_replica = plan_.hold(Cuda(recording.ordinal()));
  Captured captured;
  try {
    captured = Tools().capture(recording);
  } catch (const std::exception& e) {
    captured.failure = {NoCapture::Kind::kRefused, e.what()};
  }
  const std::function<void()> release = [release_replica, release_graph = captured.release] {
    if (release_graph) release_graph();
    release_replica();
  };
  if (!captured.failure && (captured.inputs.size() != plan_.input_bytes.size() ||
                            captured.outputs.size() != plan_.output_bytes.size())) {
    captured.failure = {NoCapture::Kind::kRefused, "expected a buffer for each input and output"};
  }
  if (captured.failure) {
    release();
    throw *captured.failure;
  }
  return std::make_shared<Replay>(Driver(), stream, captured.graph,
                                  Buffers(captured.inputs, plan_.input_bytes),
                                  Buffers(captured.outputs, plan_.output_bytes), release);
}

}  // namespace torchcall
