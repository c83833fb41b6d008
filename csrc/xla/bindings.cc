// The Python module `torchcall._bridge`: bindings only.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

#include "call_plan.h"
#include "conduit.h"
#include "cuda/capture.h"
#include "cuda/driver.h"
#include "eager.h"
#include "exported.h"
#include "handler.h"
#include "interrupt.h"
#include "neighbors/handler.h"
#include "torch_half.h"

namespace torchcall {
namespace {

namespace nb = nanobind;

// (kind, payload): the kind is a TcNodeKind, the payload a value, an index or a number of children.
using PyNode = std::tuple<int, std::variant<std::monostate, int64_t, double, std::string>>;
// (name, dtype, shape, cast, (length, axis) that narrows it, whether it is copied)
using PyArray = std::tuple<std::string, std::string, std::vector<int64_t>,
                           std::optional<std::string>, std::optional<std::tuple<int, int>>, bool>;
// (operand, extra, least), as in TcLength
using PyLength = std::tuple<int64_t, int64_t, int64_t>;
// (operand, rows_of, allowed), as in TcIndexCheck
using PyIndexCheck = std::tuple<int64_t, int64_t, std::tuple<uint64_t, uint64_t>>;

// (inputs, outputs, whether it keeps the outputs), as in TcDerivative
using PyDerivative = std::tuple<std::vector<int64_t>, std::vector<int64_t>, bool>;

const DtypeEntry* DtypeOf(const std::string& name) {
  const DtypeEntry* entry = FindDtype(name);
  if (entry == nullptr) throw std::invalid_argument("torchcall: dtype " + name + " is not shared");
  return entry;
}

std::vector<ArraySpec> ArraySpecs(const std::vector<PyArray>& arrays) {
  std::vector<ArraySpec> specs;
  for (const auto& [name, dtype, shape, cast, narrow, copied] : arrays) {
    const TcNarrowing narrowing =
        narrow ? TcNarrowing{std::get<0>(*narrow), std::get<1>(*narrow)} : TcNarrowing{-1, 0};
    specs.push_back(
        {DtypeOf(dtype), cast ? DtypeOf(*cast) : nullptr, shape, name, narrowing, copied});
  }
  return specs;
}

GraphMode GraphModeOf(const std::string& name) {
  if (name == "off") return GraphMode::kOff;
  return name == "require" ? GraphMode::kRequire : GraphMode::kAuto;
}

// The nodes point into `py`'s strings.
std::vector<TcNode> Nodes(const std::vector<PyNode>& py) {
  std::vector<TcNode> nodes;
  for (const auto& [kind, payload] : py) {
    TcNode node = {static_cast<TcNodeKind>(kind), 0, 0, 0.0, nullptr};
    if (const auto* integer = std::get_if<int64_t>(&payload)) node.integer = node.size = *integer;
    if (const auto* real = std::get_if<double>(&payload)) node.real = *real;
    if (const auto* text = std::get_if<std::string>(&payload)) {
      node.text = text->data();
      node.size = static_cast<int64_t>(text->size());
    }
    nodes.push_back(node);
  }
  return nodes;
}

template <typename T>
T Field(nb::handle object, const char* name) {
  return nb::cast<T>(object.attr(name));
}

class PyModel {
 public:
  PyModel(ModelHandle handle, TcModelOptions options)
      : handle_(std::move(handle)), options_(options) {
    ErrorText error;
    if (TorchHalf().model_info(handle_.get(), &info_, error.sink()) != TC_OK) {
      throw std::runtime_error(error.text());
    }
  }
  nb::object file = nb::none();  // a FileContent of python/torchcall/_engines/content.py
  TcModel* get() const { return handle_.get(); }
  std::tuple<bool, bool> options() const {
    return {options_.freeze != 0, options_.requires_grad != 0};
  }
  const TcModelInfo& info() const { return info_; }
  const std::shared_ptr<CallCounters>& counters() const { return counters_; }
  nb::dict Stats() const {
    TcModelCounters torch_side;
    TorchHalf().model_counters(get(), &torch_side);
    nb::dict stats;
    stats["calls"] = counters_->calls.load();
    stats["reused"] = counters_->reused.load();
    stats["bytes_copied"] = counters_->bytes_copied.load();
    stats["retained_inputs"] = torch_side.retained_inputs;
    stats["copied_inputs"] = torch_side.copied_inputs;
    stats["graph_captures"] = counters_->graph_captures.load();
    stats["graph_replays"] = counters_->graph_replays.load();
    return stats;
  }
  std::vector<std::string> Devices() const {
    std::vector<std::string> devices;
    if (counters_->on_cpu.load()) devices.push_back("cpu");
    for (int i = 0; i < 64; ++i) {
      if (counters_->cuda_devices.load() >> i & 1) devices.push_back("cuda:" + std::to_string(i));
    }
    return devices;
  }
  std::string fallback() const { return counters_->fallback(); }
  void CheckArguments(const std::vector<PyNode>& arguments, int64_t num_inputs) {
    const std::vector<TcNode> nodes = Nodes(arguments);
    ErrorText error;
    if (TorchHalf().model_check_arguments(get(), nodes.data(), static_cast<int64_t>(nodes.size()),
                                          num_inputs, error.sink()) != TC_OK) {
      throw std::invalid_argument(error.text());
    }
  }
  void Replace(PyModel& fresh) {
    ErrorText error;
    counters_->replacements.fetch_add(1);
    const bool replaced = TorchHalf().model_replace(get(), fresh.get(), error.sink()) == TC_OK;
    if (replaced) {
      counters_->set_content(fresh.counters_->content());
      counters_->generation.fetch_add(1);
    }
    counters_->replacements.fetch_add(1);
    if (!replaced) throw std::invalid_argument(error.text());
    file = fresh.file;
  }
  nb::bytes Serialize() {
    ErrorText archive;
    ErrorText error;
    if (TorchHalf().model_serialize(get(), archive.sink(), error.sink()) != TC_OK) {
      throw std::invalid_argument(error.text());
    }
    return nb::bytes(archive.text().data(), archive.text().size());
  }

 private:
  ModelHandle handle_;
  TcModelOptions options_;
  TcModelInfo info_;
  std::shared_ptr<CallCounters> counters_ = std::make_shared<CallCounters>();
};

template <typename Create>
std::unique_ptr<PyModel> MakeModel(bool freeze, bool requires_grad, const Create& create) {
  TcModel* model = nullptr;
  ErrorText error;
  const TcModelOptions options = {freeze, requires_grad};
  if (create(options, &model, error.sink()) != TC_OK) {
    throw std::invalid_argument(error.text());
  }
  return std::make_unique<PyModel>(ModelHandle(model), options);
}

std::unique_ptr<PyModel> ModelFromFile(const std::string& path, bool freeze, bool requires_grad) {
  const nb::gil_scoped_release release;
  return MakeModel(freeze, requires_grad, [&](TcModelOptions options, TcModel** out, TcSink error) {
    return TorchHalf().model_from_file(path.c_str(), options, out, error);
  });
}

std::unique_ptr<PyModel> ModelFromBytes(nb::bytes data, bool freeze, bool requires_grad) {
  return MakeModel(freeze, requires_grad, [&](TcModelOptions options, TcModel** out, TcSink error) {
    return TorchHalf().model_from_bytes(data.c_str(), data.size(), options, out, error);
  });
}

// `cuda` is the number of a CUDA device, None: the CPU.
std::unique_ptr<PyModel> ModelFromPackage(const std::string& path, std::optional<int> cuda,
                                          int num_runners) {
  const nb::gil_scoped_release release;
  const DLDevice home = {cuda ? kDLCUDA : kDLCPU, cuda.value_or(0)};
  return MakeModel(false, false, [&](TcModelOptions, TcModel** out, TcSink error) {
    return TorchHalf().model_from_package(path.c_str(), home, num_runners, out, error);
  });
}

std::unique_ptr<PyModel> EagerModelOf(const std::string& name, bool requires_grad) {
  return MakeModel(false, requires_grad, [&](TcModelOptions options, TcModel** out, TcSink error) {
    return TorchHalf().model_of_eager(name.c_str(), options, out, error);
  });
}

// None where the object's C++ side cannot be reached.
std::unique_ptr<PyModel> ModelFromLive(nb::handle object, bool freeze, bool requires_grad) {
  const TcEngineApi& api = TorchHalf();
  if (const void* module = ConduitPointer(object, api.script_module_type)) {
    return MakeModel(freeze, requires_grad, [&](TcModelOptions options, TcModel** out, TcSink e) {
      return api.model_from_live_module(module, options, out, e);
    });
  }
  if (const void* function = ConduitPointer(object, api.script_function_type)) {
    return MakeModel(freeze, requires_grad, [&](TcModelOptions options, TcModel** out, TcSink e) {
      return api.model_from_live_function(function, options, out, e);
    });
  }
  return nullptr;
}

// The Python owner of a registered plan; executables hold shares of their own.
class PyPlan {
 public:
  // `spec` is a PlanSpec of python/torchcall/_call/plan.py.
  PyPlan(const PyModel& model, const std::string& name, nb::handle spec) {
    const auto py_arguments = Field<std::vector<PyNode>>(spec, "arguments");
    const auto py_results = Field<std::vector<PyNode>>(spec, "results");
    const auto py_checks = Field<std::vector<PyIndexCheck>>(spec, "index_checks");
    const std::vector<TcNode> arguments = Nodes(py_arguments);
    const std::vector<TcNode> results = Nodes(py_results);
    std::vector<TcIndexCheck> checks;
    for (const auto& [operand, rows_of, allowed] : py_checks) {
      checks.push_back({operand, rows_of, {std::get<0>(allowed), std::get<1>(allowed)}});
    }
    std::vector<TcLength> lengths;
    for (const auto& [operand, extra, least] : Field<std::vector<PyLength>>(spec, "lengths")) {
      lengths.push_back({operand, extra, least});
    }
    const auto py_derivatives = Field<std::vector<PyDerivative>>(spec, "derivatives");
    std::vector<TcDerivative> derivatives;
    for (const auto& [inputs, outputs, keeps] : py_derivatives) {
      derivatives.push_back({inputs.data(), static_cast<int64_t>(inputs.size()), outputs.data(),
                             static_cast<int64_t>(outputs.size()), keeps});
    }
    // The names of each of the first operands.
    const auto py_parameters = Field<std::vector<std::vector<std::string>>>(spec, "parameters");
    std::vector<TcParameter> parameters;
    for (size_t i = 0; i < py_parameters.size(); ++i) {
      for (const std::string& name : py_parameters[i]) {
        parameters.push_back({static_cast<int64_t>(i), name.c_str()});
      }
    }
    TcPlanSpec native = {};
    native.parameters = parameters.data();
    native.num_parameters = static_cast<int64_t>(parameters.size());
    native.derivatives = derivatives.data();
    native.num_derivatives = static_cast<int64_t>(derivatives.size());
    native.lengths = lengths.data();
    native.num_lengths = static_cast<int64_t>(lengths.size());
    native.arguments = arguments.data();
    native.num_arguments = static_cast<int64_t>(arguments.size());
    native.results = results.data();
    native.num_results = static_cast<int64_t>(results.size());
    native.selects_outputs = Field<bool>(spec, "selects_outputs");
    native.index_checks = checks.data();
    native.num_index_checks = static_cast<int64_t>(checks.size());
    const GraphOption graph = {GraphModeOf(Field<std::string>(spec, "cuda_graph")),
                               Field<std::string>(spec, "graph_refusal")};
    std::vector<ArraySpec> operands = ArraySpecs(Field<std::vector<PyArray>>(spec, "operands"));
    std::vector<ArraySpec> outputs = ArraySpecs(Field<std::vector<PyArray>>(spec, "outputs"));
    const nb::object runner = spec.attr("eager_runner");
    if (!runner.is_none()) native.eager = EagerCode(runner);
    plan_ = std::make_shared<NativePlan>(
        name, model.get(), model.counters(), std::move(operands), std::move(outputs), native,
        Field<std::vector<BatchLoop>>(spec, "loops"), graph, Field<bool>(spec, "reuses_last"));
    live.fetch_add(1);
  }
  ~PyPlan() {
    live.fetch_sub(1);
    const nb::gil_scoped_release release;  // a graph of the plan's may have to be waited for
    plan_.reset();
  }
  inline static std::atomic<int64_t> live{0};  // for tests of lifetimes
  PyPlan(const PyPlan&) = delete;
  PyPlan& operator=(const PyPlan&) = delete;

  const std::shared_ptr<NativePlan>& plan() const { return plan_; }
  void SetThreads(int threads) const { plan_->SetThreads(threads); }
  // What the handler does, on addresses: the way in for tests.
  void RunOnCuda(const std::vector<uintptr_t>& inputs, const std::vector<uintptr_t>& outputs,
                 int ordinal, uintptr_t stream) const {
    const nb::gil_scoped_release release;
    plan_->RunOn(Pointers(inputs).data(), Pointers(outputs).data(),
                 {{kDLCUDA, ordinal}, reinterpret_cast<void*>(stream), TC_COMPUTE}, 0);
  }

 private:
  static std::vector<void*> Pointers(const std::vector<uintptr_t>& addresses) {
    std::vector<void*> pointers;
    for (const uintptr_t address : addresses) pointers.push_back(reinterpret_cast<void*>(address));
    return pointers;
  }

  std::shared_ptr<NativePlan> plan_;
};

// A plan's entry in the registry, for as long as a program needs it.
class PyRegistration {
 public:
  PyRegistration(const PyPlan& plan, int64_t id)
      : id_(id), ordinal_(PlanRegistry::Get().Add(id, plan.plan())) {}
  ~PyRegistration() {
    const nb::gil_scoped_release release;  // a graph of the plan's may have to be waited for
    PlanRegistry::Get().Remove(id_, ordinal_);
  }
  PyRegistration(const PyRegistration&) = delete;
  PyRegistration& operator=(const PyRegistration&) = delete;

  int64_t id() const { return id_; }
  int64_t ordinal() const { return ordinal_; }

 private:
  int64_t id_;
  int64_t ordinal_;
};

}  // namespace
}  // namespace torchcall

NB_MODULE(_bridge, m) {
  using namespace torchcall;
  // Compiled programs are cached for the life of the process, and their plans with them.
  nb::set_leak_warnings(false);
  m.doc() = "The JAX half of torchcall: XLA FFI handlers, call plans, access to the torch half.";

  m.def("load_torch_half", &LoadTorchHalf, nb::arg("path"));
  m.def("torch_half_version", [] { return std::string(TorchHalf().torch_version); });
  m.def("set_num_threads", [](int n) { TorchHalf().set_num_threads(n); }, nb::arg("threads"));
  m.def("dtype_names", &SharedDtypeNames);
  BindHandlers(m);
  BindExported(m);
  m.def("load_cuda_driver", &LoadDriver, nb::arg("path"));
  m.def("cuda_driver_loads", [] { Driver(); });
  BindNeighbors(m);
  m.def(
      "watch_interrupts", [](nb::handle raise_later) { WatchInterrupts(raise_later.ptr()); },
      nb::arg("raise_later"));
  m.def("finish_calls", &FinishCalls);
  m.def("stop_calls", [](bool stopped) { calls_stopped.store(stopped); }, nb::arg("stopped"));
  m.def("live_plans", [] { return PyPlan::live.load(); });

  nb::class_<PyModel>(m, "Model")
      .def_static("from_file", &ModelFromFile, nb::arg("path"), nb::arg("freeze"),
                  nb::arg("requires_grad"))
      .def_static("from_bytes", &ModelFromBytes, nb::arg("data"), nb::arg("freeze"),
                  nb::arg("requires_grad"))
      .def_static("from_live", &ModelFromLive, nb::arg("object").none(), nb::arg("freeze"),
                  nb::arg("requires_grad"),
                  nb::sig("def from_live(object: object, freeze: bool, "
                          "requires_grad: bool) -> Model | None"))
      .def_static("from_package", &ModelFromPackage, nb::arg("path"), nb::arg("cuda").none(),
                  nb::arg("num_runners"))
      .def_static("of_eager", &EagerModelOf, nb::arg("name"), nb::arg("requires_grad"))
      .def("stats", &PyModel::Stats, nb::sig("def stats(self) -> dict[str, int]"))
      .def_prop_ro("devices", &PyModel::Devices)
      .def_prop_ro("fallback", &PyModel::fallback)
      .def("check_arguments", &PyModel::CheckArguments, nb::arg("arguments"), nb::arg("num_inputs"))
      .def("replace", &PyModel::Replace, nb::arg("fresh"))
      .def("serialize", &PyModel::Serialize)
      .def_prop_ro("name", [](const PyModel& self) { return std::string(self.info().name); })
      .def_prop_ro("schema", [](const PyModel& self) { return std::string(self.info().schema); })
      .def_prop_ro("fingerprint", [](const PyModel& self) { return self.info().fingerprint; })
      .def_prop_ro("differentiates",
                   [](const PyModel& self) { return self.info().differentiates != 0; })
      .def_prop_ro("changes_state",
                   [](const PyModel& self) { return self.info().changes_state != 0; })
      .def_prop_ro("draws_random_numbers",
                   [](const PyModel& self) { return self.info().draws_random_numbers != 0; })
      .def_prop_ro("options", &PyModel::options)  // (freeze, requires_grad)
      .def_prop_rw(
          "content", [](const PyModel& self) { return self.counters()->content(); },
          [](PyModel& self, const std::string& content) { self.counters()->set_content(content); })
      .def_rw("file", &PyModel::file, nb::arg().none(),
              nb::for_getter(nb::sig("def file(self) -> typing.Any")))
      .def_prop_ro("training", [](const PyModel& self) { return self.info().training != 0; });

  nb::class_<PyPlan>(m, "NativePlan")
      .def(nb::init<const PyModel&, const std::string&, nb::handle>(), nb::arg("model"),
           nb::arg("name"), nb::arg("spec"),
           nb::sig("def __init__(self, model: Model, name: str, spec: typing.Any) -> None"))
      .def("set_threads", &PyPlan::SetThreads, nb::arg("threads"))
      .def("run_on_cuda", &PyPlan::RunOnCuda, nb::arg("inputs"), nb::arg("outputs"),
           nb::arg("ordinal"), nb::arg("stream"));
  nb::class_<PyRegistration>(m, "NativeRegistration")
      .def(nb::init<const PyPlan&, int64_t>(), nb::arg("plan"), nb::arg("id"))
      .def_prop_ro("id", &PyRegistration::id)
      .def_prop_ro("ordinal", &PyRegistration::ordinal);
  BindCapture(m);
}
