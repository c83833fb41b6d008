// Atoms of some systems.

#ifndef TORCHCALL_XLA_NEIGHBORS_GEOMETRY_H_
#define TORCHCALL_XLA_NEIGHBORS_GEOMETRY_H_

#include <cstdint>

namespace torchcall {

// Why a list may lack a pair; the numbers of `Problem` in Python.
enum Problems : int32_t {
  kEdges = 1,
  kCandidates = 2,
  kCell = 8,
  kNotFinite = 16,
  kSkin = 32,
};

// Atoms of some systems. `basis` has integer rows: the lattice vectors of the search are
// basis · cell. Null means the cell's own.
template <typename Real>
struct Geometry {
  const Real* positions;  // (atoms, 3)
  const Real* cell;       // (systems, 3, 3)
  const bool* pbc;        // (systems, 3)
  const int32_t* batch;   // (atoms,), nondecreasing
  const int32_t* basis;   // (systems, 3, 3)
  int64_t atoms, systems;
};

// y = x − wraps · h, where x is an atom's position; and lanes that are not used.
template <typename Real>
struct Atom {
  alignas(4 * sizeof(Real)) Real y[4];
  Real wraps[4];
};

}  // namespace torchcall

#endif  // TORCHCALL_XLA_NEIGHBORS_GEOMETRY_H_
