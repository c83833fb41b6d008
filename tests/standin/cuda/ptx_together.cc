// What the threads of a warp or of a block do together.

#include "ptx_together.h"

#include <algorithm>

#include "ptx_space.h"

namespace standin::ptx {
namespace {

using Lanes = std::array<Thread*, 32>;

bool WaitForWarp(Thread& t, const Op&) { return t.state = Thread::kWaitsForWarp, false; }
bool WaitForBlock(Thread& t, const Op&) { return t.state = Thread::kWaitsForBlock, false; }
bool Alone(Thread& t, const Op& o) { return t.Set<uint32_t>(o.d, t.Get<uint32_t>(o.a)), true; }

enum class Way { kUp, kDown, kButterfly, kIndex };

// `value`: the slot that says whether the other lane was in range.
template <Way kWay>
void Shuffle(const Lanes& lanes, const Op& o) {
  std::array<uint32_t, 32> values{};
  for (size_t n = 0; n < 32; ++n) values[n] = lanes[n] ? lanes[n]->Get<uint32_t>(o.a) : UINT32_MAX;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    Thread* const t = lanes[lane];
    if (t == nullptr) continue;
    const uint32_t by = t->Get<uint32_t>(o.b) & 31, control = t->Get<uint32_t>(o.c);
    const uint32_t segment = control >> 8 & 31, clamp = control & 31;
    const uint32_t last = (lane & segment) | (clamp & ~segment);
    uint32_t from = lane;
    bool is_in = false;
    if (kWay == Way::kUp) {
      is_in = static_cast<int>(lane) - static_cast<int>(by) >= static_cast<int>(last);
      from = lane - by;
    } else {
      from = kWay == Way::kDown        ? lane + by
             : kWay == Way::kButterfly ? lane ^ by
                                       : (lane & segment) | (by & ~segment);
      is_in = from <= last;
    }
    t->slots[o.value] = is_in ? 1 : 0;
    t->Set<uint32_t>(o.d, values[is_in ? from : lane]);
  }
}

uint32_t Ballot(const Lanes& lanes, uint32_t predicate) {
  uint32_t votes = 0;
  for (size_t n = 0; n < 32; ++n) {
    if (lanes[n] && (lanes[n]->slots[predicate] & 1) != 0) votes |= 1U << n;
  }
  return votes;
}
uint32_t Present(const Lanes& lanes) {
  uint32_t present = 0;
  for (size_t n = 0; n < 32; ++n) present |= lanes[n] ? 1U << n : 0;
  return present;
}

template <auto F>
void Vote(const Lanes& lanes, const Op& o) {
  const uint32_t result = F(Ballot(lanes, o.a), Present(lanes));
  for (Thread* t : lanes) {
    if (t) t->Set<uint32_t>(o.d, result);
  }
}

template <typename T>
void MatchAny(const Lanes& lanes, const Op& o) {
  for (Thread* t : lanes) {
    if (t == nullptr) continue;
    uint32_t same = 0;
    for (size_t n = 0; n < 32; ++n) {
      if (lanes[n] && lanes[n]->Get<T>(o.a) == t->Get<T>(o.a)) same |= 1U << n;
    }
    t->Set<uint32_t>(o.b, same);
  }
  // Only now: a result's register may be the value's.
  for (Thread* t : lanes) {
    if (t) t->slots[o.d] = t->slots[o.b];
  }
}
template <typename T>
void MatchAll(const Lanes& lanes, const Op& o) {
  const Thread* first = *std::find_if(lanes.begin(), lanes.end(), [](Thread* t) { return t; });
  const T value = first->Get<T>(o.a);
  const bool all = std::all_of(lanes.begin(), lanes.end(),
                               [&](Thread* t) { return !t || t->Get<T>(o.a) == value; });
  for (Thread* t : lanes) {
    if (t == nullptr) continue;
    t->Set<uint32_t>(o.d, all ? Present(lanes) : 0);
    t->slots[o.value] = all ? 1 : 0;
  }
}

template <typename T, auto F>
void Reduce(const Lanes& lanes, const Op& o) {
  T result{};
  bool is_first = true;
  for (const Thread* t : lanes) {
    if (t == nullptr) continue;
    result = is_first ? t->Get<T>(o.a) : static_cast<T>(F(result, t->Get<T>(o.a)));
    is_first = false;
  }
  for (Thread* t : lanes) {
    if (t) t->Set<T>(o.d, result);
  }
}

void Elect(const Lanes& lanes, const Op& o) {
  const auto leader = static_cast<uint32_t>(std::countr_zero(Present(lanes)));
  for (uint32_t n = 0; n < 32; ++n) {
    if (lanes[n] == nullptr) continue;
    lanes[n]->Set<uint32_t>(o.d, leader);
    lanes[n]->slots[o.value] = n == leader ? 1 : 0;
  }
}

void Nothing(const Lanes&, const Op&) {}

Op& Emit(Builder& b, Together together, const Operand& mask, uint32_t d, uint32_t a) {
  if (together == nullptr) throw Fault("a form of an instruction that is not supported");
  b.WaitsForOthers();
  const uint32_t members = b.Read(mask, Type::kB32);
  Op& op = b.Emit(WaitForWarp, d, a);
  op.e = members;
  op.together = together;
  return op;
}

// A result and the predicate beside it, if any.
uint32_t Results(Builder& b, const Operand& operand, int64_t* predicate) {
  *predicate = 0;
  if (operand.kind != Operand::kPair) return b.Write(operand);
  *predicate = b.Write(operand.parts.at(1));
  return b.Write(operand.parts.at(0));
}

void DecodeShuffle(Builder& b, Instruction& i) {
  const std::string way = i.TakeOne({"up", "down", "bfly", "idx"});
  if (!i.Take("sync") || way.empty() || i.TakeType() != Type::kB32) throw Fault("such a shuffle");
  int64_t predicate = 0;
  const uint32_t d = Results(b, i.At(0), &predicate), a = b.Read(i.At(1), Type::kB32);
  const uint32_t by = b.Read(i.At(2), Type::kB32), control = b.Read(i.At(3), Type::kB32);
  Op& op = Emit(b,
                way == "up"     ? Shuffle<Way::kUp>
                : way == "down" ? Shuffle<Way::kDown>
                : way == "bfly" ? Shuffle<Way::kButterfly>
                                : Shuffle<Way::kIndex>,
                i.At(4), d, a);
  op.b = by;
  op.c = control;
  op.value = predicate;
}

void DecodeVote(Builder& b, Instruction& i) {
  const std::string how = i.TakeOne({"all", "any", "uni", "ballot"});
  if (!i.Take("sync") || how.empty()) throw Fault("such a vote");
  if (i.TakeType() != (how == "ballot" ? Type::kB32 : Type::kPred)) throw Fault("such a vote");
  using U = uint32_t;
  const Together together =
      how == "all"   ? Vote<[](U votes, U all) -> U { return votes == all; }>
      : how == "any" ? Vote<[](U votes, U) -> U { return votes != 0; }>
      : how == "uni" ? Vote<[](U votes, U all) -> U { return votes == all || votes == 0; }>
                     : Together{Vote<[](U votes, U) -> U { return votes; }>};
  const uint32_t predicate = b.Predicate(i.At(1));
  Emit(b, together, i.At(2), b.Write(i.At(0)), predicate);
}

void DecodeMatch(Builder& b, Instruction& i) {
  const std::string how = i.TakeOne({"any", "all"});
  if (!i.Take("sync") || how.empty()) throw Fault("such a match");
  const Type type = i.TakeType();
  const bool is_long = BitsOf(type) == 64;
  int64_t predicate = 0;
  const uint32_t d = Results(b, i.At(0), &predicate);
  const Together together = how == "any" ? (is_long ? MatchAny<uint64_t> : MatchAny<uint32_t>)
                                         : (is_long ? MatchAll<uint64_t> : MatchAll<uint32_t>);
  const uint32_t kept = b.Temporary();
  Op& op = Emit(b, together, i.At(2), d, b.Read(i.At(1), type));
  op.b = kept;
  op.value = predicate;
}

template <typename T>
Together Reduction(const std::string& how) {
  if (how == "add") return Reduce<T, [](T a, T b) { return uint32_t(a) + uint32_t(b); }>;
  if (how == "min") return Reduce<T, [](T a, T b) { return std::min(a, b); }>;
  if (how == "max") return Reduce<T, [](T a, T b) { return std::max(a, b); }>;
  if (how == "and") return Reduce<T, [](T a, T b) { return a & b; }>;
  if (how == "or") return Reduce<T, [](T a, T b) { return a | b; }>;
  if (how == "xor") return Reduce<T, [](T a, T b) { return a ^ b; }>;
  return nullptr;
}

void DecodeReduction(Builder& b, Instruction& i) {
  const std::string how = i.TakeOne({"add", "min", "max", "and", "or", "xor"});
  i.Take("sync");
  const Type type = i.TakeType();
  if (BitsOf(type) != 32 || IsFloat(type)) throw Fault("such a reduction");
  Emit(b, type == Type::kS32 ? Reduction<int32_t>(how) : Reduction<uint32_t>(how), i.At(2),
       b.Write(i.At(0)), b.Read(i.At(1), type));
}

// Slots: `a` the barrier, `b` how many threads (0: all), `c` a predicate. `value`: what about it.
void DecodeBarrier(Builder& b, Instruction& i) {
  i.Take("cta");
  i.Take("aligned");
  if (i.Opcode() == "bar" && i.Take("warp")) {
    i.Take("sync");
    Emit(b, Nothing, i.At(0), 0, 0);
    return;
  }
  if (i.Take("cluster")) {  // of one block
    IgnoreOrder(i);
    if (i.Take("arrive")) return;
    if (!i.Take("wait")) throw Fault("such a barrier");
    b.WaitsForOthers();
    b.Emit(WaitForBlock, 0, b.Constant(16));
    return;
  }
  b.WaitsForOthers();
  if (i.Take("sync")) {
    const uint32_t barrier = b.Read(i.At(0), Type::kU32);
    const uint32_t count = i.Operands() > 1 ? b.Read(i.At(1), Type::kU32) : 0;
    b.Emit(WaitForBlock, 0, barrier, count, 0, kOnlyWait);
    return;
  }
  const std::string how = i.TakeOne({"popc", "and", "or"});
  if (!i.Take("red") || how.empty()) throw Fault("such a barrier");
  i.TakeType();
  const size_t last = i.Operands() - 1;
  const uint32_t count = last > 2 ? b.Read(i.At(2), Type::kU32) : 0;
  const uint32_t predicate = b.Predicate(i.At(last));
  b.Emit(WaitForBlock, b.Write(i.At(0)), b.Read(i.At(1), Type::kU32), count, predicate,
         how == "popc"  ? kCount
         : how == "and" ? kAll
                        : kAny);
}

}  // namespace

bool DecodeTogether(Builder& b, Instruction& i) {
  const std::string& opcode = i.Opcode();
  if (opcode == "shfl") return DecodeShuffle(b, i), true;
  if (opcode == "vote") return DecodeVote(b, i), true;
  if (opcode == "match") return DecodeMatch(b, i), true;
  if (opcode == "redux") return DecodeReduction(b, i), true;
  if (opcode == "bar" || opcode == "barrier") return DecodeBarrier(b, i), true;
  if (opcode == "elect") {
    i.Take("sync");
    int64_t predicate = 0;
    const uint32_t d = Results(b, i.At(0), &predicate);
    return Emit(b, Elect, i.At(1), d, 0).value = predicate, true;
  }
  if (opcode == "activemask") {  // who is beside a thread is for the machine to say: nobody
    i.TakeType();
    return b.Emit(Alone, b.Write(i.At(0)), kLanesEqual), true;
  }
  return false;
}

}  // namespace standin::ptx
