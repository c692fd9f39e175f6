// A naive RealNVP in double precision, one row at a time, from the formulas alone. It shares no code with the library:
// FlowSpec and ParamLayout tell it only what the layers are and where each named parameter lies.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <nvpflow/spec.hpp>

namespace oracle {

inline double activate(nvpflow::Activation kind, double u) {
  using nvpflow::Activation;
  switch (kind) {
    case Activation::relu:
      return u > 0 ? u : 0 * u;  // 0 * u keeps NaN
    case Activation::leaky_relu:
      return u > 0 ? u : 0.01 * u;
    case Activation::elu:
      return u > 0 ? u : std::expm1(u);
    case Activation::gelu:
      return 0.5 * u * std::erfc(-u / std::sqrt(2.0));
    case Activation::silu:
      return u / (1 + std::exp(-u));
    case Activation::tanh:
      return std::tanh(u);
    case Activation::sigmoid:
      return 1 / (1 + std::exp(-u));
    case Activation::softplus:
      return std::fmax(u, 0.0) + std::log1p(std::exp(-std::fabs(u)));
  }
  throw std::logic_error("the oracle does not know this activation");
}

class Flow {
 public:
  using Row = std::vector<double>;
  struct Result {
    Row values;      // [D]
    double log_det;  // of the direction that was run
  };
  struct Conditioner {
    Row log_scale, shift;  // [|b|]
  };

  Flow(nvpflow::FlowSpec spec, std::vector<double> parameters)
      : spec_(std::move(spec)), layout_(spec_), parameters_(std::move(parameters)) {
    if (static_cast<std::int64_t>(parameters_.size()) != layout_.size())
      throw std::logic_error("wrong parameter count");
  }

  std::vector<double>& parameters() { return parameters_; }

  Result forward(const Row& x) const {
    Result result{x, 0};
    for (std::size_t i = 0; i < spec_.layers.size(); ++i) result.log_det += apply(i, /*forward=*/true, result.values);
    return settled(x, std::move(result), -HUGE_VAL);
  }

  Result inverse(const Row& z) const {
    Result result{z, 0};
    for (std::size_t i = spec_.layers.size(); i-- > 0;) result.log_det += apply(i, /*forward=*/false, result.values);
    return settled(z, std::move(result), HUGE_VAL);
  }

  double log_prob(const Row& x) const {
    const Result result = forward(x);
    double squares = 0;
    for (const double z : result.values) squares += z * z;
    const double log_2_pi = std::log(2 * std::acos(-1.0));
    return -0.5 * (static_cast<double>(x.size()) * log_2_pi + squares) + result.log_det;
  }

  double nll(const std::vector<Row>& rows) const {
    double sum = 0;
    for (const Row& row : rows) sum -= log_prob(row);
    return sum / static_cast<double>(rows.size());
  }

  /// Log-scale and shift of coupling layer `index` on that layer's own input.
  Conditioner conditioner(std::size_t index, const Row& x) const {
    const auto& layer = std::get<nvpflow::Coupling>(spec_.layers[index]);
    Row g;
    for (const std::size_t i : others(members(layer.transformed))) g.push_back(x[i]);
    const std::string prefix = "flow_" + std::to_string(coupling_number(index)) + "_";
    for (std::size_t j = 0; j < layer.network.hidden_sizes.size(); ++j) {
      g = dense(prefix + "coupling_dense_" + std::to_string(j), g);
      for (double& value : g) value = activate(layer.network.activation, value);
    }
    Row t = dense(prefix + "translation", g);
    const auto* affine = std::get_if<nvpflow::Affine>(&layer.transform);
    if (affine == nullptr) return {Row(t.size(), 0.0), std::move(t)};
    Row s = dense(prefix + "scale", g);
    for (double& value : s) value = log_scale(affine->log_scale, value);
    return {std::move(s), std::move(t)};
  }

 private:
  /// NaN is for rows that came in with NaN or inf: of a finite row, what got lost as inf - inf on the way is infinite.
  static Result settled(const Row& given, Result result, double lost_log_det) {
    bool finite = true;
    for (const double value : given) finite = finite && std::isfinite(value);
    for (double& value : result.values) {
      if (!finite) value = std::nan("");
      if (finite && std::isnan(value)) value = HUGE_VAL;
    }
    if (!finite || std::isnan(result.log_det)) result.log_det = finite ? lost_log_det : std::nan("");
    return result;
  }

  static double log_scale(const nvpflow::LogScale& scale, double u) {
    if (scale.function == nvpflow::LogScale::Function::tanh) return scale.factor * std::tanh(u / scale.divisor);
    throw std::logic_error("a log-scale function that the oracle does not know");
  }

  std::vector<std::size_t> members(const nvpflow::FeatureSet& set) const {
    using Name = nvpflow::FeatureSet::Name;
    const auto features = static_cast<std::size_t>(spec_.input_size), half = features / 2;
    std::vector<std::size_t> list;
    for (std::size_t i = 0; i < features; ++i) {
      const bool in = set.name == Name::first_half    ? i < half
                      : set.name == Name::second_half ? i >= half
                      : set.name == Name::even        ? i % 2 == 0
                      : set.name == Name::odd         ? i % 2 == 1
                      : set.name == Name::all
                          ? true
                          : std::count(set.indices.begin(), set.indices.end(), static_cast<std::int64_t>(i)) > 0;
      if (in) list.push_back(i);
    }
    return list;
  }

  std::vector<std::size_t> others(const std::vector<std::size_t>& set) const {
    std::vector<std::size_t> list;
    for (std::size_t i = 0; i < static_cast<std::size_t>(spec_.input_size); ++i) {
      if (std::count(set.begin(), set.end(), i) == 0) list.push_back(i);
    }
    return list;
  }

  std::size_t coupling_number(std::size_t index) const {
    std::size_t number = 0;
    for (std::size_t i = 0; i < index; ++i) number += std::holds_alternative<nvpflow::Coupling>(spec_.layers[i]);
    return number;
  }

  const double* tensor(const std::string& name) const {
    const nvpflow::TensorInfo* info = layout_.find(name);
    if (info == nullptr) throw std::logic_error("the layout has no " + name);
    return parameters_.data() + info->offset;
  }

  Row dense(const std::string& name, const Row& in) const {
    const double* kernel = tensor(name + ".kernel");  // [in, out]
    const double* bias = tensor(name + ".bias");
    const std::size_t width = static_cast<std::size_t>(layout_.find(name + ".bias")->size);
    Row out(bias, bias + width);
    for (std::size_t i = 0; i < in.size(); ++i)
      for (std::size_t o = 0; o < width; ++o) out[o] += in[i] * kernel[i * width + o];
    return out;
  }

  /// Replaces the row by the layer's output; returns the layer's log_det.
  double apply(std::size_t index, bool forward, Row& row) const {
    return std::visit([&](const auto& layer) { return apply(layer, index, forward, row); }, spec_.layers[index]);
  }

  double apply(const nvpflow::Standardize&, std::size_t index, bool forward, Row& row) const {
    const std::string prefix = "standardize_" + std::to_string(index);
    const double* mean = tensor(prefix + ".mean");
    const double* log_std = tensor(prefix + ".log_std");
    double log_det = 0;
    for (std::size_t d = 0; d < row.size(); ++d) {
      row[d] = forward ? (row[d] - mean[d]) * std::exp(-log_std[d]) : row[d] * std::exp(log_std[d]) + mean[d];
      log_det += forward ? -log_std[d] : log_std[d];
    }
    return log_det;
  }

  double apply(const nvpflow::Coupling& layer, std::size_t index, bool forward, Row& row) const {
    const auto [s, t] = conditioner(index, row);
    const std::vector<std::size_t> b = members(layer.transformed);
    const bool by_formula = forward != layer.inverse;
    double log_det = 0;
    for (std::size_t i = 0; i < s.size(); ++i) {
      double& value = row[b[i]];
      value = by_formula ? value * std::exp(s[i]) + t[i] : (value - t[i]) * std::exp(-s[i]);
      log_det += by_formula ? s[i] : -s[i];
    }
    return log_det;
  }

  double apply(const nvpflow::ActNorm& layer, std::size_t index, bool forward, Row& row) const {
    const std::string prefix = "actnorm_" + std::to_string(index);
    const double* log_scale = tensor(prefix + ".log_scale");
    const double* shift = tensor(prefix + ".shift");
    const bool by_formula = forward != layer.inverse;
    double log_det = 0;
    for (std::size_t d = 0; d < row.size(); ++d) {
      row[d] = by_formula ? row[d] * std::exp(log_scale[d]) + shift[d] : (row[d] - shift[d]) * std::exp(-log_scale[d]);
      log_det += by_formula ? log_scale[d] : -log_scale[d];
    }
    return log_det;
  }

  double apply(const nvpflow::Permutation& layer, std::size_t, bool forward, Row& row) const {
    const Row before = row;
    for (std::size_t j = 0; j < row.size(); ++j) {
      const auto i = static_cast<std::size_t>(layer.order[j]);
      if (forward) {
        row[j] = before[i];
      } else {
        row[i] = before[j];
      }
    }
    return 0;
  }

  double apply(const nvpflow::LULinear&, std::size_t, bool, Row&) const {
    throw std::logic_error("a layer that the oracle does not know");
  }

  nvpflow::FlowSpec spec_;
  nvpflow::ParamLayout layout_;
  std::vector<double> parameters_;
};

/// Central difference of f along one coordinate, which is restored. Step: cube root of the unit round-off, where the
/// truncation and the rounding error meet at about 4e-11 of f's scale.
inline double central_difference(double& coordinate, const std::function<double()>& f) {
  const double value = coordinate;
  const double step = 6e-6 * std::fmax(1.0, std::fabs(value));
  coordinate = value + step;
  const double upper = f();
  const double width_upper = coordinate;
  coordinate = value - step;
  const double lower = f();
  const double width = width_upper - coordinate;
  coordinate = value;
  return (upper - lower) / width;
}

}  // namespace oracle
