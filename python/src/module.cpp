// The module nvpflow._core: what it is made of.

#include <string>

#include <nvpflow/flow.hpp>

#include "bindings.hpp"
#include "errors.hpp"
#include "host_arrays.hpp"
#include "xla_handlers.hpp"

namespace nvpflow::python {
namespace {

/// pybind11 passes over the constructor of an object that has been made, in silence, and over __setstate__.
void refuse_second_init(const py::object& type) {
  for (const char* name : {"__init__", "__setstate__"}) {
    if (!py::hasattr(type, name) || !type.attr("__dict__").contains(name)) continue;
    const py::object first = type.attr(name);
    type.attr(name) = py::cpp_function(
        [first, name](const py::handle& self, const py::args& args, const py::kwargs& keywords) {
          auto* instance = reinterpret_cast<py::detail::instance*>(self.ptr());
          if (instance->get_value_and_holder().instance_registered()) {
            throw py::type_error(std::string(Py_TYPE(self.ptr())->tp_name) + "." + name +
                                 "() was called on an object that has been made already; make a new one");
          }
          return first(self, *args, **keywords);
        },
        py::is_method(type));  // without a name: pybind11 looks at that
  }
}

}  // namespace

// Python calls our PyInit__core, below, and that pybind11's, under this name.
#define PyInit__core nvpflow_init_core
PYBIND11_MODULE(_core, module, py::mod_gil_not_used()) {
  import_numpy();
  bind_errors(module);
  module.attr("__version__") = version();
  bind_machine(module);
  bind_device_array(module);
  bind_spec(module);
  bind_flow(module);
  bind_training(module);
  bind_adam(module);
  bind_arrow(module);
  bind_files(module);
  refuse_second_init(module.attr("FlowSpec"));
  refuse_second_init(module.attr("Flow"));
  refuse_second_init(module.attr("ConditionedFlow"));
  module.def("_xla_handlers", &xla_handlers);
}

#undef PyInit__core

/// pybind11's entry asks for the GIL by PyGILState_Ensure, which waits for ever in a sub-interpreter.
extern "C" PYBIND11_EXPORT PyObject* PyInit__core() {
  if (PyInterpreterState_Get() == PyInterpreterState_Main()) return nvpflow_init_core();
  PyErr_SetString(
      PyExc_ImportError,
      "nvpflow cannot be imported in a sub-interpreter, expected the main interpreter of its process; under "
      "mod_wsgi set WSGIApplicationGroup %{GLOBAL}, elsewhere use threads or processes");
  return nullptr;
}

}  // namespace nvpflow::python
