// Where the memory of CUDA tensors is, in torch's CUDA build over devices that are played.

#ifndef TORCHCALL_STANDIN_CUDA_TORCH_PLACE_H_
#define TORCHCALL_STANDIN_CUDA_TORCH_PLACE_H_

#include <c10/core/CPUAllocator.h>
#include <c10/core/Device.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>

#include "hooks.h"

namespace standin {

inline c10::Device Cuda(c10::DeviceIndex index) { return {c10::kCUDA, index}; }
inline c10::DeviceIndex CurrentDevice() { return c10::cuda::current_device(); }
inline c10::DeviceIndex IndexOf(c10::Device device) {
  return device.has_index() ? device.index() : CurrentDevice();
}
inline c10::Allocator& Allocator() { return *c10::cuda::CUDACachingAllocator::get(); }
inline void* HostView(void* address) {
  void* host = standin_cuda_host(address);
  return host == nullptr ? address : host;
}

}  // namespace standin

#endif  // TORCHCALL_STANDIN_CUDA_TORCH_PLACE_H_
