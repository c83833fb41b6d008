// The words of a module.

#ifndef TORCHCALL_STANDIN_CUDA_PTX_TOKENS_H_
#define TORCHCALL_STANDIN_CUDA_PTX_TOKENS_H_

#include <string>
#include <vector>

namespace standin::ptx {

// Without comments and the directives that only serve debuggers; an empty word ends them.
std::vector<std::string> Tokens(const std::string& text);

}  // namespace standin::ptx

#endif  // TORCHCALL_STANDIN_CUDA_PTX_TOKENS_H_
