#include "package_model.h"

#include <stdexcept>

#include "fingerprint.h"
#include "package_plan.h"

namespace torchcall {

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
  if (!ran_) Synchronize(device_);  // a first run folds constants, which other streams must see
  ran_ = true;
  return results;
}

PackageModel::PackageModel(const std::string& path, c10::Device home, int32_t num_runners)
    : path_(path), home_(home), num_runners_(num_runners) {
  for (const std::string& spec : loader(home)->call_spec()) schema_ += spec + "\n";
}

std::shared_ptr<PackageLoader> PackageModel::loader(c10::Device device) const {
  if (device.type() != home_.type()) {
    throw std::invalid_argument(
        "expected a program for the device that the package was compiled "
        "for, " +
        c10::DeviceTypeName(home_.type(), true) + ", got one for " + device.str());
  }
  return loaders_.Get(device,
                      [&] { return std::make_shared<PackageLoader>(path_, device, num_runners_); });
}

std::shared_ptr<PackageLoader> PackageModel::Hold(c10::Device device) const {
  loaders_.LetGo();
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
  loaders_.Replace([&] { path_ = package->path_; }, home_, package->loader(home_));
}

std::string PackageModel::Serialize() const {
  throw std::invalid_argument("expected a TorchScript module, got a package");
}

// The order of a package's arguments is settled where its call spec is read.
void PackageModel::CheckArguments(const TcNode*, int64_t, int64_t) const {}

std::unique_ptr<Plan> PackageModel::NewPlan(const TcPlanSpec& spec) {
  return std::make_unique<PackagePlan>(std::static_pointer_cast<PackageModel>(shared_from_this()),
                                       spec);
}

}  // namespace torchcall
