#include "plain_methods.hpp"

#include <string>

namespace nvpflow::python {

std::string hint_about(const std::string& name, std::span<PyObject* const> known) {
  py::list names;
  for (PyObject* each : known) names.append(py::handle(each));
  const auto hint = py::module_::import("nvpflow._hints").attr("about")(name, names).cast<std::string>();
  return hint.empty() ? "" : "; " + hint;
}

double real_number(PyObject* given, const char* name) {
  const bool is_real = PyBool_Check(given) == 0 && (PyFloat_Check(given) != 0 || PyIndex_Check(given) != 0 ||
                                                    PyObject_HasAttrString(given, "__float__") == 1);
  const double value = is_real ? PyFloat_AsDouble(given) : -1;
  if (is_real && PyErr_Occurred() == nullptr) return value;
  if (is_real && PyErr_ExceptionMatches(PyExc_TypeError) == 0) throw py::error_already_set();
  PyErr_Clear();
  raise(PyExc_TypeError, std::string(name) + " is " + Py_TYPE(given)->tp_name + ", expected a real number");
}

std::string path_of(const py::object& path) {
  PyObject* bytes = nullptr;
  if (PyUnicode_FSConverter(path.ptr(), static_cast<void*>(&bytes)) == 0) throw py::error_already_set();
  return py::reinterpret_steal<py::bytes>(bytes);
}

void add_method(const py::object& type, PyMethodDef* method) {
  PyObject* descriptor = PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), method);
  if (descriptor == nullptr) throw py::error_already_set();
  type.attr(method->ml_name) = py::reinterpret_steal<py::object>(descriptor);
}

void add_function(py::module_& module, PyMethodDef* function) {
  PyObject* made = PyCFunction_NewEx(function, nullptr, py::str("nvpflow._core").ptr());
  if (made == nullptr) throw py::error_already_set();
  module.attr(function->ml_name) = py::reinterpret_steal<py::object>(made);
}

}  // namespace nvpflow::python
