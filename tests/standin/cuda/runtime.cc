// The runtime's entry points that torch and XLA use, over the driver's.

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "hooks.h"

#define RUNTIME extern "C" __attribute__((visibility("default")))
#define ENTRY RUNTIME cudaError_t

namespace {

thread_local cudaError_t last_error = cudaSuccess;
thread_local int device = -1;

cudaError_t Error(CUresult result) {
  // The numbers are the same, but for a few that nothing here gives.
  const auto error = static_cast<cudaError_t>(result);
  if (error != cudaSuccess) last_error = error;
  return error;
}

// The runtime makes the device's context current when a thread first needs one.
void Enter() {
  CUcontext context = nullptr;
  cuCtxGetCurrent(&context);
  if (context != nullptr) return;
  cuDevicePrimaryCtxRetain(&context, device < 0 ? 0 : device);
  cuCtxSetCurrent(context);
}

CUdeviceptr Address(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

std::mutex mutex;
std::map<const void*, CUfunction>& Functions() {
  static auto* functions = new std::map<const void*, CUfunction>;
  return *functions;
}

CUfunction FunctionOf(const void* stub) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = Functions().find(stub);
  return found == Functions().end() ? reinterpret_cast<CUfunction>(const_cast<void*>(stub))
                                    : found->second;
}

}  // namespace

ENTRY cudaGetDeviceCount(int* count) { return Error(cuDeviceGetCount(count)); }
ENTRY cudaGetDevice(int* ordinal) {
  CUdevice found = 0;
  CUcontext context = nullptr;
  cuCtxGetCurrent(&context);
  if (context != nullptr)
    cuCtxGetDevice(&found);
  else
    found = device < 0 ? 0 : device;
  return *ordinal = found, cudaSuccess;
}
ENTRY cudaSetDevice(int ordinal) {
  int count = 0;
  cuDeviceGetCount(&count);
  if (ordinal < 0 || ordinal >= count) return Error(CUDA_ERROR_INVALID_DEVICE);
  CUcontext context = nullptr;
  cuDevicePrimaryCtxRetain(&context, ordinal);
  device = ordinal;
  return Error(cuCtxSetCurrent(context));
}
ENTRY cudaGetDeviceProperties(cudaDeviceProp* properties, int ordinal) {
  std::memset(properties, 0, sizeof(*properties));
  cuDeviceGetName(properties->name, sizeof(properties->name), ordinal);
  cuDeviceGetUuid(reinterpret_cast<CUuuid*>(&properties->uuid), ordinal);
  cuDeviceTotalMem(&properties->totalGlobalMem, ordinal);
  const auto get = [&](CUdevice_attribute attribute) {
    int value = 0;
    cuDeviceGetAttribute(&value, attribute, ordinal);
    return value;
  };
  properties->sharedMemPerBlock = get(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK);
  properties->regsPerBlock = get(CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK);
  properties->warpSize = get(CU_DEVICE_ATTRIBUTE_WARP_SIZE);
  properties->maxThreadsPerBlock = get(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 2147483647;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->totalConstMem = 65536;
  properties->major = get(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  properties->minor = get(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  properties->multiProcessorCount = get(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  properties->l2CacheSize = get(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
  properties->maxThreadsPerMultiProcessor = get(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR);
  properties->sharedMemPerMultiprocessor =
      get(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR);
  properties->sharedMemPerBlockOptin = get(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
  properties->regsPerMultiprocessor = get(CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR);
  properties->maxBlocksPerMultiProcessor = get(CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR);
  properties->memoryBusWidth = get(CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
  properties->unifiedAddressing = properties->concurrentKernels = 1;
  properties->streamPrioritiesSupported = properties->memoryPoolsSupported = 1;
  properties->pciBusID = ordinal + 1;
  return cudaSuccess;
}
ENTRY cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int ordinal) {
  return Error(cuDeviceGetAttribute(value, static_cast<CUdevice_attribute>(attribute), ordinal));
}
ENTRY cudaDeviceGetPCIBusId(char* id, int size, int ordinal) {
  return Error(cuDeviceGetPCIBusId(id, size, ordinal));
}
ENTRY cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
ENTRY cudaDeviceEnablePeerAccess(int, unsigned int) { return cudaSuccess; }
ENTRY cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
ENTRY cudaDeviceSynchronize() { return Enter(), Error(cuCtxSynchronize()); }
ENTRY cudaDriverGetVersion(int* version) { return Error(cuDriverGetVersion(version)); }
ENTRY cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
ENTRY cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return Error(cuThreadExchangeStreamCaptureMode(reinterpret_cast<CUstreamCaptureMode*>(mode)));
}
ENTRY cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned int version,
                                       unsigned long long flags,
                                       cudaDriverEntryPointQueryResult* status) {
  CUdriverProcAddressQueryResult result{};
  const CUresult error = cuGetProcAddress(name, found, version, flags, &result);
  if (status != nullptr) *status = static_cast<cudaDriverEntryPointQueryResult>(result);
  return static_cast<cudaError_t>(error);
}
ENTRY cudaGetDriverEntryPoint(const char* name, void** found, unsigned long long flags,
                              cudaDriverEntryPointQueryResult* status) {
  return cudaGetDriverEntryPointByVersion(name, found, 13000, flags, status);
}

// Errors.

ENTRY cudaGetLastError() {
  const cudaError_t error = last_error;
  return last_error = cudaSuccess, error;
}
ENTRY cudaPeekAtLastError() { return last_error; }
RUNTIME const char* cudaGetErrorName(cudaError_t error) { return standin_cuda_error_name(error); }
RUNTIME const char* cudaGetErrorString(cudaError_t error) {
  return standin_cuda_error_words(error);
}

// Memory.

ENTRY cudaMalloc(void** made, size_t bytes) {
  return Enter(), Error(cuMemAlloc(reinterpret_cast<CUdeviceptr*>(made), bytes));
}
ENTRY cudaFree(void* address) { return Enter(), Error(cuMemFree(Address(address))); }
ENTRY cudaMallocAsync(void** made, size_t bytes, cudaStream_t stream) {
  return Enter(), Error(cuMemAllocAsync(reinterpret_cast<CUdeviceptr*>(made), bytes, stream));
}
ENTRY cudaFreeAsync(void* address, cudaStream_t stream) {
  return Enter(), Error(cuMemFreeAsync(Address(address), stream));
}
ENTRY cudaHostAlloc(void** made, size_t bytes, unsigned int flags) {
  return Enter(), Error(cuMemHostAlloc(made, bytes, flags));
}
ENTRY cudaFreeHost(void* made) { return Error(cuMemFreeHost(made)); }
ENTRY cudaHostRegister(void*, size_t, unsigned int) { return cudaSuccess; }
ENTRY cudaHostUnregister(void*) { return cudaSuccess; }
ENTRY cudaMemGetInfo(size_t* left, size_t* total) {
  return Enter(), Error(cuMemGetInfo(left, total));
}
ENTRY cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int ordinal) {
  return Error(cuDeviceGetDefaultMemPool(reinterpret_cast<CUmemoryPool*>(pool), ordinal));
}
ENTRY cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
  return *static_cast<uint64_t*>(value) = 0, cudaSuccess;
}
ENTRY cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
ENTRY cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) { return cudaSuccess; }
ENTRY cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
ENTRY cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  std::memset(attributes, 0, sizeof(*attributes));
  int ordinal = 0;
  const bool is_device = cuPointerGetAttribute(&ordinal, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
                                               Address(pointer)) == CUDA_SUCCESS;
  attributes->type = is_device ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  attributes->device = is_device ? ordinal : -2;
  if (is_device)
    attributes->devicePointer = const_cast<void*>(pointer);
  else
    attributes->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}
ENTRY cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                      cudaStream_t stream) {
  return Enter(), Error(cuMemcpyAsync(Address(to), Address(from), bytes, stream));
}
ENTRY cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return Enter(), Error(cuMemcpy(Address(to), Address(from), bytes));
}
ENTRY cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  return Enter(), Error(cuMemcpyAsync(Address(to), Address(from), bytes, stream));
}
ENTRY cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) {
  return cudaSuccess;
}
ENTRY cudaGetSymbolAddress(void** address, const void*) { return cudaMalloc(address, 4096); }
ENTRY cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return Enter(),
         Error(cuMemsetD8Async(Address(to), static_cast<unsigned char>(value), bytes, stream));
}
ENTRY cudaMemset(void* to, int value, size_t bytes) {
  return cudaMemsetAsync(to, value, bytes, nullptr);
}

// Streams and events.

ENTRY cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned int flags, int priority) {
  return Enter(), Error(cuStreamCreateWithPriority(stream, flags, priority));
}
ENTRY cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
ENTRY cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
ENTRY cudaStreamDestroy(cudaStream_t stream) { return Error(cuStreamDestroy(stream)); }
ENTRY cudaStreamQuery(cudaStream_t stream) { return Enter(), Error(cuStreamQuery(stream)); }
ENTRY cudaStreamSynchronize(cudaStream_t stream) {
  return Enter(), Error(cuStreamSynchronize(stream));
}
ENTRY cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  return Error(cuStreamGetPriority(stream, priority));
}
ENTRY cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int flags) {
  return Enter(), Error(cuStreamWaitEvent(stream, event, flags));
}
ENTRY cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data,
                            unsigned int) {
  struct Call {
    cudaStreamCallback_t callback;
    cudaStream_t stream;
    void* data;
  };
  Enter();
  return Error(cuLaunchHostFunc(
      stream,
      [](void* call) {
        auto* made = static_cast<Call*>(call);
        made->callback(made->stream, cudaSuccess, made->data);
        delete made;
      },
      new Call{callback, stream, data}));
}
ENTRY cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return Enter(), Error(cuLaunchHostFunc(stream, function, data));
}
ENTRY cudaEventCreateWithFlags(cudaEvent_t* event, unsigned int flags) {
  return Enter(), Error(cuEventCreate(event, flags));
}
ENTRY cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
ENTRY cudaEventDestroy(cudaEvent_t event) { return Error(cuEventDestroy(event)); }
ENTRY cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return Enter(), Error(cuEventRecord(event, stream));
}
ENTRY cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned int) {
  return cudaEventRecord(event, stream);
}
ENTRY cudaEventQuery(cudaEvent_t event) { return Error(cuEventQuery(event)); }
ENTRY cudaEventSynchronize(cudaEvent_t event) { return Error(cuEventSynchronize(event)); }
ENTRY cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
  return Error(cuEventElapsedTime(ms, from, to));
}

// Captures and graphs.

ENTRY cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  return Enter(), Error(cuStreamBeginCapture(stream, static_cast<CUstreamCaptureMode>(mode)));
}
ENTRY cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  return Error(cuStreamEndCapture(stream, graph));
}
ENTRY cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return Enter(),
         Error(cuStreamIsCapturing(stream, reinterpret_cast<CUstreamCaptureStatus*>(status)));
}
ENTRY cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                               unsigned long long* id, cudaGraph_t* graph,
                               const cudaGraphNode_t** nodes, const cudaGraphEdgeData**,
                               size_t* count) {
  return Enter(), Error(cuStreamGetCaptureInfo(
                      stream, reinterpret_cast<CUstreamCaptureStatus*>(status),
                      reinterpret_cast<cuuint64_t*>(id), graph, nodes, nullptr, count));
}
ENTRY cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph,
                                    unsigned long long flags) {
  return Error(cuGraphInstantiateWithFlags(exec, graph, flags));
}
ENTRY cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  return Enter(), Error(cuGraphLaunch(exec, stream));
}
ENTRY cudaGraphExecDestroy(cudaGraphExec_t exec) { return Error(cuGraphExecDestroy(exec)); }
ENTRY cudaGraphDestroy(cudaGraph_t graph) { return Error(cuGraphDestroy(graph)); }
ENTRY cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  return Error(cuGraphGetNodes(graph, nodes, count));
}

// Kernels.

RUNTIME void** __cudaRegisterFatBinary(void*) {
  CUmodule module = nullptr;
  cuModuleLoadData(&module, nullptr);
  return reinterpret_cast<void**>(module);
}
RUNTIME void __cudaRegisterFatBinaryEnd(void**) {}
RUNTIME void __cudaUnregisterFatBinary(void**) {}
RUNTIME void __cudaRegisterFunction(void** module, const char* stub, char*, const char* name, int,
                                    void*, void*, void*, void*, int*) {
  const std::lock_guard<std::mutex> lock(mutex);
  cuModuleGetFunction(&Functions()[stub], reinterpret_cast<CUmodule>(module), name);
}
RUNTIME void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
RUNTIME char __cudaInitModule(void**) { return 1; }

namespace {
struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local Configuration pushed;
}  // namespace

RUNTIME unsigned int __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                                 cudaStream_t stream) {
  return pushed = {grid, block, shared, stream}, 0;
}
ENTRY __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}
ENTRY cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared,
                       cudaStream_t stream) {
  Enter();
  return Error(cuLaunchKernel(FunctionOf(stub), grid.x, grid.y, grid.z, block.x, block.y, block.z,
                              static_cast<unsigned int>(shared), stream, arguments, nullptr));
}
ENTRY __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  return *kernel = reinterpret_cast<cudaKernel_t>(FunctionOf(stub)), cudaSuccess;
}
ENTRY __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                         size_t shared, cudaStream_t stream) {
  Enter();
  return Error(cuLaunchKernel(reinterpret_cast<CUfunction>(kernel), grid.x, grid.y, grid.z, block.x,
                              block.y, block.z, static_cast<unsigned int>(shared), stream,
                              arguments, nullptr));
}
ENTRY cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** arguments) {
  return cudaLaunchKernel(stub, config->gridDim, config->blockDim, arguments,
                          config->dynamicSmemBytes, config->stream);
}
ENTRY cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  std::memset(attributes, 0, sizeof(*attributes));
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}
ENTRY cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
ENTRY cudaGetFuncBySymbol(cudaFunction_t* function, const void* stub) {
  return *function = FunctionOf(stub), cudaSuccess;
}
ENTRY cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t,
                                                             unsigned int) {
  return *blocks = 2, cudaSuccess;
}
ENTRY cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  return *blocks = 2, cudaSuccess;
}
