// The boundary to arrays from outside: what may come in, what goes out, wherever it is. Nothing else in the bindings
// looks into an array. Below it: host_arrays.hpp, device_arrays.hpp, and outside.hpp for what an object says of itself.
//
// Everything here needs the GIL. Failures set a Python error and throw py::error_already_set.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include <nvpflow/flow.hpp>
#include <nvpflow/spec.hpp>

#include "array_types.hpp"
#include "device_arrays.hpp"
#include "host_arrays.hpp"

namespace nvpflow::python {

/// As input_rows, of an object that is not a NumPy array.
InputArray foreign_rows(PyObject* object, const char* name, DType dtype, std::int64_t features, int device, Kind kind,
                        const Flow* named);
/// [B, D] or [D]; for a flow on a CUDA device arrays of that device, too.
/// Of a frame the columns, which must be numbers, and whose names those that `named` has, if any: of a context for
/// Kind::context.
inline InputArray input_rows(PyObject* object, const char* name, DType dtype, std::int64_t features, int device,
                             Kind kind = Kind::other, const Flow* named = nullptr) {
  if (is_numpy_array(object)) return host_rows(object, name, dtype, features, kind, Place::host);
  return foreign_rows(object, name, dtype, features, device, kind, named);
}
/// Of an array that is on another side than x, the host's memory or a device's: an error. On a device the call waits
/// for what makes it.
void require_beside(const InputArray& array, const char* name, const InputArray& x);
/// [B], or a number where x is a single row; where x is.
InputArray input_vector(PyObject* object, const char* name, DType dtype, const InputArray& x);
/// The weights of the rows of x, which are of the host: float64, at least 0 and not all 0. Empty where none are given.
InputArray input_weights(PyObject* object, const char* name, const InputArray& x);

/// The same numbers, whatever they are.
InputArray unchecked_weights(PyObject* object, const char* name, const InputArray& x);

/// See out_members.
void fill_from_tuple(PyObject* out, const char* what, std::span<PyObject*> members);

/// Beside an input: [rows, columns], or [rows] where columns is 0; single as it is, in the memory where it is, of its
/// library. `given`: null or None for a new array, else the caller's, which must have exactly this shape and dtype, be
/// C-contiguous and writable.
inline OutputArray output_array(PyObject* given, const char* name, DType dtype, std::int64_t columns,
                                const InputArray& like) {
  return like.on_device ? device_output(given, name, dtype, like.rows, columns, like)
                        : host_output(given, name, dtype, columns, like);
}
/// The members of a tuple out=, or null ones; what: that each of them takes.
template <std::size_t count>
std::array<PyObject*, count> out_members(PyObject* out, const char* what) {
  std::array<PyObject*, count> members{};
  fill_from_tuple(out, what, members);
  return members;
}
void refuse_overlap(const OutputArray& out, const char* out_name, const InputArray& in, const char* in_name,
                    std::int64_t in_bytes);
void refuse_overlap(const OutputArray& a, const char* a_name, const OutputArray& b, const char* b_name);

/// What the caller gets: `out` itself where given, an array of their library, a NumPy scalar instead of a new array of
/// NumPy's without axes.
inline PyObject* result_of(OutputArray&& out) {
  return out.on_device ? device_result(std::move(out)) : host_result(std::move(out));
}
/// The same, with an array of NumPy's also where it has no axes.
py::object object_of(OutputArray&& out);

}  // namespace nvpflow::python
