#include "device.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

namespace standin {
namespace {

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

thread_local int this_device = 0;
thread_local CUstreamCaptureMode this_threads_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

uint64_t ThisThread() { return static_cast<uint64_t>(syscall(SYS_gettid)); }

Machine& Machine::Get() {
  static Machine* machine = new Machine;
  return *machine;
}

Machine::Machine() {
  MapMemory();
  for (int i = 0; i < kDevices; ++i) {
    auto stream = std::make_unique<Stream>();
    stream->device = i;
    stream->is_legacy = true;
    legacy_[i] = stream.get();
    streams_.push_back(std::move(stream));
  }
  std::thread([this] { WorkOn(); }).detach();
}

// The device's thread: takes work of any stream that may go on.

Stream* Machine::Ready() {
  uint64_t first_legacy = UINT64_MAX, first_blocking = UINT64_MAX;
  for (const auto& stream : streams_) {
    if (stream->items.empty()) continue;
    uint64_t& first = stream->is_legacy ? first_legacy : first_blocking;
    if (stream->is_legacy || stream->blocks) first = std::min(first, stream->items.front().order);
  }
  std::vector<Stream*> ready;
  for (const auto& stream : streams_) {
    if (stream->items.empty()) continue;
    const Stream::Item& item = stream->items.front();
    if (item.kind == Stream::Item::kWait && item.event->passed < item.version) continue;
    if (stream->is_legacy && first_blocking < item.order) continue;
    if (stream->blocks && first_legacy < item.order) continue;
    ready.push_back(stream.get());
  }
  if (ready.empty()) return nullptr;
  return ready[random_() % ready.size()];
}

void Machine::WorkOn() {
  std::unique_lock lock(mutex);
  while (true) {
    Stream* stream = nullptr;
    changed_.wait(lock, [&] { return (stream = Ready()) != nullptr; });
    Stream::Item& item = stream->items.front();  // a deque's elements stay where they are
    if (item.kind == Stream::Item::kWork) {
      const bool dawdles = random_() % 8 == 0;
      lock.unlock();
      if (dawdles) std::this_thread::sleep_for(std::chrono::microseconds(100));
      if (item.work.run) item.work.run();
      lock.lock();
    } else if (item.kind == Stream::Item::kRecord) {
      item.event->passed = std::max(item.event->passed, item.version);
      item.event->when = Now();
    }
    stream->items.pop_front();
    changed_.notify_all();
  }
}

void Machine::Await(const std::function<bool()>& done) {
  std::unique_lock lock(mutex);
  changed_.wait(lock, done);
}

// Streams.

Stream* Machine::Resolve(CUstream stream) {
  const auto value = reinterpret_cast<uintptr_t>(stream);
  if (value <= 1) return legacy_[this_device];  // also CU_STREAM_LEGACY
  if (value == 2) return legacy_[this_device];  // CU_STREAM_PER_THREAD
  return reinterpret_cast<Stream*>(stream);
}

Stream* Machine::NewStream(unsigned int flags, int priority) {
  const std::lock_guard lock(mutex);
  auto stream = std::make_unique<Stream>();
  stream->device = this_device;
  stream->blocks = (flags & CU_STREAM_NON_BLOCKING) == 0;
  stream->priority = priority;
  streams_.push_back(std::move(stream));
  return streams_.back().get();
}

void Machine::DeleteStream(Stream* stream) {
  Synchronize(stream);
  const std::lock_guard lock(mutex);
  std::erase_if(streams_, [&](const auto& other) { return other.get() == stream; });
}

void Machine::Void(Capture* capture) { capture->is_void = true; }

CUresult Machine::InCapture(Stream* stream) {
  if (stream->capture == nullptr) return CUDA_SUCCESS;
  return stream->capture->is_void ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS;
}

CUresult Machine::Enqueue(Stream* stream, std::string name, std::function<void()> run) {
  const std::lock_guard lock(mutex);
  if (fault) return fault;
  Note((stream->capture ? "node\t" : "work\t") + name);
  if (const CUresult result = InCapture(stream)) return result;
  if (Capture* capture = stream->capture) {
    if (stream != capture->origin) capture->unjoined.insert(stream);
    capture->graph->nodes.push_back({std::move(name), std::move(run)});
    return CUDA_SUCCESS;
  }
  stream->items.push_back(
      {Stream::Item::kWork, {std::move(name), std::move(run)}, nullptr, 0, ++order_});
  changed_.notify_all();
  return CUDA_SUCCESS;
}

CUresult Machine::Launch(Stream* stream, const Exec& exec) {
  const std::lock_guard lock(mutex);
  Note("launch\t" + std::to_string(exec.nodes.size()));
  if (stream->capture != nullptr) {
    for (const Work& node : exec.nodes) {
      if (const CUresult result = Enqueue(stream, node.name, node.run)) return result;
    }
    return CUDA_SUCCESS;
  }
  for (const Work& node : exec.nodes) {
    stream->items.push_back({Stream::Item::kWork, node, nullptr, 0, ++order_});
  }
  changed_.notify_all();
  return CUDA_SUCCESS;
}

CUresult Machine::Synchronize(Stream* stream) {
  {
    const std::lock_guard lock(mutex);
    Note("sync\tstream");
    if (stream->capture != nullptr) {
      Void(stream->capture);
      return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
  }
  return Drain(stream);
}

CUresult Machine::Drain(Stream* stream) {
  const uint64_t until = order_;
  Await([&] { return stream->items.empty() || stream->items.front().order > until; });
  return fault;
}

CUresult Machine::SynchronizeDevice() {
  {
    const std::lock_guard lock(mutex);
    if (!captures_.empty()) {
      for (const auto& capture : captures_) Void(capture.get());
      return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
  }
  const uint64_t until = order_;
  Await([&] {
    return std::all_of(streams_.begin(), streams_.end(), [&](const auto& stream) {
      return stream->items.empty() || stream->items.front().order > until;
    });
  });
  return fault;
}

CUresult Machine::Query(Stream* stream) {
  const std::lock_guard lock(mutex);
  if (stream->capture != nullptr) {
    Void(stream->capture);
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  if (fault) return fault;
  return stream->items.empty() ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

// Events.

CUresult Machine::Record(Event* event, Stream* stream) {
  const std::lock_guard lock(mutex);
  Note("record\t" + std::to_string(reinterpret_cast<uintptr_t>(event)));
  if (const CUresult result = InCapture(stream)) return result;
  if (Capture* capture = stream->capture) {
    event->capture = capture;
    event->after = {stream};
    return CUDA_SUCCESS;
  }
  event->capture = nullptr;
  ++event->recorded;
  stream->items.push_back({Stream::Item::kRecord, {}, event, event->recorded, ++order_});
  changed_.notify_all();
  return CUDA_SUCCESS;
}

CUresult Machine::Wait(Stream* stream, Event* event) {
  const std::lock_guard lock(mutex);
  Note("wait\t" + std::to_string(reinterpret_cast<uintptr_t>(event)));
  if (const CUresult result = InCapture(stream)) return result;
  if (Capture* capture = event->capture) {
    if (stream->capture != nullptr && stream->capture != capture) {
      return CUDA_ERROR_STREAM_CAPTURE_MERGE;
    }
    stream->capture = capture;
    capture->streams.insert(stream);
    if (stream == capture->origin) {
      for (Stream* other : event->after) capture->unjoined.erase(other);
    } else {
      capture->unjoined.insert(stream);
    }
    return CUDA_SUCCESS;
  }
  if (stream->capture != nullptr) {
    // An event from outside: a dependency on work that the graph does not have.
    Void(stream->capture);
    return event->recorded == 0 ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
  }
  if (event->recorded == 0) return CUDA_SUCCESS;
  stream->items.push_back({Stream::Item::kWait, {}, event, event->recorded, ++order_});
  changed_.notify_all();
  return CUDA_SUCCESS;
}

CUresult Machine::Synchronize(Event* event) {
  {
    const std::lock_guard lock(mutex);
    Note("sync\tevent");
    if (event->capture != nullptr) {
      Void(event->capture);
      return CUDA_ERROR_CAPTURED_EVENT;
    }
  }
  const uint64_t until = event->recorded;
  Await([&] { return event->passed >= until; });
  return fault;
}

CUresult Machine::Query(Event* event) {
  const std::lock_guard lock(mutex);
  if (event->capture != nullptr) {
    Void(event->capture);
    return CUDA_ERROR_CAPTURED_EVENT;
  }
  if (fault) return fault;
  return event->passed >= event->recorded ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

// The log.

void Machine::Note(const std::string& line) {
  const std::lock_guard lock(mutex);
  static const bool is_on = std::getenv("STANDIN_LOG") != nullptr;
  if (is_on)
    std::fprintf(stderr, "[%llu] %s\n", static_cast<unsigned long long>(ThisThread()),
                 line.c_str());
  log_ += line + "\n";
  if (log_.size() > (64 << 20)) log_.clear();
}

size_t Machine::CopyLog(char* to, size_t size) {
  const std::lock_guard lock(mutex);
  if (to != nullptr) std::memcpy(to, log_.data(), std::min(size, log_.size()));
  return log_.size();
}

void Machine::ClearLog() {
  const std::lock_guard lock(mutex);
  log_.clear();
}

}  // namespace standin
