#include "mixture_start.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <variant>
#include <vector>

#include <nvpflow/base.hpp>
#include <nvpflow/spec.hpp>

#include "random.hpp"

namespace nvpflow {
namespace {

constexpr int kRounds = 20;

const TensorInfo& tensor(const ParamLayout& layout, const char* name) { return *layout.find(name); }

/// Groups of rows, each nearest to its mean.
class Groups {
 public:
  /// rows [N, D], N > 0, and their weights [N].
  Groups(const std::vector<double>& rows, const std::vector<double>& weights, std::size_t features, std::size_t count,
         std::uint64_t seed)
      : rows_(rows),
        weights_(weights),
        features_(features),
        of_row_(rows.size() / features),
        means_(count * features),
        sizes_(count) {
    choose(count, seed);
    for (int round = 0; round < kRounds && assign(); ++round) update();
  }

  std::size_t num_rows() const { return of_row_.size(); }
  /// Of all rows, in their weights.
  double total() const { return std::accumulate(weights_.begin(), weights_.end(), 0.0); }
  /// Of a group's.
  double size(std::size_t group) const { return sizes_[group]; }
  const double* mean(std::size_t group) const { return means_.data() + group * features_; }

  /// Sums by weight of squares [count, D] of the distances from the means.
  std::vector<double> squares() const {
    std::vector<double> sums(means_.size());
    for (std::size_t i = 0; i < num_rows(); ++i) {
      for (std::size_t j = 0; j < features_; ++j) {
        const std::size_t at = of_row_[i] * features_ + j;
        sums[at] += weights_[i] * std::pow(rows_[i * features_ + j] - means_[at], 2);
      }
    }
    return sums;
  }

 private:
  double distance(std::size_t row, std::size_t group) const {
    double sum = 0;
    for (std::size_t j = 0; j < features_; ++j) sum += std::pow(rows_[row * features_ + j] - mean(group)[j], 2);
    return sum;
  }

  void put(std::size_t group, std::size_t row) {
    std::copy_n(rows_.data() + row * features_, features_, means_.data() + group * features_);
  }

  /// Each mean at a row, drawn in proportion to the squared distance from the means before.
  void choose(std::size_t count, std::uint64_t seed) {
    std::vector<double> nearest(num_rows(), std::numeric_limits<double>::infinity());
    put(0, 0);
    for (std::size_t group = 1; group < count; ++group) {
      double total = 0;
      for (std::size_t i = 0; i < num_rows(); ++i) {
        nearest[i] = std::min(nearest[i], distance(i, group - 1));
        total += weights_[i] * nearest[i];
      }
      const std::uint32_t counter[4] = {static_cast<std::uint32_t>(group), 0, 0, kStreamComponent};
      std::uint32_t words[4];
      philox4x32(seed, counter, words);
      double left = (words[0] + 0.5) * 0x1p-32 * total;
      std::size_t row = 0;
      for (; row + 1 < num_rows() && left >= weights_[row] * nearest[row]; ++row) left -= weights_[row] * nearest[row];
      put(group, row);
    }
  }

  /// Whether a row has changed its group.
  bool assign() {
    bool changed = false;
    for (std::size_t i = 0; i < num_rows(); ++i) {
      std::size_t best = 0;
      double least = distance(i, 0);
      for (std::size_t group = 1; group < sizes_.size(); ++group) {
        const double found = distance(i, group);
        if (found < least) least = found, best = group;
      }
      changed |= best != of_row_[i] || !assigned_;
      of_row_[i] = best;
    }
    assigned_ = true;
    return changed;
  }

  /// A group without rows keeps its mean.
  void update() {
    std::vector<double> sums(means_.size());
    std::fill(sizes_.begin(), sizes_.end(), 0.0);
    for (std::size_t i = 0; i < num_rows(); ++i) {
      sizes_[of_row_[i]] += weights_[i];
      for (std::size_t j = 0; j < features_; ++j) {
        sums[of_row_[i] * features_ + j] += weights_[i] * rows_[i * features_ + j];
      }
    }
    for (std::size_t at = 0; at < sums.size(); ++at) {
      if (sizes_[at / features_] > 0) means_[at] = sums[at] / sizes_[at / features_];
    }
  }

  const std::vector<double>&rows_, &weights_;
  const std::size_t features_;
  std::vector<std::size_t> of_row_;
  std::vector<double> means_, sizes_;
  bool assigned_ = false;
};

struct Rows {
  std::vector<double> values, weights;
};

/// Rows of finite numbers, at most kMixtureRows, evenly taken.
template <class T>
Rows finite_rows(std::span<const T> latents, std::span<const double> weights, std::size_t features) {
  const std::size_t count = latents.size() / features;
  const std::size_t step = std::max<std::size_t>(1, count / static_cast<std::size_t>(kMixtureRows));
  Rows rows;
  for (std::size_t i = 0; i < count && rows.weights.size() < static_cast<std::size_t>(kMixtureRows); i += step) {
    const std::span<const T> row = latents.subspan(i * features, features);
    if (!std::all_of(row.begin(), row.end(), [](T v) { return std::isfinite(v); })) continue;
    rows.values.insert(rows.values.end(), row.begin(), row.end());
    rows.weights.push_back(weights.empty() ? 1.0 : weights[i]);
  }
  return rows;
}

/// Variances of the columns.
std::vector<double> variances_of(const Rows& rows, std::size_t features) {
  const Groups all(rows.values, rows.weights, features, 1, 0);
  std::vector<double> found = all.squares();
  for (double& square : found) square /= all.total();
  return found;
}

}  // namespace

template <class T>
bool wants_mixture_start(const FlowSpec& spec, const ParamLayout& layout, std::span<const T> parameters) {
  const auto* base = std::get_if<MixtureBase>(&spec.base);
  if (base == nullptr) return false;
  const auto is_zero = [&](const char* name) {
    const TensorInfo& info = tensor(layout, name);
    const auto values = parameters.subspan(static_cast<std::size_t>(info.offset), static_cast<std::size_t>(info.size));
    return std::all_of(values.begin(), values.end(), [](T v) { return v == T(0); });
  };
  return is_zero("base.logits") && is_zero("base.log_scales") &&
         (base->covariance == MixtureBase::Covariance::diagonal || is_zero("base.lower"));
}

template <class T>
void start_mixture(const FlowSpec& spec, const ParamLayout& layout, std::span<T> parameters, std::span<const T> latents,
                   std::span<const double> weights, std::uint64_t seed) {
  const auto features = static_cast<std::size_t>(spec.input_size);
  const auto components = static_cast<std::size_t>(std::get<MixtureBase>(spec.base).components);
  const Rows rows = finite_rows(latents, weights, features);
  if (rows.weights.empty()) return;
  const Groups groups(rows.values, rows.weights, features, components, seed);
  const std::vector<double> squares = groups.squares(), whole = variances_of(rows, features);
  T* logits = parameters.data() + tensor(layout, "base.logits").offset;
  T* means = parameters.data() + tensor(layout, "base.means").offset;
  T* log_scales = parameters.data() + tensor(layout, "base.log_scales").offset;
  for (std::size_t m = 0; m < components; ++m) {
    // As if a row more belonged to the group, as far from its mean as rows are from each other: none has no width.
    const double size = groups.size(m) + 1;
    logits[m] = static_cast<T>(
        std::log(size * static_cast<double>(components) / (groups.total() + static_cast<double>(components))));
    for (std::size_t j = 0; j < features; ++j) {
      const std::size_t at = m * features + j;
      const double variance = (squares[at] + whole[j]) / size;
      means[at] = static_cast<T>(groups.mean(m)[j]);
      log_scales[at] = variance > 0 ? static_cast<T>(0.5 * std::log(variance)) : T(0);
    }
  }
}

template bool wants_mixture_start(const FlowSpec&, const ParamLayout&, std::span<const float>);
template bool wants_mixture_start(const FlowSpec&, const ParamLayout&, std::span<const double>);
template void start_mixture(const FlowSpec&, const ParamLayout&, std::span<float>, std::span<const float>,
                            std::span<const double>, std::uint64_t);
template void start_mixture(const FlowSpec&, const ParamLayout&, std::span<double>, std::span<const double>,
                            std::span<const double>, std::uint64_t);

}  // namespace nvpflow
