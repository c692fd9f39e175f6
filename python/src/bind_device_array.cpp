// nvpflow.cuda's own array in Python: DeviceArray, with DLPack and __cuda_array_interface__.

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include <nvpflow/device.hpp>
#include <nvpflow/spec.hpp>

#include "bindings.hpp"
#include "device_array.hpp"
#include "device_arrays.hpp"
#include "dlpack.h"
#include "errors.hpp"
#include "gil.hpp"
#include "host_arrays.hpp"
#include "layout.hpp"
#include "outside.hpp"
#include "plain_methods.hpp"

namespace nvpflow::python {
namespace {

using namespace dlpack;

py::dict array_interface(const DeviceArray& a) {
  py::dict says;
  says["version"] = 3;
  says["shape"] = py::tuple(py::cast(a.shape));
  says["typestr"] = a.dtype == DType::float32 ? "<f4" : "<f8";
  says["data"] = py::make_tuple(address(a.memory.data()), false);
  says["strides"] = py::none();
  says["stream"] = a.stream == nullptr ? kLegacyStream : address(a.stream);
  return says;
}

/// What a capsule of ours points at, in either form.
template <class Managed>
struct Export {
  Managed managed{};
  DeviceArray array;
  explicit Export(DeviceArray a) : array(std::move(a)) {}
};

template <class Managed>
Managed* export_tensor(const DeviceArray& a) {
  auto* made = new Export<Managed>(a);
  made->managed.manager_ctx = made;
  made->managed.deleter = [](Managed* self) { delete static_cast<Export<Managed>*>(self->manager_ctx); };
  const auto bits = static_cast<std::uint8_t>(8 * size_of(a.dtype));
  made->managed.dl_tensor = {a.memory.data(),
                             {kCuda, a.memory.device()},
                             static_cast<std::int32_t>(a.shape.size()),
                             {kFloat, bits, 1},
                             made->array.shape.data(),
                             nullptr,
                             0};
  return &made->managed;
}

/// Frees a capsule's contents if no consumer took them.
template <class Managed>
void free_capsule(PyObject* capsule) {
  const char* name = PyCapsule_GetName(capsule);
  if (name == nullptr || std::strncmp(name, "used_", 5) == 0) return;
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, name));
  if (managed != nullptr) managed->deleter(managed);
}

template <class Managed>
py::object new_capsule(const DeviceArray& a, const char* name) {
  auto* managed = export_tensor<Managed>(a);
  if constexpr (requires { managed->version; }) managed->version = {kMajor, kMinor};
  PyObject* capsule = PyCapsule_New(managed, name, free_capsule<Managed>);
  if (capsule == nullptr) {
    managed->deleter(managed);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(capsule);
}

py::object to_dlpack(const DeviceArray& a, const py::object& stream, const py::object& max_version,
                     const py::object& dl_device, const py::object& copy) {
  if (!dl_device.is_none() && !dl_device.equal(py::make_tuple(kCuda, a.memory.device()))) {
    raise(PyExc_BufferError, "dl_device is another device than the array's, cuda:" + std::to_string(a.memory.device()));
  }
  if (!copy.is_none() && PyObject_IsTrue(copy.ptr()) == 1) raise(PyExc_BufferError, "copy=True is not supported");
  const auto consumer =
      well_formed("stream is " + py::repr(stream).cast<std::string>() + ", expected None or an integer",
                  [&] { return stream.is_none() ? kLegacyStream : stream.cast<std::intptr_t>(); });
  if (consumer == 0 || consumer < -1) {
    raise(PyExc_ValueError, "stream is " + std::to_string(consumer) +
                                ", which DLPack does not allow; expected -1 (do not wait), 1 (the legacy default "
                                "stream), 2 (the per-thread one) or a stream's address");
  }
  const auto versions =
      well_formed("max_version is " + py::repr(max_version).cast<std::string>() + ", expected None or (major, minor)",
                  [&] { return max_version.is_none() ? std::pair(0, 0) : max_version.cast<std::pair<int, int>>(); });
  const std::intptr_t own = a.stream == nullptr ? kLegacyStream : address(a.stream);
  if (consumer != -1 && consumer != own) cuda_wait(a.memory.device(), stream_at(consumer), a.stream);
  return versions.first >= 1 ? new_capsule<DLManagedTensorVersioned>(a, "dltensor_versioned")
                             : new_capsule<DLManagedTensor>(a, "dltensor");
}

/// values, device
py::object array_of(const Arguments& given) {
  const py::object values = given.object(0);
  const std::string device = given.text(1, "");
  const Device on = parse_device(device);
  if (on.kind != DeviceKind::cuda) raise(PyExc_ValueError, "device is '" + device + "', expected a CUDA device");
  (void)cuda_device_name(on.index);  // which refuses one that is not there
  const HostValues rows = host_values(values.ptr());
  DeviceArray array{DeviceMemory(on.index, std::max<std::int64_t>(1, rows.bytes)), parse_dtype(rows.dtype), rows.shape,
                    nullptr};
  if (py::len(values.attr("shape")) == 0) array.shape.clear();  // which ascontiguousarray gives an axis
  {
    const GilReleased released;
    array.memory.upload(rows.data, array.bytes());
  }
  return py::cast(std::move(array));
}

/// A NumPy array of an object's data where it is a device array, else the object itself.
py::object host_array_of(const Arguments& given) { return host_array(given.object(0)); }

}  // namespace

void bind_device_array(py::module_& module) {
  py::class_<DeviceArray> type(
      module, "DeviceArray",
      "A C-contiguous array in the memory of a CUDA device, which any library takes by DLPack or\n"
      "__cuda_array_interface__. Made by nvpflow.cuda.array, and the result of calls on device\n"
      "arrays of libraries that cannot allocate one.");
  // An object without an array, which DeviceArray.__new__ would make, has no sound members.
  reinterpret_cast<PyTypeObject*>(type.ptr())->tp_new = [](PyTypeObject*, PyObject*, PyObject*) -> PyObject* {
    PyErr_SetString(PyExc_TypeError, "DeviceArray is made by nvpflow.cuda.array");
    return nullptr;
  };
  type.def_property_readonly("shape", [](const DeviceArray& a) { return py::tuple(py::cast(a.shape)); })
      .def_property_readonly("dtype", [](const DeviceArray& a) { return std::string(name_of(a.dtype)); })
      .def_property_readonly("device", [](const DeviceArray& a) { return "cuda:" + std::to_string(a.memory.device()); })
      .def(
          "numpy",
          [](const DeviceArray& a) {
            return numpy_copy(a.memory.data(), a.dtype, a.shape, a.memory.device(), a.stream);
          },
          "Copy to a NumPy array; waits for the contents.")
      .def_property_readonly("__cuda_array_interface__", &array_interface)
      .def("__dlpack__", &to_dlpack, py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
           py::arg("dl_device") = py::none(), py::arg("copy") = py::none())
      .def("__array__",
           [](const DeviceArray& a, const py::args&, const py::kwargs&) -> py::object {
             raise(PyExc_TypeError,
                   "this array is on cuda:" + std::to_string(a.memory.device()) + "; copy it with .numpy()");
           })
      .def("__dlpack_device__", [](const DeviceArray& a) { return py::make_tuple(kCuda, a.memory.device()); })
      .def("__repr__", [](const DeviceArray& a) {
        return "DeviceArray(shape=" + shape_text(a.shape) + ", dtype='" + std::string(name_of(a.dtype)) +
               "', device='cuda:" + std::to_string(a.memory.device()) + "')";
      });
  add_function(module, plain<&array_of>("_device_array", 2, 2, {"values", "device"}, nullptr));
  add_function(module, plain<&host_array_of>("_host_array", 1, 1, {"object"}, nullptr));
}

}  // namespace nvpflow::python
