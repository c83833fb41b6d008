#include "search.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "bins.h"

namespace torchcall {
namespace {

constexpr int64_t kAtomsPerTask = 4096;
constexpr double kFarthest = 1 << 22;  // in cells; beyond it, wraps are not exact in float32

Matrix3 SearchCell(const int32_t* basis, const Matrix3& cell) {
  if (basis == nullptr) return cell;
  Matrix3 rows;
  for (int i = 0; i < 3; ++i) {
    for (int k = 0; k < 3; ++k) rows[i][k] = basis[3 * i + k];
  }
  return Product(rows, cell);
}

// x − n · h.
template <typename Real>
Vector3 Moved(const Real* x, const Vector3& n, const Matrix3& h) {
  Vector3 y;
  for (int k = 0; k < 3; ++k) y[k] = x[k] - (n[0] * h[0][k] + n[1] * h[1][k] + n[2] * h[2][k]);
  return y;
}

template <typename Real>
void SetAtom(const Vector3& y, const Vector3& wraps, Atom<Real>& atom) {
  for (int k = 0; k < 3; ++k) {
    atom.y[k] = static_cast<Real>(y[k]);
    atom.wraps[k] = static_cast<Real>(wraps[k]);
  }
  atom.y[3] = atom.wraps[3] = 0;
}

// Moves the atoms into the cell, and stores their fractional coordinates.
template <typename Real>
int32_t Wrap(const Geometry<Real>& geometry, const Threads& threads, int32_t* wraps,
             Workspace<Real>& work) {
  const int64_t n = geometry.atoms;
  work.atoms.resize(n);
  work.fractions.resize(n);
  std::atomic<bool> finite = true;
  ForEachPart(threads, n, kAtomsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Frame& frame = work.frames[geometry.batch[i]];
      const Matrix3& h = frame.cell;
      const Matrix3& g = frame.inverse;
      const Real* x = geometry.positions + 3 * i;
      Vector3 whole = {};
      for (int a = 0; a < 3; ++a) {
        const double f = x[0] * g[0][a] + x[1] * g[1][a] + x[2] * g[2][a];
        if (!(std::abs(f) < kFarthest)) {
          finite = false;
          return;
        }
        if (frame.periodic[a]) whole[a] = std::floor(f);
        wraps[a * n + i] = static_cast<int32_t>(whole[a]);
        work.fractions[i][a] = f - whole[a];
      }
      SetAtom(Moved(x, whole, h), whole, work.atoms[i]);
    }
  });
  return finite ? 0 : kNotFinite;
}

}  // namespace

template <typename Real>
int32_t CompleteFrames(const Geometry<Real>& geometry, std::vector<Frame>& frames) {
  frames.resize(geometry.systems);
  for (int64_t s = 0; s < geometry.systems; ++s) {
    Matrix3 cell;
    for (int i = 0; i < 3; ++i) {
      for (int k = 0; k < 3; ++k) {
        const double value = geometry.cell[9 * s + 3 * i + k];
        if (!std::isfinite(value)) return kNotFinite;
        cell[i][k] = value;
      }
    }
    const int32_t* basis = geometry.basis == nullptr ? nullptr : geometry.basis + 9 * s;
    frames[s] = CompleteFrame(SearchCell(basis, cell), geometry.pbc + 3 * s);
    if (!IsFinite(frames[s])) return kNotFinite;
  }
  for (int64_t i = 0; i < geometry.atoms; ++i) {
    const int32_t system = geometry.batch[i];
    const bool known = system >= 0 && system < geometry.systems;
    if (!known || (i > 0 && system < geometry.batch[i - 1])) return kNotFinite;
  }
  return 0;
}

template <typename Real>
void WrapBy(const Geometry<Real>& geometry, const std::vector<Frame>& frames, const int32_t* wraps,
            const Threads& threads, std::vector<Atom<Real>>& atoms) {
  const int64_t n = geometry.atoms;
  atoms.resize(n);
  ForEachPart(threads, n, kAtomsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Vector3 w = {double(wraps[i]), double(wraps[n + i]), double(wraps[2 * n + i])};
      SetAtom(Moved(geometry.positions + 3 * i, w, frames[geometry.batch[i]].cell), w, atoms[i]);
    }
  });
}

template <typename Real>
double RoundingError(const std::vector<Frame>& frames, const std::vector<Atom<Real>>& atoms,
                     double radius) {
  Real largest = 0;
  for (const Atom<Real>& atom : atoms) {
    for (int k = 0; k < 3; ++k) largest = std::max(largest, std::abs(atom.y[k]));
  }
  double size = 0;
  for (const Frame& frame : frames) {
    double sum = 0;
    for (const Vector3& row : frame.cell) {
      for (const double value : row) sum += std::abs(value);
    }
    size = std::max(size, sum);
  }
  return 16 * std::numeric_limits<Real>::epsilon() * (largest + radius + size);
}

template <typename Real>
int32_t FindPairs(const Geometry<Real>& geometry, double radius, Real limit, bool exact,
                  int64_t most, const Threads& threads, int32_t* wraps, Workspace<Real>& work) {
  int32_t problems = Wrap(geometry, threads, wraps, work);
  if (problems != 0) return problems;
  const double slack = RoundingError(work.frames, work.atoms, radius);
  if (!exact) {
    radius += slack;
    limit = static_cast<Real>(radius * radius);
  }
  problems = SortIntoBins(geometry, work.frames, radius + slack, work.fractions, work.atoms,
                          threads, work.bins);
  if (problems != 0) return problems;
  work.pairs.of.resize(geometry.atoms);
  TestBins(work.bins, work.frames, limit, most, threads, work.pairs);
  return 0;
}

#define TORCHCALL_INSTANTIATE(Real)                                                              \
  template int32_t CompleteFrames(const Geometry<Real>&, std::vector<Frame>&);                   \
  template void WrapBy(const Geometry<Real>&, const std::vector<Frame>&, const int32_t*,         \
                       const Threads&, std::vector<Atom<Real>>&);                                \
  template double RoundingError(const std::vector<Frame>&, const std::vector<Atom<Real>>&,       \
                                double);                                                         \
  template int32_t FindPairs(const Geometry<Real>&, double, Real, bool, int64_t, const Threads&, \
                             int32_t*, Workspace<Real>&);
TORCHCALL_INSTANTIATE(float)
TORCHCALL_INSTANTIATE(double)

}  // namespace torchcall
