#include "plan.h"

#include <ATen/Functions.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "context.h"
#include "dtype.h"

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

// One core cannot fill the memory bus: from here on torch copies with all of its threads.
constexpr size_t kLarge = size_t{1} << 20;

// More contexts than threads that can be inside a call at once would only hold memory.
constexpr size_t kMostPooled = 64;

}  // namespace

Plan::Plan(std::shared_ptr<Model> model, const TcPlanSpec& spec)
    : model_(std::move(model)),
      call_(ParseTree(spec.arguments, spec.num_arguments)),
      result_(ParseTree(spec.results, spec.num_results)),
      builder_(call_, model_->schema(), model_->is_method()) {
  selects_outputs_ = spec.selects_outputs != 0;
  lengths_.assign(spec.lengths, spec.lengths + spec.num_lengths);
  capacities_.assign(lengths_.size(), std::numeric_limits<int32_t>::max());
  for (int64_t i = 0; i < spec.num_inputs; ++i) AddOperand(spec, i);
  for (int64_t i = 0; i < spec.num_outputs; ++i) AddOutput(spec, i);
  // Builds the arguments once, so that a structure that the signature refuses is an error now.
  GiveBack(std::make_unique<CallContext>(*this));
}

Plan::~Plan() = default;

void Plan::AddOperand(const TcPlanSpec& spec, int64_t i) {
  Operand operand;
  operand.name = spec.input_names[i];
  operand.shape = ShapeOf(spec.inputs[i]);
  operand.dtype = DtypeOf(spec.inputs[i].dtype, spec.input_names[i]);
  operand.narrowing = spec.input_narrowings[i];
  operand.bytes = BytesOf(operand.shape, operand.dtype);
  for (const TcLength& length : lengths_) {
    operand.is_length = operand.is_length || length.operand == i;
  }
  if (operand.is_length) {
    if (operand.dtype != c10::ScalarType::Int || !operand.shape.empty()) {
      throw std::invalid_argument(operand.name + ": expected int32 (), got " +
                                  TypeAndShape(operand.dtype, operand.shape));
    }
  } else {
    if (spec.casts[i].bits != 0) {
      const c10::ScalarType cast = DtypeOf(spec.casts[i], spec.input_names[i]);
      if (cast != operand.dtype) operand.cast = cast;
    }
    const InputUse& use = model_->use().inputs.at(builder_.argument_of_operand().at(i));
    operand.written = use.tensors_written;
    copied_per_call_ += operand.written ? 1 : 0;
    rebuild_ = rebuild_ || use.tensors_written || use.containers_written;
  }
  LimitLength(operand.narrowing, operand.shape);
  operands_.push_back(std::move(operand));
}

void Plan::AddOutput(const TcPlanSpec& spec, int64_t i) {
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
  outputs_.push_back(std::move(output));
}

void Plan::ReadLengths(const DLTensor* inputs, std::vector<int64_t>& sizes) const {
  for (size_t i = 0; i < lengths_.size(); ++i) {
    const TcLength& length = lengths_[i];
    const int64_t valid = *static_cast<const int32_t*>(inputs[length.operand].data);
    if (valid < 0 || valid > capacities_[i]) {
      throw std::invalid_argument(operands_[length.operand].name + ": expected 0 to " +
                                  std::to_string(capacities_[i]) + " entries, the capacity, got " +
                                  std::to_string(valid));
    }
    sizes[i] = std::min(std::max(valid + length.extra, length.least), capacities_[i]);
  }
}

void Plan::LimitLength(const TcNarrowing& narrowing, const std::vector<int64_t>& shape) {
  if (narrowing.length < 0) return;
  int64_t& capacity = capacities_.at(narrowing.length);
  capacity = std::min(capacity, shape.at(narrowing.axis));
}

std::unique_ptr<CallContext> Plan::Acquire() {
  if (!rebuild_) {
    const std::lock_guard<std::mutex> lock(pool_mutex_);
    if (!pool_.empty()) {
      std::unique_ptr<CallContext> context = std::move(pool_.back());
      pool_.pop_back();
      return context;
    }
  }
  return std::make_unique<CallContext>(*this);
}

void Plan::GiveBack(std::unique_ptr<CallContext> context) {
  if (rebuild_) return;
  const std::lock_guard<std::mutex> lock(pool_mutex_);
  if (pool_.size() < kMostPooled) pool_.push_back(std::move(context));
}

void Plan::CopyOut(const Output& output, const at::Tensor& tensor,
                   const std::vector<int64_t>& sizes, void* destination) const {
  const bool narrowed = output.narrowing.length >= 0;
  const int64_t rows = narrowed ? sizes[output.narrowing.length] : 0;
  const c10::IntArrayRef capacity(output.shape);
  const bool fits = narrowed
                        ? tensor.dim() == static_cast<int64_t>(capacity.size()) &&
                              tensor.size(0) == rows && tensor.sizes().slice(1) == capacity.slice(1)
                        : tensor.sizes() == capacity;
  const bool same_dtype = tensor.scalar_type() == output.dtype;
  const bool castable = selects_outputs_ && c10::isFloatingType(tensor.scalar_type()) &&
                        c10::isFloatingType(output.dtype);
  if (!fits || !(same_dtype || castable)) {
    std::vector<int64_t> expected = output.shape;
    if (narrowed) expected[0] = rows;
    throw std::invalid_argument(output.name + ": expected " + TypeAndShape(output.dtype, expected) +
                                ", got " + TypeAndShape(tensor.scalar_type(), tensor.sizes()));
  }
  if (tensor.layout() != at::kStrided || !tensor.is_cpu()) {
    throw std::invalid_argument(output.name + ": expected a dense tensor on the cpu, got " +
                                c10::str(tensor.layout()) + " on " + tensor.device().str());
  }
  if (output.bytes == 0) return;
  const size_t bytes = narrowed ? output.bytes / output.shape[0] * rows : output.bytes;
  // A conjugated or negated view is a flag on other bits: only torch can read it.
  if (same_dtype && bytes < kLarge && tensor.is_contiguous() && !tensor.is_conj() &&
      !tensor.is_neg()) {
    std::memcpy(destination, tensor.const_data_ptr(), bytes);
  } else {
    const TorchStateGuard guard(Autograd::kOff);
    at::from_blob(destination, tensor.sizes(), tensor.options().dtype(output.dtype)).copy_(tensor);
  }
  std::memset(static_cast<char*>(destination) + bytes, 0, output.bytes - bytes);
}

void Plan::Run(const DLTensor* inputs, const DLTensor* outputs, TcPlace place) {
  (void)place;
  ApplyThreadBudget();
  const std::shared_ptr<const ModelInstance> instance = model_->instance();
  std::unique_ptr<CallContext> context = Acquire();
  // Runs when the model raises too: what it kept until then must not dangle either.
  struct Finisher {
    Plan* plan;
    std::unique_ptr<CallContext>& context;
    bool succeeded = false;
    ~Finisher() {
      const int64_t kept = context->Finish();
      if (kept + plan->copied_per_call_ > 0) plan->model_->Count(kept, plan->copied_per_call_);
      if (succeeded && kept == 0) plan->GiveBack(std::move(context));
    }
  } finisher{this, context};

  const TorchStateGuard guard(model_->autograd());
  std::vector<int64_t>& sizes = context->sizes();
  ReadLengths(inputs, sizes);
  std::vector<c10::IValue>& stack = context->Prepare(inputs, *instance);
  torch::jit::InterpreterState(instance->code).run(stack);
  if (stack.size() != 1) {
    throw std::runtime_error("expected one result, got " + std::to_string(stack.size()));
  }
  const int64_t written = context->FindUnforeseenWrite();
  if (written >= 0) {
    throw std::runtime_error(operands_[written].name +
                             ": expected to be read only, but the model wrote to it in place");
  }
  FlattenResult(stack.back(), result_, selects_outputs_, context->outputs());
  for (size_t i = 0; i < outputs_.size(); ++i) {
    CopyOut(outputs_[i], *context->outputs()[i], sizes, outputs[i].data);
  }
  finisher.succeeded = true;
}

double Plan::TimeForward(const DLTensor* inputs, int64_t iterations) const {
  ApplyThreadBudget();
  const std::shared_ptr<const ModelInstance> instance = model_->instance();
  std::vector<at::Tensor> tensors;
  {
    const TorchStateGuard guard(Autograd::kOff);
    std::vector<int64_t> sizes(lengths_.size());
    ReadLengths(inputs, sizes);
    for (size_t i = 0; i < operands_.size(); ++i) {
      const Operand& operand = operands_[i];
      at::Tensor view =
          at::from_blob(inputs[i].data, operand.shape, at::TensorOptions(operand.dtype));
      if (operand.narrowing.length >= 0) {
        view = view.narrow(operand.narrowing.axis, 0, sizes[operand.narrowing.length]);
      }
      tensors.push_back(
          view.to(operand.cast.value_or(operand.dtype)).clone(at::MemoryFormat::Contiguous));
    }
  }
  std::vector<c10::IValue> containers;
  const std::vector<c10::IValue> arguments = builder_.Build(tensors, containers);
  const TorchStateGuard guard(model_->autograd());
  torch::jit::Module module = instance->module.value_or(torch::jit::Module());
  const auto call = [&] {
    return instance->module ? module.forward(arguments) : (*instance->function)(arguments);
  };
  for (int i = 0; i < 20; ++i) call();  // the profiling executor settles in its first calls
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < iterations; ++i) call();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace torchcall
