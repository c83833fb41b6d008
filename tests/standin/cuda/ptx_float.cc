// Arithmetic on floating-point numbers. Approximate instructions are computed in full.

#include <cfenv>
#include <cmath>

#include "ptx_builder.h"

namespace standin::ptx {
namespace {

template <int kMode>
bool Round(Thread&, const Op&) {
  return std::fesetround(kMode), true;
}

template <typename T>
T Flush(T a) {
  using W = Wide<T>;
  const W value = a;
  constexpr double kSmallest = std::is_same_v<T, Half>     ? 0x1p-14
                               : std::is_same_v<T, double> ? 0x1p-1022
                                                           : 0x1p-126;
  return std::fabs(value) < static_cast<W>(kSmallest) ? T(std::copysign(W{0}, value)) : a;
}

// Between 0 and 1; not a number becomes 0.
template <typename T>
T Saturate(T a) {
  using W = Wide<T>;
  const W value = a;
  return value > 0 ? (value < 1 ? a : T(W{1})) : T(W{0});
}
template <typename T>
T Positive(T a) {
  using W = Wide<T>;
  return static_cast<W>(a) < 0 ? T(W{0}) : a;
}

template <typename T>
T MultiplyAdd(T a, T b, T c) {
  if constexpr (kIsSmall<T>) {
    // The product is exact in double.
    return T(static_cast<double>(static_cast<float>(a)) *
                 static_cast<double>(static_cast<float>(b)) +
             static_cast<double>(static_cast<float>(c)));
  } else {
    return std::fma(a, b, c);
  }
}

// Of two numbers; what is not a number gives way unless it must not. -0 is below +0.
template <typename T, bool kIsMax, bool kKeepsNaN>
T Extreme(T first, T second) {
  using W = Wide<T>;
  const W a = first, b = second;
  if (std::isnan(a) || std::isnan(b)) {
    if (kKeepsNaN || (std::isnan(a) && std::isnan(b)))
      return T(std::numeric_limits<W>::quiet_NaN());
    return std::isnan(a) ? second : first;
  }
  if (a == b) return std::signbit(a) != kIsMax ? first : second;
  return (a < b) != kIsMax ? first : second;
}

template <typename T>
T WithSign(T sign, T magnitude) {
  using B = Bits<T>;
  constexpr B kSign = B{1} << (8 * sizeof(T) - 1);
  return std::bit_cast<T>(
      static_cast<B>((std::bit_cast<B>(magnitude) & ~kSign) | (std::bit_cast<B>(sign) & kSign)));
}
template <typename T>
T Negative(T a) {
  using B = Bits<T>;
  return std::bit_cast<T>(static_cast<B>(std::bit_cast<B>(a) ^ (B{1} << (8 * sizeof(T) - 1))));
}
template <typename T>
T Magnitude(T a) {
  using B = Bits<T>;
  return std::bit_cast<T>(static_cast<B>(std::bit_cast<B>(a) & ~(B{1} << (8 * sizeof(T) - 1))));
}

// The same for both halves of 32 bits.
template <typename T, bool kIsPair, auto F>
bool One(Thread& t, const Op& o) {
  if constexpr (kIsPair) {
    const auto a = t.Get<Pair<T>>(o.a);
    return t.Set(o.d, Pair<T>{F(a.of[0]), F(a.of[1])}), true;
  } else {
    return t.Set<T>(o.d, F(t.Get<T>(o.a))), true;
  }
}
template <typename T, bool kIsPair, auto F>
bool Two(Thread& t, const Op& o) {
  if constexpr (kIsPair) {
    const auto a = t.Get<Pair<T>>(o.a), b = t.Get<Pair<T>>(o.b);
    return t.Set(o.d, Pair<T>{F(a.of[0], b.of[0]), F(a.of[1], b.of[1])}), true;
  } else {
    return t.Set<T>(o.d, F(t.Get<T>(o.a), t.Get<T>(o.b))), true;
  }
}
template <typename T, bool kIsPair, auto F>
bool Three(Thread& t, const Op& o) {
  if constexpr (kIsPair) {
    const auto a = t.Get<Pair<T>>(o.a), b = t.Get<Pair<T>>(o.b), c = t.Get<Pair<T>>(o.c);
    return t.Set(o.d, Pair<T>{F(a.of[0], b.of[0], c.of[0]), F(a.of[1], b.of[1], c.of[1])}), true;
  } else {
    return t.Set<T>(o.d, F(t.Get<T>(o.a), t.Get<T>(o.b), t.Get<T>(o.c))), true;
  }
}

template <typename T, bool kIsPair>
Run Named(const std::string& name) {
  using W = Wide<T>;
#define ONE(word, expression)            \
  if (name == word)                      \
  return One<T, kIsPair, [](T in) -> T { \
    const W a = in;                      \
    return T(expression);                \
  }>
#define TWO(word, expression)                \
  if (name == word)                          \
  return Two<T, kIsPair, [](T x, T y) -> T { \
    const W a = x, b = y;                    \
    return T(expression);                    \
  }>
  TWO("add", a + b);
  TWO("sub", a - b);
  TWO("mul", a * b);
  TWO("div", a / b);
  ONE("sqrt", std::sqrt(a));
  ONE("rcp", W{1} / a);
  ONE("rsqrt", static_cast<W>(1 / std::sqrt(static_cast<double>(a))));
  ONE("ex2", std::exp2(a));
  ONE("lg2", std::log2(a));
  ONE("sin", std::sin(a));
  ONE("cos", std::cos(a));
  ONE("tanh", std::tanh(a));
#undef ONE
#undef TWO
  if (name == "flush") return One<T, kIsPair, Flush<T>>;
  if (name == "sat") return One<T, kIsPair, Saturate<T>>;
  if (name == "relu") return One<T, kIsPair, Positive<T>>;
  if (name == "neg") return One<T, kIsPair, Negative<T>>;
  if (name == "abs") return One<T, kIsPair, Magnitude<T>>;
  if (name == "copysign") return Two<T, kIsPair, WithSign<T>>;
  if (name == "xorsign") {
    return Two<T, kIsPair, [](T a, T b) {
      using B = Bits<T>;
      return std::bit_cast<T>(static_cast<B>(std::bit_cast<B>(a) ^ std::bit_cast<B>(b)));
    }>;
  }
  if (name == "fma" || name == "mad") return Three<T, kIsPair, MultiplyAdd<T>>;
  if (name == "min") return Two<T, kIsPair, Extreme<T, false, false>>;
  if (name == "max") return Two<T, kIsPair, Extreme<T, true, false>>;
  if (name == "min.NaN") return Two<T, kIsPair, Extreme<T, false, true>>;
  if (name == "max.NaN") return Two<T, kIsPair, Extreme<T, true, true>>;
  return nullptr;
}

Run Find(const std::string& name, Type type) {
  if (type == Type::kF16x2) return Named<Half, true>(name);
  if (type == Type::kBF16x2) return Named<Brain, true>(name);
  return ForFloats(type, [&]<typename T>() { return Named<T, false>(name); });
}

Run Rounding(const std::string& mode) {
  if (mode == "rz") return Round<FE_TOWARDZERO>;
  if (mode == "rm") return Round<FE_DOWNWARD>;
  if (mode == "rp") return Round<FE_UPWARD>;
  return nullptr;
}

// How many operands it has, with the result; 0: it is not one of these.
size_t OperandsOf(const std::string& opcode) {
  if (opcode == "fma" || opcode == "mad") return 4;
  for (const char* two : {"add", "sub", "mul", "div", "copysign", "min", "max"}) {
    if (opcode == two) return 3;
  }
  for (const char* one :
       {"sqrt", "rcp", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh", "neg", "abs"}) {
    if (opcode == one) return 2;
  }
  return 0;
}

}  // namespace

void EmitFlush(Builder& b, Type type, uint32_t d, uint32_t a) { b.Emit(Find("flush", type), d, a); }
void EmitRounding(Builder& b, const std::string& mode) {
  b.Emit(mode.empty() ? Round<FE_TONEAREST> : Rounding(mode));
}
void EmitInPlace(Builder& b, const std::string& name, Type type, uint32_t d) {
  b.Emit(Find(name, type), d, d);
}

bool DecodeFloat(Builder& b, Instruction& i) {
  const std::string& opcode = i.Opcode();
  const size_t operands = OperandsOf(opcode);
  if (operands == 0) return false;
  const std::string mode = i.TakeOne({"rn", "rz", "rm", "rp", "approx", "full"});
  const bool flushes = i.Take("ftz");
  const bool saturates = i.Take("sat"), relu = i.Take("relu");
  const bool nan = i.Take("NaN");
  const bool xorsign = i.Take("xorsign");
  const bool is_magnitude = xorsign && i.Take("abs");
  const Type type = i.TakeType();
  if (!IsFloat(type)) return false;
  if (i.Operands() != operands) throw Fault("so many operands");
  if (xorsign != is_magnitude) throw Fault("xorsign without abs");
  const Run rounding = Rounding(mode);
  if (rounding != nullptr && type != Type::kF32 && type != Type::kF64) throw Fault("such rounding");

  const uint32_t d = b.Write(i.At(0));
  uint32_t in[3] = {0, 0, 0};
  for (size_t n = 1; n < operands; ++n) {
    in[n - 1] = b.Read(i.At(n), type);
    if (!flushes) continue;
    const uint32_t flushed = b.Temporary();
    EmitFlush(b, type, flushed, in[n - 1]);
    in[n - 1] = flushed;
  }
  uint32_t sign = 0;
  if (xorsign) {
    sign = b.Temporary();
    b.Emit(Find("xorsign", type), sign, in[0], in[1]);
    for (int n = 0; n < 2; ++n) {
      const uint32_t magnitude = b.Temporary();
      b.Emit(Find("abs", type), magnitude, in[n]);
      in[n] = magnitude;
    }
  }
  if (rounding != nullptr) b.Emit(rounding);
  b.Emit(Find(nan ? opcode + ".NaN" : opcode, type), d, in[0], in[1], in[2]);
  if (rounding != nullptr) EmitRounding(b, "");
  if (sign != 0) b.Emit(Find("copysign", type), d, sign, d);
  if (flushes) EmitFlush(b, type, d, d);
  if (saturates) EmitInPlace(b, "sat", type, d);
  if (relu) EmitInPlace(b, "relu", type, d);
  return true;
}

}  // namespace standin::ptx
