#include "capture.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "../gil.h"
#include "../interrupt.h"
#include "calls.h"

namespace torchcall {
namespace {

namespace nb = nanobind;

// The result of a capture in Python: the graph, the addresses of its input and output buffers, and
// their owner. Or why there is no graph, and whether to retry.
using PyCaptured =
    std::tuple<uintptr_t, std::vector<CudaAddress>, std::vector<CudaAddress>, nb::object>;
using PyNoCapture = std::tuple<std::string, bool>;
using Kind = NoCapture::Kind;

Captured Failed(Kind kind, const std::string& reason) {
  Captured captured;
  captured.failure = {kind, reason};
  return captured;
}

Captured FromPython(const nb::object& result) {
  if (nb::len(result) == 2) {
    const auto [reason, retry] = nb::cast<PyNoCapture>(result);
    return Failed(retry ? Kind::kInvalidated : Kind::kRefused, reason);
  }
  auto [graph, inputs, outputs, owner] = nb::cast<PyCaptured>(result);
  Captured captured;
  captured.graph = reinterpret_cast<void*>(graph);
  captured.inputs = std::move(inputs);
  captured.outputs = std::move(outputs);
  captured.release = [owned = owner.release().ptr()] {
    const Inside inside;
    if (!inside) return;
    const Gil gil;
    Py_DECREF(owned);
  };
  return captured;
}

Captured CaptureInPython(PyObject* capture, Recording& recording) {
  const Inside inside;
  if (!inside) {
    return Failed(Kind::kRefused, "the Python interpreter is shutting down");
  }
  const Gil gil;
  try {
    return FromPython(nb::handle(capture)(nb::cast(&recording, nb::rv_policy::reference)));
  } catch (const nb::python_error& e) {
    if (e.matches(PyExc_Exception)) return Failed(Kind::kRefused, e.what());
    RaiseLater(e.value().ptr());  // KeyboardInterrupt, SystemExit
    return Failed(Kind::kInterrupted,
                  std::string("raised ") + nanobind::cast<std::string>(e.type().attr("__name__")));
  } catch (const std::exception& e) {
    return Failed(Kind::kRefused, e.what());
  }
}

void WarnInPython(PyObject* warn, const std::string& model, const std::string& reason) {
  const Inside inside;
  if (!inside) return;
  const Gil gil;
  bool interrupted = false;
  try {
    const nb::handle function(warn);
    function(model, reason);
  } catch (const nb::python_error& e) {  // with warnings as errors; must not fail the call
    interrupted = e.matches(PyExc_KeyboardInterrupt);
  }
  if (interrupted) PyErr_SetInterrupt();
}

void SetPythonTools(const nb::object& capture, const nb::object& warn) {
  PyObject* capturing = nb::object(capture).release().ptr();  // never freed
  PyObject* warning = nb::object(warn).release().ptr();
  SetGraphTools(
      {[capturing](Recording& recording) { return CaptureInPython(capturing, recording); },
       [warning](const std::string& model, const std::string& reason) {
         WarnInPython(warning, model, reason);
       },
       &PyErr_SetInterrupt});
}

std::string Call(Recording& recording) {
  const nb::gil_scoped_release release;
  return recording.Call();
}

// Without the GIL: torch's own threads may need it while the model runs.
void Run(const Recording& recording, const std::vector<CudaAddress>& inputs,
         const std::vector<CudaAddress>& outputs, uintptr_t stream) {
  const nb::gil_scoped_release release;
  recording.Run(inputs, outputs, reinterpret_cast<void*>(stream));
}

// Calls a function while no capture is under way.
nb::object BetweenCaptures(const nb::callable& function) {
  std::unique_lock<std::recursive_mutex> lock(SetupMutex(), std::defer_lock);
  {
    const nb::gil_scoped_release release;
    lock.lock();
  }
  return function();
}

void CopyInputs(const Recording& recording, const std::vector<CudaAddress>& to) {
  const nb::gil_scoped_release release;
  recording.CopyInputs(to);
}

}  // namespace

void BindCapture(nb::module_& m) {
  m.def("set_graph_tools", &SetPythonTools, nb::arg("capture"), nb::arg("warn"),
        nb::sig("def set_graph_tools(capture: object, warn: object) -> None"));
  m.def("set_graph_limit", &SetGraphLimit, nb::arg("limit"));
  m.def("between_captures", &BetweenCaptures, nb::arg("function"),
        nb::sig("def between_captures(function: typing.Callable[[], typing.Any]) -> typing.Any"));
  nb::class_<Recording>(m, "Recording")
      .def_prop_ro("ordinal", &Recording::ordinal)
      .def_prop_ro("input_bytes", [](const Recording& self) { return self.plan().input_bytes; })
      .def_prop_ro("output_bytes", [](const Recording& self) { return self.plan().output_bytes; })
      .def_prop_ro(
          "stream",
          [](const Recording& self) { return reinterpret_cast<uintptr_t>(self.OwnStream()); })
      .def("interrupt", &Recording::Interrupt)
      .def("call", &Call)
      .def("copy_inputs", &CopyInputs, nb::arg("to"))
      .def("run", &Run, nb::arg("inputs"), nb::arg("outputs"), nb::arg("stream"));
}

}  // namespace torchcall
