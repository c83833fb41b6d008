#include "interrupt.h"

#include <dlfcn.h>
#include <nanobind/nanobind.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>

#include <cerrno>
#include <chrono>
#include <stdexcept>
#include <thread>

#include "gil.h"

namespace torchcall {
namespace {

using Handler = void (*)(int);

pthread_t main_thread;
PyThreadState* main_state = nullptr;
std::atomic<Handler> python_handler{nullptr};
PyObject* raise_later = nullptr;
sem_t arrived;

bool OnMainThread() { return pthread_equal(pthread_self(), main_thread) != 0; }

// The thread state that holds the GIL on this thread, or null. Not in the stable ABI, but exported
// by every CPython. Resolved before the handler is installed.
#ifdef Py_LIMITED_API
using StateFunction = PyThreadState* (*)();
StateFunction FindStateFunction() {
  void* found = dlsym(RTLD_DEFAULT, "PyThreadState_GetUnchecked");  // from 3.13 on
  if (found == nullptr) found = dlsym(RTLD_DEFAULT, "_PyThreadState_UncheckedGet");
  if (found == nullptr) throw std::runtime_error("torchcall: this Python has no unchecked state");
  return reinterpret_cast<StateFunction>(found);
}
const StateFunction current_state = FindStateFunction();
#else
PyThreadState* current_state() { return _PyThreadState_UncheckedGet(); }
#endif

// Async-signal-safe.
void OnSignal(int signal_number) {
  const int saved = errno;
  // Where the main thread has the GIL it is in Python code, which handles the signal by itself.
  if (current_state() != main_state || !OnMainThread()) {
    interrupt_pending.store(true);
    sem_post(&arrived);
  }
  python_handler.load()(signal_number);
  errno = saved;
}

[[noreturn]] void Interrupt() { throw std::runtime_error("interrupted (Ctrl-C)"); }

#if PY_VERSION_HEX < 0x030c0000

// What traced the main thread before, if anything.
Py_tracefunc other_function = nullptr;
PyObject* other_object = nullptr;

int Replace(PyObject* object, PyFrameObject*, int what, PyObject*);

void Disarm() {
  if (main_state->c_tracefunc != &Replace) return;
  _PyEval_SetTrace(main_state, other_function, other_object);
  Py_CLEAR(other_object);
}

int Replace(PyObject* object, PyFrameObject*, int what, PyObject*) {
  if (what != PyTrace_EXCEPTION) return 0;
  const auto exception = nanobind::borrow(object);  // setting the trace releases it
  Disarm();
  if (exception.is_none()) return PyErr_CheckSignals();
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(exception.ptr())), exception.ptr());
  return -1;
}

void Arm(PyObject* exception) {
  if (main_state->c_tracefunc != &Replace) {
    other_function = main_state->c_tracefunc;
    other_object = Py_XNewRef(main_state->c_traceobj);
  }
  if (_PyEval_SetTrace(main_state, &Replace, exception) != 0) PyErr_Clear();
}

#else

// The function that is armed disarms itself.
void Disarm() {}

void Arm(PyObject* exception) {
  PyObject* done = PyObject_CallFunctionObjArgs(raise_later, exception, nullptr);
  if (done == nullptr) PyErr_Clear();
  Py_XDECREF(done);
}

#endif

// Runs when the main thread is back in Python code: it has handled the signal.
int Forget(void*) {
  interrupt_pending.store(false);
  Disarm();
  return 0;
}

// A signal handler cannot do this itself.
void AwaitSignals() {
  for (;;) {
    while (sem_wait(&arrived) != 0) {
    }
    if (const Inside inside; inside) Py_AddPendingCall(&Forget, nullptr);
  }
}

// Whether Python's own handler is to raise KeyboardInterrupt, and no function of the user's runs.
bool RaisesKeyboardInterrupt() {
  namespace nb = nanobind;
  try {
    const nb::module_ signals = nb::module_::import_("signal");
    return signals.attr("getsignal")(SIGINT).is(signals.attr("default_int_handler"));
  } catch (const nb::python_error&) {
    return false;
  }
}

}  // namespace

void WatchInterrupts(PyObject* function) {
  if (raise_later != nullptr) return;
  raise_later = Py_NewRef(function);  // for good
  main_thread = pthread_self();
  main_state = PyThreadState_Get();
  struct sigaction current;
  if (sigaction(SIGINT, nullptr, &current) != 0 || (current.sa_flags & SA_SIGINFO) != 0 ||
      current.sa_handler == SIG_DFL || current.sa_handler == SIG_IGN) {
    return;  // not Python's
  }
  sem_init(&arrived, 0, 0);
  python_handler.store(current.sa_handler);
  sigset_t all, before;  // signals are the main thread's
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread(&AwaitSignals).detach();
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  WatchAgain();
}

void WatchAgain() {
  const Handler python = python_handler.load(std::memory_order_relaxed);
  if (python == nullptr) return;
  struct sigaction current;
  if (sigaction(SIGINT, nullptr, &current) != 0 || current.sa_handler != python) return;
  current.sa_handler = &OnSignal;
  sigaction(SIGINT, &current, nullptr);
}

void HandleInterrupt() {
  if (calls_stopped.load()) throw std::runtime_error("interrupted");
  const Gil gil;
  // The main thread may have handled it meanwhile.
  if (!interrupt_pending.load()) return;
  if (!OnMainThread()) {
    if (RaisesKeyboardInterrupt()) {
      Arm(Py_None);
      Interrupt();
    }
    interrupt_pending.store(false);  // the user's handler runs when the main thread is back
    return;
  }
  interrupt_pending.store(false);
  if (PyErr_CheckSignals() == 0) return;
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  PyErr_NormalizeException(&type, &value, &traceback);
  if (traceback != nullptr) PyException_SetTraceback(value, traceback);
  Arm(value);
  Py_XDECREF(type);
  Py_XDECREF(value);
  Py_XDECREF(traceback);
  Interrupt();
}

void RaiseLater(PyObject* exception) {
  if (raise_later != nullptr && OnMainThread()) Arm(exception);
}

void FinishCalls() {
  interpreter_ends.store(true);
  const nanobind::gil_scoped_release release;
  while (threads_inside.load() > 0) {
    if (interrupt_pending.load()) {
      signal(SIGINT, SIG_DFL);
      raise(SIGINT);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

}  // namespace torchcall
