#include "hooks.h"

#include <memory>

#include "entry.h"

EXPORT size_t standin_cuda_log(char* to, size_t size) { return M().CopyLog(to, size); }
EXPORT void standin_cuda_clear_log() { M().ClearLog(); }
EXPORT void standin_cuda_note(const char* line) { M().Note(line); }

EXPORT void* standin_cuda_host(const void* address) { return Machine::Host(address); }

EXPORT int standin_cuda_drain(void* stream) {
  return M().Drain(M().Resolve(static_cast<CUstream>(stream)));
}

EXPORT int standin_cuda_node(void* stream, const char* name, void (*run)(void*), void* data,
                             void (*drop)(void*)) {
  const std::shared_ptr<void> owned(data, drop);
  Stream* on = M().Resolve(static_cast<CUstream>(stream));
  std::function<void()> again;
  if (on->capture != nullptr) again = [=] { run(owned.get()); };
  return M().Enqueue(on, name, again);
}

EXPORT void standin_cuda_fault(int error) { M().fault = static_cast<CUresult>(error); }

namespace {

struct Words {
  int error;
  const char* name;
  const char* words;
};
constexpr Words kWords[] = {
    {0, "cudaSuccess", "no error"},
    {1, "cudaErrorInvalidValue", "invalid argument"},
    {2, "cudaErrorMemoryAllocation", "out of memory"},
    {101, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {600, "cudaErrorNotReady", "device not ready"},
    {710, "cudaErrorAssert", "device-side assert triggered"},
    {801, "cudaErrorNotSupported", "operation not supported"},
    {900, "cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"},
    {901, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {904, "cudaErrorStreamCaptureUnjoined", "capturing stream has unjoined work"},
    {905, "cudaErrorStreamCaptureIsolation",
     "dependency created on uncaptured work in another stream"},
};

const Words& WordsOf(int error) {
  static constexpr Words kOther = {-1, "cudaErrorUnknown", "an error of the stand-in's"};
  for (const Words& words : kWords) {
    if (words.error == error) return words;
  }
  return kOther;
}

}  // namespace

EXPORT const char* standin_cuda_error_name(int error) { return WordsOf(error).name; }
EXPORT const char* standin_cuda_error_words(int error) { return WordsOf(error).words; }
