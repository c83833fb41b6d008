#include "plan.h"

#include <ATen/Functions.h>
#include <ATen/ops/from_blob.h>

#include <chrono>
#include <cstring>
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

// More contexts than threads that can be inside a call at once would only hold memory.
constexpr size_t kMostPooled = 64;

}  // namespace

Plan::Plan(std::shared_ptr<Model> model, const TcPlanSpec& spec)
    : model_(std::move(model)),
      call_(ParseTree(spec.arguments, spec.num_arguments)),
      result_(ParseTree(spec.results, spec.num_results)),
      builder_(call_, model_->schema(), model_->is_method()) {
  for (int64_t i = 0; i < spec.num_inputs; ++i) {
    Operand operand;
    operand.name = spec.input_names[i];
    operand.shape = ShapeOf(spec.inputs[i]);
    operand.dtype = DtypeOf(spec.inputs[i].dtype, spec.input_names[i]);
    if (spec.casts[i].bits != 0) {
      const c10::ScalarType cast = DtypeOf(spec.casts[i], spec.input_names[i]);
      if (cast != operand.dtype) operand.cast = cast;
    }
    operand.bytes = BytesOf(operand.shape, operand.dtype);
    const InputUse& use = model_->use().inputs.at(builder_.argument_of_operand().at(i));
    operand.written = use.tensors_written;
    copied_per_call_ += operand.written ? 1 : 0;
    rebuild_ = rebuild_ || use.tensors_written || use.containers_written;
    operands_.push_back(std::move(operand));
  }
  for (int64_t i = 0; i < spec.num_outputs; ++i) {
    Output output;
    output.name = spec.output_names[i];
    output.shape = ShapeOf(spec.outputs[i]);
    output.dtype = DtypeOf(spec.outputs[i].dtype, spec.output_names[i]);
    output.bytes = BytesOf(output.shape, output.dtype);
    outputs_.push_back(std::move(output));
  }
  // Builds the arguments once, so that a structure that the signature refuses is an error now.
  GiveBack(std::make_unique<CallContext>(*this));
}

Plan::~Plan() = default;

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

void Plan::CopyOut(const Output& output, const at::Tensor& tensor, void* destination) const {
  if (tensor.scalar_type() != output.dtype || !tensor.sizes().equals(output.shape)) {
    throw std::invalid_argument("output " + output.name + ": expected " +
                                TypeAndShape(output.dtype, output.shape) + ", got " +
                                TypeAndShape(tensor.scalar_type(), tensor.sizes()));
  }
  if (tensor.layout() != at::kStrided || !tensor.is_cpu()) {
    throw std::invalid_argument("output " + output.name +
                                ": expected a dense tensor on the cpu, got " +
                                c10::str(tensor.layout()) + " on " + tensor.device().str());
  }
  if (output.bytes == 0) return;
  // A conjugated or negated view is a flag on other bits: only torch can read it.
  if (tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg()) {
    std::memcpy(destination, tensor.const_data_ptr(), output.bytes);
    return;
  }
  const TorchStateGuard guard(Autograd::kOff);
  at::from_blob(destination, output.shape, tensor.options()).copy_(tensor);
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
  std::vector<c10::IValue>& stack = context->Prepare(inputs, *instance);
  torch::jit::InterpreterState(instance->code).run(stack);
  if (stack.size() != 1) {
    throw std::runtime_error("expected one result, got " + std::to_string(stack.size()));
  }
  const int64_t written = context->FindUnforeseenWrite();
  if (written >= 0) {
    throw std::runtime_error("operand " + operands_[written].name +
                             ": expected to be read only, but the model wrote to it in place");
  }
  FlattenResult(stack.back(), result_, context->outputs());
  for (size_t i = 0; i < outputs_.size(); ++i) {
    CopyOut(outputs_[i], *context->outputs()[i], outputs[i].data);
  }
  finisher.succeeded = true;
}

double Plan::TimeForward(const DLTensor* inputs, int64_t iterations) const {
  ApplyThreadBudget();
  const std::shared_ptr<const ModelInstance> instance = model_->instance();
  std::vector<at::Tensor> tensors;
  {
    const TorchStateGuard guard(Autograd::kOff);
    for (size_t i = 0; i < operands_.size(); ++i) {
      const at::Tensor view =
          at::from_blob(inputs[i].data, operands_[i].shape, at::TensorOptions(operands_[i].dtype));
      tensors.push_back(view.to(operands_[i].cast.value_or(operands_[i].dtype)).clone());
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
