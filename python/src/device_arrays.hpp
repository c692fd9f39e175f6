// Arrays in the memory of a CUDA device: DLPack and __cuda_array_interface__ in, arrays of the caller's library out.
//
// Everything here needs the GIL. Failures set a Python error and throw py::error_already_set.
#pragma once

#include <cstdint>
#include <vector>

#include <nvpflow/spec.hpp>

#include "array_types.hpp"

namespace nvpflow::python {

/// [B, D] or [D] on cuda:`device`, which is where the flow is (kHost: on the CPU, which is an error), used where it is:
/// it must be C-contiguous and of the dtype. InputArray::stream is the caller's: the current one of PyTorch or CuPy,
/// the one __cuda_array_interface__ names, else the legacy default stream.
InputArray device_rows(PyObject* object, const char* name, DType dtype, std::int64_t features, int device);
/// [B], or without axes where `like` came as one row; beside `like`.
InputArray device_vector(PyObject* object, const char* name, DType dtype, const InputArray& like);
/// As output_array, on the device of `like` and of its library; `given` must be there, too.
OutputArray device_output(PyObject* given, const char* name, DType dtype, std::int64_t rows, std::int64_t columns,
                          const InputArray& like);
/// The call, which runs on the stream of x, begins after what makes `in`, another of its arrays.
void wait_beside(const InputArray& in, const InputArray& x);
/// What the caller gets: an array of its own library.
PyObject* device_result(OutputArray&& out);
/// The caller's array as one to write rows to, for calls without an input.
InputArray device_target(PyObject* object, const char* name, DType dtype, int device);

/// A copy of a device's memory as a NumPy array; waits for what makes it on the stream.
py::object numpy_copy(const void* data, DType dtype, const std::vector<std::int64_t>& shape, int device, void* stream);
/// A NumPy array of an object's data where it is a device array, else the object itself.
py::object host_array(const py::object& object);

}  // namespace nvpflow::python
