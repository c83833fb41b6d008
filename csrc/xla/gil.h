// Taking the GIL on threads that Python did not create, and the end of the interpreter.
//
// Python ends a thread that asks for the GIL while the interpreter shuts down. In the middle of C++
// code, that aborts the process. So threads that may ask for the GIL are counted: at exit the
// interpreter waits until the count is zero, and no thread enters later.

#ifndef TORCHCALL_XLA_GIL_H_
#define TORCHCALL_XLA_GIL_H_

#include <Python.h>

#include <atomic>
#include <cstdint>

namespace torchcall {

inline constexpr const char* kInterpreterEnds =
    "expected a running Python interpreter, got one that is shutting down";

inline std::atomic<int64_t> threads_inside{0};
inline std::atomic<bool> interpreter_ends{false};

// While it exists, the interpreter waits for this thread at exit.
class Inside {
 public:
  Inside() {
    threads_inside.fetch_add(1);
    entered_ = !interpreter_ends.load();
    if (!entered_) threads_inside.fetch_sub(1);
  }
  ~Inside() {
    if (entered_) threads_inside.fetch_sub(1);
  }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;
  // False once the interpreter shuts down: the thread must not take the GIL.
  explicit operator bool() const { return entered_; }

 private:
  bool entered_;
};

// Python did not create XLA's threads. Each gets one thread state, which is never destroyed,
// because making one costs more than a call. The thread must hold an `Inside`.
inline PyGILState_STATE TakeGil() {
  if (PyGILState_GetThisThreadState() == nullptr) {
    PyGILState_Ensure();
    PyEval_SaveThread();
  }
  return PyGILState_Ensure();
}

class Gil {
 public:
  Gil() : state_(TakeGil()) {}
  ~Gil() { PyGILState_Release(state_); }
  Gil(const Gil&) = delete;
  Gil& operator=(const Gil&) = delete;

 private:
  PyGILState_STATE state_;
};

}  // namespace torchcall

#endif  // TORCHCALL_XLA_GIL_H_
