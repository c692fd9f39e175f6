#include "device_arrays.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <nvpflow/device.hpp>
#include <nvpflow/spec.hpp>

#include "device_array.hpp"
#include "dlpack.h"
#include "errors.hpp"
#include "gil.hpp"
#include "host_arrays.hpp"
#include "layout.hpp"
#include "outside.hpp"

namespace nvpflow::python {
namespace {

using namespace dlpack;

std::string on_text(int device) { return device == kHost ? "the CPU" : "cuda:" + std::to_string(device); }

/// Any device array, with what it says of itself.
struct Found {
  py::object owner;
  void* data = nullptr;
  int device = 0;
  bool managed = false;
  bool is_float = false;
  std::int64_t item_bytes = 0;
  std::vector<std::int64_t> shape;
  bool contiguous = true, read_only = false;
  Library library = Library::other;
  void* stream = nullptr;
};

/// The stream on which the caller's library works now.
void* current_stream(Library library, int device) {
  if (library == Library::torch) {
    const py::object stream = imported("torch").attr("cuda").attr("current_stream")(device);
    return stream_at(stream.attr("cuda_stream").cast<std::intptr_t>());
  }
  if (library == Library::cupy) {
    const py::object stream = imported("cupy").attr("cuda").attr("get_current_stream")(device);
    return stream_at(stream.attr("ptr").cast<std::intptr_t>());
  }
  return stream_at(kLegacyStream);
}

// ---- DLPack ------------------------------------------------------------------------------------------------------

void read_tensor(Imported&& imported, Found& found) {
  const DLTensor& tensor = imported.tensor;
  found.owner = std::move(imported.owner);
  found.read_only = imported.read_only;
  const auto type = tensor.device.device_type;  // which may be another than __dlpack_device__ said
  found.data = tensor.data == nullptr ? nullptr : static_cast<unsigned char*>(tensor.data) + tensor.byte_offset;
  found.device = type == kCuda || type == kCudaManaged ? tensor.device.device_id : kHost;
  found.managed = type == kCudaManaged;
  found.is_float = tensor.dtype.code == kFloat && tensor.dtype.lanes == 1;
  found.item_bytes = tensor.dtype.bits / 8;
  found.shape.assign(tensor.shape, tensor.shape + tensor.ndim);
  found.contiguous = tensor.strides == nullptr || is_c_contiguous(found.shape, {tensor.strides, found.shape.size()}, 1);
}

// ---- __cuda_array_interface__ (version 2 and 3) --------------------------------------------------------------------

void read_interface(PyObject* object, Found& found) {
  const py::dict says = py::handle(object).attr("__cuda_array_interface__");
  const py::tuple data = says["data"];
  found.owner = py::reinterpret_borrow<py::object>(object);
  found.data = stream_at(data[0].cast<std::intptr_t>());
  found.read_only = data[1].cast<bool>();
  const auto type = says["typestr"].cast<std::string>();
  found.is_float = type == "<f4" || type == "<f8" || type == "=f4" || type == "=f8";
  found.item_bytes = found.is_float ? type[2] - '0' : 0;
  for (const py::handle n : py::tuple(says["shape"])) found.shape.push_back(n.cast<std::int64_t>());
  if (says.contains("strides") && !says["strides"].is_none()) {
    const auto strides = says["strides"].cast<std::vector<std::int64_t>>();
    // A shape that no array can have is refused below, whatever its strides.
    found.contiguous = elements_of(found.shape) < 0 || is_c_contiguous(found.shape, strides, found.item_bytes);
  }
  if (says.contains("stream") && !says["stream"].is_none()) {
    found.stream = stream_at(says["stream"].cast<std::intptr_t>());
  }
}

void import_interface(PyObject* object, const char* name, int flow_device, Found& found) {
  well_formed(std::string(name) +
                  ".__cuda_array_interface__ has another form than the protocol's, expected a dict with shape, typestr "
                  "and data=(address, read_only), and stream None or an integer",
              [&] { read_interface(object, found); });
  const py::dict says = py::handle(object).attr("__cuda_array_interface__");
  if (says.contains("mask") && !says["mask"].is_none()) {
    raise(PyExc_TypeError,
          std::string(name) + " has a mask, which nvpflow does not take; fill or drop the masked values");
  }
  if (says.contains("stream") && !says["stream"].is_none() && found.stream == nullptr) {
    raise(PyExc_ValueError, std::string(name) +
                                ".__cuda_array_interface__ names stream 0, which the protocol does not allow; expected "
                                "None, 1 (the legacy default stream), 2 (the per-thread one) or a stream's address");
  }
  // An array without elements may point nowhere.
  found.device = found.data == nullptr || flow_device == kHost ? flow_device : cuda_device_of(found.data);
}

// ---- checks ------------------------------------------------------------------------------------------------------

bool has(PyObject* object, const char* attribute) { return PyObject_HasAttrString(object, attribute) != 0; }

Found find(PyObject* object, const char* name, int device) {
  Found found;
  if (py::isinstance<DeviceArray>(object)) {
    const auto& own = py::handle(object).cast<const DeviceArray&>();
    found.owner = py::reinterpret_borrow<py::object>(object);
    found.data = own.memory.data();
    found.device = own.memory.device();
    found.is_float = true;
    found.item_bytes = size_of(own.dtype);
    found.shape = own.shape;
    found.library = Library::nvpflow;
    found.stream = own.stream;
    return found;
  }
  if (device == kHost) {
    raise(PyExc_ValueError, std::string(name) +
                                " is on a CUDA device, the flow on the CPU; move the flow with flow.to(\"cuda\"), or "
                                "copy the array to the host");
  }
  found.library = library_of(object);
  refuse_grad(object, name, found.library);
  found.stream = current_stream(found.library, device);
  if (has(object, "__dlpack__")) {
    const std::intptr_t stream = found.stream == nullptr ? kLegacyStream : address(found.stream);
    read_tensor(import_dlpack(settled(object, found.library).ptr(), name, stream), found);
  } else {
    import_interface(object, name, device, found);
  }
  return found;
}

/// On the flow's device, of its dtype, C-contiguous.
void check(const Found& found, const char* name, DType dtype, int device) {
  if (device == kHost || (found.device != device && !found.managed)) {
    raise(PyExc_ValueError, std::string(name) + " is on " + on_text(found.device) + ", the flow on " + on_text(device) +
                                "; move one of them, the flow with flow.to(\"" +
                                (found.device == kHost ? "cpu" : on_text(found.device)) + "\")");
  }
  if (!found.is_float || found.item_bytes != size_of(dtype)) {
    const std::string came = found.is_float ? "float" + std::to_string(8 * found.item_bytes) : "another dtype";
    raise(PyExc_TypeError, std::string(name) + " has " + (found.is_float ? "dtype " : "") + came + ", expected " +
                               std::string(name_of(dtype)) +
                               ", the flow's dtype; arrays on a device are not converted");
  }
  if (!found.contiguous) {
    raise(
        PyExc_ValueError,
        std::string(name) + " is not C-contiguous; arrays on a device are used as they are, so make a contiguous copy");
  }
  const std::int64_t elements = elements_of(found.shape);
  if (elements < 0) raise(PyExc_ValueError, std::string(name) + " has shape " + shape_text(found.shape));
  if (elements > 0 && (found.data == nullptr || address(found.data) % found.item_bytes != 0)) {
    raise(PyExc_ValueError, std::string(name) + " has elements but points " +
                                (found.data == nullptr ? "nowhere" : "between two of them"));
  }
}

bool same_stream(const void* a, const void* b) {
  const auto value = [](const void* s) { return s == nullptr ? kLegacyStream : address(s); };
  return value(a) == value(b);
}

/// The call, which runs on the stream of x, begins after what makes `found`.
void wait_for(const Found& found, const InputArray& x) {
  if (!same_stream(found.stream, x.stream)) cuda_wait(x.device, x.stream, found.stream);
}

InputArray input_of(Found&& found, PyObject* object) {
  InputArray in;
  in.owner = std::move(found.owner);
  in.data = found.data;
  in.on_device = true;
  in.library = found.library;
  in.device = found.device;
  in.stream = found.stream;
  in.source = py::reinterpret_borrow<py::object>(object);
  return in;
}

std::vector<std::int64_t> shape_of(std::int64_t rows, std::int64_t columns, const InputArray& like) {
  std::vector<std::int64_t> shape;
  if (like.outer >= 0) shape.push_back(like.outer);
  if (!like.single) shape.push_back(rows);
  if (columns > 0) shape.push_back(columns);
  return shape;
}

/// A new array on the device, by the caller's library where it can make one that is not filled yet.
void allocate(OutputArray& out, DType dtype, const std::vector<std::int64_t>& shape, const InputArray& like) {
  const py::tuple extents(py::cast(shape));
  if (like.library == Library::torch) {
    const py::object type = imported("torch").attr(std::string(name_of(dtype)).c_str());
    out.array = like.source.attr("new_empty")(extents, py::arg("dtype") = type);
    out.data = data_of_new(out.array, like.library, extents, type, like.device);
  } else if (like.library == Library::cupy) {
    const py::object on = imported("cupy").attr("cuda").attr("Device")(like.device);
    on.attr("__enter__")();
    try {
      out.array = imported("cupy").attr("empty")(extents, std::string(name_of(dtype)));
    } catch (...) {
      on.attr("__exit__")(py::none(), py::none(), py::none());
      throw;
    }
    on.attr("__exit__")(py::none(), py::none(), py::none());
    out.data = data_of_new(out.array, like.library, extents, py::str(std::string(name_of(dtype))), like.device);
  } else {
    const std::int64_t bytes = std::max<std::int64_t>(1, out.bytes);
    DeviceArray own{DeviceMemory(like.device, bytes), dtype, shape, like.stream};
    out.data = own.memory.data();
    out.array = py::cast(std::move(own));
  }
}

}  // namespace

InputArray device_rows(PyObject* object, const char* name, DType dtype, std::int64_t features, int device) {
  Found found = find(object, name, device);
  check(found, name, dtype, device);
  const std::size_t dims = found.shape.size();
  if ((dims != 1 && dims != 2) || found.shape.back() != features) {
    const std::string d = std::to_string(features);
    raise(PyExc_ValueError, std::string(name) + " has shape " + shape_text(found.shape) + ", expected (B, " + d +
                                ") or, for one row, (" + d + ",)");
  }
  const std::int64_t rows = dims == 1 ? 1 : found.shape[0];
  InputArray in = input_of(std::move(found), object);
  in.single = dims == 1;
  in.rows = rows;
  return in;
}

InputArray device_vector(PyObject* object, const char* name, DType dtype, const InputArray& like) {
  if (place_of(object, name) != Place::device) {
    raise(PyExc_ValueError, std::string(name) + " is on the CPU, x on " + on_text(like.device));
  }
  Found found = find(object, name, like.device);
  check(found, name, dtype, like.device);
  const std::vector<std::int64_t> expected = shape_of(like.rows, 0, like);
  if (found.shape != expected) {
    raise(PyExc_ValueError,
          std::string(name) + " has shape " + shape_text(found.shape) + ", expected " + shape_text(expected));
  }
  wait_for(found, like);
  return input_of(std::move(found), object);
}

OutputArray device_output(PyObject* given, const char* name, DType dtype, std::int64_t rows, std::int64_t columns,
                          const InputArray& like) {
  OutputArray out;
  out.on_device = true;
  out.library = like.library;
  const std::vector<std::int64_t> shape = shape_of(rows, columns, like);
  out.bytes = size_of(dtype);
  for (const std::int64_t n : shape) out.bytes *= n;
  if (given == nullptr || given == Py_None) {
    allocate(out, dtype, shape, like);
    return out;
  }
  const Place place = place_of(given, name);
  if (place != Place::device) {
    const std::string type = std::string(name) + " is " + Py_TYPE(given)->tp_name;
    if (place == Place::unknown) raise(PyExc_TypeError, type + ", expected an array on " + on_text(like.device));
    raise(PyExc_ValueError,
          type + " in the host's memory, the input on " + on_text(like.device) + "; expected both in one place");
  }
  refuse_unsettled(given, name, library_of(given));
  const Found found = find(given, name, like.device);
  out.library = found.library;
  check(found, name, dtype, like.device);
  if (found.shape != shape) {
    raise(PyExc_ValueError,
          std::string(name) + " has shape " + shape_text(found.shape) + ", expected " + shape_text(shape));
  }
  if (found.read_only || found.library == Library::jax)
    raise(PyExc_ValueError, std::string(name) + " is read-only, expected a writable array");
  out.array = py::reinterpret_borrow<py::object>(given);
  out.data = found.data;
  out.given = true;
  out.device = like.device;
  out.stream = found.stream;
  out.call_stream = like.stream;
  wait_for(found, like);
  return out;
}

void wait_beside(const InputArray& in, const InputArray& x) {
  if (!same_stream(in.stream, x.stream)) cuda_wait(x.device, x.stream, in.stream);
}

PyObject* device_result(OutputArray&& out) {
  if (out.given && !same_stream(out.stream, out.call_stream)) cuda_wait(out.device, out.stream, out.call_stream);
  if (out.given) note_write(out.array, out.library);
  if (!out.given && out.library == Library::jax) {
    return imported("jax").attr("dlpack").attr("from_dlpack")(out.array).release().ptr();
  }
  return std::move(out.array).release().ptr();
}

InputArray device_target(PyObject* object, const char* name, DType dtype, int device) {
  Found found = find(object, name, device);
  check(found, name, dtype, device);
  return input_of(std::move(found), object);
}

py::object numpy_copy(const void* data, DType dtype, const std::vector<std::int64_t>& shape, int device, void* stream) {
  const OutputArray copy = new_array(dtype, shape);
  {
    const GilReleased released;
    cuda_download(device, copy.data, data, copy.bytes, stream);
  }
  return copy.array;
}

namespace {

/// The device that an object says its array is on.
int device_index(const py::object& object) {
  if (has(object.ptr(), "__dlpack_device__")) return py::tuple(object.attr("__dlpack_device__")())[1].cast<int>();
  const py::dict says = object.attr("__cuda_array_interface__");
  return std::max(0, cuda_device_of(stream_at(py::tuple(says["data"])[0].cast<std::intptr_t>())));
}

}  // namespace

py::object host_array(const py::object& object) {
  if (place_of(object.ptr(), "x") != Place::device) {
    refuse_grad(object.ptr(), "x", library_of(object.ptr()));
    return object;
  }
  const Found found = find(object.ptr(), "x", device_index(object));
  if (!found.is_float || (found.item_bytes != 4 && found.item_bytes != 8)) {
    raise(PyExc_TypeError, "an array on a device has another dtype than float32 or float64");
  }
  check(found, "x", found.item_bytes == 4 ? DType::float32 : DType::float64, found.device);
  return numpy_copy(found.data, found.item_bytes == 4 ? DType::float32 : DType::float64, found.shape, found.device,
                    found.stream);
}

}  // namespace nvpflow::python
