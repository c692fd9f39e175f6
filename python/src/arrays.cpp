#include "arrays.hpp"

#include <numpy/arrayobject.h>

#include <cfloat>
#include <functional>

#include "device_arrays.hpp"

namespace nvpflow::python {
namespace {

int type_number(DType dtype) { return dtype == DType::float32 ? NPY_FLOAT : NPY_DOUBLE; }

std::string text_of(PyObject* object) { return py::str(py::handle(object)).cast<std::string>(); }

std::string shape_text(PyArrayObject* array) {
  std::string text = "(";
  for (int i = 0; i < PyArray_NDIM(array); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(PyArray_DIM(array, i));
  }
  return text + (PyArray_NDIM(array) == 1 ? ",)" : ")");
}

std::string dtype_text(PyArrayObject* array) { return text_of(reinterpret_cast<PyObject*>(PyArray_DESCR(array))); }

[[noreturn]] void raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw py::error_already_set();
}

bool usable_as_is(PyArrayObject* array, DType dtype) {
  return PyArray_TYPE(array) == type_number(dtype) && PyArray_ISCARRAY_RO(array);
}

/// Lists and numbers of Python have no dtype of their own: NumPy's guess for them (float64, int64) is not the caller's
/// choice. NumPy's scalars and arrays inside a list are.
bool has_own_dtype(PyObject* object) {
  if (PyList_Check(object) || PyTuple_Check(object)) {
    const auto items = py::reinterpret_steal<py::object>(PySequence_Tuple(object));
    if (!items) throw py::error_already_set();
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items.ptr()); ++i) {
      if (has_own_dtype(PyTuple_GET_ITEM(items.ptr(), i))) return true;
    }
    return false;
  }
  return !(PyFloat_CheckExact(object) || PyLong_Check(object));
}

/// A masked array's hidden values must not come in as data.
void refuse_masked(PyObject* array, const char* name) {
  if (PyArray_CheckExact(array) || PyObject_HasAttrString(array, "mask") == 0) return;
  const auto mask = py::reinterpret_borrow<py::object>(array).attr("mask");
  if (py::module_::import("numpy").attr("any")(mask).cast<bool>()) {
    raise(PyExc_ValueError, std::string(name) + " is a masked array with masked values; fill or remove them");
  }
}

/// Python's numbers may be too large for the dtype: asked before NumPy makes them infinite.
void refuse_overflow(const py::object& array, DType dtype, const char* name) {
  if (dtype != DType::float32) return;
  const auto numpy = py::module_::import("numpy");
  const py::object size = numpy.attr("abs")(numpy.attr("asarray")(array, "float64"));
  const py::object large = numpy.attr("logical_and")(numpy.attr("isfinite")(size), size.attr("__gt__")(FLT_MAX));
  if (large.attr("any")().cast<bool>()) {
    raise(PyExc_ValueError, std::string(name) + " holds a number too large for float32");
  }
}

/// Any object as a C-contiguous array of the dtype, if NumPy calls the conversion safe.
py::object convert(PyObject* object, const char* name, DType dtype) {
  if (PyArray_Check(object)) refuse_masked(object, name);
  auto array = py::reinterpret_steal<py::object>(PyArray_FromAny(object, nullptr, 0, 0, 0, nullptr));
  if (!array) {
    // Ragged lists and the like; NumPy's reason is kept as the cause.
    py::raise_from(PyExc_TypeError, (std::string(name) + " cannot be read as an array of numbers").c_str());
    throw py::error_already_set();
  }
  auto* from = reinterpret_cast<PyArrayObject*>(array.ptr());
  PyArray_Descr* wanted = PyArray_DescrFromType(type_number(dtype));
  const auto wanted_owner = py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(wanted));
  const bool real = PyArray_ISBOOL(from) || PyArray_ISINTEGER(from) || PyArray_ISFLOAT(from);
  const bool own_dtype = !real || has_own_dtype(object);
  const bool safe = own_dtype ? PyArray_CanCastTypeTo(PyArray_DESCR(from), wanted, NPY_SAFE_CASTING) != 0 : real;
  if (!safe) {
    const std::string model(name_of(dtype));
    std::string message = std::string(name) + " has dtype " + dtype_text(from) + ", expected " + model +
                          ", the flow's dtype, or one that converts to it without loss";
    if (real) {
      message += "; convert it with " + std::string(name) + ".astype(np." + model + ")";
      if (dtype == DType::float32) message += ", or build the flow with dtype=\"float64\"";
    }
    raise(PyExc_TypeError, message);
  }
  if (!own_dtype) refuse_overflow(array, dtype, name);
  Py_INCREF(wanted);  // PyArray_FromArray takes a reference
  auto result = py::reinterpret_steal<py::object>(
      PyArray_FromArray(from, wanted, NPY_ARRAY_CARRAY_RO | NPY_ARRAY_ENSUREARRAY | NPY_ARRAY_FORCECAST));
  if (!result) throw py::error_already_set();
  return result;
}

py::object contiguous(PyObject* object, const char* name, DType dtype) {
  if (PyArray_CheckExact(object) && usable_as_is(reinterpret_cast<PyArrayObject*>(object), dtype)) {
    return py::reinterpret_borrow<py::object>(object);
  }
  return convert(object, name, dtype);
}

bool overlap(const void* a, std::int64_t a_bytes, const void* b, std::int64_t b_bytes) {
  const auto* pa = static_cast<const char*>(a);
  const auto* pb = static_cast<const char*>(b);
  const std::less<> before;
  return a_bytes > 0 && b_bytes > 0 && before(pa, pb + b_bytes) && before(pb, pa + a_bytes);
}

[[noreturn]] void raise_overlap(const char* a, const char* b) {
  raise(PyExc_ValueError, std::string(a) + " overlaps " + b + "; they must not share memory");
}

void check_given(PyArrayObject* array, const char* name, DType dtype, int dims, const npy_intp* shape) {
  if (PyArray_TYPE(array) != type_number(dtype) || !PyArray_ISNOTSWAPPED(array)) {
    raise(PyExc_TypeError,
          std::string(name) + " has dtype " + dtype_text(array) + ", expected " + std::string(name_of(dtype)));
  }
  if (PyArray_NDIM(array) != dims || !PyArray_CompareLists(PyArray_DIMS(array), shape, dims)) {
    std::string expected = "(";
    for (int i = 0; i < dims; ++i) expected += (i > 0 ? ", " : "") + std::to_string(shape[i]);
    raise(PyExc_ValueError,
          std::string(name) + " has shape " + shape_text(array) + ", expected " + expected + (dims == 1 ? ",)" : ")"));
  }
  if (!PyArray_ISALIGNED(array)) raise(PyExc_ValueError, std::string(name) + " is not aligned to its elements' size");
  if (!PyArray_IS_C_CONTIGUOUS(array)) {
    raise(PyExc_ValueError, std::string(name) +
                                " is not C-contiguous; results are written in place only into a "
                                "C-contiguous array");
  }
  if (!PyArray_ISWRITEABLE(array)) raise(PyExc_ValueError, std::string(name) + " is read-only");
}

}  // namespace

void import_numpy() {
  if (_import_array() < 0) throw py::error_already_set();
}

InputArray input_rows(PyObject* object, const char* name, DType dtype, std::int64_t features, int device) {
  if (!PyArray_CheckExact(object) && is_device_array(object)) {
    return device_rows(object, name, dtype, features, device);
  }
  InputArray in;
  in.owner = contiguous(object, name, dtype);
  auto* array = reinterpret_cast<PyArrayObject*>(in.owner.ptr());
  const int dims = PyArray_NDIM(array);
  if ((dims != 1 && dims != 2) || PyArray_DIM(array, dims - 1) != features) {
    const std::string d = std::to_string(features);
    raise(PyExc_ValueError, std::string(name) + " has shape " + shape_text(array) + ", expected (B, " + d +
                                ") or, for one row, (" + d + ",)");
  }
  in.data = PyArray_DATA(array);
  in.single = dims == 1;
  in.rows = in.single ? 1 : PyArray_DIM(array, 0);
  return in;
}

InputArray input_vector(PyObject* object, const char* name, DType dtype, const InputArray& x) {
  if (x.on_device) return device_vector(object, name, dtype, x);
  const std::int64_t rows = x.rows;
  const bool single = x.single;
  InputArray in;
  in.owner = contiguous(object, name, dtype);
  auto* array = reinterpret_cast<PyArrayObject*>(in.owner.ptr());
  const bool good = single ? PyArray_NDIM(array) == 0 : PyArray_NDIM(array) == 1 && PyArray_DIM(array, 0) == rows;
  if (!good) {
    raise(PyExc_ValueError, std::string(name) + " has shape " + shape_text(array) + ", expected " +
                                (single ? "()" : "(" + std::to_string(rows) + ",)"));
  }
  in.data = PyArray_DATA(array);
  in.rows = rows;
  in.single = single;
  return in;
}

OutputArray output_array(PyObject* given, const char* name, DType dtype, std::int64_t rows, std::int64_t columns,
                         bool single) {
  npy_intp shape[2];
  int dims = 0;
  if (!single) shape[dims++] = rows;
  if (columns > 0) shape[dims++] = columns;
  OutputArray out;
  if (given == nullptr || given == Py_None) {
    out.array = py::reinterpret_steal<py::object>(PyArray_SimpleNew(dims, shape, type_number(dtype)));
    if (!out.array) throw py::error_already_set();
  } else {
    if (!PyArray_Check(given)) {
      raise(PyExc_TypeError, std::string(name) + " is " + Py_TYPE(given)->tp_name + ", expected a NumPy array");
    }
    check_given(reinterpret_cast<PyArrayObject*>(given), name, dtype, dims, shape);
    out.array = py::reinterpret_borrow<py::object>(given);
    out.given = true;
  }
  auto* array = reinterpret_cast<PyArrayObject*>(out.array.ptr());
  out.data = PyArray_DATA(array);
  out.bytes = PyArray_NBYTES(array);
  return out;
}

OutputArray output_array(PyObject* given, const char* name, DType dtype, std::int64_t columns, const InputArray& like) {
  if (like.on_device) return device_output(given, name, dtype, like.rows, columns, like);
  return output_array(given, name, dtype, like.rows, columns, like.single);
}

void refuse_overlap(const OutputArray& out, const char* out_name, const InputArray& in, const char* in_name,
                    std::int64_t in_bytes) {
  if (out.given && overlap(out.data, out.bytes, in.data, in_bytes)) raise_overlap(out_name, in_name);
}

void refuse_overlap(const OutputArray& a, const char* a_name, const OutputArray& b, const char* b_name) {
  if (a.given && b.given && overlap(a.data, a.bytes, b.data, b.bytes)) raise_overlap(a_name, b_name);
}

PyObject* result_of(OutputArray&& out) {
  if (out.on_device) return device_result(std::move(out));
  PyObject* array = out.array.release().ptr();
  return out.given ? array : PyArray_Return(reinterpret_cast<PyArrayObject*>(array));
}

py::object readonly_view(const void* data, DType dtype, std::int64_t size, py::handle owner) {
  npy_intp shape[1] = {size};
  auto view = py::reinterpret_steal<py::object>(PyArray_New(&PyArray_Type, 1, shape, type_number(dtype), nullptr,
                                                            const_cast<void*>(data), 0,
                                                            NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED, nullptr));
  if (!view) throw py::error_already_set();
  auto* array = reinterpret_cast<PyArrayObject*>(view.ptr());
  if (PyArray_SetBaseObject(array, py::reinterpret_borrow<py::object>(owner).release().ptr()) < 0) {
    throw py::error_already_set();
  }
  return view;
}

}  // namespace nvpflow::python
