#include "exported.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "call_plan.h"
#include "gil.h"
#include "interrupt.h"
#include "xla/ffi/api/ffi.h"

namespace torchcall {
namespace {

namespace ffi = xla::ffi;
namespace nb = nanobind;

using Shapes = std::vector<std::vector<int64_t>>;

PyObject* loader = nullptr;  // never freed

// Calls Python code, which returns the text of its errors. Throws std::runtime_error.
template <typename Function>
nb::object InPython(const Function& function) {
  nb::object result;
  try {
    result = function();
  } catch (const nb::python_error& raised) {
    if (raised.matches(PyExc_Exception)) throw std::runtime_error(raised.what());
    RaiseLater(raised.value().ptr());  // KeyboardInterrupt, SystemExit
    throw std::runtime_error(std::string("raised ") +
                             nb::cast<std::string>(raised.type().attr("__name__")));
  }
  if (nb::isinstance<nb::str>(result)) throw std::runtime_error(nb::cast<std::string>(result));
  return result;
}

// An executable's share of the plan of one call.
class ExportedCall {
 public:
  ExportedCall(std::string_view program, const char* platform) {
    const Inside inside;
    if (!inside) throw std::runtime_error(kInterpreterEnds);
    const Gil gil;
    nb::object call = InPython([&] { return nb::handle(loader)(std::string(program), platform); });
    content_ = nb::cast<std::string>(call.attr("content"));
    if (nb::cast<bool>(call.attr("has_sizes"))) {
      Make(call, nb::none());
    } else {
      call_ = call.release().ptr();
    }
  }
  ~ExportedCall() {
    if (call_ == nullptr) return;
    const Inside inside;
    if (!inside) return;
    const Gil gil;
    Py_DECREF(call_);
  }
  ExportedCall(const ExportedCall&) = delete;
  ExportedCall& operator=(const ExportedCall&) = delete;

  // Fails if there is no plan for these buffers, or if the model no longer has the weights that the
  // program was exported with. Repeats a call during which they were replaced.
  ffi::Error Run(ffi::RemainingArgs operands, ffi::RemainingRets results, TcPlace place,
                 int64_t run_id) {
    NativePlan* plan = made_.load(std::memory_order_acquire);
    if (plan == nullptr) plan = Make(operands, results);
    for (;;) {
      const int64_t before = plan->replacements();
      if (before % 2 != 0) {
        std::this_thread::sleep_for(std::chrono::microseconds(50));
        continue;
      }
      if (before != checked_.load(std::memory_order_relaxed)) {
        if (plan->content() != content_) {
          throw std::runtime_error(
              "torchcall: " + plan->model_name() +
              ": expected the weights that the program was exported with, got others: refresh() "
              "replaced them; wrap the file that it was exported with");
        }
        checked_.store(before, std::memory_order_relaxed);
      }
      ffi::Error error = Execute(*plan, operands, results, place, run_id);
      if (plan->replacements() == before) return error;
    }
  }

 private:
  // From Python's description of the call and the shapes of its operands and results.
  void Make(const nb::object& call, const nb::object& shapes) {
    const nb::object registered = InPython([&] { return call.attr("register")(shapes); });
    plan_ = PlanRegistry::Get().Find(nb::cast<int64_t>(registered.attr("id")),
                                     nb::cast<int64_t>(registered.attr("ordinal")));
    made_.store(plan_.get(), std::memory_order_release);
  }

  NativePlan* Make(ffi::RemainingArgs operands, ffi::RemainingRets results) {
    Shapes shapes;
    const auto add = [&](const ffi::AnyBuffer& buffer) {
      const auto dims = buffer.dimensions();
      shapes.emplace_back(dims.begin(), dims.end());
    };
    for (size_t i = 0; i < operands.size(); ++i) add(operands.get<ffi::AnyBuffer>(i).value());
    for (size_t i = 0; i < results.size(); ++i) add(*results.get<ffi::AnyBuffer>(i).value());
    const Inside inside;
    if (!inside) throw std::runtime_error(kInterpreterEnds);
    const std::lock_guard<std::mutex> lock(mutex_);  // before the GIL, which its holder may drop
    if (NativePlan* plan = made_.load(std::memory_order_acquire)) return plan;
    const Gil gil;
    Make(nb::borrow(call_), nb::cast(shapes));
    return plan_.get();
  }

  std::string content_;       // digest of the model's code and weights
  PyObject* call_ = nullptr;  // of a program with unknown sizes
  std::mutex mutex_;
  std::shared_ptr<NativePlan> plan_;
  std::atomic<NativePlan*> made_{nullptr};
  std::atomic<int64_t> checked_{-1};  // replacements of the weights when they were compared last
};

// A type per platform, as in handler.cc.
template <DLDeviceType platform>
struct ExportedState {
  static ffi::TypeId id;
  ExportedCall call;
};
template <DLDeviceType platform>
ffi::TypeId ExportedState<platform>::id = {};

using CpuState = ExportedState<kDLCPU>;
using CudaState = ExportedState<kDLCUDA>;

template <DLDeviceType platform>
ffi::ErrorOr<std::unique_ptr<ExportedState<platform>>> Instantiate(std::string_view program) {
  try {
    return std::unique_ptr<ExportedState<platform>>(
        new ExportedState<platform>{{program, platform == kDLCPU ? "cpu" : "cuda"}});
  } catch (const std::exception& e) {
    return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kFailedPrecondition, e.what()));
  }
}

ffi::Error Run(ExportedCall& call, ffi::RemainingArgs operands, ffi::RemainingRets results,
               TcPlace place, int64_t run_id) {
  try {
    return call.Run(operands, results, place, run_id);
  } catch (const std::exception& e) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition, e.what());
  }
}

ffi::Error ExecuteOnCpu(CpuState* state, ffi::RunId run, ffi::RemainingArgs operands,
                        ffi::RemainingRets results, ffi::Dictionary) {
  return Run(state->call, operands, results, {{kDLCPU, 0}, nullptr, TC_COMPUTE}, run.run_id);
}

ffi::Error ExecuteOnCuda(CudaState* state, void* stream, int32_t ordinal,
                         ffi::RemainingArgs operands, ffi::RemainingRets results, ffi::Dictionary) {
  return Run(state->call, operands, results, {{kDLCUDA, ordinal}, stream, TC_COMPUTE}, 0);
}

XLA_FFI_DEFINE_HANDLER(kInstantiateOnCpu, Instantiate<kDLCPU>,
                       ffi::Ffi::BindInstantiate().Attr<std::string_view>("program"));

XLA_FFI_DEFINE_HANDLER(kInstantiateOnCuda, Instantiate<kDLCUDA>,
                       ffi::Ffi::BindInstantiate().Attr<std::string_view>("program"));

XLA_FFI_DEFINE_HANDLER(kExecuteOnCpu, ExecuteOnCpu,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::State<CpuState>>()
                           .Ctx<ffi::RunId>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attrs());

XLA_FFI_DEFINE_HANDLER(kExecuteOnCuda, ExecuteOnCuda,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::State<CudaState>>()
                           .Ctx<ffi::PlatformStream<void*>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attrs());

// XLA reads a handler's metadata while it registers the handler, and the type of its state must be
// registered by then. JAX registers types after targets where both wait for a client to start, so
// the type is registered here.
template <DLDeviceType platform>
XLA_FFI_Error* WithType(XLA_FFI_CallFrame* frame) {
  using State = ExportedState<platform>;
  if (frame->extension_start != nullptr &&
      frame->extension_start->type == XLA_FFI_Extension_Metadata && State::id.type_id == 0) {
    static const XLA_FFI_TypeInfo info = ffi::MakeTypeInfo<State>();
    if (XLA_FFI_Error* error =
            ffi::Ffi::RegisterTypeId(frame->api, "torchcall_exported_state", &State::id, &info)) {
      return error;
    }
  }
  return platform == kDLCPU ? kInstantiateOnCpu(frame) : kInstantiateOnCuda(frame);
}

nb::dict Handlers(const std::string& platform) {
  const bool cpu = platform == "cpu";
  XLA_FFI_Handler* instantiate = cpu ? &WithType<kDLCPU> : &WithType<kDLCUDA>;
  XLA_FFI_Handler* execute = cpu ? kExecuteOnCpu : kExecuteOnCuda;
  nb::dict handlers;
  handlers["instantiate"] = nb::capsule(reinterpret_cast<void*>(instantiate));
  handlers["execute"] = nb::capsule(reinterpret_cast<void*>(execute));
  return handlers;
}

}  // namespace

void BindExported(nb::module_& m) {
  m.def("exported_handlers", &Handlers, nb::arg("platform"),
        nb::sig("def exported_handlers(platform: str) -> dict[str, typing.Any]"));
  m.def(
      "set_exported_loader",
      [](const nb::object& load) { loader = nb::object(load).release().ptr(); }, nb::arg("load"),
      nb::sig("def set_exported_loader(load: object) -> None"));
}

}  // namespace torchcall
