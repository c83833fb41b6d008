#include "handler.h"

#include <nanobind/stl/string.h>

#include <exception>
#include <memory>
#include <string>

#include "call_plan.h"
#include "xla/ffi/api/ffi.h"

namespace torchcall {
namespace {

namespace ffi = xla::ffi;
namespace nb = nanobind;

// An executable's share of a plan. XLA owns it, so the plan lives while a call can still be under
// way, also after every Python object that knew of the executable is gone. A type per platform:
// each platform's XLA is a library of its own, which numbers the types by itself.
template <DLDeviceType platform>
struct CallState {
  static ffi::TypeId id;
  std::shared_ptr<NativePlan> plan;
};
template <DLDeviceType platform>
ffi::TypeId CallState<platform>::id = {};

using CpuState = CallState<kDLCPU>;
using CudaState = CallState<kDLCUDA>;

template <typename State>
ffi::ErrorOr<std::unique_ptr<State>> Instantiate(int64_t plan, int64_t ordinal) {
  try {
    auto state = std::make_unique<State>();
    state->plan = PlanRegistry::Get().Find(plan, ordinal);
    return state;
  } catch (const std::exception& e) {
    return ffi::Unexpected(
        ffi::Error(ffi::ErrorCode::kNotFound,
                   "torchcall: plan " + std::to_string(plan) + ": " + std::string(e.what())));
  }
}

ffi::Error ExecuteOnCpu(CpuState* state, ffi::RunId run, ffi::RemainingArgs operands,
                        ffi::RemainingRets results, ffi::Dictionary) {
  return Execute(*state->plan, operands, results, {{kDLCPU, 0}, nullptr, TC_COMPUTE}, run.run_id);
}

// Not yet run on a GPU. Enqueues on XLA's stream and returns. XLA may not record it into command
// buffers of its own: the model may allocate, and a first call waits.
ffi::Error ExecuteOnCuda(CudaState* state, void* stream, int32_t ordinal,
                         ffi::RemainingArgs operands, ffi::RemainingRets results, ffi::Dictionary) {
  return Execute(*state->plan, operands, results, {{kDLCUDA, ordinal}, stream, TC_COMPUTE}, 0);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER(kInstantiateOnCpu, Instantiate<CpuState>,
                       ffi::Ffi::BindInstantiate().Attr<int64_t>("plan").Attr<int64_t>("ordinal"));

XLA_FFI_DEFINE_HANDLER(kInstantiateOnCuda, Instantiate<CudaState>,
                       ffi::Ffi::BindInstantiate().Attr<int64_t>("plan").Attr<int64_t>("ordinal"));

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

template <typename State>
const XLA_FFI_TypeInfo* TypeInfoOf() {
  static const XLA_FFI_TypeInfo info = ffi::MakeTypeInfo<State>();
  return &info;
}

nb::dict Handlers(const std::string& platform) {
  const bool cpu = platform == "cpu";
  XLA_FFI_Handler* instantiate = cpu ? kInstantiateOnCpu : kInstantiateOnCuda;
  XLA_FFI_Handler* execute = cpu ? kExecuteOnCpu : kExecuteOnCuda;
  nb::dict handlers;
  handlers["instantiate"] = nb::capsule(reinterpret_cast<void*>(instantiate));
  handlers["execute"] = nb::capsule(reinterpret_cast<void*>(execute));
  return handlers;
}

nb::dict StateType(const std::string& platform) {
  const bool cpu = platform == "cpu";
  nb::dict type;
  type["type_id"] = nb::capsule(cpu ? &CpuState::id : &CudaState::id);
  type["type_info"] = nb::capsule(cpu ? TypeInfoOf<CpuState>() : TypeInfoOf<CudaState>());
  return type;
}

void BindHandlers(nb::module_& m) {
  m.def("handlers", &Handlers, nb::arg("platform"),
        nb::sig("def handlers(platform: str) -> dict[str, typing.Any]"));
  m.def("state_type", &StateType, nb::arg("platform"),
        nb::sig("def state_type(platform: str) -> dict[str, typing.Any]"));
}

}  // namespace torchcall
