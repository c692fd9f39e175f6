// Arrays in the host's memory. The only place that knows NumPy.
//
// Everything here needs the GIL. Failures set a Python error and throw py::error_already_set.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <nvpflow/spec.hpp>

#include "array_types.hpp"

namespace nvpflow::python {

/// Loads NumPy's C interface; called once, from the module's initialisation.
void import_numpy();

/// numpy.ndarray.
extern PyTypeObject* numpy_array_type;
inline bool is_numpy_array(PyObject* object) { return PyObject_TypeCheck(object, numpy_array_type) != 0; }

/// [B, D] or [D]. place: of an object that is not a NumPy array; not a device.
InputArray host_rows(PyObject* object, const char* name, DType dtype, std::int64_t features, Kind kind, Place place);
/// [B], or a number where x is a single row.
InputArray host_vector(PyObject* object, const char* name, DType dtype, const InputArray& x, Place place,
                       Kind kind = Kind::other);
/// As output_array, beside an input in the host's memory.
OutputArray host_output(PyObject* given, const char* name, DType dtype, std::int64_t columns, const InputArray& like);
/// As result_of and object_of.
PyObject* host_result(OutputArray&& out);
py::object host_object(OutputArray&& out);

/// A new array of NumPy's, [rows, columns], or [rows] where columns is 0.
OutputArray new_array(DType dtype, std::int64_t rows, std::int64_t columns);
/// The same of any shape.
OutputArray new_array(DType dtype, const std::vector<std::int64_t>& shape);

/// Any object's values as NumPy has them, C-contiguous and of their own dtype.
struct HostValues {
  py::object owner;
  const void* data = nullptr;
  std::int64_t bytes = 0;
  std::string dtype;
  std::vector<std::int64_t> shape;  // with at least one axis
};
HostValues host_values(PyObject* object);

/// Whether results of data are to be float64 where the flow's are not: as dtype= (null or None: not given) or out= say.
/// Refuses what the flow does not give.
bool wants_float64(PyObject* dtype, PyObject* out, DType own, Kind kind);

/// An array of `size` elements at `data` that owns `memory`, and lets it go without the GIL where it is large.
py::object owning_array(std::shared_ptr<void> memory, void* data, DType dtype, std::int64_t size);

/// Such an array, not initialised.
struct FlatArray {
  FlatArray(DType dtype, std::int64_t size);

  py::object array;
  void* data;
};

/// A read-only array that looks at `data` and keeps `owner` alive.
py::object readonly_view(const void* data, DType dtype, std::int64_t size, py::handle owner);

}  // namespace nvpflow::python
