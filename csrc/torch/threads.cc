// The number of torch's threads in a call: one budget for the process, or a plan's own number.
// torch stores its thread count per calling thread, so each XLA thread applies it at each call.

#include <ATen/Parallel.h>
#include <dlfcn.h>

#include <atomic>

#include "guards.h"

namespace torchcall {
namespace {

std::atomic<int> budget{0};  // 0: torch's own default

// The setters behind at::set_num_threads. That function also changes the number with which threads
// begin that use torch for the first time, for all threads, so it cannot serve for one call.
struct ThreadLocalSetters {
  void (*openmp)(int) = nullptr;
  int (*mkl)(int) = nullptr;  // returns the number before, 0: that of OpenMP

  // They are in libtorch_cpu or the libraries that it loads. There may be another OpenMP in the
  // process, so they are looked up there.
  static const ThreadLocalSetters& Get() {
    static const ThreadLocalSetters setters = [] {
      ThreadLocalSetters found;
      Dl_info torch;
      if (dladdr(reinterpret_cast<void*>(&at::get_num_threads), &torch) == 0) return found;
      void* library = dlopen(torch.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
      if (library == nullptr) return found;
      found.openmp = reinterpret_cast<void (*)(int)>(dlsym(library, "omp_set_num_threads"));
      found.mkl = reinterpret_cast<int (*)(int)>(dlsym(library, "MKL_Set_Num_Threads_Local"));
      return found;
    }();
    return setters;
  }
};

void ApplyBudget() {
  thread_local int applied = 0;
  const int wanted = budget.load(std::memory_order_relaxed);
  if (wanted == applied) return;
  at::set_num_threads(wanted);
  applied = wanted;
}

}  // namespace

void SetThreadBudget(int threads) { budget.store(threads, std::memory_order_relaxed); }

ThreadScope::ThreadScope(int threads) {
  ApplyBudget();
  if (threads == 0) return;
  const int before = at::get_num_threads();
  const ThreadLocalSetters& setters = ThreadLocalSetters::Get();
  if (threads == before || setters.openmp == nullptr) return;
  before_ = before;
  setters.openmp(threads);
  if (setters.mkl != nullptr) mkl_before_ = setters.mkl(threads);
}

ThreadScope::~ThreadScope() {
  if (before_ == 0) return;
  const ThreadLocalSetters& setters = ThreadLocalSetters::Get();
  setters.openmp(before_);
  if (setters.mkl != nullptr) setters.mkl(mkl_before_);
}

}  // namespace torchcall
