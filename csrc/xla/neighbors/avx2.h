// What the loops for x86-64 processors with AVX2 share.

#ifndef TORCHCALL_XLA_NEIGHBORS_AVX2_H_
#define TORCHCALL_XLA_NEIGHBORS_AVX2_H_

namespace torchcall {

// Whether to use the loops for AVX2: whether this processor can, unless a test forbids it.
bool HasAvx2();
void ForbidAvx2(bool forbidden);

}  // namespace torchcall

#if defined(__x86_64__) && defined(__GNUC__)
#define TORCHCALL_AVX2 1
#define TORCHCALL_FOR_AVX2 [[gnu::target("avx2,popcnt")]]

#include <immintrin.h>

#include <array>
#include <cstdint>

namespace torchcall {

// For each mask, the lanes that are set, in order.
constexpr std::array<std::array<int32_t, 8>, 256> MakeLanes() {
  std::array<std::array<int32_t, 8>, 256> lanes = {};
  for (int mask = 0; mask < 256; ++mask) {
    int found = 0;
    for (int k = 0; k < 8; ++k) {
      if (mask >> k & 1) lanes[mask][found++] = k;
    }
  }
  return lanes;
}
alignas(32) inline constexpr std::array<std::array<int32_t, 8>, 256> kLanesOf = MakeLanes();

// Stores those of 8 values whose bit in `mask` is set, in order; returns their number. Writes 8.
[[gnu::always_inline]] TORCHCALL_FOR_AVX2 inline int64_t StoreLanes(uint32_t mask,
                                                                    const int32_t* values,
                                                                    int32_t* out) {
  const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(kLanesOf[mask].data()));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(all, lanes));
  return _mm_popcnt_u32(mask);
}

}  // namespace torchcall

#endif

#endif  // TORCHCALL_XLA_NEIGHBORS_AVX2_H_
