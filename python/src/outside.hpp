// What an array from outside says of itself: whose it is, where it is, and what its DLPack capsule holds.
//
// Everything here needs the GIL. Failures set a Python error and throw py::error_already_set.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "array_types.hpp"
#include "dlpack.h"
#include "errors.hpp"

namespace nvpflow::python {

/// The library that the object's type, or one of its bases, comes from; `other` where it is none of those we know.
Library library_of(PyObject* object);

/// A library that the caller's object came from, and which is therefore imported already.
inline py::module_ imported(const char* name) { return py::module_::import(name); }

/// By DLPack or __cuda_array_interface__; asks the object, not CUDA.
Place place_of(PyObject* object, const char* name);

/// A tensor of PyTorch that autograd follows, backward or forward, must not come in: results would leave its graph
/// silently.
void refuse_grad(PyObject* object, const char* name, Library library);

/// Tells PyTorch that an array of the caller's was written to, so that a backward pass that needs its old contents is
/// an error, as after every out= of PyTorch's own.
void note_write(const py::object& array, Library library);

/// Where the memory begins of a new array that PyTorch or CuPy, or a subclass's new_empty, made for a result. Refuses
/// one that is not as asked for, C-contiguous and on the device (kHost: the CPU), since no later check comes before it
/// is written to.
void* data_of_new(const py::object& made, Library library, const py::tuple& shape, const py::object& dtype, int device);

/// The object, or a copy where PyTorch has put off a change of sign that is not in memory yet (x.conj().imag), which
/// its capsules do not tell.
py::object settled(PyObject* object, Library library);
/// Such a view is no place for results.
void refuse_unsettled(PyObject* object, const char* name, Library library);

/// What a capsule held, and what keeps it alive; its deleter runs with the GIL.
struct Imported {
  py::object owner;
  dlpack::DLTensor tensor{};
  bool read_only = false;
};

/// From a versioned capsule where the producer knows them, else from one of the form before 1.0. stream: the one that
/// must see the data; none for the host.
Imported import_dlpack(PyObject* object, const char* name, std::optional<std::intptr_t> stream);

/// Calls f; what an object of a wrong form makes it raise becomes a TypeError with `message`.
template <class F>
auto well_formed(const std::string& message, F&& f) {
  try {
    return f();
  } catch (const py::cast_error&) {
    raise(PyExc_TypeError, message);
  } catch (py::error_already_set& error) {
    for (PyObject* type : {PyExc_TypeError, PyExc_ValueError, PyExc_LookupError, PyExc_AttributeError,
                           PyExc_OverflowError, PyExc_RuntimeError, PyExc_BufferError}) {
      if (!error.matches(type)) continue;
      py::raise_from(error, PyExc_TypeError, message.c_str());
      throw py::error_already_set();
    }
    throw;
  }
}

}  // namespace nvpflow::python
