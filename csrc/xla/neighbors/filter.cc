#include "filter.h"

#include <cstring>

#include "avx2.h"

namespace torchcall {
namespace {

// In this order of operations, r of (i, j) and of (j, i) are exactly opposite.
template <typename Real>
int64_t FilterPortable(const Atom<Real>* atoms, const int32_t* receivers, int64_t n,
                       const Real* center, const Real* shift, Real limit, int32_t* out) {
  int64_t found = 0;
  for (int64_t k = 0; k < n; ++k) {
    const Real* y = atoms[receivers[k]].y;
    const Real rx = (y[0] - center[0]) + shift[0];
    const Real ry = (y[1] - center[1]) + shift[1];
    const Real rz = (y[2] - center[2]) + shift[2];
    out[found] = receivers[k];  // written in any case, counted if close: no branch on it
    found += rx * rx + ry * ry + rz * rz < limit;
  }
  return found;
}

#ifdef TORCHCALL_AVX2
// A bit for each of 8 receivers.
struct CloseFloats {
  __m256 c[3], s[3], limit;

  TORCHCALL_FOR_AVX2 CloseFloats(const float* center, const float* shift, float limit)
      : limit(_mm256_set1_ps(limit)) {
    for (int k = 0; k < 3; ++k) {
      c[k] = _mm256_set1_ps(center[k]);
      s[k] = _mm256_set1_ps(shift[k]);
    }
  }

  TORCHCALL_FOR_AVX2 static __m256 Two(const Atom<float>* atoms, int32_t low, int32_t high) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_load_ps(atoms[low].y)),
                                _mm_load_ps(atoms[high].y), 1);
  }

  TORCHCALL_FOR_AVX2 uint32_t operator()(const Atom<float>* atoms, const int32_t* j) const {
    const __m256 a = Two(atoms, j[0], j[4]), b = Two(atoms, j[1], j[5]);
    const __m256 d = Two(atoms, j[2], j[6]), e = Two(atoms, j[3], j[7]);
    const __m256 ab = _mm256_unpacklo_ps(a, b), de = _mm256_unpacklo_ps(d, e);
    const __m256 ab_z = _mm256_unpackhi_ps(a, b), de_z = _mm256_unpackhi_ps(d, e);
    const __m256 x = _mm256_add_ps(_mm256_sub_ps(_mm256_shuffle_ps(ab, de, 0x44), c[0]), s[0]);
    const __m256 y = _mm256_add_ps(_mm256_sub_ps(_mm256_shuffle_ps(ab, de, 0xee), c[1]), s[1]);
    const __m256 z = _mm256_add_ps(_mm256_sub_ps(_mm256_shuffle_ps(ab_z, de_z, 0x44), c[2]), s[2]);
    const __m256 square =
        _mm256_add_ps(_mm256_add_ps(_mm256_mul_ps(x, x), _mm256_mul_ps(y, y)), _mm256_mul_ps(z, z));
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(square, limit, _CMP_LT_OQ)));
  }
};

struct CloseDoubles {
  __m256d c[3], s[3], limit;

  TORCHCALL_FOR_AVX2 CloseDoubles(const double* center, const double* shift, double limit)
      : limit(_mm256_set1_pd(limit)) {
    for (int k = 0; k < 3; ++k) {
      c[k] = _mm256_set1_pd(center[k]);
      s[k] = _mm256_set1_pd(shift[k]);
    }
  }

  TORCHCALL_FOR_AVX2 uint32_t Half(const Atom<double>* atoms, const int32_t* j) const {
    const __m256d a = _mm256_load_pd(atoms[j[0]].y), b = _mm256_load_pd(atoms[j[1]].y);
    const __m256d d = _mm256_load_pd(atoms[j[2]].y), e = _mm256_load_pd(atoms[j[3]].y);
    const __m256d ab = _mm256_unpacklo_pd(a, b), de = _mm256_unpacklo_pd(d, e);
    const __m256d ab_y = _mm256_unpackhi_pd(a, b), de_y = _mm256_unpackhi_pd(d, e);
    const __m256d x =
        _mm256_add_pd(_mm256_sub_pd(_mm256_permute2f128_pd(ab, de, 0x20), c[0]), s[0]);
    const __m256d y =
        _mm256_add_pd(_mm256_sub_pd(_mm256_permute2f128_pd(ab_y, de_y, 0x20), c[1]), s[1]);
    const __m256d z =
        _mm256_add_pd(_mm256_sub_pd(_mm256_permute2f128_pd(ab, de, 0x31), c[2]), s[2]);
    const __m256d square =
        _mm256_add_pd(_mm256_add_pd(_mm256_mul_pd(x, x), _mm256_mul_pd(y, y)), _mm256_mul_pd(z, z));
    return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(square, limit, _CMP_LT_OQ)));
  }

  TORCHCALL_FOR_AVX2 uint32_t operator()(const Atom<double>* atoms, const int32_t* j) const {
    return Half(atoms, j) | Half(atoms, j + 4) << 4;
  }
};

template <typename Close, typename Real>
[[gnu::always_inline]] TORCHCALL_FOR_AVX2 inline int64_t FilterBy(const Atom<Real>* atoms,
                                                                  const int32_t* receivers,
                                                                  int64_t n, const Real* center,
                                                                  const Real* shift, Real limit,
                                                                  int32_t* out) {
  const Close close(center, shift, limit);
  int64_t found = 0;
  int64_t k = 0;
  for (; k + 8 <= n; k += 8) {
    found += StoreLanes(close(atoms, receivers + k), receivers + k, out + found);
  }
  if (k < n) {
    int32_t last[8] = {};
    std::memcpy(last, receivers + k, (n - k) * sizeof(int32_t));
    found += StoreLanes(close(atoms, last) & ((1u << (n - k)) - 1), last, out + found);
  }
  return found;
}

TORCHCALL_FOR_AVX2 int64_t FilterAvx2(const Atom<float>* atoms, const int32_t* receivers, int64_t n,
                                      const float* center, const float* shift, float limit,
                                      int32_t* out) {
  return FilterBy<CloseFloats>(atoms, receivers, n, center, shift, limit, out);
}

TORCHCALL_FOR_AVX2 int64_t FilterAvx2(const Atom<double>* atoms, const int32_t* receivers,
                                      int64_t n, const double* center, const double* shift,
                                      double limit, int32_t* out) {
  return FilterBy<CloseDoubles>(atoms, receivers, n, center, shift, limit, out);
}
#endif

}  // namespace

template <typename Real>
Filter<Real> FilterHere() {
#ifdef TORCHCALL_AVX2
  if (HasAvx2()) return &FilterAvx2;
#endif
  return &FilterPortable<Real>;
}

template Filter<float> FilterHere();
template Filter<double> FilterHere();

}  // namespace torchcall
