// PTX's types and how one is chosen from an instruction's modifiers.

#ifndef TORCHCALL_STANDIN_CUDA_PTX_NUMBER_H_
#define TORCHCALL_STANDIN_CUDA_PTX_NUMBER_H_

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace standin::ptx {

enum class Type : uint8_t {
  kNone,
  kPred,
  kB8,
  kB16,
  kB32,
  kB64,
  kU8,
  kU16,
  kU32,
  kU64,
  kS8,
  kS16,
  kS32,
  kS64,
  kF16,
  kBF16,
  kF32,
  kF64,
  kF16x2,
  kBF16x2,
  kU16x2,
  kS16x2,
};

// Numbers of 16 bits: what is computed is computed wider and rounded to nearest, ties to even.
// Exact for + - * / and the root of float, whose mantissa has more than twice the bits.
struct Half {
  Half() = default;
  Half(double value) : bits(std::bit_cast<uint16_t>(static_cast<_Float16>(value))) {}   // NOLINT
  Half(float value) : bits(std::bit_cast<uint16_t>(static_cast<_Float16>(value))) {}    // NOLINT
  operator float() const { return static_cast<float>(std::bit_cast<_Float16>(bits)); }  // NOLINT
  uint16_t bits;
};

struct Brain {
  Brain() = default;
  Brain(float value) {  // NOLINT
    const uint32_t wide = std::bit_cast<uint32_t>(value);
    bits = std::isnan(value) ? 0x7FFF : (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16;
  }
  // To odd first, so that rounding twice is rounding once.
  Brain(double value) {  // NOLINT
    const float near = static_cast<float>(value);
    uint32_t wide = std::bit_cast<uint32_t>(near);
    if (std::isfinite(near) && near != value) {
      if (std::fabs(static_cast<double>(near)) > std::fabs(value)) --wide;
      wide |= 1;
    }
    *this = Brain(std::bit_cast<float>(wide));
  }
  operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }  // NOLINT
  uint16_t bits;
};

template <typename T>
struct Pair {
  std::array<T, 2> of;
};

template <typename T>
inline constexpr bool kIsSmall = std::is_same_v<T, Half> || std::is_same_v<T, Brain>;
template <typename T>
inline constexpr bool kIsFloat = std::is_floating_point_v<T> || kIsSmall<T>;

// The type to compute in.
template <typename T>
using Wide = std::conditional_t<kIsSmall<T>, float, T>;

template <typename T>
using Bits =
    std::conditional_t<sizeof(T) == 1, uint8_t,
                       std::conditional_t<sizeof(T) == 2, uint16_t,
                                          std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>>;

// Calls `make.operator()<T>()` with the C++ type; null for a type that is not of the kind.
template <typename Make>
auto ForIntegers(Type type, Make make) -> decltype(make.template operator()<uint32_t>()) {
  switch (type) {
    case Type::kU16:
    case Type::kB16:
      return make.template operator()<uint16_t>();
    case Type::kU32:
    case Type::kB32:
      return make.template operator()<uint32_t>();
    case Type::kU64:
    case Type::kB64:
      return make.template operator()<uint64_t>();
    case Type::kS16:
      return make.template operator()<int16_t>();
    case Type::kS32:
      return make.template operator()<int32_t>();
    case Type::kS64:
      return make.template operator()<int64_t>();
    default:
      return nullptr;
  }
}

template <typename Make>
auto ForFloats(Type type, Make make) -> decltype(make.template operator()<float>()) {
  switch (type) {
    case Type::kF16:
      return make.template operator()<Half>();
    case Type::kBF16:
      return make.template operator()<Brain>();
    case Type::kF32:
      return make.template operator()<float>();
    case Type::kF64:
      return make.template operator()<double>();
    default:
      return nullptr;
  }
}

template <typename Make>
auto ForNumbers(Type type, Make make) -> decltype(make.template operator()<float>()) {
  switch (type) {
    case Type::kU8:
    case Type::kB8:
      return make.template operator()<uint8_t>();
    case Type::kS8:
      return make.template operator()<int8_t>();
    default:
      break;
  }
  const auto found = ForIntegers(type, make);
  return found != nullptr ? found : ForFloats(type, make);
}

Type TypeOf(const char* word);
uint32_t BitsOf(Type type);
bool IsFloat(Type type);
bool IsSigned(Type type);
bool IsPacked(Type type);
Type ElementOf(Type packed);  // the type of a packed type's elements

}  // namespace standin::ptx

#endif  // TORCHCALL_STANDIN_CUDA_PTX_NUMBER_H_
