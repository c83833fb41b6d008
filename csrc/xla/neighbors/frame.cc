#include "frame.h"

#include <cmath>

namespace torchcall {
namespace {

Vector3 Cross(const Vector3& a, const Vector3& b) {
  return {a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]};
}

double Dot(const Vector3& a, const Vector3& b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }

Vector3 Unit(const Vector3& v) {
  const double length = std::sqrt(Dot(v, v));
  if (length == 0) return v;
  return {v[0] / length, v[1] / length, v[2] / length};
}

// A unit vector normal to `v`: `v` is never parallel to the axis of its smallest component.
Vector3 NormalTo(const Vector3& v) {
  int smallest = 0;
  for (int k = 1; k < 3; ++k) {
    if (std::abs(v[k]) < std::abs(v[smallest])) smallest = k;
  }
  Vector3 axis = {0, 0, 0};
  axis[smallest] = 1;
  return Unit(Cross(v, axis));
}

}  // namespace

Frame CompleteFrame(const Matrix3& cell, const bool* pbc) {
  Frame frame = {cell, {}, {}, {pbc[0], pbc[1], pbc[2]}};
  std::array<bool, 3> given = frame.periodic;
  const int n_periodic = given[0] + given[1] + given[2];
  if (n_periodic == 0) {
    frame.cell = {{{1, 0, 0}, {0, 1, 0}, {0, 0, 1}}};
    given = {true, true, true};
  } else if (n_periodic == 1) {
    const int only = given[0] ? 0 : given[1] ? 1 : 2;
    frame.cell[(only + 1) % 3] = NormalTo(cell[only]);
    given[(only + 1) % 3] = true;
  }
  for (int k = 0; k < 3; ++k) {
    if (!given[k]) frame.cell[k] = Unit(Cross(frame.cell[(k + 1) % 3], frame.cell[(k + 2) % 3]));
  }
  for (int k = 0; k < 3; ++k) {
    const Vector3 normal = Cross(frame.cell[(k + 1) % 3], frame.cell[(k + 2) % 3]);
    const double volume = Dot(frame.cell[k], normal);
    for (int row = 0; row < 3; ++row) frame.inverse[row][k] = normal[row] / volume;
    frame.heights[k] = std::abs(volume) / std::sqrt(Dot(normal, normal));
  }
  return frame;
}

bool IsFinite(const Frame& frame) {
  for (int i = 0; i < 3; ++i) {
    if (!std::isfinite(frame.heights[i]) || !(frame.heights[i] > 0)) return false;
    for (int k = 0; k < 3; ++k) {
      if (!std::isfinite(frame.cell[i][k]) || !std::isfinite(frame.inverse[i][k])) return false;
    }
  }
  return true;
}

Matrix3 Product(const Matrix3& a, const Matrix3& b) {
  Matrix3 product = {};
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) {
      for (int k = 0; k < 3; ++k) product[i][j] += a[i][k] * b[k][j];
    }
  }
  return product;
}

}  // namespace torchcall
