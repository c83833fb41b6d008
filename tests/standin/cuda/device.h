// CUDA devices played over the host's memory: memory that the host cannot touch, streams whose work
// is done later and by another thread, events, and captures. What the driver's and the runtime's
// entry points share.

#ifndef TORCHCALL_STANDIN_CUDA_DEVICE_H_
#define TORCHCALL_STANDIN_CUDA_DEVICE_H_

#include <cuda.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace standin {

constexpr int kDevices = 2;
constexpr size_t kMemory = size_t{16} << 30;  // of each device; nothing is taken before it is used

// One piece of work of a stream, or one node of a graph.
struct Work {
  std::string name;
  std::function<void()> run;
};

struct Graph {
  std::vector<Work> nodes;  // in an order that their dependencies allow
};

struct Exec {
  std::vector<Work> nodes;
};

// A capture and the streams that take part in it.
struct Capture {
  uint64_t id;
  CUstreamCaptureMode mode;
  uint64_t thread;
  struct Stream* origin;
  std::unique_ptr<Graph> graph;
  bool is_void = false;
  std::set<struct Stream*> streams;
  std::set<struct Stream*> unjoined;  // forked, and with work that the origin has not waited for
};

struct Event {
  int device = 0;
  uint64_t recorded = 0;  // how often, and how often the device came past
  uint64_t passed = 0;
  Capture* capture = nullptr;      // where it was recorded last, if in a capture
  std::set<struct Stream*> after;  // the forked streams whose work that record follows
  double when = 0;
};

struct Stream {
  struct Item {
    enum Kind { kWork, kRecord, kWait } kind;
    Work work;
    Event* event = nullptr;
    uint64_t version = 0;
    uint64_t order = 0;
  };
  int device = 0;
  bool is_legacy = false;
  bool blocks = false;  // waits for the legacy stream, which waits for it
  int priority = 0;
  std::deque<Item> items;  // the first may be in work
  Capture* capture = nullptr;
};

// Everything of the process's. Leaked: programs come here while they end.
class Machine {
 public:
  static Machine& Get();

  // Memory. Addresses are the device's: `Host` gives the same memory as the device thread sees it,
  // and null for an address that is no device's.
  void* Allocate(int device, size_t bytes);
  bool Free(void* address);
  size_t FreeBytes(int device);
  static char* Host(const void* address);
  static int DeviceOf(const void* address);  // -1: none
  // Null where the bytes are inside one allocation, else what is wrong.
  const char* Wrong(const void* address, size_t bytes);
  // Host memory that the device reads when it comes to it.
  void Pin(void* memory, size_t bytes);
  void Unpin(void* memory);
  bool IsPinned(const void* memory);
  bool Range(const void* address, void** start, size_t* bytes);

  // Streams. `Enqueue` adds a node where the stream is captured.
  Stream* Resolve(CUstream stream);
  Stream* NewStream(unsigned int flags, int priority);
  void DeleteStream(Stream* stream);
  CUresult Enqueue(Stream* stream, std::string name, std::function<void()> run);
  CUresult Launch(Stream* stream, const Exec& exec);
  CUresult Synchronize(Stream* stream);
  CUresult Drain(Stream* stream);
  CUresult SynchronizeDevice();
  CUresult Query(Stream* stream);

  CUresult Record(Event* event, Stream* stream);
  CUresult Wait(Stream* stream, Event* event);
  CUresult Synchronize(Event* event);
  CUresult Query(Event* event);

  CUresult BeginCapture(Stream* stream, CUstreamCaptureMode mode);
  CUresult EndCapture(Stream* stream, Graph** graph);
  CUstreamCaptureStatus Status(Stream* stream, uint64_t* id, Graph** graph);
  // What this thread may not do while a capture is under way, unless it said otherwise.
  CUresult Unsafe(const char* name);

  // What happened, as text: a line each.
  void Note(const std::string& line);
  size_t CopyLog(char* to, size_t size);
  void ClearLog();

  std::recursive_mutex mutex;
  std::atomic<CUresult> fault{CUDA_SUCCESS};

 private:
  Machine();
  void MapMemory();
  void WorkOn();
  Stream* Ready();
  void Await(const std::function<bool()>& done);
  void Void(Capture* capture);
  CUresult InCapture(Stream* stream);

  std::condition_variable_any changed_;
  std::vector<std::unique_ptr<Stream>> streams_;
  Stream* legacy_[kDevices];
  std::map<char*, size_t> used_, free_, pinned_;
  std::vector<std::unique_ptr<Capture>> captures_;
  uint64_t order_ = 0;
  uint64_t captures_made_ = 0;
  std::mt19937 random_{12345};
  std::string log_;
};

extern thread_local int this_device;
extern thread_local CUstreamCaptureMode this_threads_mode;
uint64_t ThisThread();

}  // namespace standin

#endif  // TORCHCALL_STANDIN_CUDA_DEVICE_H_
