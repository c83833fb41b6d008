// Conversions between types.

#include <cmath>

#include "ptx_builder.h"

namespace standin::ptx {
namespace {

enum class Whole { kNo, kNearest, kZero, kDown, kUp };

template <typename W>
W ToWhole(W value, int64_t how) {
  switch (static_cast<Whole>(how)) {
    case Whole::kNo:
      return value;
    case Whole::kNearest:
      return std::nearbyint(value);
    case Whole::kZero:
      return std::trunc(value);
    case Whole::kDown:
      return std::floor(value);
    case Whole::kUp:
      return std::ceil(value);
  }
  return value;
}

// What is out of range becomes the nearest that is in it.
template <typename I, typename W>
I ToInteger(W value) {
  using Limits = std::numeric_limits<I>;
  if (std::isnan(value)) {
    const bool is_zero = sizeof(W) < 8 && sizeof(I) < 8;
    return is_zero ? I{0} : static_cast<I>(Bits<I>{1} << (8 * sizeof(I) - 1));
  }
  // The limit's double is a power of two where it is not exact.
  const double wide = value;
  if (wide <= static_cast<double>(Limits::min())) return Limits::min();
  if (wide >= static_cast<double>(Limits::max())) return Limits::max();
  return static_cast<I>(value);
}

template <typename I, typename J>
I Clamp(J value) {
  using Limits = std::numeric_limits<I>;
  if (std::is_signed_v<J> && value < 0) {
    if (!std::is_signed_v<I>) return 0;
    return static_cast<int64_t>(value) < static_cast<int64_t>(Limits::min())
               ? Limits::min()
               : static_cast<I>(value);
  }
  return static_cast<uint64_t>(value) > static_cast<uint64_t>(Limits::max())
             ? Limits::max()
             : static_cast<I>(value);
}

// An integer as a double that rounds to 16 bits as the integer would.
template <typename I>
double WithoutTail(I value) {
  if constexpr (sizeof(I) == 8) {
    const Bits<I> size = value < 0 ? -static_cast<uint64_t>(value) : value;
    if (size >> 53 != 0) {
      const uint64_t kept = (size & ~uint64_t{0xFFF}) | ((size & 0xFFF) != 0 ? 0x1000 : 0);
      return value < 0 ? -static_cast<double>(kept) : static_cast<double>(kept);
    }
  }
  return static_cast<double>(value);
}

template <typename To, typename From>
bool Convert(Thread& t, const Op& o) {
  const Wide<From> value = t.Get<From>(o.a);
  if constexpr (kIsFloat<To> && kIsFloat<From>) {
    return t.Set<To>(o.d, static_cast<To>(ToWhole(value, o.value))), true;
  } else if constexpr (kIsFloat<From>) {
    return t.Set<To>(o.d, ToInteger<To>(ToWhole(value, o.value))), true;
  } else if constexpr (kIsSmall<To>) {
    return t.Set<To>(o.d, To(WithoutTail(value))), true;
  } else {
    return t.Set<To>(o.d, static_cast<To>(value)), true;
  }
}
template <typename To, typename From>
bool ConvertClamped(Thread& t, const Op& o) {
  return t.Set<To>(o.d, Clamp<To>(t.Get<From>(o.a))), true;
}

template <typename To>
bool ConvertTwo(Thread& t, const Op& o) {
  const Pair<To> both = {To(t.Get<float>(o.b)), To(t.Get<float>(o.a))};
  return t.Set<Pair<To>>(o.d, both), true;
}

Run Find(Type to, Type from, bool clamps) {
  return ForNumbers(to, [&]<typename T>() -> Run {
    return ForNumbers(from, [&]<typename F>() -> Run {
      if constexpr (!kIsFloat<T> && !kIsFloat<F>) {
        if (clamps) return ConvertClamped<T, F>;
      }
      return Convert<T, F>;
    });
  });
}

Whole WholeOf(const std::string& mode) {
  if (mode == "rni") return Whole::kNearest;
  if (mode == "rzi") return Whole::kZero;
  if (mode == "rmi") return Whole::kDown;
  if (mode == "rpi") return Whole::kUp;
  return Whole::kNo;
}

bool RoundToTf32(Thread& t, const Op& o) {
  const uint32_t bits = t.Get<uint32_t>(o.a);
  const bool is_finite = (bits >> 23 & 255) != 255;
  // Ties go away from zero (0), or to even (1).
  const uint32_t half = o.value == 0 ? 0x1000 : 0xFFF + (bits >> 13 & 1);
  return t.Set<uint32_t>(o.d, is_finite ? (bits + half) & ~0x1FFFU : bits), true;
}

}  // namespace

bool DecodeConvert(Builder& b, Instruction& i) {
  if (i.Opcode() != "cvt") return false;
  const std::string mode = i.TakeOne({"rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna"});
  const bool flushes = i.Take("ftz"), saturates = i.Take("sat"), relu = i.Take("relu");
  const uint32_t d = b.Write(i.At(0));
  if (i.Take("tf32")) {
    if ((mode != "rna" && mode != "rn") || saturates || relu || i.TakeType() != Type::kF32) {
      throw Fault("such a conversion");
    }
    b.Emit(RoundToTf32, d, b.Read(i.At(1), Type::kF32), 0, 0, mode == "rn");
    return true;
  }
  const Type to = i.TakeType(), from = i.TakeType();
  if (to == Type::kF16x2 || to == Type::kBF16x2) {
    if (mode != "rn" || from != Type::kF32 || saturates) throw Fault("such a conversion");
    b.Emit(to == Type::kF16x2 ? ConvertTwo<Half> : ConvertTwo<Brain>, d, b.Read(i.At(1), from),
           b.Read(i.At(2), from));
    if (relu) EmitInPlace(b, "relu", to, d);
    return true;
  }
  uint32_t a = b.Read(i.At(1), from);
  if (flushes && from == Type::kF32) {
    const uint32_t flushed = b.Temporary();
    EmitFlush(b, from, flushed, a);
    a = flushed;
  }
  const bool is_small = to == Type::kF16 || to == Type::kBF16;
  const Whole whole = WholeOf(mode);
  if (mode == "rna" || (is_small && mode != "rn" && !mode.empty() && whole == Whole::kNo)) {
    throw Fault("such rounding");
  }
  const bool turns = mode == "rz" || mode == "rm" || mode == "rp";
  if (turns) EmitRounding(b, mode);
  b.Emit(Find(to, from, saturates), d, a, 0, 0, static_cast<int64_t>(whole));
  if (turns) EmitRounding(b, "");
  if (flushes && to == Type::kF32) EmitFlush(b, to, d, d);
  if (saturates && IsFloat(to)) EmitInPlace(b, "sat", to, d);
  if (relu) EmitInPlace(b, "relu", to, d);
  return true;
}

}  // namespace standin::ptx
