// Images of atoms: numbers of lattice vectors between two of them.

#ifndef TORCHCALL_XLA_NEIGHBORS_IMAGE_H_
#define TORCHCALL_XLA_NEIGHBORS_IMAGE_H_

#include <cstdint>

namespace torchcall {

// Three numbers are packed into fields of ten bits.
constexpr int32_t kImageBits = 10;
constexpr int32_t kImageMask = (1 << kImageBits) - 1;
constexpr int32_t kImageZero = 1 << (kImageBits - 1);
constexpr int32_t kNoImage =
    kImageZero | kImageZero << kImageBits | kImageZero << (2 * kImageBits);  // (0, 0, 0)

constexpr int32_t UnpackImage(int32_t code, int axis) {
  return ((code >> (kImageBits * axis)) & kImageMask) - kImageZero;
}

}  // namespace torchcall

#endif  // TORCHCALL_XLA_NEIGHBORS_IMAGE_H_
