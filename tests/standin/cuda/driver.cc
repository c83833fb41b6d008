// The driver's entry points over the devices that are played: devices, contexts, kernels, errors.
// What is not here or in the other files of the driver's answers that it is not supported.

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "entry.h"
#include "hooks.h"
#include "kernels.h"

namespace {

thread_local std::vector<Context*> current;

void Follow() {
  if (!current.empty() && current.back() != nullptr) this_device = current.back()->device;
}

int Attribute(CUdevice_attribute attribute) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
      return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y:
      return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z:
      return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X:
      return 2147483647;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
      return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z:
      return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK:
      return 49152;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      return 232448;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      return 233472;
    case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK:
      return 1024;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      return 65536;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR:
      return 65536;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
      return 1980000;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
      return 3201000;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
      return 6144;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return 132;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR:
      return 2048;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR:
      return 32;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return 9;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      return 0;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE:
      return 60 << 20;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
      return 1;
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
      return 1;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT:
      return 3;
    case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED:
      return 1;
    case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT:
      return 512;
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
      return 1;
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
      return 1;
    default:
      return 0;
  }
}

}  // namespace

// Devices and contexts.

ENTRY cuInit(unsigned int) { return CUDA_SUCCESS; }
ENTRY cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
ENTRY cuDeviceGetCount(int* count) { return *count = kDevices, CUDA_SUCCESS; }
ENTRY cuDeviceGet(CUdevice* device, int ordinal) {
  if (ordinal < 0 || ordinal >= kDevices) return CUDA_ERROR_INVALID_DEVICE;
  return *device = ordinal, CUDA_SUCCESS;
}
ENTRY cuDeviceGetName(char* name, int size, CUdevice) {
  return std::snprintf(name, size, "CUDA stand-in"), CUDA_SUCCESS;
}
ENTRY cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
  std::memset(uuid, 1 + device, sizeof(*uuid));
  return CUDA_SUCCESS;
}
#undef cuDeviceGetUuid
ENTRY cuDeviceGetUuid(CUuuid* uuid, CUdevice device) { return cuDeviceGetUuid_v2(uuid, device); }
ENTRY cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  return *value = Attribute(attribute), CUDA_SUCCESS;
}
ENTRY cuDeviceTotalMem_v2(size_t* bytes, CUdevice) { return *bytes = kMemory, CUDA_SUCCESS; }
ENTRY cuDeviceComputeCapability(int* major, int* minor, CUdevice) {
  return *major = 9, *minor = 0, CUDA_SUCCESS;
}
ENTRY cuDeviceGetPCIBusId(char* id, int size, CUdevice device) {
  return std::snprintf(id, size, "0000:0%d:00.0", device + 1), CUDA_SUCCESS;
}
ENTRY cuDeviceCanAccessPeer(int* can, CUdevice, CUdevice) { return *can = 0, CUDA_SUCCESS; }
ENTRY cuDeviceGetP2PAttribute(int* value, CUdevice_P2PAttribute, CUdevice, CUdevice) {
  return *value = 0, CUDA_SUCCESS;
}
ENTRY cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = Handle(&contexts[device]), CUDA_SUCCESS;
}
ENTRY cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
ENTRY cuDevicePrimaryCtxSetFlags_v2(CUdevice, unsigned int) { return CUDA_SUCCESS; }
ENTRY cuDevicePrimaryCtxGetState(CUdevice, unsigned int* flags, int* active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
ENTRY cuCtxGetCurrent(CUcontext* context) {
  return *context = current.empty() ? nullptr : Handle(current.back()), CUDA_SUCCESS;
}
ENTRY cuCtxSetCurrent(CUcontext context) {
  if (current.empty()) current.push_back(nullptr);
  current.back() = reinterpret_cast<Context*>(context);
  return Follow(), CUDA_SUCCESS;
}
ENTRY cuCtxPushCurrent_v2(CUcontext context) {
  current.push_back(reinterpret_cast<Context*>(context));
  return Follow(), CUDA_SUCCESS;
}
ENTRY cuCtxPopCurrent_v2(CUcontext* context) {
  if (current.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  if (context != nullptr) *context = Handle(current.back());
  current.pop_back();
  return Follow(), CUDA_SUCCESS;
}
ENTRY cuCtxGetDevice(CUdevice* device) {
  if (current.empty() || current.back() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  return *device = current.back()->device, CUDA_SUCCESS;
}
ENTRY cuCtxGetFlags(unsigned int* flags) { return *flags = 0, CUDA_SUCCESS; }
ENTRY cuCtxGetApiVersion(CUcontext, unsigned int* version) {
  return *version = 13000, CUDA_SUCCESS;
}
ENTRY cuCtxGetId(CUcontext context, unsigned long long* id) {
  return *id = 1 + reinterpret_cast<Context*>(context)->device, CUDA_SUCCESS;
}
ENTRY cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, CUDA_SUCCESS;
}
ENTRY cuCtxSynchronize() {
  M().Note("sync\tdevice");
  return M().SynchronizeDevice();
}
ENTRY cuCtxEnablePeerAccess(CUcontext, unsigned int) { return CUDA_SUCCESS; }
ENTRY cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  std::swap(*mode, this_threads_mode);
  return CUDA_SUCCESS;
}

// Kernels: PTX is interpreted, and machine code has no effect. See kernels.h.

ENTRY cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned int, CUjit_option*, void**) {
  *module = reinterpret_cast<CUmodule>(NewModule(image));
  return *module == nullptr ? CUDA_ERROR_INVALID_PTX : CUDA_SUCCESS;
}
ENTRY cuModuleLoadData(CUmodule* module, const void* image) {
  return cuModuleLoadDataEx(module, image, 0, nullptr, nullptr);
}
ENTRY cuModuleLoadFatBinary(CUmodule* module, const void* image) {
  return cuModuleLoadDataEx(module, image, 0, nullptr, nullptr);
}
ENTRY cuModuleLoad(CUmodule* module, const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
  const std::string image((std::istreambuf_iterator<char>(file)), {});
  return cuModuleLoadData(module, image.c_str());
}
ENTRY cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
ENTRY cuModuleGetLoadingMode(CUmoduleLoadingMode* mode) {
  return *mode = CU_MODULE_LAZY_LOADING, CUDA_SUCCESS;
}
ENTRY cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = reinterpret_cast<CUfunction>(KernelOf(reinterpret_cast<Module*>(module), name));
  return *function == nullptr ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}
ENTRY cuModuleGetGlobal_v2(CUdeviceptr* address, size_t* bytes, CUmodule module, const char* name) {
  const Module& of = *reinterpret_cast<Module*>(module);
  const auto found = of.globals.find(name);
  if (of.is_ptx && found == of.globals.end()) return CUDA_ERROR_NOT_FOUND;
  const auto [start, size] = of.is_ptx ? found->second : std::pair<uint64_t, uint64_t>{0, 65536};
  if (address != nullptr) {
    *address = start != 0 ? start : Address(M().Allocate(this_device, size));
  }
  if (bytes != nullptr) *bytes = size;
  return CUDA_SUCCESS;
}
ENTRY cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option*, void**, unsigned int,
                        CUlibraryOption*, void**, unsigned int) {
  *library = reinterpret_cast<CUlibrary>(NewModule(code));
  return *library == nullptr ? CUDA_ERROR_INVALID_PTX : CUDA_SUCCESS;
}
ENTRY cuLibraryUnload(CUlibrary) { return CUDA_SUCCESS; }
ENTRY cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  *kernel = reinterpret_cast<CUkernel>(KernelOf(reinterpret_cast<Module*>(library), name));
  return *kernel == nullptr ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}
ENTRY cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
  return *function = reinterpret_cast<CUfunction>(kernel), CUDA_SUCCESS;
}
ENTRY cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
           : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 32
                                                                : 0;
  return CUDA_SUCCESS;
}
ENTRY cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
ENTRY cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
ENTRY cuFuncGetName(const char** name, CUfunction function) {
  return *name = reinterpret_cast<Kernel*>(function)->name.c_str(), CUDA_SUCCESS;
}
ENTRY cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction, int, size_t) {
  return *blocks = 2, CUDA_SUCCESS;
}
ENTRY cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction, int, size_t,
                                                           unsigned int) {
  return *blocks = 2, CUDA_SUCCESS;
}
ENTRY cuLaunchKernel(CUfunction function, unsigned int gx, unsigned int gy, unsigned int gz,
                     unsigned int bx, unsigned int by, unsigned int bz, unsigned int shared,
                     CUstream stream, void** arguments, void**) {
  const Kernel* kernel = reinterpret_cast<Kernel*>(function);
  return M().Enqueue(M().Resolve(stream), "kernel " + kernel->name,
                     Prepared(*kernel, {gx, gy, gz}, {bx, by, bz}, shared, arguments));
}
ENTRY cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments,
                       void** extra) {
  return cuLaunchKernel(function, config->gridDimX, config->gridDimY, config->gridDimZ,
                        config->blockDimX, config->blockDimY, config->blockDimZ,
                        config->sharedMemBytes, config->hStream, arguments, extra);
}
ENTRY cuLaunchHostFunc(CUstream stream, CUhostFn function, void* data) {
  return M().Enqueue(M().Resolve(stream), "host function", [=] { function(data); });
}

// Errors and lookup.

ENTRY cuGetErrorName(CUresult result, const char** name) {
  return *name = standin_cuda_error_name(result), CUDA_SUCCESS;
}
ENTRY cuGetErrorString(CUresult result, const char** words) {
  return *words = standin_cuda_error_words(result), CUDA_SUCCESS;
}
ENTRY cuGetExportTable(const void**, const CUuuid*) { return CUDA_ERROR_NOT_SUPPORTED; }
extern "C" __attribute__((visibility("default"))) CUresult cuGetProcAddress_v2(
    const char* name, void** found, int, cuuint64_t, CUdriverProcAddressQueryResult* status) {
  static void* self = [] {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&cuInit), &info);
    return dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  }();
  *found = nullptr;
  for (const char* suffix : {"_v3", "_v2", ""}) {
    *found = dlsym(self, (std::string(name) + suffix).c_str());
    if (*found != nullptr) break;
  }
  if (status != nullptr) {
    *status = *found ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  }
  return *found ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
