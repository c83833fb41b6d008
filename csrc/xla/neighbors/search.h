// The search for pairs of atoms closer than a radius.

#ifndef TORCHCALL_XLA_NEIGHBORS_SEARCH_H_
#define TORCHCALL_XLA_NEIGHBORS_SEARCH_H_

#include <cstdint>
#include <vector>

#include "bins.h"
#include "frame.h"
#include "geometry.h"
#include "parallel.h"

namespace torchcall {

// The systems' completed cells, in the search's lattice vectors. Returns problems.
template <typename Real>
int32_t CompleteFrames(const Geometry<Real>& geometry, std::vector<Frame>& frames);

// The atoms with the given `wraps`, (3, atoms).
template <typename Real>
void WrapBy(const Geometry<Real>& geometry, const std::vector<Frame>& frames, const int32_t* wraps,
            const Threads& threads, std::vector<Atom<Real>>& atoms);

// A bound on the rounding error of a distance between two atoms.
template <typename Real>
double RoundingError(const std::vector<Frame>& frames, const std::vector<Atom<Real>>& atoms,
                     double radius);

// Those of some candidates that are close.
struct ClosePart {
  struct Sender {
    int32_t atom;
    int64_t count;
  };
  int64_t begin, end;  // of the candidates
  std::vector<int32_t> receivers, images;
  std::vector<Sender> senders;
  int64_t count, first_slot;
  bool valid;
};

// Memory of an update, kept for the next.
template <typename Real>
struct Workspace {
  std::vector<Frame> frames, reference;
  std::vector<Atom<Real>> atoms;
  std::vector<Vector3> fractions;
  Bins<Real> bins;
  PairsFound pairs;
  std::vector<int32_t> wraps;
  std::vector<ClosePart> close;
};

// Finds all (i, j, n) with |y_j − y_i + n h|² < limit, except (i, i, 0), for the frames and atoms
// of `work`: atoms in the cell. Without `exact`, limit is radius² and also pairs are found that are
// farther by a rounding error. All are counted, and about `most` stored. Writes `wraps`, (3,
// atoms). Returns problems; on any, no pairs.
template <typename Real>
int32_t FindPairs(const Geometry<Real>& geometry, double radius, Real limit, bool exact,
                  int64_t most, const Threads& threads, int32_t* wraps, Workspace<Real>& work);

}  // namespace torchcall

#endif  // TORCHCALL_XLA_NEIGHBORS_SEARCH_H_
