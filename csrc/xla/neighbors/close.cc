#include "close.h"

#include "avx2.h"
#include "image.h"

namespace torchcall {
namespace {

// Tests vectors of `Test::kLanes` atoms. In this order of operations, r of (i, j) and of (j, i) are
// exactly opposite.
template <typename Real, typename Test>
[[gnu::always_inline]] inline int64_t FindCloseBy(const SortedAtoms<Real>& sorted, int32_t begin,
                                                  int32_t end, const Run<Real>* runs,
                                                  int64_t n_runs, Real limit, Hits hits,
                                                  int32_t* counts) {
  int64_t total = 0;
  for (int32_t p = begin; p < end; ++p) {
    const int64_t before = total;
    const Real center[3] = {sorted.x[p], sorted.y[p], sorted.z[p]};
    for (int64_t s = 0; s < n_runs; ++s) {
      const Run<Real>& run = runs[s];
      const Test test(run, center, limit);
      const bool itself = run.image == kNoImage && p >= run.begin && p < run.end;
      for (int32_t q = run.begin; q < run.end; q += Test::kLanes) {
        uint32_t mask = test.Close(sorted, q);
        const int32_t left = run.end - q;
        if (left < Test::kLanes) mask &= (1u << left) - 1;
        if (itself && p >= q && p < q + Test::kLanes) mask &= ~(1u << (p - q));
        if (mask == 0) continue;
        total += test.Store(mask, sorted.order + q, {hits.receiver + total, hits.image + total});
      }
    }
    counts[p - begin] = static_cast<int32_t>(total - before);
  }
  return total;
}

// For any processor.
template <typename Real>
struct Portable {
  static constexpr int kLanes = 16;
  const Run<Real>& run;
  const Real* center;
  Real limit;

  Portable(const Run<Real>& run, const Real* center, Real limit)
      : run(run), center(center), limit(limit) {}

  uint32_t Close(const SortedAtoms<Real>& sorted, int32_t q) const {
    uint32_t close[kLanes];
    for (int k = 0; k < kLanes; ++k) {
      const Real x = (sorted.x[q + k] - center[0]) + run.shift[0];
      const Real y = (sorted.y[q + k] - center[1]) + run.shift[1];
      const Real z = (sorted.z[q + k] - center[2]) + run.shift[2];
      close[k] = static_cast<uint32_t>(x * x + y * y + z * z < limit) << k;
    }
    uint32_t mask = 0;
    for (const uint32_t bit : close) mask |= bit;
    return mask;
  }

  int64_t Store(uint32_t mask, const int32_t* order, Hits hits) const {
    int64_t found = 0;
    for (; mask != 0; mask &= mask - 1, ++found) {
      hits.receiver[found] = order[__builtin_ctz(mask)];
      hits.image[found] = run.image;
    }
    return found;
  }
};

template <typename Real>
int64_t FindClosePortable(const SortedAtoms<Real>& sorted, int32_t begin, int32_t end,
                          const Run<Real>* runs, int64_t n_runs, Real limit, Hits hits,
                          int32_t* counts) {
  return FindCloseBy<Real, Portable<Real>>(sorted, begin, end, runs, n_runs, limit, hits, counts);
}

#ifdef TORCHCALL_AVX2
struct Avx2Float {
  static constexpr int kLanes = 8;
  __m256i image;
  __m256 c[3], shift[3], limit;

  TORCHCALL_FOR_AVX2 Avx2Float(const Run<float>& run, const float* center, float limit)
      : image(_mm256_set1_epi32(run.image)), limit(_mm256_set1_ps(limit)) {
    for (int k = 0; k < 3; ++k) {
      c[k] = _mm256_set1_ps(center[k]);
      shift[k] = _mm256_set1_ps(run.shift[k]);
    }
  }

  TORCHCALL_FOR_AVX2 uint32_t Close(const SortedAtoms<float>& sorted, int32_t q) const {
    const __m256 x = _mm256_add_ps(_mm256_sub_ps(_mm256_loadu_ps(sorted.x + q), c[0]), shift[0]);
    const __m256 y = _mm256_add_ps(_mm256_sub_ps(_mm256_loadu_ps(sorted.y + q), c[1]), shift[1]);
    const __m256 z = _mm256_add_ps(_mm256_sub_ps(_mm256_loadu_ps(sorted.z + q), c[2]), shift[2]);
    const __m256 square =
        _mm256_add_ps(_mm256_add_ps(_mm256_mul_ps(x, x), _mm256_mul_ps(y, y)), _mm256_mul_ps(z, z));
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(square, limit, _CMP_LT_OQ)));
  }

  TORCHCALL_FOR_AVX2 int64_t Store(uint32_t mask, const int32_t* order, Hits hits) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(hits.image), image);
    return StoreLanes(mask, order, hits.receiver);
  }
};

struct Avx2Double {
  static constexpr int kLanes = 8;
  __m256i image;
  __m256d c[3], shift[3], limit;

  TORCHCALL_FOR_AVX2 Avx2Double(const Run<double>& run, const double* center, double limit)
      : image(_mm256_set1_epi32(run.image)), limit(_mm256_set1_pd(limit)) {
    for (int k = 0; k < 3; ++k) {
      c[k] = _mm256_set1_pd(center[k]);
      shift[k] = _mm256_set1_pd(run.shift[k]);
    }
  }

  TORCHCALL_FOR_AVX2 uint32_t Half(const SortedAtoms<double>& sorted, int32_t q) const {
    const __m256d x = _mm256_add_pd(_mm256_sub_pd(_mm256_loadu_pd(sorted.x + q), c[0]), shift[0]);
    const __m256d y = _mm256_add_pd(_mm256_sub_pd(_mm256_loadu_pd(sorted.y + q), c[1]), shift[1]);
    const __m256d z = _mm256_add_pd(_mm256_sub_pd(_mm256_loadu_pd(sorted.z + q), c[2]), shift[2]);
    const __m256d square =
        _mm256_add_pd(_mm256_add_pd(_mm256_mul_pd(x, x), _mm256_mul_pd(y, y)), _mm256_mul_pd(z, z));
    return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(square, limit, _CMP_LT_OQ)));
  }

  TORCHCALL_FOR_AVX2 uint32_t Close(const SortedAtoms<double>& sorted, int32_t q) const {
    return Half(sorted, q) | Half(sorted, q + 4) << 4;
  }

  TORCHCALL_FOR_AVX2 int64_t Store(uint32_t mask, const int32_t* order, Hits hits) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(hits.image), image);
    return StoreLanes(mask, order, hits.receiver);
  }
};

TORCHCALL_FOR_AVX2 int64_t FindCloseAvx2(const SortedAtoms<float>& sorted, int32_t begin,
                                         int32_t end, const Run<float>* runs, int64_t n_runs,
                                         float limit, Hits hits, int32_t* counts) {
  return FindCloseBy<float, Avx2Float>(sorted, begin, end, runs, n_runs, limit, hits, counts);
}

TORCHCALL_FOR_AVX2 int64_t FindCloseAvx2(const SortedAtoms<double>& sorted, int32_t begin,
                                         int32_t end, const Run<double>* runs, int64_t n_runs,
                                         double limit, Hits hits, int32_t* counts) {
  return FindCloseBy<double, Avx2Double>(sorted, begin, end, runs, n_runs, limit, hits, counts);
}
#endif

}  // namespace

template <typename Real>
FindClose<Real> FindCloseHere() {
#ifdef TORCHCALL_AVX2
  if (HasAvx2()) return &FindCloseAvx2;
#endif
  return &FindClosePortable<Real>;
}

template FindClose<float> FindCloseHere();
template FindClose<double> FindCloseHere();

}  // namespace torchcall
