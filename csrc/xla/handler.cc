#include "handler.h"

#include <exception>
#include <memory>
#include <string>

#include "call_plan.h"
#include "xla/ffi/api/ffi.h"

namespace torchcall {
namespace {

namespace ffi = xla::ffi;

// An executable's share of a plan. XLA owns it, so the plan lives while a call can still be under
// way, also after every Python object that knew of the executable is gone.
struct CallState {
  static ffi::TypeId id;
  std::shared_ptr<CallPlan> plan;
};
ffi::TypeId CallState::id = {};

ffi::ErrorOr<std::unique_ptr<CallState>> InstantiateImpl(int64_t plan) {
  auto state = std::make_unique<CallState>();
  state->plan = PlanRegistry::Get().Find(plan);
  if (state->plan == nullptr) {
    return ffi::Unexpected(ffi::Error(
        ffi::ErrorCode::kNotFound,
        "torchcall: plan " + std::to_string(plan) +
            ": expected a plan of this process, got none; an executable that was serialised needs "
            "its wrapper to be called once in this process before it is loaded"));
  }
  return state;
}

ffi::Error Execute(CallState* state, ffi::RemainingArgs operands, ffi::RemainingRets results,
                   TcPlace place) {
  try {
    return state->plan->Run(operands, results, place);
  } catch (const std::exception& e) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string("torchcall: ") + e.what());
  } catch (...) {
    return ffi::Error(ffi::ErrorCode::kInternal, "torchcall: an exception of unknown type");
  }
}

ffi::Error ExecuteOnCpu(CallState* state, ffi::RemainingArgs operands, ffi::RemainingRets results,
                        int64_t) {
  return Execute(state, operands, results, {{kDLCPU, 0}, nullptr, 0});
}

// Enqueues on XLA's stream and returns. XLA may not record it into command buffers of its own: the
// model may allocate, and a first call waits.
ffi::Error ExecuteOnCuda(CallState* state, void* stream, int32_t ordinal,
                         ffi::RemainingArgs operands, ffi::RemainingRets results, int64_t) {
  return Execute(state, operands, results, {{kDLCUDA, ordinal}, stream, 0});
}

}  // namespace

XLA_FFI_DEFINE_HANDLER(kInstantiate, InstantiateImpl,
                       ffi::Ffi::BindInstantiate().Attr<int64_t>("plan"));

XLA_FFI_DEFINE_HANDLER(
    kExecuteOnCpu, ExecuteOnCpu,
    ffi::Ffi::Bind().Ctx<ffi::State<CallState>>().RemainingArgs().RemainingRets().Attr<int64_t>(
        "plan"));

XLA_FFI_DEFINE_HANDLER(kExecuteOnCuda, ExecuteOnCuda,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::State<CallState>>()
                           .Ctx<ffi::PlatformStream<void*>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attr<int64_t>("plan"));

XLA_FFI_Handler* InstantiateHandler() { return kInstantiate; }
XLA_FFI_Handler* CpuHandler() { return kExecuteOnCpu; }
XLA_FFI_Handler* CudaHandler() { return kExecuteOnCuda; }

XLA_FFI_TypeId* StateTypeId() { return &CallState::id; }

const XLA_FFI_TypeInfo* StateTypeInfo() {
  static const XLA_FFI_TypeInfo info = ffi::MakeTypeInfo<CallState>();
  return &info;
}

}  // namespace torchcall
