// The first layer of a float32 flow with takes_float64_rows, applied to rows of data in float64.
#pragma once

#include <cstdint>
#include <vector>

namespace nvpflow {

/// The layer, between rows of the caller, which are float64 or float32, and the float32 rows that the second layer
/// sees.
class WideRows {
 public:
  /// Arrays [D]; mean_low: Flow::mean_low, or null.
  void set(std::int64_t features, const float* mean, const float* log_std, const float* mean_low);

  /// Whether float32 cannot hold the mean, so that rows of float32 go this way, too.
  bool is_split() const { return is_split_; }
  /// -sum(log_std)
  double log_det() const { return log_det_; }

  /// y [count, D] of rows begin, begin + 1, ... of x, or of index[begin], ...
  void standardize(const void* x, bool float64, const std::int64_t* index, std::int64_t begin, std::int64_t count,
                   float* y) const;
  /// To rows begin, begin + 1, ... of x.
  void restore(const float* y, std::int64_t count, void* x, bool float64, std::int64_t begin) const;
  /// From cotangents of standardized rows [rows, D] to those of the rows, in place.
  void scale_gradient(float* g, std::int64_t rows) const;

 private:
  std::int64_t row_bytes(bool float64) const {
    return features_ * static_cast<std::int64_t>(float64 ? sizeof(double) : sizeof(float));
  }

  std::int64_t features_ = 0;
  std::vector<double> mean_, std_, inverse_std_;
  double log_det_ = 0;
  bool is_split_ = false;
};

}  // namespace nvpflow
