// Flow::initialize_from: what fit sets from data before it trains, for training loops of one's own.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <nvpflow/base.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/execution.hpp>
#include <nvpflow/flow.hpp>
#include <nvpflow/layers.hpp>
#include <nvpflow/spec.hpp>

#include "bounded_rows.hpp"
#include "column_statistics.hpp"
#include "fit_rows.hpp"
#include "fit_start.hpp"
#include "float_mode.hpp"
#include "flow_access.hpp"
#include "layer_start.hpp"
#include "layers/layer.hpp"
#include "mixture_start.hpp"
#include "random.hpp"
#include "row_order.hpp"
#include "sample_weights.hpp"
#include "weighted_table.hpp"
#include "wide_rows.hpp"

namespace nvpflow {
namespace {

/// Rows of X: T, the flow's type, or double for a float32 flow with takes_float64_rows, or behind the flow's bounds.
template <class T, class X>
class Initializer {
 public:
  /// weights: [N], above 0; empty: all count alike.
  Initializer(Flow& flow, std::span<const X> x, const Context& context, std::span<const double> weights,
              bool allow_degenerate, bool behind_bounds = false)
      : flow_(flow),
        spec_(flow.spec().behind_bounds()),
        behind_bounds_(behind_bounds || flow.spec().bounds() == nullptr),
        given_context_(context),
        allow_degenerate_(allow_degenerate),
        x_(x),
        features_(flow.spec().input_size),
        rows_(static_cast<std::int64_t>(x.size()) / features_),
        weights_(weights.begin(), weights.end()),
        values_(static_cast<std::size_t>(flow.num_parameters())) {
    if (rows_ == 0 || static_cast<std::int64_t>(x.size()) % features_ != 0) {
      throw Error(ErrorCode::invalid_argument, "x holds " + std::to_string(x.size()) +
                                                   " elements, expected rows of input_size " +
                                                   std::to_string(features_) + ", at least one");
    }
    context_ = checked_context<T>(flow.spec(), "context", context, rows_);
    check_finite("x", x_, features_, no_poll);
    if (!context_.empty()) check_finite("context", context_, flow.spec().context_size, no_poll);
    const double factor = static_cast<double>(rows_) / sum_of(weights_);  // to mean 1, as fit has them
    for (double& weight : weights_) weight *= factor;
    flow.copy_parameters<T>(values_, &low_);
  }

  std::vector<std::string> run(Statistics statistics) {
    if (!behind_bounds_) {
      const Dither dither = {/*seed=*/0, kStreamDither};
      const BoundedRows behind = through_bounds<X>("x", x_, flow_.spec(), flow_.column_names(), dither, no_poll);
      return Initializer<T, double>(flow_, behind.rows, given_context_, weights_, allow_degenerate_, true)
          .run(statistics);
    }
    std::vector<std::string> how;
    if (flow_.spec().begins_with_standardize()) how = standardize(statistics);
    if (flow_.spec().standardize_context) {
      const auto own = context_statistics(flow_.spec(), flow_.layout(), std::span<T>(values_));
      set_context_statistics(own, context_, std::span<const double>(weights_), RowOrder(), rows_, no_poll);
    }
    if (has_started_layers(flow_.spec())) start_from_rows();
    flow_.set_parameters<T>(values_, low_);
    if (wants_mixture_start<T>(flow_.spec(), flow_.layout(), values_)) start_mixture_base();
    return how;
  }

 private:
  static void no_poll() {}

  std::span<T> front() { return std::span<T>(values_).first(static_cast<std::size_t>(2 * features_)); }

  std::vector<std::string> standardize(Statistics statistics) {
    ColumnScales scales(flow_.spec().dtype, x_, weights_, flow_.column_names(), features_, RowOrder(), rows_, no_poll);
    const std::vector<ColumnScale> found = scales.take(statistics_for(flow_.spec().base, statistics));
    low_.clear();
    if constexpr (sizeof(X) > sizeof(T)) low_ = mean_low_of(found);
    return set_layer(front(), found);
  }

  void start_from_rows() {
    if (spec_.begins_with_standardize()) units_ = units_of(std::span<const T>(front()));
    const ParamLayout& layout = flow_.layout();
    for (std::size_t i = 0; i < flow_.spec().layers.size(); ++i) {
      if (layers::facts_of(flow_.spec().layers[i]).set_from != layers::SetFrom::sample) continue;
      std::fill_n(values_.begin() + layout.tensors()[layout.first_tensor(i)].offset, 2 * features_, T(0));
    }
    if constexpr (std::is_same_v<T, X>) {
      walk([](const X* row, T* to, std::int64_t count) { std::copy_n(row, count, to); });
    } else if (!spec_.begins_with_standardize()) {
      walk([](const X* row, T* to, std::int64_t count) {
        std::transform(row, row + count, to, [](X value) { return static_cast<T>(value); });
      });
    } else {
      WideRows layer;
      layer.set(features_, values_.data(), values_.data() + features_, low_.empty() ? nullptr : low_.data());
      // What begins behind the layer sees it as the identity.
      const std::vector<T> kept(front().begin(), front().end());
      std::fill(front().begin(), front().end(), T(0));
      walk([&](const X* row, T* to, std::int64_t) { layer.standardize(row, /*float64=*/true, nullptr, 0, 1, to); });
      std::copy(kept.begin(), kept.end(), values_.begin());
    }
  }

  /// take(row, to, D): a row as the walk's first layer sees it.
  template <class Take>
  void walk(Take take) {
    const std::int64_t width = flow_.spec().context_size;
    const RowOrder order = FitRows(rows_, 0, 0).shuffled(0);
    StartRows<T> rows;
    rows.count = rows_;
    rows.read = [&](std::int64_t first, std::int64_t count, T* x, T* context, double* weights) {
      order.each(first, count, [&](std::int64_t i, std::int64_t row) {
        take(x_.data() + row * features_, x + i * features_, features_);
        std::copy_n(context_.data() + row * width, width, context + i * width);
        weights[i] = weights_.empty() ? 1.0 : weights_[static_cast<std::size_t>(row)];
      });
    };
    StartOptions how;
    how.threads = FlowAccess::threads(flow_);
    how.anew = true;
    how.keep_dependent = allow_degenerate_;
    how.units = units_;
    how.column_names = flow_.column_names();
    how.poll = no_poll;
    start_layers<T>(spec_, values_, rows, how);
  }

  /// From some of the rows, evenly taken, by all that has been set.
  void start_mixture_base() {
    const std::int64_t count = std::min(rows_, kMixtureRows), width = flow_.spec().context_size;
    const auto size = static_cast<std::size_t>(features_);
    std::vector<T> latents(static_cast<std::size_t>(count) * size);
    std::vector<double> weights;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t row = i * rows_ / count;
      const auto given = context_.empty()
                             ? context_
                             : context_.subspan(static_cast<std::size_t>(row * width), static_cast<std::size_t>(width));
      flow_.forward(x_.subspan(static_cast<std::size_t>(row) * size, size),
                    std::span<T>(latents).subspan(static_cast<std::size_t>(i) * size, size), std::span<T>(),
                    given.empty() ? Context() : Context(given));
      if (!weights_.empty()) weights.push_back(weights_[static_cast<std::size_t>(row)]);
    }
    start_mixture<T>(flow_.spec(), flow_.layout(), values_, latents, weights, 0);
    flow_.set_parameters<T>(values_, low_);
  }

  Flow& flow_;
  const FlowSpec spec_;  // without bounds
  const bool behind_bounds_;
  const Context& given_context_;
  const bool allow_degenerate_;
  const std::span<const X> x_;
  const std::int64_t features_, rows_;
  std::span<const T> context_;
  std::vector<double> weights_;  // of mean 1
  std::vector<T> values_;
  std::vector<float> low_;
  std::vector<double> units_;  // of the standardize layer
};

/// T: of the flow; X: of the rows.
template <class T, class X>
std::vector<std::string> initialize(Flow& flow, std::span<const X> x, Statistics statistics, const Context& context,
                                    std::span<const double> weights, bool allow_degenerate) {
  const WeightedTable<T, X> table(flow.spec(), {"x", "context", "sample_weight"}, x, context, weights);
  return Initializer<T, X>(flow, table.rows(), table.context(), table.weights(), allow_degenerate).run(statistics);
}

}  // namespace

template <class T>
std::vector<std::string> Flow::initialize_from(std::span<const T> x, Statistics statistics, const Context& context,
                                               std::span<const double> sample_weight, bool allow_degenerate) {
  const FloatMode mode;
  (void)name_of(statistics);  // throws
  if (!spec().begins_with_standardize() && !spec().standardize_context && !has_started_layers(spec()) &&
      !layers::facts_of(spec().base).starts_at_rows) {
    throw Error(ErrorCode::invalid_argument,
                "the flow does not begin with a standardize layer, which initialize_from sets; make one with "
                "standardize");
  }
  if constexpr (std::is_same_v<T, double>) {
    if (takes_float64_rows(spec())) {
      return initialize<float>(*this, x, statistics, context, sample_weight, allow_degenerate);
    }
  }
  return initialize<T>(*this, x, statistics, context, sample_weight, allow_degenerate);
}

template std::vector<std::string> Flow::initialize_from(std::span<const float>, Statistics, const Context&,
                                                        std::span<const double>, bool);
template std::vector<std::string> Flow::initialize_from(std::span<const double>, Statistics, const Context&,
                                                        std::span<const double>, bool);

}  // namespace nvpflow
