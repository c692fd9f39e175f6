#include "host_arrays.hpp"

#include <numpy/arrayobject.h>
#include <pybind11/stl.h>

#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <nvpflow/spec.hpp>

#include "../../cpp/src/memory.hpp"
#include "dlpack.h"
#include "errors.hpp"
#include "gil.hpp"
#include "layout.hpp"
#include "outside.hpp"

namespace nvpflow::python {
namespace {

int type_number(DType dtype) { return dtype == DType::float32 ? NPY_FLOAT : NPY_DOUBLE; }

std::string text_of(PyObject* object) { return py::str(py::handle(object)).cast<std::string>(); }

std::span<const npy_intp> shape_of(PyArrayObject* array) {
  return {PyArray_DIMS(array), static_cast<std::size_t>(PyArray_NDIM(array))};
}

using python::shape_text;  // beside the one below

std::string shape_text(PyArrayObject* array) { return shape_text(shape_of(array)); }

std::string dtype_text(PyArrayObject* array) { return text_of(reinterpret_cast<PyObject*>(PyArray_DESCR(array))); }

bool usable_as_is(PyArrayObject* array, DType dtype) {
  return PyArray_TYPE(array) == type_number(dtype) && PyArray_ISCARRAY_RO(array);
}

/// The array looks at memory that `owner` holds.
void keep_alive(py::object owner, const py::object& array) {
  if (PyArray_SetBaseObject(reinterpret_cast<PyArrayObject*>(array.ptr()), owner.release().ptr()) < 0) {
    throw py::error_already_set();
  }
}

/// Lists and numbers of Python have no dtype of their own: NumPy's guess for them (float64, int64) is not the caller's
/// choice. NumPy's scalars and arrays inside a list are. What a subclass's iterator gives does not count, which may be
/// something else each time.
bool has_own_dtype(PyObject* object, int depth = 0) {
  if (PyList_Check(object) || PyTuple_Check(object)) {
    constexpr int kDeepest = 64;  // NumPy's arrays have no more axes
    if (depth == kDeepest) return true;
    const auto items = PyList_Check(object) ? py::reinterpret_steal<py::object>(PyList_AsTuple(object))
                                            : py::reinterpret_borrow<py::object>(object);
    if (!items) throw py::error_already_set();
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items.ptr()); ++i) {
      if (has_own_dtype(PyTuple_GET_ITEM(items.ptr(), i), depth + 1)) return true;
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
    raise(PyExc_ValueError,
          std::string(name) + " is a masked array with masked values, expected none; fill or remove them");
  }
}

/// Of an array's element, counted in C order: "[3, 1]"; "" where the array has no axes.
std::string index_text(std::span<const npy_intp> shape, npy_intp at) {
  std::string text;
  for (auto extent = shape.rbegin(); extent != shape.rend(); ++extent) {
    text.insert(0, (extent + 1 == shape.rend() ? "" : ", ") + std::to_string(at % *extent));
    at /= *extent;
  }
  return shape.empty() ? "" : "[" + text + "]";
}

[[noreturn]] void raise_too_large(const char* name, std::span<const npy_intp> shape, npy_intp at, double value) {
  char number[32];
  std::snprintf(number, sizeof number, "%g", value);
  raise(PyExc_ValueError, name + index_text(shape, at) + " is " + number + ", expected a number that float32 holds");
}

/// Python's numbers may be too large for the dtype: asked before NumPy makes them infinite.
void refuse_overflow(const py::object& array, DType dtype, const char* name) {
  if (dtype != DType::float32) return;
  const auto numpy = py::module_::import("numpy");
  const py::object wide = numpy.attr("asarray")(array, "float64"), size = numpy.attr("abs")(wide);
  const py::object large = numpy.attr("logical_and")(numpy.attr("isfinite")(size), size.attr("__gt__")(FLT_MAX));
  if (!large.attr("any")().cast<bool>()) return;
  const auto at = large.attr("argmax")().cast<npy_intp>();
  raise_too_large(name, shape_of(reinterpret_cast<PyArrayObject*>(wide.ptr())), at,
                  wide.attr("item")(at).cast<double>());
}

/// How the caller's library writes a conversion to the dtype.
std::string conversion_text(const char* name, DType dtype, Library library) {
  const std::string to(name_of(dtype));
  if (library == Library::torch) return std::string(name) + ".to(torch." + to + ")";
  return std::string(name) + ".astype(" + (library == Library::jax ? "jnp." : "np.") + to + ")";
}

/// What an array may be: of the flow's dtype, or float64 where `kind` says so.
struct Accepted {
  DType dtype;
  Kind kind;

  bool takes_float64() const { return kind == Kind::wide_data || (kind == Kind::context && dtype == DType::float32); }
  bool as_is(PyArrayObject* array) const {
    return usable_as_is(array, dtype) || (takes_float64() && usable_as_is(array, DType::float64));
  }
};

/// What to do with numbers that the flow's dtype does not hold.
std::string advice(const char* name, const Accepted& accepted, Library library) {
  if (accepted.kind == Kind::data && accepted.dtype == DType::float32) {
    return "; build the flow with standardize=True, which takes float64 rows as they are, or with dtype=\"float64\" "
           "(flow.astype(\"float64\") gives a copy); a cast to float32 loses digits where values are large beside "
           "their spread";
  }
  if (accepted.kind == Kind::bounded_data && accepted.dtype == DType::float32) {
    return "; convert it with " + conversion_text(name, DType::float32, library) +
           ", which carries no row out of the base's interval, or build the flow with dtype=\"float64\" "
           "(flow.astype(\"float64\") gives a copy)";
  }
  const DType to = accepted.takes_float64() ? DType::float64 : accepted.dtype;
  return "; convert it with " + conversion_text(name, to, library);
}

PyObject* descr_of(DType dtype) { return reinterpret_cast<PyObject*>(PyArray_DescrFromType(type_number(dtype))); }

/// Any object as a C-contiguous array of an accepted dtype, if NumPy calls the conversion safe.
py::object convert(PyObject* object, const char* name, const Accepted& accepted, Library library = Library::numpy) {
  if (PyArray_Check(object)) refuse_masked(object, name);
  auto array = py::reinterpret_steal<py::object>(PyArray_FromAny(object, nullptr, 0, 0, 0, nullptr));
  if (!array) {
    // Ctrl-C while a slow object converts itself, and the want of memory, are not about the argument.
    if (PyErr_ExceptionMatches(PyExc_Exception) == 0 || PyErr_ExceptionMatches(PyExc_MemoryError) != 0) {
      throw py::error_already_set();
    }
    // Ragged lists and the like; NumPy's reason is kept as the cause.
    py::raise_from(PyExc_TypeError, (std::string(name) + " cannot be read as an array of numbers").c_str());
    throw py::error_already_set();
  }
  auto* from = reinterpret_cast<PyArrayObject*>(array.ptr());
  const bool real = PyArray_ISBOOL(from) || PyArray_ISINTEGER(from) || PyArray_ISFLOAT(from);
  const bool own_dtype = !real || has_own_dtype(object);
  const bool takes_both = accepted.takes_float64();
  // Numbers of Python are float64 where that is taken. NumPy calls int64 to float64 safe: exact up to 2^53.
  DType dtype = takes_both && !own_dtype ? DType::float64 : accepted.dtype;
  auto wanted = py::reinterpret_steal<py::object>(descr_of(dtype));
  const auto is_safe = [&] {
    auto* to = reinterpret_cast<PyArray_Descr*>(wanted.ptr());
    return own_dtype ? PyArray_CanCastTypeTo(PyArray_DESCR(from), to, NPY_SAFE_CASTING) != 0 : real;
  };
  bool safe = is_safe();
  if (!safe && takes_both) {
    dtype = DType::float64;
    wanted = py::reinterpret_steal<py::object>(descr_of(dtype));
    safe = is_safe();
  }
  if (!safe) {
    const std::string model(name_of(accepted.dtype));
    std::string message = std::string(name) + " has dtype " + dtype_text(from) + ", expected " + model +
                          (accepted.kind == Kind::weights ? "" : ", the flow's dtype,") +
                          " or one that converts to it without loss";
    if (real) message += advice(name, accepted, library);
    if (PyArray_ISSTRING(from)) {
      message += accepted.kind == Kind::context ? "; encode text as columns of 0 and 1"
                                                : "; encode text as numbers, or leave it out";
    }
    raise(PyExc_TypeError, message);
  }
  if (!own_dtype) refuse_overflow(array, dtype, name);
  auto* to = reinterpret_cast<PyArray_Descr*>(wanted.inc_ref().ptr());  // PyArray_FromArray takes a reference
  auto result = py::reinterpret_steal<py::object>(
      PyArray_FromArray(from, to, NPY_ARRAY_CARRAY_RO | NPY_ARRAY_ENSUREARRAY | NPY_ARRAY_FORCECAST));
  if (!result) throw py::error_already_set();
  return result;
}

/// NumPy's number of a DLPack type; NPY_NOTYPE for those it has none for, bfloat16 among them.
int type_number(const dlpack::DLDataType& type) {
  struct Known {
    int code, bits, number;
  };
  constexpr Known kKnown[] = {
      {0, 8, NPY_INT8},
      {0, 16, NPY_INT16},
      {0, 32, NPY_INT32},
      {0, 64, NPY_INT64},
      {1, 8, NPY_UINT8},
      {1, 16, NPY_UINT16},
      {1, 32, NPY_UINT32},
      {1, 64, NPY_UINT64},
      {5, 64, NPY_COMPLEX64},
      {5, 128, NPY_COMPLEX128},
      {6, 8, NPY_BOOL},
      {dlpack::kFloat, 16, NPY_FLOAT16},
      {dlpack::kFloat, 32, NPY_FLOAT},
      {dlpack::kFloat, 64, NPY_DOUBLE},
  };
  for (const Known& known : kKnown) {
    if (known.code == type.code && known.bits == type.bits) return known.number;
  }
  return NPY_NOTYPE;
}

/// An array that comes by DLPack from the host's memory, as a NumPy array that looks at it.
py::object host_view(PyObject* object, const char* name, Library library) {
  refuse_grad(object, name, library);
  Imported imported = import_dlpack(object, name, std::nullopt);
  const dlpack::DLTensor& tensor = imported.tensor;
  const auto type = tensor.device.device_type;  // which may be another than __dlpack_device__ said
  if (type != dlpack::kCpu && type != dlpack::kCudaHost) {
    raise(PyExc_ValueError, std::string(name) + " said it is in the host's memory, but its DLPack tensor is not");
  }
  const int number = type_number(tensor.dtype);
  if (number == NPY_NOTYPE) {
    const std::string bits = std::to_string(tensor.dtype.bits);
    raise(PyExc_TypeError, std::string(name) + " has " +
                               (tensor.dtype.code == 4 ? "dtype bfloat" + bits : "a dtype that NumPy lacks") +
                               ", expected float32 or float64, or a dtype that converts to the flow's without loss");
  }
  const std::span<const std::int64_t> extents(tensor.shape, static_cast<std::size_t>(tensor.ndim));
  const auto steps = byte_strides(extents, tensor.strides, tensor.dtype.bits / 8);
  if (!steps.has_value() || (elements_of(extents) > 0 && tensor.data == nullptr)) {
    raise(PyExc_TypeError, std::string(name) + ".__dlpack__() gave a tensor of an impossible form");
  }
  std::vector<npy_intp> shape(extents.begin(), extents.end()), strides(steps->begin(), steps->end());
  if (tensor.data == nullptr) {  // which NumPy would take for a wish of new memory
    return py::reinterpret_steal<py::object>(PyArray_SimpleNew(tensor.ndim, shape.data(), number));
  }
  // JAX hands out its immutable arrays in capsules that cannot say so.
  const bool read_only = imported.read_only || library == Library::jax;
  auto view = py::reinterpret_steal<py::object>(PyArray_New(
      &PyArray_Type, tensor.ndim, shape.data(), number, strides.data(),
      static_cast<char*>(tensor.data) + tensor.byte_offset, 0, read_only ? 0 : NPY_ARRAY_WRITEABLE, nullptr));
  if (!view) throw py::error_already_set();
  keep_alive(std::move(imported.owner), view);
  return view;
}

/// JAX without float64 would round the results of a float64 flow.
void refuse_rounding(const char* name, DType dtype, Library library) {
  if (library != Library::jax || dtype != DType::float64) return;
  if (imported("jax").attr("config").attr("jax_enable_x64").cast<bool>()) return;
  raise(PyExc_TypeError,
        std::string(name) +
            " is an array of JAX, which has float64 switched off, and the flow is float64: switch it on "
            "with jax.config.update(\"jax_enable_x64\", True), or pass a NumPy array");
}

/// Whose arrays the results for an array of the host are: its library's, where there is a way to make them.
Library kind_of_results(PyObject* object, Library library) {
  if (library == Library::torch || library == Library::jax) return library;
  const bool standard = library == Library::other && PyObject_HasAttrString(object, "__array_namespace__") != 0;
  return standard ? Library::standard : Library::numpy;
}

/// An object that is not a NumPy array, as an array that NumPy can read; notes in `in` whose it was.
py::object from_outside(PyObject* object, const char* name, const Accepted& accepted, Place place, InputArray& in) {
  in.in_place = false;
  if (place != Place::host) return convert(object, name, accepted);
  const Library library = library_of(object);
  py::object view = host_view(settled(object, library).ptr(), name, library);
  if (accepted.kind != Kind::weights) refuse_rounding(name, accepted.dtype, library);
  in.library = kind_of_results(object, library);
  if (in.library != Library::numpy) in.source = py::reinterpret_borrow<py::object>(object);
  in.in_place = accepted.as_is(reinterpret_cast<PyArrayObject*>(view.ptr()));
  return in.in_place ? view : convert(view.ptr(), name, accepted, library);
}

/// The values of a C-contiguous array of float64 as float32.
py::object rounded(const py::object& array, const char* name) {
  auto* from = reinterpret_cast<PyArrayObject*>(array.ptr());
  auto result = py::reinterpret_steal<py::object>(PyArray_SimpleNew(PyArray_NDIM(from), PyArray_DIMS(from), NPY_FLOAT));
  if (!result) throw py::error_already_set();
  const auto* values = static_cast<const double*>(PyArray_DATA(from));
  auto* to = static_cast<float*>(PyArray_DATA(reinterpret_cast<PyArrayObject*>(result.ptr())));
  const npy_intp count = PyArray_SIZE(from);
  bool fits = true;
  for (npy_intp i = 0; i < count; ++i) {
    to[i] = static_cast<float>(values[i]);
    fits = fits && (std::isinf(to[i]) == std::isinf(values[i]));
  }
  if (fits) return result;
  npy_intp large = 0;
  while (std::isinf(to[large]) == std::isinf(values[large])) ++large;
  raise_too_large(name, shape_of(from), large, values[large]);
}

/// Sets in.owner to a C-contiguous array of the host. place: of an object that is not a NumPy array.
void read_host(PyObject* object, const char* name, const Accepted& accepted, Place place, InputArray& in) {
  if (PyArray_Check(object)) {
    in.in_place = accepted.as_is(reinterpret_cast<PyArrayObject*>(object));
    in.owner = in.in_place && PyArray_CheckExact(object) ? py::reinterpret_borrow<py::object>(object)
                                                         : convert(object, name, accepted);
  } else {
    in.owner = from_outside(object, name, accepted, place, in);
  }
  auto* array = reinterpret_cast<PyArrayObject*>(in.owner.ptr());
  if (accepted.kind == Kind::context && PyArray_TYPE(array) != type_number(accepted.dtype)) {
    in.owner = rounded(in.owner, name);
    in.in_place = false;
    array = reinterpret_cast<PyArrayObject*>(in.owner.ptr());
  }
  in.data = PyArray_DATA(array);
  in.bytes = PyArray_NBYTES(array);
  in.wide = PyArray_TYPE(array) != type_number(accepted.dtype);
}

void check_given(PyArrayObject* array, const char* name, DType dtype, int dims, const npy_intp* shape) {
  if (PyArray_TYPE(array) != type_number(dtype) || !PyArray_ISNOTSWAPPED(array)) {
    raise(PyExc_TypeError,
          std::string(name) + " has dtype " + dtype_text(array) + ", expected " + std::string(name_of(dtype)));
  }
  if (PyArray_NDIM(array) != dims || !PyArray_CompareLists(PyArray_DIMS(array), shape, dims)) {
    raise(PyExc_ValueError, std::string(name) + " has shape " + shape_text(array) + ", expected " +
                                shape_text(std::span(shape, static_cast<std::size_t>(dims))));
  }
  if (!PyArray_ISALIGNED(array)) raise(PyExc_ValueError, std::string(name) + " is not aligned to its elements' size");
  if (!PyArray_IS_C_CONTIGUOUS(array)) {
    raise(PyExc_ValueError, std::string(name) +
                                " is not C-contiguous; results are written in place only into a "
                                "C-contiguous array");
  }
  if (!PyArray_ISWRITEABLE(array))
    raise(PyExc_ValueError, std::string(name) + " is read-only, expected a writable array");
}

/// The caller's `out` as a NumPy array that looks at its memory.
py::object given_view(PyObject* given, const char* name) {
  if (PyArray_Check(given)) return py::reinterpret_borrow<py::object>(given);
  switch (place_of(given, name)) {
    case Place::host: {
      const Library library = library_of(given);
      refuse_unsettled(given, name, library);
      return host_view(given, name, library);
    }
    case Place::device:
      raise(PyExc_ValueError, std::string(name) + " is " + Py_TYPE(given)->tp_name +
                                  " on a CUDA device, the input in the host's memory; expected both in one place");
    case Place::unknown:
      break;
  }
  if (PyObject_CheckBuffer(given) == 0) {
    raise(PyExc_TypeError, std::string(name) + " is " + Py_TYPE(given)->tp_name +
                               ", expected an array (of NumPy, or anything with DLPack or the buffer protocol)");
  }
  auto view = py::reinterpret_steal<py::object>(PyArray_FromAny(given, nullptr, 0, 0, 0, nullptr));
  if (!view) throw py::error_already_set();
  return view;
}

/// The library's function that takes over an array of NumPy's.
py::object from_dlpack_of(const InputArray& like) {
  if (like.library == Library::jax) return imported("jax").attr("dlpack").attr("from_dlpack");
  return like.source.attr("__array_namespace__")().attr("from_dlpack");
}

/// A new array of the host, of the library; all but PyTorch's are made from NumPy's when it is filled (object_of).
void allocate(OutputArray& out, DType dtype, int dims, npy_intp* shape, const InputArray& like) {
  const std::string type(name_of(dtype));
  out.bytes = size_of(dtype);
  for (int i = 0; i < dims; ++i) out.bytes *= shape[i];
  if (like.library == Library::torch) {
    const py::object torch_type = imported("torch").attr(type.c_str());
    const py::tuple extents(py::cast(std::vector<std::int64_t>(shape, shape + dims)));
    out.array = like.source.attr("new_empty")(extents, py::arg("dtype") = torch_type);
    out.data = data_of_new(out.array, like.library, extents, torch_type, kHost);
    return;
  }
  out.from_dlpack = from_dlpack_of(like);
  // JAX takes over what begins at a multiple of 64 bytes, and copies what does not.
  constexpr npy_intp kAlignment = 64;
  const npy_intp room = out.bytes + kAlignment;
  const auto memory = py::reinterpret_steal<py::object>(PyArray_SimpleNew(1, &room, NPY_UINT8));
  if (!memory) throw py::error_already_set();
  const auto at = reinterpret_cast<std::uintptr_t>(PyArray_DATA(reinterpret_cast<PyArrayObject*>(memory.ptr())));
  out.data = reinterpret_cast<void*>((at + kAlignment - 1) / kAlignment * kAlignment);
  out.array = py::reinterpret_steal<py::object>(
      PyArray_New(&PyArray_Type, dims, shape, type_number(dtype), nullptr, out.data, 0, NPY_ARRAY_CARRAY, nullptr));
  if (!out.array) throw py::error_already_set();
  keep_alive(memory, out.array);
}

}  // namespace

PyTypeObject* numpy_array_type = nullptr;

void import_numpy() {
  if (_import_array() < 0) throw py::error_already_set();
  numpy_array_type = &PyArray_Type;
}

InputArray host_rows(PyObject* object, const char* name, DType dtype, std::int64_t features, Kind kind, Place place) {
  InputArray in;
  read_host(object, name, {dtype, kind}, place, in);
  auto* array = reinterpret_cast<PyArrayObject*>(in.owner.ptr());
  const int dims = PyArray_NDIM(array);
  if (!are_rows(shape_of(array), features)) {
    const std::string d = std::to_string(features), given(name);
    std::string way;
    if (features == 1 && dims == 1) way = "; np.reshape(" + given + ", (-1, 1)) makes a row of each number";
    if (features == 1 && dims == 0) way = "; [" + given + "] makes a row of it";
    raise(PyExc_ValueError,
          given + " has shape " + shape_text(array) + ", expected (B, " + d + ") or, for one row, (" + d + ",)" + way);
  }
  in.single = dims == 1;
  in.rows = in.single ? 1 : PyArray_DIM(array, 0);
  return in;
}

InputArray host_vector(PyObject* object, const char* name, DType dtype, const InputArray& x, Place place, Kind kind) {
  const std::int64_t rows = x.rows;
  const bool single = x.single;
  InputArray in;
  read_host(object, name, {dtype, kind}, place, in);
  auto* array = reinterpret_cast<PyArrayObject*>(in.owner.ptr());
  const bool good = single ? PyArray_NDIM(array) == 0 : PyArray_NDIM(array) == 1 && PyArray_DIM(array, 0) == rows;
  if (!good) {
    raise(PyExc_ValueError, std::string(name) + " has shape " + shape_text(array) + ", expected " +
                                (single ? "()" : "(" + std::to_string(rows) + ",)"));
  }
  return in;
}

OutputArray host_output(PyObject* given, const char* name, DType dtype, std::int64_t columns, const InputArray& like) {
  npy_intp shape[3];
  int dims = 0;
  if (like.outer >= 0) shape[dims++] = like.outer;
  if (!like.single) shape[dims++] = like.rows;
  if (columns > 0) shape[dims++] = columns;
  OutputArray out;
  PyArrayObject* array = nullptr;
  if (given != nullptr && given != Py_None) {
    out.view = given_view(given, name);
    array = reinterpret_cast<PyArrayObject*>(out.view.ptr());
    check_given(array, name, dtype, dims, shape);
    if (!PyArray_Check(given)) out.library = library_of(given);
    out.array = py::reinterpret_borrow<py::object>(given);
    out.given = true;
  } else {
    out.library = like.library;
    if (like.library != Library::numpy) {
      allocate(out, dtype, dims, shape, like);
      return out;
    }
    out.array = py::reinterpret_steal<py::object>(PyArray_SimpleNew(dims, shape, type_number(dtype)));
    if (!out.array) throw py::error_already_set();
    array = reinterpret_cast<PyArrayObject*>(out.array.ptr());
  }
  out.data = PyArray_DATA(array);
  out.bytes = PyArray_NBYTES(array);
  return out;
}

OutputArray new_array(DType dtype, std::int64_t rows, std::int64_t columns) {
  InputArray like;
  like.rows = rows;
  return host_output(nullptr, "", dtype, columns, like);
}

OutputArray new_array(DType dtype, const std::vector<std::int64_t>& shape) {
  std::vector<npy_intp> extents(shape.begin(), shape.end());
  OutputArray out;
  out.array = py::reinterpret_steal<py::object>(
      PyArray_SimpleNew(static_cast<int>(extents.size()), extents.data(), type_number(dtype)));
  if (!out.array) throw py::error_already_set();
  auto* array = reinterpret_cast<PyArrayObject*>(out.array.ptr());
  out.data = PyArray_DATA(array);
  out.bytes = PyArray_NBYTES(array);
  return out;
}

HostValues host_values(PyObject* object) {
  HostValues values;
  values.owner = py::module_::import("numpy").attr("ascontiguousarray")(py::handle(object));
  auto* array = reinterpret_cast<PyArrayObject*>(values.owner.ptr());
  values.data = PyArray_DATA(array);
  values.bytes = PyArray_NBYTES(array);
  values.dtype = dtype_text(array);
  const std::span<const npy_intp> shape = shape_of(array);
  values.shape.assign(shape.begin(), shape.end());
  return values;
}

namespace {

/// Of dtype=.
DType parsed_dtype(PyObject* object) {
  PyArray_Descr* descr = nullptr;
  if (PyArray_DescrConverter(object, &descr) == 0) {
    if (PyErr_ExceptionMatches(PyExc_Exception) == 0) throw py::error_already_set();  // Ctrl-C
    PyErr_Clear();
    raise(PyExc_TypeError, "dtype is " + py::repr(object).cast<std::string>() + ", expected float32 or float64");
  }
  const auto owner = py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(descr));
  if (descr->type_num == NPY_FLOAT) return DType::float32;
  if (descr->type_num == NPY_DOUBLE) return DType::float64;
  raise(PyExc_TypeError, "dtype is " + text_of(owner.ptr()) + ", expected float32 or float64");
}

/// Whether out= is an array of float64 of the host.
bool is_float64(PyObject* out) {
  if (out == nullptr || out == Py_None) return false;
  if (!PyArray_Check(out) && place_of(out, "out") == Place::device) return false;
  const py::object view = given_view(out, "out");
  return PyArray_TYPE(reinterpret_cast<PyArrayObject*>(view.ptr())) == NPY_DOUBLE;
}

}  // namespace

bool wants_float64(PyObject* dtype, PyObject* out, DType own, Kind kind) {
  if (dtype == nullptr || dtype == Py_None) return kind == Kind::wide_data && is_float64(out);
  const DType wanted = parsed_dtype(dtype);
  if (wanted == own) return false;
  if (wanted == DType::float64 && kind == Kind::wide_data) return true;
  const std::string given(name_of(wanted)), expected(name_of(own));
  const bool may_standardize = own == DType::float32 && kind != Kind::bounded_data;
  raise(PyExc_TypeError,
        "dtype is " + given + ", expected " + expected + ", the flow's dtype" +
            (may_standardize ? ": only a flow that begins with a standardize layer gives float64 rows; build it "
                               "with standardize=True, or use flow.astype(\"float64\")"
                             : "; convert the result with .astype(np." + given + ")"));
}

PyObject* host_result(OutputArray&& out) {
  if (out.library == Library::numpy && !out.given) {
    return PyArray_Return(reinterpret_cast<PyArrayObject*>(out.array.release().ptr()));
  }
  return host_object(std::move(out)).release().ptr();
}

py::object host_object(OutputArray&& out) {
  if (out.from_dlpack) return out.from_dlpack(out.array);
  if (out.given) note_write(out.array, out.library);
  return std::move(out.array);
}

py::object owning_array(std::shared_ptr<void> memory, void* data, DType dtype, std::int64_t size) {
  struct Owner {
    std::shared_ptr<void> memory;
    std::size_t bytes;
    ~Owner() {
      run_released_over(bytes, [this] { memory.reset(); });
    }
  };
  auto owner = std::make_unique<Owner>(Owner{std::move(memory), static_cast<std::size_t>(size * size_of(dtype))});
  const py::capsule capsule(owner.get(), [](void* pointer) { delete static_cast<Owner*>(pointer); });
  (void)owner.release();
  npy_intp shape[1] = {size};
  auto array = py::reinterpret_steal<py::object>(
      PyArray_New(&PyArray_Type, 1, shape, type_number(dtype), nullptr, data, 0, NPY_ARRAY_CARRAY, nullptr));
  if (!array) throw py::error_already_set();
  keep_alive(capsule, array);
  return array;
}

FlatArray::FlatArray(DType dtype, std::int64_t size) : data(allocate_aligned(size * size_of(dtype))) {
  array = owning_array(std::shared_ptr<void>(data, free_aligned), data, dtype, size);
}

py::object readonly_view(const void* data, DType dtype, std::int64_t size, py::handle owner) {
  npy_intp shape[1] = {size};
  auto view = py::reinterpret_steal<py::object>(PyArray_New(&PyArray_Type, 1, shape, type_number(dtype), nullptr,
                                                            const_cast<void*>(data), 0,
                                                            NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED, nullptr));
  if (!view) throw py::error_already_set();
  keep_alive(py::reinterpret_borrow<py::object>(owner), view);
  return view;
}

}  // namespace nvpflow::python
