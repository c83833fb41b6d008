// RAII guards for torch's thread-local state. A handler may run on a thread of the user's, inside
// `torch.no_grad()`, `torch.autocast()` or a fake-tensor mode; a call must not depend on that.

#ifndef TORCHCALL_TORCH_GUARDS_H_
#define TORCHCALL_TORCH_GUARDS_H_

#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <optional>

namespace torchcall {

enum class Autograd {
  kRecord,     // the model differentiates inside its forward
  kOff,        // results hold no graph, tensors stay ordinary ones
  kInference,  // as kOff, and no bookkeeping at all: tensors must not outlive the call
};

// Takes Python's dispatch modes (fake tensors, …) off the thread: some of torch's C++ asks for them
// past the dispatcher.
class NoPythonModes {
 public:
  NoPythonModes() {
    if (!Tls::any_modes_set()) return;
    saved_ = Tls::get_state();
    Tls::set_state({});
  }
  ~NoPythonModes() {
    if (saved_) Tls::set_state(std::move(*saved_));
  }
  NoPythonModes(const NoPythonModes&) = delete;
  NoPythonModes& operator=(const NoPythonModes&) = delete;

 private:
  using Tls = c10::impl::TorchDispatchModeTLS;
  std::optional<Tls> saved_;
};

class TorchStateGuard {
 public:
  explicit TorchStateGuard(Autograd autograd)
      : dispatch_keys_(c10::default_included_set, c10::default_excluded_set),
        inference_(autograd == Autograd::kInference),
        grad_(autograd == Autograd::kRecord) {}

 private:
  NoPythonModes modes_;
  c10::impl::ForceDispatchKeyGuard dispatch_keys_;
  c10::InferenceMode inference_;
  c10::AutoGradMode grad_;
};

// Gives the calling thread the process's thread budget, once per change of the budget.
void ApplyThreadBudget();
void SetThreadBudget(int threads);

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_GUARDS_H_
