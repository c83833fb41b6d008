// One thread budget for the process. torch stores its thread count per calling thread, so each XLA
// thread applies the budget before its next call.

#include <ATen/Parallel.h>

#include <atomic>

#include "guards.h"

namespace torchcall {
namespace {

std::atomic<int> budget{0};  // 0: torch's own default

}  // namespace

void SetThreadBudget(int threads) { budget.store(threads, std::memory_order_relaxed); }

void ApplyThreadBudget() {
  thread_local int applied = 0;
  const int wanted = budget.load(std::memory_order_relaxed);
  if (wanted == applied) return;
  at::set_num_threads(wanted);
  applied = wanted;
}

}  // namespace torchcall
