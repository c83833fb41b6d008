// Images of atoms: numbers of lattice vectors between two of them.

#ifndef TORCHCALL_XLA_NEIGHBORS_IMAGE_H_
#define TORCHCALL_XLA_NEIGHBORS_IMAGE_H_

#include <cstdint>

#include "frame.h"

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

// The lattice vectors of a system in the precision of its positions.
template <typename Real>
struct Lattice {
  Real rows[3][3];

  explicit Lattice(const Frame& frame) {
    for (int a = 0; a < 3; ++a) {
      for (int k = 0; k < 3; ++k) rows[a][k] = static_cast<Real>(frame.cell[a][k]);
    }
  }

  // n · h. In this order of operations everywhere, so that all loops list the same pairs.
  Real Shift(int32_t image, int k) const {
    return UnpackImage(image, 0) * rows[0][k] + UnpackImage(image, 1) * rows[1][k] +
           UnpackImage(image, 2) * rows[2][k];
  }
};

}  // namespace torchcall

#endif  // TORCHCALL_XLA_NEIGHBORS_IMAGE_H_
