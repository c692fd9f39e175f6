// The covariance of rows, shrunk towards the identity times the mean variance in the columns' own units (Ledoit and
// Wolf, A well-conditioned estimator for large-dimensional covariance matrices, 2004).
//
// Theirs has the least squared error. It widens narrow directions (200 rows of 20 columns lost 2.8 nats by it) and
// depends on units. So other shares are compared with theirs, and as targets the identity in the units that the rows
// arrive in, which are standardized ones in front of a whitening layer. Each is compared as it is and widened, which
// makes up for a mean and a covariance that few rows tell. What takes the place of theirs makes rows that are left out,
// one by one, likelier by three standard errors. Over 600 tables of 15 families, 30 to 1,000 rows, one error lost more
// than 0.05 nats against theirs on 7 %, and three on 0.3 %.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace nvpflow {

/// Rows [count, D] in float64 and their weights [count], above 0, handed out in blocks from the first to the last, each
/// time it is called.
using RowBlocks =
    std::function<void(const std::function<void(const double* rows, const double* weights, std::int64_t count)>& take)>;

/// A column that follows from others to within 1e-6 of its spread, over rows that are more than the columns.
struct DependentColumn {
  std::size_t column;
  std::vector<std::size_t> others;  // ascending
};

/// Mean and covariance of rows, by weight. Matrices are square, row-major; only their lower triangles hold numbers.
class ShrunkCovariance {
 public:
  /// units: what 1 is of each feature in its column's own unit; empty: 1. Goes through the rows twice. Up to 2,048 rows
  /// are left out, one by one, of up to 1,000 columns; of more the target is that of the units they arrive in. The same
  /// for any number of threads.
  ShrunkCovariance(std::int64_t features, std::vector<double> units, const RowBlocks& rows, int threads);

  const std::vector<double>& mean() const { return mean_; }
  bool is_finite() const { return std::isfinite(mean_variance(false)); }
  /// Those that follow from columns before them.
  std::vector<DependentColumn> dependent() const;
  /// K of covariance = K K^T, K lower triangular. ridge: this share of each variance is added to it.
  std::vector<double> cholesky(double ridge) const;

 private:
  void find_mean(const RowBlocks& rows);
  void find_covariance(const RowBlocks& rows, int threads);
  /// covariance = widening ((1 - share) covariance of the rows + share target).
  struct Shrinkage {
    bool in_own_units = true;  // the target
    double share = 0, widening = 1;
  };
  /// Of rows by mean and covariance of all others: the log-density is -(log_det + square) / 2 and a constant.
  struct LeftOut {
    std::vector<double> log_det, square;
  };

  void keep_some(const double* centred, const double* weights, std::size_t count);
  void choose();
  double unit(std::size_t j, bool own) const { return own && !units_.empty() ? units_[j] : 1; }
  double ledoit_wolf_share(bool in_own_units) const;
  double mean_variance(bool in_own_units) const;
  std::vector<double> shrunk(const Shrinkage& how, double grown) const;
  LeftOut leave_out(const Shrinkage& how) const;
  double widening_for(const LeftOut& rows) const;
  std::vector<double> log_prob(const LeftOut& rows, double widening) const;
  /// Rows without weights that tell as much (Kish 1965).
  double effective_rows() const { return weight_ * weight_ / weight_squares_; }

  std::size_t size_;
  double count_ = 0;  // rows
  std::vector<double> units_;
  // Sums of their weights, of the squares of these, and by weight of the fourth powers of the rows' lengths, in the
  // units they arrive in and in their own.
  double weight_ = 0, weight_squares_ = 0, fourth_[2] = {0, 0};
  std::vector<double> mean_, covariance_;
  std::vector<double> some_, some_weights_;  // of the rows, centred
  Shrinkage chosen_;
};

/// The inverse of a lower triangular matrix.
std::vector<double> inverse_of_lower(const std::vector<double>& matrix, std::size_t size);

}  // namespace nvpflow
