// nvpflow._core.FlowSpec, and the layout of its parameters.

#include <pybind11/stl.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <nvpflow/spec.hpp>
#include <nvpflow/spec_json.hpp>

#include "../../cpp/src/layers/layer.hpp"
#include "../../cpp/src/overloaded.hpp"
#include "bindings.hpp"
#include "bound_spec.hpp"

namespace nvpflow::python {
namespace {

py::object value_of(const layers::Field& field) {
  return std::visit(
      Overloaded{[](const Activation* value) -> py::object { return py::str(std::string(name_of(*value))); },
                 [](const std::vector<std::int64_t>* value) -> py::object { return py::tuple(py::cast(*value)); },
                 [](const auto* value) -> py::object { return py::cast(*value); }},
      field.value);
}

const char* class_of(const Coupling&) { return "Coupling"; }
const char* class_of(const Standardize&) { return "Standardize"; }

/// "Coupling(swapped=False, ...)", which Python can evaluate.
std::string layer_repr(LayerSpec layer) {
  std::string text = std::visit([](const auto& kind) { return class_of(kind); }, layer);
  text += "(";
  const char* separator = "";
  for (const layers::Field& field : layers::fields(layer)) {
    text.append(separator).append(field.name).append("=").append(py::repr(value_of(field)).cast<std::string>());
    separator = ", ";
  }
  return text + ")";
}

/// A field on which all coupling layers agree.
py::object common_field(const FlowSpec& spec, const std::string& name) {
  py::object found;
  for (LayerSpec layer : spec.layers) {
    if (!std::holds_alternative<Coupling>(layer)) continue;
    for (const layers::Field& field : layers::fields(layer)) {
      if (field.name != name) continue;
      const py::object value = value_of(field);
      if (!found) found = value;
      if (!found.equal(value)) {
        throw py::attribute_error(name +
                                  " differs between the coupling layers; read it from each layer of spec.layers");
      }
    }
  }
  return found;
}

bool has_standardize(const FlowSpec& spec) {
  return std::any_of(spec.layers.begin(), spec.layers.end(),
                     [](const LayerSpec& layer) { return std::holds_alternative<Standardize>(layer); });
}

/// As real_nvp() makes it, so that the arguments of FlowSpec say all of it.
bool is_regular(const FlowSpec& spec) {
  const auto first = std::find_if(spec.layers.begin(), spec.layers.end(),
                                  [](const LayerSpec& layer) { return std::holds_alternative<Coupling>(layer); });
  const auto& coupling = std::get<Coupling>(*first);
  return spec == FlowSpec::real_nvp(spec.input_size, spec.num_couplings(), coupling.hidden_sizes, coupling.activation,
                                    coupling.scale_bound, has_standardize(spec), spec.dtype);
}

std::string spec_repr(const FlowSpec& spec) {
  std::string text = "FlowSpec";
  if (!is_regular(spec)) {
    text += ".from_layers(input_size=" + std::to_string(spec.input_size) + ", layers=[";
    for (std::size_t i = 0; i < spec.layers.size(); ++i) text += (i == 0 ? "" : ", ") + layer_repr(spec.layers[i]);
    return text + "], dtype='" + std::string(name_of(spec.dtype)) + "')";
  }
  text += "(input_size=" + std::to_string(spec.input_size) + ", num_flows=" + std::to_string(spec.num_couplings());
  for (const char* const name : {"hidden_sizes", "activation", "scale_bound"}) {
    text.append(", ").append(name).append("=").append(py::repr(common_field(spec, name)).cast<std::string>());
  }
  return text + ", standardize=" + (has_standardize(spec) ? "True" : "False") + ", dtype='" +
         std::string(name_of(spec.dtype)) + "')";
}

/// False where the object is no layer.
template <std::size_t... Index>
bool add_layer(const py::handle& object, std::vector<LayerSpec>& layers, std::index_sequence<Index...>) {
  return ((py::isinstance<std::variant_alternative_t<Index, LayerSpec>>(object) &&
           (layers.emplace_back(object.cast<const std::variant_alternative_t<Index, LayerSpec>&>()), true)) ||
          ...);
}

BoundSpec spec_from_layers(std::int64_t input_size, const py::iterable& layers, const std::string& dtype) {
  FlowSpec spec;
  spec.input_size = input_size;
  spec.dtype = parse_dtype(dtype);
  for (const py::handle layer : layers) {
    if (!add_layer(layer, spec.layers, std::make_index_sequence<std::variant_size_v<LayerSpec>>())) {
      throw py::type_error("layers[" + std::to_string(spec.layers.size()) + "] is " +
                           py::str(py::type::of(layer).attr("__name__")).cast<std::string>() +
                           ", expected a layer, one of nvpflow.layers");
    }
  }
  spec.validate();
  return spec;
}

/// What every kind of layer has in Python.
template <class Layer>
py::class_<Layer> bind_layer(py::module_& module, const char* name, const char* doc) {
  py::class_<Layer> bound(module, name, doc);
  bound.def("__repr__", [](const Layer& self) { return layer_repr(self); })
      .def("__eq__",
           [](const Layer& a, const py::object& b) { return py::isinstance<Layer>(b) && a == b.cast<const Layer&>(); });
  Layer defaults;
  for (const layers::Field& field : layers::fields(defaults)) {
    bound.def_property_readonly(field.name, [name = std::string(field.name)](Layer self) -> py::object {
      for (const layers::Field& own : layers::fields(self)) {
        if (own.name == name) return value_of(own);
      }
      throw py::attribute_error(name);
    });
  }
  bound.def("__hash__", [](const Layer& self) { return py::hash(py::str(layer_repr(self))); });
  bound.attr("__module__") = "nvpflow.layers";
  return bound;
}

void bind_layers(py::module_& module) {
  bind_layer<Coupling>(module, "Coupling",
                       "An affine coupling layer: y_b = x_b * exp(s) + t with s = scale_bound * tanh(u / scale_bound)\n"
                       "and [u, t] = MLP(x_a). `swapped` says whether the second half is a; else the first is.")
      .def(py::init([](bool swapped, std::vector<std::int64_t> hidden_sizes, const std::string& activation,
                       double scale_bound) {
             return Coupling{swapped, std::move(hidden_sizes), parse_activation(activation), scale_bound};
           }),
           py::arg("swapped") = false, py::arg("hidden_sizes") = std::vector<std::int64_t>{256},
           py::arg("activation") = "relu", py::arg("scale_bound") = 1.0)
      .def(py::pickle(
          [](const Coupling& self) {
            return py::make_tuple(self.swapped, self.hidden_sizes, std::string(name_of(self.activation)),
                                  self.scale_bound);
          },
          [](const py::tuple& state) {
            return Coupling{state[0].cast<bool>(), state[1].cast<std::vector<std::int64_t>>(),
                            parse_activation(state[2].cast<std::string>()), state[3].cast<double>()};
          }));
  bind_layer<Standardize>(module, "Standardize",
                          "y = (x - mean) * exp(-log_std), one mean and log_std per feature, set from the data.")
      .def(py::init<>())
      .def(py::pickle([](const Standardize&) { return py::tuple(); }, [](const py::tuple&) { return Standardize{}; }));
}

BoundSpec spec_from_text(const std::string& text) {
  BoundSpec spec = parse_spec(text);
  spec.validate();
  return spec;
}

/// Names of the tensors that training changes by their gradients.
py::set trained_of(const ParamLayout& layout) {
  py::set names;
  for (const TensorInfo& t : layout.tensors()) {
    if (t.trained) names.add(t.name);
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
  bind_layers(module);
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
      .def_property_readonly("layers",
                             [](const BoundSpec& s) {
                               py::tuple layers(s.layers.size());
                               for (std::size_t i = 0; i < s.layers.size(); ++i) {
                                 layers[i] = std::visit([](const auto& layer) { return py::cast(layer); }, s.layers[i]);
                               }
                               return layers;
                             })
      .def_property_readonly("hidden_sizes", [](const BoundSpec& s) { return common_field(s, "hidden_sizes"); })
      .def_property_readonly("activation", [](const BoundSpec& s) { return common_field(s, "activation"); })
      .def_property_readonly("scale_bound", [](const BoundSpec& s) { return common_field(s, "scale_bound"); })
      .def_property_readonly("standardize", [](const BoundSpec& s) { return has_standardize(s); })
      .def_property_readonly("dtype", [](const BoundSpec& s) { return std::string(name_of(s.dtype)); })
      .def_property_readonly("_takes_float64_rows", [](const BoundSpec& s) { return takes_float64_rows(s); })
      .def("to_json", [](const BoundSpec& s) { return to_json(s); })
      .def_static("from_json", &spec_from_text)
      .def_static("from_layers", &spec_from_layers, py::arg("input_size"), py::arg("layers"),
                  py::arg("dtype") = "float32")
      .def(
          "with_dtype",
          [](const BoundSpec& s, const std::string& dtype) { return BoundSpec(s.with_dtype(parse_dtype(dtype))); },
          py::arg("dtype"))
      .def("__eq__",
           [](const BoundSpec& a, const py::object& b) {
             return py::isinstance<BoundSpec>(b) && a == b.cast<const BoundSpec&>();
           })
      .def("__hash__", [](const BoundSpec& s) { return py::hash(py::str(to_json(s))); })
      .def("__repr__", [](const BoundSpec& s) { return spec_repr(s); })
      .def(py::pickle([](const BoundSpec& s) { return to_json(s); }, &spec_from_text));
  module.def("activation_names", [] { return py::tuple(py::cast(activation_names())); });
  module.def("_trained", [](const BoundSpec& spec) { return trained_of(ParamLayout(spec)); });
  module.def("_layout_of", [](const BoundSpec& spec) { return tensors_of(ParamLayout(spec)); });
}

}  // namespace nvpflow::python
