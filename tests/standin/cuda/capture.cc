// Captures: what a stream is given becomes the nodes of a graph, and what a capture forbids voids
// it.

#include <algorithm>

#include "device.h"

namespace standin {

CUresult Machine::BeginCapture(Stream* stream, CUstreamCaptureMode mode) {
  const std::lock_guard lock(mutex);
  Note("capture\tbegin");
  if (stream->is_legacy) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (stream->capture != nullptr) return CUDA_ERROR_ILLEGAL_STATE;
  auto capture = std::make_unique<Capture>();
  capture->id = ++captures_made_;
  capture->mode = mode;
  capture->thread = ThisThread();
  capture->origin = stream;
  capture->graph = std::make_unique<Graph>();
  capture->streams = {stream};
  stream->capture = capture.get();
  captures_.push_back(std::move(capture));
  return CUDA_SUCCESS;
}

CUresult Machine::EndCapture(Stream* stream, Graph** graph) {
  const std::lock_guard lock(mutex);
  *graph = nullptr;
  Capture* capture = stream->capture;
  if (capture == nullptr) return CUDA_ERROR_ILLEGAL_STATE;
  if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED && capture->thread != ThisThread()) {
    Void(capture);
    return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
  }
  if (stream != capture->origin) {
    Void(capture);
    return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
  }
  for (Stream* other : capture->streams) other->capture = nullptr;
  CUresult result = CUDA_SUCCESS;
  if (capture->is_void) {
    result = CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  } else if (!capture->unjoined.empty()) {
    result = CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
  } else {
    *graph = capture->graph.release();
  }
  Note("capture\tend " + std::to_string(result));
  // Kept: events recorded in it name it.
  static auto* ended = new std::vector<std::unique_ptr<Capture>>;
  const auto found = std::find_if(captures_.begin(), captures_.end(),
                                  [&](const auto& other) { return other.get() == capture; });
  ended->push_back(std::move(*found));
  captures_.erase(found);
  return result;
}

CUstreamCaptureStatus Machine::Status(Stream* stream, uint64_t* id, Graph** graph) {
  const std::lock_guard lock(mutex);
  const Capture* capture = stream->capture;
  if (capture == nullptr) return CU_STREAM_CAPTURE_STATUS_NONE;
  if (id != nullptr) *id = capture->id;
  if (graph != nullptr) *graph = capture->graph.get();
  return capture->is_void ? CU_STREAM_CAPTURE_STATUS_INVALIDATED : CU_STREAM_CAPTURE_STATUS_ACTIVE;
}

CUresult Machine::Unsafe(const char* name) {
  const std::lock_guard lock(mutex);
  if (this_threads_mode == CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_SUCCESS;
  bool forbidden = false;
  for (const auto& capture : captures_) {
    const bool own = capture->thread == ThisThread();
    const bool others = capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL &&
                        this_threads_mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
    if (capture->mode == CU_STREAM_CAPTURE_MODE_RELAXED || !(own || others)) continue;
    Void(capture.get());
    forbidden = true;
  }
  if (!forbidden) return CUDA_SUCCESS;
  Note(std::string("unsafe\t") + name);
  return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

}  // namespace standin
