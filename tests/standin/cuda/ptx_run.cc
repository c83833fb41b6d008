// Runs a kernel: block after block, and of a block a thread after the other, each as far as it gets
// without the others.

#include <algorithm>
#include <cfenv>
#include <map>

#include "ptx_thread.h"
#include "ptx_together.h"

namespace standin::ptx {
namespace {

constexpr uint32_t kTurns = 1 << 18;  // of tens of thousands of branches each

void Go(Thread& t) {
  while (true) {
    const Op& op = *t.next++;
    if (op.guard != 0 && (t.slots[op.guard] & 1) == op.unless) continue;
    if (!op.run(t, op)) return;
  }
}

class Runner {
 public:
  Runner(const Program& program, const Launch& launch)
      : program_(program),
        launch_(launch),
        size_(launch.block[0] * launch.block[1] * launch.block[2]) {
    block_.local_bytes = program.local;
    block_.shared.resize(program.shared + launch.shared);
    // Threads that never wait for one another use the same memory in turn.
    const uint32_t kept = program.waits ? size_ : 1;
    slots_.resize(program.slots.size() * kept);
    local_.resize(program.local * kept);
    threads_.resize(kept);
    for (uint32_t i = 0; i < kept; ++i) {
      Thread& t = threads_[i];
      t.block = &block_;
      t.slots = slots_.data() + program.slots.size() * i;
      t.local = local_.data() + program.local * i;
      std::copy(program.slots.begin(), program.slots.end(), t.slots);
      std::copy(launch.parameters.begin(), launch.parameters.end(), t.local);
      for (int n = 0; n < 3; ++n) {
        t.slots[kNtid + n] = launch.block[n];
        t.slots[kNctaid + n] = launch.grid[n];
      }
      t.slots[kWarps] = (size_ + 31) / 32;
      t.slots[kDynamicShared] = launch.shared;
      t.slots[kTotalShared] = block_.shared.size();
      t.slots[kOne] = 1;
      t.slots[kWarpSize] = 32;
      Place(t, i);
    }
  }

  void Run() {
    for (uint32_t z = 0; z < launch_.grid[2]; ++z) {
      for (uint32_t y = 0; y < launch_.grid[1]; ++y) {
        for (uint32_t x = 0; x < launch_.grid[0]; ++x) {
          // Not a number: what is read before it was written shows.
          std::fill(block_.shared.begin(), block_.shared.end(), char(0xFF));
          for (Thread& t : threads_) {
            t.slots[kCtaid] = x;
            t.slots[kCtaid + 1] = y;
            t.slots[kCtaid + 2] = z;
          }
          program_.waits ? Together() : InTurn();
        }
      }
    }
  }

 private:
  void Place(Thread& t, uint32_t index) const {
    t.index = index;
    t.slots[kTid] = index % launch_.block[0];
    t.slots[kTid + 1] = index / launch_.block[0] % launch_.block[1];
    t.slots[kTid + 2] = index / launch_.block[0] / launch_.block[1];
    const uint32_t lane = index % 32, bit = 1U << lane;
    t.slots[kLane] = lane;
    t.slots[kWarp] = index / 32;
    t.slots[kLanesEqual] = bit;
    t.slots[kLanesLess] = bit - 1;
    t.slots[kLanesLessEqual] = bit | (bit - 1);
    t.slots[kLanesGreater] = ~(bit | (bit - 1));
    t.slots[kLanesGreaterEqual] = ~(bit - 1);
  }

  void Start(Thread& t) const {
    t.next = program_.ops.data();
    t.state = Thread::kRuns;
    t.patience = 1 << 16;
    t.calls.clear();
  }

  void InTurn() {
    Thread& t = threads_[0];
    for (uint32_t i = 0; i < size_; ++i) {
      Place(t, i);
      Start(t);
      for (uint32_t turn = 0; t.state != Thread::kEnded; ++turn) {
        if (turn > kTurns) throw Fault("a thread that does not end, or waits for a later one");
        Go(t);
      }
    }
  }

  void Together() {
    for (Thread& t : threads_) Start(t);
    while (true) {
      bool went_on = false;
      for (uint32_t first = 0; first < size_; first += 32) went_on |= Warp(first);
      went_on |= Barriers();
      if (went_on) continue;
      for (const Thread& t : threads_) {
        if (t.state != Thread::kEnded) throw Fault("its threads wait for one another for ever");
      }
      return;
    }
  }

  // Runs a warp's threads until all wait for the block, or have ended.
  bool Warp(uint32_t first) {
    const uint32_t last = std::min(first + 32, size_);
    bool went_on = false;
    while (true) {
      bool ran = false;
      for (uint32_t i = first; i < last; ++i) {
        if (threads_[i].state != Thread::kRuns) continue;
        Go(threads_[i]);
        ran = true;
      }
      ran |= Meet(first, last);
      if (!ran) return went_on;
      went_on = true;
      // Those that go on may wait for another warp.
      const bool runs = std::any_of(threads_.begin() + first, threads_.begin() + last,
                                    [](const Thread& t) { return t.state == Thread::kRuns; });
      if (!runs) return true;
      if (++turns_ % 64 == 0) return true;
    }
  }

  // Lets threads of a warp go on that have met: all of their mask are at the same operation.
  bool Meet(uint32_t first, uint32_t last) {
    bool met = false;
    for (uint32_t i = first; i < last; ++i) {
      if (threads_[i].state != Thread::kWaitsForWarp) continue;
      const Op* const op = threads_[i].next - 1;
      const auto mask = threads_[i].Get<uint32_t>(op->e);
      std::array<Thread*, 32> lanes{};
      bool all = true;
      for (uint32_t n = first; n < last; ++n) {
        Thread& t = threads_[n];
        if ((mask >> (n - first) & 1) == 0 || t.state == Thread::kEnded) continue;
        all &= t.state == Thread::kWaitsForWarp && t.next - 1 == op;
        lanes[n - first] = &t;
      }
      if ((mask >> (i - first) & 1) == 0) throw Fault("a thread outside of its mask");
      if (!all) continue;
      op->together(lanes, *op);
      for (Thread* t : lanes) {
        if (t) t->state = Thread::kRuns;
      }
      met = true;
    }
    return met;
  }

  // Opens the barriers at which all threads are that they wait for.
  bool Barriers() {
    std::map<uint32_t, std::vector<Thread*>> waiting;
    size_t live = 0;
    for (Thread& t : threads_) {
      live += t.state != Thread::kEnded;
      if (t.state != Thread::kWaitsForBlock) continue;
      waiting[t.Get<uint32_t>(t.next[-1].a)].push_back(&t);
    }
    bool opened = false;
    for (const auto& [barrier, threads] : waiting) {
      const Op& op = threads[0]->next[-1];
      const size_t wanted = op.b == 0 ? live : threads[0]->Get<uint32_t>(op.b);
      if (threads.size() > wanted) throw Fault("more threads at a barrier than it waits for");
      if (threads.size() < wanted) continue;
      opened = true;
      size_t votes = 0;
      for (const Thread* t : threads) votes += t->slots[t->next[-1].c] & 1;
      for (Thread* t : threads) {
        const Op& its = t->next[-1];
        t->state = Thread::kRuns;
        if (its.value == kCount) t->slots[its.d] = votes;
        if (its.value == kAll) t->slots[its.d] = votes == threads.size() ? 1 : 0;
        if (its.value == kAny) t->slots[its.d] = votes > 0 ? 1 : 0;
      }
    }
    return opened;
  }

  const Program& program_;
  const Launch& launch_;
  const uint32_t size_;
  Block block_;
  std::vector<uint64_t> slots_;
  std::vector<char> local_;
  std::vector<Thread> threads_;
  uint64_t turns_ = 0;
};

}  // namespace

void Execute(const Program& program, const Launch& launch) {
  const auto& required = program.required_block;
  if (required[0] != 0 && required != launch.block) throw Fault("a block of another size");
  std::fesetenv(FE_DFL_ENV);  // no flushing of small numbers that a library may have set
  Runner(program, launch).Run();
}

}  // namespace standin::ptx
