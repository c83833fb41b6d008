#include "torch_half.h"

#include <dlfcn.h>

#include <atomic>
#include <stdexcept>

namespace torchcall {
namespace {

// Never unloaded: models and plans may outlive every Python object.
std::atomic<const TcEngineApi*> loaded{nullptr};

}  // namespace

void LoadTorchHalf(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  const auto entry = reinterpret_cast<TcEngineApiFunction>(dlsym(library, "torchcall_engine_api"));
  if (entry == nullptr) throw std::runtime_error(path + " has no torchcall_engine_api");
  const TcEngineApi* api = entry();
  if (api->abi_version != TC_ABI_VERSION) {
    throw std::runtime_error(path + ": expected seam version " + std::to_string(TC_ABI_VERSION) +
                             ", got " + std::to_string(api->abi_version));
  }
  loaded.store(api);
}

bool TorchHalfLoaded() { return loaded.load() != nullptr; }

const TcEngineApi& TorchHalf() {
  const TcEngineApi* api = loaded.load(std::memory_order_relaxed);
  if (api == nullptr) throw std::runtime_error("torchcall: no torch half is loaded");
  return *api;
}

}  // namespace torchcall
