// Atomic operations: one thread runs at a time, so they are plain ones.

#include <algorithm>
#include <cmath>

#include "ptx_space.h"

namespace standin::ptx {
namespace {

template <Space kSpace, typename T, auto F>
bool Atomic(Thread& t, const Op& o) {
  char* const at = Memory<kSpace>(t, t.slots[o.a] + o.value, sizeof(T));
  T old;
  std::memcpy(&old, at, sizeof(T));
  const T made = F(old, t.Get<T>(o.b), t.Get<T>(o.c));
  std::memcpy(at, &made, sizeof(T));
  return t.Set<T>(o.d, old), true;
}

template <Space kSpace, typename T>
Run OfBits(const std::string& name) {
  if (name == "and") return Atomic<kSpace, T, [](T a, T b, T) -> T { return a & b; }>;
  if (name == "or") return Atomic<kSpace, T, [](T a, T b, T) -> T { return a | b; }>;
  if (name == "xor") return Atomic<kSpace, T, [](T a, T b, T) -> T { return a ^ b; }>;
  if (name == "exch") return Atomic<kSpace, T, [](T, T b, T) -> T { return b; }>;
  if (name == "cas") return Atomic<kSpace, T, [](T a, T b, T c) -> T { return a == b ? c : a; }>;
  return nullptr;
}

template <Space kSpace, typename T>
Run OfIntegers(const std::string& name) {
  if (name == "add") {
    return Atomic<kSpace, T, [](T a, T b, T) -> T {
      return static_cast<T>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
    }>;
  }
  if (name == "min") return Atomic<kSpace, T, [](T a, T b, T) -> T { return std::min(a, b); }>;
  if (name == "max") return Atomic<kSpace, T, [](T a, T b, T) -> T { return std::max(a, b); }>;
  if (!std::is_same_v<T, uint32_t>) return nullptr;
  if (name == "inc") {
    return Atomic<kSpace, T, [](T a, T b, T) -> T { return a >= b ? T{0} : T(a + 1); }>;
  }
  if (name == "dec") {
    return Atomic<kSpace, T, [](T a, T b, T) -> T { return (a == 0) || (a > b) ? b : T(a - 1); }>;
  }
  return nullptr;
}

template <typename T>
T Sum(T a, T b) {
  return T(static_cast<Wide<T>>(a) + static_cast<Wide<T>>(b));
}
template <typename T>
T Smaller(T a, T b) {
  return T(std::fmin(static_cast<Wide<T>>(a), static_cast<Wide<T>>(b)));
}
template <typename T>
T Larger(T a, T b) {
  return T(std::fmax(static_cast<Wide<T>>(a), static_cast<Wide<T>>(b)));
}

template <Space kSpace, typename T>
Run OfFloats(const std::string& name) {
  if (name == "add") return Atomic<kSpace, T, [](T a, T b, T) { return Sum(a, b); }>;
  if (name == "min") return Atomic<kSpace, T, [](T a, T b, T) { return Smaller(a, b); }>;
  if (name == "max") return Atomic<kSpace, T, [](T a, T b, T) { return Larger(a, b); }>;
  return nullptr;
}
template <Space kSpace, typename T>
Run OfPairs(const std::string& name) {
  using P = Pair<T>;
  if (name != "add") return nullptr;
  return Atomic<kSpace, P,
                [](P a, P b, P) { return P{Sum(a.of[0], b.of[0]), Sum(a.of[1], b.of[1])}; }>;
}

template <Space kSpace>
Run Find(const std::string& name, Type type) {
  switch (type) {
    case Type::kF16x2:
      return OfPairs<kSpace, Half>(name);
    case Type::kBF16x2:
      return OfPairs<kSpace, Brain>(name);
    case Type::kB16:
      return OfBits<kSpace, uint16_t>(name);
    case Type::kB32:
      return OfBits<kSpace, uint32_t>(name);
    case Type::kB64:
      return OfBits<kSpace, uint64_t>(name);
    case Type::kU32:
      return OfIntegers<kSpace, uint32_t>(name);
    case Type::kU64:
      return OfIntegers<kSpace, uint64_t>(name);
    case Type::kS32:
      return OfIntegers<kSpace, int32_t>(name);
    case Type::kS64:
      return OfIntegers<kSpace, int64_t>(name);
    default:
      return ForFloats(type, [&]<typename T>() -> Run { return OfFloats<kSpace, T>(name); });
  }
}

bool Keep(Thread& t, const Op& o) { return t.slots[o.d] = t.slots[o.a], true; }

}  // namespace

bool DecodeAtomic(Builder& b, Instruction& i) {
  if (i.Opcode() != "atom" && i.Opcode() != "red") return false;
  const bool returns = i.Opcode() == "atom";
  const bool has_policy = i.Take("L2::cache_hint");
  IgnoreOrder(i);
  const Space space = TakeSpace(i);
  const std::string name =
      i.TakeOne({"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"});
  i.Take("noftz");
  const std::string vector = i.TakeOne({"v2", "v4", "v8"});
  const Type type = i.TakeType();
  const size_t at = returns ? 1 : 0, operands = (name == "cas" ? 3 : 2) + at;
  if (i.Operands() != operands + (has_policy ? 1 : 0)) throw Fault("so many operands");
  if (has_policy) i.At(operands);
  int64_t offset = 0;
  const uint32_t given = b.Base(i.At(at), space, &offset), base = b.Temporary();
  b.Emit(Keep, base, given);
  const Run run = ForSpace(space, [&]<Space kSpace>() { return Find<kSpace>(name, type); });
  if (vector.empty()) {
    const uint32_t x = b.Read(i.At(at + 1), type);
    const uint32_t y = name == "cas" ? b.Read(i.At(at + 2), type) : 0;
    b.Emit(run, returns ? b.Write(i.At(0)) : 0, base, x, y, offset);
    return true;
  }
  const auto& values = i.At(at + 1).parts;
  if (values.size() != static_cast<size_t>(vector[1] - '0')) throw Fault("such a vector");
  for (size_t n = 0; n < values.size(); ++n) {
    const uint32_t d = returns ? b.Write(i.At(0).parts.at(n)) : 0;
    b.Emit(run, d, base, b.Read(values[n], type), 0, offset);
    offset += BitsOf(type) / 8;
  }
  return true;
}

}  // namespace standin::ptx
