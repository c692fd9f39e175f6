// The covariance of rows, shrunk (Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance
// matrices, 2004).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace nvpflow {

/// Rows [count, D] in float64, handed out in blocks from the first to the last, each time it is called.
using RowBlocks = std::function<void(const std::function<void(const double* rows, std::int64_t count)>& take)>;

/// A column that follows from others to within 1e-6 of its spread, over rows that are more than the columns.
struct DependentColumn {
  std::size_t column;
  std::vector<std::size_t> others;  // ascending
};

/// Mean and covariance of rows. Matrices are square, row-major; only their lower triangles hold numbers.
class ShrunkCovariance {
 public:
  /// Goes through the rows twice. The same for any number of threads.
  ShrunkCovariance(std::int64_t features, const RowBlocks& rows, int threads);

  const std::vector<double>& mean() const { return mean_; }
  /// The share of `mean variance * identity`. At least 1 / rows where there are no more rows than columns: of two rows
  /// the formula says 0, and the covariance is singular.
  double shrinkage() const { return shrinkage_; }
  /// Those that follow from columns before them.
  std::vector<DependentColumn> dependent() const;
  /// K of covariance = K K^T, K lower triangular. ridge: this share of each variance is added to it.
  std::vector<double> cholesky(double ridge) const;

 private:
  void find_mean(const RowBlocks& rows);
  void find_covariance(const RowBlocks& rows, int threads);
  void find_shrinkage();

  std::size_t size_;
  double count_ = 0, fourth_ = 0;  // rows, and the sum of the fourth powers of their lengths
  std::vector<double> mean_, covariance_;
  double shrinkage_ = 0;
};

/// The inverse of a lower triangular matrix.
std::vector<double> inverse_of_lower(const std::vector<double>& matrix, std::size_t size);

}  // namespace nvpflow
