// The device and stream of a call, as torch types. Uses libc10 only, so nothing links CUDA. If
// torch has no CUDA, the device guard throws.

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

// Makes the place's device and stream torch's current ones. For a stream that torch did not make,
// the stream id is its handle.
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

// Waits for all work on a CUDA device. Must not run during a capture on it.
inline void Synchronize(c10::Device device) {
  if (device.is_cpu()) return;
  c10::impl::getDeviceGuardImpl(device.type())->synchronizeDevice(device.index());
}

// One T per device, made by the first call on that device.
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
    // Weights are copied on another stream than the call's, which does not wait for it.
    Synchronize(device);
    slot.store(made);
    return made;
  }
  void Set(c10::Device device, std::shared_ptr<T> value) {
    slots_[SlotOf(device)].store(std::move(value));
  }
  // Sets `value` for one device and drops the others; a later Get makes them again. `change` runs
  // under the lock and may change what `make` reads. Waits for the devices where possible.
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
  // Releases replaced values that no call or graph uses, if the device can be waited for.
  // Must not run during a capture.
  void ReleaseReplaced() const {
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

  // Enqueued work reads the values, on streams that freeing memory does not wait for. So a value is
  // freed only here, after the device finished, and never by a call. A value in use, or on a device
  // that cannot be waited for, is retained until a later attempt.
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
