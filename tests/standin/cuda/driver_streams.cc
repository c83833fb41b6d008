// The driver's entry points: streams, events, captures and graphs.

#include "entry.h"

// Streams and events.

ENTRY cuStreamCreateWithPriority(CUstream* stream, unsigned int flags, int priority) {
  return *stream = reinterpret_cast<CUstream>(M().NewStream(flags, priority)), CUDA_SUCCESS;
}
ENTRY cuStreamCreate(CUstream* stream, unsigned int flags) {
  return cuStreamCreateWithPriority(stream, flags, 0);
}
ENTRY cuStreamDestroy_v2(CUstream stream) {
  return M().DeleteStream(M().Resolve(stream)), CUDA_SUCCESS;
}
ENTRY cuStreamSynchronize(CUstream stream) { return M().Synchronize(M().Resolve(stream)); }
ENTRY cuStreamQuery(CUstream stream) { return M().Query(M().Resolve(stream)); }
ENTRY cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int) {
  return M().Wait(M().Resolve(stream), reinterpret_cast<Event*>(event));
}
ENTRY cuStreamGetPriority(CUstream stream, int* priority) {
  return *priority = M().Resolve(stream)->priority, CUDA_SUCCESS;
}
ENTRY cuStreamGetFlags(CUstream stream, unsigned int* flags) {
  return *flags = M().Resolve(stream)->blocks ? 0 : CU_STREAM_NON_BLOCKING, CUDA_SUCCESS;
}
ENTRY cuStreamGetCtx(CUstream stream, CUcontext* context) {
  return *context = Handle(&contexts[M().Resolve(stream)->device]), CUDA_SUCCESS;
}
ENTRY cuStreamGetId(CUstream stream, unsigned long long* id) {
  return *id = reinterpret_cast<uintptr_t>(stream), CUDA_SUCCESS;
}
ENTRY cuEventCreate(CUevent* event, unsigned int) {
  auto* made = new Event;
  made->device = this_device;
  return *event = reinterpret_cast<CUevent>(made), CUDA_SUCCESS;
}
ENTRY cuEventDestroy_v2(CUevent) { return CUDA_SUCCESS; }  // leaked: work may still name it
ENTRY cuEventRecord(CUevent event, CUstream stream) {
  return M().Record(reinterpret_cast<Event*>(event), M().Resolve(stream));
}
ENTRY cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned int) {
  return cuEventRecord(event, stream);
}
ENTRY cuEventQuery(CUevent event) { return M().Query(reinterpret_cast<Event*>(event)); }
ENTRY cuEventSynchronize(CUevent event) { return M().Synchronize(reinterpret_cast<Event*>(event)); }
ENTRY cuEventElapsedTime_v2(float* ms, CUevent from, CUevent to) {
  *ms = 1e3f * static_cast<float>(reinterpret_cast<Event*>(to)->when -
                                  reinterpret_cast<Event*>(from)->when);
  return CUDA_SUCCESS;
}
#undef cuEventElapsedTime
ENTRY cuEventElapsedTime(float* ms, CUevent from, CUevent to) {
  return cuEventElapsedTime_v2(ms, from, to);
}

// Captures and graphs.

ENTRY cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode mode) {
  return M().BeginCapture(M().Resolve(stream), mode);
}
ENTRY cuStreamEndCapture(CUstream stream, CUgraph* graph) {
  return M().EndCapture(M().Resolve(stream), reinterpret_cast<Graph**>(graph));
}
ENTRY cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return *status = M().Status(M().Resolve(stream), nullptr, nullptr), CUDA_SUCCESS;
}
ENTRY cuStreamGetCaptureInfo_v3(CUstream stream, CUstreamCaptureStatus* status, cuuint64_t* id,
                                CUgraph* graph, const CUgraphNode** nodes,
                                const CUgraphEdgeData** edges, size_t* count) {
  uint64_t found = 0;
  *status = M().Status(M().Resolve(stream), &found, reinterpret_cast<Graph**>(graph));
  if (id != nullptr) *id = found;
  if (nodes != nullptr) *nodes = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (count != nullptr) *count = 0;
  return CUDA_SUCCESS;
}
ENTRY cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph graph, unsigned long long) {
  M().Note("instantiate\t");
  *exec = reinterpret_cast<CUgraphExec>(new Exec{reinterpret_cast<Graph*>(graph)->nodes});
  return CUDA_SUCCESS;
}
ENTRY cuGraphLaunch(CUgraphExec exec, CUstream stream) {
  return M().Launch(M().Resolve(stream), *reinterpret_cast<Exec*>(exec));
}
ENTRY cuGraphExecDestroy(CUgraphExec exec) {
  return delete reinterpret_cast<Exec*>(exec), CUDA_SUCCESS;
}
ENTRY cuGraphDestroy(CUgraph graph) { return delete reinterpret_cast<Graph*>(graph), CUDA_SUCCESS; }
ENTRY cuGraphGetNodes(CUgraph graph, CUgraphNode*, size_t* count) {
  return *count = reinterpret_cast<Graph*>(graph)->nodes.size(), CUDA_SUCCESS;
}
