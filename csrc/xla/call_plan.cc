#include "call_plan.h"

#include <array>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>

#include "float_state.h"
#include "fork.h"
#include "gil.h"
#include "interrupt.h"

namespace torchcall {
namespace {

namespace ffi = xla::ffi;

constexpr DLDevice kCpu = {kDLCPU, 0};

DLTensor TensorOf(ArraySpec& spec, const DtypeEntry& dtype) {
  return {nullptr, kCpu, static_cast<int32_t>(spec.shape.size()), dtype.dl, spec.shape.data(),
          nullptr, 0};
}

// Room on the stack for most calls; the heap beyond.
template <typename T>
class CallArray {
 public:
  explicit CallArray(size_t size) {
    if (size > kInline) heap_ = std::make_unique<T[]>(size);
  }
  T* data() { return heap_ ? heap_.get() : inline_.data(); }
  T& operator[](size_t i) { return data()[i]; }

 private:
  static constexpr size_t kInline = 16;
  std::array<T, kInline> inline_;
  std::unique_ptr<T[]> heap_;
};

// The templates over these buffers.
void Fill(CallArray<DLTensor>& tensors, const std::vector<DLTensor>& templates, void* const* data,
          DLDevice device) {
  for (size_t i = 0; i < templates.size(); ++i) {
    tensors[i] = templates[i];
    tensors[i].data = data[i];
    tensors[i].device = device;
  }
}

bool Fits(const ffi::AnyBuffer& buffer, const ArraySpec& spec) {
  const auto dims = buffer.dimensions();
  return buffer.element_type() == spec.dtype->xla && dims.size() == spec.buffer.size() &&
         std::equal(dims.begin(), dims.end(), spec.buffer.begin());
}

std::string Mismatch(const ArraySpec& spec, const ffi::AnyBuffer& buffer) {
  const auto dims = buffer.dimensions();
  return spec.name + ": expected " + spec.dtype->name + " " +
         ShapeText(spec.buffer.data(), spec.buffer.size()) + ", got " +
         DtypeName(buffer.element_type()) + " " + ShapeText(dims.begin(), dims.size());
}

}  // namespace

size_t ArraySpec::Bytes(const DtypeEntry& as) const {
  size_t bytes = as.bytes;
  for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
  return bytes;
}

NativePlan::NativePlan(std::string model_name, TcModel* model,
                       std::shared_ptr<CallCounters> counters, std::vector<ArraySpec> operands,
                       std::vector<ArraySpec> results, TcPlanSpec spec,
                       const std::vector<BatchLoop>& loops, GraphOption graph, bool reuses_last)
    : model_name_(std::move(model_name)),
      counters_(std::move(counters)),
      operands_(std::move(operands)),
      results_(std::move(results)) {
  for (ArraySpec& array : operands_) array.buffer = array.shape;
  for (ArraySpec& array : results_) array.buffer = array.shape;
  // From the innermost loop outwards, so that a step is the size of what is inside.
  for (auto loop = loops.rbegin(); loop != loops.rend(); ++loop) {
    Loop& made = *loops_.insert(loops_.begin(), {loop->first, {}, {}});
    const auto add = [&](ArraySpec& array, bool mapped) {
      int64_t step = mapped ? static_cast<int64_t>(array.dtype->bytes) : 0;
      for (const int64_t size : array.buffer) step *= size;
      if (mapped) array.buffer.insert(array.buffer.begin(), loop->first);
      return step;
    };
    for (size_t i = 0; i < operands_.size(); ++i) {
      made.operand_steps.push_back(add(operands_[i], loop->second.at(i)));
    }
    for (ArraySpec& array : results_) made.result_steps.push_back(add(array, true));
  }
  std::vector<DLDataType> casts;
  std::vector<TcNarrowing> input_narrowings;
  std::vector<int32_t> input_copies;
  std::vector<TcNarrowing> output_narrowings;
  std::vector<const char*> input_names;
  std::vector<const char*> output_names;
  for (ArraySpec& array : operands_) {
    operand_tensors_.push_back(TensorOf(array, *array.dtype));
    casts.push_back(array.cast ? array.cast->dl : DLDataType{0, 0, 0});
    input_narrowings.push_back(array.narrowing);
    input_copies.push_back(array.copied);
    input_names.push_back(array.name.c_str());
    if (array.copied || (array.cast && array.cast != array.dtype)) {
      bytes_copied_per_call_ += array.Bytes(array.cast ? *array.cast : *array.dtype);
    }
  }
  for (ArraySpec& array : results_) {
    result_tensors_.push_back(TensorOf(array, *array.dtype));
    output_narrowings.push_back(array.narrowing);
    output_names.push_back(array.name.c_str());
    bytes_copied_per_call_ += array.Bytes(*array.dtype);
  }
  spec.inputs = operand_tensors_.data();
  spec.casts = casts.data();
  spec.input_narrowings = input_narrowings.data();
  spec.input_copies = input_copies.data();
  spec.input_names = input_names.data();
  spec.num_inputs = static_cast<int64_t>(operands_.size());
  spec.outputs = result_tensors_.data();
  spec.output_narrowings = output_narrowings.data();
  spec.output_names = output_names.data();
  spec.num_outputs = static_cast<int64_t>(results_.size());
  TcPlan* plan = nullptr;
  ErrorText error;
  if (TorchHalf().plan_create(model, &spec, &plan, error.sink()) != TC_OK) {
    if (spec.eager.self != nullptr) spec.eager.release(spec.eager.self);
    throw std::invalid_argument("torchcall: " + model_name_ + ": " + error.text());
  }
  plan_.reset(plan);
  PlanCalls calls = {model_name_,
                     graph.mode,
                     graph.refusal,
                     {},
                     {},
                     counters_,
                     [this](void* const* in, void* const* out, TcPlace place) {
                       return RunPlainly(in, out, place);
                     },
                     [this](DLDevice device) -> std::function<void()> {
                       TcHold* hold = nullptr;
                       ErrorText why;
                       if (TorchHalf().plan_hold(plan_.get(), device, &hold, why.sink()) != TC_OK) {
                         throw std::runtime_error(why.text());
                       }
                       return [hold] { TorchHalf().hold_release(hold); };
                     }};
  for (const ArraySpec& array : operands_) calls.input_bytes.push_back(array.Bytes(*array.dtype));
  for (const ArraySpec& array : results_) calls.output_bytes.push_back(array.Bytes(*array.dtype));
  if (reuses_last) last_call_ = std::make_unique<LastCall>(calls.input_bytes, calls.output_bytes);
  cuda_calls_ = std::make_unique<CudaCalls>(std::move(calls));
}

ffi::Error NativePlan::Run(ffi::RemainingArgs operands, ffi::RemainingRets results, TcPlace place,
                           int64_t run_id) {
  const auto fail = [&](ffi::ErrorCode code, const std::string& what) {
    return ffi::Error(code, "torchcall: " + model_name_ + ": " + what);
  };
  if (operands.size() != operands_.size() || results.size() != results_.size()) {
    return fail(ffi::ErrorCode::kInvalidArgument,
                "expected " + std::to_string(operands_.size()) + " operands and " +
                    std::to_string(results_.size()) + " outputs, got " +
                    std::to_string(operands.size()) + " and " + std::to_string(results.size()));
  }
  CallArray<void*> inputs(operands_.size());
  CallArray<void*> outputs(results_.size());
  for (size_t i = 0; i < operands_.size(); ++i) {
    const auto buffer = operands.get<ffi::AnyBuffer>(i);
    if (!buffer) return buffer.error();
    if (!Fits(*buffer, operands_[i])) {
      return fail(ffi::ErrorCode::kInvalidArgument, Mismatch(operands_[i], *buffer));
    }
    inputs[i] = buffer->untyped_data();
  }
  for (size_t i = 0; i < results_.size(); ++i) {
    auto buffer = results.get<ffi::AnyBuffer>(i);
    if (!buffer) return buffer.error();
    if (!Fits(**buffer, results_[i])) {
      return fail(ffi::ErrorCode::kInvalidArgument, Mismatch(results_[i], **buffer));
    }
    outputs[i] = (*buffer)->untyped_data();
  }
  try {
    RunOn(inputs.data(), outputs.data(), place, run_id);
  } catch (const std::exception& e) {
    return fail(ffi::ErrorCode::kInternal, e.what());
  }
  return ffi::Error::Success();
}

void NativePlan::RunOn(void* const* inputs, void* const* outputs, TcPlace place, int64_t run_id) {
  if (IsForked()) {
    throw std::runtime_error(
        "expected the process that imported torch, got a forked child; start workers with the "
        "'spawn' method");
  }
  const Inside inside;
  if (!inside) throw std::runtime_error(kInterpreterEnds);
  CheckInterrupt();
  const FloatStateGuard floats;
  if (loops_.empty()) return CallOnce(inputs, outputs, place, run_id);
  std::vector<void*> operands(inputs, inputs + operands_.size());
  std::vector<void*> results(outputs, outputs + results_.size());
  RunLoops(0, operands.data(), results.data(), place, run_id);
}

void NativePlan::Move(const Loop& loop, int64_t elements, void** operands, void** results) {
  for (size_t i = 0; i < loop.operand_steps.size(); ++i) {
    operands[i] = static_cast<char*>(operands[i]) + elements * loop.operand_steps[i];
  }
  for (size_t i = 0; i < loop.result_steps.size(); ++i) {
    results[i] = static_cast<char*>(results[i]) + elements * loop.result_steps[i];
  }
}

void NativePlan::RunLoops(size_t level, void** operands, void** results, TcPlace place,
                          int64_t run_id) {
  if (level == loops_.size()) {
    CheckInterrupt();
    return CallOnce(operands, results, place, run_id);
  }
  const Loop& loop = loops_[level];
  for (int64_t i = 0; i < loop.size; ++i) {
    RunLoops(level + 1, operands, results, place, run_id);
    Move(loop, 1, operands, results);
  }
  Move(loop, -loop.size, operands, results);
}

void NativePlan::CallOnce(void* const* inputs, void* const* outputs, TcPlace place,
                          int64_t run_id) {
  const bool on_cpu = place.device.device_type == kDLCPU;
  if (on_cpu && last_call_ && last_call_->Recall(run_id, inputs, outputs)) {
    counters_->reused.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  counters_->calls.fetch_add(1, std::memory_order_relaxed);
  counters_->bytes_copied.fetch_add(bytes_copied_per_call_, std::memory_order_relaxed);
  if (on_cpu) {
    counters_->on_cpu.store(true, std::memory_order_relaxed);
    RunPlainly(inputs, outputs, place);
    if (last_call_) last_call_->Remember(run_id, inputs, outputs);
    return;
  }
  cuda_calls_->Run(inputs, outputs, place.device.device_id, place.stream);
}

std::string NativePlan::RunPlainly(void* const* inputs, void* const* outputs, TcPlace place) const {
  CallArray<DLTensor> operands(operands_.size());
  CallArray<DLTensor> results(results_.size());
  Fill(operands, operand_tensors_, inputs, place.device);
  Fill(results, result_tensors_, outputs, place.device);
  ErrorText error;
  const TcStatus status =
      TorchHalf().plan_run(plan_.get(), operands.data(), results.data(), place, error.sink());
  if (status == TC_FAILED) throw std::runtime_error(error.text());
  return error.text();
}

ffi::Error Execute(NativePlan& plan, ffi::RemainingArgs operands, ffi::RemainingRets results,
                   TcPlace place, int64_t run_id) {
  try {
    try {
      return plan.Run(operands, results, place, run_id);
    } catch (const std::exception& e) {
      return ffi::Error(ffi::ErrorCode::kInternal, std::string("torchcall: ") + e.what());
    }
  } catch (const std::bad_alloc&) {  // by the text of an error, too
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "out of memory");
  } catch (...) {
    return ffi::Error(ffi::ErrorCode::kInternal, "torchcall: an exception of unknown type");
  }
}

PlanRegistry& PlanRegistry::Get() {
  // Leaked: executables may still look plans up while the process ends.
  static auto* registry = new PlanRegistry;
  return *registry;
}

int64_t PlanRegistry::Add(int64_t id, std::shared_ptr<NativePlan> plan) {
  std::string content = plan->content();
  const std::unique_lock lock(mutex_);
  int64_t ordinal = 0;
  while (plans_.contains({id, ordinal})) ++ordinal;
  plans_[{id, ordinal}] = {std::move(plan), std::move(content)};
  return ordinal;
}

void PlanRegistry::Remove(int64_t id, int64_t ordinal) {
  std::shared_ptr<NativePlan> last;  // destroyed after the lock is released
  const std::unique_lock lock(mutex_);
  const auto found = plans_.find({id, ordinal});
  if (found == plans_.end()) return;
  last = std::move(found->second.plan);
  plans_.erase(found);
}

std::shared_ptr<NativePlan> PlanRegistry::Find(int64_t id, int64_t ordinal) const {
  const auto current = [](const Entry& entry) {
    return entry.content.empty() || entry.plan->content() == entry.content;
  };
  const std::shared_lock lock(mutex_);
  const auto exact = plans_.find({id, ordinal});
  if (exact != plans_.end() && current(exact->second)) return exact->second.plan;
  bool stale = exact != plans_.end();
  for (auto it = plans_.lower_bound({id, 0}); it != plans_.end() && it->first.first == id; ++it) {
    if (it->second.content.empty()) continue;
    if (current(it->second)) return it->second.plan;
    stale = true;
  }
  throw std::invalid_argument(
      stale
          ? "expected the weights that the program was compiled for, got others: refresh() "
            "replaced them; compile the program again"
          : "expected a model with the weights and the arguments of the program, got none in this "
            "process; wrap the same file and call the wrapper once on arguments of the same shapes "
            "before the executable is loaded");
}

}  // namespace torchcall
