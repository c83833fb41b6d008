#include "kernels.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "device.h"
#include "ptx_builder.h"

namespace standin {
namespace {

std::mutex mutex;

void Report(const std::string& line) {
  std::fprintf(stderr, "CUDA stand-in: %s\n", line.c_str());
  Machine::Get().Note("error\t" + line);
}

// Gives a module's variables their memory, and what they hold at first.
void PlaceGlobals(const ptx::Text& text, Module* module) {
  for (ptx::Variable* variable : text.globals) {
    if (variable->is_extern) continue;
    void* const address = Machine::Get().Allocate(this_device, variable->bytes);
    if (address == nullptr) throw ptx::Fault("no memory for " + variable->name);
    variable->address = reinterpret_cast<uint64_t>(address);
    module->globals[variable->name] = {variable->address, variable->bytes};
    std::memset(Machine::Host(address), 0, variable->bytes);
  }
  for (const ptx::Variable* variable : text.globals) {
    if (variable->is_extern) continue;
    char* const host = Machine::Host(reinterpret_cast<void*>(variable->address));
    std::memcpy(host, variable->initial.data(), variable->initial.size());
    for (const auto& reference : variable->references) {
      const uint64_t value = reference.to->address + reference.offset;
      if (reference.to->address == 0) throw ptx::Fault("an address in " + variable->name);
      std::memcpy(host + reference.at, &value, sizeof(value));
    }
  }
}

void Load(const char* image, Module* module) {
  const std::unique_ptr<ptx::Text> text = ptx::Parse(image);
  PlaceGlobals(*text, module);
  for (const auto& [name, function] : text->functions) {
    if (!function.is_entry) continue;
    auto program = std::make_shared<const ptx::Program>(ptx::Builder(*text, function).Build());
    module->kernels[name] = std::make_unique<Kernel>(Kernel{name, std::move(program)});
  }
}

void RunReported(const ptx::Program& program, const ptx::Launch& launch) {
  try {
    ptx::Execute(program, launch);
  } catch (const ptx::Fault& fault) {
    Report("kernel " + program.name + " ended early: " + fault.what());
    Machine::Get().fault = CUDA_ERROR_LAUNCH_FAILED;
  }
}

}  // namespace

Module* NewModule(const void* image) {
  auto module = std::make_unique<Module>();
  const char* const text = static_cast<const char*>(image);
  if (text == nullptr ||
      std::string(text, strnlen(text, 400)).find(".version") == std::string::npos) {
    return module.release();
  }
  module->is_ptx = true;
  if (std::getenv("STANDIN_PTX") != nullptr) std::fprintf(stderr, "%s\n", text);
  try {
    Load(text, module.get());
  } catch (const std::exception& error) {
    Report(std::string("cannot load PTX: ") + error.what());
    return nullptr;
  }
  return module.release();
}

Kernel* KernelOf(Module* module, const std::string& name) {
  const std::lock_guard lock(mutex);
  if (module->is_ptx) {
    const auto found = module->kernels.find(name);
    return found == module->kernels.end() ? nullptr : found->second.get();
  }
  auto& kernel = module->kernels[name];
  if (!kernel) kernel = std::make_unique<Kernel>(Kernel{name, nullptr});
  return kernel.get();
}

std::function<void()> Prepared(const Kernel& kernel, std::array<unsigned int, 3> grid,
                               std::array<unsigned int, 3> block, unsigned int shared,
                               void** arguments) {
  if (kernel.program == nullptr) return nullptr;
  const auto program = kernel.program;
  ptx::Launch launch{{grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared, {}};
  launch.parameters.resize(program->parameters);
  for (size_t i = 0; i < program->parameter_bytes.size(); ++i) {
    if (arguments == nullptr) {
      Report("kernel " + kernel.name + " launched without arguments");
      Machine::Get().fault = CUDA_ERROR_LAUNCH_FAILED;
      return nullptr;
    }
    std::memcpy(launch.parameters.data() + program->parameter_offsets[i], arguments[i],
                program->parameter_bytes[i]);
  }
  return [program, launch = std::move(launch)] { RunReported(*program, launch); };
}

}  // namespace standin
