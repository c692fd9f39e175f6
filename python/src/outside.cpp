#include "outside.hpp"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "arrays.hpp"
#include "dlpack.h"
#include "layout.hpp"

namespace nvpflow::python {
namespace {

using namespace dlpack;

bool has(PyObject* object, const char* attribute) { return PyObject_HasAttrString(object, attribute) != 0; }

/// Owns what a capsule held.
template <class Managed>
py::object owner_of(Managed* managed) {
  return py::capsule(managed, [](void* p) {
    auto* held = static_cast<Managed*>(p);
    if (held->deleter != nullptr) held->deleter(held);
  });
}

/// Takes over the tensor of a capsule of this name, whose consumer renames it.
template <class Managed>
Managed* take(const py::object& capsule, const char* name, const char* used) {
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule.ptr(), name));
  PyCapsule_SetName(capsule.ptr(), used);
  return managed;
}

py::object capsule_of(PyObject* object, std::optional<std::intptr_t> stream) {
  const py::object method = py::handle(object).attr("__dlpack__");
  py::dict options;
  if (stream.has_value()) options["stream"] = *stream;
  try {
    return method(**options, py::arg("max_version") = py::make_tuple(kMajor, kMinor));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return method(**options);
}

void check_form(const DLTensor& tensor, const char* name) {
  const bool good = tensor.ndim >= 0 && tensor.ndim <= kMostAxes && (tensor.ndim == 0 || tensor.shape != nullptr) &&
                    tensor.dtype.lanes == 1 && elements_of({tensor.shape, static_cast<std::size_t>(tensor.ndim)}) >= 0;
  if (!good) raise(PyExc_TypeError, std::string(name) + ".__dlpack__() gave a tensor of an impossible form");
}

}  // namespace

Library library_of(PyObject* object) {
  // Not by the attribute, which a metaclass can make endless.
  for (const py::handle base : py::handle(Py_TYPE(object)->tp_mro)) {
    const py::object module = base.attr("__module__");
    if (PyUnicode_Check(module.ptr()) == 0) continue;
    const auto name = module.cast<std::string>();
    const std::string root = name.substr(0, name.find('.'));
    if (root == "torch") return Library::torch;
    if (root == "cupy") return Library::cupy;
    if (root == "jax" || root == "jaxlib") return Library::jax;
  }
  return Library::other;
}

Place place_of(PyObject* object, const char* name) {
  if (PyList_Check(object) || PyTuple_Check(object) || PyFloat_Check(object) || PyLong_Check(object) ||
      PyUnicode_Check(object)) {
    return Place::unknown;
  }
  if (!has(object, "__dlpack_device__") || !has(object, "__dlpack__")) {
    return has(object, "__cuda_array_interface__") ? Place::device : Place::unknown;
  }
  const auto type = well_formed(
      std::string(name) + ".__dlpack_device__() does not say where the data are, expected (device type, index)", [&] {
        const py::tuple where = py::handle(object).attr("__dlpack_device__")();
        return py::int_(py::object(where[0])).cast<std::int32_t>();
      });
  if (type == kCpu || type == kCudaHost) return Place::host;
  if (type == kCuda || type == kCudaManaged) return Place::device;
  raise(PyExc_TypeError, std::string(name) + " is on a device of DLPack's type " + std::to_string(type) +
                             ", expected the host's memory or a CUDA device");
}

void refuse_grad(PyObject* object, const char* name, Library library) {
  if (library != Library::torch || !has(object, "requires_grad")) return;  // not a tensor
  if (py::handle(object).attr("requires_grad").cast<bool>()) {
    raise(PyExc_ValueError,
          std::string(name) +
              " requires grad, which a Flow does not follow; wrap the flow in nvpflow.torch.FlowModule, whose methods "
              "are differentiable, or pass " +
              name + ".detach()");
  }
  // Tangents are there as long as a level of forward mode is open, also where gradients are switched off.
  const py::object forward_ad = imported("torch").attr("autograd").attr("forward_ad");
  if (py::getattr(forward_ad, "_current_level", py::int_(0)).cast<int>() < 0) return;
  if (forward_ad.attr("unpack_dual")(py::handle(object)).attr("tangent").is_none()) return;
  raise(PyExc_ValueError, std::string(name) +
                              " has a tangent of forward-mode differentiation, which a Flow does not follow; pass " +
                              name +
                              ".detach() for its value, and use reverse mode (nvpflow.torch.FlowModule) for "
                              "derivatives");
}

void note_write(const py::object& array, Library library) {
  if (library != Library::torch) return;
  imported("torch").attr("autograd").attr("graph").attr("increment_version")(array);
}

void* data_of_new(const py::object& made, Library library, const py::tuple& shape, const py::object& dtype,
                  int device) {
  const bool torch = library == Library::torch;
  const std::string maker = torch ? "x.new_empty()" : "cupy.empty()";
  std::intptr_t data = 0;
  const bool good = well_formed(maker + " did not return an array", [&] {
    data = (torch ? made.attr("data_ptr")() : made.attr("data").attr("ptr")).cast<std::intptr_t>();
    const py::object on = torch ? made.attr("get_device")() : made.attr("device").attr("id");  // -1: the CPU
    const py::object contiguous = torch ? made.attr("is_contiguous")() : made.attr("flags").attr("c_contiguous");
    return on.cast<int>() == device && contiguous.cast<bool>() && py::object(made.attr("shape")).equal(shape) &&
           py::object(made.attr("dtype")).equal(dtype);
  });
  const bool empty = py::len(shape) > 0 && py::object(shape[0]).equal(py::int_(0));
  if (good && (data != 0 || empty)) return reinterpret_cast<void*>(data);
  raise(PyExc_TypeError, maker + " returned an array of shape " +
                             py::str(py::tuple(made.attr("shape"))).cast<std::string>() + " and dtype " +
                             py::str(made.attr("dtype")).cast<std::string>() +
                             ", expected a C-contiguous one of shape " + py::str(shape).cast<std::string>() +
                             " and dtype " + py::str(dtype).cast<std::string>() +
                             " with memory where the input is; pass an array of the library's own class");
}

py::object settled(PyObject* object, Library library) {
  const auto same = py::reinterpret_borrow<py::object>(object);
  return library == Library::torch && same.attr("is_neg")().cast<bool>() ? same.attr("resolve_neg")() : same;
}

void refuse_unsettled(PyObject* object, const char* name, Library library) {
  if (library != Library::torch || !py::handle(object).attr("is_neg")().cast<bool>()) return;
  raise(PyExc_ValueError, std::string(name) + " is a view whose sign PyTorch changes later (" + name +
                              ".is_neg()), which cannot be written to; pass a tensor of its own");
}

Imported import_dlpack(PyObject* object, const char* name, std::optional<std::intptr_t> stream) {
  constexpr const char* kVersioned = "dltensor_versioned";
  constexpr const char* kBare = "dltensor";
  const py::object capsule =
      well_formed(std::string(name) + " cannot be read by DLPack", [&] { return capsule_of(object, stream); });
  Imported result;
  if (PyCapsule_IsValid(capsule.ptr(), kVersioned) != 0) {
    const auto* seen = static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), kVersioned));
    if (seen->version.major != kMajor) {  // the capsule still owns it
      raise(PyExc_BufferError,
            std::string(name) + " comes as DLPack " + std::to_string(seen->version.major) + ", expected version 1");
    }
    auto* managed = take<DLManagedTensorVersioned>(capsule, kVersioned, "used_dltensor_versioned");
    result.owner = owner_of(managed);
    result.read_only = (managed->flags & kReadOnly) != 0;
    result.tensor = managed->dl_tensor;
  } else if (PyCapsule_IsValid(capsule.ptr(), kBare) != 0) {
    auto* managed = take<DLManagedTensor>(capsule, kBare, "used_dltensor");
    result.owner = owner_of(managed);
    result.tensor = managed->dl_tensor;
  } else {
    raise(PyExc_TypeError, std::string(name) + ".__dlpack__() returned " + Py_TYPE(capsule.ptr())->tp_name +
                               ", expected a DLPack capsule");
  }
  check_form(result.tensor, name);
  return result;
}

}  // namespace nvpflow::python
