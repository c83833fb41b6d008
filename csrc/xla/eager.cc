#include "eager.h"

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "gil.h"

namespace torchcall {
namespace {

struct Callable {
  PyObject* runner;
};

struct Frame {
  PyObject* tensors = nullptr;                 // a list
  PyObject* run = nullptr;                     // called on it
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

PyObject* CallWithDevice(PyObject* runner, const char* method, DLDevice device) {
  const std::string name =
      device.device_type == kDLCPU ? "cpu" : "cuda:" + std::to_string(device.device_id);
  return PyObject_CallMethod(runner, method, "s", name.c_str());
}

TcStatus Open(void* self, DLDevice device, int64_t num_inputs, void** frame, void** tensors,
              TcSink error) {
  if (InterpreterEnds()) return FailFinalizing(error);
  const Gil gil;
  auto* callable = static_cast<Callable*>(self);
  PyObject* pair = CallWithDevice(callable->runner, "open", device);
  if (pair == nullptr) return FailWithPythonError(error);
  PyObject* list = PyTuple_GET_ITEM(pair, 0);
  auto opened = std::make_unique<Frame>();
  opened->tensors = Py_NewRef(list);
  opened->run = Py_NewRef(PyTuple_GET_ITEM(pair, 1));
  Py_DECREF(pair);
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
      Py_CLEAR(opened->tensors);
      Py_CLEAR(opened->run);
      return status;
    }
  }
  *frame = opened.release();
  return TC_OK;
}

TcStatus Run(void*, void* opened, void** outputs, int64_t num_outputs, TcSink error) {
  auto* frame = static_cast<Frame*>(opened);
  if (InterpreterEnds()) return FailFinalizing(error);
  frame->gil = TakeGil();
  frame->holds_gil = true;
  // Counted anew each time: torch's C++ references may count as one of Python's, or may not.
  for (size_t i = 0; i < frame->references.size(); ++i) {
    frame->references[i] = Py_REFCNT(PyList_GET_ITEM(frame->tensors, static_cast<Py_ssize_t>(i)));
  }
  frame->result = PyObject_CallOneArg(frame->run, frame->tensors);
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
  if (!InterpreterEnds()) {
    const Gil gil;
    Py_CLEAR(frame->tensors);
    Py_CLEAR(frame->run);
  }
  delete frame;
}

void Release(void* self) {
  auto* callable = static_cast<Callable*>(self);
  if (!InterpreterEnds()) {
    const Gil gil;
    Py_DECREF(callable->runner);
  }
  delete callable;
}

TcStatus Hold(void* self, DLDevice device, void** held, TcSink error) {
  if (InterpreterEnds()) return FailFinalizing(error);
  const Gil gil;
  *held = CallWithDevice(static_cast<Callable*>(self)->runner, "held", device);
  return *held == nullptr ? FailWithPythonError(error) : TC_OK;
}

void LetGo(void*, void* held) {
  if (InterpreterEnds()) return;
  const Gil gil;
  Py_DECREF(static_cast<PyObject*>(held));
}

}  // namespace

TcCallable PythonCallable(nanobind::object runner) {
  auto* callable = new Callable{runner.release().ptr()};
  return {callable, &Open, &Run, &Finish, &Close, &Release, &Hold, &LetGo};
}

}  // namespace torchcall
