// The slots of a list: one for each edge.

#ifndef TORCHCALL_XLA_NEIGHBORS_SLOTS_H_
#define TORCHCALL_XLA_NEIGHBORS_SLOTS_H_

#include <cstdint>

#include "filter.h"
#include "geometry.h"
#include "parallel.h"

namespace torchcall {

// `positions` and `cell` are those of the last update, or of the first that found a problem.
template <typename Real>
struct List {
  int64_t capacity;
  int32_t* edge_index;  // (2, capacity)
  Real* offsets;        // (capacity, 3)
  int32_t *n_edges, *problems;
  Real *positions, *cell;
};

// Writes the slots of a list.
template <typename Real>
class Slots {
 public:
  Slots(const Geometry<Real>& geometry, const Atom<Real>* atoms, const List<Real>& list)
      : geometry_(geometry), atoms_(atoms), list_(list) {}

  // Writes n pairs of the sender i from slot `begin` on, with S = image + wraps_i − wraps_j; as
  // many as the list has room for.
  void Write(int64_t begin, int32_t i, PairsOfSender<const int32_t> pairs, int64_t n) const;

  // Empties the slots from `begin` on.
  void Clear(int64_t begin, const Threads& threads) const;

 private:
  Geometry<Real> geometry_;
  const Atom<Real>* atoms_;
  List<Real> list_;
};

}  // namespace torchcall

#endif  // TORCHCALL_XLA_NEIGHBORS_SLOTS_H_
