// Comparisons and what chooses by them.

#include <cmath>

#include "ptx_builder.h"

namespace standin::ptx {
namespace {

template <typename T, auto F>
bool Compare(Thread& t, const Op& o) {
  const Wide<T> a = t.Get<T>(o.a), b = t.Get<T>(o.b);
  return t.slots[o.d] = F(a, b) ? 1 : 0, true;
}

template <typename W>
bool IsNaN(W a) {
  if constexpr (std::is_floating_point_v<W>) return std::isnan(a);
  return false;
}

template <typename T>
Run Comparison(const std::string& name) {
  using W = Wide<T>;
  if (name == "eq") return Compare<T, [](W a, W b) { return (a == b); }>;
  if (name == "ne") return Compare<T, [](W a, W b) { return (a < b) || (a > b); }>;
  if (name == "lt" || name == "lo") return Compare<T, [](W a, W b) { return (a < b); }>;
  if (name == "le" || name == "ls") return Compare<T, [](W a, W b) { return (a <= b); }>;
  if (name == "gt" || name == "hi") return Compare<T, [](W a, W b) { return (a > b); }>;
  if (name == "ge" || name == "hs") return Compare<T, [](W a, W b) { return (a >= b); }>;
  if constexpr (std::is_floating_point_v<W>) {
    if (name == "equ") return Compare<T, [](W a, W b) { return !(a < b || a > b); }>;
    if (name == "neu") return Compare<T, [](W a, W b) { return (a != b); }>;
    if (name == "ltu") return Compare<T, [](W a, W b) { return !(a >= b); }>;
    if (name == "leu") return Compare<T, [](W a, W b) { return !(a > b); }>;
    if (name == "gtu") return Compare<T, [](W a, W b) { return !(a <= b); }>;
    if (name == "geu") return Compare<T, [](W a, W b) { return !(a < b); }>;
    if (name == "num") return Compare<T, [](W a, W b) { return !IsNaN(a) && !IsNaN(b); }>;
    if (name == "nan") return Compare<T, [](W a, W b) { return IsNaN(a) || IsNaN(b); }>;
  }
  return nullptr;
}

std::string TakeComparison(Instruction& i) {
  return i.TakeOne({"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu",
                    "leu", "gtu", "geu", "num", "nan"});
}

bool And(Thread& t, const Op& o) { return t.slots[o.d] = t.slots[o.a] & t.slots[o.b], true; }
bool Or(Thread& t, const Op& o) { return t.slots[o.d] = t.slots[o.a] | t.slots[o.b], true; }
bool Xor(Thread& t, const Op& o) { return t.slots[o.d] = t.slots[o.a] ^ t.slots[o.b], true; }
bool Not(Thread& t, const Op& o) { return t.slots[o.d] = t.slots[o.a] ^ 1, true; }
bool Select(Thread& t, const Op& o) {
  return t.slots[o.d] = t.slots[(t.slots[o.c] & 1) != 0 ? o.a : o.b], true;
}
template <typename T>
bool IsAtLeastZero(Thread& t, const Op& o) {
  return t.slots[o.d] = t.Get<T>(o.a) >= 0 ? 1 : 0, true;
}

// The comparison of two operands from `first` on, in a fresh slot.
uint32_t EmitComparison(Builder& b, Instruction& i, const std::string& name, Type type,
                        bool flushes, size_t first) {
  uint32_t in[2];
  for (size_t n = 0; n < 2; ++n) {
    in[n] = b.Read(i.At(first + n), type);
    if (!flushes) continue;
    const uint32_t flushed = b.Temporary();
    EmitFlush(b, type, flushed, in[n]);
    in[n] = flushed;
  }
  const uint32_t found = b.Temporary();
  const bool is_order = name == "lo" || name == "ls" || name == "hi" || name == "hs";
  if (is_order && (IsSigned(type) || IsFloat(type))) throw Fault("such a comparison");
  b.Emit(ForNumbers(type, [&]<typename T>() { return Comparison<T>(name); }), found, in[0], in[1]);
  return found;
}

uint32_t EmitCombined(Builder& b, uint32_t found, const std::string& combine, uint32_t with) {
  if (combine.empty()) return found;
  const uint32_t both = b.Temporary();
  b.Emit(combine == "and" ? And : combine == "or" ? Or : Xor, both, found, with);
  return both;
}

void DecodeSetPredicate(Builder& b, Instruction& i) {
  const std::string name = TakeComparison(i), combine = i.TakeOne({"and", "or", "xor"});
  const bool flushes = i.Take("ftz");
  const Type type = i.TakeType();
  const Operand& to = i.At(0);
  const uint32_t with = combine.empty() ? 0 : b.Predicate(i.At(3));
  const uint32_t found = EmitComparison(b, i, name, type, flushes, 1);
  if (to.kind != Operand::kPair) {
    const uint32_t both = EmitCombined(b, found, combine, with);
    b.Emit(Or, b.Write(to), both, both);
    return;
  }
  const uint32_t both = EmitCombined(b, found, combine, with), opposite = b.Temporary();
  b.Emit(Not, opposite, found);
  const uint32_t other = EmitCombined(b, opposite, combine, with);
  b.Emit(Or, b.Write(to.parts.at(0)), both, both);
  b.Emit(Or, b.Write(to.parts.at(1)), other, other);
}

void DecodeSet(Builder& b, Instruction& i) {
  const std::string name = TakeComparison(i), combine = i.TakeOne({"and", "or", "xor"});
  const bool flushes = i.Take("ftz");
  const Type result = i.TakeType(), type = i.TakeType();
  const uint32_t with = combine.empty() ? 0 : b.Predicate(i.At(3));
  const uint32_t found =
      EmitCombined(b, EmitComparison(b, i, name, type, flushes, 1), combine, with);
  uint64_t yes = UINT32_MAX;
  if (result == Type::kF32) {
    yes = 0x3F800000;
  } else if (result != Type::kU32 && result != Type::kS32) {
    throw Fault("such a result");
  }
  b.Emit(Select, b.Write(i.At(0)), b.Constant(yes), b.Constant(0), found);
}

template <typename T>
Run Test(const std::string& name) {
  if (name == "finite") return Compare<T, [](T a, T) { return std::isfinite(a); }>;
  if (name == "infinite") return Compare<T, [](T a, T) { return std::isinf(a); }>;
  if (name == "number") return Compare<T, [](T a, T) { return !std::isnan(a); }>;
  if (name == "notanumber") return Compare<T, [](T a, T) { return std::isnan(a); }>;
  if (name == "normal") return Compare<T, [](T a, T) { return std::isnormal(a); }>;
  if (name == "subnormal") {
    return Compare<T, [](T a, T) { return std::fpclassify(a) == FP_SUBNORMAL; }>;
  }
  return nullptr;
}

}  // namespace

bool DecodeCompare(Builder& b, Instruction& i) {
  const std::string& opcode = i.Opcode();
  if (opcode == "setp") return DecodeSetPredicate(b, i), true;
  if (opcode == "set") return DecodeSet(b, i), true;
  if (opcode == "selp") {
    const Type type = i.TakeType();
    const uint32_t x = b.Read(i.At(1), type), y = b.Read(i.At(2), type);
    return b.Emit(Select, b.Write(i.At(0)), x, y, b.Predicate(i.At(3))), true;
  }
  if (opcode == "slct") {
    const Type type = i.TakeType(), by = i.TakeType();
    const uint32_t x = b.Read(i.At(1), type), y = b.Read(i.At(2), type), found = b.Temporary();
    if (by != Type::kF32 && by != Type::kS32) throw Fault("such a choice");
    b.Emit(by == Type::kF32 ? IsAtLeastZero<float> : IsAtLeastZero<int32_t>, found,
           b.Read(i.At(3), by));
    return b.Emit(Select, b.Write(i.At(0)), x, y, found), true;
  }
  if (opcode == "testp") {
    const std::string name =
        i.TakeOne({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
    const Type type = i.TakeType();
    const Run run = type == Type::kF32   ? Test<float>(name)
                    : type == Type::kF64 ? Test<double>(name)
                                         : nullptr;
    const uint32_t a = b.Read(i.At(1), type);
    return b.Emit(run, b.Write(i.At(0)), a, a), true;
  }
  return false;
}

}  // namespace standin::ptx
