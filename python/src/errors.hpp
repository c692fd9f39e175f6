// Errors of C++ as exceptions of Python.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace nvpflow::python {

namespace py = pybind11;

/// Adds the exception types of this library to the module, and teaches pybind11 to raise them. Called once, first.
void bind_errors(py::module_& module);

[[noreturn]] void raise(PyObject* type, const std::string& message);

/// Sets the Python error of the exception in flight; call inside a catch block.
void set_python_error();

/// f(), or null and the Python error of what it threw.
template <class F>
PyObject* guarded(F&& f) {
  try {
    return f();
  } catch (...) {
    set_python_error();
    return nullptr;
  }
}

}  // namespace nvpflow::python
