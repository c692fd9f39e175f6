// lower(): a flow as the kernels see it. The layers are in order, features are ranges, and each tensor is an offset in
// the flat parameter buffer. Both backends pack from this, so that neither knows a LayerSpec.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include <nvpflow/spec.hpp>

#include "program.hpp"

namespace nvpflow {

/// One tensor pair of a dense layer.
struct DensePart {
  std::int64_t kernel = 0;   ///< offset of [in, columns]
  std::int64_t bias = 0;     ///< offset of [columns]
  std::int64_t columns = 0;  ///< outputs
};

/// y = W^T x + c. The outputs of all parts lie side by side: a hidden layer has one part, the heads are several.
struct LoweredDense {
  std::int64_t in = 0;
  std::vector<DensePart> parts;

  std::int64_t out() const {
    std::int64_t sum = 0;
    for (const DensePart& part : parts) sum += part.columns;
    return sum;
  }
};

/// Kind::coupling.
struct LoweredCoupling {
  FeatureRange conditioning, transformed;
  Act activation = Act::relu;
  double bound = 1;                 // of the log-scale
  std::vector<LoweredDense> dense;  // hidden layers, then the heads: parts [scale, translation]
};

/// Kind::standardize; offsets of [D].
struct LoweredStandardize {
  std::int64_t mean = 0, log_std = 0;
};

/// The alternatives are in the order of Kind.
using LoweredLayer = std::variant<LoweredCoupling, LoweredStandardize>;

struct Lowered {
  std::int64_t input_size = 0;
  std::vector<LoweredLayer> layers;  // first applied to data first
};

/// Of a valid spec and its layout.
Lowered lower(const FlowSpec& spec, const ParamLayout& layout);

}  // namespace nvpflow
