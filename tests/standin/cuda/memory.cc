// The devices' memory: one file in memory, seen at two places. The host cannot touch the one that
// addresses are of.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "device.h"

namespace standin {
namespace {

char* device_memory = nullptr;
char* host_memory = nullptr;
constexpr size_t kAlignment = 512;
// Not a number: what is read before it was written, or after it was freed, shows.
constexpr int kGarbage = 0xFF;
constexpr size_t kMost = 1 << 20;  // that is filled so; memory that nobody uses is not made

}  // namespace

void Machine::MapMemory() {
  const size_t bytes = kMemory * kDevices;
  const int file = memfd_create("device memory", 0);
  if (file < 0 || ftruncate(file, bytes) != 0) std::abort();
  void* device = mmap(nullptr, bytes, PROT_NONE, MAP_SHARED | MAP_NORESERVE, file, 0);
  void* host = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
  if (device == MAP_FAILED || host == MAP_FAILED) std::abort();
  device_memory = static_cast<char*>(device);
  host_memory = static_cast<char*>(host);
  for (int i = 0; i < kDevices; ++i) free_[device_memory + i * kMemory] = kMemory;
}

char* Machine::Host(const void* address) {
  const char* at = static_cast<const char*>(address);
  if (at < device_memory || at >= device_memory + kMemory * kDevices) return nullptr;
  return host_memory + (at - device_memory);
}

int Machine::DeviceOf(const void* address) {
  if (Host(address) == nullptr) return -1;
  return static_cast<int>((static_cast<const char*>(address) - device_memory) / kMemory);
}

void* Machine::Allocate(int device, size_t bytes) {
  const std::lock_guard lock(mutex);
  bytes = (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    auto [address, size] = *it;
    if (size < bytes || DeviceOf(address) != device) continue;
    free_.erase(it);
    if (size > bytes) free_[address + bytes] = size - bytes;
    used_[address] = bytes;
    std::memset(Host(address), kGarbage, std::min(bytes, kMost));
    return address;
  }
  return nullptr;
}

bool Machine::Free(void* address) {
  SynchronizeDevice();
  const std::lock_guard lock(mutex);
  const auto found = used_.find(static_cast<char*>(address));
  if (found == used_.end()) return false;
  auto [start, size] = *found;
  std::memset(Host(start), kGarbage, std::min(size, kMost));
  used_.erase(found);
  auto next = free_.lower_bound(start);
  if (next != free_.end() && next->first == start + size &&
      DeviceOf(start) == DeviceOf(next->first)) {
    size += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == start && DeviceOf(before->first) == DeviceOf(start)) {
      before->second += size;
      return true;
    }
  }
  free_[start] = size;
  return true;
}

size_t Machine::FreeBytes(int device) {
  const std::lock_guard lock(mutex);
  size_t bytes = 0;
  for (const auto& [address, size] : free_) bytes += DeviceOf(address) == device ? size : 0;
  return bytes;
}

const char* Machine::Wrong(const void* address, size_t bytes) {
  const std::lock_guard lock(mutex);
  char* at = const_cast<char*>(static_cast<const char*>(address));
  auto found = used_.upper_bound(at);
  if (found == used_.begin()) return "no allocation";
  --found;
  if (at >= found->first + found->second) return "no allocation";
  return at + bytes > found->first + found->second ? "past the end" : nullptr;
}

bool Machine::Range(const void* address, void** start, size_t* bytes) {
  const std::lock_guard lock(mutex);
  if (Wrong(address, 1) != nullptr) return false;
  const auto found =
      std::prev(used_.upper_bound(const_cast<char*>(static_cast<const char*>(address))));
  return *start = found->first, *bytes = found->second, true;
}

void Machine::Pin(void* memory, size_t bytes) {
  const std::lock_guard lock(mutex);
  pinned_[static_cast<char*>(memory)] = bytes;
}

void Machine::Unpin(void* memory) {
  SynchronizeDevice();
  const std::lock_guard lock(mutex);
  pinned_.erase(static_cast<char*>(memory));
}

bool Machine::IsPinned(const void* memory) {
  const std::lock_guard lock(mutex);
  char* at = const_cast<char*>(static_cast<const char*>(memory));
  auto found = pinned_.upper_bound(at);
  if (found == pinned_.begin()) return false;
  --found;
  return at < found->first + found->second;
}

}  // namespace standin
