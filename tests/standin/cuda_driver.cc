// Simulates libcuda.so.1 on host memory, for tests without a GPU.
//
// Work on a stream is complete when the call returns. The interface for tests is at the end: a log
// of the calls, injected errors, launch callbacks, and a latch that keeps work pending.

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "record.h"

namespace {

using Result = int;
using Handle = void*;

constexpr Result kSuccess = 0;
constexpr Result kInvalidValue = 1;
constexpr Result kInvalidContext = 201;
constexpr Result kInvalidHandle = 400;
constexpr Result kLaunchTimeout = 702;

struct Error {
  Result code;
  const char* name;
  const char* text;
};
constexpr Error kErrors[] = {
    {kSuccess, "CUDA_SUCCESS", "no error"},
    {kInvalidValue, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {4, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {kLaunchTimeout, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

struct Failure {
  std::string function;  // "*": any
  int remaining;         // calls until it fails, including that one
  Result code;
};

struct LaunchCallback {
  void (*run)(void*);
  void* self;
};

struct Event {
  bool recorded = false;
  bool pending = false;  // recorded while the latch was closed
};

// Leaked: handles may be destroyed while the process exits.
struct Driver {
  standin::Record record;

  std::mutex mutex;  // of all below
  std::condition_variable opened;
  bool closed = false;
  int waiting = 0;
  double timeout = 30;  // seconds; a test that never opens the latch fails instead of hanging
  bool needs_context = true;
  std::vector<Failure> failures;
  std::map<Handle, int> stream_devices;
  std::set<Handle> pending_streams;
  std::map<Handle, Event> events;
  std::map<Handle, Handle> execs;  // and their graphs
  std::map<Handle, LaunchCallback> callbacks;
  uintptr_t next_handle = 0x1000;

  Handle NewHandle() { return reinterpret_cast<Handle>(next_handle += 0x10); }
};
Driver& D() {
  static auto* driver = new Driver;
  return *driver;
}

thread_local std::vector<Handle> contexts;

Handle ContextOf(int device) { return reinterpret_cast<Handle>(uintptr_t{0xC0DE0} + device); }

int DeviceOf(Handle context) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(context) - uintptr_t{0xC0DE0});
}

template <typename... Arguments>
std::string Joined(Arguments... arguments) {
  std::ostringstream text;
  text << std::hex << std::showbase;
  const char* separator = "";
  ((text << separator << reinterpret_cast<uintptr_t>(arguments), separator = " "), ...);
  return text.str();
}
uintptr_t Number(uint64_t number) { return number; }

// Runs `body`, unless a failure is injected, and logs the call with its result.
template <typename Body>
Result Call(const char* function, const std::string& arguments, Body body) {
  Driver& driver = D();
  Result planned = kSuccess;
  {
    const std::lock_guard lock(driver.mutex);
    for (Failure& failure : driver.failures) {
      if (failure.function != "*" && failure.function != function) continue;
      if (--failure.remaining == 0) planned = failure.code;
    }
  }
  const Result result = planned == kSuccess ? body() : planned;
  driver.record.Add(std::string(function) + '\t' + arguments + '\t' + std::to_string(result));
  return result;
}

template <typename Body>
Result LockedCall(const char* function, const std::string& arguments, Body body) {
  return Call(function, arguments, [&] {
    const std::lock_guard lock(D().mutex);
    return body(D());
  });
}

bool LacksContext(const Driver& driver) { return driver.needs_context && contexts.empty(); }

void Enqueue(Driver& driver, Handle stream) {
  if (driver.closed) driver.pending_streams.insert(stream);
}

// Waits while the latch is closed and `pending` returns true.
template <typename Pending>
Result Await(Pending pending) {
  Driver& driver = D();
  std::unique_lock lock(driver.mutex);
  ++driver.waiting;
  const bool done = driver.opened.wait_for(lock, std::chrono::duration<double>(driver.timeout),
                                           [&] { return !driver.closed || !pending(driver); });
  --driver.waiting;
  return done ? kSuccess : kLaunchTimeout;
}

const Error* Find(Result code) {
  for (const Error& error : kErrors) {
    if (error.code == code) return &error;
  }
  return nullptr;
}

}  // namespace

// The driver's API. Handles are void*, a CUdeviceptr is a 64-bit integer.

STANDIN_EXPORT Result cuStreamGetCtx(Handle stream, Handle* context) {
  return LockedCall("cuStreamGetCtx", Joined(stream), [&](Driver& driver) {
    const auto found = driver.stream_devices.find(stream);
    *context = ContextOf(found == driver.stream_devices.end() ? 0 : found->second);
    return kSuccess;
  });
}

STANDIN_EXPORT Result cuStreamCreate(Handle* stream, unsigned flags) {
  return LockedCall("cuStreamCreate", Joined(Number(flags)), [&](Driver& driver) {
    if (LacksContext(driver)) return kInvalidContext;
    *stream = driver.NewHandle();
    if (!contexts.empty()) driver.stream_devices[*stream] = DeviceOf(contexts.back());
    return kSuccess;
  });
}

STANDIN_EXPORT Result cuCtxPushCurrent_v2(Handle context) {
  return Call("cuCtxPushCurrent_v2", Joined(context), [&] {
    if (context == nullptr) return kInvalidContext;
    contexts.push_back(context);
    return kSuccess;
  });
}

STANDIN_EXPORT Result cuCtxPopCurrent_v2(Handle* context) {
  return Call("cuCtxPopCurrent_v2", "", [&] {
    if (contexts.empty()) return kInvalidContext;
    if (context != nullptr) *context = contexts.back();
    contexts.pop_back();
    return kSuccess;
  });
}

STANDIN_EXPORT Result cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes,
                                           Handle stream) {
  const auto arguments = Joined(Number(to), Number(from), Number(bytes), stream);
  return LockedCall("cuMemcpyDtoDAsync_v2", arguments, [&](Driver& driver) {
    if (LacksContext(driver)) return kInvalidContext;
    if (bytes > 0 && (to == 0 || from == 0)) return kInvalidValue;
    if (bytes > 0) {
      std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
    }
    Enqueue(driver, stream);
    return kSuccess;
  });
}

STANDIN_EXPORT Result cuGraphInstantiateWithFlags(Handle* exec, Handle graph,
                                                  unsigned long long flags) {
  const auto arguments = Joined(graph, Number(flags));
  return LockedCall("cuGraphInstantiateWithFlags", arguments, [&](Driver& driver) {
    if (LacksContext(driver)) return kInvalidContext;
    if (graph == nullptr) return kInvalidValue;
    *exec = driver.NewHandle();
    driver.execs[*exec] = graph;
    return kSuccess;
  });
}

STANDIN_EXPORT Result cuGraphLaunch(Handle exec, Handle stream) {
  return Call("cuGraphLaunch", Joined(exec, stream), [&] {
    LaunchCallback callback{};
    {
      Driver& driver = D();
      const std::lock_guard lock(driver.mutex);
      const auto found = driver.execs.find(exec);
      if (found == driver.execs.end()) return kInvalidHandle;
      if (LacksContext(driver)) return kInvalidContext;
      const auto registered = driver.callbacks.find(found->second);
      if (registered != driver.callbacks.end()) callback = registered->second;
      Enqueue(driver, stream);
    }
    if (callback.run != nullptr) callback.run(callback.self);
    return kSuccess;
  });
}

STANDIN_EXPORT Result cuGraphExecDestroy(Handle exec) {
  return LockedCall("cuGraphExecDestroy", Joined(exec), [&](Driver& driver) {
    return driver.execs.erase(exec) == 1 ? kSuccess : kInvalidHandle;
  });
}

STANDIN_EXPORT Result cuEventCreate(Handle* event, unsigned flags) {
  return LockedCall("cuEventCreate", Joined(Number(flags)), [&](Driver& driver) {
    if (LacksContext(driver)) return kInvalidContext;
    *event = driver.NewHandle();
    driver.events[*event] = {};
    return kSuccess;
  });
}

STANDIN_EXPORT Result cuEventRecord(Handle event, Handle stream) {
  return LockedCall("cuEventRecord", Joined(event, stream), [&](Driver& driver) {
    const auto found = driver.events.find(event);
    if (found == driver.events.end()) return kInvalidHandle;
    if (LacksContext(driver)) return kInvalidContext;
    found->second = {true, driver.closed};
    return kSuccess;
  });
}

STANDIN_EXPORT Result cuEventSynchronize(Handle event) {
  return Call("cuEventSynchronize", Joined(event), [&] {
    {
      const std::lock_guard lock(D().mutex);
      if (D().events.count(event) == 0) return kInvalidHandle;
    }
    return Await([&](Driver& driver) {
      const auto found = driver.events.find(event);
      return found != driver.events.end() && found->second.pending;
    });
  });
}

STANDIN_EXPORT Result cuEventDestroy_v2(Handle event) {
  return LockedCall("cuEventDestroy_v2", Joined(event), [&](Driver& driver) {
    return driver.events.erase(event) == 1 ? kSuccess : kInvalidHandle;
  });
}

STANDIN_EXPORT Result cuStreamWaitEvent(Handle stream, Handle event, unsigned flags) {
  const auto arguments = Joined(stream, event, Number(flags));
  return LockedCall("cuStreamWaitEvent", arguments, [&](Driver& driver) {
    const auto found = driver.events.find(event);
    if (found == driver.events.end()) return kInvalidHandle;
    if (LacksContext(driver)) return kInvalidContext;
    if (found->second.pending) Enqueue(driver, stream);
    return kSuccess;
  });
}

STANDIN_EXPORT Result cuStreamSynchronize(Handle stream) {
  return Call("cuStreamSynchronize", Joined(stream), [&] {
    return Await([&](Driver& driver) { return driver.pending_streams.count(stream) > 0; });
  });
}

STANDIN_EXPORT Result cuGetErrorName(Result code, const char** name) {
  return Call("cuGetErrorName", Joined(Number(code)), [&] {
    const Error* error = Find(code);
    *name = error != nullptr ? error->name : nullptr;
    return error != nullptr ? kSuccess : kInvalidValue;
  });
}

STANDIN_EXPORT Result cuGetErrorString(Result code, const char** text) {
  return Call("cuGetErrorString", Joined(Number(code)), [&] {
    const Error* error = Find(code);
    *text = error != nullptr ? error->text : nullptr;
    return error != nullptr ? kSuccess : kInvalidValue;
  });
}

// The interface for tests.

STANDIN_EXPORT void standin_reset() {
  Driver& driver = D();
  driver.record.Clear();
  const std::lock_guard lock(driver.mutex);
  driver.closed = false;
  driver.timeout = 30;
  driver.needs_context = true;
  driver.failures.clear();
  driver.stream_devices.clear();
  driver.pending_streams.clear();
  driver.events.clear();
  driver.execs.clear();
  driver.callbacks.clear();
  driver.opened.notify_all();
}

STANDIN_EXPORT size_t standin_log(char* to, size_t size) { return D().record.Copy(to, size); }

// The n-th next call of the function, or of any with "*", returns `code` and does nothing.
STANDIN_EXPORT void standin_fail(const char* function, int nth, int code) {
  const std::lock_guard lock(D().mutex);
  D().failures.push_back({function, nth, code});
}

STANDIN_EXPORT void standin_on_launch(Handle graph, void (*run)(void*), void* self) {
  const std::lock_guard lock(D().mutex);
  D().callbacks[graph] = {run, self};
}

// Assigns a stream to a device; without it, streams belong to device 0.
STANDIN_EXPORT void standin_place_stream(Handle stream, int device) {
  const std::lock_guard lock(D().mutex);
  D().stream_devices[stream] = device;
}

STANDIN_EXPORT Handle standin_context(int device) { return ContextOf(device); }

// Whether calls fail without a current context, as in the real driver. The default is true.
STANDIN_EXPORT void standin_need_context(int needed) {
  const std::lock_guard lock(D().mutex);
  D().needs_context = needed != 0;
}

// The number of contexts that the calling thread has pushed and not popped.
STANDIN_EXPORT int standin_context_depth() { return static_cast<int>(contexts.size()); }

STANDIN_EXPORT int standin_live_events() {
  const std::lock_guard lock(D().mutex);
  return static_cast<int>(D().events.size());
}

STANDIN_EXPORT int standin_live_execs() {
  const std::lock_guard lock(D().mutex);
  return static_cast<int>(D().execs.size());
}

// Work enqueued and events recorded from now on stay pending until the latch opens. Synchronising
// with them blocks, for at most `timeout` seconds.
STANDIN_EXPORT void standin_close_latch(double timeout) {
  const std::lock_guard lock(D().mutex);
  D().closed = true;
  D().timeout = timeout;
}

STANDIN_EXPORT void standin_open_latch() {
  Driver& driver = D();
  const std::lock_guard lock(driver.mutex);
  driver.closed = false;
  driver.pending_streams.clear();
  for (auto& [handle, event] : driver.events) event.pending = false;
  driver.opened.notify_all();
}

// The number of threads that wait for the latch.
STANDIN_EXPORT int standin_waiting() {
  const std::lock_guard lock(D().mutex);
  return D().waiting;
}
