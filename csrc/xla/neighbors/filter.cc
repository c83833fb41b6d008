#include "filter.h"

#include <cstring>

#include "avx2.h"

namespace torchcall {
namespace {

// In this order of operations, r of (i, j) and of (j, i) are exactly opposite.
template <typename Real>
int64_t FilterPortable(const Atom<Real>* atoms, PairsOfSender<const int32_t> pairs, int64_t n,
                       const Real* center, const Lattice<Real>& lattice, Real limit,
                       PairsOfSender<int32_t> close) {
  int64_t found = 0;
  for (int64_t p = 0; p < n; ++p) {
    const Real* y = atoms[pairs.receivers[p]].y;
    Real square = 0;
    for (int k = 0; k < 3; ++k) {
      const Real r = (y[k] - center[k]) + lattice.Shift(pairs.images[p], k);
      square += r * r;
    }
    // Written in any case, counted if close: no branch on it.
    close.receivers[found] = pairs.receivers[p];
    close.images[found] = pairs.images[p];
    found += square < limit;
  }
  return found;
}

#ifdef TORCHCALL_AVX2
// A bit for each of 8 pairs.
struct CloseFloats {
  __m256 c[3], h[3][3], limit;

  TORCHCALL_FOR_AVX2 CloseFloats(const float* center, const Lattice<float>& lattice, float limit)
      : limit(_mm256_set1_ps(limit)) {
    for (int k = 0; k < 3; ++k) {
      c[k] = _mm256_set1_ps(center[k]);
      for (int a = 0; a < 3; ++a) h[a][k] = _mm256_set1_ps(lattice.rows[a][k]);
    }
  }

  TORCHCALL_FOR_AVX2 static __m256 Two(const Atom<float>* atoms, int32_t low, int32_t high) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_load_ps(atoms[low].y)),
                                _mm_load_ps(atoms[high].y), 1);
  }

  template <int kAxis>
  TORCHCALL_FOR_AVX2 static __m256 Image(__m256i images) {
    const __m256i field = _mm256_and_si256(_mm256_srli_epi32(images, kImageBits * kAxis),
                                           _mm256_set1_epi32(kImageMask));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(field, _mm256_set1_epi32(kImageZero)));
  }

  TORCHCALL_FOR_AVX2 uint32_t operator()(const Atom<float>* atoms, const int32_t* j,
                                         const int32_t* image) const {
    const __m256 a = Two(atoms, j[0], j[4]), b = Two(atoms, j[1], j[5]);
    const __m256 d = Two(atoms, j[2], j[6]), e = Two(atoms, j[3], j[7]);
    const __m256 ab = _mm256_unpacklo_ps(a, b), de = _mm256_unpacklo_ps(d, e);
    const __m256 ab_z = _mm256_unpackhi_ps(a, b), de_z = _mm256_unpackhi_ps(d, e);
    const __m256 y[3] = {_mm256_shuffle_ps(ab, de, 0x44), _mm256_shuffle_ps(ab, de, 0xee),
                         _mm256_shuffle_ps(ab_z, de_z, 0x44)};
    const __m256i images = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(image));
    const __m256 n[3] = {Image<0>(images), Image<1>(images), Image<2>(images)};
    __m256 square = _mm256_setzero_ps();
    for (int k = 0; k < 3; ++k) {
      const __m256 shift =
          _mm256_add_ps(_mm256_add_ps(_mm256_mul_ps(n[0], h[0][k]), _mm256_mul_ps(n[1], h[1][k])),
                        _mm256_mul_ps(n[2], h[2][k]));
      const __m256 r = _mm256_add_ps(_mm256_sub_ps(y[k], c[k]), shift);
      square = _mm256_add_ps(square, _mm256_mul_ps(r, r));
    }
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(square, limit, _CMP_LT_OQ)));
  }
};

struct CloseDoubles {
  __m256d c[3], h[3][3], limit;

  TORCHCALL_FOR_AVX2 CloseDoubles(const double* center, const Lattice<double>& lattice,
                                  double limit)
      : limit(_mm256_set1_pd(limit)) {
    for (int k = 0; k < 3; ++k) {
      c[k] = _mm256_set1_pd(center[k]);
      for (int a = 0; a < 3; ++a) h[a][k] = _mm256_set1_pd(lattice.rows[a][k]);
    }
  }

  template <int kAxis>
  TORCHCALL_FOR_AVX2 static __m256d Image(__m128i images) {
    const __m128i field =
        _mm_and_si128(_mm_srli_epi32(images, kImageBits * kAxis), _mm_set1_epi32(kImageMask));
    return _mm256_cvtepi32_pd(_mm_sub_epi32(field, _mm_set1_epi32(kImageZero)));
  }

  TORCHCALL_FOR_AVX2 uint32_t Half(const Atom<double>* atoms, const int32_t* j,
                                   const int32_t* image) const {
    const __m256d a = _mm256_load_pd(atoms[j[0]].y), b = _mm256_load_pd(atoms[j[1]].y);
    const __m256d d = _mm256_load_pd(atoms[j[2]].y), e = _mm256_load_pd(atoms[j[3]].y);
    const __m256d ab = _mm256_unpacklo_pd(a, b), de = _mm256_unpacklo_pd(d, e);
    const __m256d ab_y = _mm256_unpackhi_pd(a, b), de_y = _mm256_unpackhi_pd(d, e);
    const __m256d y[3] = {_mm256_permute2f128_pd(ab, de, 0x20),
                          _mm256_permute2f128_pd(ab_y, de_y, 0x20),
                          _mm256_permute2f128_pd(ab, de, 0x31)};
    const __m128i images = _mm_loadu_si128(reinterpret_cast<const __m128i*>(image));
    const __m256d n[3] = {Image<0>(images), Image<1>(images), Image<2>(images)};
    __m256d square = _mm256_setzero_pd();
    for (int k = 0; k < 3; ++k) {
      const __m256d shift =
          _mm256_add_pd(_mm256_add_pd(_mm256_mul_pd(n[0], h[0][k]), _mm256_mul_pd(n[1], h[1][k])),
                        _mm256_mul_pd(n[2], h[2][k]));
      const __m256d r = _mm256_add_pd(_mm256_sub_pd(y[k], c[k]), shift);
      square = _mm256_add_pd(square, _mm256_mul_pd(r, r));
    }
    return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(square, limit, _CMP_LT_OQ)));
  }

  TORCHCALL_FOR_AVX2 uint32_t operator()(const Atom<double>* atoms, const int32_t* j,
                                         const int32_t* image) const {
    return Half(atoms, j, image) | Half(atoms, j + 4, image + 4) << 4;
  }
};

template <typename Close, typename Real>
[[gnu::always_inline]] TORCHCALL_FOR_AVX2 inline int64_t FilterBy(
    const Atom<Real>* atoms, PairsOfSender<const int32_t> pairs, int64_t n, const Real* center,
    const Lattice<Real>& lattice, Real limit, PairsOfSender<int32_t> close) {
  const Close is_close(center, lattice, limit);
  int64_t found = 0;
  for (int64_t p = 0; p < n; p += 8) {
    const int32_t* receivers = pairs.receivers + p;
    const int32_t* images = pairs.images + p;
    uint32_t lanes = 0xff;
    int32_t last[2][8] = {};
    if (n - p < 8) {
      receivers = static_cast<int32_t*>(std::memcpy(last[0], receivers, (n - p) * sizeof(int32_t)));
      images = static_cast<int32_t*>(std::memcpy(last[1], images, (n - p) * sizeof(int32_t)));
      lanes = (1u << (n - p)) - 1;
    }
    const uint32_t mask = is_close(atoms, receivers, images) & lanes;
    StoreLanes(mask, images, close.images + found);
    found += StoreLanes(mask, receivers, close.receivers + found);
  }
  return found;
}

TORCHCALL_FOR_AVX2 int64_t FilterAvx2(const Atom<float>* atoms, PairsOfSender<const int32_t> pairs,
                                      int64_t n, const float* center, const Lattice<float>& lattice,
                                      float limit, PairsOfSender<int32_t> close) {
  return FilterBy<CloseFloats>(atoms, pairs, n, center, lattice, limit, close);
}

TORCHCALL_FOR_AVX2 int64_t FilterAvx2(const Atom<double>* atoms, PairsOfSender<const int32_t> pairs,
                                      int64_t n, const double* center,
                                      const Lattice<double>& lattice, double limit,
                                      PairsOfSender<int32_t> close) {
  return FilterBy<CloseDoubles>(atoms, pairs, n, center, lattice, limit, close);
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
