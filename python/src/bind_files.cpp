// save, reload and load.

#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <nvpflow/flow.hpp>
#include <nvpflow/spec.hpp>

#include "../../cpp/src/io/model_file.hpp"
#include "arrays.hpp"
#include "bindings.hpp"
#include "bound_flow.hpp"
#include "gil.hpp"
#include "plain_methods.hpp"

namespace nvpflow::python {
namespace {

py::object save(const BoundFlow& self, const Arguments& given) {
  const std::string text = path_of(given.object(0));
  {
    const GilReleased released;
    self.flow.save(text);
  }
  return py::none();
}

py::object reload(BoundFlow& self, const Arguments& given) {
  const std::string text = path_of(given.object(0));
  {
    const GilReleased released;
    self.flow.reload(text);
  }
  return py::none();
}

/// path, expected
py::object load_file(const Arguments& given) {
  const std::string path = path_of(given.object(0));
  const py::object expected = given.object(1);
  LoadedModel model;
  const FlowSpec* spec = expected.is_none() ? nullptr : &expected.cast<const BoundSpec&>();
  {
    const GilReleased released;
    model = load_model(path, spec);
  }
  const std::int64_t count = static_cast<std::int64_t>(model.parameters.size()) / size_of(model.spec.dtype);
  const auto memory = std::make_shared<std::vector<unsigned char>>(std::move(model.parameters));
  const py::object flat = owning_array(memory, memory->data(), model.spec.dtype, count);
  const py::object report =
      model.import_report.empty() ? py::object(py::none()) : py::object(py::str(model.import_report));
  return py::make_tuple(BoundSpec(model.spec), flat, low_or_none(model.mean_low), model.column_names,
                        model.context_names, as_python(model.threshold), report);
}

}  // namespace

void add_file_methods(py::class_<BoundFlow>& type) {
  for (PyMethodDef* method : {
           plain<&save>("save", 1, 1, {"path"},
                        "save($self, path)\n--\n\n"
                        "Write the flow to one safetensors file, atomically: on failure an old file stays as it was."),
           plain<&reload>(
               "reload", 1, 1, {"path"},
               "reload($self, path)\n--\n\n"
               "Replace the weights by those of a model file of the same spec. Other threads may call the flow "
               "meanwhile:\n"
               "each call sees the old or the new ones whole. The threshold is the file's. A file whose column or "
               "context "
               "names\n"
               "differ from the flow's is refused; the flow's stay. On an error (OSError, FileFormatError) nothing has "
               "changed."),
       }) {
    add_method(type, method);
  }
}

void bind_files(py::module_& module) {
  add_function(module, plain<&load_file>("_load_model", 1, 2, {"path", "expected"}, nullptr));
}

}  // namespace nvpflow::python
