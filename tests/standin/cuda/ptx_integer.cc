// Arithmetic on integers.

#include <algorithm>

#include "ptx_builder.h"

namespace standin::ptx {
namespace {

template <typename T>
using Twice = std::conditional_t<
    sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                       std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;
template <typename T>
using Unsigned = Bits<T>;

template <typename T>
T Add(T a, T b) {
  return static_cast<T>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
}
template <typename T>
T Subtract(T a, T b) {
  return static_cast<T>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b));
}
template <typename T>
T Low(T a, T b) {
  return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}
template <typename T>
T High(T a, T b) {
  return static_cast<T>((static_cast<Twice<T>>(a) * static_cast<Twice<T>>(b)) >> (8 * sizeof(T)));
}
template <typename T>
T Divide(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return Subtract<T>(0, a);
  }
  return a / b;
}
template <typename T>
T Remainder(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return 0;
  }
  return a % b;
}
template <typename T>
T Magnitude(T a) {
  return a < 0 ? Subtract<T>(0, a) : a;
}
template <typename T>
T Difference(T a, T b, T c) {
  return Add<T>(c, a < b ? Subtract<T>(b, a) : Subtract<T>(a, b));
}
template <typename T>
T AddSaturated(T a, T b) {
  const auto sum = static_cast<Twice<T>>(a) + b;
  return static_cast<T>(
      std::clamp<Twice<T>>(sum, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
}
template <typename T>
T SubtractSaturated(T a, T b) {
  const auto sum = static_cast<Twice<T>>(a) - b;
  return static_cast<T>(
      std::clamp<Twice<T>>(sum, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
}

template <typename T>
bool MultiplyWide(Thread& t, const Op& o) {
  using W = Twice<T>;
  return t.Set<W>(o.d, static_cast<W>(t.Get<T>(o.a)) * static_cast<W>(t.Get<T>(o.b))), true;
}
template <typename T>
bool MultiplyAddWide(Thread& t, const Op& o) {
  using W = Twice<T>;
  const W product = static_cast<W>(t.Get<T>(o.a)) * static_cast<W>(t.Get<T>(o.b));
  return t.Set<W>(o.d, Add<W>(product, t.Get<W>(o.c))), true;
}

// Sums whose carry goes on: `value` says whether it comes in (1) and whether it is kept (2).
template <typename T, bool kSubtracts>
bool WithCarry(Thread& t, const Op& o) {
  const T a = t.Get<T>(o.a), b = t.Get<T>(o.b);
  const unsigned in = (o.value & 1) != 0 && t.carry ? 1 : 0;
  using W = Twice<T>;
  const W sum = kSubtracts ? static_cast<W>(a) - b - in : static_cast<W>(a) + b + in;
  if ((o.value & 2) != 0) t.carry = ((sum >> (8 * sizeof(T))) & 1) != 0;
  return t.Set<T>(o.d, static_cast<T>(sum)), true;
}

// A two-operand function of two halves at once.
template <typename T, auto F>
bool Halves(Thread& t, const Op& o) {
  const auto a = t.Get<Pair<T>>(o.a), b = t.Get<Pair<T>>(o.b);
  return t.Set<Pair<T>>(o.d, Pair<T>{F(a.of[0], b.of[0]), F(a.of[1], b.of[1])}), true;
}

template <typename T>
T Smaller(T a, T b) {
  return std::min(a, b);
}
template <typename T>
T Larger(T a, T b) {
  return std::max(a, b);
}

Run Plain(const std::string& opcode, Type type) {
  return ForIntegers(type, [&]<typename T>() -> Run {
    if (opcode == "add") return Binary<T, Add<T>>;
    if (opcode == "sub") return Binary<T, Subtract<T>>;
    if (opcode == "div") return Binary<T, Divide<T>>;
    if (opcode == "rem") return Binary<T, Remainder<T>>;
    if (opcode == "min") return Binary<T, Smaller<T>>;
    if (opcode == "max") return Binary<T, Larger<T>>;
    if (opcode == "abs") return Unary<T, Magnitude<T>>;
    if (opcode == "neg") return Unary<T, [](T a) { return Subtract<T>(0, a); }>;
    if (opcode == "sad") return Ternary<T, Difference<T>>;
    return nullptr;
  });
}

Run Packed(const std::string& opcode, Type type) {
  const auto of = [&]<typename T>() -> Run {
    if (opcode == "add") return Halves<T, Add<T>>;
    if (opcode == "sub") return Halves<T, Subtract<T>>;
    if (opcode == "min") return Halves<T, Smaller<T>>;
    if (opcode == "max") return Halves<T, Larger<T>>;
    return nullptr;
  };
  return type == Type::kU16x2 ? of.operator()<uint16_t>() : of.operator()<int16_t>();
}

void DecodeCarry(Builder& b, Instruction& i, const std::string& opcode) {
  const bool in = opcode == "addc" || opcode == "subc" || opcode == "madc";
  const bool out = i.Take("cc");
  const std::string part = opcode.starts_with("mad") ? i.TakeOne({"lo", "hi"}) : "";
  const Type type = i.TakeType();
  uint32_t first = b.Read(i.At(1), type), second = b.Read(i.At(2), type);
  const uint32_t d = b.Write(i.At(0));
  if (opcode.starts_with("mad")) {
    const uint32_t product = b.Temporary();
    b.Emit(ForIntegers(type,
                       [&]<typename T>() -> Run {
                         return part == "lo" ? Run{Binary<T, Low<T>>} : Run{Binary<T, High<T>>};
                       }),
           product, first, second);
    first = product;
    second = b.Read(i.At(3), type);
  }
  const bool subtracts = opcode.starts_with("sub");
  b.Emit(ForIntegers(type,
                     [&]<typename T>() -> Run {
                       using U = Unsigned<T>;
                       return subtracts ? WithCarry<U, true> : WithCarry<U, false>;
                     }),
         d, first, second, 0, (in ? 1 : 0) | (out ? 2 : 0));
}

// The product's low or high half or all of it, and a third operand added.
void DecodeProduct(Builder& b, Instruction& i, const std::string& opcode, const std::string& part) {
  const bool adds = opcode == "mad";
  const bool saturates = i.Take("sat");
  const Type type = i.TakeType();
  const Type sum = part != "wide"                             ? type
                   : type == Type::kU16 || type == Type::kB16 ? Type::kU32
                   : type == Type::kS16                       ? Type::kS32
                   : type == Type::kU32                       ? Type::kU64
                                                              : Type::kS64;
  const uint32_t x = b.Read(i.At(1), type), y = b.Read(i.At(2), type);
  const uint32_t z = adds ? b.Read(i.At(3), sum) : 0;
  if (part == "wide" && BitsOf(type) > 32) throw Fault("a wide product of 64 bits");
  b.Emit(ForIntegers(
             type,
             [&]<typename T>() -> Run {
               if constexpr (sizeof(T) < 8) {
                 if (part == "wide") return adds ? MultiplyAddWide<T> : MultiplyWide<T>;
               }
               if (!adds) return part == "lo" ? Binary<T, Low<T>> : Binary<T, High<T>>;
               if (saturates) {
                 return Ternary<T, [](T a, T b, T c) { return AddSaturated<T>(High<T>(a, b), c); }>;
               }
               if (part == "lo") {
                 return Ternary<T, [](T a, T b, T c) { return Add<T>(Low<T>(a, b), c); }>;
               }
               return Ternary<T, [](T a, T b, T c) { return Add<T>(High<T>(a, b), c); }>;
             }),
         b.Write(i.At(0)), x, y, z);
}

// Dot products of four bytes and a sum.
template <typename A, typename B>
bool Dot4(Thread& t, const Op& o) {
  const auto a = t.Get<std::array<A, 4>>(o.a);
  const auto b = t.Get<std::array<B, 4>>(o.b);
  uint32_t sum = t.Get<uint32_t>(o.c);
  for (int i = 0; i < 4; ++i) sum += static_cast<uint32_t>(int32_t{a[i]} * int32_t{b[i]});
  return t.Set<uint32_t>(o.d, sum), true;
}

void DecodeDot(Builder& b, Instruction& i) {
  const bool first = IsSigned(i.TakeType()), second = IsSigned(i.TakeType());
  const Run run = first    ? second ? Dot4<int8_t, int8_t> : Dot4<int8_t, uint8_t>
                  : second ? Dot4<uint8_t, int8_t>
                           : Dot4<uint8_t, uint8_t>;
  b.Emit(run, b.Write(i.At(0)), b.Read(i.At(1), Type::kB32), b.Read(i.At(2), Type::kB32),
         b.Read(i.At(3), Type::kB32));
}

bool IsFloating(const Instruction& instruction) {
  for (const std::string& word : instruction.statement.modifiers) {
    const Type type = TypeOf(word.c_str());
    if (IsFloat(type)) return true;
  }
  return false;
}

bool HasModifier(const Instruction& instruction, const char* modifier) {
  const auto& all = instruction.statement.modifiers;
  return std::find(all.begin(), all.end(), modifier) != all.end();
}

}  // namespace

bool DecodeInteger(Builder& b, Instruction& i) {
  const std::string& opcode = i.Opcode();
  if (opcode == "dp4a") return DecodeDot(b, i), true;
  static const auto* const kKnown =
      new std::vector<std::string>{"add", "sub", "mul", "mad",   "div",   "rem",  "min",  "max",
                                   "abs", "neg", "sad", "mul24", "mad24", "addc", "subc", "madc"};
  if (std::find(kKnown->begin(), kKnown->end(), opcode) == kKnown->end()) return false;
  if (IsFloating(i)) return false;
  if (opcode == "addc" || opcode == "subc" || opcode == "madc" || HasModifier(i, "cc")) {
    return DecodeCarry(b, i, opcode), true;
  }
  const std::string part = i.TakeOne({"lo", "hi", "wide"});
  if (opcode == "mul" || opcode == "mad") {
    if (part.empty()) throw Fault("which part of the product");
    return DecodeProduct(b, i, opcode, part), true;
  }
  if (!part.empty()) throw Fault("no product");
  const bool saturates = i.Take("sat");
  const Type type = i.TakeType();
  Run run = IsPacked(type) ? Packed(opcode, type) : Plain(opcode, type);
  if (saturates) {
    run = type != Type::kS32 ? nullptr
          : opcode == "add"  ? Binary<int32_t, AddSaturated<int32_t>>
          : opcode == "sub"  ? Binary<int32_t, SubtractSaturated<int32_t>>
                             : Run{nullptr};
  }
  const size_t operands = opcode == "abs" || opcode == "neg" ? 2 : opcode == "sad" ? 4 : 3;
  if (i.Operands() != operands) throw Fault("so many operands");
  const uint32_t x = b.Read(i.At(1), type);
  const uint32_t y = i.Operands() > 2 ? b.Read(i.At(2), type) : 0;
  const uint32_t z = i.Operands() > 3 ? b.Read(i.At(3), type) : 0;
  b.Emit(run, b.Write(i.At(0)), x, y, z);
  return true;
}

}  // namespace standin::ptx
