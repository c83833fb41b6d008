// Which candidates are close.

#ifndef TORCHCALL_XLA_NEIGHBORS_FILTER_H_
#define TORCHCALL_XLA_NEIGHBORS_FILTER_H_

#include <cstdint>

#include "geometry.h"
#include "image.h"

namespace torchcall {

// Pairs of one sender.
template <typename Int>
struct PairsOfSender {
  Int *receivers, *images;
};

// Stores those of n pairs with |r|² < limit, r = (y_j − center) + image · h, in order; returns
// their number. Writes up to `kFilterOverrun` entries too many.
template <typename Real>
using Filter = int64_t (*)(const Atom<Real>* atoms, PairsOfSender<const int32_t> pairs, int64_t n,
                           const Real* center, const Lattice<Real>& lattice, Real limit,
                           PairsOfSender<int32_t> close);

constexpr int64_t kFilterOverrun = 8;

// The version for this processor.
template <typename Real>
Filter<Real> FilterHere();

}  // namespace torchcall

#endif  // TORCHCALL_XLA_NEIGHBORS_FILTER_H_
