// The driver's entry points: memory and copies.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>

#include "entry.h"

namespace {

// A copy between any two places, done by the device. Host memory that is not pinned is read when
// the call is made, as CUDA stages it.
CUresult Copy(void* to, const void* from, size_t bytes, CUstream stream, bool waits) {
  if (bytes == 0) return CUDA_SUCCESS;
  char *target = Machine::Host(to), *source = Machine::Host(from);
  for (const void* end : {const_cast<const void*>(to), from}) {
    if (Machine::Host(end) == nullptr) continue;
    if (const char* wrong = M().Wrong(end, bytes)) {
      M().Note(std::string("error\tcopy of ") + std::to_string(bytes) + ": " + wrong);
      return CUDA_ERROR_INVALID_VALUE;
    }
  }
  const std::string name = std::string("copy ") + (source ? "d" : "h") + "to" +
                           (target ? "d" : "h") + " " + std::to_string(bytes);
  Stream* on = M().Resolve(stream);
  std::function<void()> run;
  if (source == nullptr && target != nullptr && on->capture == nullptr && !M().IsPinned(from)) {
    auto staged = std::make_shared<std::vector<char>>(static_cast<const char*>(from),
                                                      static_cast<const char*>(from) + bytes);
    run = [=] { std::memcpy(target, staged->data(), bytes); };
  } else {
    char* const a = target ? target : static_cast<char*>(to);
    const char* const b = source ? source : static_cast<const char*>(from);
    run = [=] { std::memmove(a, b, bytes); };
  }
  if (const CUresult result = M().Enqueue(on, name, run)) return result;
  return waits ? M().Synchronize(on) : CUDA_SUCCESS;
}

template <typename T>
CUresult Fill(CUdeviceptr to, T value, size_t count, CUstream stream) {
  if (count == 0) return CUDA_SUCCESS;
  if (M().Wrong(Pointer(to), count * sizeof(T))) return CUDA_ERROR_INVALID_VALUE;
  T* target = reinterpret_cast<T*>(Machine::Host(Pointer(to)));
  return M().Enqueue(M().Resolve(stream), "memset", [=] { std::fill_n(target, count, value); });
}

}  // namespace

// Memory.

ENTRY cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
  if (const CUresult result = M().Unsafe("cuMemAlloc")) return result;
  void* made = M().Allocate(this_device, bytes);
  M().Note("alloc\t" + std::to_string(bytes));
  return *address = Address(made), made == nullptr ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}
ENTRY cuMemFree_v2(CUdeviceptr address) {
  if (const CUresult result = M().Unsafe("cuMemFree")) return result;
  if (address == 0) return CUDA_SUCCESS;
  return M().Free(Pointer(address)) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
ENTRY cuMemAllocAsync(CUdeviceptr* address, size_t bytes, CUstream) {
  void* made = M().Allocate(this_device, bytes);
  return *address = Address(made), made == nullptr ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}
ENTRY cuMemAllocFromPoolAsync(CUdeviceptr* address, size_t bytes, CUmemoryPool, CUstream stream) {
  return cuMemAllocAsync(address, bytes, stream);
}
ENTRY cuMemFreeAsync(CUdeviceptr address, CUstream stream) {
  Stream* on = M().Resolve(stream);
  if (on->capture != nullptr) return M().Enqueue(on, "free", nullptr);
  return M().Free(Pointer(address)) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
ENTRY cuMemGetInfo_v2(size_t* left, size_t* total) {
  return *left = M().FreeBytes(this_device), *total = kMemory, CUDA_SUCCESS;
}
ENTRY cuMemHostAlloc(void** made, size_t bytes, unsigned int) {
  if (const CUresult result = M().Unsafe("cuMemHostAlloc")) return result;
  bytes = (bytes + 4095) / 4096 * 4096;
  *made = std::aligned_alloc(4096, bytes);
  return M().Pin(*made, bytes), CUDA_SUCCESS;
}
ENTRY cuMemAllocHost_v2(void** made, size_t bytes) { return cuMemHostAlloc(made, bytes, 0); }
ENTRY cuMemFreeHost(void* made) { return M().Unpin(made), std::free(made), CUDA_SUCCESS; }
ENTRY cuMemHostRegister_v2(void* memory, size_t bytes, unsigned int) {
  return M().Pin(memory, bytes), CUDA_SUCCESS;
}
ENTRY cuMemHostUnregister(void* memory) { return M().Unpin(memory), CUDA_SUCCESS; }
ENTRY cuMemHostGetDevicePointer_v2(CUdeviceptr* address, void* pointer, unsigned int) {
  return *address = Address(pointer), CUDA_SUCCESS;
}
ENTRY cuMemGetAddressRange_v2(CUdeviceptr* start, size_t* bytes, CUdeviceptr address) {
  void* found = nullptr;
  size_t size = 0;
  if (!M().Range(Pointer(address), &found, &size)) return CUDA_ERROR_INVALID_VALUE;
  if (start != nullptr) *start = Address(found);
  if (bytes != nullptr) *bytes = size;
  return CUDA_SUCCESS;
}

// Virtual memory: an address has its memory from the start.
ENTRY cuMemGetAllocationGranularity(size_t* bytes, const CUmemAllocationProp*,
                                    CUmemAllocationGranularity_flags) {
  return *bytes = 2 << 20, CUDA_SUCCESS;
}
ENTRY cuMemCreate(CUmemGenericAllocationHandle* handle, size_t bytes, const CUmemAllocationProp*,
                  unsigned long long) {
  if (bytes > M().FreeBytes(this_device)) return CUDA_ERROR_OUT_OF_MEMORY;
  return *handle = bytes, CUDA_SUCCESS;
}
ENTRY cuMemAddressReserve(CUdeviceptr* address, size_t bytes, size_t, CUdeviceptr,
                          unsigned long long) {
  *address = Address(M().Allocate(this_device, bytes));
  return *address == 0 ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}
ENTRY cuMemMap(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long) {
  return CUDA_SUCCESS;
}
ENTRY cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t) { return CUDA_SUCCESS; }
ENTRY cuMemUnmap(CUdeviceptr, size_t) { return CUDA_SUCCESS; }
ENTRY cuMemRelease(CUmemGenericAllocationHandle) { return CUDA_SUCCESS; }
ENTRY cuMemAddressFree(CUdeviceptr address, size_t) {
  return M().Free(Pointer(address)) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
ENTRY cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* handle, void* address) {
  void* start = nullptr;
  size_t size = 0;
  if (!M().Range(address, &start, &size)) return CUDA_ERROR_INVALID_VALUE;
  return *handle = size, CUDA_SUCCESS;
}
ENTRY cuDeviceGetDefaultMemPool(CUmemoryPool* pool, CUdevice device) {
  return *pool = reinterpret_cast<CUmemoryPool>(&contexts[device]), CUDA_SUCCESS;
}
ENTRY cuMemPoolSetAttribute(CUmemoryPool, CUmemPool_attribute, void*) { return CUDA_SUCCESS; }
ENTRY cuMemPoolGetAttribute(CUmemoryPool, CUmemPool_attribute, void* value) {
  return *static_cast<uint64_t*>(value) = 0, CUDA_SUCCESS;
}
ENTRY cuMemPoolSetAccess(CUmemoryPool, const CUmemAccessDesc*, size_t) { return CUDA_SUCCESS; }
ENTRY cuMemPoolTrimTo(CUmemoryPool, size_t) { return CUDA_SUCCESS; }
ENTRY cuMemPoolCreate(CUmemoryPool* pool, const CUmemPoolProps*) {
  return *pool = reinterpret_cast<CUmemoryPool>(&contexts[0]), CUDA_SUCCESS;
}
ENTRY cuMemPoolDestroy(CUmemoryPool) { return CUDA_SUCCESS; }

ENTRY cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
  const int device = Machine::DeviceOf(Pointer(address));
  if (device < 0) return CUDA_ERROR_INVALID_VALUE;
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      return *static_cast<CUcontext*>(value) = Handle(&contexts[device]), CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      return *static_cast<unsigned int*>(value) = CU_MEMORYTYPE_DEVICE, CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      return *static_cast<int*>(value) = device, CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      return *static_cast<CUdeviceptr*>(value) = address, CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
      return *static_cast<int*>(value) = 0, CUDA_SUCCESS;
    default:
      return CUDA_ERROR_NOT_SUPPORTED;
  }
}
ENTRY cuPointerGetAttributes(unsigned int count, CUpointer_attribute* attributes, void** values,
                             CUdeviceptr address) {
  for (unsigned int i = 0; i < count; ++i) cuPointerGetAttribute(values[i], attributes[i], address);
  return CUDA_SUCCESS;
}

ENTRY cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
  return Copy(Pointer(to), Pointer(from), bytes, nullptr, true);
}
ENTRY cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return Copy(Pointer(to), Pointer(from), bytes, stream, false);
}
ENTRY cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
  return Copy(Pointer(to), from, bytes, nullptr, true);
}
ENTRY cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
  return Copy(to, Pointer(from), bytes, nullptr, true);
}
ENTRY cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
  return Copy(Pointer(to), Pointer(from), bytes, nullptr, false);
}
ENTRY cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
  return Copy(Pointer(to), from, bytes, stream, false);
}
ENTRY cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return Copy(to, Pointer(from), bytes, stream, false);
}
ENTRY cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return Copy(Pointer(to), Pointer(from), bytes, stream, false);
}
ENTRY cuMemcpyPeerAsync(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t bytes,
                        CUstream stream) {
  return Copy(Pointer(to), Pointer(from), bytes, stream, false);
}
ENTRY cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t count) {
  return Fill(to, value, count, nullptr);
}
ENTRY cuMemsetD32_v2(CUdeviceptr to, unsigned int value, size_t count) {
  return Fill(to, value, count, nullptr);
}
ENTRY cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
  return Fill(to, value, count, stream);
}
ENTRY cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t count, CUstream stream) {
  return Fill(to, value, count, stream);
}
ENTRY cuMemsetD32Async(CUdeviceptr to, unsigned int value, size_t count, CUstream stream) {
  return Fill(to, value, count, stream);
}
