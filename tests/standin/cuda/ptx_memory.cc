// Loads, stores, copies and moves.

#include <algorithm>
#include <cstdio>

#include "device.h"
#include "ptx_space.h"

namespace standin::ptx {

char* Block::Global(uint64_t address, uint64_t bytes) {
  const auto* at = reinterpret_cast<const char*>(address);
  void* start = nullptr;
  size_t size = 0;
  Machine& machine = Machine::Get();
  if (machine.Range(at, &start, &size)) {
    const auto first = reinterpret_cast<uint64_t>(start);
    if (address + bytes <= first + size) {
      windows[next_window++ % windows.size()] = {first, first + size, Machine::Host(start)};
      return Machine::Host(at);
    }
  } else if (machine.IsPinned(at)) {
    return const_cast<char*>(at);
  }
  char words[80];
  std::snprintf(words, sizeof(words), "illegal address 0x%llx of %llu bytes",
                static_cast<unsigned long long>(address), static_cast<unsigned long long>(bytes));
  throw Fault(words);
}

void IllegalAddress(const Thread& t, const char* what, uint64_t address, uint64_t bytes) {
  char words[120];
  std::snprintf(words, sizeof(words), "illegal address (%s) 0x%llx of %llu bytes by thread %u",
                what, static_cast<unsigned long long>(address),
                static_cast<unsigned long long>(bytes), t.index);
  throw Fault(words);
}

Space TakeSpace(Instruction& i) {
  const std::string word = i.TakeOne({"global", "shared", "shared::cta", "shared::cluster", "local",
                                      "param", "param::entry", "param::func", "const"});
  if (word == "global" || word == "const") return Space::kGlobal;
  if (word.starts_with("shared")) return Space::kShared;
  return word.empty() ? Space::kGeneric : Space::kLocal;
}

void IgnoreOrder(Instruction& i) {
  i.Ignore({"weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "mmio",
            "cta",  "cluster",  "gpu",     "sys",     "nc",      "ca",      "cg",
            "cs",   "lu",       "cv",      "wb",      "wt",      "L1::",    "L2::"});
}

namespace {

template <Space kSpace, typename T>
bool Load(Thread& t, const Op& o) {
  T value;
  std::memcpy(&value, Memory<kSpace>(t, t.slots[o.a] + o.value, sizeof(T)), sizeof(T));
  return t.Set<T>(o.d, value), true;
}
template <Space kSpace, typename T>
bool Store(Thread& t, const Op& o) {
  const T value = t.Get<T>(o.b);
  std::memcpy(Memory<kSpace>(t, t.slots[o.a] + o.value, sizeof(T)), &value, sizeof(T));
  return true;
}
bool Aligned(Thread& t, const Op& o) {
  const uint64_t address = t.slots[o.a] + o.value;
  if ((address & (o.b - 1)) != 0) IllegalAddress(t, "misaligned vector", address, o.b);
  return true;
}

bool Copy(Thread& t, const Op& o) { return t.slots[o.d] = t.slots[o.a], true; }

// A part of a register: `value` bits from bit `b`.
bool Part(Thread& t, const Op& o) {
  return t.slots[o.d] = t.slots[o.a] >> o.b & ((uint64_t{1} << o.value) - 1), true;
}
bool Insert(Thread& t, const Op& o) {
  const uint64_t mask = ((uint64_t{1} << o.value) - 1) << o.b;
  return t.slots[o.d] = (t.slots[o.d] & ~mask) | (t.slots[o.a] << o.b & mask), true;
}

bool ToWindow(Thread& t, const Op& o) {
  return t.slots[o.d] = t.slots[o.a] + static_cast<uint64_t>(o.value), true;
}
bool IsInWindow(Thread& t, const Op& o) {
  const uint64_t window = t.slots[o.a] >> 56 << 56;
  const bool is_other = window == kSharedWindow || window == kLocalWindow;
  const auto wanted = static_cast<uint64_t>(o.value);
  return t.slots[o.d] = wanted == 0 ? !is_other : window == wanted, true;
}

// Copies `value` bytes at most, fills up with zeros: nobody may look before they waited.
bool CopyToShared(Thread& t, const Op& o) {
  const auto bytes = static_cast<uint64_t>(o.value);
  char* const to = Memory<Space::kShared>(t, t.slots[o.a], bytes);
  const uint64_t from_bytes = std::min<uint64_t>(t.Get<uint32_t>(o.c), bytes);
  if (from_bytes > 0) std::memcpy(to, Global(t, t.slots[o.b], from_bytes), from_bytes);
  std::memset(to + from_bytes, 0, bytes - from_bytes);
  return true;
}

std::vector<Operand> Elements(const Operand& operand, const std::string& vector) {
  const size_t count = vector.empty() ? 1 : vector[1] - '0';
  if (operand.kind != Operand::kVector && count == 1) return {operand};
  if (operand.parts.size() != count) throw Fault("such a vector");
  return operand.parts;
}

void DecodeAccess(Builder& b, Instruction& i) {
  const bool loads = i.Opcode() != "st";
  IgnoreOrder(i);
  const Space space = TakeSpace(i);
  const std::string vector = i.TakeOne({"v2", "v4", "v8"});
  const Type type = i.TakeType();
  const uint32_t bytes = BitsOf(type) / 8;
  int64_t offset = 0;
  uint32_t base = b.Base(i.At(loads ? 1 : 0), space, &offset);
  const std::vector<Operand> elements = Elements(i.At(loads ? 0 : 1), vector);
  if (i.Operands() > 2) i.At(2);  // how to cache
  if (elements.size() > 1) {
    if (loads) {  // an element may be the base's register
      const uint32_t kept = b.Temporary();
      b.Emit(Copy, kept, base);
      base = kept;
    }
    b.Emit(Aligned, 0, base, bytes * elements.size(), 0, offset);
  }
  const Run run = ForSpace(space, [&]<Space kSpace>() {
    return ForStored(type, [&]<typename T>() -> Run {
      return loads ? Load<kSpace, T> : Store<kSpace, std::make_unsigned_t<T>>;
    });
  });
  for (const Operand& element : elements) {
    if (loads) {
      b.Emit(run, b.Write(element), base, 0, 0, offset);
    } else {
      b.Emit(run, 0, base, b.Read(element, type), 0, offset);
    }
    offset += bytes;
  }
}

void DecodeMov(Builder& b, Instruction& i) {
  const Type type = i.TakeType();
  const Operand &to = i.At(0), &from = i.At(1);
  if (type == Type::kPred) {
    b.Emit(Copy, b.Write(to), b.Predicate(from));
  } else if (to.kind == Operand::kVector) {
    const uint32_t bits = BitsOf(type) / to.parts.size(), a = b.Read(from, type);
    for (size_t n = 0; n < to.parts.size(); ++n) {
      b.Emit(Part, b.Write(to.parts[n]), a, n * bits, 0, bits);
    }
  } else if (from.kind == Operand::kVector) {
    const uint32_t bits = BitsOf(type) / from.parts.size(), whole = b.Temporary();
    for (size_t n = 0; n < from.parts.size(); ++n) {
      b.Emit(n == 0 ? Part : Insert, whole, b.Read(from.parts[n], type), n == 0 ? 0 : n * bits, 0,
             bits);
    }
    b.Emit(Copy, b.Write(to), whole);
  } else {
    if (BitsOf(type) < 16) throw Fault("such a move");
    b.Emit(Copy, b.Write(to), b.Read(from, type));
  }
}

void DecodeAsyncCopy(Builder& b, Instruction& i) {
  i.Take("async");
  if (!i.TakeOne({"commit_group", "wait_group", "wait_all"}).empty()) {
    if (i.Operands() > 0) i.At(0);
    return;
  }
  if (i.TakeOne({"ca", "cg"}).empty()) throw Fault("such a copy");
  const std::string to_space = i.TakeOne({"shared", "shared::cta"});
  if (to_space.empty() || !i.Take("global")) throw Fault("such a copy");
  const bool has_policy = i.Take("L2::cache_hint");
  i.Ignore({"L2::"});
  int64_t to_offset = 0, from_offset = 0;
  const uint32_t to = b.Base(i.At(0), Space::kShared, &to_offset);
  const uint32_t from = b.Base(i.At(1), Space::kGlobal, &from_offset);
  const uint64_t bytes = i.At(2).bits;
  if (bytes != 4 && bytes != 8 && bytes != 16) throw Fault("a copy of so many bytes");
  const size_t rest = i.Operands() - 3 - (has_policy ? 1 : 0);
  if (rest > 1) throw Fault("such a copy");
  const uint32_t count = rest == 1 ? b.Read(i.At(3), Type::kU32) : b.Constant(bytes);
  if (has_policy) i.At(i.Operands() - 1);
  const uint32_t target = b.Temporary(), source = b.Temporary();
  b.Emit(ToWindow, target, to, 0, 0, to_offset);
  b.Emit(ToWindow, source, from, 0, 0, from_offset);
  b.Emit(CopyToShared, 0, target, source, count, static_cast<int64_t>(bytes));
}

}  // namespace

bool DecodeMemory(Builder& b, Instruction& i) {
  const std::string& opcode = i.Opcode();
  if (opcode == "ld" || opcode == "st" || opcode == "ldu") return DecodeAccess(b, i), true;
  if (opcode == "cp") return DecodeAsyncCopy(b, i), true;
  return false;
}

bool DecodeMove(Builder& b, Instruction& i) {
  const std::string& opcode = i.Opcode();
  if (opcode == "mov") return DecodeMov(b, i), true;
  if (opcode != "cvta" && opcode != "isspacep") return false;
  const bool is_to = i.Take("to");
  const Space space = TakeSpace(i);
  const uint64_t window = space == Space::kShared  ? kSharedWindow
                          : space == Space::kLocal ? kLocalWindow
                                                   : 0;
  if (space == Space::kGeneric) throw Fault("which space");
  if (opcode == "isspacep") {
    b.Emit(IsInWindow, b.Write(i.At(0)), b.Read(i.At(1), Type::kU64), 0, 0,
           static_cast<int64_t>(window));
    return true;
  }
  if (BitsOf(i.TakeType()) != 64) throw Fault("an address of 32 bits");
  b.Emit(ToWindow, b.Write(i.At(0)), b.Read(i.At(1), Type::kU64), 0, 0,
         static_cast<int64_t>(is_to ? -window : window));
  return true;
}

}  // namespace standin::ptx
