// The neighbour list: its update at new positions and cells.

#ifndef TORCHCALL_XLA_NEIGHBORS_LIST_H_
#define TORCHCALL_XLA_NEIGHBORS_LIST_H_

#include <cstdint>

#include "geometry.h"
#include "parallel.h"
#include "search.h"
#include "slots.h"

namespace torchcall {

// When an update searches: when the skin no longer suffices, always, or never.
enum class Schedule : int32_t { kWhenNeeded, kAlways, kNever };

struct Settings {
  double cutoff, skin;
  double limit;  // pairs with |r|² < limit are listed
  Schedule schedule;
};

// All pairs within cutoff + skin of the reference geometry.
template <typename Real>
struct Candidates {
  int64_t capacity;
  int32_t *sender, *receiver, *image;  // (capacity,)
  int32_t* n_pairs;
  int32_t* wraps;   // (3, atoms)
  Real* positions;  // (atoms, 3), the reference
  Real* cell;       // (systems, 3, 3), the reference
};

// Brings a list up to date. Without candidates, every update searches. Throws std::bad_alloc.
template <typename Real>
void Update(const Geometry<Real>& geometry, const Settings& settings, const Threads& threads,
            Workspace<Real>& work, Candidates<Real>* candidates, const List<Real>& list);

struct Counts {
  int32_t problems;
  int64_t candidates, edges;
};

// The numbers of pairs within cutoff + skin and within the cutoff.
template <typename Real>
Counts Count(const Geometry<Real>& geometry, const Settings& settings, Workspace<Real>& work);

}  // namespace torchcall

#endif  // TORCHCALL_XLA_NEIGHBORS_LIST_H_
