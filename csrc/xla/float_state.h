// XLA runs custom calls with denormals flushed to zero. torch must compute as it does outside XLA,
// and OpenMP workers started inside a call inherit the state permanently.

#ifndef TORCHCALL_XLA_FLOAT_STATE_H_
#define TORCHCALL_XLA_FLOAT_STATE_H_

#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace torchcall {

// Clears flush-to-zero and denormals-are-zero; the destructor restores them.
class FloatStateGuard {
#if defined(__SSE__)
 public:
  FloatStateGuard() : saved_(_mm_getcsr()) {
    if ((saved_ & kFlushBits) != 0) _mm_setcsr(saved_ & ~kFlushBits);
  }
  ~FloatStateGuard() {
    if ((saved_ & kFlushBits) != 0) _mm_setcsr(saved_);
  }

 private:
  static constexpr unsigned kFlushBits = 0x8040;  // FTZ is bit 15, DAZ bit 6 of MXCSR
  unsigned saved_;
#elif defined(__aarch64__)
 public:
  FloatStateGuard() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    Write(saved_ & ~kFlushBit);
  }
  ~FloatStateGuard() { Write(saved_); }

 private:
  static void Write(uint64_t value) { asm volatile("msr fpcr, %0" : : "r"(value)); }
  static constexpr uint64_t kFlushBit = uint64_t{1} << 24;  // FZ
  uint64_t saved_;
#else
#error "torchcall: no floating-point state guard for this processor"
#endif

 public:
  FloatStateGuard(const FloatStateGuard&) = delete;
  FloatStateGuard& operator=(const FloatStateGuard&) = delete;
};

}  // namespace torchcall

#endif  // TORCHCALL_XLA_FLOAT_STATE_H_
