// Where a call runs, in torch's terms. Everything here is libc10's: nothing links CUDA, and in a
// process whose torch has no CUDA the device guard says so. On CUDA, not yet run but over
// stand-ins.

#ifndef TORCHCALL_TORCH_PLACE_H_
#define TORCHCALL_TORCH_PLACE_H_

#include <c10/core/Device.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../engine.h"

namespace torchcall {

inline constexpr size_t kMostCudaDevices = 32;

inline c10::Device DeviceOf(DLDevice device) {
  if (device.device_type == kDLCPU) return c10::Device(c10::kCPU);
  if (device.device_type != kDLCUDA || device.device_id < 0 ||
      device.device_id >= static_cast<int32_t>(kMostCudaDevices)) {
    throw std::invalid_argument("expected the CPU or one of " + std::to_string(kMostCudaDevices) +
                                " CUDA devices, got device " + std::to_string(device.device_id) +
                                " of type " + std::to_string(device.device_type));
  }
  return c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(device.device_id));
}

inline constexpr TcPlace kCpuPlace = {{kDLCPU, 0}, nullptr, TC_COMPUTE};

// Puts torch on the place's device and stream while it lives. torch takes the handle of a stream
// that it did not make as the stream's id.
class StreamScope {
 public:
  explicit StreamScope(TcPlace place) {
    if (place.device.device_type == kDLCPU) return;
    guard_.emplace(
        c10::Stream(c10::Stream::UNSAFE, DeviceOf(place.device),
                    static_cast<c10::StreamId>(reinterpret_cast<std::intptr_t>(place.stream))));
  }

 private:
  std::optional<c10::StreamGuard> guard_;
};

// Waits for all that was enqueued on a CUDA device. Nothing may be captured there meanwhile.
inline void Synchronize(c10::Device device) {
  if (device.is_cpu()) return;
  c10::impl::getDeviceGuardImpl(device.type())->synchronizeDevice(device.index());
}

// One T per device, made when a call on that device wants it first.
template <typename T>
class PerDevice {
 public:
  // `make` runs for one device at a time.
  template <typename Make>
  std::shared_ptr<T> Get(c10::Device device, const Make& make) const {
    std::atomic<std::shared_ptr<T>>& slot = slots_[SlotOf(device)];
    if (std::shared_ptr<T> held = slot.load()) return held;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (std::shared_ptr<T> held = slot.load()) return held;
    std::shared_ptr<T> made = make();
    // Weights travel on other streams than the calls', which would not wait for them.
    Synchronize(device);
    slot.store(made);
    return made;
  }
  void Set(c10::Device device, std::shared_ptr<T> value) {
    slots_[SlotOf(device)].store(std::move(value));
  }
  // Takes `value` for a device, and makes all others anew when they are wanted; what `make` of a
  // later Get reads may be changed by `change`. Waits for the devices if that is possible.
  template <typename Change>
  void Replace(const Change& change, c10::Device device, std::shared_ptr<T> value) {
    std::vector<Old> dropped;  // without the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    change();
    for (size_t i = 0; i < slots_.size(); ++i) {
      const bool is_home = i == SlotOf(device);
      std::shared_ptr<T> old = slots_[i].exchange(is_home ? std::move(value) : nullptr);
      if (old != nullptr && i > 0) old_.push_back({CudaAt(i), std::move(old)});
    }
    DropUnused(dropped);
  }
  // Drops what was replaced while calls or graphs had it, if the devices can be waited for. Nothing
  // may be captured there meanwhile.
  void LetGo() const {
    std::vector<Old> dropped;
    const std::lock_guard<std::mutex> lock(mutex_);
    DropUnused(dropped);
  }

 private:
  struct Old {
    c10::Device device;
    std::shared_ptr<T> value;
  };

  static size_t SlotOf(c10::Device device) { return device.is_cpu() ? 0 : 1 + device.index(); }
  static c10::Device CudaAt(size_t slot) {
    return {c10::kCUDA, static_cast<c10::DeviceIndex>(slot - 1)};
  }

  // Calls enqueue work that reads what they use, on streams that its memory does not wait for. So
  // it is dropped here, once the device is through with it, and never by a call: what one still
  // has stays until later, and so does what a device cannot be waited for.
  void DropUnused(std::vector<Old>& dropped) const {
    std::erase_if(old_, [&](Old& old) {
      if (old.value.use_count() > 1) return false;
      std::atomic_thread_fence(std::memory_order_acquire);  // after what the last user enqueued
      try {
        Synchronize(old.device);
      } catch (const std::exception&) {
        return false;
      }
      dropped.push_back(std::move(old));
      return true;
    });
  }

  mutable std::mutex mutex_;
  mutable std::vector<Old> old_;
  mutable std::array<std::atomic<std::shared_ptr<T>>, 1 + kMostCudaDevices> slots_;
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_PLACE_H_
