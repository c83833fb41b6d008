// Logic, shifts, fields and counts of bits.

#include <algorithm>

#include "ptx_builder.h"

namespace standin::ptx {
namespace {

Type Unsigned(Type type) {
  switch (BitsOf(type)) {
    case 1:
      return Type::kB64;  // a predicate: 0 or 1
    case 16:
      return Type::kB16;
    case 32:
      return Type::kB32;
    case 64:
      return Type::kB64;
    default:
      throw Fault("bits of such a type");
  }
}

Run Logic(const std::string& opcode, Type type) {
  if (type == Type::kPred && opcode == "not")
    return Unary<uint64_t, [](uint64_t a) { return a ^ 1; }>;
  return ForIntegers(Unsigned(type), [&]<typename T>() -> Run {
    if (opcode == "and") return Binary<T, [](T a, T b) -> T { return a & b; }>;
    if (opcode == "or") return Binary<T, [](T a, T b) -> T { return a | b; }>;
    if (opcode == "xor") return Binary<T, [](T a, T b) -> T { return a ^ b; }>;
    if (opcode == "not") return Unary<T, [](T a) -> T { return ~a; }>;
    if (opcode == "cnot") return Unary<T, [](T a) -> T { return a == 0; }>;
    return nullptr;
  });
}

template <typename T>
bool ShiftLeft(Thread& t, const Op& o) {
  const uint32_t by = t.Get<uint32_t>(o.b);
  return t.Set<T>(o.d, by >= 8 * sizeof(T) ? 0 : static_cast<T>(t.Get<T>(o.a) << by)), true;
}
template <typename T>
bool ShiftRight(Thread& t, const Op& o) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  const T a = t.Get<T>(o.a);
  const uint32_t by = t.Get<uint32_t>(o.b);
  const T rest = std::is_signed_v<T> && a < 0 ? static_cast<T>(-1) : static_cast<T>(0);
  return t.Set<T>(o.d, by >= kBits ? rest : static_cast<T>(a >> by)), true;
}

// The two operands as one number of 64 bits, shifted; `value`: whether the amount wraps.
template <bool kIsLeft>
bool Funnel(Thread& t, const Op& o) {
  const uint64_t both = uint64_t{t.Get<uint32_t>(o.b)} << 32 | t.Get<uint32_t>(o.a);
  const uint32_t by = o.value ? t.Get<uint32_t>(o.c) & 31 : std::min(t.Get<uint32_t>(o.c), 32U);
  const uint64_t moved = kIsLeft ? (both << by) >> 32 : both >> by;
  return t.Set<uint32_t>(o.d, static_cast<uint32_t>(moved)), true;
}

template <typename T>
bool Extract(Thread& t, const Op& o) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  using U = Bits<T>;
  const U a = t.Get<U>(o.a);
  const uint32_t at = t.Get<uint32_t>(o.b) & 255, count = t.Get<uint32_t>(o.c) & 255;
  U field = at >= kBits ? 0 : a >> at;
  U fill = 0;
  if (std::is_signed_v<T> && count > 0) {
    fill = (a >> std::min(at + count - 1, kBits - 1)) & 1 ? static_cast<U>(-1) : 0;
    if (at >= kBits) field = fill;
    if (at > 0 && at < kBits) field |= fill << (kBits - at);
  }
  if (count < kBits) {
    const U mask = (U{1} << count) - 1;
    field = (field & mask) | (fill & ~mask);
  }
  return t.Set<T>(o.d, static_cast<T>(field)), true;
}

template <typename T>
bool Insert(Thread& t, const Op& o) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  const uint32_t at = t.Get<uint32_t>(o.c) & 255, count = t.Get<uint32_t>(o.e) & 255;
  const T mask = at >= kBits ? 0 : (count >= kBits ? ~T{0} : (T{1} << count) - 1) << at;
  const T moved = at >= kBits ? 0 : t.Get<T>(o.a) << at;
  return t.Set<T>(o.d, (t.Get<T>(o.b) & ~mask) | (moved & mask)), true;
}

// The highest bit that tells the number from its sign; `value`: how far to shift it to the top.
template <typename T>
bool Highest(Thread& t, const Op& o) {
  using U = Bits<T>;
  U a = t.Get<U>(o.a);
  if (std::is_signed_v<T> && static_cast<T>(a) < 0) a = ~a;
  constexpr uint32_t kTop = 8 * sizeof(T) - 1;
  const auto zeros = static_cast<uint32_t>(std::countl_zero(a));
  return t.Set<uint32_t>(o.d, a == 0 ? UINT32_MAX : o.value ? zeros : kTop - zeros), true;
}

template <typename T>
T Reverse(T a) {
  T reversed = 0;
  for (size_t i = 0; i < 8 * sizeof(T); ++i) reversed |= ((a >> i) & 1) << (8 * sizeof(T) - 1 - i);
  return reversed;
}

template <typename T, auto F>
bool Count(Thread& t, const Op& o) {
  return t.Set<uint32_t>(o.d, static_cast<uint32_t>(F(t.Get<T>(o.a)))), true;
}

uint32_t Permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7))) & 255;
    if ((nibble & 8) != 0) byte = (byte & 128) != 0 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}

bool AnyLogic(Thread& t, const Op& o) {
  const uint32_t a = t.Get<uint32_t>(o.a), b = t.Get<uint32_t>(o.b), c = t.Get<uint32_t>(o.c);
  uint32_t result = 0;
  if (o.value & 0x01) result |= ~a & ~b & ~c;
  if (o.value & 0x02) result |= ~a & ~b & c;
  if (o.value & 0x04) result |= ~a & b & ~c;
  if (o.value & 0x08) result |= ~a & b & c;
  if (o.value & 0x10) result |= a & ~b & ~c;
  if (o.value & 0x20) result |= a & ~b & c;
  if (o.value & 0x40) result |= a & b & ~c;
  if (o.value & 0x80) result |= a & b & c;
  return t.Set<uint32_t>(o.d, result), true;
}

// A mask of `b` bits from bit `a`; `value`: whether both wrap.
bool Mask(Thread& t, const Op& o) {
  uint32_t at = t.Get<uint32_t>(o.a), count = t.Get<uint32_t>(o.b);
  if (o.value) at &= 31, count &= 31;
  const uint64_t ones = count >= 32 ? UINT32_MAX : (uint64_t{1} << count) - 1;
  return t.Set<uint32_t>(o.d, at >= 32 ? 0 : static_cast<uint32_t>(ones << at)), true;
}

void DecodeShift(Builder& b, Instruction& i) {
  const bool is_left = i.Opcode() == "shl";
  Type type = i.TakeType();
  if (is_left) type = Unsigned(type);
  const Run run = ForIntegers(
      type, [&]<typename T>() -> Run { return is_left ? ShiftLeft<Bits<T>> : ShiftRight<T>; });
  b.Emit(run, b.Write(i.At(0)), b.Read(i.At(1), type), b.Read(i.At(2), Type::kU32));
}

void DecodeFunnel(Builder& b, Instruction& i) {
  const std::string way = i.TakeOne({"l", "r"}), mode = i.TakeOne({"wrap", "clamp"});
  if (way.empty() || mode.empty() || i.TakeType() != Type::kB32) throw Fault("such a shift");
  b.Emit(way == "l" ? Funnel<true> : Funnel<false>, b.Write(i.At(0)), b.Read(i.At(1), Type::kB32),
         b.Read(i.At(2), Type::kB32), b.Read(i.At(3), Type::kB32), mode == "wrap");
}

void DecodeField(Builder& b, Instruction& i) {
  const bool inserts = i.Opcode() == "bfi";
  const Type type = i.TakeType();
  const Run run = ForIntegers(type, [&]<typename T>() -> Run {
    if constexpr (sizeof(T) < 4) return nullptr;
    if (!inserts) return Extract<T>;
    return Insert<std::conditional_t<sizeof(T) < 8, uint32_t, uint64_t>>;
  });
  const uint32_t x = b.Read(i.At(1), type), y = b.Read(i.At(2), inserts ? type : Type::kU32);
  const uint32_t z = b.Read(i.At(3), Type::kU32);
  const uint32_t last = inserts ? b.Read(i.At(4), Type::kU32) : 0;
  b.Emit(run, b.Write(i.At(0)), x, y, z).e = last;
}

}  // namespace

bool DecodeBits(Builder& b, Instruction& i) {
  const std::string& opcode = i.Opcode();
  if (opcode == "and" || opcode == "or" || opcode == "xor" || opcode == "not" || opcode == "cnot") {
    const Type type = i.TakeType();
    const auto read = [&](size_t n) {
      return type == Type::kPred ? b.Predicate(i.At(n)) : b.Read(i.At(n), type);
    };
    const uint32_t x = read(1), y = i.Operands() > 2 ? read(2) : 0;
    return b.Emit(Logic(opcode, type), b.Write(i.At(0)), x, y), true;
  }
  if (opcode == "shl" || opcode == "shr") return DecodeShift(b, i), true;
  if (opcode == "shf") return DecodeFunnel(b, i), true;
  if (opcode == "bfe" || opcode == "bfi") return DecodeField(b, i), true;
  if (opcode == "bfind") {
    const bool is_amount = i.Take("shiftamt");
    const Type type = i.TakeType();
    const Run run = ForIntegers(type, []<typename T>() -> Run { return Highest<T>; });
    return b.Emit(run, b.Write(i.At(0)), b.Read(i.At(1), type), 0, 0, is_amount), true;
  }
  if (opcode == "brev" || opcode == "clz" || opcode == "popc") {
    const Type type = i.TakeType();
    const auto of = [&]<typename T>() -> Run {
      if (opcode == "brev") return Unary<T, Reverse<T>>;
      if (opcode == "clz") return Count<T, [](T a) { return std::countl_zero(a); }>;
      return Count<T, [](T a) { return std::popcount(a); }>;
    };
    const Run run = BitsOf(type) == 32   ? of.operator()<uint32_t>()
                    : BitsOf(type) == 64 ? of.operator()<uint64_t>()
                                         : nullptr;
    return b.Emit(run, b.Write(i.At(0)), b.Read(i.At(1), type)), true;
  }
  if (opcode == "prmt") {
    if (i.TakeType() != Type::kB32) throw Fault("such a permutation");
    return b.Emit(Ternary<uint32_t, Permute>, b.Write(i.At(0)), b.Read(i.At(1), Type::kB32),
                  b.Read(i.At(2), Type::kB32), b.Read(i.At(3), Type::kB32)),
           true;
  }
  if (opcode == "lop3") {
    if (i.TakeType() != Type::kB32 || i.Operands() != 5) throw Fault("such logic");
    return b.Emit(AnyLogic, b.Write(i.At(0)), b.Read(i.At(1), Type::kB32),
                  b.Read(i.At(2), Type::kB32), b.Read(i.At(3), Type::kB32),
                  static_cast<int64_t>(i.At(4).bits)),
           true;
  }
  if (opcode == "bmsk") {
    const std::string mode = i.TakeOne({"wrap", "clamp"});
    if (mode.empty() || i.TakeType() != Type::kB32) throw Fault("such a mask");
    return b.Emit(Mask, b.Write(i.At(0)), b.Read(i.At(1), Type::kB32), b.Read(i.At(2), Type::kB32),
                  0, mode == "wrap"),
           true;
  }
  return false;
}

}  // namespace standin::ptx
