#include "slots.h"

#include <algorithm>
#include <cstring>

#include "avx2.h"
#include "image.h"

namespace torchcall {
namespace {

constexpr int64_t kSlotsPerTask = 1 << 16;

// Writes S = image + wraps − wraps_j for each pair. Whole numbers: exact in any order.
template <typename Real>
using WriteOffsets = void (*)(const Atom<Real>* atoms, PairsOfSender<const int32_t> pairs,
                              int64_t n, const Real* wraps, Real* offsets);

template <typename Real>
void WriteOffsetsPortable(const Atom<Real>* atoms, PairsOfSender<const int32_t> pairs, int64_t n,
                          const Real* wraps, Real* offsets) {
  for (int64_t p = 0; p < n; ++p) {
    const Atom<Real>& receiver = atoms[pairs.receivers[p]];
    for (int a = 0; a < 3; ++a) {
      offsets[3 * p + a] = UnpackImage(pairs.images[p], a) + wraps[a] - receiver.wraps[a];
    }
  }
}

#ifdef TORCHCALL_AVX2
TORCHCALL_FOR_AVX2 inline __m128i ImagePlusZero(int32_t image) {
  const __m128i fields =
      _mm_srlv_epi32(_mm_set1_epi32(image), _mm_setr_epi32(0, kImageBits, 2 * kImageBits, 31));
  return _mm_and_si128(fields, _mm_set1_epi32(kImageMask));
}

TORCHCALL_FOR_AVX2 void WriteOffsetsAvx2(const Atom<float>* atoms,
                                         PairsOfSender<const int32_t> pairs, int64_t n,
                                         const float* wraps, float* offsets) {
  const __m128 base = _mm_sub_ps(_mm_loadu_ps(wraps), _mm_set1_ps(kImageZero));
  for (int64_t p = 0; p < n; ++p) {
    const __m128 image = _mm_cvtepi32_ps(ImagePlusZero(pairs.images[p]));
    const __m128 offset =
        _mm_sub_ps(_mm_add_ps(image, base), _mm_loadu_ps(atoms[pairs.receivers[p]].wraps));
    // The fourth lane is overwritten by the next offset; the last has no next.
    if (p + 1 < n) {
      _mm_storeu_ps(offsets + 3 * p, offset);
    } else {
      _mm_maskstore_ps(offsets + 3 * p, _mm_setr_epi32(-1, -1, -1, 0), offset);
    }
  }
}

TORCHCALL_FOR_AVX2 void WriteOffsetsAvx2(const Atom<double>* atoms,
                                         PairsOfSender<const int32_t> pairs, int64_t n,
                                         const double* wraps, double* offsets) {
  const __m256d base = _mm256_sub_pd(_mm256_loadu_pd(wraps), _mm256_set1_pd(kImageZero));
  for (int64_t p = 0; p < n; ++p) {
    const __m256d image = _mm256_cvtepi32_pd(ImagePlusZero(pairs.images[p]));
    const __m256d offset =
        _mm256_sub_pd(_mm256_add_pd(image, base), _mm256_loadu_pd(atoms[pairs.receivers[p]].wraps));
    if (p + 1 < n) {
      _mm256_storeu_pd(offsets + 3 * p, offset);
    } else {
      _mm256_maskstore_pd(offsets + 3 * p, _mm256_setr_epi64x(-1, -1, -1, 0), offset);
    }
  }
}
#endif

template <typename Real>
WriteOffsets<Real> WriteOffsetsHere() {
#ifdef TORCHCALL_AVX2
  if (HasAvx2()) return &WriteOffsetsAvx2;
#endif
  return &WriteOffsetsPortable<Real>;
}

// Expresses offsets in the caller's lattice vectors: S · basis.
template <typename Real>
void ChangeBasis(Real* offsets, int64_t n, const int32_t* basis) {
  for (Real* offset = offsets; offset < offsets + 3 * n; offset += 3) {
    const Real s[3] = {offset[0], offset[1], offset[2]};
    for (int k = 0; k < 3; ++k) {
      offset[k] = s[0] * basis[k] + s[1] * basis[3 + k] + s[2] * basis[6 + k];
    }
  }
}

}  // namespace

template <typename Real>
void Slots<Real>::Write(int64_t begin, int32_t i, PairsOfSender<const int32_t> pairs,
                        int64_t n) const {
  n = std::min(n, list_.capacity - begin);
  if (n <= 0) return;
  std::fill_n(list_.edge_index + begin, n, i);
  std::copy_n(pairs.receivers, n, list_.edge_index + list_.capacity + begin);
  Real* offsets = list_.offsets + 3 * begin;
  WriteOffsetsHere<Real>()(atoms_, pairs, n, atoms_[i].wraps, offsets);
  if (geometry_.basis != nullptr) {
    ChangeBasis(offsets, n, geometry_.basis + 9 * geometry_.batch[i]);
  }
}

template <typename Real>
void Slots<Real>::Clear(int64_t begin, const Threads& threads) const {
  begin = std::min(begin, list_.capacity);
  ForEachPart(threads, list_.capacity - begin, kSlotsPerTask, [&](int64_t from, int64_t to) {
    const auto none = static_cast<int32_t>(geometry_.atoms);
    std::fill(list_.edge_index + begin + from, list_.edge_index + begin + to, none);
    std::fill(list_.edge_index + list_.capacity + begin + from,
              list_.edge_index + list_.capacity + begin + to, none);
    for (int64_t slot = begin + from; slot < begin + to; ++slot) {
      list_.offsets[3 * slot] = 1;
      list_.offsets[3 * slot + 1] = list_.offsets[3 * slot + 2] = 0;
    }
  });
}

template class Slots<float>;
template class Slots<double>;

}  // namespace torchcall
