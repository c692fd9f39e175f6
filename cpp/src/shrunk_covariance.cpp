#include "shrunk_covariance.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
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

/// Standard errors of the mean gain of left-out rows from which a covariance takes the place of Ledoit and Wolf's.
constexpr double kErrors = 3;

/// The mean by weight by which rows are likelier, if it is more than chance explains; else 0.
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
  return rows > 1 && mean > kErrors * std::sqrt(variance / (rows - 1)) ? mean : 0;
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

ShrunkCovariance::ShrunkCovariance(std::int64_t features, std::vector<double> units, const RowBlocks& rows, int threads)
    : size_(static_cast<std::size_t>(features)),
      units_(size_ > kMostColumns ? std::vector<double>() : std::move(units)),
      mean_(size_),
      covariance_(size_ * size_) {
  find_mean(rows);
  find_covariance(rows, threads);
  choose();
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
      double square = 0, own_square = 0;
      for (std::size_t j = 0; j < size_; ++j) {
        double& value = centred[r * size_ + j];
        value -= mean_[j];
        const double own = value * unit(j, true);
        square += value * value, own_square += own * own;
      }
      fourth_[0] += weights[r] * square * square;
      fourth_[1] += weights[r] * own_square * own_square;
    }
    keep_some(centred.data(), weights, n);
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

void ShrunkCovariance::keep_some(const double* centred, const double* weights, std::size_t count) {
  const std::size_t more = std::min(rows_to_leave_out(size_) - some_weights_.size(), count);
  some_.insert(some_.end(), centred, centred + more * size_);
  some_weights_.insert(some_weights_.end(), weights, weights + more);
}

double ShrunkCovariance::mean_variance(bool in_own_units) const {
  double trace = 0;
  for (std::size_t j = 0; j < size_; ++j) {
    trace += covariance_[j * size_ + j] * unit(j, in_own_units) * unit(j, in_own_units);
  }
  return trace / static_cast<double>(size_);
}

double ShrunkCovariance::ledoit_wolf_share(bool in_own_units) const {
  double squares = 0;
  for (std::size_t j = 0; j < size_; ++j) {
    for (std::size_t k = 0; k <= j; ++k) {
      const double value = covariance_[j * size_ + k] * unit(j, in_own_units) * unit(k, in_own_units);
      squares += (k < j ? 2 : 1) * value * value;
    }
  }
  const auto columns = static_cast<double>(size_);
  const double rows = effective_rows(), mean = mean_variance(in_own_units);
  const double distance = (squares - columns * mean * mean) / columns;                          // from the target
  const double error = (fourth_[in_own_units ? 1 : 0] / weight_ - squares) / (columns * rows);  // of the covariance
  double share = 0;
  if (error > 0 && size_ > 1) share = distance > error ? error / distance : 1;
  // Of two rows the formula says 0, and the covariance is singular.
  return rows <= columns + 1 ? std::max(share, 1 / rows) : share;
}

void ShrunkCovariance::choose() {
  const double rows = effective_rows();
  chosen_.share = ledoit_wolf_share(true);
  if (rows < 2 || some_.empty()) return;
  const std::vector<double> theirs = log_prob(leave_out(chosen_), 1);
  double best = 0;
  const auto compare = [&](Shrinkage how) {
    const bool few = rows <= static_cast<double>(size_) + 1;
    if (few && how.share == 0) return;
    const LeftOut left_out = leave_out(how);
    // Among few rows the one that is left out lies where the others have no variance but the target's.
    const bool can_widen = !few || how.share * rows >= 1;
    for (const double widening : {1.0, can_widen ? widening_for(left_out) : 1.0}) {
      how.widening = widening;
      const double gain = certain_gain(log_prob(left_out, widening), theirs, some_weights_);
      if (gain > best) best = gain, chosen_ = how;
    }
  };
  for (const bool own : {true, false}) {
    if (!own && units_.empty()) continue;
    compare({own, ledoit_wolf_share(own)});
    for (const double share : kShares) compare({own, share});
  }
  some_.clear();
}

/// The lower triangle of (1 - share) grown covariance + share target.
std::vector<double> ShrunkCovariance::shrunk(const Shrinkage& how, double grown) const {
  const double target = mean_variance(how.in_own_units);
  std::vector<double> matrix = covariance_;
  for (double& value : matrix) value *= (1 - how.share) * grown;
  for (std::size_t j = 0; j < size_; ++j) {
    const double own = unit(j, how.in_own_units);
    matrix[j * size_ + j] += how.share * target / (own * own);
  }
  return matrix;
}

/// None where there is no density. Mean and covariance of the others differ from those of all rows by one term, so that
/// one factorization does (Sherman and Morrison, 1950). With weights each row is left out as one of effective_rows()
/// rows.
ShrunkCovariance::LeftOut ShrunkCovariance::leave_out(const Shrinkage& how) const {
  const double rows = effective_rows();
  const double grown = rows / (rows - 1), term = (1 - how.share) * grown / (rows - 1);
  std::vector<double> factor = shrunk(how, grown);
  factorize(factor, size_, [](std::size_t, double rest) { return rest; });
  double log_det = 0;
  for (std::size_t j = 0; j < size_; ++j) {
    if (!(factor[j * size_ + j] > 0)) return {};
    log_det += 2 * std::log(factor[j * size_ + j]);
  }
  LeftOut found;
  std::vector<double> solved(size_);
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
    found.log_det.push_back(log_det + std::log(left));
    found.square.push_back(grown * grown * square / left);
  }
  return found;
}

/// The factor of a covariance under which left-out rows are likeliest, where that is above 1.
double ShrunkCovariance::widening_for(const LeftOut& rows) const {
  double sum = 0, weight = 0;
  for (std::size_t i = 0; i < rows.square.size(); ++i) {
    sum += some_weights_[i] * rows.square[i];
    weight += some_weights_[i];
  }
  return std::max(1.0, sum / (weight * static_cast<double>(size_)));
}

std::vector<double> ShrunkCovariance::log_prob(const LeftOut& rows, double widening) const {
  std::vector<double> found(rows.square.size());
  const double of_widening = static_cast<double>(size_) * std::log(widening);
  for (std::size_t i = 0; i < found.size(); ++i) {
    found[i] = -0.5 * (rows.log_det[i] + of_widening + rows.square[i] / widening);
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
  std::vector<double> factor = shrunk(chosen_, 1);
  const bool tells_nothing = mean_variance(false) == 0;  // one row
  for (double& value : factor) value *= chosen_.widening;
  for (std::size_t j = 0; j < size_; ++j) {
    double& variance = factor[j * size_ + j];
    variance = tells_nothing ? 1 : variance * (1 + ridge);
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
