// Atoms sorted into bins, and the test of all pairs of neighbouring bins.
//
// Every system is divided into bins along its reciprocal directions. Atoms are sorted by bin; the
// bin number along the run axis varies fastest. In each neighbouring column of bins the possible
// neighbours of an atom are then one run of the sorted atoms. Only bin numbers express periodicity:
// bin b + d of an axis with n bins is bin (b + d) mod n of image floor((b + d) / n).

#ifndef TORCHCALL_XLA_NEIGHBORS_BINS_H_
#define TORCHCALL_XLA_NEIGHBORS_BINS_H_

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "frame.h"
#include "geometry.h"
#include "parallel.h"

namespace torchcall {

// The bins of one system; arrays in the order of `axes`.
struct Grid {
  std::array<int, 3> axes;  // the run axis first, as indices of lattice vectors
  std::array<int32_t, 3> counts;
  std::array<int32_t, 3> reach;      // bins to search on each side
  std::array<double, 3> low, scale;  // bin = (fraction − low) · scale
  int64_t first_bin;
  int64_t size() const { return int64_t{counts[0]} * counts[1] * counts[2]; }
};

template <typename Real>
struct Bins {
  std::vector<Grid> grids;      // (systems,)
  std::vector<int32_t> starts;  // (bins + 1,), first sorted atom of each bin
  // Atoms in sorted order and their coordinates; and some more, so that whole vectors can be read.
  std::vector<int32_t> order;
  std::vector<Real> x, y, z;
};

// Pairs by sender. The hits of an atom are contiguous; those of different atoms lie anywhere.
struct PairsFound {
  struct Block {
    std::unique_ptr<int32_t[]> receivers, images;
    int64_t capacity = 0;
  };
  struct Place {
    const int32_t *receiver, *image;
    int64_t count;
  };
  std::vector<Block> blocks;
  std::vector<Place> of;  // (atoms,), the stored pairs
  int64_t total = 0;      // of all pairs
};

// Chooses the bins for this geometry, so that all pairs within `radius` are in reach, and sorts.
template <typename Real>
int32_t SortIntoBins(const Geometry<Real>& geometry, const std::vector<Frame>& frames,
                     double radius, const std::vector<Vector3>& fractions,
                     const std::vector<Atom<Real>>& atoms, const Threads& threads,
                     Bins<Real>& bins);

// Finds the pairs with |r|² < limit. All are counted. Soon after more than `most` are stored, no
// others are, so that a cell that collapsed does not fill the memory.
template <typename Real>
void TestBins(const Bins<Real>& bins, const std::vector<Frame>& frames, Real limit, int64_t most,
              const Threads& threads, PairsFound& pairs);

}  // namespace torchcall

#endif  // TORCHCALL_XLA_NEIGHBORS_BINS_H_
