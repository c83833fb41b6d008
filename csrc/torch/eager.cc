#include "eager.h"

#include <string>

#include "fingerprint.h"
#include "place.h"

namespace torchcall {

// Never in inference mode: the model may retain what it computes.
EagerModel::EagerModel(std::string name, TcModelOptions options)
    : name_(std::move(name)),
      autograd_(options.requires_grad ? Autograd::kRecord : Autograd::kOff) {}

TcModelInfo EagerModel::info() const {
  TcModelInfo info{};
  info.name = name_.c_str();
  info.schema = "";
  info.fingerprint = Fingerprint(name_);
  return info;
}

// The module is the caller's own; its weights are not held here.
void EagerModel::Replace(const Model&) {}

std::string EagerModel::Serialize() const {
  throw std::invalid_argument("expected a TorchScript module, got a Python callable");
}

void EagerModel::CheckArguments(const TcNode*, int64_t, int64_t) const {}

std::unique_ptr<Plan> EagerModel::NewPlan(const TcPlanSpec& spec) {
  return std::make_unique<EagerPlan>(std::static_pointer_cast<EagerModel>(shared_from_this()),
                                     spec);
}

namespace {

bool IsShared(const CallForm::Input& input) {
  return !input.is_length && !input.copied && !input.cast;
}

// Collects the error that the code reports.
class Report {
 public:
  TcSink sink() {
    return {this, [](void* self, const char* text, size_t size) {
              static_cast<Report*>(self)->text_.assign(text, size);
            }};
  }
  void RaiseIf(TcStatus status) const {
    if (status != TC_OK) throw EagerError(text_);
  }

 private:
  std::string text_;
};

// A tensor that the frame holds; adds no reference, for which torch might take the GIL.
class Borrowed {
 public:
  explicit Borrowed(void* address)
      : tensor_(c10::intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl>::reclaim(
            static_cast<at::TensorImpl*>(address))) {}
  ~Borrowed() { tensor_.unsafeReleaseTensorImpl(); }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  const at::Tensor& operator*() const { return tensor_; }
  at::TensorImpl* operator->() const { return tensor_.unsafeGetTensorImpl(); }

 private:
  at::Tensor tensor_;
};

}  // namespace

// One call under way.
class EagerPlan::Frame {
 public:
  Frame(const EagerPlan& plan, TcPlace place)
      : table_(plan.code_->table),
        form_(plan.form()),
        device_(DeviceOf(place.device)),
        inspects_(plan.shares_ || place.purpose != TC_COMPUTE),
        sizes_(form_.lengths.size()),
        inputs_(form_.inputs.size()),
        retained_(inspects_ ? inputs_.size() : 0),
        shared_(plan.shares_ ? inputs_.size() : 0),
        outputs_(form_.outputs.size()) {
    Report error;
    error.RaiseIf(table_.open(table_.self, place.device, static_cast<int64_t>(inputs_.size()),
                              &address_, inputs_.data(), error.sink()));
  }
  ~Frame() {
    Inspect();
    table_.close(table_.self, address_);
  }
  Frame(const Frame&) = delete;
  Frame& operator=(const Frame&) = delete;

  void Fill(const DLTensor* buffers) {
    form_.ReadLengths(buffers, device_, sizes_);
    for (size_t i = 0; i < inputs_.size(); ++i) {
      if (inputs_[i] == nullptr) continue;
      const CallForm::Input& input = form_.inputs[i];
      const Borrowed tensor(inputs_[i]);
      if (IsShared(input)) {
        Share(i, *tensor, buffers[i].data);
        continue;
      }
      if (input.narrowing.length >= 0) {
        tensor->set_sizes_contiguous(form_.ShapeSeen(input, sizes_));
      }
      form_.CopyIn(input, buffers[i].data, sizes_, device_, tensor->mutable_data());
    }
  }

  at::Tensor input(int64_t i) const { return *Borrowed(inputs_[i]); }

  void Run() {
    Report error;
    error.RaiseIf(table_.run(table_.self, address_, outputs_.data(),
                             static_cast<int64_t>(outputs_.size()), error.sink()));
  }

  void CopyOut(const DLTensor* buffers) const {
    for (size_t i = 0; i < outputs_.size(); ++i) {
      const Borrowed tensor(outputs_[i]);
      form_.CopyOut(form_.outputs[i], *tensor, sizes_, device_, buffers[i].data);
    }
  }

  // Releases the outputs, and finds what the model retained of its inputs. Memory that was shared
  // and is retained becomes a copy.
  void Inspect() noexcept {
    if (!inspects_) return;
    inspects_ = false;
    table_.release_outputs(table_.self, address_, retained_.data());
    for (size_t i = 0; i < inputs_.size(); ++i) {
      if (inputs_[i] == nullptr) continue;
      const Borrowed tensor(inputs_[i]);
      const c10::Storage* shared = shared_.empty() || !shared_[i] ? nullptr : &shared_[i];
      const c10::Storage& storage = shared == nullptr ? tensor->unsafe_storage() : *shared;
      size_t own = shared == nullptr ? 0 : 1;
      own += StorageOf(*tensor) == storage.unsafeGetStorageImpl() ? 1 : 0;
      const bool retained =
          retained_[i] != 0 || (*tensor).use_count() > 1 || storage.use_count() > own;
      any_retained_ = any_retained_ || retained;
      if (shared == nullptr) continue;
      if (tensor->version_counter().current_version() > 0) written_ = static_cast<int64_t>(i);
      if (!retained) continue;
      wrongly_retained_ = static_cast<int64_t>(i);
      OwnMemory(storage.unsafeGetStorageImpl(), device_);
    }
  }

  bool any_retained() const { return any_retained_; }
  // The position of a shared input that the model wrote to, or retained; -1: none.
  int64_t written() const { return written_; }
  int64_t wrongly_retained() const { return wrongly_retained_; }

 private:
  // Points an empty tensor at XLA's buffer, of which a length may leave a prefix.
  void Share(size_t i, const at::Tensor& tensor, void* buffer) {
    const CallForm::Input& input = form_.inputs[i];
    at::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    impl->set_sizes_contiguous(input.shape);
    const std::vector<int64_t> strides = tensor.strides().vec();
    const size_t bytes = static_cast<size_t>(tensor.numel()) * tensor.element_size();
    impl->set_sizes_and_strides(form_.ShapeSeen(input, sizes_), strides);
    c10::StorageImpl* storage = StorageOf(tensor);
    storage->set_data_ptr_noswap({buffer, device_});
    storage->set_nbytes(bytes);
    storage->set_resizable(false);
    shared_[i] = impl->storage();
  }

  const TcEager& table_;
  const CallForm& form_;
  const c10::Device device_;
  bool inspects_;
  void* address_ = nullptr;
  std::vector<int64_t> sizes_;  // what each of the plan's lengths comes to in this call
  std::vector<void*> inputs_;   // nullptr for a length
  std::vector<int32_t> retained_;
  std::vector<c10::Storage> shared_;
  std::vector<void*> outputs_;
  bool any_retained_ = false;
  int64_t written_ = -1;
  int64_t wrongly_retained_ = -1;
};

EagerPlan::EagerPlan(std::shared_ptr<EagerModel> model, const TcPlanSpec& spec)
    : Plan(model, spec, CallForm(spec),
           spec.num_derivatives > 0 ? Autograd::kRecord : model->autograd()) {
  for (const CallForm::Input& input : form().inputs) {
    shares_ = shares_ || IsShared(input);
  }
  code_ = std::make_shared<Code>(spec.eager);
}

bool EagerPlan::Compute(const DLTensor* inputs, const DLTensor* outputs, TcPlace place) {
  Frame frame(*this, place);
  frame.Fill(inputs);
  if (place.device.device_type == kDLCPU) {
    index_checks().Run(form(), [&](int64_t i) { return frame.input(i); });
  }
  frame.Run();
  frame.CopyOut(outputs);
  frame.Inspect();
  const auto refuse = [&](int64_t input, const char* what) {
    throw std::invalid_argument(form().inputs[input].name +
                                ": share_inputs=True: expected an input that the model does not " +
                                what + "; leave the option out, or clone the input first");
  };
  if (frame.written() >= 0) refuse(frame.written(), "write to");
  if (frame.wrongly_retained() >= 0) refuse(frame.wrongly_retained(), "retain after the call");
  return frame.any_retained();
}

std::shared_ptr<const void> EagerPlan::Hold(DLDevice device) const {
  Report error;
  void* held = nullptr;
  error.RaiseIf(code_->table.hold(code_->table.self, device, &held, error.sink()));
  return {held,
          [code = code_](void* address) { code->table.release_held(code->table.self, address); }};
}

}  // namespace torchcall
