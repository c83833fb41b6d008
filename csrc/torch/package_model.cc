#include "package_model.h"

#include <stdexcept>

#include "fingerprint.h"
#include "package_plan.h"

namespace torchcall {

PackageModel::PackageModel(const std::string& path, int32_t num_runners)
    : loader_(std::make_shared<Loader>(path, "model", /*run_single_threaded=*/false, num_runners)) {
  for (const std::string& spec : loader()->get_call_spec()) schema_ += spec + "\n";
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
  loader_.store(package->loader());
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
