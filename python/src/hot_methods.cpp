// forward, inverse, log_probability and sample, with the vectorcall convention.

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <random>
#include <string>
#include <utility>

#include <nvpflow/execution.hpp>

#include "arrays.hpp"
#include "bindings.hpp"
#include "bound_flow.hpp"
#include "device_arrays.hpp"
#include "errors.hpp"
#include "outside.hpp"
#include "plain_methods.hpp"

namespace nvpflow::python {
namespace {

struct Names {
  PyObject* x = PyUnicode_InternFromString("x");
  PyObject* z = PyUnicode_InternFromString("z");
  PyObject* n = PyUnicode_InternFromString("n");
  PyObject* out = PyUnicode_InternFromString("out");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* seed = PyUnicode_InternFromString("seed");
  PyObject* start = PyUnicode_InternFromString("start");
  PyObject* with_log_det = PyUnicode_InternFromString("with_log_det");
};

/// Never freed: the interpreter may call a method until its last moment.
const Names& names() {
  static const Names* const made = new Names;
  return *made;
}

using HotArguments = ArgumentsOf<5>;

PyObject* log_probability(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  return guarded([&] {
    const BoundFlow& flow = bound(self);
    const HotArguments given("log_probability", 1, {names().x, names().out}, args, count, keywords);
    const InputArray x = flow.rows_of(given[0], "x");
    OutputArray out = output_array(given[1], "out", flow.dtype, 0, x);
    refuse_overlap(out, "out", x, "x", x.bytes);
    run_beside(flow, x, x.rows,
               [&](const Execution& how) { flow.flow.log_prob_unchecked(x.data, x.rows, out.data, how); });
    return result_of(std::move(out));
  });
}

/// Both results of one direction, as a tuple.
PyObject* transform_pair(const BoundFlow& flow, Direction direction, const InputArray& in, const char* in_name,
                         PyObject* out, const char* first, bool wide_out = false) {
  constexpr const char* second = "out[1] (log_det)";
  const auto [out_first, out_second] = out_pair(out, "log_det");
  OutputArray value = output_array(out_first, first, wide_out ? DType::float64 : flow.dtype, flow.features, in);
  OutputArray log_det = output_array(out_second, second, flow.dtype, 0, in);
  refuse_overlap(value, first, in, in_name, in.bytes);
  refuse_overlap(log_det, second, in, in_name, in.bytes);
  refuse_overlap(value, first, log_det, second);
  run_beside(flow, in, in.rows, [&](Execution how) {
    how.float64_rows = how.float64_rows || wide_out;
    flow.flow.transform_unchecked(direction, in.data, in.rows, value.data, log_det.data, how);
  });
  auto a = py::reinterpret_steal<py::object>(result_of(std::move(value)));
  auto b = py::reinterpret_steal<py::object>(result_of(std::move(log_det)));
  if (!a || !b) throw py::error_already_set();
  PyObject* pair = PyTuple_Pack(2, a.ptr(), b.ptr());
  if (pair == nullptr) throw py::error_already_set();
  return pair;
}

PyObject* forward(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  return guarded([&] {
    const BoundFlow& flow = bound(self);
    const HotArguments given("forward", 1, {names().x, names().out}, args, count, keywords);
    const InputArray x = flow.rows_of(given[0], "x");
    return transform_pair(flow, Direction::forward, x, "x", given[1], "out[0] (z)");
  });
}

PyObject* inverse(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  return guarded([&]() -> PyObject* {
    const BoundFlow& flow = bound(self);
    const HotArguments given("inverse", 1, {names().z, names().with_log_det, names().out, names().dtype}, args, count,
                             keywords);
    const InputArray z = input_rows(given[0], "z", flow.dtype, flow.features, flow.device);
    const int with_log_det = given[1] == nullptr ? 0 : PyObject_IsTrue(given[1]);
    if (with_log_det < 0) throw py::error_already_set();
    PyObject* first = with_log_det != 0 ? out_pair(given[2], "log_det").first : given[2];
    const bool wide = flow.gives_float64(given[3], first, z);
    if (with_log_det != 0) return transform_pair(flow, Direction::inverse, z, "z", given[2], "out[0] (x)", wide);
    OutputArray out = output_array(given[2], "out", wide ? DType::float64 : flow.dtype, flow.features, z);
    refuse_overlap(out, "out", z, "z", z.bytes);
    run_beside(flow, z, z.rows, [&](Execution how) {
      how.float64_rows = wide;
      flow.flow.transform_unchecked(Direction::inverse, z.data, z.rows, out.data, nullptr, how);
    });
    return result_of(std::move(out));
  });
}

/// The digits of an integer, if they are few enough for Python to print.
std::string short_text(const py::object& number) {
  PyObject* text = PyObject_Str(number.ptr());
  if (text == nullptr) {
    PyErr_Clear();
    return "a number of thousands of digits";
  }
  return py::reinterpret_steal<py::str>(text).cast<std::string>();
}

/// A Python integer in [0, 2^64), or [0, 2^63) where `is_signed`.
std::uint64_t unsigned_of(PyObject* object, const char* name, bool is_signed) {
  if (PyBool_Check(object) || !PyIndex_Check(object)) {
    const char* way = std::strcmp(name, "n") == 0 ? "; rows have one axis, and sample(5) draws five" : "";
    raise(PyExc_TypeError, std::string(name) + " is " + Py_TYPE(object)->tp_name + ", expected an integer" + way);
  }
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(object));
  if (!number) throw py::error_already_set();
  const unsigned long long value = PyLong_AsUnsignedLongLong(number.ptr());
  const bool failed = PyErr_Occurred() != nullptr;
  if (failed || (is_signed && value >> 63 != 0)) {
    PyErr_Clear();
    PyErr_SetString(PyExc_ValueError, (std::string(name) + " is " + short_text(number) +
                                       ", expected an integer from 0 to 2**" + (is_signed ? "63" : "64") + " - 1")
                                          .c_str());
    throw py::error_already_set();
  }
  return value;
}

std::uint64_t fresh_seed() {
  std::random_device entropy;
  return (std::uint64_t{entropy()} << 32) | entropy();
}

PyObject* sample(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  return guarded([&] {
    const BoundFlow& flow = bound(self);
    const HotArguments given("sample", 1, {names().n, names().seed, names().start, names().out, names().dtype}, args,
                             count, keywords);
    const auto rows = static_cast<std::int64_t>(unsigned_of(given[0], "n", true));
    const std::uint64_t seed = given.given(1) ? unsigned_of(given[1], "seed", false) : fresh_seed();
    const std::uint64_t start = given.given(2) ? unsigned_of(given[2], "start", true) : 0;
    InputArray where;  // the host's memory, or that of `out`
    if (flow.device != kHost && given.given(3) && place_of(given[3], "out") == Place::device) {
      where = device_target(given[3], "out", flow.dtype, flow.device);
    }
    where.rows = rows;
    const bool wide = flow.gives_float64(given[4], given[3], where);
    const std::int64_t row_bytes = flow.features * size_of(wide ? DType::float64 : flow.dtype);
    if (rows > INT64_MAX / row_bytes) {
      PyErr_SetString(PyExc_MemoryError, ("n is " + std::to_string(rows) + " rows of " + std::to_string(row_bytes) +
                                          " bytes: more than can be addressed")
                                             .c_str());
      throw py::error_already_set();
    }
    OutputArray out = output_array(given[3], "out", wide ? DType::float64 : flow.dtype, flow.features, where);
    run_beside(flow, where, rows, [&](Execution how) {
      how.float64_rows = wide;
      flow.flow.sample_unchecked(seed, start, rows, out.data, how);
    });
    return result_of(std::move(out));
  });
}

PyMethodDef kMethods[] = {
    {"log_probability", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(log_probability)),
     METH_FASTCALL | METH_KEYWORDS,
     "log_probability($self, x, *, out=None)\n--\n\n"
     "Exact log-density log p(x) = log N(z; 0, I) + log|det dz/dx|, in nats.\n\n"
     "Parameters\n----------\n"
     "x : array, [B, D] or [D]\n    Rows, of NumPy, PyTorch, JAX or anything with DLPack or the buffer protocol. A\n"
     "    C-contiguous array of the flow's dtype is used in place; others are converted where NumPy calls that safe.\n"
     "    A float32 flow that begins with a standardize layer applies that layer to float64 rows in float64.\n"
     "    A flow on a CUDA device also takes arrays of that device, by DLPack or ``__cuda_array_interface__``, as\n"
     "    they are, on the caller's current stream. The result is an array of the same library.\n"
     "out : array, [B], optional\n    Where the result is written; must not overlap ``x``. ``()`` for one row.\n\n"
     "Returns\n-------\narray, [B], or a NumPy scalar for one row. NaN for a row that holds NaN or inf.\n"
     "    -inf for a finite row whose density, or a number on the way to it, is beyond the dtype: never NaN.\n\n"
     "Raises\n------\nTypeError\n    A dtype that would lose digits.\n"
     "ValueError\n    A wrong shape or device, or an ``out`` that cannot be written in place.\n"
     "MemoryError\n    With the size; the flow can be used on.\n"
     "nvpflow.CudaError\n    The CUDA device failed, or this process was forked from one that used it.\n"},
    {"log_prob", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(log_probability)),
     METH_FASTCALL | METH_KEYWORDS,
     "log_prob($self, x, *, out=None)\n--\n\nThe same as `log_probability`, under the field's other name."},
    {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(forward)), METH_FASTCALL | METH_KEYWORDS,
     "forward($self, x, *, out=None)\n--\n\n"
     "Data to latent: z and log|det dz/dx|.\n\n"
     "Parameters\n----------\n"
     "x : array, [B, D] or [D]\n"
     "out : tuple (z, log_det) of arrays, [B, D] and [B], optional\n\n"
     "Returns\n-------\n"
     "z : array, [B, D]\n    Of a finite row, numbers beyond the dtype are infinite; one that cannot be told (inf - "
     "inf) is inf.\n"
     "log_det : array, [B], nats\n    -inf where it cannot be told.\n"},
    {"inverse", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(inverse)), METH_FASTCALL | METH_KEYWORDS,
     "inverse($self, z, *, with_log_det=False, out=None, dtype=None)\n--\n\n"
     "Latent to data: x, and log|det dx/dz| where asked for.\n\n"
     "Parameters\n----------\n"
     "z : array, [B, D] or [D]\n"
     "with_log_det : bool\n    Return (x, log_det) instead of x.\n"
     "out : array [B, D], or tuple (x, log_det) with ``with_log_det``, optional\n"
     "dtype : of x; None: the flow's, or that of ``out``\n    \"float64\" of a float32 flow that begins with a "
     "standardize layer: its last step,\n"
     "    ``x = y * exp(log_std) + mean``, is then made in float64. log_det is of the flow's dtype.\n\n"
     "Returns\n-------\n"
     "x : array, [B, D]\n    Of a finite row, numbers beyond the dtype are infinite; one that cannot be told (inf - "
     "inf) is inf.\n"
     "log_det : array, [B], nats\n    With ``with_log_det`` only. inf where it cannot be told.\n"},
    {"sample", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(sample)), METH_FASTCALL | METH_KEYWORDS,
     "sample($self, n, *, seed=None, start=0, out=None, dtype=None)\n--\n\n"
     "Draw n rows: the inverse of standard normal noise.\n\n"
     "Row i depends only on (seed, start + i), whatever n and the number of threads: a long sample can be\n"
     "drawn in pieces.\n\n"
     "Parameters\n----------\n"
     "n : int\n"
     "seed : int from 0 to 2**64 - 1, optional\n    None: a new one from the operating system.\n"
     "start : int\n    First row of the endless sample that ``seed`` names.\n"
     "out : array, [n, D], optional\n"
     "dtype : as of `inverse`\n\n"
     "Returns\n-------\nx : array, [n, D]\n"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void add_hot_methods(py::class_<BoundFlow>& type) {
  names();
  for (PyMethodDef* method = kMethods; method->ml_name != nullptr; ++method) add_method(type, method);
}

}  // namespace nvpflow::python
