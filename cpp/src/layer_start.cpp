#include "layer_start.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <nvpflow/error.hpp>
#include <nvpflow/execution.hpp>
#include <nvpflow/flow.hpp>
#include <nvpflow/layers.hpp>
#include <nvpflow/spec.hpp>

#include "fit_start.hpp"
#include "layers/layer.hpp"
#include "shrunk_covariance.hpp"

namespace nvpflow {
namespace {

using layers::SetFrom;

/// Of each variance, to columns that follow from others: float32 keeps four digits of what is left of them.
constexpr double kRidge = 1e-6;

/// The rows on their way through the layers.
template <class T>
class Walk {
 public:
  Walk(const FlowSpec& spec, std::span<T> parameters, const StartRows<T>& rows, const StartOptions& options)
      : spec_(spec), layout_(spec), parameters_(parameters), rows_(rows), options_(options) {}

  void start_all() {
    bool whitened = false;
    for (std::size_t i = 0; i < spec_.layers.size(); ++i) {
      const layers::LayerFacts layer = layers::facts_of(spec_.layers[i]);
      if (layer.set_from == SetFrom::covariance) {
        whitened = true;
        if (options_.anew || !is_set(i)) whiten(i, layer.inverse);
      } else if (layer.set_from == SetFrom::sample && !whitened && !is_set(i)) {
        advance_sample(i);
        start(i, layer.inverse);
      }
    }
  }

 private:
  std::int64_t features() const { return spec_.input_size; }
  std::int64_t context_size() const { return spec_.context_size; }
  /// The numbers of a layer's tensor.
  std::span<T> values(std::size_t layer, std::size_t tensor) const {
    const TensorInfo& info = layout_.tensors()[layout_.first_tensor(layer) + tensor];
    return parameters_.subspan(static_cast<std::size_t>(info.offset), static_cast<std::size_t>(info.size));
  }
  /// Any number of the layer but its signs is not zero.
  bool is_set(std::size_t layer) const {
    const std::size_t first = layout_.first_tensor(layer);
    for (std::size_t i = first; i < layout_.tensors().size(); ++i) {
      const TensorInfo& info = layout_.tensors()[i];
      if (info.layer != static_cast<std::int64_t>(layer)) break;
      const std::span<T> all = values(layer, i - first);
      const bool zero = std::all_of(all.begin(), all.end(), [](T v) { return v == T(0); });
      if (!info.signs && !zero) return true;
    }
    return false;
  }

  // ---- through layers ----

  /// Layers [begin, end), and a coupling that is the identity, for a flow has one.
  Flow part(std::size_t begin, std::size_t end) const {
    FlowSpec spec = spec_;
    spec.layers.assign(spec_.layers.begin() + static_cast<std::ptrdiff_t>(begin),
                       spec_.layers.begin() + static_cast<std::ptrdiff_t>(end));
    Coupling identity;
    identity.transform = Additive{};
    identity.network.hidden_sizes = {1};
    spec.layers.emplace_back(std::move(identity));
    Flow flow(spec);
    flow.set_num_threads(options_.threads);
    std::vector<T> own(static_cast<std::size_t>(flow.num_parameters()), T(0));
    std::copy(parameters_.begin() + offset(begin), parameters_.begin() + offset(end), own.begin());
    if (spec_.standardize_context) {
      const std::span<T> statistics = context_statistics(spec_, layout_, parameters_);
      std::copy(statistics.begin(), statistics.end(),
                context_statistics(spec, flow.layout(), std::span<T>(own)).begin());
    }
    flow.set_parameters<T>(own);
    return flow;
  }

  std::int64_t offset(std::size_t layer) const { return layout_.tensors()[layout_.first_tensor(layer)].offset; }

  /// In place. context: of these rows.
  void pass(const Flow& flow, std::span<T> rows, std::span<const T> context) {
    passed_.resize(rows.size());
    flow.forward<T>(rows, passed_, {}, context_size() > 0 ? Context(context) : Context());
    std::copy(passed_.begin(), passed_.end(), rows.begin());
  }

  // ---- actnorm ----

  /// The sample as layer `end`, which is an actnorm layer, sees it.
  void advance_sample(std::size_t end) {
    if (sample_.empty()) {
      const std::int64_t count = std::min(rows_.count, kSelectionRows);
      sample_.resize(static_cast<std::size_t>(count * features()));
      sample_context_.resize(static_cast<std::size_t>(count * context_size()));
      sample_weights_.resize(static_cast<std::size_t>(count));
      rows_.read(0, count, sample_.data(), sample_context_.data(), sample_weights_.data());
    }
    if (reached_ == end) return;
    const Flow flow = part(reached_, end);
    const std::int64_t count = static_cast<std::int64_t>(sample_.size()) / features();
    for (std::int64_t first = 0; first < count; first += options_.slice_rows) {
      options_.poll();
      const std::int64_t here = std::min(options_.slice_rows, count - first);
      const auto cut = [&](std::vector<T>& all, std::int64_t width) {
        return std::span<T>(all).subspan(static_cast<std::size_t>(first * width),
                                         static_cast<std::size_t>(here * width));
      };
      pass(flow, cut(sample_, features()), cut(sample_context_, context_size()));
    }
    reached_ = end;
  }

  void start(std::size_t layer, bool inverse) {
    const std::span<T> log_scale = values(layer, 0), shift = values(layer, 1);
    for (std::size_t j = 0; j < log_scale.size(); ++j) {
      const auto [mean, deviation] = moments(j);
      if (!std::isfinite(mean) || !std::isfinite(deviation)) continue;  // training stops at these rows, and says so
      const double log_deviation = deviation > 0 ? std::log(deviation) : 0;
      log_scale[j] = static_cast<T>(inverse ? log_deviation : -log_deviation);
      shift[j] = static_cast<T>(inverse ? mean : -mean * std::exp(-log_deviation));
    }
  }

  /// Mean and standard deviation of a feature of the sample, by weight; 0 where all its numbers are the same.
  std::pair<double, double> moments(std::size_t feature) const {
    const auto width = static_cast<std::size_t>(features());
    double total = 0, sum = 0, squares = 0;
    bool varies = false;
    for (std::size_t row = 0; row < sample_weights_.size(); ++row) {
      const T value = sample_[row * width + feature];
      total += sample_weights_[row];
      sum += sample_weights_[row] * static_cast<double>(value);
      varies |= value != sample_[feature];
    }
    const double mean = sum / total;
    for (std::size_t row = 0; row < sample_weights_.size(); ++row) {
      squares += sample_weights_[row] * std::pow(static_cast<double>(sample_[row * width + feature]) - mean, 2);
    }
    return {mean, varies ? std::sqrt(squares / total) : 0};
  }

  // ---- whitening ----

  void whiten(std::size_t layer, bool inverse) {
    const std::size_t size = static_cast<std::size_t>(features());
    const bool standardized = layer == 1 && std::holds_alternative<Standardize>(spec_.layers[0]);
    const ShrunkCovariance found(features(), standardized ? options_.units : std::vector<double>(), blocks_at(layer),
                                 options_.threads);
    if (!found.is_finite()) return;  // training stops at these rows, and says so
    const std::vector<DependentColumn> dependent = found.dependent();
    if (!options_.keep_dependent) refuse_dependent(layer, dependent);
    const std::vector<double> factor = found.cholesky(dependent.empty() ? 0 : kRidge);
    // Read from data to latent the matrix is the inverse of `factor`; read the other way, `factor` itself.
    const std::vector<double> matrix = inverse ? factor : inverse_of_lower(factor, size);
    const std::span<T> lower = values(layer, 0), upper = values(layer, 1), log_diagonal = values(layer, 2);
    const std::span<T> sign = values(layer, 3), bias = values(layer, 4);
    std::fill(upper.begin(), upper.end(), T(0));
    std::fill(sign.begin(), sign.end(), T(1));
    for (std::size_t i = 0, at = 0; i < size; ++i) {
      double shift = inverse ? found.mean()[i] : -matrix[i * size + i] * found.mean()[i];
      for (std::size_t j = 0; j < i; ++j, ++at) {
        lower[at] = static_cast<T>(matrix[i * size + j] / matrix[j * size + j]);
        if (!inverse) shift -= matrix[i * size + j] * found.mean()[j];
      }
      log_diagonal[i] = static_cast<T>(std::log(matrix[i * size + i]));
      bias[i] = static_cast<T>(shift);
    }
  }

  /// All rows as a layer sees them.
  RowBlocks blocks_at(std::size_t layer) {
    // Behind a standardize layer the flow that the rows pass through is a small one, but it is a flow.
    auto flow = std::make_shared<std::optional<Flow>>();
    if (layer > 0) flow->emplace(part(0, layer));
    return [this, flow](const std::function<void(const double*, const double*, std::int64_t)>& take) {
      std::vector<T> rows, context;
      std::vector<double> wide, weights;
      for (std::int64_t first = 0; first < rows_.count; first += options_.slice_rows) {
        options_.poll();
        const std::int64_t count = std::min(options_.slice_rows, rows_.count - first);
        rows.resize(static_cast<std::size_t>(count * features()));
        context.resize(static_cast<std::size_t>(count * context_size()));
        weights.resize(static_cast<std::size_t>(count));
        rows_.read(first, count, rows.data(), context.data(), weights.data());
        if (flow->has_value()) pass(**flow, rows, context);
        wide.assign(rows.begin(), rows.end());
        take(wide.data(), weights.data(), count);
      }
    };
  }

  void refuse_dependent(std::size_t layer, const std::vector<DependentColumn>& columns) const {
    if (columns.empty()) return;
    constexpr std::size_t kNamed = 5;
    std::string text;
    for (std::size_t i = 0; i < std::min(columns.size(), kNamed); ++i) {
      std::string others;
      for (const std::size_t other : columns[i].others) others += (others.empty() ? "" : " and ") + name(layer, other);
      text += (i == 0 ? "" : ", ") + name(layer, columns[i].column) + " follows from " +
              (others.empty() ? "the others" : others);
    }
    if (columns.size() > kNamed) text += ", and so do " + std::to_string(columns.size() - kNamed) + " more";
    throw Error(ErrorCode::invalid_argument,
                "x has columns that have no density together: " + text + "; leave them out, or allow_degenerate");
  }

  /// What a feature of a layer is called: the column that it is, where the layers before it mix none.
  std::string name(std::size_t layer, std::size_t feature) const {
    for (std::size_t i = layer; i-- > 0;) {
      const layers::LayerFacts before = layers::facts_of(spec_.layers[i]);
      if (!before.keeps_columns) {
        return "feature " + std::to_string(feature) + " of layers[" + std::to_string(layer) + "]";
      }
      if (before.order != nullptr) feature = static_cast<std::size_t>((*before.order)[feature]);
    }
    const std::vector<std::string>& names = options_.column_names;
    return "column " + (names.empty() ? std::to_string(feature + 1) : "'" + names[feature] + "'");
  }

  const FlowSpec& spec_;
  const ParamLayout layout_;
  const std::span<T> parameters_;
  const StartRows<T>& rows_;
  const StartOptions& options_;
  std::vector<T> sample_, sample_context_, passed_;
  std::vector<double> sample_weights_;
  std::size_t reached_ = 0;  // the layer that sees the sample as it is
};

}  // namespace

bool has_started_layers(const FlowSpec& spec) {
  return std::any_of(spec.layers.begin(), spec.layers.end(), [](const LayerSpec& layer) {
    const SetFrom from = layers::facts_of(layer).set_from;
    return from == SetFrom::sample || from == SetFrom::covariance;
  });
}

template <class T>
void start_layers(const FlowSpec& spec, std::span<T> parameters, const StartRows<T>& rows,
                  const StartOptions& options) {
  Walk<T>(spec, parameters, rows, options).start_all();
}

template void start_layers(const FlowSpec&, std::span<float>, const StartRows<float>&, const StartOptions&);
template void start_layers(const FlowSpec&, std::span<double>, const StartRows<double>&, const StartOptions&);

}  // namespace nvpflow
