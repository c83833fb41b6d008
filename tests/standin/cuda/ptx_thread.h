// What a decoded kernel is made of and what its threads are while they run.
//
// A thread's registers, constants and special registers are slots of 64 bits in one array, each
// value in the low bits of its slot. An operation names the slots it reads and writes; one PTX
// instruction may become several operations.

#ifndef TORCHCALL_STANDIN_CUDA_PTX_THREAD_H_
#define TORCHCALL_STANDIN_CUDA_PTX_THREAD_H_

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "ptx_text.h"

namespace standin::ptx {

// The windows of generic addresses; what is in none is global. Parameters are local: every thread
// has its own.
constexpr uint64_t kSharedWindow = uint64_t{1} << 56;
constexpr uint64_t kLocalWindow = uint64_t{2} << 56;

// Slots of special registers. Slot 0 is none.
enum Slot : uint32_t {
  kTid = 1,
  kNtid = 4,
  kCtaid = 7,
  kNctaid = 10,
  kLane = 13,
  kWarp,
  kWarps,
  kLanesEqual,
  kLanesLess,
  kLanesLessEqual,
  kLanesGreater,
  kLanesGreaterEqual,
  kDynamicShared,
  kTotalShared,
  kZero,
  kOne,
  kWarpSize,
  kFirstSlot,
};

struct Thread;
struct Op;
struct Block;

// Returns whether the thread goes on.
using Run = bool (*)(Thread&, const Op&);
// What threads of a warp do together, once all are there: null where a lane does not take part.
using Together = void (*)(const std::array<Thread*, 32>& lanes, const Op&);

struct Op {
  Run run;
  uint32_t guard = 0;   // the slot of its predicate
  uint32_t unless = 0;  // the predicate's value that skips it
  uint32_t d = 0, a = 0, b = 0, c = 0, e = 0;
  int64_t value = 0;
  Together together = nullptr;
};

struct Thread {
  enum State : uint8_t { kRuns, kWaitsForWarp, kWaitsForBlock, kEnded };

  template <typename T>
  T Get(uint32_t slot) const {
    T value;
    std::memcpy(&value, &slots[slot], sizeof(T));
    return value;
  }
  template <typename T>
  void Set(uint32_t slot, T value) {
    if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) {
      slots[slot] = static_cast<uint64_t>(static_cast<int64_t>(value));
    } else {
      uint64_t bits = 0;
      std::memcpy(&bits, &value, sizeof(T));
      slots[slot] = bits;
    }
  }

  uint64_t* slots = nullptr;
  const Op* next = nullptr;
  Block* block = nullptr;
  char* local = nullptr;
  uint32_t index = 0;  // in the block
  State state = kRuns;
  bool carry = false;
  uint32_t patience = 0;         // backward branches left before others have their turn
  std::vector<const Op*> calls;  // where to return to
};

struct Window {
  uint64_t start = 1, end = 0;
  char* host = nullptr;
};

// A launch, and its block that runs now.
struct Block {
  char* Global(uint64_t address, uint64_t bytes);

  std::vector<char> shared;
  uint64_t local_bytes = 0;
  std::array<Window, 4> windows;  // memory that was used last
  uint32_t next_window = 0;
};

// A kernel, ready to run.
struct Program {
  std::string name;
  std::vector<Op> ops;
  std::vector<uint64_t> slots;  // as they are when a thread starts
  std::vector<uint64_t> parameter_bytes, parameter_offsets;
  uint64_t parameters = 0;  // bytes of all
  uint64_t shared = 0;      // bytes, without the launch's own
  uint64_t local = 0;
  std::array<uint32_t, 3> required_block = {0, 0, 0};
  bool waits = false;  // threads wait for one another
};

struct Launch {
  std::array<uint32_t, 3> grid, block;
  uint64_t shared = 0;
  std::vector<char> parameters;
};

// Runs every block of a launch. Throws a `Fault`.
void Execute(const Program& program, const Launch& launch);

}  // namespace standin::ptx

#endif  // TORCHCALL_STANDIN_CUDA_PTX_THREAD_H_
