// Cells completed to three independent vectors.

#ifndef TORCHCALL_XLA_NEIGHBORS_FRAME_H_
#define TORCHCALL_XLA_NEIGHBORS_FRAME_H_

#include <array>

namespace torchcall {

using Vector3 = std::array<double, 3>;
using Matrix3 = std::array<Vector3, 3>;

// The rows of `cell` are lattice vectors; those of open axes are unit vectors normal to the others.
struct Frame {
  Matrix3 cell;
  Matrix3 inverse;  // cell · inverse = 1
  Vector3 heights;  // distances between the faces of the cell along each axis
  std::array<bool, 3> periodic;
};

// Completes a cell, and inverts it. If a value is not finite or the cell is flat, the result
// contains values that are not finite.
Frame CompleteFrame(const Matrix3& cell, const bool* pbc);

bool IsFinite(const Frame& frame);

Matrix3 Product(const Matrix3& a, const Matrix3& b);

}  // namespace torchcall

#endif  // TORCHCALL_XLA_NEIGHBORS_FRAME_H_
