#include "callable.h"

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace torchcall {
namespace {

bool Finalizing() {
#if PY_VERSION_HEX >= 0x030d0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

// XLA's threads know nothing of Python. Each keeps one thread state for good: to make one and throw
// it away costs more than a call.
PyGILState_STATE TakeGil() {
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

struct Callable {
  PyObject* make_tensors;
  PyObject* run;
};

struct Frame {
  PyObject* tensors = nullptr;                 // a list
  PyObject* result = nullptr;                  // a tuple, between `run` and `finish`
  std::vector<Py_ssize_t> references;          // to each tensor, when the run began
  PyGILState_STATE gil = PyGILState_UNLOCKED;  // taken in `run`, let go in `finish`
  bool holds_gil = false;
};

TcStatus Fail(TcSink error, std::string_view text) {
  error.write(error.self, text.data(), text.size());
  return TC_FAILED;
}

TcStatus FailFinalizing(TcSink error) {
  return Fail(error, "expected a running Python interpreter, got one that is shutting down");
}

// The Python exception that is set.
TcStatus FailWithPythonError(TcSink error) {
  const nanobind::python_error raised;
  return Fail(error, std::string("raised ") + raised.what());
}

// nullptr, with an exception set, for what is no tensor.
void* AddressOf(PyObject* tensor) {
  static PyObject* name = PyUnicode_InternFromString("_cdata");
  PyObject* address = PyObject_GetAttr(tensor, name);
  if (address == nullptr) return nullptr;
  void* pointer = PyLong_AsVoidPtr(address);
  Py_DECREF(address);
  return pointer;
}

// Whether a Python attribute was set on the tensor; the next call must not see it.
bool HasAttributes(PyObject* tensor) {
  PyObject* attributes = PyObject_GenericGetDict(tensor, nullptr);
  if (attributes == nullptr) {
    PyErr_Clear();
    return false;
  }
  const bool any = PyDict_GET_SIZE(attributes) > 0;
  Py_DECREF(attributes);
  return any;
}

TcStatus Open(void* self, int64_t num_inputs, void** frame, void** tensors, TcSink error) {
  if (Finalizing()) return FailFinalizing(error);
  const Gil gil;
  auto* callable = static_cast<Callable*>(self);
  PyObject* list = PyObject_CallNoArgs(callable->make_tensors);
  if (list == nullptr) return FailWithPythonError(error);
  auto opened = std::make_unique<Frame>();
  opened->tensors = list;
  opened->references.resize(num_inputs);
  for (int64_t i = 0; i < num_inputs; ++i) {
    PyObject* tensor = PyList_GET_ITEM(list, i);
    if (tensor == Py_None) {
      tensors[i] = nullptr;
      continue;
    }
    tensors[i] = AddressOf(tensor);
    if (PyErr_Occurred() != nullptr) {
      const TcStatus status = FailWithPythonError(error);
      Py_DECREF(list);
      return status;
    }
  }
  *frame = opened.release();
  return TC_OK;
}

TcStatus Run(void* self, void* opened, void** outputs, int64_t num_outputs, TcSink error) {
  auto* frame = static_cast<Frame*>(opened);
  if (Finalizing()) return FailFinalizing(error);
  frame->gil = TakeGil();
  frame->holds_gil = true;
  // Counted anew each time: torch's C++ references may count as one of Python's, or may not.
  for (size_t i = 0; i < frame->references.size(); ++i) {
    frame->references[i] = Py_REFCNT(PyList_GET_ITEM(frame->tensors, static_cast<Py_ssize_t>(i)));
  }
  frame->result = PyObject_CallOneArg(static_cast<Callable*>(self)->run, frame->tensors);
  if (frame->result == nullptr) return FailWithPythonError(error);
  if (PyUnicode_Check(frame->result)) {
    const char* text = PyUnicode_AsUTF8(frame->result);
    if (text == nullptr) return FailWithPythonError(error);
    return Fail(error, text);
  }
  for (int64_t i = 0; i < num_outputs; ++i) {
    outputs[i] = AddressOf(PyTuple_GET_ITEM(frame->result, i));
    if (outputs[i] == nullptr) return FailWithPythonError(error);
  }
  return TC_OK;
}

void Finish(void*, void* opened, int32_t* kept) {
  auto* frame = static_cast<Frame*>(opened);
  if (!frame->holds_gil) return;
  Py_CLEAR(frame->result);
  for (size_t i = 0; i < frame->references.size(); ++i) {
    PyObject* tensor = PyList_GET_ITEM(frame->tensors, static_cast<Py_ssize_t>(i));
    if (tensor == Py_None) continue;
    kept[i] = Py_REFCNT(tensor) > frame->references[i] || HasAttributes(tensor);
  }
  frame->holds_gil = false;
  PyGILState_Release(frame->gil);
}

void Close(void*, void* opened) {
  auto* frame = static_cast<Frame*>(opened);
  if (!Finalizing()) {
    const Gil gil;
    Py_CLEAR(frame->tensors);
  }
  delete frame;
}

void Release(void* self) {
  auto* callable = static_cast<Callable*>(self);
  if (!Finalizing()) {
    const Gil gil;
    Py_DECREF(callable->make_tensors);
    Py_DECREF(callable->run);
  }
  delete callable;
}

}  // namespace

TcCallable PythonCallable(nanobind::object make_tensors, nanobind::object run) {
  auto* callable = new Callable{make_tensors.release().ptr(), run.release().ptr()};
  return {callable, &Open, &Run, &Finish, &Close, &Release};
}

}  // namespace torchcall
