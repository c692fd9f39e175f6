// Rows that lie outside of a bounded base before training. They make every loss infinite, and layers that keep the
// base's interval never bring them in.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include <nvpflow/base.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/execution.hpp>
#include <nvpflow/flow.hpp>

#include "layers/check.hpp"

namespace nvpflow {

/// "latent 2 is 1.25, expected 0 to 1", of the first one outside; "its density is 0" where none is.
template <class T>
std::string describe_outside(const UniformBase& base, const std::vector<T>& latents) {
  const auto low = static_cast<T>(base.low), high = static_cast<T>(base.high);
  for (std::size_t j = 0; j < latents.size(); ++j) {
    if (latents[j] >= low && latents[j] <= high) continue;
    return "latent " + std::to_string(j) + " is " + layers::text_of(static_cast<double>(latents[j])) + ", expected " +
           layers::text_of(base.low) + " to " + layers::text_of(base.high);
  }
  return "its density is 0";
}

/// Error(invalid_argument) where rows [N, D] of `name` have no density under the flow, whose base is uniform. context:
/// [N, C]. which(i): what messages call row i.
template <class T, class Which, class Poll>
void refuse_rows_outside(const Flow& flow, const char* name, std::span<const T> rows, std::span<const T> context,
                         std::int64_t slice_rows, Which which, Poll poll) {
  const auto features = static_cast<std::size_t>(flow.spec().input_size);
  const auto width = static_cast<std::size_t>(flow.spec().context_size);
  const std::size_t count = rows.size() / features, slice = static_cast<std::size_t>(slice_rows);
  const auto context_of = [&](std::size_t first, std::size_t n) {
    return width > 0 ? Context(context.subspan(first * width, n * width)) : Context();
  };
  std::size_t outside = 0, example = 0;
  std::vector<T> log_prob;
  for (std::size_t first = 0; first < count; first += slice) {
    poll();
    const std::size_t here = std::min(slice, count - first);
    log_prob.resize(here);
    flow.log_prob<T>(rows.subspan(first * features, here * features), log_prob, context_of(first, here));
    for (std::size_t i = 0; i < here; ++i) {
      if (log_prob[i] != -std::numeric_limits<T>::infinity()) continue;
      if (outside++ == 0) example = first + i;
    }
  }
  if (outside == 0) return;
  std::vector<T> latents(features);
  flow.forward<T>(rows.subspan(example * features, features), latents, {}, context_of(example, 1));
  throw Error(ErrorCode::invalid_argument,
              std::string(name) + " has " + std::to_string(outside) + " of " + std::to_string(count) +
                  " rows outside the uniform base (" + which(example) + ": " +
                  describe_outside(std::get<UniformBase>(flow.spec().base), latents) +
                  "), which have no density; scale the rows into the interval or make it wider, without layers that "
                  "move rows out of it, as standardize and actnorm do");
}

}  // namespace nvpflow
