// What the bindings know of an array: where it is, whose it is, and what keeps it alive.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <span>

namespace nvpflow::python {

namespace py = pybind11;

/// Where a flow is that runs on the CPU; else the index of its CUDA device.
inline constexpr int kHost = -1;

/// Whose arrays a caller uses: results are of the same kind. `standard`: those of the host whose library follows the
/// array API standard, and so has a from_dlpack. Those of the host that are of no kind below are NumPy's.
enum class Library { numpy, torch, cupy, jax, nvpflow, standard, other };

/// Where an object says its memory is.
enum class Place { unknown, host, device };

/// A C-contiguous array of the flow's dtype: the caller's own memory where it already is one, else a copy that
/// NumPy calls safe. Holds a reference.
struct InputArray {
  py::object owner;
  void* data = nullptr;
  std::int64_t bytes = 0;   // of input_rows and input_vector
  bool wide = false;        // float64 rows of a float32 flow (Kind::data)
  bool in_place = true;     // the caller's own memory, no copy of it
  std::int64_t rows = 0;    // of input_rows only
  bool single = false;      // came as [D]: results lose the batch axis
  std::int64_t outer = -1;  // of samples: contexts, an axis before the rows; negative: none
  Library library = Library::numpy;
  py::object source;  // the caller's object, where it is not NumPy's
  // In the memory of a CUDA device (device_arrays.hpp): used as it is.
  bool on_device = false;
  int device = kHost;
  void* stream = nullptr;  // the caller's
};

/// What an array is to a flow.
enum class Kind {
  data,          // rows of data, of a flow that takes only its dtype
  bounded_data,  // the same, under a bounded base, which no layer that standardizes would keep
  wide_data,     // the same, of a float32 flow that takes float64, too (takes_float64_rows)
  other,         // latents, cotangents and the like, whose values are of unit scale
  context,       // an input of networks: float64 is rounded to the flow's dtype
  weights,       // of rows: float64, whatever the flow's dtype is
};

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

}  // namespace nvpflow::python
