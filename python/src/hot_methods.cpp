// forward, inverse, log_probability and the samples, with the vectorcall convention.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <utility>

#include <nvpflow/execution.hpp>

#include "arrays.hpp"
#include "bindings.hpp"
#include "bound_flow.hpp"
#include "call_context.hpp"
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
  PyObject* temperature = PyUnicode_InternFromString("temperature");
  PyObject* context = PyUnicode_InternFromString("context");
};

/// Never freed: the interpreter may call a method until its last moment.
const Names& names() {
  static const Names* const made = new Names;
  return *made;
}

using HotArguments = ArgumentsOf<7>;

/// A Python number; 1 for None. The core checks its range, and whether the base has one.
double temperature_of(PyObject* given) { return given == Py_None ? 1 : real_number(given, "temperature"); }

/// Out of line, and so of the way of calls without one.
[[gnu::noinline]] void tempered_log_prob(const BoundFlow& flow, const InputArray& x, const GivenContext& context,
                                         double temperature, const OutputArray& out) {
  run_beside(flow, x, x.rows, context.rows, [&](const Execution& how) {
    flow.flow.tempered_log_prob_unchecked(temperature, x.data, x.rows, out.data, how);
  });
}

template <class Self>
PyObject* log_probability(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  return guarded([&] {
    const auto caller = Caller::of<Self>(self);
    const BoundFlow& flow = caller.flow;
    const ArgumentsOf<4> given("log_probability", 1,
                               caller.known({names().x, names().out, names().temperature, names().context}), args,
                               count, keywords);
    const InputArray x = flow.rows_of(given[0], "x");
    const GivenContext context = context_of(caller, given[3], x);
    OutputArray out = output_array(given[1], "out", flow.dtype, 0, x);
    refuse_overlap(out, "out", x, "x", x.bytes);
    refuse_overlap(out, "out", context);
    if (given[2] != nullptr) [[unlikely]] {
      tempered_log_prob(flow, x, context, temperature_of(given[2]), out);
    } else {
      run_beside(flow, x, x.rows, context.rows,
                 [&](const Execution& how) { flow.flow.log_prob_unchecked(x.data, x.rows, out.data, how); });
    }
    return result_of(std::move(out));
  });
}

/// One direction of a call: its rows and their context, and whether data come out as float64.
struct Transform {
  Direction direction;
  const InputArray& in;
  const char* in_name;
  const GivenContext& context;
  bool wide_out = false;
};

PyObject* pair_of(OutputArray&& first, OutputArray&& second) {
  const auto a = py::reinterpret_steal<py::object>(result_of(std::move(first)));
  const auto b = py::reinterpret_steal<py::object>(result_of(std::move(second)));
  if (!a || !b) throw py::error_already_set();
  PyObject* pair = PyTuple_Pack(2, a.ptr(), b.ptr());
  if (pair == nullptr) throw py::error_already_set();
  return pair;
}

/// Both results of one direction, as a tuple.
PyObject* transform_pair(const BoundFlow& flow, const Transform& call, PyObject* out, const char* first) {
  constexpr const char* second = "out[1] (log_det)";
  const InputArray& in = call.in;
  const auto [out_first, out_second] = out_members<2>(out, "the second for log_det");
  OutputArray value = output_array(out_first, first, call.wide_out ? DType::float64 : flow.dtype, flow.features, in);
  OutputArray log_det = output_array(out_second, second, flow.dtype, 0, in);
  refuse_overlap(value, first, in, call.in_name, in.bytes);
  refuse_overlap(log_det, second, in, call.in_name, in.bytes);
  refuse_overlap(value, first, call.context);
  refuse_overlap(log_det, second, call.context);
  refuse_overlap(value, first, log_det, second);
  run_beside(flow, in, in.rows, call.context.rows, [&](Execution how) {
    how.float64_rows = how.float64_rows || call.wide_out;
    flow.flow.transform_unchecked(call.direction, in.data, in.rows, value.data, log_det.data, how);
  });
  return pair_of(std::move(value), std::move(log_det));
}

template <class Self>
PyObject* forward(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  return guarded([&] {
    const auto caller = Caller::of<Self>(self);
    const BoundFlow& flow = caller.flow;
    const HotArguments given("forward", 1, caller.known({names().x, names().out, names().context}), args, count,
                             keywords);
    const InputArray x = flow.rows_of(given[0], "x");
    const GivenContext context = context_of(caller, given[2], x);
    return transform_pair(flow, {Direction::forward, x, "x", context}, given[1], "out[0] (z)");
  });
}

template <class Self>
PyObject* inverse(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  return guarded([&]() -> PyObject* {
    const auto caller = Caller::of<Self>(self);
    const BoundFlow& flow = caller.flow;
    const HotArguments given(
        "inverse", 1, caller.known({names().z, names().with_log_det, names().out, names().dtype, names().context}),
        args, count, keywords);
    const InputArray z = input_rows(given[0], "z", flow.dtype, flow.features, flow.device);
    const GivenContext context = context_of(caller, given[4], z);
    const int with_log_det = given[1] == nullptr ? 0 : PyObject_IsTrue(given[1]);
    if (with_log_det < 0) throw py::error_already_set();
    PyObject* first = with_log_det != 0 ? out_members<2>(given[2], "the second for log_det")[0] : given[2];
    const bool wide = flow.gives_float64(given[3], first, z);
    if (with_log_det != 0) {
      return transform_pair(flow, {Direction::inverse, z, "z", context, wide}, given[2], "out[0] (x)");
    }
    OutputArray out = output_array(given[2], "out", wide ? DType::float64 : flow.dtype, flow.features, z);
    refuse_overlap(out, "out", z, "z", z.bytes);
    refuse_overlap(out, "out", context);
    run_beside(flow, z, z.rows, context.rows, [&](Execution how) {
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
  const bool has_index = !PyBool_Check(object) && PyIndex_Check(object);
  const auto number = py::reinterpret_steal<py::object>(has_index ? PyNumber_Index(object) : nullptr);
  // An array has __index__, too, and refuses it where it is no single integer.
  if (has_index && !number && !PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
  if (!number) {
    PyErr_Clear();
    const char* way = std::strcmp(name, "n") == 0 ? "; rows have one axis, and sample(5) draws five" : "";
    raise(PyExc_TypeError, std::string(name) + " is " + Py_TYPE(object)->tp_name + ", expected an integer" + way);
  }
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

/// Where a sample of so many rows goes: the host's memory, that of `out`, or that of its contexts, with an axis for
/// them where there are several.
InputArray sample_place(const BoundFlow& flow, const GivenContext& context, PyObject* out, std::int64_t rows) {
  InputArray where;
  if (context.array.on_device || context.array.library != Library::numpy) where = context.array;
  if (flow.device != kHost && out != nullptr && out != Py_None && place_of(out, "out") == Place::device) {
    where = device_target(out, "out", flow.dtype, flow.device);
    if (context.given()) require_beside(context.array, "context", where);
  }
  where.single = where.wide = false;
  where.rows = rows;
  where.outer = context.given() && !context.array.single ? context.array.rows : -1;
  return where;
}

/// Rows of a sample in all; throws where their bytes cannot be counted.
std::int64_t total_rows(const InputArray& where, std::int64_t row_bytes) {
  const std::int64_t times = where.outer < 0 ? 1 : where.outer;
  if (times > 0 && where.rows > INT64_MAX / row_bytes / times) {
    raise(PyExc_MemoryError, "n is " + std::to_string(where.rows) + " rows of " + std::to_string(row_bytes) + " bytes" +
                                 (where.outer < 0 ? "" : " for each of " + std::to_string(times) + " contexts") +
                                 ": more than can be addressed");
  }
  return where.rows * times;
}

/// A seed has rows 0 to 2^63 - 1, so that each can be drawn by itself.
void require_rows_of_seed(std::uint64_t start, std::int64_t rows) {
  constexpr std::uint64_t kRowsOfSeed = std::uint64_t{1} << 63;
  const std::uint64_t most = kRowsOfSeed - static_cast<std::uint64_t>(std::max<std::int64_t>(rows, 1));
  if (start <= most) return;
  raise(PyExc_ValueError, "start is " + std::to_string(start) + ", expected at most " + std::to_string(most) + ": of " +
                              std::to_string(rows) + " rows in all the last would be beyond row 2**63 - 1");
}

/// What a sample is drawn from and where it goes, of a call's arguments, whose names and order both samples share.
struct Drawn {
  std::int64_t n = 0, rows = 0;  // of each context, and in all
  std::uint64_t seed = 0, start = 0;
  GivenContext context;
  InputArray where;
  bool wide = false;
  double temperature = 1;

  DType dtype(const BoundFlow& flow) const { return wide ? DType::float64 : flow.dtype; }
};

HotArguments sample_arguments(const Caller& caller, const char* name, PyObject* const* args, Py_ssize_t count,
                              PyObject* keywords) {
  return {name,
          1,
          caller.known({names().n, names().seed, names().start, names().out, names().dtype, names().temperature,
                        names().context}),
          args,
          count,
          keywords};
}

/// out: for the rows.
Drawn drawn_by(const Caller& caller, const HotArguments& given, PyObject* out) {
  const BoundFlow& flow = caller.flow;
  Drawn drawn;
  drawn.n = static_cast<std::int64_t>(unsigned_of(given[0], "n", true));
  drawn.seed = given.given(1) ? unsigned_of(given[1], "seed", false) : fresh_seed();
  drawn.start = given.given(2) ? unsigned_of(given[2], "start", true) : 0;
  drawn.context = sample_context(caller, given[6]);
  drawn.where = sample_place(flow, drawn.context, out, drawn.n);
  drawn.wide = flow.gives_float64(given[4], out, drawn.where);
  if (given[5] != nullptr) drawn.temperature = temperature_of(given[5]);
  drawn.rows = total_rows(drawn.where, flow.features * size_of(drawn.dtype(flow)));
  require_rows_of_seed(drawn.start, drawn.rows);
  if (drawn.where.outer >= 0) drawn.context.rows.repeat = std::max<std::int64_t>(1, drawn.n);
  return drawn;
}

/// log_prob: null: not wanted.
void draw(const BoundFlow& flow, const Drawn& drawn, void* x, void* log_prob) {
  run_beside(flow, drawn.where, drawn.rows, drawn.context.rows, [&](Execution how) {
    how.float64_rows = drawn.wide;
    flow.flow.tempered_sample_unchecked(drawn.temperature, drawn.seed, drawn.start, drawn.rows, x, log_prob, how);
  });
}

template <class Self>
PyObject* sample(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  return guarded([&] {
    const auto caller = Caller::of<Self>(self);
    const BoundFlow& flow = caller.flow;
    const HotArguments given = sample_arguments(caller, "sample", args, count, keywords);
    const Drawn drawn = drawn_by(caller, given, given[3]);
    OutputArray out = output_array(given[3], "out", drawn.dtype(flow), flow.features, drawn.where);
    refuse_overlap(out, "out", drawn.context);
    draw(flow, drawn, out.data, nullptr);
    return result_of(std::move(out));
  });
}

template <class Self>
PyObject* sample_and_log_prob(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  return guarded([&] {
    constexpr const char *first = "out[0] (x)", *second = "out[1] (log_prob)";
    const auto caller = Caller::of<Self>(self);
    const BoundFlow& flow = caller.flow;
    const HotArguments given = sample_arguments(caller, "sample_and_log_prob", args, count, keywords);
    const auto [out_x, out_log_prob] = out_members<2>(given[3], "the second for log_prob");
    const Drawn drawn = drawn_by(caller, given, out_x);
    OutputArray x = output_array(out_x, first, drawn.dtype(flow), flow.features, drawn.where);
    OutputArray log_prob = output_array(out_log_prob, second, flow.dtype, 0, drawn.where);
    refuse_overlap(x, first, drawn.context);
    refuse_overlap(log_prob, second, drawn.context);
    refuse_overlap(x, first, log_prob, second);
    draw(flow, drawn, x.data, log_prob.data);
    return pair_of(std::move(x), std::move(log_prob));
  });
}

using Vectorcall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*);
PyCFunction function_of(Vectorcall f) { return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f)); }

PyMethodDef kMethods[] = {
    {"log_probability", function_of(log_probability<BoundFlow>), METH_FASTCALL | METH_KEYWORDS,
     "log_probability($self, x, *, out=None, temperature=None, context=None)\n--\n\n"
     "Exact log-density log p(x) = log N(z; 0, I) + log|det dz/dx|, in nats; with a context log p(x | context).\n\n"
     "Parameters\n----------\n"
     "x : array, [B, D] or [D]\n    Rows, of NumPy, PyTorch, JAX or anything with DLPack or the buffer protocol. A\n"
     "    C-contiguous array of the flow's dtype is used in place; others are converted where NumPy calls that safe.\n"
     "    A float32 flow that begins with a standardize layer applies that layer to float64 rows in float64.\n"
     "    A flow on a CUDA device also takes arrays of that device, by DLPack or ``__cuda_array_interface__``, as\n"
     "    they are, on the caller's current stream. The result is an array of the same library.\n"
     "out : array, [B], optional\n    Where the result is written; must not overlap ``x``. ``()`` for one row.\n"
     "temperature : float, optional\n    T: the density of the flow whose base is N(0, T I) in place of N(0, I), which "
     "integrates to 1 as well.\n"
     "    T scales the base's variance: a density of ``T < 1`` is more concentrated (harmonic's ``var_scale``).\n"
     "    Glow's temperature scales the standard deviation: its t is ``temperature=t**2``. From 1e-12 to 1e12, of a\n"
     "    normal base and for arrays of the host.\n"
     "context : array, [B, C] or [C]\n    Of a flow with a context, which needs it. A row for each row of ``x``, or "
     "one for all, which costs less\n    and gives the same bits. float64 is rounded to the flow's dtype. A row with "
     "NaN or inf gives NaN.\n\n"
     "Returns\n-------\narray, [B], or a NumPy scalar for one row. NaN for a row that holds NaN or inf.\n"
     "    -inf for a finite row whose density, or a number on the way to it, is beyond the dtype: never NaN.\n\n"
     "Raises\n------\nTypeError\n    A dtype that would lose digits.\n"
     "ValueError\n    A wrong shape or device, or an ``out`` that cannot be written in place.\n"
     "MemoryError\n    With the size; the flow can be used on.\n"
     "nvpflow.CudaError\n    The CUDA device failed, or this process was forked from one that used it.\n"},
    {"log_prob", function_of(log_probability<BoundFlow>), METH_FASTCALL | METH_KEYWORDS,
     "log_prob($self, x, *, out=None, temperature=None, context=None)\n--\n\nThe same as `log_probability`, under the "
     "field's other "
     "name."},
    {"forward", function_of(forward<BoundFlow>), METH_FASTCALL | METH_KEYWORDS,
     "forward($self, x, *, out=None, context=None)\n--\n\n"
     "Data to latent: z and log|det dz/dx|.\n\n"
     "Parameters\n----------\n"
     "x : array, [B, D] or [D]\n"
     "out : tuple (z, log_det) of arrays, [B, D] and [B], optional\n"
     "context : as of `log_probability`\n\n"
     "Returns\n-------\n"
     "z : array, [B, D]\n    Of a finite row, numbers beyond the dtype are infinite; one that cannot be told (inf - "
     "inf) is inf.\n"
     "log_det : array, [B], nats\n    -inf where it cannot be told.\n"},
    {"inverse", function_of(inverse<BoundFlow>), METH_FASTCALL | METH_KEYWORDS,
     "inverse($self, z, *, with_log_det=False, out=None, dtype=None, context=None)\n--\n\n"
     "Latent to data: x, and log|det dx/dz| where asked for.\n\n"
     "Parameters\n----------\n"
     "z : array, [B, D] or [D]\n"
     "with_log_det : bool\n    Return (x, log_det) instead of x.\n"
     "out : array [B, D], or tuple (x, log_det) with ``with_log_det``, optional\n"
     "dtype : of x; None: the flow's, or that of ``out``\n    \"float64\" of a float32 flow that begins with a "
     "standardize layer: its last step,\n"
     "    ``x = y * exp(log_std) + mean``, is then made in float64. log_det is of the flow's dtype.\n"
     "context : as of `log_probability`\n\n"
     "Returns\n-------\n"
     "x : array, [B, D]\n    Of a finite row, numbers beyond the dtype are infinite; one that cannot be told (inf - "
     "inf) is inf.\n"
     "log_det : array, [B], nats\n    With ``with_log_det`` only. inf where it cannot be told.\n"},
    {"sample", function_of(sample<BoundFlow>), METH_FASTCALL | METH_KEYWORDS,
     "sample($self, n, *, seed=None, start=0, out=None, dtype=None, temperature=None, context=None)\n--\n\n"
     "Draw n rows: the inverse of noise of the base.\n\n"
     "Row i depends only on (seed, start + i), whatever n and the number of threads: a long sample can be\n"
     "drawn in pieces.\n\n"
     "Parameters\n----------\n"
     "n : int\n    Rows; under several contexts, for each of them.\n"
     "seed : int from 0 to 2**64 - 1, optional\n    None: a new one from the operating system.\n"
     "start : int\n    First row of the sample that ``seed`` names, which has 2**63 rows.\n"
     "out : array, as returned, optional\n"
     "dtype : as of `inverse`\n"
     "temperature : as of `log_probability`\n    The latents of the same seed, times ``sqrt(temperature)``.\n"
     "context : array, [M, C] or [C]\n    Of a flow with a context: each of M gets n rows. Row i of context m is row "
     "``m n + i`` of the sample.\n\n"
     "Returns\n-------\nx : array, [n, D], or [M, n, D] under M contexts\n"},
    {"sample_and_log_prob", function_of(sample_and_log_prob<BoundFlow>), METH_FASTCALL | METH_KEYWORDS,
     "sample_and_log_prob($self, n, *, seed=None, start=0, out=None, dtype=None, temperature=None, context=None)\n"
     "--\n\n"
     "Draw n rows with the log-density of each, in one pass.\n\n"
     "The rows are those of `sample`, bit for bit. log p is that of the noise they come from, less ``log|det "
     "dx/dz|``:\n"
     "it differs from ``log_prob(x)`` by what the rounding of ``x`` makes. Near the edge of a uniform base that may\n"
     "put ``x`` outside, where ``log_prob`` is -inf.\n\n"
     "Parameters\n----------\n"
     "n, seed, start, dtype, temperature, context : as of `sample`\n"
     "out : tuple (x, log_prob) of arrays, as returned, optional\n\n"
     "Returns\n-------\n"
     "x : array, [n, D], or [M, n, D] under M contexts\n"
     "log_prob : array, [n] or [M, n], nats\n    Of the flow's dtype.\n"},
};

PyMethodDef kConditionedMethods[] = {
    {"log_probability", function_of(log_probability<BoundCondition>), METH_FASTCALL | METH_KEYWORDS,
     "log_probability($self, x, *, out=None, temperature=None)\n--\n\nlog p(x | context) [B], nats: "
     "`Flow.log_probability`."},
    {"log_prob", function_of(log_probability<BoundCondition>), METH_FASTCALL | METH_KEYWORDS,
     "log_prob($self, x, *, out=None, temperature=None)\n--\n\nThe same as `log_probability`, under the field's other "
     "name."},
    {"forward", function_of(forward<BoundCondition>), METH_FASTCALL | METH_KEYWORDS,
     "forward($self, x, *, out=None)\n--\n\nData to latent: z [B, D] and log|det dz/dx| [B], as `Flow.forward`."},
    {"inverse", function_of(inverse<BoundCondition>), METH_FASTCALL | METH_KEYWORDS,
     "inverse($self, z, *, with_log_det=False, out=None, dtype=None)\n--\n\n"
     "Latent to data: x [B, D], as `Flow.inverse`."},
    {"sample", function_of(sample<BoundCondition>), METH_FASTCALL | METH_KEYWORDS,
     "sample($self, n, *, seed=None, start=0, out=None, dtype=None, temperature=None)\n--\n\n"
     "Draw n rows [n, D] under the context, as `Flow.sample`."},
    {"sample_and_log_prob", function_of(sample_and_log_prob<BoundCondition>), METH_FASTCALL | METH_KEYWORDS,
     "sample_and_log_prob($self, n, *, seed=None, start=0, out=None, dtype=None, temperature=None)\n--\n\n"
     "Draw n rows [n, D] under the context with the log-density [n] of each, as `Flow.sample_and_log_prob`."},
};

}  // namespace

void add_hot_methods(py::class_<BoundFlow>& type) {
  names();
  for (PyMethodDef& method : kMethods) add_method(type, &method);
}

void add_hot_methods(py::class_<BoundCondition>& type) {
  for (PyMethodDef& method : kConditionedMethods) add_method(type, &method);
}

}  // namespace nvpflow::python
