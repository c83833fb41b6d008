#include "handler.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "avx2.h"
#include "list.h"
#include "xla/ffi/api/ffi.h"

namespace torchcall {
namespace {

namespace ffi = xla::ffi;
namespace nb = nanobind;

// Operands. Those of a list without a skin end before the first candidate.
enum Operand {
  kPositions,
  kCell,
  kPbc,
  kBatch,
  kBasis,
  kProblems,
  kListPositions,
  kListCell,
  kSender,
  kReceiver,
  kImage,
  kPairs,
  kWraps,
  kReferencePositions,
  kReferenceCell,
  kOperands,
};
// Results: the list, then what the operands from kProblems on have become, in the same memory.
enum Result { kEdgeIndex, kOffsets, kCount, kKept };

// Workspaces that no call uses. As many are kept as calls ever ran at once.
template <typename Real>
class Workspaces {
 public:
  using Pointer = std::unique_ptr<Workspace<Real>>;

  Pointer Take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return std::make_unique<Workspace<Real>>();
    Pointer taken = std::move(free_.back());
    free_.pop_back();
    return taken;
  }

  void Return(Pointer workspace) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(workspace));
  }

  static Workspaces& Shared() {
    static auto* const shared = new Workspaces;  // outlives every thread
    return *shared;
  }

 private:
  std::mutex mutex_;
  std::vector<Pointer> free_;
};

// An array, with leading axes that `jax.vmap` added.
struct Array {
  char* data;
  int64_t bytes;
  std::vector<int64_t> shape;

  int64_t Size(int axis_from_last) const { return shape[shape.size() - axis_from_last]; }
};

// The arrays of one update: the operands, and the results.
struct Pointers {
  std::vector<const void*> operands;
  std::vector<void*> results;
  int64_t atoms, systems, edges, candidates;
};

// Null if every matrix is the identity.
const int32_t* BasisOf(const void* operand, int64_t systems) {
  const auto* basis = static_cast<const int32_t*>(operand);
  for (int64_t k = 0; k < 9 * systems; ++k) {
    if (basis[k] != (k % 9 % 4 == 0)) return basis;
  }
  return nullptr;
}

template <typename Real>
Geometry<Real> GeometryOf(const std::vector<const void*>& operands, int64_t atoms,
                          int64_t systems) {
  return {static_cast<const Real*>(operands[kPositions]),
          static_cast<const Real*>(operands[kCell]),
          static_cast<const bool*>(operands[kPbc]),
          static_cast<const int32_t*>(operands[kBatch]),
          BasisOf(operands[kBasis], systems),
          atoms,
          systems};
}

template <typename Real>
void UpdateOne(const Pointers& arrays, const Settings& settings, const Threads& threads,
               Workspace<Real>& work) {
  const auto kept = [&](int k) { return arrays.results[kKept + k - kProblems]; };
  const List<Real> list = {arrays.edges,
                           static_cast<int32_t*>(arrays.results[kEdgeIndex]),
                           static_cast<Real*>(arrays.results[kOffsets]),
                           static_cast<int32_t*>(arrays.results[kCount]),
                           static_cast<int32_t*>(kept(kProblems)),
                           static_cast<Real*>(kept(kListPositions)),
                           static_cast<Real*>(kept(kListCell))};
  const bool has_candidates = arrays.operands.size() == kOperands;
  Candidates<Real> candidates = {};
  if (has_candidates) {
    candidates = {arrays.candidates,
                  static_cast<int32_t*>(kept(kSender)),
                  static_cast<int32_t*>(kept(kReceiver)),
                  static_cast<int32_t*>(kept(kImage)),
                  static_cast<int32_t*>(kept(kPairs)),
                  static_cast<int32_t*>(kept(kWraps)),
                  static_cast<Real*>(kept(kReferencePositions)),
                  static_cast<Real*>(kept(kReferenceCell))};
  }
  Update(GeometryOf<Real>(arrays.operands, arrays.atoms, arrays.systems), settings, threads, work,
         has_candidates ? &candidates : nullptr, list);
}

ffi::Error Refuse(const std::string& what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "torchcall: neighbor_list: expected " + what);
}

// The axes that an array has without `jax.vmap`, which adds the same leading axes to all.
constexpr int kRanks[kOperands] = {2, 3, 2, 1, 3, 0, 2, 3, 1, 1, 1, 0, 2, 2, 3};
constexpr int kResultRanks[kKept] = {2, 2, 0};

// Updates `count` lists. The results from kKept on already hold what the operands hold.
template <typename Real>
void UpdateAll(const std::vector<Array>& operands, const std::vector<Array>& results, int64_t count,
               const Settings& settings, const Threads& threads) {
  const bool has_candidates = operands.size() == kOperands;
  Pointers arrays = {{},
                     {},
                     operands[kPositions].Size(2),
                     operands[kCell].Size(3),
                     results[kOffsets].Size(2),
                     has_candidates ? operands[kSender].Size(1) : 0};
  arrays.operands.resize(operands.size());
  arrays.results.resize(results.size());
  auto& workspaces = Workspaces<Real>::Shared();
  auto work = workspaces.Take();
  for (int64_t i = 0; i < count; ++i) {
    const auto part = [&](const Array& array) { return array.data + array.bytes / count * i; };
    std::transform(operands.begin(), operands.end(), arrays.operands.begin(), part);
    std::transform(results.begin(), results.end(), arrays.results.begin(), part);
    UpdateOne(arrays, settings, threads, *work);
  }
  workspaces.Return(std::move(work));
}

Array ArrayOf(const ffi::AnyBuffer& buffer) {
  const auto dims = buffer.dimensions();
  return {static_cast<char*>(buffer.untyped_data()),
          static_cast<int64_t>(buffer.size_bytes()),
          {dims.begin(), dims.end()}};
}

ffi::Error UpdateImpl(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                      double cutoff, double skin, double limit, int32_t schedule) {
  if ((args.size() != kSender && args.size() != kOperands) ||
      rets.size() != kKept + args.size() - kProblems) {
    return Refuse("the operands of one list");
  }
  std::vector<Array> operands;
  std::vector<Array> results;
  for (size_t k = 0; k < args.size(); ++k)
    operands.push_back(ArrayOf(*args.get<ffi::AnyBuffer>(k)));
  for (size_t k = 0; k < rets.size(); ++k) {
    results.push_back(ArrayOf(**rets.get<ffi::AnyBuffer>(k)));
  }
  const std::vector<int64_t> leading = operands[kProblems].shape;
  int64_t count = 1;
  for (const int64_t size : leading) count *= size;
  if (count == 0) return ffi::Error::Success();
  const auto fits = [&](const Array& array, int rank) {
    return array.shape.size() == leading.size() + rank &&
           std::equal(leading.begin(), leading.end(), array.shape.begin());
  };
  bool right = true;
  for (size_t k = 0; k < operands.size(); ++k) right &= fits(operands[k], kRanks[k]);
  for (size_t k = 0; k < kKept; ++k) right &= fits(results[k], kResultRanks[k]);
  if (!right) return Refuse("positions (n, 3), cells (b, 3, 3) and the list's arrays");
  for (size_t k = kProblems; k < operands.size(); ++k) {
    // XLA gives them the same memory.
    const Array& result = results[kKept + k - kProblems];
    if (result.data != operands[k].data) std::memcpy(result.data, operands[k].data, result.bytes);
  }
  const Settings settings = {cutoff, skin, limit, static_cast<Schedule>(schedule)};
  const Threads threads = {std::max<int64_t>(pool.num_threads(), 1),
                           [&pool](std::function<void()> work) { pool.Schedule(std::move(work)); }};
  try {
    switch (args.get<ffi::AnyBuffer>(kPositions)->element_type()) {
      case ffi::F32:
        UpdateAll<float>(operands, results, count, settings, threads);
        break;
      case ffi::F64:
        UpdateAll<double>(operands, results, count, settings, threads);
        break;
      default:
        return Refuse("positions of dtype float32 or float64");
    }
    return ffi::Error::Success();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "torchcall: neighbor_list: out of memory");
  }
}

XLA_FFI_DEFINE_HANDLER(kUpdate, UpdateImpl,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attr<double>("cutoff")
                           .Attr<double>("skin")
                           .Attr<double>("limit")
                           .Attr<int32_t>("schedule"));

// Outside of programs, on NumPy arrays.
using Input = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<nb::c_contig, nb::device::cpu>;

template <typename NdArray>
std::vector<Array> ArraysOf(const std::vector<NdArray>& given) {
  std::vector<Array> arrays;
  for (const NdArray& a : given) {
    Array array = {static_cast<char*>(const_cast<void*>(static_cast<const void*>(a.data()))),
                   static_cast<int64_t>(a.nbytes()),
                   {}};
    for (size_t k = 0; k < a.ndim(); ++k) array.shape.push_back(a.shape(k));
    arrays.push_back(std::move(array));
  }
  return arrays;
}

bool IsDouble(const std::vector<Input>& operands) {
  return operands.at(kPositions).dtype() == nb::dtype<double>();
}

void UpdateOutside(const std::vector<Input>& operands, const std::vector<Output>& results,
                   double cutoff, double skin, double limit, int32_t schedule) {
  const Settings settings = {cutoff, skin, limit, static_cast<Schedule>(schedule)};
  const auto update = IsDouble(operands) ? &UpdateAll<double> : &UpdateAll<float>;
  const std::vector<Array> in = ArraysOf(operands);
  const std::vector<Array> out = ArraysOf(results);
  const nb::gil_scoped_release release;
  update(in, out, 1, settings, Threads{});
}

template <typename Real>
Counts CountIn(const std::vector<Array>& operands, const Settings& settings) {
  std::vector<const void*> pointers;
  for (const Array& array : operands) pointers.push_back(array.data);
  auto work = Workspaces<Real>::Shared().Take();
  const Counts counts =
      Count(GeometryOf<Real>(pointers, operands[kPositions].Size(2), operands[kCell].Size(3)),
            settings, *work);
  Workspaces<Real>::Shared().Return(std::move(work));
  return counts;
}

std::tuple<int, int64_t, int64_t> CountOutside(const std::vector<Input>& operands, double cutoff,
                                               double skin, double limit) {
  const Settings settings = {cutoff, skin, limit, Schedule::kAlways};
  const std::vector<Array> in = ArraysOf(operands);
  const auto count = IsDouble(operands) ? &CountIn<double> : &CountIn<float>;
  const nb::gil_scoped_release release;
  const Counts counts = count(in, settings);
  return {counts.problems, counts.candidates, counts.edges};
}

}  // namespace

void BindNeighbors(nb::module_& m) {
  m.def(
      "neighbor_handler", [] { return nb::capsule(reinterpret_cast<void*>(kUpdate)); },
      nb::sig("def neighbor_handler() -> typing.Any"));
  m.def("forbid_avx2", &ForbidAvx2, nb::arg("forbidden"));
  m.def("update_neighbors", &UpdateOutside, nb::arg("operands"), nb::arg("results"),
        nb::arg("cutoff"), nb::arg("skin"), nb::arg("limit"), nb::arg("schedule"),
        nb::sig("def update_neighbors(operands: collections.abc.Sequence[typing.Any], results: "
                "collections.abc.Sequence[typing.Any], cutoff: float, skin: float, limit: float, "
                "schedule: int) -> None"));
  m.def(
      "count_neighbors", &CountOutside, nb::arg("operands"), nb::arg("cutoff"), nb::arg("skin"),
      nb::arg("limit"),
      nb::sig("def count_neighbors(operands: collections.abc.Sequence[typing.Any], cutoff: float, "
              "skin: float, limit: float) -> tuple[int, int, int]"));
}

}  // namespace torchcall
