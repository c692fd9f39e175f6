// What actnorm layers start from.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include <nvpflow/spec.hpp>

namespace nvpflow {

/// Sets every actnorm layer whose tensors are all zeros such that, on the way from data to the latent space, each of
/// its outputs has mean 0 and standard deviation 1 over the rows; one that is constant there is only brought to 0. In
/// the order of the layers: the later ones see what the earlier ones do.
///
/// parameters: flat, of the spec's layout. rows [N, D] as the flow's first layer sees them, context [N, C]. Walks on
/// the CPU, in slices of slice_rows, and calls poll() before each.
template <class T>
void start_actnorms(const FlowSpec& spec, std::span<T> parameters, std::vector<T> rows, const std::vector<T>& context,
                    std::int64_t slice_rows, int threads, const std::function<void()>& poll);

}  // namespace nvpflow
