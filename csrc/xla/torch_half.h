// The torch half as the JAX half sees it: a table of entry points found at run time, and the
// objects behind it with C++ lifetimes. Failures become exceptions here.

#ifndef TORCHCALL_XLA_TORCH_HALF_H_
#define TORCHCALL_XLA_TORCH_HALF_H_

#include <memory>
#include <string>

#include "../engine.h"
#include "fork.h"

namespace torchcall {

// Loads the shared library at `path`; torch itself must be loaded already. Throws
// std::runtime_error.
void LoadTorchHalf(const std::string& path);
// Throws std::runtime_error when no torch half is loaded.
const TcEngineApi& TorchHalf();
bool TorchHalfLoaded();

// A sink that stores the text.
class ErrorText {
 public:
  TcSink sink() { return {this, &ErrorText::Write}; }
  const std::string& text() const { return text_; }

 private:
  static void Write(void* self, const char* text, size_t size) {
    static_cast<ErrorText*>(self)->text_.assign(text, size);
  }
  std::string text_;
};

// A forked child releases nothing: what is on a device belongs to the parent.
struct ModelDeleter {
  void operator()(TcModel* model) const {
    if (!IsForked()) TorchHalf().model_release(model);
  }
};
struct PlanDeleter {
  void operator()(TcPlan* plan) const {
    if (!IsForked()) TorchHalf().plan_release(plan);
  }
};
using ModelHandle = std::unique_ptr<TcModel, ModelDeleter>;
using PlanHandle = std::unique_ptr<TcPlan, PlanDeleter>;

}  // namespace torchcall

#endif  // TORCHCALL_XLA_TORCH_HALF_H_
