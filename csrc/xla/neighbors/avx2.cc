#include "avx2.h"

#include <atomic>

namespace torchcall {
namespace {

std::atomic<bool> avx2_forbidden = false;

}  // namespace

bool HasAvx2() {
#ifdef TORCHCALL_AVX2
  return !avx2_forbidden && __builtin_cpu_supports("avx2");
#else
  return false;
#endif
}

void ForbidAvx2(bool forbidden) { avx2_forbidden = forbidden; }

}  // namespace torchcall
