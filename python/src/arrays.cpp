#include "arrays.hpp"

#include <pybind11/stl.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include <nvpflow/error.hpp>
#include <nvpflow/flow.hpp>
#include <nvpflow/overlap.hpp>
#include <nvpflow/spec.hpp>

#include "errors.hpp"
#include "outside.hpp"

namespace nvpflow::python {
namespace {

/// The columns of a frame as one array; the object itself where it is not a frame. Objects that cannot be a
/// table are refused.
py::object read_columns(PyObject* object, const char* name, Kind kind, const Flow* named) {
  if (PyList_Check(object) || PyTuple_Check(object) || PyFloat_Check(object) || PyLong_Check(object)) {
    return py::reinterpret_borrow<py::object>(object);
  }
  const bool of_context = kind == Kind::context;
  std::vector<std::string> names;
  if (named != nullptr) names = of_context ? named->context_names() : named->column_names();
  return py::module_::import("nvpflow._frames")
      .attr("rows")(py::handle(object), name, names, of_context ? "context_names" : "column_names");
}

}  // namespace

InputArray foreign_rows(PyObject* object, const char* name, DType dtype, std::int64_t features, int device, Kind kind,
                        const Flow* named) {
  const Place place = place_of(object, name);
  if (place == Place::device) {
    InputArray in = device_rows(object, name, dtype, features, device);
    in.bytes = in.rows * features * size_of(dtype);
    return in;
  }
  if (place == Place::host) return host_rows(object, name, dtype, features, kind, place);
  const py::object read = read_columns(object, name, kind, named);
  return host_rows(read.ptr(), name, dtype, features, kind, place);
}

InputArray input_vector(PyObject* object, const char* name, DType dtype, const InputArray& x) {
  if (x.on_device) return device_vector(object, name, dtype, x);
  const Place place = is_numpy_array(object) ? Place::host : place_of(object, name);
  if (place == Place::device) {
    raise(PyExc_ValueError,
          std::string(name) + " is on a CUDA device, x in the host's memory; expected both in one place");
  }
  return host_vector(object, name, dtype, x, place);
}

InputArray unchecked_weights(PyObject* object, const char* name, const InputArray& x) {
  const Place place = is_numpy_array(object) ? Place::host : place_of(object, name);
  if (x.on_device || place == Place::device) {
    raise(PyExc_ValueError, std::string(x.on_device ? "x" : name) +
                                " is on a CUDA device, expected arrays of the host where rows have weights; "
                                "log_prob_vjp takes a weight for each row as grad_log_prob");
  }
  return host_vector(object, name, DType::float64, x, place, Kind::weights);
}

InputArray input_weights(PyObject* object, const char* name, const InputArray& x) {
  if (object == nullptr || object == Py_None) return {};
  InputArray weights = unchecked_weights(object, name, x);
  SampleWeights(view<double>(weights, x.rows)).check(name, x.rows);
  return weights;
}

void fill_from_tuple(PyObject* out, const char* what, std::span<PyObject*> members) {
  if (out == nullptr || out == Py_None) return;
  const auto count = static_cast<Py_ssize_t>(members.size());
  if (!PyTuple_Check(out) || PyTuple_GET_SIZE(out) != count) {
    const std::string came =
        PyTuple_Check(out) ? "a tuple of " + std::to_string(PyTuple_GET_SIZE(out)) : Py_TYPE(out)->tp_name;
    raise(PyExc_TypeError,
          "out is " + came + ", expected a tuple of " + (count == 2 ? "two" : "three") + " arrays, " + what);
  }
  for (Py_ssize_t i = 0; i < count; ++i) members[static_cast<std::size_t>(i)] = PyTuple_GET_ITEM(out, i);
}

void require_beside(const InputArray& array, const char* name, const InputArray& x) {
  if (array.on_device == x.on_device) {
    if (x.on_device) wait_beside(array, x);
    return;
  }
  throw Error(ErrorCode::invalid_argument, std::string(x.on_device ? "x" : name) + " is on a CUDA device, " +
                                               (x.on_device ? name : "x") +
                                               " in the host's memory; expected both in one place");
}

void refuse_overlap(const OutputArray& out, const char* out_name, const InputArray& in, const char* in_name,
                    std::int64_t in_bytes) {
  if (out.given) nvpflow::refuse_overlap({out_name, out.data, out.bytes}, {in_name, in.data, in_bytes});
}

void refuse_overlap(const OutputArray& a, const char* a_name, const OutputArray& b, const char* b_name) {
  if (a.given && b.given) nvpflow::refuse_overlap({a_name, a.data, a.bytes}, {b_name, b.data, b.bytes});
}

py::object object_of(OutputArray&& out) {
  return out.on_device ? py::reinterpret_steal<py::object>(device_result(std::move(out))) : host_object(std::move(out));
}

}  // namespace nvpflow::python
