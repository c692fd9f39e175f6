// What layers start from that see the rows after others: actnorm, and lu_linear where it whitens.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include <nvpflow/spec.hpp>

namespace nvpflow {

/// Rows in an order in which the first ones are as good as any.
template <class T>
struct StartRows {
  std::int64_t count = 0;
  /// Writes `count` rows from `first` on, as the flow's first layer sees them, their context [count, C] and weights
  /// [count] above 0.
  std::function<void(std::int64_t first, std::int64_t count, T* rows, T* context, double* weights)> read;
};

struct StartOptions {
  std::int64_t slice_rows = 4096;  // of a walk at once
  int threads = 1;
  bool anew = false;                      // whitening layers, too, that have been set before
  bool keep_dependent = false;            // columns that follow from others get a little variance of their own
  std::vector<double> units;              // standard deviations of a first standardize layer; empty: none, or all 1
  std::vector<std::string> column_names;  // for messages; may be empty
  std::function<void()> poll;             // called before each slice
};

/// Whether there is a layer that start_layers() sets.
bool has_started_layers(const FlowSpec& spec);

/// Sets, in the order of the layers, so that the later ones see what the earlier ones do:
///
/// every lu_linear layer that whitens and is still the identity, such that its outputs, on the way from data to the
/// latent space, have mean 0 and as their covariance, shrunk, the identity; all rows count.
///
/// every actnorm layer whose tensors are all zeros, such that each of its outputs has mean 0 and standard deviation 1
/// over up to kSelectionRows rows; one that is constant there is only brought to 0. Behind a layer that whitens it
/// stays the identity: rows have the right scale there, and that of the covariance as it was shrunk.
///
/// parameters: flat, of the spec's layout. Walks on the CPU. Throws Error(invalid_argument) that names columns which
/// follow from others, because their covariance has no inverse.
template <class T>
void start_layers(const FlowSpec& spec, std::span<T> parameters, const StartRows<T>& rows, const StartOptions& options);

}  // namespace nvpflow
