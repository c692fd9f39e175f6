// nvpflow._core.FlowSpec, and the layout of its parameters.

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <nvpflow/error.hpp>
#include <nvpflow/spec.hpp>

#include "../../cpp/src/io/spec_json.hpp"
#include "bindings.hpp"
#include "bound_spec.hpp"

namespace nvpflow::python {
namespace {

const LayerSpec& first_coupling(const FlowSpec& spec) {
  for (const LayerSpec& layer : spec.layers) {
    if (layer.kind == LayerKind::coupling) return layer;
  }
  throw Error(ErrorCode::invalid_argument, "the spec has no coupling layer");
}

bool has_standardize(const FlowSpec& spec) {
  return std::any_of(spec.layers.begin(), spec.layers.end(),
                     [](const LayerSpec& layer) { return layer.kind == LayerKind::standardize; });
}

std::string spec_repr(const FlowSpec& spec) {
  const LayerSpec& layer = first_coupling(spec);
  const FlowSpec regular = FlowSpec::real_nvp(spec.input_size, spec.num_couplings(), layer.hidden_sizes,
                                              layer.activation, layer.scale_bound, has_standardize(spec), spec.dtype);
  if (spec != regular) return "FlowSpec.from_json('" + spec_to_json(spec) + "')";
  std::ostringstream text;
  text << "FlowSpec(input_size=" << spec.input_size << ", num_flows=" << spec.num_couplings()
       << ", hidden_sizes=" << py::repr(py::tuple(py::cast(layer.hidden_sizes))).cast<std::string>() << ", activation='"
       << name_of(layer.activation) << "', scale_bound=" << py::repr(py::float_(layer.scale_bound)).cast<std::string>()
       << ", standardize=" << (has_standardize(spec) ? "True" : "False") << ", dtype='" << name_of(spec.dtype) << "')";
  return text.str();
}

BoundSpec spec_from_text(const std::string& text) {
  BoundSpec spec = spec_from_json(text);
  spec.validate();
  return spec;
}

}  // namespace

py::list tensors_of(const ParamLayout& layout) {
  py::list list;
  for (const TensorInfo& t : layout.tensors()) {
    list.append(py::make_tuple(t.name, py::tuple(py::cast(t.shape)), t.offset));
  }
  return list;
}

void bind_spec(py::module_& module) {
  py::class_<BoundSpec>(module, "FlowSpec", "What a flow is: sizes, layers and dtype; immutable.")
      .def(py::init([](std::int64_t input_size, std::int64_t num_flows, std::vector<std::int64_t> hidden_sizes,
                       const std::string& activation, double scale_bound, bool standardize, const std::string& dtype) {
             return BoundSpec(FlowSpec::real_nvp(input_size, num_flows, std::move(hidden_sizes),
                                                 parse_activation(activation), scale_bound, standardize,
                                                 parse_dtype(dtype)));
           }),
           py::arg("input_size"), py::arg("num_flows") = 4, py::arg("hidden_sizes") = std::vector<std::int64_t>{256},
           py::arg("activation") = "relu", py::arg("scale_bound") = 1.0, py::arg("standardize") = false,
           py::arg("dtype") = "float32")
      .def_property_readonly("input_size", [](const BoundSpec& s) { return s.input_size; })
      .def_property_readonly("num_flows", [](const BoundSpec& s) { return s.num_couplings(); })
      .def_property_readonly("hidden_sizes",
                             [](const BoundSpec& s) { return py::tuple(py::cast(first_coupling(s).hidden_sizes)); })
      .def_property_readonly("activation",
                             [](const BoundSpec& s) { return std::string(name_of(first_coupling(s).activation)); })
      .def_property_readonly("scale_bound", [](const BoundSpec& s) { return first_coupling(s).scale_bound; })
      .def_property_readonly("standardize", [](const BoundSpec& s) { return has_standardize(s); })
      .def_property_readonly("dtype", [](const BoundSpec& s) { return std::string(name_of(s.dtype)); })
      .def_property_readonly("_takes_float64_rows", [](const BoundSpec& s) { return takes_float64_rows(s); })
      .def("to_json", [](const BoundSpec& s) { return spec_to_json(s); })
      .def_static("from_json", &spec_from_text)
      .def("__eq__",
           [](const BoundSpec& a, const py::object& b) {
             return py::isinstance<BoundSpec>(b) && a == b.cast<const BoundSpec&>();
           })
      .def("__hash__", [](const BoundSpec& s) { return py::hash(py::str(spec_to_json(s))); })
      .def("__repr__", [](const BoundSpec& s) { return spec_repr(s); })
      .def(py::pickle([](const BoundSpec& s) { return spec_to_json(s); }, &spec_from_text));
  module.def("activation_names", [] { return py::tuple(py::cast(activation_names())); });
  module.def("_layout_of", [](const BoundSpec& spec) { return tensors_of(ParamLayout(spec)); });
}

}  // namespace nvpflow::python
