#include "ptx_number.h"

#include <cstring>

namespace standin::ptx {
namespace {

struct Named {
  const char* word;
  Type type;
  uint32_t bits;
};
constexpr Named kTypes[] = {
    {"pred", Type::kPred, 1},      {"b8", Type::kB8, 8},        {"b16", Type::kB16, 16},
    {"b32", Type::kB32, 32},       {"b64", Type::kB64, 64},     {"u8", Type::kU8, 8},
    {"u16", Type::kU16, 16},       {"u32", Type::kU32, 32},     {"u64", Type::kU64, 64},
    {"s8", Type::kS8, 8},          {"s16", Type::kS16, 16},     {"s32", Type::kS32, 32},
    {"s64", Type::kS64, 64},       {"f16", Type::kF16, 16},     {"bf16", Type::kBF16, 16},
    {"f32", Type::kF32, 32},       {"f64", Type::kF64, 64},     {"f16x2", Type::kF16x2, 32},
    {"bf16x2", Type::kBF16x2, 32}, {"u16x2", Type::kU16x2, 32}, {"s16x2", Type::kS16x2, 32},
};

}  // namespace

Type TypeOf(const char* word) {
  for (const Named& named : kTypes) {
    if (std::strcmp(named.word, word) == 0) return named.type;
  }
  return Type::kNone;
}

uint32_t BitsOf(Type type) {
  for (const Named& named : kTypes) {
    if (named.type == type) return named.bits;
  }
  return 0;
}

bool IsFloat(Type type) {
  return (type >= Type::kF16 && type <= Type::kF64) || type == Type::kF16x2 ||
         type == Type::kBF16x2;
}
bool IsSigned(Type type) { return type >= Type::kS8 && type <= Type::kS64; }
bool IsPacked(Type type) { return type >= Type::kF16x2; }
Type ElementOf(Type packed) {
  switch (packed) {
    case Type::kF16x2:
      return Type::kF16;
    case Type::kBF16x2:
      return Type::kBF16;
    case Type::kU16x2:
      return Type::kU16;
    case Type::kS16x2:
      return Type::kS16;
    default:
      return packed;
  }
}

}  // namespace standin::ptx
