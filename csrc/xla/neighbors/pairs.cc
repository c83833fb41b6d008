// Tests the pairs of atoms in neighbouring bins.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "bins.h"
#include "close.h"
#include "image.h"

namespace torchcall {
namespace {

constexpr int64_t kAtomsPerTask = 2048;
constexpr int64_t kTestsAtOnce = 1 << 22;  // for which there is room beforehand
constexpr int64_t kPairsAtOnce = 1 << 14;  // added to the shared count

int32_t FloorDivide(int32_t a, int32_t n) { return a >= 0 ? a / n : -((n - 1 - a) / n); }

// A column of bins along the run axis, in an image of the two others.
struct Column {
  const int32_t* starts;  // of its first bin
  int32_t image;          // packed; that of the run axis is missing
};

// The columns around that of a bin.
template <typename Real>
void FindColumns(const Bins<Real>& bins, const Grid& grid, const Frame& frame, int32_t place1,
                 int32_t place2, std::vector<Column>& columns) {
  columns.clear();
  const int axis1 = grid.axes[1];
  const int axis2 = grid.axes[2];
  for (int32_t b2 = place2 - grid.reach[2]; b2 <= place2 + grid.reach[2]; ++b2) {
    const int32_t image2 = FloorDivide(b2, grid.counts[2]);
    if (image2 != 0 && !frame.periodic[axis2]) continue;
    for (int32_t b1 = place1 - grid.reach[1]; b1 <= place1 + grid.reach[1]; ++b1) {
      const int32_t image1 = FloorDivide(b1, grid.counts[1]);
      if (image1 != 0 && !frame.periodic[axis1]) continue;
      const int64_t column =
          int64_t{b2 - image2 * grid.counts[2]} * grid.counts[1] + b1 - image1 * grid.counts[1];
      columns.push_back({bins.starts.data() + grid.first_bin + column * grid.counts[0],
                         (image1 + kImageZero) << (kImageBits * axis1) |
                             (image2 + kImageZero) << (kImageBits * axis2)});
    }
  }
}

// The runs of sorted atoms that contain the possible neighbours of the atoms in one bin. Returns
// their number of atoms.
template <typename Real>
int64_t FindRuns(const std::vector<Column>& columns, const Grid& grid, const Frame& frame,
                 int32_t place, std::vector<Run<Real>>& runs) {
  const Lattice<Real> lattice(frame);
  runs.clear();
  int64_t atoms = 0;
  const int axis = grid.axes[0];
  const int32_t n = grid.counts[0];
  const int32_t last = place + grid.reach[0];
  for (int32_t b = place - grid.reach[0]; b <= last;) {
    const int32_t image = FloorDivide(b, n);
    const int32_t from = b - image * n;
    const int32_t to = std::min(last - image * n, n - 1);
    b = image * n + to + 1;
    if (image != 0 && !frame.periodic[axis]) continue;
    for (const Column& column : columns) {
      const int32_t begin = column.starts[from];
      const int32_t end = column.starts[to + 1];
      if (begin == end) continue;
      Run<Real> run = {begin, end, column.image | (image + kImageZero) << (kImageBits * axis), {}};
      for (int k = 0; k < 3; ++k) run.shift[k] = lattice.Shift(run.image, k);
      runs.push_back(run);
      atoms += end - begin;
    }
  }
  return atoms;
}

void Reserve(PairsFound::Block& block, int64_t used, int64_t needed) {
  if (needed <= block.capacity) return;
  block.capacity = std::max(needed, 2 * block.capacity);
  for (std::unique_ptr<int32_t[]>* values : {&block.receivers, &block.images}) {
    auto larger = std::make_unique_for_overwrite<int32_t[]>(block.capacity);
    if (used > 0) std::memcpy(larger.get(), values->get(), used * sizeof(int32_t));
    *values = std::move(larger);
  }
}

struct Task {
  int64_t system, bin, end_bin;
};

template <typename Real>
void TestSome(const Bins<Real>& bins, const std::vector<Frame>& frames, Task task, Real limit,
              int64_t most, std::atomic<int64_t>& total, PairsFound::Block& block,
              std::vector<PairsFound::Place>& atoms) {
  const FindClose<Real> find_close = FindCloseHere<Real>();
  const SortedAtoms<Real> sorted = {bins.x.data(), bins.y.data(), bins.z.data(), bins.order.data()};
  std::vector<Column> columns;
  std::vector<Run<Real>> runs;
  std::vector<int32_t> counts;
  int64_t columns_of = -1;
  int64_t used = 0;
  int64_t pending = 0;
  const int32_t first = bins.starts[task.bin];
  int64_t system = task.system;
  for (int64_t bin = task.bin; bin < task.end_bin; ++bin) {
    const int32_t last = bins.starts[bin + 1];
    if (bins.starts[bin] == last) continue;
    while (bin >= bins.grids[system].first_bin + bins.grids[system].size()) ++system;
    const Grid& grid = bins.grids[system];
    const int64_t column = (bin - grid.first_bin) / grid.counts[0];
    if (columns_of != grid.first_bin + column * grid.counts[0]) {
      columns_of = grid.first_bin + column * grid.counts[0];
      FindColumns(bins, grid, frames[system], static_cast<int32_t>(column % grid.counts[1]),
                  static_cast<int32_t>(column / grid.counts[1]), columns);
    }
    const int64_t tests =
        FindRuns(columns, grid, frames[system], static_cast<int32_t>(bin - columns_of), runs);
    counts.resize(last - first);
    const int64_t at_once =
        std::clamp<int64_t>(kTestsAtOnce / std::max<int64_t>(tests, 1), 1, last - bins.starts[bin]);
    for (int32_t begin = bins.starts[bin]; begin < last;) {
      const auto end = static_cast<int32_t>(std::min<int64_t>(begin + at_once, last));
      const bool stored = total.load(std::memory_order_relaxed) <= most;
      Reserve(block, used, used + tests * (end - begin) + kOverrun);
      int32_t* const own = counts.data() + (begin - first);
      const int64_t found =
          find_close(sorted, begin, end, runs.data(), static_cast<int64_t>(runs.size()), limit,
                     {block.receivers.get() + used, block.images.get() + used}, own);
      pending += found;
      if (pending >= kPairsAtOnce) total += std::exchange(pending, 0);
      if (stored) {
        used += found;
      } else {
        std::fill_n(own, end - begin, 0);
      }
      begin = end;
    }
  }
  total += pending;
  int64_t offset = 0;
  for (size_t k = 0; k < counts.size(); ++k) {
    atoms[bins.order[first + k]] = {block.receivers.get() + offset, block.images.get() + offset,
                                    counts[k]};
    offset += counts[k];
  }
}

}  // namespace

template <typename Real>
void TestBins(const Bins<Real>& bins, const std::vector<Frame>& frames, Real limit, int64_t most,
              const Threads& threads, PairsFound& pairs) {
  const int64_t n_bins = static_cast<int64_t>(bins.starts.size()) - 1;
  std::vector<Task> tasks;
  int64_t system = 0;
  for (int64_t bin = 0; bin < n_bins;) {
    while (bin >= bins.grids[system].first_bin + bins.grids[system].size()) ++system;
    int64_t end = bin + 1;
    while (end < n_bins && bins.starts[end] - bins.starts[bin] < kAtomsPerTask) ++end;
    tasks.push_back({system, bin, end});
    bin = end;
  }
  if (pairs.blocks.size() < tasks.size()) pairs.blocks.resize(tasks.size());
  std::atomic<int64_t> total = 0;
  ForEach(threads, static_cast<int64_t>(tasks.size()), [&](int64_t t) {
    TestSome(bins, frames, tasks[t], limit, most, total, pairs.blocks[t], pairs.of);
  });
  pairs.total = total;
}

template void TestBins(const Bins<float>&, const std::vector<Frame>&, float, int64_t,
                       const Threads&, PairsFound&);
template void TestBins(const Bins<double>&, const std::vector<Frame>&, double, int64_t,
                       const Threads&, PairsFound&);

}  // namespace torchcall
