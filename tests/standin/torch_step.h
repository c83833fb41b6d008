// An operator of a captured graph, replayed on the same addresses. Retains no tensor.

#ifndef TORCHCALL_STANDIN_TORCH_STEP_H_
#define TORCHCALL_STANDIN_TORCH_STEP_H_

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <string>
#include <vector>

#include "torch_redirect.h"

namespace standin {

struct Step {
  c10::OperatorHandle op;
  std::vector<c10::IValue> arguments;  // relabelled as CPU tensors
  std::vector<c10::IValue> results;

  Step(const c10::OperatorHandle& handle, const std::vector<c10::IValue>& given,
       const std::vector<c10::IValue>& returned)
      : op(handle) {
    Redirect redirect(ForeignTensors::kAny);
    for (const c10::IValue& value : given) arguments.push_back(redirect.ToCpu(value));
    for (const c10::IValue& value : returned) results.push_back(redirect.ToCpu(value));
  }

  std::string name() const { return c10::toString(op.operator_name()); }

  // Runs the operator and writes its results to their original addresses.
  void Run() const {
    const c10::impl::ForceDispatchKeyGuard defaults(c10::default_included_set,
                                                    c10::default_excluded_set);
    const at::AutoDispatchBelowADInplaceOrView below;
    torch::jit::Stack stack = arguments;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
    for (size_t i = 0; i < results.size(); ++i) Write(stack[i], results[i]);
  }

 private:
  static void Write(const c10::IValue& value, const c10::IValue& to) {
    if (value.isTensor()) Write(value.toTensor(), to.toTensor());
    if (!value.isTensorList()) return;
    const auto tensors = value.toTensorVector();
    const auto places = to.toTensorVector();
    for (size_t i = 0; i < tensors.size(); ++i) Write(tensors[i], places[i]);
  }
  static void Write(const at::Tensor& tensor, const at::Tensor& to) {
    if (tensor.defined() && tensor.data_ptr() != to.data_ptr()) to.copy_(tensor);
  }
};

}  // namespace standin

#endif  // TORCHCALL_STANDIN_TORCH_STEP_H_
