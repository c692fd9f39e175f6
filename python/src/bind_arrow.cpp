// Tables with __arrow_c_stream__: their columns, gathered into rows.

#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include <nvpflow/spec.hpp>

#include "array_types.hpp"
#include "arrow.h"
#include "arrow_columns.hpp"
#include "bindings.hpp"
#include "bound_flow.hpp"
#include "errors.hpp"
#include "gil.hpp"
#include "host_arrays.hpp"
#include "plain_methods.hpp"

namespace nvpflow::python {
namespace {

constexpr const char* kCapsule = "arrow_array_stream";

/// table
py::object arrow_columns(const Arguments& given) {
  const py::object table = given.object(0);
  if (!py::hasattr(table, "__arrow_c_stream__")) {
    raise(PyExc_TypeError,
          std::string("table is ") + Py_TYPE(table.ptr())->tp_name + ", expected an object with __arrow_c_stream__");
  }
  const py::object capsule = table.attr("__arrow_c_stream__")();
  if (PyCapsule_IsValid(capsule.ptr(), kCapsule) == 0) {
    raise(PyExc_TypeError, "table.__arrow_c_stream__() gave no capsule of an Arrow stream");
  }
  auto* stream = static_cast<arrow::ArrowArrayStream*>(PyCapsule_GetPointer(capsule.ptr(), kCapsule));
  return py::cast(std::make_unique<ArrowColumns>(*stream));
}

/// A tuple of an array [rows, columns] of the dtype, and of whether a finite number became infinite in it.
py::tuple gather(const ArrowColumns& self, const std::string& dtype, bool through_double) {
  const auto& formats = self.formats();
  for (std::size_t j = 0; j < formats.size(); ++j) {
    if (formats[j].empty()) throw py::type_error("column " + std::to_string(j) + " holds no plain numbers");
  }
  OutputArray out = new_array(parse_dtype(dtype), {self.rows(), static_cast<std::int64_t>(formats.size())});
  bool overflowed = false;
  run_released_over(static_cast<std::size_t>(out.bytes), [&] {
    overflowed = by_dtype(parse_dtype(dtype),
                          [&](auto t) { return self.gather(static_cast<decltype(t)*>(out.data), through_double); });
  });
  return py::make_tuple(host_object(std::move(out)), overflowed);
}

}  // namespace

void bind_arrow(py::module_& module) {
  py::class_<ArrowColumns>(module, "ArrowColumns", "All of a stream of Arrow's record batches.")
      .def_property_readonly("formats", [](const ArrowColumns& self) { return py::tuple(py::cast(self.formats())); })
      .def_property_readonly("rows", &ArrowColumns::rows)
      .def("gather", &gather, py::arg("dtype"), py::arg("through_double"));
  add_function(module, plain<&arrow_columns>("_arrow_columns", 1, 1, {"table"}, nullptr));
}

}  // namespace nvpflow::python
