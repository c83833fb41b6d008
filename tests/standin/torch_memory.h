// Memory of the simulated devices (host memory), and torch's hooks for CUDA builds.

#ifndef TORCHCALL_STANDIN_TORCH_MEMORY_H_
#define TORCHCALL_STANDIN_TORCH_MEMORY_H_

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "torch_streams.h"

namespace standin {

struct Block {
  void* data;
  size_t size;
  c10::DeviceIndex device;
  c10::StreamId stream;
  std::shared_ptr<Pool> pool;  // of the capture that allocated it
};

struct Memory {
  std::mutex mutex;
  std::map<void*, Block*> blocks;
  std::array<size_t, kDevices> live{};
  std::array<size_t, kDevices> limit{SIZE_MAX, SIZE_MAX};
};
inline Memory& M() {
  static auto* memory = new Memory;
  return *memory;
}

// Fill values, so that memory read before it is written, or after it is freed, gives no plausible
// result.
constexpr int kFresh = 0xFF;  // NaN, -1
constexpr int kFreed = 0xDD;

inline void Deallocate(Block* block) {
  {
    const std::lock_guard lock(M().mutex);
    M().live[block->device] -= block->size;
    M().blocks.erase(block->data);
  }
  std::memset(block->data, kFreed, block->size);
  c10::GetCPUAllocator()->raw_deallocate(block->data);
  delete block;
}

// The memory of a graph. Blocks freed during the capture stay allocated: replays write to them.
struct Pool {
  std::mutex mutex;
  std::vector<Block*> freed;
  ~Pool() {
    for (Block* block : freed) Deallocate(block);
  }
};

inline void Free(void* context) {
  auto* block = static_cast<Block*>(context);
  LogEvent("free", std::to_string(block->size), block->device, block->stream);
  if (const std::shared_ptr<Pool> pool = std::move(block->pool)) {
    const std::lock_guard lock(pool->mutex);
    pool->freed.push_back(block);
  } else {
    Deallocate(block);
  }
}

// Allocates on the current device and stream.
struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    const c10::DeviceIndex device = thread_device;
    if (size == 0) return {nullptr, Cuda(device)};
    {
      const std::lock_guard lock(M().mutex);
      TORCH_CHECK_WITH(OutOfMemoryError, M().live[device] + size <= M().limit[device],
                       "CUDA out of memory. Tried to allocate ", size, " bytes.");
      M().live[device] += size;
    }
    const Capture* capture = CaptureOn(device, thread_streams[device]);
    auto* block = new Block{c10::GetCPUAllocator()->raw_allocate(size), size, device,
                            thread_streams[device], capture != nullptr ? capture->pool : nullptr};
    std::memset(block->data, kFresh, size);
    LogEvent("alloc", std::to_string(size), device);
    const std::lock_guard lock(M().mutex);
    M().blocks[block->data] = block;
    return {block->data, block, &Free, Cuda(device)};
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
};
inline DeviceMemory& Allocator() {
  static auto* allocator = new DeviceMemory;
  return *allocator;
}

// torch's interface to a CUDA build.
struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return kDevices; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex current_device() const override { return thread_device; }
  c10::DeviceIndex getCurrentDevice() const override { return thread_device; }
  at::Allocator* getCUDADeviceAllocator() const override { return &Allocator(); }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  void deviceSynchronize(c10::DeviceIndex index) const override {
    Guard().synchronizeDevice(index);
  }
  // Memory that torch did not allocate counts as the current device's.
  c10::Device getDeviceFromPtr(void* data) const override {
    TORCH_CHECK(data != nullptr,
                "The specified pointer resides on host memory and is not registered with any CUDA "
                "device.");
    const std::lock_guard lock(M().mutex);
    auto after = M().blocks.upper_bound(data);
    if (after == M().blocks.begin()) return Cuda(thread_device);
    const Block& block = *std::prev(after)->second;
    const auto offset = static_cast<char*>(data) - static_cast<char*>(block.data);
    return Cuda(static_cast<size_t>(offset) < block.size ? block.device : thread_device);
  }
};

}  // namespace standin

#endif  // TORCHCALL_STANDIN_TORCH_MEMORY_H_
