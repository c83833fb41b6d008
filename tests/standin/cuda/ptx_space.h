// Where a thread's addresses lead.

#ifndef TORCHCALL_STANDIN_CUDA_PTX_SPACE_H_
#define TORCHCALL_STANDIN_CUDA_PTX_SPACE_H_

#include <string>

#include "ptx_builder.h"

namespace standin::ptx {

[[noreturn]] void IllegalAddress(const Thread& t, const char* what, uint64_t address,
                                 uint64_t bytes);

// Takes an instruction's space; parameters are local, constants global.
Space TakeSpace(Instruction& instruction);
// Takes what says how memory is ordered and cached: here there is one thread at a time and no
// cache.
void IgnoreOrder(Instruction& instruction);

inline char* Global(Thread& t, uint64_t address, uint64_t bytes) {
  for (const Window& window : t.block->windows) {
    if (address >= window.start && address + bytes <= window.end) {
      return window.host + (address - window.start);
    }
  }
  return t.block->Global(address, bytes);
}

template <Space kSpace>
char* Memory(Thread& t, uint64_t address, uint64_t bytes) {
  if ((address & (bytes - 1)) != 0) IllegalAddress(t, "misaligned", address, bytes);
  if constexpr (kSpace == Space::kShared) {
    address = static_cast<uint32_t>(address);
    if (address + bytes > t.block->shared.size()) IllegalAddress(t, "shared", address, bytes);
    return t.block->shared.data() + address;
  } else if constexpr (kSpace == Space::kLocal) {
    address = static_cast<uint32_t>(address);
    if (address + bytes > t.block->local_bytes) IllegalAddress(t, "local", address, bytes);
    return t.local + address;
  } else if constexpr (kSpace == Space::kGeneric) {
    const uint64_t window = address >> 56 << 56;
    if (window == kSharedWindow) return Memory<Space::kShared>(t, address - window, bytes);
    if (window == kLocalWindow) return Memory<Space::kLocal>(t, address - window, bytes);
    return Global(t, address, bytes);
  } else {
    return Global(t, address, bytes);
  }
}

// Calls `make.operator()<space>()`.
template <typename Make>
Run ForSpace(Space space, Make make) {
  switch (space) {
    case Space::kShared:
      return make.template operator()<Space::kShared>();
    case Space::kLocal:
      return make.template operator()<Space::kLocal>();
    case Space::kGlobal:
      return make.template operator()<Space::kGlobal>();
    default:
      return make.template operator()<Space::kGeneric>();
  }
}

// Calls `make.operator()<T>()` with the integer that has a type's bits and sign.
template <typename Make>
Run ForStored(Type type, Make make) {
  switch (type) {
    case Type::kS8:
      return make.template operator()<int8_t>();
    case Type::kS16:
      return make.template operator()<int16_t>();
    case Type::kS32:
      return make.template operator()<int32_t>();
    default:
      break;
  }
  switch (BitsOf(type)) {
    case 8:
      return make.template operator()<uint8_t>();
    case 16:
      return make.template operator()<uint16_t>();
    case 32:
      return make.template operator()<uint32_t>();
    case 64:
      return make.template operator()<uint64_t>();
    default:
      return nullptr;
  }
}

}  // namespace standin::ptx

#endif  // TORCHCALL_STANDIN_CUDA_PTX_SPACE_H_
