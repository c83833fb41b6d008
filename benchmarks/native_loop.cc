// The floor of the benchmarks: a model called in a C++ loop, with no Python, JAX or XLA in it.
//
// A C interface for ctypes, see `_native_loop.py`. Errors are texts in the caller's buffer.

#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/serialization/import.h>

#include <chrono>
#include <cstdio>
#include <functional>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <typeinfo>
#include <vector>

namespace {

constexpr int kWarmUp = 20;  // torch's profiling executor recompiles during the first calls

struct Loop {
  std::function<void()> call;
  bool requires_grad;

  // Seconds for `calls` calls in the grad mode that torchcall's plans set.
  double Run(int64_t calls) const {
    std::optional<c10::InferenceMode> inference;
    if (!requires_grad) inference.emplace();
    const c10::AutoGradMode grad(requires_grad);
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < calls; ++i) call();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
};

template <typename Body>
auto Guarded(char* error, size_t size, const Body& body) -> decltype(body()) {
  try {
    return body();
  } catch (const std::exception& e) {
    std::snprintf(error, size, "%s", e.what());
  } catch (...) {
    std::snprintf(error, size, "unknown exception");
  }
  return {};
}

Loop* Warm(Loop loop) {
  loop.Run(kWarmUp);
  return new Loop(std::move(loop));
}

torch::jit::Module Load(const char* archive, size_t size) {
  std::istringstream stream(std::string(archive, size));
  return torch::jit::load(stream, c10::kCPU);
}

}  // namespace

extern "C" {

const void* module_type() { return &typeid(torch::jit::Module); }

// `live` is a torch::jit::Module, of which the loop has a copy; the code stays the same, for that
// of a module saved and loaded again runs at another speed. `archive` is a TorchScript module whose
// attribute `arguments` is a tuple.
Loop* script_loop(const void* live, const char* archive, size_t archive_size, bool requires_grad,
                  char* error, size_t error_size) {
  return Guarded(error, error_size, [&]() -> Loop* {
    torch::jit::Module model = static_cast<const torch::jit::Module*>(live)->deepcopy(c10::kCPU);
    // As in torchcall: weights that require grad would make every call record a graph.
    for (at::Tensor weight : model.parameters()) weight.requires_grad_(false);
    const std::vector<c10::IValue> arguments =
        Load(archive, archive_size).attr("arguments").toTupleRef().elements().vec();
    return Warm({[=]() mutable { model.forward(arguments); }, requires_grad});
  });
}

// `archive`: a TorchScript module whose attribute `arguments` lists the package's tensors in order.
Loop* package_loop(const char* path, const char* archive, size_t archive_size, char* error,
                   size_t error_size) {
  return Guarded(error, error_size, [&]() -> Loop* {
    const std::vector<at::Tensor> arguments =
        Load(archive, archive_size).attr("arguments").toTensorVector();
    const auto loader = std::make_shared<torch::inductor::AOTIModelPackageLoader>(path);
    return Warm({[=] { loader->run(arguments); }, false});
  });
}

// Seconds for `calls` calls; negative where one of them failed.
double run_loop(const Loop* loop, int64_t calls, char* error, size_t error_size) {
  double seconds = -1;
  Guarded(error, error_size, [&] { return seconds = loop->Run(calls); });
  return seconds;
}

void release_loop(Loop* loop) { delete loop; }

}  // extern "C"
