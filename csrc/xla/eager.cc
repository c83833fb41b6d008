#include "eager.h"

#include <map>
#include <memory>
#include <string>
#include <string_view>

#include "gil.h"
#include "interrupt.h"

namespace torchcall {
namespace {

// What calls of one eager model on one device need. Made by the first of them, under the GIL.
struct Bound {
  PyObject* make;       // makes a tensor like a template
  PyObject* templates;  // a list of tensors, None for a length
  PyObject* run;        // called on a list of tensors like them
};

struct Code {
  PyObject* runner;
  std::map<std::string, Bound> bound;  // by device; used under the GIL
};

// A call under way. The GIL is held from `Open` to `Close`.
struct Frame {
  ~Frame() {
    Py_CLEAR(tensors);
    Py_CLEAR(result);
  }
  const Gil gil;
  const Bound* bound = nullptr;
  PyObject* tensors = nullptr;  // a list
  PyObject* result = nullptr;   // a tuple
};

TcStatus Fail(TcSink error, std::string_view text) {
  error.write(error.self, text.data(), text.size());
  return TC_FAILED;
}

TcStatus FailFinalizing(TcSink error) { return Fail(error, kInterpreterEnds); }

// The Python exception that is set.
TcStatus FailWithPythonError(TcSink error) {
  const nanobind::python_error raised;
  if (!raised.matches(PyExc_Exception)) {  // KeyboardInterrupt, SystemExit
    RaiseLater(raised.value().ptr());
    return Fail(error, std::string("raised ") +
                           nanobind::cast<std::string>(raised.type().attr("__name__")));
  }
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

void Release(const Bound& bound) {
  Py_DECREF(bound.make);
  Py_DECREF(bound.templates);
  Py_DECREF(bound.run);
}

std::string NameOf(DLDevice device) {
  return device.device_type == kDLCPU ? "cpu" : "cuda:" + std::to_string(device.device_id);
}

// nullptr, with an exception set, where Python raised.
const Bound* Bind(Code* code, DLDevice device) {
  const std::string name = NameOf(device);
  const auto found = code->bound.find(name);
  if (found != code->bound.end()) return &found->second;
  PyObject* made = PyObject_CallMethod(code->runner, "bind", "s", name.c_str());
  if (made == nullptr) return nullptr;
  const Bound bound = {Py_NewRef(NB_TUPLE_GET_ITEM(made, 0)), Py_NewRef(NB_TUPLE_GET_ITEM(made, 1)),
                       Py_NewRef(NB_TUPLE_GET_ITEM(made, 2))};
  Py_DECREF(made);
  // Python may have let another call be the first meanwhile.
  const auto [entry, is_new] = code->bound.try_emplace(name, bound);
  if (!is_new) Release(bound);
  return &entry->second;
}

TcStatus Open(void* self, DLDevice device, int64_t num_inputs, void** opened, void** tensors,
              TcSink error) {
  const Inside inside;
  if (!inside) return FailFinalizing(error);
  auto frame = std::make_unique<Frame>();
  frame->bound = Bind(static_cast<Code*>(self), device);
  if (frame->bound == nullptr) return FailWithPythonError(error);
  frame->tensors = PyList_New(num_inputs);
  if (frame->tensors == nullptr) return FailWithPythonError(error);
  for (int64_t i = 0; i < num_inputs; ++i) {
    PyObject* form = NB_LIST_GET_ITEM(frame->bound->templates, i);
    tensors[i] = nullptr;
    if (form == Py_None) {
      NB_LIST_SET_ITEM(frame->tensors, i, Py_NewRef(form));
      continue;
    }
    PyObject* tensor = PyObject_CallFunctionObjArgs(frame->bound->make, form, nullptr);
    if (tensor == nullptr) return FailWithPythonError(error);
    NB_LIST_SET_ITEM(frame->tensors, i, tensor);
    tensors[i] = AddressOf(tensor);
    if (tensors[i] == nullptr) return FailWithPythonError(error);
  }
  *opened = frame.release();
  return TC_OK;
}

TcStatus Run(void*, void* opened, void** outputs, int64_t num_outputs, TcSink error) {
  auto* frame = static_cast<Frame*>(opened);
  frame->result = PyObject_CallFunctionObjArgs(frame->bound->run, frame->tensors, nullptr);
  if (frame->result == nullptr) return FailWithPythonError(error);
  if (PyUnicode_Check(frame->result)) {
    const char* text = PyUnicode_AsUTF8AndSize(frame->result, nullptr);
    if (text == nullptr) return FailWithPythonError(error);
    return Fail(error, text);
  }
  for (int64_t i = 0; i < num_outputs; ++i) {
    outputs[i] = AddressOf(NB_TUPLE_GET_ITEM(frame->result, i));
    if (outputs[i] == nullptr) return FailWithPythonError(error);
  }
  return TC_OK;
}

void ReleaseOutputs(void*, void* opened, int32_t* retained) {
  auto* frame = static_cast<Frame*>(opened);
  Py_CLEAR(frame->result);
  for (Py_ssize_t i = 0; i < NB_LIST_GET_SIZE(frame->tensors); ++i) {
    PyObject* tensor = NB_LIST_GET_ITEM(frame->tensors, i);
    retained[i] = tensor != Py_None && Py_REFCNT(tensor) > 1;
  }
}

void Close(void*, void* opened) { delete static_cast<Frame*>(opened); }

void ReleaseCode(void* self) {
  auto* code = static_cast<Code*>(self);
  if (const Inside inside; inside) {
    const Gil gil;
    for (const auto& [name, bound] : code->bound) Release(bound);
    Py_DECREF(code->runner);
  }
  delete code;
}

TcStatus Hold(void* self, DLDevice device, void** held, TcSink error) {
  const Inside inside;
  if (!inside) return FailFinalizing(error);
  const Gil gil;
  *held =
      PyObject_CallMethod(static_cast<Code*>(self)->runner, "held", "s", NameOf(device).c_str());
  return *held == nullptr ? FailWithPythonError(error) : TC_OK;
}

void ReleaseHeld(void*, void* held) {
  const Inside inside;
  if (!inside) return;
  const Gil gil;
  Py_DECREF(static_cast<PyObject*>(held));
}

}  // namespace

TcEager EagerCode(nanobind::object runner) {
  auto* code = new Code{runner.release().ptr(), {}};
  return {code, &Open, &Run, &ReleaseOutputs, &Close, &ReleaseCode, &Hold, &ReleaseHeld};
}

}  // namespace torchcall
