// Which candidates are close.

#ifndef TORCHCALL_XLA_NEIGHBORS_FILTER_H_
#define TORCHCALL_XLA_NEIGHBORS_FILTER_H_

#include <cstdint>

#include "geometry.h"

namespace torchcall {

// Stores the receivers j of one sender and image with |r|² < limit, r = (y_j − center) + shift, in
// order; returns their number. Writes up to `kFilterOverrun` entries too many.
template <typename Real>
using Filter = int64_t (*)(const Atom<Real>* atoms, const int32_t* receivers, int64_t n,
                           const Real* center, const Real* shift, Real limit, int32_t* out);

constexpr int64_t kFilterOverrun = 8;

// The version for this processor.
template <typename Real>
Filter<Real> FilterHere();

}  // namespace torchcall

#endif  // TORCHCALL_XLA_NEIGHBORS_FILTER_H_
