// The GIL for threads that Python did not create.

#ifndef TORCHCALL_XLA_GIL_H_
#define TORCHCALL_XLA_GIL_H_

#include <Python.h>

namespace torchcall {

inline bool InterpreterEnds() {
#if PY_VERSION_HEX >= 0x030d0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

// Gives each XLA thread a Python thread state that is never freed: creating one per call costs more
// than the call.
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
