#include "package.h"

#include <ATen/Functions.h>
#include <sys/stat.h>
#include <torch/version.h>

#include <charconv>
#include <stdexcept>

#include "dtype.h"
#include "fingerprint.h"
#include "place.h"

namespace torchcall {
FileState FileState::Of(const std::string& path) {
  struct stat found;
  if (stat(path.c_str(), &found) != 0) return {};
#ifdef __APPLE__
  const timespec& modified = found.st_mtimespec;
#else
  const timespec& modified = found.st_mtim;
#endif
  return {found.st_ino, found.st_size, modified.tv_sec, modified.tv_nsec};
}

void FileState::RequireOf(const std::string& path) const {
  if (FileState::Of(path) == *this) return;
  throw std::invalid_argument(
      "expected the file that was loaded first, got one that changed since; call refresh()");
}

PackageLoader::PackageLoader(const std::string& path, const FileState& state, c10::Device device,
                             int32_t num_runners)
    : path_(path),
      state_(state),
      device_(device),
      one_at_a_time_(!device.is_cpu()),
      num_runners_(one_at_a_time_ ? 1 : num_runners),
      model_(LoadCode("model")) {}

std::unique_ptr<PackageLoader::Code> PackageLoader::LoadCode(const std::string& name) const {
  state_.RequireOf(path_);
  std::unique_ptr<Code> code(new Code{
      {},
      false,
      {path_, name, /*run_single_threaded=*/one_at_a_time_, static_cast<size_t>(num_runners_),
       device_.is_cpu() ? c10::DeviceIndex{-1} : device_.index()}});
  state_.RequireOf(path_);
  return code;
}

PackageLoader::Code& PackageLoader::CodeOf(Program program) {
  if (program == Program::kModel) return *model_;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (derivative_ == nullptr) {
    std::unique_ptr<Code> code = LoadCode("derivative");
    Synchronize(device_);  // see PerDevice::Get
    derivative_ = std::move(code);
  }
  return *derivative_;
}

std::vector<at::Tensor> PackageLoader::Run(Program program,
                                           const std::vector<at::Tensor>& arguments) {
  Code& code = CodeOf(program);
  if (!one_at_a_time_) return code.loader.run(arguments);
  const std::lock_guard<std::mutex> lock(code.mutex);
  std::vector<at::Tensor> results = code.loader.run(arguments);
  // The first run computes constants that runs on other streams read.
  if (!code.ran) Synchronize(device_);
  code.ran = true;
  return results;
}

PackageModel::PackageModel(const std::string& path, c10::Device home, int32_t num_runners)
    : path_(path), state_(FileState::Of(path)), home_(home), num_runners_(num_runners) {
  for (const std::string& spec : loader(home)->call_spec()) schema_ += spec + "\n";
}

std::shared_ptr<PackageLoader> PackageModel::loader(c10::Device device) const {
  if (device.type() != home_.type()) {
    throw std::invalid_argument(
        "expected a program for the device that the package was compiled "
        "for, " +
        c10::DeviceTypeName(home_.type(), true) + ", got one for " + device.str());
  }
  return loaders_.Get(
      device, [&] { return std::make_shared<PackageLoader>(path_, state_, device, num_runners_); });
}

std::shared_ptr<PackageLoader> PackageModel::Hold(c10::Device device) const {
  loaders_.ReleaseReplaced();
  return loader(device);
}

TcModelInfo PackageModel::info() const {
  TcModelInfo info{};
  info.name = "package";
  info.schema = schema_.c_str();
  info.fingerprint = Fingerprint(schema_);
  return info;
}

void PackageModel::Replace(const Model& fresh) {
  const auto* package = dynamic_cast<const PackageModel*>(&fresh);
  if (package == nullptr || package->schema_ != schema_) {
    throw std::invalid_argument(
        "refresh: expected a package with the same arguments and results, got another one; make a "
        "new wrapper");
  }
  const auto change = [&] {
    path_ = package->path_;
    state_ = package->state_;
  };
  loaders_.Replace(change, home_, package->loader(home_));
}

std::string PackageModel::Serialize() const {
  throw std::invalid_argument("expected a TorchScript module, got a package");
}

// PackageCall (Python) has compared the arguments with the package's call spec.
void PackageModel::CheckArguments(const TcNode*, int64_t, int64_t) const {}

std::unique_ptr<Plan> PackageModel::NewPlan(const TcPlanSpec& spec) {
  return std::make_unique<PackagePlan>(std::static_pointer_cast<PackageModel>(shared_from_this()),
                                       spec);
}

PackageArgument::PackageArgument(const Tree& node) {
  if (node.kind == TC_TENSOR) {
    input = node.integer;
    return;
  }
  dtype = ScalarTypeFromName(node.children.at(0).scalar.toStringRef()).value();
  for (size_t i = 1; i < node.children.size(); ++i) {
    const Tree& size = node.children[i];
    if (size.kind == TC_INT) {
      shape.push_back({-1, size.scalar.toInt()});
    } else {
      shape.push_back({size.children.at(0).integer, size.children.at(1).scalar.toInt()});
    }
  }
}

class PackagePlan::Context : public CallContext {
 public:
  Context(const PackagePlan& plan, TcPlace place)
      : CallContext(place, CallInputs(plan.form(), DeviceOf(place.device), /*dense=*/true),
                    plan.form().lengths.size(), plan.form().outputs.size()),
        plan_(plan) {
    for (const PackageArgument& argument : plan.arguments_) {
      arguments_.push_back(argument.input < 0 ? at::Tensor() : inputs[argument.input]);
    }
    inputs.CountUses();
  }

  void Invoke() override {
    loader_ = plan_.model_->loader(DeviceOf(place.device));
    MakeZeros();
    try {
      results_ = loader_->Run(plan_.program_, arguments_);
    } catch (const std::exception& e) {
      throw std::runtime_error(plan_.WithNames(e.what()));
    }
    if (results_.size() != plan_.wanted_.size()) {
      throw std::invalid_argument("expected " + std::to_string(plan_.wanted_.size()) +
                                  " results, got " + std::to_string(results_.size()));
    }
    for (size_t i = 0; i < results_.size(); ++i) {
      if (plan_.wanted_[i] < 0) continue;
      const int64_t output = plan_.wanted_[i];
      if (!results_[i].defined()) {
        throw std::invalid_argument(plan_.form().outputs[output].name +
                                    ": expected a tensor, got none");
      }
      outputs[output] = &results_[i];
    }
  }

  CallInputs::Retained Release() noexcept override {
    results_.clear();
    const CallInputs::Retained retained = inputs.Finish(/*all=*/false);
    loader_.reset();
    return retained;
  }

 private:
  // Packages do not write to their arguments, so zeros serve several calls.
  void MakeZeros() {
    for (size_t i = 0; i < arguments_.size(); ++i) {
      const PackageArgument& argument = plan_.arguments_[i];
      if (argument.input >= 0) continue;
      std::vector<int64_t> shape;
      for (const auto& [input, integer] : argument.shape) {
        shape.push_back(input < 0 ? integer : inputs[input].size(integer));
      }
      if (arguments_[i].defined() && arguments_[i].sizes() == c10::IntArrayRef(shape)) continue;
      const auto options = at::TensorOptions(argument.dtype).device(DeviceOf(place.device));
      arguments_[i] = at::zeros(shape, options);
    }
  }

  const PackagePlan& plan_;
  std::shared_ptr<PackageLoader> loader_;
  std::vector<at::Tensor> arguments_;
  std::vector<at::Tensor> results_;
};

PackagePlan::PackagePlan(std::shared_ptr<PackageModel> model, const TcPlanSpec& spec)
    : ContextPlan(model, spec, CallForm(spec), Autograd::kInference, /*pools=*/true),
      model_(std::move(model)),
      program_(spec.num_derivatives == 0 ? Program::kModel : Program::kDerivative) {
  if (spec.num_derivatives > 1) {
    throw std::invalid_argument("expected one derivative of a package, got several");
  }
  if (program_ == Program::kDerivative) model_->LoadDerivative();
  for (const Tree& argument : ParseTree(spec.arguments, spec.num_arguments).children) {
    arguments_.emplace_back(argument);
  }
  for (const Tree& result : ParseTree(spec.results, spec.num_results).children) {
    wanted_.push_back(result.kind == TC_TENSOR ? result.integer : -1);
  }
}

std::unique_ptr<CallContext> PackagePlan::NewContext(TcPlace place) const {
  return std::make_unique<Context>(*this, place);
}

std::string PackagePlan::WithNames(std::string text) const {
  static const std::string kMark = "input_handles[";
  const size_t at = text.find(kMark);
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13
  // A package's code returns no text there.
  if (text.find("API call failed") != std::string::npos) {
    return text + "; torch " TORCH_VERSION " has printed the reason to standard error";
  }
#endif
  if (at == std::string::npos) return text;
  const size_t end = text.find(']', at);
  if (end == std::string::npos) return text;
  size_t argument = arguments_.size();  // from_chars does not throw: this runs inside a `catch`
  std::from_chars(text.data() + at + kMark.size(), text.data() + end, argument);
  if (argument >= arguments_.size() || arguments_[argument].input < 0) return text;
  return text.replace(at, end + 1 - at, form().inputs[arguments_[argument].input].name);
}

}  // namespace torchcall
