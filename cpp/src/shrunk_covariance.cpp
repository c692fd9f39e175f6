#include "shrunk_covariance.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "parallel.hpp"

namespace nvpflow {
namespace {

/// Below this part of its spread a column has nothing of its own: float32 rounds to a tenth of it.
constexpr double kOfItsOwn = 1e-6;
/// A standardized column with less than this in a relation is none of those that it is about.
constexpr double kTakesPart = 1e-5;

/// Shares that are compared beside that of Ledoit and Wolf.
constexpr double kShares[] = {0, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1};
/// Above that many columns the comparison takes too long.
constexpr std::size_t kMostColumns = 1000;

/// Rows that are left out, one by one: their work is bounded, too.
std::size_t rows_to_leave_out(std::size_t columns) {
  return columns > kMostColumns ? 0 : std::clamp<std::size_t>((std::size_t{1} << 28) / (columns * columns), 256, 2048);
}

/// The mean by weight by which rows are likelier, if it is more than its standard error; else 0.
double certain_gain(const std::vector<double>& log_prob, const std::vector<double>& than,
                    const std::vector<double>& weights) {
  if (log_prob.empty() || than.empty()) return log_prob.empty() ? 0 : std::numeric_limits<double>::min();
  double sum = 0, squares = 0, total = 0, weight_squares = 0;
  for (std::size_t i = 0; i < than.size(); ++i) {
    const double gain = log_prob[i] - than[i];
    sum += weights[i] * gain, squares += weights[i] * gain * gain;
    total += weights[i], weight_squares += weights[i] * weights[i];
  }
  const double rows = total * total / weight_squares;
  const double mean = sum / total, variance = std::max(squares / total - mean * mean, 0.0);
  return rows > 1 && mean > std::sqrt(variance / (rows - 1)) ? mean : 0;
}

/// K of matrix = K K^T, in place; pivot(j, rest) is what takes the place of the j-th one.
template <class Pivot>
void factorize(std::vector<double>& matrix, std::size_t size, Pivot pivot) {
  for (std::size_t i = 0; i < size; ++i) {
    double* row = matrix.data() + i * size;
    for (std::size_t j = 0; j <= i; ++j) {
      const double* other = matrix.data() + j * size;
      double rest = row[j];
      for (std::size_t k = 0; k < j; ++k) rest -= row[k] * other[k];
      row[j] = j < i ? (other[j] > 0 ? rest / other[j] : 0) : std::sqrt(std::max(pivot(i, rest), 0.0));
    }
  }
}

}  // namespace

ShrunkCovariance::ShrunkCovariance(std::int64_t features, const RowBlocks& rows, int threads)
    : size_(static_cast<std::size_t>(features)), mean_(size_), covariance_(size_ * size_) {
  find_mean(rows);
  find_covariance(rows, threads);
  find_shrinkage();
}

void ShrunkCovariance::find_mean(const RowBlocks& rows) {
  rows([this](const double* block, const double* weights, std::int64_t count) {
    count_ += static_cast<double>(count);
    for (std::int64_t r = 0; r < count; ++r, block += size_) {
      weight_ += weights[r];
      weight_squares_ += weights[r] * weights[r];
      for (std::size_t j = 0; j < size_; ++j) mean_[j] += weights[r] * block[j];
    }
  });
  for (double& mean : mean_) mean /= weight_;
}

void ShrunkCovariance::find_covariance(const RowBlocks& rows, int threads) {
  constexpr std::int64_t kGrain = 8;  // rows of the matrix
  std::vector<double> centred;
  rows([&](const double* block, const double* weights, std::int64_t count) {
    const auto n = static_cast<std::size_t>(count);
    centred.assign(block, block + n * size_);
    for (std::size_t r = 0; r < n; ++r) {
      double square = 0;
      for (std::size_t j = 0; j < size_; ++j) {
        double& value = centred[r * size_ + j];
        value -= mean_[j];
        square += value * value;
      }
      fourth_ += weights[r] * square * square;
    }
    const std::size_t most = rows_to_leave_out(size_) * size_;
    some_.insert(some_.end(), centred.begin(),
                 centred.begin() + static_cast<std::ptrdiff_t>(std::min(most - some_.size(), centred.size())));
    const std::size_t more = some_.size() / size_ - some_weights_.size();
    some_weights_.insert(some_weights_.end(), weights, weights + more);
    parallel_for(static_cast<std::int64_t>(size_), kGrain, threads, [&](std::int64_t begin, std::int64_t end) {
      for (auto j = static_cast<std::size_t>(begin); j < static_cast<std::size_t>(end); ++j) {
        double* sums = covariance_.data() + j * size_;
        for (std::size_t r = 0; r < n; ++r) {
          const double* row = centred.data() + r * size_;
          const double factor = weights[r] * row[j];
          for (std::size_t k = 0; k <= j; ++k) sums[k] += factor * row[k];
        }
      }
    });
  });
  for (double& sum : covariance_) sum /= weight_;
}

void ShrunkCovariance::find_shrinkage() {
  double trace = 0, squares = 0;
  for (std::size_t j = 0; j < size_; ++j) {
    const double* row = covariance_.data() + j * size_;
    trace += row[j];
    for (std::size_t k = 0; k < j; ++k) squares += 2 * row[k] * row[k];
    squares += row[j] * row[j];
  }
  const auto columns = static_cast<double>(size_);
  const double rows = effective_rows();
  const double mean = trace / columns;
  const double distance = (squares - columns * mean * mean) / columns;    // from the target
  const double error = (fourth_ / weight_ - squares) / (columns * rows);  // of the covariance
  if (error > 0) shrinkage_ = distance > error ? error / distance : 1;
  // Of two rows the formula says 0, and the covariance is singular.
  if (rows <= columns + 1) shrinkage_ = std::max(shrinkage_, 1 / rows);
  if (rows < 2 || some_.empty()) return;
  const std::vector<double> theirs = left_out_log_prob(shrinkage_);
  double best = 0;
  for (const double share : kShares) {
    if (share == 0 && rows <= columns + 1) continue;
    const double gain = certain_gain(left_out_log_prob(share), theirs, some_weights_);
    if (gain > best) best = gain, shrinkage_ = share;
  }
  some_.clear();
}

/// Of some rows the log-density by mean and covariance of all others, but for a constant; none where there is no
/// density. Those differ from the ones of all rows by one term, so that one factorization does (Sherman and Morrison,
/// 1950). With weights each row is left out as one of effective_rows() rows.
std::vector<double> ShrunkCovariance::left_out_log_prob(double share) const {
  double trace = 0;
  for (std::size_t j = 0; j < size_; ++j) trace += covariance_[j * size_ + j];
  const double rows = effective_rows();
  const double grown = rows / (rows - 1), term = (1 - share) * grown / (rows - 1);
  std::vector<double> factor = covariance_;
  for (double& value : factor) value *= (1 - share) * grown;
  for (std::size_t j = 0; j < size_; ++j) factor[j * size_ + j] += share * trace / static_cast<double>(size_);
  factorize(factor, size_, [](std::size_t, double rest) { return rest; });
  double log_det = 0;
  for (std::size_t j = 0; j < size_; ++j) {
    if (!(factor[j * size_ + j] > 0)) return {};
    log_det += 2 * std::log(factor[j * size_ + j]);
  }
  std::vector<double> found, solved(size_);
  for (std::size_t at = 0; at < some_.size(); at += size_) {
    double square = 0;
    for (std::size_t j = 0; j < size_; ++j) {
      double rest = some_[at + j];
      for (std::size_t k = 0; k < j; ++k) rest -= factor[j * size_ + k] * solved[k];
      solved[j] = rest / factor[j * size_ + j];
      square += solved[j] * solved[j];
    }
    const double left = 1 - term * square;
    if (!(left > 0)) return {};
    found.push_back(-0.5 * (log_det + std::log(left) + grown * grown * square / left));
  }
  return found;
}

std::vector<DependentColumn> ShrunkCovariance::dependent() const {
  std::vector<double> factor = covariance_, spread(size_);
  for (std::size_t j = 0; j < size_; ++j) spread[j] = std::sqrt(covariance_[j * size_ + j]);
  for (std::size_t j = 0; j < size_; ++j) {
    for (std::size_t k = 0; k <= j; ++k) {
      const double unit = spread[j] * spread[k];
      factor[j * size_ + k] = unit > 0 ? factor[j * size_ + k] / unit : 0;
    }
  }
  std::vector<std::size_t> found;
  std::size_t own = 0;  // columns that follow from none before
  factorize(factor, size_, [&](std::size_t j, double rest) {
    const bool enough = static_cast<double>(own) + 1 < count_;  // rows: as many columns fit others by themselves
    if (rest > kOfItsOwn * kOfItsOwn || !enough) return ++own, rest;
    if (spread[j] > 0) found.push_back(j);
    return 0.0;
  });
  std::vector<DependentColumn> columns;
  for (const std::size_t j : found) {
    // The weights of the others are the solution of K^T w = row j of K.
    std::vector<double> weights(factor.begin() + static_cast<std::ptrdiff_t>(j * size_),
                                factor.begin() + static_cast<std::ptrdiff_t>(j * size_ + j));
    columns.push_back({j, {}});
    for (std::size_t k = j; k-- > 0;) {
      const double pivot = factor[k * size_ + k];
      weights[k] = pivot > 0 ? weights[k] / pivot : 0;
      for (std::size_t i = 0; i < k; ++i) weights[i] -= weights[k] * factor[k * size_ + i];
      if (std::abs(weights[k]) > kTakesPart) columns.back().others.insert(columns.back().others.begin(), k);
    }
  }
  return columns;
}

std::vector<double> ShrunkCovariance::cholesky(double ridge) const {
  double trace = 0;
  for (std::size_t j = 0; j < size_; ++j) trace += covariance_[j * size_ + j];
  std::vector<double> factor = covariance_;
  for (std::size_t j = 0; j < size_; ++j) {
    for (std::size_t k = 0; k <= j; ++k) factor[j * size_ + k] *= 1 - shrinkage_;
    double& variance = factor[j * size_ + j];
    variance = (variance + shrinkage_ * trace / static_cast<double>(size_)) * (1 + ridge);
    if (trace == 0) variance = 1;  // one row tells nothing of it
  }
  factorize(factor, size_, [](std::size_t, double rest) { return rest; });
  return factor;
}

std::vector<double> inverse_of_lower(const std::vector<double>& matrix, std::size_t size) {
  std::vector<double> inverse(size * size);
  for (std::size_t i = 0; i < size; ++i) {
    double* row = inverse.data() + i * size;
    for (std::size_t k = 0; k < i; ++k) {
      const double factor = matrix[i * size + k];
      const double* other = inverse.data() + k * size;
      for (std::size_t j = 0; j <= k; ++j) row[j] -= factor * other[j];
    }
    row[i] = 1;
    for (std::size_t j = 0; j <= i; ++j) row[j] /= matrix[i * size + i];
  }
  return inverse;
}

}  // namespace nvpflow
