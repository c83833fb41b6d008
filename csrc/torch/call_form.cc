#include "call_form.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "dtype.h"
#include "guards.h"

namespace torchcall {
namespace {

std::vector<int64_t> ShapeOf(const DLTensor& tensor) {
  return {tensor.shape, tensor.shape + tensor.ndim};
}

c10::ScalarType DtypeOf(DLDataType dtype, const char* name) {
  const auto found = ScalarTypeFromDl(dtype);
  if (!found) {
    throw std::invalid_argument(std::string(name) + ": this dtype has no counterpart in torch");
  }
  return *found;
}

size_t BytesOf(const std::vector<int64_t>& shape, c10::ScalarType dtype) {
  return std::accumulate(shape.begin(), shape.end(), c10::elementSize(dtype),
                         [](size_t bytes, int64_t size) { return bytes * size; });
}

// One core cannot saturate the memory bus: torch copies outputs of this size with all its threads.
constexpr size_t kLarge = size_t{1} << 20;

}  // namespace

at::Tensor View(void* data, c10::IntArrayRef sizes, c10::ScalarType dtype, c10::Device device) {
  return at::for_blob(data, sizes)
      .options(at::TensorOptions().dtype(dtype).device(device))
      .target_device(device)  // otherwise torch asks the driver which device owns this
      .make_tensor();
}

CallForm::CallForm(const TcPlanSpec& spec) : selects_outputs(spec.selects_outputs != 0) {
  lengths.assign(spec.lengths, spec.lengths + spec.num_lengths);
  capacities.assign(lengths.size(), std::numeric_limits<int32_t>::max());
  for (int64_t i = 0; i < spec.num_inputs; ++i) AddInput(spec, i);
  for (int64_t i = 0; i < spec.num_outputs; ++i) AddOutput(spec, i);
}

void CallForm::AddInput(const TcPlanSpec& spec, int64_t i) {
  Input input;
  input.name = spec.input_names[i];
  input.shape = ShapeOf(spec.inputs[i]);
  input.dtype = DtypeOf(spec.inputs[i].dtype, spec.input_names[i]);
  input.narrowing = spec.input_narrowings[i];
  for (const TcLength& length : lengths) {
    input.is_length = input.is_length || length.input == i;
  }
  if (input.is_length) {
    if (input.dtype != c10::ScalarType::Int || !input.shape.empty()) {
      throw std::invalid_argument(input.name + ": expected int32 (), got " +
                                  TypeAndShape(input.dtype, input.shape));
    }
  } else {
    input.copied = spec.input_copies[i] != 0;
    if (spec.casts[i].bits != 0) {
      const c10::ScalarType cast = DtypeOf(spec.casts[i], spec.input_names[i]);
      if (cast != input.dtype) input.cast = cast;
    }
  }
  LimitLength(input.narrowing, input.shape);
  inputs.push_back(std::move(input));
}

void CallForm::AddOutput(const TcPlanSpec& spec, int64_t i) {
  Output output;
  output.name = spec.output_names[i];
  output.shape = ShapeOf(spec.outputs[i]);
  output.dtype = DtypeOf(spec.outputs[i].dtype, spec.output_names[i]);
  output.narrowing = spec.output_narrowings[i];
  output.bytes = BytesOf(output.shape, output.dtype);
  if (output.narrowing.length >= 0 && (output.narrowing.axis != 0 || output.shape.empty())) {
    throw std::invalid_argument(output.name + ": expected to be narrowed along axis 0");
  }
  LimitLength(output.narrowing, output.shape);
  outputs.push_back(std::move(output));
}

void CallForm::ReadLengths(const DLTensor* inputs, c10::Device device,
                           std::vector<int64_t>& sizes) const {
  if (!device.is_cpu()) {
    sizes = capacities;
    return;
  }
  for (size_t i = 0; i < lengths.size(); ++i) {
    const TcLength& length = lengths[i];
    const int64_t valid = *static_cast<const int32_t*>(inputs[length.input].data);
    if (valid < 0 || valid > capacities[i]) {
      throw std::invalid_argument(this->inputs[length.input].name + ": expected 0 to " +
                                  std::to_string(capacities[i]) + " entries, the capacity, got " +
                                  std::to_string(valid));
    }
    sizes[i] = std::min(std::max(valid + length.extra, length.least), capacities[i]);
  }
}

void CallForm::LimitLength(const TcNarrowing& narrowing, const std::vector<int64_t>& shape) {
  if (narrowing.length < 0) return;
  int64_t& capacity = capacities.at(narrowing.length);
  capacity = std::min(capacity, shape.at(narrowing.axis));
}

std::vector<int64_t> CallForm::ShapeSeen(const Input& input,
                                         const std::vector<int64_t>& sizes) const {
  std::vector<int64_t> shape = input.shape;
  const TcNarrowing& narrowing = input.narrowing;
  if (narrowing.length >= 0) shape[narrowing.axis] = sizes[narrowing.length];
  return shape;
}

void CallForm::CopyIn(const Input& input, const void* buffer, const std::vector<int64_t>& sizes,
                      c10::Device device, void* destination) const {
  const TcNarrowing& narrowing = input.narrowing;
  const bool is_prefix = narrowing.length < 0 || narrowing.axis == 0;
  const std::vector<int64_t> shape = ShapeSeen(input, sizes);
  const size_t bytes = BytesOf(shape, input.dtype);
  if (bytes == 0) return;
  if (device.is_cpu() && !input.cast && is_prefix && bytes < kLarge) {
    std::memcpy(destination, buffer, bytes);
    return;
  }
  at::Tensor view = View(const_cast<void*>(buffer), input.shape, input.dtype, device);
  if (narrowing.length >= 0) view = view.narrow(narrowing.axis, 0, shape[narrowing.axis]);
  View(destination, shape, input.cast.value_or(input.dtype), device)
      .copy_(view, /*non_blocking=*/true);
}

void CallForm::CopyOut(const Output& output, const at::Tensor& tensor,
                       const std::vector<int64_t>& sizes, c10::Device device,
                       void* destination) const {
  const bool narrowed = output.narrowing.length >= 0;
  const int64_t rows = narrowed ? sizes[output.narrowing.length] : 0;
  const c10::IntArrayRef capacity(output.shape);
  const bool fits = narrowed
                        ? tensor.dim() == static_cast<int64_t>(capacity.size()) &&
                              tensor.size(0) == rows && tensor.sizes().slice(1) == capacity.slice(1)
                        : tensor.sizes() == capacity;
  const bool same_dtype = tensor.scalar_type() == output.dtype;
  const bool castable = selects_outputs && c10::isFloatingType(tensor.scalar_type()) &&
                        c10::isFloatingType(output.dtype);
  if (!fits || !(same_dtype || castable)) {
    std::vector<int64_t> expected = output.shape;
    if (narrowed) expected[0] = rows;
    throw std::invalid_argument(output.name + ": expected " + TypeAndShape(output.dtype, expected) +
                                ", got " + TypeAndShape(tensor.scalar_type(), tensor.sizes()));
  }
  if (tensor.layout() != at::kStrided || tensor.device() != device) {
    throw std::invalid_argument(output.name + ": expected a dense tensor on " + device.str() +
                                ", got " + c10::str(tensor.layout()) + " on " +
                                tensor.device().str());
  }
  if (tensor.key_set().has(c10::DispatchKey::Python)) {
    throw std::invalid_argument(
        output.name +
        ": expected a plain tensor, got one of a Python subclass that has no memory of its own (a "
        "FakeTensor is one that the model stored while its outputs were inferred: pass "
        "output_spec=..., or clear where it is stored)");
  }
  if (output.bytes == 0) return;
  const size_t bytes = narrowed ? output.bytes / output.shape[0] * rows : output.bytes;
  if (!device.is_cpu()) {
    const TorchStateGuard guard(Autograd::kOff);
    View(destination, tensor.sizes(), output.dtype, device).copy_(tensor, /*non_blocking=*/true);
    return;  // lengths are capacities here: nothing is narrowed
  }
  // Conjugate and negative views are flags on unchanged memory: only torch resolves them.
  if (same_dtype && bytes < kLarge && tensor.is_contiguous() && !tensor.is_conj() &&
      !tensor.is_neg() && !tensor._is_zerotensor()) {
    std::memcpy(destination, tensor.const_data_ptr(), bytes);
  } else {
    const TorchStateGuard guard(Autograd::kOff);
    View(destination, tensor.sizes(), output.dtype, device).copy_(tensor);
  }
  std::memset(static_cast<char*>(destination) + bytes, 0, output.bytes - bytes);
}

}  // namespace torchcall
