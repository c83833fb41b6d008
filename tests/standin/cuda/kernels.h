// Modules and their kernels. PTX is interpreted; kernels in machine code have no effect.

#ifndef TORCHCALL_STANDIN_CUDA_KERNELS_H_
#define TORCHCALL_STANDIN_CUDA_KERNELS_H_

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>

namespace standin {

namespace ptx {
struct Program;
}

struct Kernel {
  std::string name;
  std::shared_ptr<const ptx::Program> program;  // null: machine code
};

struct Module {
  bool is_ptx = false;
  std::map<std::string, std::unique_ptr<Kernel>> kernels;
  std::map<std::string, std::pair<uint64_t, uint64_t>> globals;  // addresses and bytes
};

// Null for PTX that cannot be run: stderr says why.
Module* NewModule(const void* image);
// Null where a module of PTX has no such kernel.
Kernel* KernelOf(Module* module, const std::string& name);
// What a launch does, with the arguments as they are now.
std::function<void()> Prepared(const Kernel& kernel, std::array<unsigned int, 3> grid,
                               std::array<unsigned int, 3> block, unsigned int shared,
                               void** arguments);

}  // namespace standin

#endif  // TORCHCALL_STANDIN_CUDA_KERNELS_H_
