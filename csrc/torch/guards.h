// RAII guards for torch's thread-local state. A handler may run on a user's thread, inside
// `torch.no_grad()`, `torch.autocast()` or a fake-tensor mode. Calls must not depend on it.

#ifndef TORCHCALL_TORCH_GUARDS_H_
#define TORCHCALL_TORCH_GUARDS_H_

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/AutogradState.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <optional>

namespace torchcall {

enum class Autograd {
  kRecord,     // gradients are recorded: the model differentiates inside its forward
  kOff,        // no gradients, ordinary tensors
  kInference,  // no gradients, inference tensors, which must not outlive the call
};

// Switches Python's modes off (fake tensors, `with torch.device(...)`): parts of torch's C++ query
// them without the dispatcher, and Python code does everywhere.
class NoPythonModes {
 public:
  NoPythonModes() {
    if (Tls::any_modes_set()) {
      saved_ = Tls::get_state();
      Tls::set_state({});
    }
    if (FunctionTls::stack_len() > 0) {
      saved_functions_ = FunctionTls::get_state();
      FunctionTls::set_state({});
    }
  }
  ~NoPythonModes() {
    if (saved_) Tls::set_state(std::move(*saved_));
    if (saved_functions_) FunctionTls::set_state(*saved_functions_);
  }
  NoPythonModes(const NoPythonModes&) = delete;
  NoPythonModes& operator=(const NoPythonModes&) = delete;

 private:
  using Tls = c10::impl::TorchDispatchModeTLS;
  using FunctionTls = at::impl::PythonTorchFunctionTLS;
  std::optional<Tls> saved_;
  std::optional<FunctionTls> saved_functions_;
};

class TorchStateGuard {
 public:
  explicit TorchStateGuard(Autograd autograd)
      : keys_(c10::impl::tls_local_dispatch_key_set()),
        autograd_(c10::AutogradState::get_tls_state()) {
    Set(Wanted(autograd));
  }
  ~TorchStateGuard() { Set({Pod(keys_), autograd_}); }
  TorchStateGuard(const TorchStateGuard&) = delete;
  TorchStateGuard& operator=(const TorchStateGuard&) = delete;

 private:
  using Keys = c10::impl::PODLocalDispatchKeySet;
  struct State {
    Keys keys;
    c10::AutogradState autograd;
  };

  static Keys Pod(const c10::impl::LocalDispatchKeySet& keys) {
    Keys pod{};
    pod.set_included(keys.included_);
    pod.set_excluded(keys.excluded_);
    return pod;
  }
  static void Set(const State& state) {
    c10::impl::_force_tls_local_dispatch_key_set(state.keys);
    c10::AutogradState::set_tls_state(state.autograd);
  }
  // The state that torch's own guards set. Computed once, so that a call sets it in one step.
  static State Find(Autograd autograd) {
    const c10::impl::ForceDispatchKeyGuard defaults(c10::default_included_set,
                                                    c10::default_excluded_set);
    const c10::InferenceMode inference(autograd == Autograd::kInference);
    const c10::AutoGradMode grad(autograd == Autograd::kRecord);
    return {Pod(c10::impl::tls_local_dispatch_key_set()), c10::AutogradState::get_tls_state()};
  }
  static const State& Wanted(Autograd autograd) {
    static const State states[] = {Find(Autograd::kRecord), Find(Autograd::kOff),
                                   Find(Autograd::kInference)};
    return states[static_cast<int>(autograd)];
  }

  NoPythonModes modes_;
  c10::impl::LocalDispatchKeySet keys_;
  c10::AutogradState autograd_;
};

// Torch's threads in one call. 0: the process's budget. Another number holds until the end of the
// scope, on this thread only.
class ThreadScope {
 public:
  explicit ThreadScope(int threads);
  ~ThreadScope();
  ThreadScope(const ThreadScope&) = delete;
  ThreadScope& operator=(const ThreadScope&) = delete;

 private:
  int before_ = 0;  // 0: nothing to restore
  int mkl_before_ = 0;
};

// Every thread applies it before its next call.
void SetThreadBudget(int threads);

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_GUARDS_H_
