// Naive flows in double precision, one row at a time, from the formulas alone. They share no code with the library:
// FlowSpec and ParamLayout tell them only what the layers are and where each named parameter lies.
#pragma once

#include <algorithm>
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

#include "spline_oracle.hpp"

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

inline double log_scale(const nvpflow::LogScale& scale, double u) {
  using Function = nvpflow::LogScale::Function;
  const double v = u / scale.divisor, sign = scale.negated ? -1 : 1;
  switch (scale.function) {
    case Function::tanh:
      return scale.factor * std::tanh(v);
    case Function::softsign:
      return scale.factor * v / (1 + std::fabs(v));
    case Function::atan:
      return scale.factor * std::atan(v);
    case Function::identity:
      return u;
    case Function::sigmoid:
      if (scale.low == 0)  // the logarithm of a sigmoid that rounds to zero would be lost
        return sign * (std::log(scale.high) - activate(nvpflow::Activation::softplus, -(u + scale.offset)));
      return sign *
             std::log(scale.low + (scale.high - scale.low) * activate(nvpflow::Activation::sigmoid, u + scale.offset));
    case Function::softplus:
      return sign *
             std::log(std::fmin(activate(nvpflow::Activation::softplus, u + scale.offset) + scale.low, scale.high));
  }
  throw std::logic_error("the oracle does not know this log-scale");
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

  // context: [C]; empty where the flow has none.

  Result forward(const Row& x, const Row& context = {}) const {
    Result result{x, 0};
    const Row c = standardized(context);
    for (std::size_t i = 0; i < spec_.layers.size(); ++i) result.log_det += apply(i, Walk::forward, result.values, c);
    return settled(x, context, std::move(result), -HUGE_VAL);
  }

  Result inverse(const Row& z, const Row& context = {}) const {
    Result result{z, 0};
    const Row c = standardized(context);
    for (std::size_t i = spec_.layers.size(); i-- > 0;) result.log_det += apply(i, Walk::inverse, result.values, c);
    return settled(z, context, std::move(result), HUGE_VAL);
  }

  double log_prob(const Row& x, const Row& context = {}) const {
    const Result result = forward(x, context);
    return base_density(result.values) + result.log_det;
  }

  /// The log-density of latents under the base.
  double base_density(const Row& latents) const {
    return std::visit([&](const auto& base) { return log_density(base, latents); }, spec_.base);
  }

  /// contexts: one for each row; none where the flow has no context.
  double nll(const std::vector<Row>& rows, const std::vector<Row>& contexts = {}) const {
    double sum = 0;
    for (std::size_t i = 0; i < rows.size(); ++i) sum -= log_prob(rows[i], contexts.empty() ? Row{} : contexts[i]);
    return sum / static_cast<double>(rows.size());
  }

  /// Log-scale and shift of coupling layer `index` on that layer's own input.
  Conditioner conditioner(std::size_t index, const Row& x, const Row& context = {}) const {
    return conditioner(std::get<nvpflow::Coupling>(spec_.layers[index]), index, x, standardized(context));
  }

 private:
  enum class Walk { forward, inverse };

  static double log_density(const nvpflow::NormalBase&, const Row& latents) {
    double squares = 0;
    for (const double z : latents) squares += z * z;
    const double log_2_pi = std::log(2 * std::acos(-1.0));
    return -0.5 * (static_cast<double>(latents.size()) * log_2_pi + squares);
  }

  static double log_density(const nvpflow::UniformBase& base, const Row& latents) {
    double sum = 0;
    for (const double z : latents) {
      if (std::isnan(z)) return z;
      sum += base.low <= z && z <= base.high ? -std::log(base.high - base.low) : -HUGE_VAL;
    }
    return sum;
  }

  double log_density(const nvpflow::StudentTBase&, const Row& latents) const {
    const double* log_df = tensor("base.log_df");
    double sum = 0;
    for (std::size_t j = 0; j < latents.size(); ++j) {
      const double df = std::exp(log_df[j]);
      sum += std::lgamma((df + 1) / 2) - std::lgamma(df / 2) - std::log(df * std::acos(-1.0)) / 2 -
             (df + 1) / 2 * std::log1p(latents[j] * latents[j] / df);
    }
    return sum;
  }

  /// Component by component, by forward substitution in L and with the largest term taken out of the sum.
  double log_density(const nvpflow::MixtureBase& base, const Row& latents) const {
    const std::size_t size = latents.size(), components = static_cast<std::size_t>(base.components);
    const double *logits = tensor("base.logits"), *log_scales = tensor("base.log_scales");
    const double* lower = base.covariance == nvpflow::MixtureBase::Covariance::full ? tensor("base.lower") : nullptr;
    double total = 0, most = -HUGE_VAL, sum = 0;
    for (std::size_t m = 0; m < components; ++m) total += std::exp(logits[m]);
    Row logs;
    for (std::size_t m = 0; m < components; ++m) {
      double log_p = logits[m] - std::log(total) - static_cast<double>(size) * std::log(2 * std::acos(-1.0)) / 2;
      Row away(size);
      for (std::size_t i = 0; i < size; ++i) {
        away[i] = latents[i] - tensor("base.means")[m * size + i];
        for (std::size_t j = 0; lower != nullptr && j < i; ++j) {
          away[i] -= lower[m * (size * (size - 1) / 2) + i * (i - 1) / 2 + j] * away[j];
        }
        const double log_scale = log_scales[m * size + i], whitened = away[i] * std::exp(-log_scale);
        log_p -= log_scale + whitened * whitened / 2;
      }
      logs.push_back(log_p);
      most = std::fmax(most, log_p);
    }
    for (const double log_p : logs) sum += std::exp(log_p - most);
    return most + std::log(sum);
  }

  /// NaN is for rows that came in with NaN or inf: of a finite row, what got lost as inf - inf on the way is infinite.
  static Result settled(const Row& given, const Row& context, Result result, double lost_log_det) {
    bool finite = true;
    for (const double value : given) finite = finite && std::isfinite(value);
    for (const double value : context) finite = finite && std::isfinite(value);
    for (double& value : result.values) {
      if (!finite) value = std::nan("");
      if (finite && std::isnan(value)) value = HUGE_VAL;
    }
    if (!finite || std::isnan(result.log_det)) result.log_det = finite ? lost_log_det : std::nan("");
    return result;
  }

  /// Of each feature, whether the coupling transforms it.
  std::vector<bool> is_transformed(const nvpflow::FeatureSet& set) const {
    using Name = nvpflow::FeatureSet::Name;
    const auto size = static_cast<std::size_t>(spec_.input_size);
    std::vector<bool> in(size);
    for (std::size_t f = 0; f < size; ++f) {
      in[f] = (set.name == Name::first_half && f < size / 2) || (set.name == Name::second_half && f >= size / 2) ||
              (set.name == Name::even && f % 2 == 0) || (set.name == Name::odd && f % 2 == 1) || set.name == Name::all;
    }
    for (const std::int64_t f : set.indices) in[static_cast<std::size_t>(f)] = true;
    return in;
  }

  std::string prefix_of_coupling(std::size_t index) const {
    std::size_t number = 0;
    for (std::size_t i = 0; i < index; ++i) number += std::holds_alternative<nvpflow::Coupling>(spec_.layers[i]);
    return "flow_" + std::to_string(number) + "_";
  }

  const double* tensor(const std::string& name) const {
    const nvpflow::TensorInfo* info = layout_.find(name);
    if (info == nullptr) throw std::logic_error("the layout has no " + name);
    return parameters_.data() + info->offset;
  }

  // ---- networks

  Row dense(const std::string& name, const Row& in) const {
    const double* kernel = tensor(name + ".kernel");  // [in, out]
    const double* bias = tensor(name + ".bias");
    const std::size_t width = static_cast<std::size_t>(layout_.find(name + ".bias")->size);
    Row out(bias, bias + width);
    for (std::size_t i = 0; i < in.size(); ++i)
      for (std::size_t o = 0; o < width; ++o) out[o] += in[i] * kernel[i * width + o];
    return out;
  }

  static Row activated(nvpflow::Activation kind, Row row) {
    for (double& value : row) value = activate(kind, value);
    return row;
  }

  static Row normalized(Row row) {
    const auto n = static_cast<double>(row.size());
    double mean = 0, variance = 0;
    for (const double value : row) mean += value / n;
    for (const double value : row) variance += (value - mean) * (value - mean) / (n - 1);
    for (double& value : row) value = (value - mean) / std::sqrt(variance + 1e-5);
    return row;
  }

  /// What the heads read. `dense_name`: of a perceptron's hidden layers.
  Row hidden(const nvpflow::Network& network, const std::string& prefix, const std::string& dense_name,
             const Row& given, const Row& context) const {
    if (network.kind == nvpflow::Network::Kind::residual) return residual(network, prefix, given, context);
    Row h = given;
    for (std::size_t j = 0; j < network.hidden_sizes.size(); ++j) {
      h = activated(network.activation, dense(prefix + dense_name + "_" + std::to_string(j), h));
      if (network.layer_norm) h = normalized(std::move(h));
    }
    return h;
  }

  Row residual(const nvpflow::Network& network, const std::string& prefix, const Row& given, const Row& context) const {
    Row h = dense(prefix + "initial", given);
    for (std::int64_t j = 0; j < network.num_blocks; ++j) {
      const std::string block = prefix + "block_" + std::to_string(j) + "_";
      Row v = h;
      if (network.block_affines) {
        const double* scale = tensor(block + "affine.scale");
        const double* shift = tensor(block + "affine.shift");
        for (std::size_t i = 0; i < v.size(); ++i) v[i] = v[i] * scale[i] + shift[i];
      }
      for (const char* const layer : {"dense_0", "dense_1"}) v = dense(block + layer, activated(network.activation, v));
      if (network.context_gates) {
        const Row gate = activated(nvpflow::Activation::sigmoid, dense(block + "context", context));
        for (std::size_t i = 0; i < v.size(); ++i) v[i] *= gate[i];
      }
      for (std::size_t i = 0; i < v.size(); ++i) h[i] += v[i];
    }
    return h;
  }

  /// What a coupling's networks read.
  Row given_to(const nvpflow::Coupling& layer, const Row& x, const Row& context) const {
    const std::vector<bool> in = is_transformed(layer.transformed);
    Row given;
    for (std::size_t f = 0; f < x.size(); ++f) {
      if (!in[f]) given.push_back(x[f]);
    }
    given.insert(given.end(), context.begin(), context.end());
    return given;
  }

  Conditioner conditioner(const nvpflow::Coupling& layer, std::size_t index, const Row& x, const Row& context) const {
    const std::string prefix = prefix_of_coupling(index);
    const Row given = given_to(layer, x, context);
    const bool two = layer.translation_network.has_value();
    const Row of_first = hidden(layer.network, prefix, two ? "scale_dense" : "coupling_dense", given, context);
    Row t = dense(prefix + "translation",
                  two ? hidden(*layer.translation_network, prefix, "translation_dense", given, context) : of_first);
    if (std::holds_alternative<nvpflow::Additive>(layer.transform)) return {Row(t.size(), 0.0), std::move(t)};
    Row s = dense(prefix + "scale", of_first);
    for (double& value : s) value = log_scale(std::get<nvpflow::Affine>(layer.transform).log_scale, value);
    return {std::move(s), std::move(t)};
  }

  Row standardized(Row context) const {
    if (!spec_.standardize_context) return context;
    const double* mean = tensor("context.mean");
    const double* log_std = tensor("context.log_std");
    for (std::size_t i = 0; i < context.size(); ++i) context[i] = (context[i] - mean[i]) * std::exp(-log_std[i]);
    return context;
  }

  // ---- layers: each replaces the row by its output and returns its log_det

  double apply(std::size_t index, Walk walk, Row& row, const Row& context) const {
    return std::visit([&](const auto& layer) { return apply(layer, index, walk, row, context); }, spec_.layers[index]);
  }

  static bool runs_backwards(Walk walk, bool inverse) { return (walk == Walk::inverse) != inverse; }

  /// raw [P n]: parameter p of feature i at p n + i.
  double apply_splines(const nvpflow::Spline& spline, const std::vector<bool>& in, const Row& raw, bool backwards,
                       Row& row) const {
    const auto n = static_cast<std::size_t>(std::count(in.begin(), in.end(), true));
    double log_det = 0;
    std::size_t i = 0;
    for (std::size_t f = 0; f < row.size(); ++f) {
      if (!in[f]) continue;
      Row own;
      for (std::size_t p = i++; p < raw.size(); p += n) own.push_back(raw[p]);
      const Spline of_feature(spline, own);
      const SplineResult result = backwards ? of_feature.inverse(row[f]) : of_feature.forward(row[f]);
      row[f] = static_cast<double>(result.value);
      log_det += static_cast<double>(result.log_derivative);
    }
    return log_det;
  }

  double apply_spline_coupling(const nvpflow::Coupling& layer, std::size_t index, bool backwards, Row& row,
                               const Row& context) const {
    const std::string prefix = prefix_of_coupling(index);
    const auto& spline = std::get<nvpflow::Spline>(layer.transform);
    const Row h = hidden(layer.network, prefix, "coupling_dense", given_to(layer, row, context), context);
    Row raw;
    for (const char* const head : {"widths", "heights", "derivatives"}) {
      if (layout_.find(prefix + head + ".bias") == nullptr) continue;
      const Row part = dense(prefix + head, h);
      raw.insert(raw.end(), part.begin(), part.end());
    }
    return apply_splines(spline, is_transformed(layer.transformed), raw, backwards, row);
  }

  double apply(const nvpflow::ElementSpline& layer, std::size_t index, Walk walk, Row& row, const Row&) const {
    Row raw;
    for (const char* const part : {".widths", ".heights", ".derivatives"}) {
      const nvpflow::TensorInfo* info = layout_.find("spline_" + std::to_string(index) + part);
      if (info == nullptr) continue;
      const double* values = parameters_.data() + info->offset;
      raw.insert(raw.end(), values, values + info->size);
    }
    return apply_splines(layer.spline, is_transformed(layer.features), raw, runs_backwards(walk, layer.inverse), row);
  }

  double apply(const nvpflow::Coupling& layer, std::size_t index, Walk walk, Row& row, const Row& context) const {
    if (std::holds_alternative<nvpflow::Spline>(layer.transform)) {
      return apply_spline_coupling(layer, index, runs_backwards(walk, layer.inverse), row, context);
    }
    const auto [s, t] = conditioner(layer, index, row, context);
    const std::vector<bool> in = is_transformed(layer.transformed);
    const bool backwards = runs_backwards(walk, layer.inverse);
    double log_det = 0;
    std::size_t i = 0;
    for (std::size_t f = 0; f < row.size(); ++f) {
      if (!in[f]) continue;
      row[f] = backwards ? (row[f] - t[i]) * std::exp(-s[i]) : row[f] * std::exp(s[i]) + t[i];
      log_det += backwards ? -s[i] : s[i];
      ++i;
    }
    return log_det;
  }

  double apply(const nvpflow::Standardize&, std::size_t index, Walk walk, Row& row, const Row&) const {
    const std::string prefix = "standardize_" + std::to_string(index);
    const double* mean = tensor(prefix + ".mean");
    const double* log_std = tensor(prefix + ".log_std");
    const bool backwards = walk == Walk::inverse;
    double log_det = 0;
    for (std::size_t d = 0; d < row.size(); ++d) {
      row[d] = backwards ? row[d] * std::exp(log_std[d]) + mean[d] : (row[d] - mean[d]) * std::exp(-log_std[d]);
      log_det += backwards ? log_std[d] : -log_std[d];
    }
    return log_det;
  }

  double apply(const nvpflow::ActNorm& layer, std::size_t index, Walk walk, Row& row, const Row&) const {
    const std::string prefix = "actnorm_" + std::to_string(index);
    const double* scale = tensor(prefix + ".log_scale");
    const double* shift = tensor(prefix + ".shift");
    const bool backwards = runs_backwards(walk, layer.inverse);
    double log_det = 0;
    for (std::size_t d = 0; d < row.size(); ++d) {
      row[d] = backwards ? (row[d] - shift[d]) * std::exp(-scale[d]) : row[d] * std::exp(scale[d]) + shift[d];
      log_det += backwards ? -scale[d] : scale[d];
    }
    return log_det;
  }

  double apply(const nvpflow::Permutation& layer, std::size_t, Walk walk, Row& row, const Row&) const {
    const Row in = row;
    for (std::size_t j = 0; j < row.size(); ++j) {
      const auto from = static_cast<std::size_t>(layer.order[j]);
      if (walk == Walk::forward) row[j] = in[from];
      if (walk == Walk::inverse) row[from] = in[j];
    }
    return 0;
  }

  double apply(const nvpflow::Bounds& layer, std::size_t, Walk walk, Row& row, const Row&) const {
    double log_det = 0;
    bool inside = true;
    for (std::size_t d = 0; d < row.size(); ++d) {
      const double a = layer.low[d], b = layer.high[d], v = row[d];
      const bool below = std::isfinite(a), above = std::isfinite(b);
      if (walk == Walk::forward) {
        inside = inside && a < v && v < b;
        if (below && above) row[d] = std::log((v - a) / (b - v));
        if (below && !above) row[d] = std::log(v - a);
        if (!below && above) row[d] = -std::log(b - v);
        if (below && above) log_det += std::log((b - a) / ((v - a) * (b - v)));
        if (below != above) log_det -= std::log(below ? v - a : b - v);
        continue;
      }
      if (below && above) {
        const double share = 1 / (1 + std::exp(-v));
        row[d] = a + (b - a) * share;
        using nvpflow::Activation;
        log_det += std::log(b - a) - activate(Activation::softplus, v) - activate(Activation::softplus, -v);
      }
      if (below && !above) row[d] = a + std::exp(v), log_det += v;
      if (!below && above) row[d] = b - std::exp(-v), log_det -= v;
    }
    if (!inside) row.assign(row.size(), std::nan("")), log_det = std::nan("");  // settled() makes it a density of 0
    return log_det;
  }

  double apply(const nvpflow::LULinear& layer, std::size_t index, Walk walk, Row& row, const Row&) const {
    const std::string prefix = "lu_linear_" + std::to_string(index);
    const double* lower = tensor(prefix + ".lower");  // row i starts at i (i - 1) / 2
    const double* upper = tensor(prefix + ".upper");
    const double* log_diagonal = tensor(prefix + ".log_diagonal");
    const double* sign = tensor(prefix + ".sign");
    const double* bias = tensor(prefix + ".bias");
    const std::size_t n = row.size();
    const auto lower_at = [&](std::size_t i, std::size_t j) { return lower[i * (i - 1) / 2 + j]; };
    const auto upper_at = [&](std::size_t i, std::size_t j) { return upper[i * n - i * (i + 1) / 2 + j - i - 1]; };
    const auto diagonal_at = [&](std::size_t i) { return sign[i] * std::exp(log_diagonal[i]); };

    double log_det = 0;
    for (std::size_t i = 0; i < n; ++i) log_det += log_diagonal[i];
    if (runs_backwards(walk, layer.inverse)) {
      for (std::size_t i = 0; i < n; ++i) {  // L v = y - bias
        row[i] -= bias[i];
        for (std::size_t j = 0; j < i; ++j) row[i] -= lower_at(i, j) * row[j];
      }
      for (std::size_t i = n; i-- > 0;) {  // U x = v
        for (std::size_t j = i + 1; j < n; ++j) row[i] -= upper_at(i, j) * row[j];
        row[i] /= diagonal_at(i);
      }
      return -log_det;
    }
    for (std::size_t i = 0; i < n; ++i) {  // v = U x
      row[i] *= diagonal_at(i);
      for (std::size_t j = i + 1; j < n; ++j) row[i] += upper_at(i, j) * row[j];
    }
    for (std::size_t i = n; i-- > 0;) {  // y = L v + bias
      for (std::size_t j = 0; j < i; ++j) row[i] += lower_at(i, j) * row[j];
      row[i] += bias[i];
    }
    return log_det;
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
