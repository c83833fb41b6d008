// Matrices of 8 by 8 numbers of 16 bits that a warp moves between shared memory and registers.

#include "ptx_space.h"

namespace standin::ptx {
namespace {

bool WaitForWarp(Thread& t, const Op&) { return t.state = Thread::kWaitsForWarp, false; }
bool Add(Thread& t, const Op& o) { return t.slots[o.d] = t.slots[o.a] + o.value, true; }

// The slot of a thread's part of the nth matrix.
uint32_t PartOf(const Op& o, int n) {
  return n == 0 ? o.d : n == 1 ? o.b : n == 2 ? o.c : static_cast<uint32_t>(o.value);
}

// Lane 8n + r knows where row r of matrix n is. Lane l has two numbers of each matrix: of row l /
// 4, or, transposed, of that column.
template <bool kLoads, bool kIsTransposed, int kMatrices>
void Move(const std::array<Thread*, 32>& lanes, const Op& o) {
  std::array<std::array<uint16_t, 2>, 32 * kMatrices> parts;
  for (Thread* t : lanes) {
    if (t == nullptr) throw Fault("a matrix that a part of a warp moves");
  }
  const auto at = [&](int n, int row, int column) {
    Thread& t = *lanes[8 * n + row];
    return Memory<Space::kShared>(t, t.slots[o.a], 16) + 2 * column;
  };
  for (int n = 0; n < kMatrices; ++n) {
    for (int lane = 0; lane < 32; ++lane) {
      auto& part = parts[32 * n + lane];
      if (!kLoads) part = lanes[lane]->Get<std::array<uint16_t, 2>>(PartOf(o, n));
      for (int k = 0; k < 2; ++k) {
        const int along = lane % 4 * 2 + k;
        char* const place = kIsTransposed ? at(n, along, lane / 4) : at(n, lane / 4, along);
        kLoads ? std::memcpy(&part[k], place, 2) : std::memcpy(place, &part[k], 2);
      }
    }
  }
  // Only now: a result's register may be the address's.
  for (int n = 0; kLoads && n < kMatrices; ++n) {
    for (int lane = 0; lane < 32; ++lane) lanes[lane]->Set(PartOf(o, n), parts[32 * n + lane]);
  }
}

template <bool kLoads, bool kIsTransposed>
Together Find(const std::string& count) {
  if (count == "x1") return Move<kLoads, kIsTransposed, 1>;
  if (count == "x2") return Move<kLoads, kIsTransposed, 2>;
  if (count == "x4") return Move<kLoads, kIsTransposed, 4>;
  return nullptr;
}

}  // namespace

bool DecodeMatrix(Builder& b, Instruction& i) {
  if (i.Opcode() != "ldmatrix" && i.Opcode() != "stmatrix") return false;
  const bool loads = i.Opcode() == "ldmatrix";
  if (!i.Take("sync") || !i.Take("aligned") || !i.Take("m8n8")) throw Fault("such matrices");
  const std::string count = i.TakeOne({"x1", "x2", "x4"});
  const bool is_transposed = i.Take("trans");
  if (TakeSpace(i) != Space::kShared || i.TakeType() != Type::kB16) throw Fault("such matrices");
  const Together together =
      loads ? (is_transposed ? Find<true, true>(count) : Find<true, false>(count))
            : (is_transposed ? Find<false, true>(count) : Find<false, false>(count));
  const std::vector<Operand>& parts = i.At(loads ? 0 : 1).parts;
  if (together == nullptr || parts.size() != static_cast<size_t>(count[1] - '0')) {
    throw Fault("such matrices");
  }
  uint32_t slots[4] = {0, 0, 0, 0};
  for (size_t n = 0; n < parts.size(); ++n) {
    slots[n] = loads ? b.Write(parts[n]) : b.Read(parts[n], Type::kB32);
  }
  int64_t offset = 0;
  const uint32_t base = b.Base(i.At(loads ? 1 : 0), Space::kShared, &offset), at = b.Temporary();
  const uint32_t all = b.Constant(UINT32_MAX);
  b.WaitsForOthers();
  b.Emit(Add, at, base, 0, 0, offset);
  Op& op = b.Emit(WaitForWarp, slots[0], at, slots[1], slots[2], slots[3]);
  op.e = all;
  op.together = together;
  return true;
}

}  // namespace standin::ptx
