// nvpflow._core.FlowSpec, and the layout of its parameters.

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <nvpflow/spec.hpp>
#include <nvpflow/spec_json.hpp>

#include "bindings.hpp"
#include "bound_spec.hpp"

namespace nvpflow::python {
namespace {

/// A value that all coupling layers agree on; of(layer): the value of one, or nothing where it has none.
template <class Of>
py::object common(const FlowSpec& spec, const std::string& name, Of of) {
  py::object found;
  for (const LayerSpec& layer : spec.layers) {
    const auto* coupling = std::get_if<Coupling>(&layer);
    if (coupling == nullptr) continue;
    const auto value = of(*coupling);
    if (!value) throw py::attribute_error("a coupling layer has no one " + name + "; read spec.layers");
    const py::object object = py::cast(*value);
    if (!found) found = object;
    if (!found.equal(object)) {
      throw py::attribute_error(name + " differs between the coupling layers; read it from each layer of spec.layers");
    }
  }
  if (!found) throw py::attribute_error(name + " belongs to coupling layers, and this spec has none");
  return found;
}

/// Layers of mlps; of residual networks the width, which is another thing: both in one spec do not agree.
py::object common_hidden_sizes(const FlowSpec& spec) {
  using Sizes = std::pair<int, std::vector<std::int64_t>>;
  const auto sizes = [](const Network& network) { return Sizes{static_cast<int>(network.kind), network.hidden_sizes}; };
  const auto of = [&](const Coupling& layer) -> std::optional<Sizes> {
    const auto& other = layer.translation_network;
    return other && sizes(*other) != sizes(layer.network) ? std::nullopt : std::optional(sizes(layer.network));
  };
  return py::tuple(common(spec, "hidden_sizes", of)[py::int_(1)]);
}

py::object common_activation(const FlowSpec& spec) {
  return common(spec, "activation", [](const Coupling& layer) -> std::optional<std::string> {
    const bool one = !layer.translation_network || layer.translation_network->activation == layer.network.activation;
    return one ? std::optional(std::string(name_of(layer.network.activation))) : std::nullopt;
  });
}

/// B of B tanh(u / B).
py::object common_scale_bound(const FlowSpec& spec) {
  return common(spec, "scale_bound", [](const Coupling& layer) -> std::optional<double> {
    const auto* affine = std::get_if<Affine>(&layer.transform);
    const bool bounded = affine != nullptr && affine->log_scale == LogScale::bounded(affine->log_scale.factor);
    return bounded ? std::optional(affine->log_scale.factor) : std::nullopt;
  });
}

BoundSpec spec_from_text(const std::string& text) {
  BoundSpec spec = parse_spec(text);
  spec.validate();
  return spec;
}

/// Names of the tensors of which it is true.
py::set tensors_that(bool TensorInfo::* is_true, const FlowSpec& spec) {
  const ParamLayout layout(spec);
  py::set names;
  for (const TensorInfo& t : layout.tensors()) {
    if (t.*is_true) names.add(t.name);
  }
  return names;
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
      .def_property_readonly("context_size", [](const BoundSpec& s) { return s.context_size; })
      .def_property_readonly("standardize_context", [](const BoundSpec& s) { return s.standardize_context; })
      .def_property_readonly("num_flows", [](const BoundSpec& s) { return s.num_couplings(); })
      .def_property_readonly("hidden_sizes", [](const BoundSpec& s) { return common_hidden_sizes(s); })
      .def_property_readonly("activation", [](const BoundSpec& s) { return common_activation(s); })
      .def_property_readonly("scale_bound", [](const BoundSpec& s) { return common_scale_bound(s); })
      .def_property_readonly("standardize", [](const BoundSpec& s) { return s.begins_with_standardize(); })
      .def_property_readonly("dtype", [](const BoundSpec& s) { return std::string(name_of(s.dtype)); })
      .def_property_readonly("_takes_float64_rows", [](const BoundSpec& s) { return takes_float64_rows(s); })
      .def_property_readonly("_is_bounded", [](const BoundSpec& s) { return is_bounded(s.base); })
      .def_property_readonly("_has_bounds", [](const BoundSpec& s) { return s.bounds() != nullptr; })
      .def("to_json", [](const BoundSpec& s) { return to_json(s); })
      .def("_to_full_json", [](const BoundSpec& s) { return to_full_json(s); })
      .def_static("from_json", &spec_from_text)
      .def(
          "with_dtype",
          [](const BoundSpec& s, const std::string& dtype) { return BoundSpec(s.with_dtype(parse_dtype(dtype))); },
          py::arg("dtype"))
      .def("__eq__",
           [](const BoundSpec& a, const py::object& b) {
             return py::isinstance<BoundSpec>(b) && a == b.cast<const BoundSpec&>();
           })
      .def("__hash__", [](const BoundSpec& s) { return py::hash(py::str(to_json(s))); })
      .def(py::pickle([](const BoundSpec& s) { return to_json(s); }, &spec_from_text));
  module.def("activation_names", [] { return py::tuple(py::cast(activation_names())); });
  module.def("_trained", [](const BoundSpec& spec) { return tensors_that(&TensorInfo::trained, spec); });
  module.def("_from_data", [](const BoundSpec& spec) { return tensors_that(&TensorInfo::from_data, spec); });
  module.def("_layout_of", [](const BoundSpec& spec) { return tensors_of(ParamLayout(spec)); });
}

}  // namespace nvpflow::python
