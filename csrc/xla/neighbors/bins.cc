#include "bins.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "close.h"

namespace torchcall {
namespace {

constexpr int32_t kLargestReach = 400;  // images are packed into ten bits
constexpr int64_t kAtomsPerTask = 4096;
constexpr int64_t kBinsPerAtom = 4;  // so that empty space needs no memory
constexpr int kRunReach = 4;         // bins within the radius along the run axis
constexpr double kRunCost = 8;       // of a run, in tests of an atom

struct Extent {
  Vector3 low, high;  // in fractions, along open axes
  int64_t atoms = 0;
};

std::vector<Extent> Extents(const int32_t* batch, const std::vector<Vector3>& fractions,
                            int64_t systems) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const Extent nothing = {{kInfinity, kInfinity, kInfinity}, {-kInfinity, -kInfinity, -kInfinity}};
  std::vector<Extent> extents(systems, nothing);
  for (size_t i = 0; i < fractions.size(); ++i) {
    Extent& extent = extents[batch[i]];
    ++extent.atoms;
    for (int a = 0; a < 3; ++a) {
      extent.low[a] = std::min(extent.low[a], fractions[i][a]);
      extent.high[a] = std::max(extent.high[a], fractions[i][a]);
    }
  }
  return extents;
}

// The bins of a system, with `per_radius` bins within the radius along the two axes without runs.
Grid MakeGrid(const Frame& frame, const Extent& extent, double radius, int per_radius) {
  Vector3 lengths;
  for (int a = 0; a < 3; ++a) {
    lengths[a] =
        frame.periodic[a] ? frame.heights[a] : (extent.high[a] - extent.low[a]) * frame.heights[a];
  }
  Grid grid = {};
  const int run =
      static_cast<int>(std::max_element(lengths.begin(), lengths.end()) - lengths.begin());
  grid.axes = {run, (run + 1) % 3, (run + 2) % 3};
  const int64_t most = kBinsPerAtom * extent.atoms + 8;
  std::array<double, 3> wanted;
  for (int k = 0; k < 3; ++k) {
    const double finer = k == 0 ? kRunReach : per_radius;
    wanted[k] = std::clamp(std::floor(lengths[grid.axes[k]] * finer / radius * (1 - 1e-12)), 1.0,
                           static_cast<double>(most));
  }
  while (wanted[0] * wanted[1] * wanted[2] > static_cast<double>(most)) {
    double& largest = *std::max_element(wanted.begin(), wanted.end());
    largest = std::max(std::floor(largest / 2), 1.0);
  }
  for (int k = 0; k < 3; ++k) {
    const int a = grid.axes[k];
    const double length = std::max(lengths[a], 1e-300);
    grid.counts[k] = static_cast<int32_t>(wanted[k]);
    const double reach = std::ceil(radius * wanted[k] / length);
    // Along an open axis, nothing is beyond the last bin.
    const double limit = frame.periodic[a] ? kLargestReach + 1.0 : wanted[k];
    grid.reach[k] = static_cast<int32_t>(std::min(reach, limit));
    grid.low[k] = frame.periodic[a] ? 0 : extent.low[a];
    grid.scale[k] = frame.periodic[a] ? wanted[k] : wanted[k] / length * frame.heights[a];
  }
  return grid;
}

double Cost(const Grid& grid, int64_t atoms) {
  const double runs = (2.0 * grid.reach[1] + 1) * (2.0 * grid.reach[2] + 1);
  const double run = static_cast<double>(atoms) * (2.0 * grid.reach[0] + 1) /
                     (double{1} * grid.counts[0] * grid.counts[1] * grid.counts[2]);
  return runs * (kRunCost + run);
}

int32_t Place(const Grid& grid, const Vector3& fraction, int k) {
  const double scaled = (fraction[grid.axes[k]] - grid.low[k]) * grid.scale[k];
  return std::clamp(static_cast<int32_t>(scaled), 0, grid.counts[k] - 1);
}

}  // namespace

template <typename Real>
int32_t SortIntoBins(const Geometry<Real>& geometry, const std::vector<Frame>& frames,
                     double radius, const std::vector<Vector3>& fractions,
                     const std::vector<Atom<Real>>& atoms, const Threads& threads,
                     Bins<Real>& bins) {
  const std::vector<Extent> extents = Extents(geometry.batch, fractions, geometry.systems);
  int64_t n_bins = 0;
  bins.grids.resize(geometry.systems);
  for (int64_t s = 0; s < geometry.systems; ++s) {
    Grid& grid = bins.grids[s];
    grid = {};
    if (extents[s].atoms > 0) {
      grid = MakeGrid(frames[s], extents[s], radius, 1);
      const Grid finer = MakeGrid(frames[s], extents[s], radius, 2);
      if (Cost(finer, extents[s].atoms) < Cost(grid, extents[s].atoms)) grid = finer;
      for (const int32_t reach : grid.reach) {
        if (reach > kLargestReach) return kCell;
      }
    }
    grid.first_bin = n_bins;
    n_bins += grid.size();
  }

  const int64_t n = geometry.atoms;
  std::vector<int32_t> bin_of(n);
  ForEachPart(threads, n, kAtomsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Grid& grid = bins.grids[geometry.batch[i]];
      const int32_t place[3] = {Place(grid, fractions[i], 0), Place(grid, fractions[i], 1),
                                Place(grid, fractions[i], 2)};
      const int64_t column = int64_t{place[2]} * grid.counts[1] + place[1];
      bin_of[i] = static_cast<int32_t>(grid.first_bin + column * grid.counts[0] + place[0]);
    }
  });
  bins.starts.assign(n_bins + 1, 0);
  for (const int32_t bin : bin_of) ++bins.starts[bin + 1];
  for (int64_t b = 0; b < n_bins; ++b) bins.starts[b + 1] += bins.starts[b];
  bins.order.assign(n + kOverrun, 0);
  for (std::vector<Real>* values : {&bins.x, &bins.y, &bins.z}) values->assign(n + kOverrun, 0);
  std::vector<int32_t> next(bins.starts.begin(), bins.starts.end() - 1);
  for (int64_t i = 0; i < n; ++i) {
    const int32_t p = next[bin_of[i]]++;
    bins.order[p] = static_cast<int32_t>(i);
    bins.x[p] = atoms[i].y[0];
    bins.y[p] = atoms[i].y[1];
    bins.z[p] = atoms[i].y[2];
  }
  return 0;
}

template int32_t SortIntoBins(const Geometry<float>&, const std::vector<Frame>&, double,
                              const std::vector<Vector3>&, const std::vector<Atom<float>>&,
                              const Threads&, Bins<float>&);
template int32_t SortIntoBins(const Geometry<double>&, const std::vector<Frame>&, double,
                              const std::vector<Vector3>&, const std::vector<Atom<double>>&,
                              const Threads&, Bins<double>&);

}  // namespace torchcall
