#include "list.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "filter.h"
#include "image.h"

namespace torchcall {
namespace {

constexpr int64_t kAtomsPerTask = 4096;
constexpr int64_t kCandidatesPerTask = 1 << 16;

// Where the pairs of each task of `kAtomsPerTask` atoms begin.
std::vector<int64_t> Offsets(const std::vector<PairsFound::Place>& of) {
  std::vector<int64_t> offsets = {0};
  for (size_t i = 0; i < of.size(); ++i) {
    if (i % kAtomsPerTask == 0) offsets.push_back(offsets.back());
    offsets.back() += of[i].count;
  }
  return offsets;
}

// The number of values at the beginning that equal the first one; n > 0.
int64_t EqualPrefix(const int32_t* values, int64_t n) {
  const uint64_t twice = static_cast<uint32_t>(values[0]) * uint64_t{0x100000001};
  int64_t k = 1;
  for (; k + 4 <= n; k += 4) {
    uint64_t four[2];
    std::memcpy(four, values + k, sizeof(four));
    if (((four[0] ^ twice) | (four[1] ^ twice)) != 0) break;
  }
  while (k < n && values[k] == values[0]) ++k;
  return k;
}

// Lists the pairs that a search found.
template <typename Real>
void ListPairs(const Geometry<Real>& geometry, const Threads& threads, const Workspace<Real>& work,
               const List<Real>& list) {
  const Slots<Real> slots(geometry, work.atoms.data(), list);
  const std::vector<int64_t> offsets = Offsets(work.pairs.of);
  ForEach(threads, static_cast<int64_t>(offsets.size()) - 1, [&](int64_t t) {
    int64_t slot = offsets[t];
    const int64_t end = std::min((t + 1) * kAtomsPerTask, geometry.atoms);
    for (int64_t i = t * kAtomsPerTask; i < end; ++i) {
      const PairsFound::Place& place = work.pairs.of[i];
      slots.Write(slot, static_cast<int32_t>(i), {place.receiver, place.image}, place.count);
      slot += place.count;
    }
  });
  slots.Clear(work.pairs.total, threads);
  *list.n_edges = static_cast<int32_t>(std::min<int64_t>(work.pairs.total, INT32_MAX));
}

// Keeps the pairs that a search found as candidates.
template <typename Real>
void KeepPairs(const Geometry<Real>& geometry, const Threads& threads, const PairsFound& pairs,
               const Candidates<Real>& candidates) {
  const std::vector<int64_t> offsets = Offsets(pairs.of);
  ForEach(threads, static_cast<int64_t>(offsets.size()) - 1, [&](int64_t t) {
    int64_t slot = offsets[t];
    const int64_t end = std::min((t + 1) * kAtomsPerTask, geometry.atoms);
    for (int64_t i = t * kAtomsPerTask; i < end; ++i) {
      const PairsFound::Place& place = pairs.of[i];
      const int64_t begin = std::min(slot, candidates.capacity);
      const int64_t count = std::min(place.count, candidates.capacity - begin);
      std::fill_n(candidates.sender + begin, count, static_cast<int32_t>(i));
      std::copy_n(place.receiver, count, candidates.receiver + begin);
      std::copy_n(place.image, count, candidates.image + begin);
      slot += place.count;
    }
  });
  *candidates.n_pairs = static_cast<int32_t>(std::min<int64_t>(pairs.total, INT32_MAX));
  std::copy_n(geometry.positions, 3 * geometry.atoms, candidates.positions);
  std::copy_n(geometry.cell, 9 * geometry.systems, candidates.cell);
}

// Whether all of n indices are atoms.
bool AreAtoms(const int32_t* indices, int64_t n, int64_t atoms) {
  const auto last = static_cast<int32_t>(atoms - 1);
  int32_t wrong = 0;  // negative after an index or its distance from the last atom is
  for (int64_t k = 0; k < n; ++k)
    wrong |=
        indices[k] |
        (static_cast<int32_t>(static_cast<uint32_t>(last) - static_cast<uint32_t>(indices[k])));
  return wrong >= 0;
}

// Finds the candidates of one part with |r|² < limit, r = (y_j − y_i) + image · h.
template <typename Real>
void FindClosePart(const Geometry<Real>& geometry, const Candidates<Real>& candidates, Real limit,
                   const Workspace<Real>& work, ClosePart& part) {
  const Filter<Real> filter = FilterHere<Real>();
  for (std::vector<int32_t>* values : {&part.receivers, &part.images}) {
    values->resize(part.end - part.begin + kFilterOverrun);
  }
  part.senders.clear();
  part.count = 0;
  part.valid = false;
  for (int64_t p = part.begin; p < part.end;) {
    const int32_t i = candidates.sender[p];
    const int64_t n = EqualPrefix(candidates.sender + p, part.end - p);
    // Whatever the arrays contain, nothing outside them is read.
    if (i < 0 || i >= geometry.atoms || !AreAtoms(candidates.receiver + p, n, geometry.atoms)) {
      return;
    }
    const int64_t count =
        filter(work.atoms.data(), {candidates.receiver + p, candidates.image + p}, n,
               work.atoms[i].y, Lattice<Real>(work.frames[geometry.batch[i]]), limit,
               {part.receivers.data() + part.count, part.images.data() + part.count});
    part.senders.push_back({i, count});
    part.count += count;
    p += n;
  }
  part.valid = true;
}

// Lists the candidates that are close. Returns problems.
template <typename Real>
int32_t ListClose(const Geometry<Real>& geometry, const Candidates<Real>& candidates, Real limit,
                  const Threads& threads, Workspace<Real>& work, const List<Real>& list) {
  const int64_t n_pairs = std::clamp<int64_t>(*candidates.n_pairs, 0, candidates.capacity);
  const int64_t n_parts = (n_pairs + kCandidatesPerTask - 1) / kCandidatesPerTask;
  work.close.resize(n_parts);
  ForEach(threads, n_parts, [&](int64_t t) {
    ClosePart& part = work.close[t];
    part.begin = t * kCandidatesPerTask;
    part.end = std::min(part.begin + kCandidatesPerTask, n_pairs);
    FindClosePart(geometry, candidates, limit, work, part);
  });
  int64_t count = 0;
  for (ClosePart& part : work.close) {
    if (!part.valid) return kCandidates;
    part.first_slot = count;
    count += part.count;
  }
  const Slots<Real> slots(geometry, work.atoms.data(), list);
  ForEach(threads, n_parts, [&](int64_t t) {
    const ClosePart& part = work.close[t];
    int64_t done = 0;
    for (const ClosePart::Sender& sender : part.senders) {
      slots.Write(part.first_slot + done, sender.atom,
                  {part.receivers.data() + done, part.images.data() + done}, sender.count);
      done += sender.count;
    }
  });
  slots.Clear(count, threads);
  *list.n_edges = static_cast<int32_t>(std::min<int64_t>(count, INT32_MAX));
  return 0;
}

// How far a geometry is from the reference: x = x₀ F + u + n h with F = h₀⁻¹ h. Returns a bound of
// the largest singular value of F⁻¹ and the largest |u|; writes n plus the reference's wraps.
struct Drift {
  double strain, moved;
};

template <typename Real>
Drift MeasureDrift(const Geometry<Real>& geometry, const std::vector<Frame>& frames,
                   const std::vector<Frame>& reference, const Candidates<Real>& candidates,
                   int32_t* wraps) {
  double strain = 0;
  double square = 0;
  std::vector<Matrix3> forward(frames.size());
  for (size_t s = 0; s < frames.size(); ++s) {
    const bool same = frames[s].cell == reference[s].cell;
    const Matrix3 eye = {{{1, 0, 0}, {0, 1, 0}, {0, 0, 1}}};
    forward[s] = same ? eye : Product(reference[s].inverse, frames[s].cell);
    const Matrix3 backward = same ? eye : Product(frames[s].inverse, reference[s].cell);
    double sum = 0;
    for (int i = 0; i < 3; ++i) {
      for (int k = 0; k < 3; ++k) sum += std::pow(backward[i][k] - eye[i][k], 2);
    }
    strain = std::max(strain, std::sqrt(sum));
  }
  const int64_t n = geometry.atoms;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t system = geometry.batch[i];
    const Frame& frame = frames[system];
    const Matrix3& f = forward[system];
    const Real* x = geometry.positions + 3 * i;
    const Real* old = candidates.positions + 3 * i;
    Vector3 u;
    for (int k = 0; k < 3; ++k)
      u[k] = x[k] - (old[0] * f[0][k] + old[1] * f[1][k] + old[2] * f[2][k]);
    Vector3 whole = {};
    for (int a = 0; a < 3; ++a) {
      if (!frame.periodic[a]) continue;
      const Matrix3& g = frame.inverse;
      whole[a] = std::nearbyint(u[0] * g[0][a] + u[1] * g[1][a] + u[2] * g[2][a]);
    }
    double length = 0;
    for (int k = 0; k < 3; ++k) {
      const Matrix3& h = frame.cell;
      u[k] -= whole[0] * h[0][k] + whole[1] * h[1][k] + whole[2] * h[2][k];
      length += u[k] * u[k];
    }
    // Written so that NaN, and what no int32 can hold, count as far.
    const bool near = length < 1e30 && std::abs(whole[0]) < 1e6 && std::abs(whole[1]) < 1e6 &&
                      std::abs(whole[2]) < 1e6;
    if (!near) return {1 + strain, std::numeric_limits<double>::infinity()};
    square = std::max(square, length);
    for (int a = 0; a < 3; ++a) {
      wraps[a * n + i] = candidates.wraps[a * n + i] + static_cast<int32_t>(whole[a]);
    }
  }
  return {1 + strain, std::sqrt(square)};
}

// Whether the candidates contain all pairs within the cutoff. Leaves the atoms in `work`, wrapped
// like the reference.
template <typename Real>
bool Suffices(const Geometry<Real>& geometry, const Settings& settings,
              const Candidates<Real>& candidates, const Threads& threads, Workspace<Real>& work) {
  Geometry<Real> reference = geometry;
  reference.positions = candidates.positions;
  reference.cell = candidates.cell;
  if (CompleteFrames(reference, work.reference) != 0) return false;
  work.wraps.resize(3 * geometry.atoms);
  const Drift drift =
      MeasureDrift(geometry, work.frames, work.reference, candidates, work.wraps.data());
  if (!std::isfinite(drift.moved)) return false;
  WrapBy(geometry, work.frames, work.wraps.data(), threads, work.atoms);
  const double reach = settings.cutoff + settings.skin;
  const double slack = RoundingError(work.frames, work.atoms, reach);
  return drift.strain * (settings.cutoff + 2 * drift.moved) + slack <= reach;
}

template <typename Real>
int32_t UpdateByCandidates(const Geometry<Real>& geometry, const Settings& settings,
                           const Threads& threads, Workspace<Real>& work,
                           const Candidates<Real>& candidates, const List<Real>& list) {
  int32_t problems = 0;
  const bool search = settings.schedule == Schedule::kAlways ||
                      !Suffices(geometry, settings, candidates, threads, work);
  if (search && settings.schedule == Schedule::kNever) return kSkin;
  if (search) {
    const double reach = settings.cutoff + settings.skin;
    problems = FindPairs<Real>(geometry, reach, 0, /*exact=*/false, candidates.capacity, threads,
                               candidates.wraps, work);
    if (problems != 0) return problems;
    KeepPairs(geometry, threads, work.pairs, candidates);
    if (work.pairs.total > candidates.capacity) problems = kCandidates;
  }
  return problems |
         ListClose(geometry, candidates, static_cast<Real>(settings.limit), threads, work, list);
}

}  // namespace

template <typename Real>
void Update(const Geometry<Real>& geometry, const Settings& settings, const Threads& threads,
            Workspace<Real>& work, Candidates<Real>* candidates, const List<Real>& list) {
  *list.n_edges = -1;
  int32_t problems = CompleteFrames(geometry, work.frames);
  if (problems == 0 && candidates != nullptr) {
    problems = UpdateByCandidates(geometry, settings, threads, work, *candidates, list);
  } else if (problems == 0) {
    work.wraps.resize(3 * geometry.atoms);
    problems = FindPairs(geometry, settings.cutoff, static_cast<Real>(settings.limit),
                         /*exact=*/true, list.capacity, threads, work.wraps.data(), work);
    if (problems == 0) ListPairs(geometry, threads, work, list);
  }
  if (*list.n_edges < 0) {  // nothing is known
    Slots<Real>(geometry, nullptr, list).Clear(0, threads);
    *list.n_edges = 0;
  }
  if (*list.n_edges > list.capacity) problems |= kEdges;
  if (*list.problems == 0) {
    std::copy_n(geometry.positions, 3 * geometry.atoms, list.positions);
    std::copy_n(geometry.cell, 9 * geometry.systems, list.cell);
  }
  *list.problems |= problems;
}

template <typename Real>
Counts Count(const Geometry<Real>& geometry, const Settings& settings, Workspace<Real>& work) {
  Counts counts = {CompleteFrames(geometry, work.frames), 0, 0};
  if (counts.problems != 0) return counts;
  work.wraps.resize(3 * geometry.atoms);
  const auto find = [&](double radius, double limit, bool exact) {
    counts.problems = FindPairs(geometry, radius, static_cast<Real>(limit), exact, /*most=*/-1,
                                Threads{}, work.wraps.data(), work);
    return counts.problems == 0 ? work.pairs.total : 0;
  };
  counts.edges = counts.candidates = find(settings.cutoff, settings.limit, true);
  if (settings.skin > 0 && counts.problems == 0) {
    counts.candidates = find(settings.cutoff + settings.skin, 0, false);
  }
  return counts;
}

#define TORCHCALL_INSTANTIATE(Real)                                                              \
  template void Update(const Geometry<Real>&, const Settings&, const Threads&, Workspace<Real>&, \
                       Candidates<Real>*, const List<Real>&);                                    \
  template Counts Count(const Geometry<Real>&, const Settings&, Workspace<Real>&);
TORCHCALL_INSTANTIATE(float)
TORCHCALL_INSTANTIATE(double)

}  // namespace torchcall
