// The innermost loop of the search: which atoms of a run are close to one atom.

#ifndef TORCHCALL_XLA_NEIGHBORS_CLOSE_H_
#define TORCHCALL_XLA_NEIGHBORS_CLOSE_H_

#include <cstdint>

namespace torchcall {

// Arrays are read, and results written, in whole vectors: up to this many entries too many.
constexpr int64_t kOverrun = 16;

// Sorted atoms.
template <typename Real>
struct SortedAtoms {
  const Real *x, *y, *z;
  const int32_t* order;  // the caller's number of each
};

// A run of sorted atoms, displaced by whole lattice vectors.
template <typename Real>
struct Run {
  int32_t begin, end;
  int32_t image;
  Real shift[3];
};

struct Hits {
  int32_t *receiver, *image;
};

// For each sorted atom p of [begin, end): stores the atoms q of the runs with |r|² < limit,
// r = (x_q − x_p) + shift, except p in no image; its number of hits in `counts`. Returns their sum.
template <typename Real>
using FindClose = int64_t (*)(const SortedAtoms<Real>& sorted, int32_t begin, int32_t end,
                              const Run<Real>* runs, int64_t n_runs, Real limit, Hits hits,
                              int32_t* counts);

// The version for this processor.
template <typename Real>
FindClose<Real> FindCloseHere();

}  // namespace torchcall

#endif  // TORCHCALL_XLA_NEIGHBORS_CLOSE_H_
