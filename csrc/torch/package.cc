#include "package.h"

#include <sys/stat.h>

#include <charconv>
#include <stdexcept>

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

PackageLoader::PackageLoader(const std::string& path, c10::Device device, int32_t num_runners)
    : device_(device),
      one_at_a_time_(!device.is_cpu()),
      loader_(path, "model", /*run_single_threaded=*/one_at_a_time_,
              one_at_a_time_ ? 1 : num_runners,
              device.is_cpu() ? c10::DeviceIndex{-1} : device.index()) {}

std::vector<at::Tensor> PackageLoader::Run(const std::vector<at::Tensor>& arguments) {
  std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
  if (!one_at_a_time_) return loader_.run(arguments);
  lock.lock();
  std::vector<at::Tensor> results = loader_.run(arguments);
  // The first run computes constants that runs on other streams read.
  if (!ran_) Synchronize(device_);
  ran_ = true;
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
  const auto require_unchanged = [&] {
    if (FileState::Of(path_) == state_) return;
    throw std::invalid_argument(
        "expected the file that was loaded first, got one that changed since; call refresh()");
  };
  return loaders_.Get(device, [&] {
    require_unchanged();
    auto loader = std::make_shared<PackageLoader>(path_, device, num_runners_);
    require_unchanged();
    return loader;
  });
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

class PackagePlan::Context : public CallContext {
 public:
  Context(const PackagePlan& plan, TcPlace place)
      : CallContext(place, CallInputs(plan.form(), DeviceOf(place.device), /*dense=*/true),
                    plan.form().lengths.size(), plan.form().outputs.size()),
        plan_(plan) {
    for (const int64_t i : plan.order_) arguments_.push_back(inputs[i]);
    inputs.CountUses();
  }

  void Invoke() override {
    loader_ = plan_.model_->loader(DeviceOf(place.device));
    try {
      results_ = loader_->Run(arguments_);
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
  const PackagePlan& plan_;
  std::shared_ptr<PackageLoader> loader_;
  std::vector<at::Tensor> arguments_;
  std::vector<at::Tensor> results_;
};

PackagePlan::PackagePlan(std::shared_ptr<PackageModel> model, const TcPlanSpec& spec)
    : ContextPlan(model, spec, CallForm(spec), Autograd::kInference, /*pools=*/true),
      model_(std::move(model)) {
  CollectTensors(ParseTree(spec.arguments, spec.num_arguments), order_);
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
  if (at == std::string::npos) return text;
  const size_t end = text.find(']', at);
  if (end == std::string::npos) return text;
  size_t argument = order_.size();  // from_chars does not throw: this runs inside a `catch`
  std::from_chars(text.data() + at + kMark.size(), text.data() + end, argument);
  if (argument >= order_.size()) return text;
  return text.replace(at, end + 1 - at, form().inputs[order_[argument]].name);
}

}  // namespace torchcall
