#include "neighbors.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace torchcall {
namespace {

namespace ffi = xla::ffi;
using Dims = ffi::Span<const int64_t>;

// `jax.vmap` adds leading axes; an operand's are equal to those of the results, or of length 1.
// Iterates over the results' leading axes and locates each operand's part.
class Mapped {
 public:
  explicit Mapped(Dims leading) : leading_(leading.begin(), leading.end()) {
    for (const int64_t size : leading_) count_ *= size;
  }
  int64_t count() const { return count_; }

  // The pointer to part `index` of a buffer whose parts have `rank` axes.
  template <typename T, typename Buffer>
  T* Part(const Buffer& buffer, size_t rank, int64_t index) const {
    const auto dims = buffer.dimensions();
    int64_t part_size = 1;
    for (size_t axis = dims.size() - rank; axis < dims.size(); ++axis) part_size *= dims[axis];
    int64_t part = 0;
    int64_t stride = 1;
    for (size_t axis = dims.size() - rank; axis-- > 0;) {
      part += (dims[axis] == 1 ? 0 : index % leading_[axis]) * stride;
      stride *= dims[axis];
      index /= leading_[axis];
    }
    return static_cast<T*>(buffer.untyped_data()) + part * part_size;
  }

  bool Fits(Dims dims, size_t rank) const {
    if (dims.size() != leading_.size() + rank) return false;
    for (size_t axis = 0; axis < leading_.size(); ++axis) {
      if (dims[axis] != 1 && dims[axis] != leading_[axis]) return false;
    }
    return true;
  }

 private:
  std::vector<int64_t> leading_;
  int64_t count_ = 1;
};

ffi::Error Refuse(const char* what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                    std::string("torchcall: neighbor_list: expected ") + what);
}

// Writes the positions of the set bits of `words`, in order, then zeros. Returns their number.
int32_t CompactBits(const uint32_t* words, int64_t n_words, int32_t* word, int32_t* bit,
                    int64_t capacity) {
  int64_t found = 0;
  for (int64_t w = 0; w < n_words; ++w) {
    uint32_t bits = words[w];
    if (found + 32 > capacity) {
      for (; bits != 0; bits &= bits - 1, ++found) {
        if (found >= capacity) continue;
        word[found] = static_cast<int32_t>(w);
        bit[found] = std::countr_zero(bits);
      }
      continue;
    }
    for (; bits != 0; bits &= bits - 1, ++found) {
      word[found] = static_cast<int32_t>(w);
      bit[found] = std::countr_zero(bits);
    }
  }
  const int64_t filled = std::min(found, capacity);
  std::fill(word + filled, word + capacity, 0);
  std::fill(bit + filled, bit + capacity, 0);
  return static_cast<int32_t>(found);
}

ffi::Error CompactBitsImpl(ffi::Buffer<ffi::U32> words, ffi::Result<ffi::Buffer<ffi::S32>> word,
                           ffi::Result<ffi::Buffer<ffi::S32>> bit,
                           ffi::Result<ffi::Buffer<ffi::S32>> count) {
  const Mapped mapped(count->dimensions());
  if (!mapped.Fits(words.dimensions(), 1) || !mapped.Fits(word->dimensions(), 1) ||
      !mapped.Fits(bit->dimensions(), 1)) {
    return Refuse("words (m,), word and bit (c,), and their count ()");
  }
  for (int64_t i = 0; i < mapped.count(); ++i) {
    count->typed_data()[i] =
        CompactBits(mapped.Part<uint32_t>(words, 1, i), words.dimensions().back(),
                    mapped.Part<int32_t>(*word, 1, i), mapped.Part<int32_t>(*bit, 1, i),
                    word->dimensions().back());
  }
  return ffi::Error::Success();
}

// An image is packed into three fields of ten bits.
constexpr int32_t kImageBits = 10;
constexpr int32_t kImageMask = (1 << kImageBits) - 1;
constexpr int32_t kImageZero = 1 << (kImageBits - 1);
constexpr int32_t kNoImage =
    kImageZero | kImageZero << kImageBits | kImageZero << (2 * kImageBits);  // images (0, 0, 0)

// Three components and an unused lane, in one register.
template <typename Real>
struct VectorOf {
  using Type [[gnu::vector_size(4 * sizeof(Real))]] = Real;
};
template <typename Real>
using Vector = typename VectorOf<Real>::Type;
using IntVector [[gnu::vector_size(16)]] = int32_t;

// The data of an atom that a pair needs, contiguous in memory.
template <typename Real>
struct Atom {
  Vector<Real> x;
  Vector<Real> wraps;
};

struct Sizes {
  int64_t candidates, atoms, systems, edges;
};

template <typename Real>
struct Geometry {
  const int32_t *sender, *receiver, *image, *wraps, *batch;
  const Real *positions, *cell;
};

template <typename Real>
struct Edges {
  int32_t *senders, *receivers;
  Real* offsets;
  int64_t capacity;
  int64_t count = 0;
};

// Processes the candidates p … end − 1 of sender i. The rows of h are its system's lattice vectors.
template <typename Real>
void SelectCloseTo(int32_t i, const Real* h, const Geometry<Real>& in,
                   const std::vector<Atom<Real>>& atoms, int64_t p, int64_t end, Real limit,
                   Edges<Real>& edges) {
  using Reals = Vector<Real>;
  const Reals a = {h[0], h[1], h[2], 0}, b = {h[3], h[4], h[5], 0}, c = {h[6], h[7], h[8], 0};
  // A masked field is an image times a power of two; scaling it in floating point is exact.
  const IntVector fields = {kImageMask, kImageMask << kImageBits, kImageMask << 2 * kImageBits, 0};
  const Reals scale = {1, Real(1) / (1 << kImageBits), Real(1) / (1 << 2 * kImageBits), 0};
  const Reals zero = {kImageZero, kImageZero, kImageZero, 0};
  const Reals from = atoms[i].x;
  const Reals base = atoms[i].wraps - zero;
  int64_t count = edges.count;
  for (; p < end; ++p) {
    const int32_t j = in.receiver[p];
    if (static_cast<uint32_t>(j) >= atoms.size()) continue;
    const Atom<Real>& to = atoms[j];
    const int32_t code = in.image[p];
    const IntVector codes = IntVector{code, code, code, code} & fields;
    const Reals s = __builtin_convertvector(codes, Reals) * scale + (base - to.wraps);
    const Reals r = to.x - from + (s[0] * a + s[1] * b + s[2] * c);
    const Reals squares = r * r;
    const Real square = squares[0] + squares[1] + squares[2];
    if (count < edges.capacity) {  // written in any case, counted if close: no branch on it
      edges.senders[count] = i;
      edges.receivers[count] = j;
      std::memcpy(edges.offsets + 3 * count, &s, 3 * sizeof(Real));
    }
    const bool itself = (i == j) & (code == kNoImage);
    count += static_cast<int64_t>(!itself) & static_cast<int64_t>(square < limit);
  }
  edges.count = count;
}

// Selects |x_j − x_i + S h|² < limit, S = image + wraps_i − wraps_j, without (i, i, 0); returns how
// many there are. Atoms may coincide: a pair's length never excludes it.
template <typename Real>
int32_t SelectClose(const Geometry<Real>& in, const Sizes& sizes, int64_t n_pairs, Real limit,
                    std::vector<Atom<Real>>& atoms, int32_t* edge_index, Real* offsets) {
  const int64_t n = sizes.atoms;
  for (int64_t a = 0; a < n; ++a) {
    const Real* x = in.positions + 3 * a;
    const auto wraps = [&](int64_t axis) { return static_cast<Real>(in.wraps[axis * n + a]); };
    atoms[a].x = Vector<Real>{x[0], x[1], x[2], 0};
    atoms[a].wraps = Vector<Real>{wraps(0), wraps(1), wraps(2), 0};
  }
  Edges<Real> edges = {edge_index, edge_index + sizes.edges, offsets, sizes.edges};
  for (int64_t p = 0; p < n_pairs;) {
    const int32_t i = in.sender[p];
    int64_t end = p + 1;
    while (end < n_pairs && in.sender[end] == i) ++end;
    const bool known = static_cast<uint32_t>(i) < n;
    const int64_t system = sizes.systems == 1 || !known ? 0 : in.batch[i];
    if (known && system >= 0 && system < sizes.systems) {
      SelectCloseTo(i, in.cell + 9 * system, in, atoms, p, end, limit, edges);
    }
    p = end;
  }
  for (int64_t e = std::min(edges.count, sizes.edges); e < sizes.edges; ++e) {
    edges.senders[e] = edges.receivers[e] = static_cast<int32_t>(n);
    offsets[3 * e] = 1;
    offsets[3 * e + 1] = offsets[3 * e + 2] = 0;
  }
  return static_cast<int32_t>(edges.count);
}

using Ints = ffi::Buffer<ffi::S32>;

template <ffi::DataType kDtype>
ffi::Error SelectCloseOf(const Ints& sender, const Ints& receiver, const Ints& image,
                         const Ints& n_pairs, const Ints& wraps, const ffi::AnyBuffer& positions,
                         const ffi::AnyBuffer& cell, const Ints& batch, Ints& edge_index,
                         ffi::AnyBuffer& offsets, Ints& n_edges, double limit) {
  using Real = ffi::NativeType<kDtype>;
  const Mapped mapped(n_edges.dimensions());
  const Sizes sizes = {sender.dimensions().back(), batch.dimensions().back(),
                       cell.dimensions()[cell.dimensions().size() - 3],
                       edge_index.dimensions().back()};
  std::vector<Atom<Real>> atoms(sizes.atoms);
  for (int64_t i = 0; i < mapped.count(); ++i) {
    const Geometry<Real> geometry = {
        mapped.Part<int32_t>(sender, 1, i), mapped.Part<int32_t>(receiver, 1, i),
        mapped.Part<int32_t>(image, 1, i),  mapped.Part<int32_t>(wraps, 2, i),
        mapped.Part<int32_t>(batch, 1, i),  mapped.Part<Real>(positions, 2, i),
        mapped.Part<Real>(cell, 3, i),
    };
    const int64_t pairs = *mapped.Part<int32_t>(n_pairs, 0, i);
    n_edges.typed_data()[i] = SelectClose<Real>(
        geometry, sizes, std::clamp<int64_t>(pairs, 0, sizes.candidates), static_cast<Real>(limit),
        atoms, mapped.Part<int32_t>(edge_index, 2, i), mapped.Part<Real>(offsets, 2, i));
  }
  return ffi::Error::Success();
}

ffi::Error SelectCloseImpl(Ints sender, Ints receiver, Ints image, Ints n_pairs, Ints wraps,
                           ffi::AnyBuffer positions, ffi::AnyBuffer cell, Ints batch,
                           ffi::Result<Ints> edge_index, ffi::Result<ffi::AnyBuffer> offsets,
                           ffi::Result<Ints> n_edges, double limit) {
  const Mapped mapped(n_edges->dimensions());
  const bool fit = mapped.Fits(sender.dimensions(), 1) && mapped.Fits(receiver.dimensions(), 1) &&
                   mapped.Fits(image.dimensions(), 1) && mapped.Fits(n_pairs.dimensions(), 0) &&
                   mapped.Fits(wraps.dimensions(), 2) && mapped.Fits(positions.dimensions(), 2) &&
                   mapped.Fits(cell.dimensions(), 3) && mapped.Fits(batch.dimensions(), 1) &&
                   mapped.Fits(edge_index->dimensions(), 2) &&
                   mapped.Fits(offsets->dimensions(), 2) &&
                   positions.element_type() == cell.element_type() &&
                   positions.element_type() == offsets->element_type();
  if (!fit) return Refuse("pairs (v,), wraps (3, n), positions (n, 3), cells (b, 3, 3)");
  switch (positions.element_type()) {
    case ffi::F32:
      return SelectCloseOf<ffi::F32>(sender, receiver, image, n_pairs, wraps, positions, cell,
                                     batch, *edge_index, *offsets, *n_edges, limit);
    case ffi::F64:
      return SelectCloseOf<ffi::F64>(sender, receiver, image, n_pairs, wraps, positions, cell,
                                     batch, *edge_index, *offsets, *n_edges, limit);
    default:
      return Refuse("positions of dtype float32 or float64");
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER(kCompactBits, CompactBitsImpl,
                       ffi::Ffi::Bind()
                           .Arg<ffi::Buffer<ffi::U32>>()
                           .Ret<ffi::Buffer<ffi::S32>>()
                           .Ret<ffi::Buffer<ffi::S32>>()
                           .Ret<ffi::Buffer<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER(kSelectClose, SelectCloseImpl,
                       ffi::Ffi::Bind()
                           .Arg<Ints>()
                           .Arg<Ints>()
                           .Arg<Ints>()
                           .Arg<Ints>()
                           .Arg<Ints>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<Ints>()
                           .Ret<Ints>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<Ints>()
                           .Attr<double>("limit"));

XLA_FFI_Handler* CompactBitsHandler() { return kCompactBits; }
XLA_FFI_Handler* SelectCloseHandler() { return kSelectClose; }

}  // namespace torchcall
