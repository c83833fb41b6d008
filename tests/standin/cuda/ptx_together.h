// What a barrier of a block gives its threads.

#ifndef TORCHCALL_STANDIN_CUDA_PTX_TOGETHER_H_
#define TORCHCALL_STANDIN_CUDA_PTX_TOGETHER_H_

#include <cstdint>

namespace standin::ptx {

enum AtBarrier : int64_t { kOnlyWait, kCount, kAll, kAny };

}  // namespace standin::ptx

#endif  // TORCHCALL_STANDIN_CUDA_PTX_TOGETHER_H_
