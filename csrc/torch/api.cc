// The torch half's entry points of the seam. They convert exceptions to error texts.

#include <c10/util/Exception.h>
#include <torch/csrc/jit/runtime/jit_exception.h>
#include <torch/csrc/jit/serialization/import.h>
#include <torch/version.h>

#include <sstream>
#include <string>
#include <string_view>

#include "../engine.h"
#include "eager.h"
#include "package.h"
#include "plan.h"
#include "script/model.h"

struct TcModel {
  std::shared_ptr<torchcall::Model> model;
};

struct TcPlan {
  std::unique_ptr<torchcall::Plan> plan;
};

struct TcHold {
  std::shared_ptr<const void> held;
};

namespace torchcall {
namespace {

void Write(TcSink sink, std::string_view text) { sink.write(sink.self, text.data(), text.size()); }

// Removes the C++ stack that torch appends to an error's text.
std::string WithoutCppTrace(std::string text) {
  const size_t trace = text.find("\nException raised from ");
  if (trace != std::string::npos) text.resize(trace);
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

// Moves the cause of an error, which the interpreter puts last, before the TorchScript traceback:
// "raised ValueError: ...", then the traceback. Source lines of a script function are not indented,
// so the cause comes after the place where it occurred.
std::string Raised(const std::string& message) {
  const std::string text = WithoutCppTrace(message);
  if (text.find("Traceback of TorchScript") == std::string::npos) return "raised: " + text;
  const size_t place = text.rfind("<--- HERE\n");
  size_t line = place == std::string::npos ? 0 : text.find('\n', place) + 1;
  while (line < text.size()) {
    const std::string_view rest = std::string_view(text).substr(line);
    const bool of_traceback = rest.starts_with(' ') || rest.starts_with('\n') ||
                              rest.starts_with("The following operation failed") ||
                              rest.starts_with("Traceback of TorchScript");
    if (!of_traceback) {
      return "raised " + std::string(rest) + "\n\n" + WithoutCppTrace(text.substr(0, line));
    }
    const size_t end = text.find('\n', line);
    if (end == std::string::npos) break;
    line = end + 1;
  }
  return "raised: " + text;
}

// Adds a remedy to those errors of torch for which one is known.
std::string Explained(std::string text) {
  if (text.find("CUDA out of memory") != std::string::npos) {
    return text +
           "\n\nJAX reserves three quarters of a device's memory when it starts, and torch gets "
           "the "
           "rest. Set XLA_PYTHON_CLIENT_MEM_FRACTION=.50 in the environment to leave torch more, "
           "or "
           "XLA_PYTHON_CLIENT_PREALLOCATE=false to leave it all that JAX does not use.";
  }
  if (text.find("backward through the graph a second time") != std::string::npos) {
    return "the model differentiates inside its forward, and JAX differentiates the result: "
           "expected "
           "create_graph=True in the model's torch.autograd.grad; it " +
           text;
  }
  if (text.find("does not require grad and does not have a grad_fn") == std::string::npos) {
    return text;
  }
  return "the model differentiates inside its forward: expected requires_grad=True, got "
         "requires_grad=False; it " +
         text;
}

// The error text for the exception that is being handled.
std::string Description() {
  try {
    throw;
  } catch (const std::invalid_argument& e) {
    return e.what();
  } catch (const EagerError& e) {
    return Explained(e.what());
  } catch (const std::exception& e) {
    return Explained(Raised(e.what()));
  } catch (...) {
    return "raised an exception of unknown type";
  }
}

template <typename Body>
TcStatus Guarded(TcSink error, const Body& body) {
  try {
    body();
    return TC_OK;
  } catch (...) {
    try {
      Write(error, Description());
    } catch (...) {
      Write(error, "out of memory");  // needs no allocation
    }
  }
  return TC_FAILED;
}

TcStatus ModelFromFile(const char* path, TcModelOptions options, TcModel** out, TcSink error) {
  return Guarded(error, [&] {
    const TorchStateGuard guard(Autograd::kOff);  // independent of the caller's modes
    *out = new TcModel{
        ScriptModel::FromModule(torch::jit::load(std::string(path), c10::kCPU), options)};
  });
}

TcStatus ModelFromBytes(const char* data, size_t size, TcModelOptions options, TcModel** out,
                        TcSink error) {
  return Guarded(error, [&] {
    const TorchStateGuard guard(Autograd::kOff);  // independent of the caller's modes
    std::istringstream stream(std::string(data, size));
    *out = new TcModel{ScriptModel::FromModule(torch::jit::load(stream, c10::kCPU), options)};
  });
}

TcStatus ModelFromLiveModule(const void* live, TcModelOptions options, TcModel** out,
                             TcSink error) {
  return Guarded(error, [&] {
    const TorchStateGuard guard(Autograd::kOff);  // independent of the caller's modes
    *out = new TcModel{
        ScriptModel::FromModule(*static_cast<const torch::jit::Module*>(live), options)};
  });
}

TcStatus ModelFromLiveFunction(const void* live, TcModelOptions options, TcModel** out,
                               TcSink error) {
  return Guarded(error, [&] {
    const TorchStateGuard guard(Autograd::kOff);  // independent of the caller's modes
    *out = new TcModel{ScriptModel::FromFunction(
        *static_cast<const torch::jit::StrongFunctionPtr*>(live), options)};
  });
}

TcStatus ModelFromPackage(const char* path, DLDevice home, int32_t num_runners, TcModel** out,
                          TcSink error) {
  return Guarded(error, [&] {
    const TorchStateGuard guard(Autograd::kOff);  // independent of the caller's modes
    *out = new TcModel{std::make_shared<PackageModel>(path, DeviceOf(home), num_runners)};
  });
}

TcStatus EagerModelOf(const char* name, TcModelOptions options, TcModel** out, TcSink error) {
  return Guarded(error, [&] { *out = new TcModel{std::make_shared<EagerModel>(name, options)}; });
}

TcStatus ModelReplace(TcModel* model, TcModel* fresh, TcSink error) {
  return Guarded(error, [&] { model->model->Replace(*fresh->model); });
}

TcStatus ModelInfo(TcModel* model, TcModelInfo* out, TcSink error) {
  return Guarded(error, [&] { *out = model->model->info(); });
}

TcStatus ModelSerialize(TcModel* model, TcSink out, TcSink error) {
  return Guarded(error, [&] { Write(out, model->model->Serialize()); });
}

void ModelCounters(const TcModel* model, TcModelCounters* out) { *out = model->model->counters(); }

void ModelRelease(TcModel* model) { delete model; }

TcStatus ModelCheckArguments(TcModel* model, const TcNode* arguments, int64_t num_arguments,
                             int64_t num_inputs, TcSink error) {
  return Guarded(error,
                 [&] { model->model->CheckArguments(arguments, num_arguments, num_inputs); });
}

TcStatus PlanCreate(TcModel* model, const TcPlanSpec* spec, TcPlan** out, TcSink error) {
  return Guarded(error, [&] {
    auto plan = std::make_unique<TcPlan>();  // allocated first: nothing throws after NewPlan
    plan->plan = model->model->NewPlan(*spec);
    *out = plan.release();
  });
}

TcStatus PlanRun(TcPlan* plan, const DLTensor* inputs, const DLTensor* outputs, TcPlace place,
                 TcSink error) {
  std::string reason;
  const TcStatus status = Guarded(error, [&] { reason = plan->plan->Run(inputs, outputs, place); });
  if (status != TC_OK || reason.empty()) return status;
  Write(error, reason);
  return TC_NOT_CAPTURABLE;
}

TcStatus PlanHold(TcPlan* plan, DLDevice device, TcHold** out, TcSink error) {
  return Guarded(error, [&] { *out = new TcHold{plan->plan->Hold(device)}; });
}

void HoldRelease(TcHold* hold) { delete hold; }

void PlanSetThreads(TcPlan* plan, int32_t threads) { plan->plan->SetThreads(threads); }

void PlanRelease(TcPlan* plan) { delete plan; }

void SetNumThreads(int32_t threads) { SetThreadBudget(threads); }

}  // namespace
}  // namespace torchcall

extern "C" __attribute__((visibility("default"))) const TcEngineApi* torchcall_engine_api(void) {
  static const TcEngineApi api = {
      TC_ABI_VERSION,
      TORCH_VERSION,
      &typeid(torch::jit::Module),
      &typeid(torch::jit::StrongFunctionPtr),
      torchcall::ModelFromFile,
      torchcall::ModelFromBytes,
      torchcall::ModelFromLiveModule,
      torchcall::ModelFromLiveFunction,
      torchcall::ModelFromPackage,
      torchcall::EagerModelOf,
      torchcall::ModelReplace,
      torchcall::ModelInfo,
      torchcall::ModelSerialize,
      torchcall::ModelCounters,
      torchcall::ModelRelease,
      torchcall::ModelCheckArguments,
      torchcall::PlanCreate,
      torchcall::PlanRun,
      torchcall::PlanSetThreads,
      torchcall::PlanHold,
      torchcall::HoldRelease,
      torchcall::PlanRelease,
      torchcall::SetNumThreads,
  };
  return &api;
}
