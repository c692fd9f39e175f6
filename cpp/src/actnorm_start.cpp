#include "actnorm_start.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <utility>
#include <variant>
#include <vector>

#include <nvpflow/execution.hpp>
#include <nvpflow/flow.hpp>
#include <nvpflow/layers.hpp>
#include <nvpflow/spec.hpp>

#include "fit_start.hpp"

namespace nvpflow {
namespace {

/// The rows on their way through the layers.
template <class T>
class Walk {
 public:
  Walk(const FlowSpec& spec, std::span<T> parameters, std::vector<T> rows, const std::vector<T>& context,
       std::int64_t slice_rows, int threads, const std::function<void()>& poll)
      : spec_(spec),
        layout_(spec),
        parameters_(parameters),
        rows_(std::move(rows)),
        context_(context),
        slice_rows_(slice_rows),
        threads_(threads),
        poll_(poll) {}

  void start_all() {
    for (std::size_t i = 0; i < spec_.layers.size(); ++i) {
      const auto* layer = std::get_if<ActNorm>(&spec_.layers[i]);
      if (layer == nullptr || is_set(i)) continue;
      advance(i);
      start(i, layer->inverse);
    }
  }

 private:
  std::int64_t features() const { return spec_.input_size; }
  std::int64_t num_rows() const { return static_cast<std::int64_t>(rows_.size()) / features(); }
  std::int64_t offset(std::size_t layer) const { return layout_.tensors()[layout_.first_tensor(layer)].offset; }
  /// log_scale [D], then shift [D].
  std::span<T> values(std::size_t layer) const {
    return parameters_.subspan(static_cast<std::size_t>(offset(layer)), static_cast<std::size_t>(2 * features()));
  }
  bool is_set(std::size_t layer) const {
    const std::span<T> all = values(layer);
    return std::any_of(all.begin(), all.end(), [](T v) { return v != T(0); });
  }

  /// The rows as layer `end`, which is an actnorm layer, sees them.
  void advance(std::size_t end) {
    if (reached_ < end) walk(reached_, end);
    reached_ = end;
  }

  /// Through layers [begin, end): those and a coupling that is the identity, for a flow has one.
  void walk(std::size_t begin, std::size_t end) {
    FlowSpec part = spec_;
    part.layers.assign(spec_.layers.begin() + static_cast<std::ptrdiff_t>(begin),
                       spec_.layers.begin() + static_cast<std::ptrdiff_t>(end));
    Coupling identity;
    identity.transform = Additive{};
    identity.network.hidden_sizes = {1};
    part.layers.emplace_back(std::move(identity));
    const std::int64_t width = spec_.context_size;
    Flow flow(part);
    flow.set_num_threads(threads_);
    std::vector<T> own(static_cast<std::size_t>(flow.num_parameters()), T(0));
    std::copy(parameters_.begin() + offset(begin), parameters_.begin() + offset(end), own.begin());
    if (spec_.standardize_context) {
      const std::span<T> statistics = context_statistics(spec_, layout_, parameters_);
      std::copy(statistics.begin(), statistics.end(),
                context_statistics(part, flow.layout(), std::span<T>(own)).begin());
    }
    flow.set_parameters<T>(own);
    std::vector<T> out(rows_.size());
    for (std::int64_t first = 0; first < num_rows(); first += slice_rows_) {
      poll_();
      const auto at = static_cast<std::size_t>(first * features());
      const std::int64_t count = std::min(slice_rows_, num_rows() - first);
      const auto size = static_cast<std::size_t>(count * features());
      const auto given = std::span<const T>(context_).subspan(static_cast<std::size_t>(first * width),
                                                              static_cast<std::size_t>(count * width));
      flow.forward<T>(std::span<const T>(rows_).subspan(at, size), std::span<T>(out).subspan(at, size), {},
                      width > 0 ? Context(given) : Context());
    }
    rows_.swap(out);
  }

  void start(std::size_t layer, bool inverse) {
    const std::span<T> log_scale = values(layer).first(static_cast<std::size_t>(features()));
    const std::span<T> shift = values(layer).last(log_scale.size());
    for (std::size_t j = 0; j < log_scale.size(); ++j) {
      const auto [mean, deviation] = moments(j);
      if (!std::isfinite(mean) || !std::isfinite(deviation)) continue;  // training stops at these rows, and says so
      const double log_deviation = deviation > 0 ? std::log(deviation) : 0;
      log_scale[j] = static_cast<T>(inverse ? log_deviation : -log_deviation);
      shift[j] = static_cast<T>(inverse ? mean : -mean * std::exp(-log_deviation));
    }
  }

  /// Mean and standard deviation of a feature; 0 where all its numbers are the same.
  std::pair<double, double> moments(std::size_t feature) const {
    const auto width = static_cast<std::size_t>(features());
    const auto count = static_cast<double>(num_rows());
    double sum = 0, squares = 0;
    bool varies = false;
    for (std::size_t at = feature; at < rows_.size(); at += width) {
      sum += static_cast<double>(rows_[at]);
      varies |= rows_[at] != rows_[feature];
    }
    const double mean = sum / count;
    for (std::size_t at = feature; at < rows_.size(); at += width) {
      squares += std::pow(static_cast<double>(rows_[at]) - mean, 2);
    }
    return {mean, varies ? std::sqrt(squares / count) : 0};
  }

  const FlowSpec& spec_;
  const ParamLayout layout_;
  const std::span<T> parameters_;
  std::vector<T> rows_;
  const std::vector<T>& context_;
  const std::int64_t slice_rows_;
  const int threads_;
  const std::function<void()>& poll_;
  std::size_t reached_ = 0;  // the layer that sees the rows as they are
};

}  // namespace

template <class T>
void start_actnorms(const FlowSpec& spec, std::span<T> parameters, std::vector<T> rows, const std::vector<T>& context,
                    std::int64_t slice_rows, int threads, const std::function<void()>& poll) {
  Walk<T>(spec, parameters, std::move(rows), context, slice_rows, threads, poll).start_all();
}

template void start_actnorms(const FlowSpec&, std::span<float>, std::vector<float>, const std::vector<float>&,
                             std::int64_t, int, const std::function<void()>&);
template void start_actnorms(const FlowSpec&, std::span<double>, std::vector<double>, const std::vector<double>&,
                             std::int64_t, int, const std::function<void()>&);

}  // namespace nvpflow
