#include "errors.hpp"

#include <exception>
#include <new>
#include <string>

#include <nvpflow/error.hpp>

namespace nvpflow::python {
namespace {

PyObject* file_format_error = nullptr;
PyObject* training_error = nullptr;
PyObject* cuda_error = nullptr;

/// Messages may quote a path that is not UTF-8: such bytes come through as the surrogates that os.fsdecode gives.
void set_text(PyObject* type, const char* message) {
  PyObject* text = PyUnicode_DecodeFSDefault(message);
  if (text == nullptr) return;
  PyErr_SetObject(type, text);
  Py_DECREF(text);
}

void set_os_error(const Error& error) {
  // OSError(errno, text) picks FileNotFoundError, IsADirectoryError and so on by itself.
  PyObject* value =
      PyObject_CallFunction(PyExc_OSError, "iN", error.system_error(), PyUnicode_DecodeFSDefault(error.what()));
  if (value == nullptr) return;
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(value)), value);
  Py_DECREF(value);
}

void set_error(const Error& error) {
  switch (error.code()) {
    case ErrorCode::invalid_argument:
      return set_text(PyExc_ValueError, error.what());
    case ErrorCode::type_mismatch:
      return set_text(PyExc_TypeError, error.what());
    case ErrorCode::out_of_memory:
      return set_text(PyExc_MemoryError, error.what());
    case ErrorCode::file_format:
      return set_text(file_format_error, error.what());
    case ErrorCode::not_finite:
    case ErrorCode::none_kept:
      return set_text(training_error, error.what());
    case ErrorCode::unavailable:
      return set_text(PyExc_RuntimeError, error.what());
    case ErrorCode::device:
      return set_text(cuda_error, error.what());
    case ErrorCode::io:
      return set_os_error(error);
  }
}

PyObject* new_exception(py::module_& module, const char* name, PyObject* base, const char* doc) {
  PyObject* type = PyErr_NewExceptionWithDoc((std::string("nvpflow.") + name).c_str(), doc, base, nullptr);
  if (type == nullptr) throw py::error_already_set();
  module.attr(name) = py::handle(type);
  return type;  // kept for ever, as the module is
}

}  // namespace

void bind_errors(py::module_& module) {
  file_format_error = new_exception(module, "FileFormatError", PyExc_ValueError,
                                    "A model file is damaged, foreign, or newer than this library.");
  training_error =
      new_exception(module, "TrainingError", PyExc_ArithmeticError,
                    "Training met a NaN or infinite loss or gradient (the best weights are kept), or kept no epoch.");
  cuda_error =
      new_exception(module, "CudaError", PyExc_RuntimeError, "CUDA cannot be used here, or a CUDA device failed.");
  // NOLINTNEXTLINE(performance-unnecessary-value-param): pybind11 says what its translators take
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const Error& error) {
      set_error(error);
    }
  });
}

void raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw py::error_already_set();
}

void set_python_error() {
  try {
    throw;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const Error& error) {
    set_error(error);
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

}  // namespace nvpflow::python
