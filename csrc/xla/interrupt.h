// Ctrl-C, and the end of the process, while calls run.
//
// Python handles SIGINT when the main thread is back in Python code. While that thread runs a
// jitted loop, or waits for one, it is not. So a handler in front of Python's records the signal,
// and the next call ends the program with an error. The main thread then raises what Python's
// handler raises, KeyboardInterrupt, instead of that error.

#ifndef TORCHCALL_XLA_INTERRUPT_H_
#define TORCHCALL_XLA_INTERRUPT_H_

#include <Python.h>

#include <atomic>

namespace torchcall {

// Puts a handler in front of Python's. Called on the main thread, with the GIL. `raise_later` is
// a Python function of an exception or None: the next error on the main thread becomes the
// exception, or what pending signals raise.
void WatchInterrupts(PyObject* raise_later);

// Whether SIGINT came while the main thread was outside Python, where it still is.
inline std::atomic<bool> interrupt_pending{false};

// Whether every call fails, which ends the programs that run. For other signals than SIGINT, and
// for programs that several threads run.
inline std::atomic<bool> calls_stopped{false};

// Throws std::runtime_error if calls are stopped, or the pending Ctrl-C ends the program.
void HandleInterrupt();
// Reinstalls the handler if Python has replaced it.
void WatchAgain();
// Every call makes this check while it holds an `Inside`.
inline void CheckInterrupt() {
  // Python's own handler is back after each signal.signal().
  thread_local unsigned calls = 0;
  if (calls++ % 16 == 0) WatchAgain();
  constexpr auto relaxed = std::memory_order_relaxed;
  if (interrupt_pending.load(relaxed) || calls_stopped.load(relaxed)) HandleInterrupt();
}

// The next error on the main thread becomes this exception. Does nothing on other threads. Needs
// the GIL.
void RaiseLater(PyObject* exception);

// Refuses further calls, and waits for running ones. Ctrl-C during the wait ends the process.
// Called when the process exits, with the GIL.
void FinishCalls();

}  // namespace torchcall

#endif  // TORCHCALL_XLA_INTERRUPT_H_
