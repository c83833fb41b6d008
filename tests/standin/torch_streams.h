// Simulated devices, streams and events for torch's guards and autograd engine. Each thread has a
// current device and stream. Work is complete when a call returns, so events have no state.

#ifndef TORCHCALL_STANDIN_TORCH_STREAMS_H_
#define TORCHCALL_STANDIN_TORCH_STREAMS_H_

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "record.h"

namespace standin {

constexpr c10::DeviceIndex kDevices = 2;

inline Record& Log() {
  static auto* record = new Record;  // leaked: torch's threads outlive statics
  return *record;
}

inline c10::Device Cuda(c10::DeviceIndex index) { return {c10::kCUDA, index}; }

inline thread_local c10::DeviceIndex thread_device = 0;
inline thread_local std::array<c10::StreamId, kDevices> thread_streams{};

inline c10::DeviceIndex IndexOf(c10::Device device) {
  TORCH_CHECK(device.is_cuda() && device.index() < kDevices,
              "CUDA error: invalid device ordinal: ", device);
  return device.has_index() ? device.index() : thread_device;
}

inline c10::Stream StreamOf(c10::DeviceIndex index) {
  return c10::Stream(c10::Stream::UNSAFE, Cuda(index), thread_streams[index]);
}

inline void LogEvent(const char* kind, const std::string& name, c10::DeviceIndex device,
                     c10::StreamId stream) {
  Log().Add(std::string(kind) + '\t' + name + '\t' + std::to_string(device) + '\t' +
            std::to_string(stream));
}
inline void LogEvent(const char* kind, const std::string& name, c10::DeviceIndex device) {
  LogEvent(kind, name, device, thread_streams[device]);
}

// Sets the current device and restores it, without a log entry.
class DeviceScope {
 public:
  explicit DeviceScope(c10::DeviceIndex index) : before_(thread_device) { thread_device = index; }
  ~DeviceScope() { thread_device = before_; }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  const c10::DeviceIndex before_;
};

// Active captures, by device and stream. As in CUDA, synchronising with such a stream or its device
// invalidates the capture.
struct Pool;
struct Capture {
  std::shared_ptr<Pool> pool;
  bool is_invalidated = false;
};
struct Captures {
  std::mutex mutex;
  std::map<std::pair<c10::DeviceIndex, c10::StreamId>, Capture*> by_stream;
};
inline Captures& C() {
  static auto* captures = new Captures;
  return *captures;
}

inline Capture* CaptureOn(c10::DeviceIndex device, c10::StreamId stream) {
  const std::lock_guard lock(C().mutex);
  const auto found = C().by_stream.find({device, stream});
  return found == C().by_stream.end() ? nullptr : found->second;
}

// Raises if the stream's capture is invalidated: nothing can be enqueued there any more.
inline void CheckCaptureIsValid(c10::DeviceIndex device, c10::StreamId stream) {
  const Capture* capture = CaptureOn(device, stream);
  TORCH_CHECK(capture == nullptr || !capture->is_invalidated,
              "CUDA error: operation failed due to a previous error during capture");
}

// Raises, and invalidates the captures, if the stream is captured. Without a stream: any of the
// device's streams.
inline void RejectDuringCapture(c10::DeviceIndex device, std::optional<c10::StreamId> stream) {
  const std::lock_guard lock(C().mutex);
  bool forbidden = false;
  for (auto& [place, capture] : C().by_stream) {
    if (place.first != device || (stream && place.second != *stream)) continue;
    capture->is_invalidated = forbidden = true;
  }
  TORCH_CHECK(!forbidden, "CUDA error: operation not permitted when stream is capturing");
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }

  c10::Device getDevice() const override { return Cuda(thread_device); }
  void setDevice(c10::Device device) const override { exchangeDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) thread_device = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    const c10::DeviceIndex index = IndexOf(device);
    if (index != thread_device) LogEvent("device", "set", index);
    thread_device = index;
    return before;
  }

  c10::Stream getStream(c10::Device device) const override { return StreamOf(IndexOf(device)); }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, Cuda(IndexOf(device)));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    static std::atomic<c10::StreamId> next{1};
    return c10::Stream(c10::Stream::UNSAFE, Cuda(IndexOf(device)), next++);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return getStreamFromGlobalPool(device, false);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::DeviceIndex index = IndexOf(stream.device());
    const c10::Stream before = StreamOf(index);
    if (stream.id() != before.id()) LogEvent("stream", "exchange", index, stream.id());
    thread_streams[index] = stream.id();
    return before;
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  bool isStreamCapturing(const c10::Stream& stream) const override {
    return CaptureOn(stream.device_index(), stream.id()) != nullptr;
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    RejectDuringCapture(stream.device_index(), stream.id());
    LogEvent("sync", "stream", stream.device_index(), stream.id());
  }
  void synchronizeDevice(c10::DeviceIndex index) const override {
    index = index < 0 ? thread_device : index;
    RejectDuringCapture(index, std::nullopt);
    LogEvent("sync", "device", index);
  }

  void record(void** event, const c10::Stream& stream, c10::DeviceIndex,
              c10::EventFlag) const override {
    static std::atomic<uintptr_t> next{1};
    if (*event == nullptr) *event = reinterpret_cast<void*>(next++);
    LogEvent("event", "record", stream.device_index(), stream.id());
  }
  void block(void*, const c10::Stream& stream) const override {
    LogEvent("event", "wait", stream.device_index(), stream.id());
  }
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { LogEvent("sync", "event", thread_device); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream& stream) const override {
    LogEvent("event", "record_stream", stream.device_index(), stream.id());
  }
};

}  // namespace standin

#endif  // TORCHCALL_STANDIN_TORCH_STREAMS_H_
