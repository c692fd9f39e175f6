// The boundary to arrays from outside: what may come in, what goes out. Nothing else in the bindings looks into an
// array.
//
// Everything here needs the GIL. Failures set a Python error and throw py::error_already_set.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include <nvpflow/flow.hpp>
#include <nvpflow/spec.hpp>

namespace nvpflow::python {

namespace py = pybind11;

/// Loads NumPy's C interface; called once, from the module's initialisation.
void import_numpy();

/// Where a flow is that runs on the CPU; else the index of its CUDA device.
inline constexpr int kHost = -1;

/// Whose arrays a caller uses: results are of the same kind. `standard`: those of the host whose library follows the
/// array API standard, and so has a from_dlpack. Those of the host that are of no kind below are NumPy's.
enum class Library { numpy, torch, cupy, jax, nvpflow, standard, other };

/// A C-contiguous array of the flow's dtype: the caller's own memory where it already is one, else a copy that
/// NumPy calls safe. Holds a reference.
struct InputArray {
  py::object owner;
  void* data = nullptr;
  std::int64_t bytes = 0;  // of input_rows and input_vector
  bool wide = false;       // float64 rows of a float32 flow (Kind::data)
  std::int64_t rows = 0;   // of input_rows only
  bool single = false;     // came as [D]: results lose the batch axis
  Library library = Library::numpy;
  py::object source;  // the caller's object, where it is not NumPy's
  // In the memory of a CUDA device (device_arrays.hpp): used as it is.
  bool on_device = false;
  int device = kHost;
  void* stream = nullptr;  // the caller's
};

/// What an array is to a flow.
enum class Kind {
  data,       // rows of data, of a flow that takes only its dtype
  wide_data,  // the same, of a float32 flow that takes float64, too (takes_float64_rows)
  other,      // latents, cotangents and the like, whose values are of unit scale
};

/// [B, D] or [D]; for a flow on a CUDA device arrays of that device, too.
/// Of a frame the columns, which must be numbers, and whose names those that `named` has, if any.
InputArray input_rows(PyObject* object, const char* name, DType dtype, std::int64_t features, int device,
                      Kind kind = Kind::other, const Flow* named = nullptr);
/// [B], or a number where x is a single row; where x is.
InputArray input_vector(PyObject* object, const char* name, DType dtype, const InputArray& x);

struct OutputArray {
  py::object array;
  py::object view;         // NumPy's of a given array: while it exists, the memory is not resized
  py::object from_dlpack;  // of a library that takes the filled array over from NumPy
  void* data = nullptr;
  std::int64_t bytes = 0;
  bool given = false;
  bool on_device = false;
  Library library = Library::numpy;
  // A given array of a device: whose stream must see what the call's stream writes.
  int device = kHost;
  void *stream = nullptr, *call_stream = nullptr;
};

/// The elements of a checked array.
template <class T>
std::span<const T> view(const InputArray& in, std::int64_t size) {
  return {static_cast<const T*>(in.data), static_cast<std::size_t>(size)};
}
template <class T>
std::span<T> view(const OutputArray& out) {
  return {static_cast<T*>(out.data), static_cast<std::size_t>(out.bytes) / sizeof(T)};
}

/// A new array of NumPy's, [rows, columns], or [rows] where columns is 0.
OutputArray new_array(DType dtype, std::int64_t rows, std::int64_t columns);
/// Beside an input: [rows, columns], or [rows] where columns is 0; single as it is, in the memory where it is, of its
/// library. `given`: null or None for a new array, else the caller's, which must have exactly this shape and dtype, be
/// C-contiguous and writable.
OutputArray output_array(PyObject* given, const char* name, DType dtype, std::int64_t columns, const InputArray& like);
/// The two members of out=(first, second), or null ones; second_name: what the second takes.
/// Whether results of data are to be float64 where the flow's are not: as dtype= (null or None: not given) or out= say.
/// Refuses what the flow does not give.
bool wants_float64(PyObject* dtype, PyObject* out, DType own, Kind kind);
std::pair<PyObject*, PyObject*> out_pair(PyObject* out, const char* second_name);
void refuse_overlap(const OutputArray& out, const char* out_name, const InputArray& in, const char* in_name,
                    std::int64_t in_bytes);
void refuse_overlap(const OutputArray& a, const char* a_name, const OutputArray& b, const char* b_name);

/// What the caller gets: `out` itself where given, an array of their library, a NumPy scalar instead of a new array of
/// NumPy's without axes.
PyObject* result_of(OutputArray&& out);
/// The same, with an array of NumPy's also where it has no axes.
py::object object_of(OutputArray&& out);

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
