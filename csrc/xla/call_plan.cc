#include "call_plan.h"

#include <array>
#include <cstring>
#include <mutex>
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
  return buffer.element_type() == spec.dtype->xla && dims.size() == spec.shape.size() &&
         std::equal(dims.begin(), dims.end(), spec.shape.begin());
}

std::string Mismatch(const ArraySpec& spec, const ffi::AnyBuffer& buffer) {
  const auto dims = buffer.dimensions();
  return spec.name + ": expected " + spec.dtype->name + " " +
         ShapeText(spec.shape.data(), spec.shape.size()) + ", got " +
         DtypeName(buffer.element_type()) + " " + ShapeText(dims.begin(), dims.size());
}

}  // namespace

size_t ArraySpec::Bytes(const DtypeEntry& as) const {
  size_t bytes = as.bytes;
  for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
  return bytes;
}

CallPlan::CallPlan(std::string model_name, TcModel* model, std::shared_ptr<CallCounters> counters,
                   std::vector<ArraySpec> inputs, std::vector<ArraySpec> outputs,
                   const Structure& structure)
    : model_name_(std::move(model_name)),
      counters_(std::move(counters)),
      inputs_(std::move(inputs)),
      outputs_(std::move(outputs)) {
  std::vector<DLDataType> casts;
  std::vector<TcNarrowing> input_narrowings;
  std::vector<int32_t> input_copies;
  std::vector<TcNarrowing> output_narrowings;
  std::vector<const char*> input_names;
  std::vector<const char*> output_names;
  for (ArraySpec& spec : inputs_) {
    input_tensors_.push_back(TensorOf(spec, *spec.dtype));
    casts.push_back(spec.cast ? spec.cast->dl : DLDataType{0, 0, 0});
    input_narrowings.push_back(spec.narrowing);
    input_copies.push_back(spec.copied);
    input_names.push_back(spec.name.c_str());
    if (spec.copied || (spec.cast && spec.cast != spec.dtype)) {
      bytes_copied_per_call_ += spec.Bytes(spec.cast ? *spec.cast : *spec.dtype);
    }
  }
  for (ArraySpec& spec : outputs_) {
    output_tensors_.push_back(TensorOf(spec, *spec.dtype));
    output_narrowings.push_back(spec.narrowing);
    output_names.push_back(spec.name.c_str());
    bytes_copied_per_call_ += spec.Bytes(*spec.dtype);
  }
  const TcPlanSpec spec = {
      input_tensors_.data(),
      casts.data(),
      input_narrowings.data(),
      input_copies.data(),
      input_names.data(),
      static_cast<int64_t>(inputs_.size()),
      output_tensors_.data(),
      output_narrowings.data(),
      output_names.data(),
      static_cast<int64_t>(outputs_.size()),
      structure.lengths.data(),
      static_cast<int64_t>(structure.lengths.size()),
      structure.arguments.data(),
      static_cast<int64_t>(structure.arguments.size()),
      structure.results.data(),
      static_cast<int64_t>(structure.results.size()),
      structure.selects_outputs,
      structure.index_checks.data(),
      static_cast<int64_t>(structure.index_checks.size()),
      structure.callable,
  };
  TcPlan* plan = nullptr;
  ErrorText error;
  if (TorchHalf().plan_create(model, &spec, &plan, error.sink()) != TC_OK) {
    if (structure.callable.self != nullptr) structure.callable.release(structure.callable.self);
    throw std::invalid_argument("torchcall: " + model_name_ + ": " + error.text());
  }
  plan_.reset(plan);
  PlanCalls calls = {model_name_,
                     structure.graph_mode,
                     structure.graph_refusal,
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
  for (const ArraySpec& array : inputs_) calls.input_bytes.push_back(array.Bytes(*array.dtype));
  for (const ArraySpec& array : outputs_) calls.output_bytes.push_back(array.Bytes(*array.dtype));
  cuda_calls_ = std::make_unique<CudaCalls>(std::move(calls));
}

ffi::Error CallPlan::Run(ffi::RemainingArgs operands, ffi::RemainingRets results, TcPlace place) {
  const auto fail = [&](ffi::ErrorCode code, const std::string& what) {
    return ffi::Error(code, "torchcall: " + model_name_ + ": " + what);
  };
  if (operands.size() != inputs_.size() || results.size() != outputs_.size()) {
    return fail(ffi::ErrorCode::kInvalidArgument,
                "expected " + std::to_string(inputs_.size()) + " operands and " +
                    std::to_string(outputs_.size()) + " outputs, got " +
                    std::to_string(operands.size()) + " and " + std::to_string(results.size()));
  }
  CallArray<void*> inputs(inputs_.size());
  CallArray<void*> outputs(outputs_.size());
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const auto buffer = operands.get<ffi::AnyBuffer>(i);
    if (!buffer) return buffer.error();
    if (!Fits(*buffer, inputs_[i])) {
      return fail(ffi::ErrorCode::kInvalidArgument, Mismatch(inputs_[i], *buffer));
    }
    inputs[i] = buffer->untyped_data();
  }
  for (size_t i = 0; i < outputs_.size(); ++i) {
    auto buffer = results.get<ffi::AnyBuffer>(i);
    if (!buffer) return buffer.error();
    if (!Fits(**buffer, outputs_[i])) {
      return fail(ffi::ErrorCode::kInvalidArgument, Mismatch(outputs_[i], **buffer));
    }
    outputs[i] = (*buffer)->untyped_data();
  }
  try {
    RunOn(inputs.data(), outputs.data(), place);
  } catch (const std::exception& e) {
    return fail(ffi::ErrorCode::kInternal, e.what());
  }
  return ffi::Error::Success();
}

void CallPlan::RunOn(void* const* inputs, void* const* outputs, TcPlace place) {
  if (IsForked()) {
    throw std::runtime_error(
        "expected the process that imported torch, got a forked child; start workers with the "
        "'spawn' method");
  }
  const Inside inside;
  if (!inside) throw std::runtime_error(kInterpreterEnds);
  CheckInterrupt();
  const FloatStateGuard floats;
  counters_->calls.fetch_add(1, std::memory_order_relaxed);
  counters_->bytes_copied.fetch_add(bytes_copied_per_call_, std::memory_order_relaxed);
  if (place.device.device_type == kDLCPU) {
    counters_->on_cpu.store(true, std::memory_order_relaxed);
    RunPlainly(inputs, outputs, place);
    return;
  }
  cuda_calls_->Run(inputs, outputs, place.device.device_id, place.stream);
}

std::string CallPlan::RunPlainly(void* const* inputs, void* const* outputs, TcPlace place) const {
  CallArray<DLTensor> operands(inputs_.size());
  CallArray<DLTensor> results(outputs_.size());
  Fill(operands, input_tensors_, inputs, place.device);
  Fill(results, output_tensors_, outputs, place.device);
  ErrorText error;
  const TcStatus status =
      TorchHalf().plan_run(plan_.get(), operands.data(), results.data(), place, error.sink());
  if (status == TC_FAILED) throw std::runtime_error(error.text());
  return error.text();
}

PlanRegistry& PlanRegistry::Get() {
  // Leaked: executables may still look plans up while the process ends.
  static auto* registry = new PlanRegistry;
  return *registry;
}

int64_t PlanRegistry::Add(int64_t id, std::shared_ptr<CallPlan> plan) {
  std::string content = plan->content();
  const std::unique_lock lock(mutex_);
  int64_t ordinal = 0;
  while (plans_.contains({id, ordinal})) ++ordinal;
  plans_[{id, ordinal}] = {std::move(plan), std::move(content)};
  return ordinal;
}

void PlanRegistry::Remove(int64_t id, int64_t ordinal) {
  std::shared_ptr<CallPlan> last;  // destroyed after the lock is released
  const std::unique_lock lock(mutex_);
  const auto found = plans_.find({id, ordinal});
  if (found == plans_.end()) return;
  last = std::move(found->second.plan);
  plans_.erase(found);
}

std::shared_ptr<CallPlan> PlanRegistry::Find(int64_t id, int64_t ordinal) const {
  const auto current = [](const Entry& entry) { return entry.plan->content() == entry.content; };
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
