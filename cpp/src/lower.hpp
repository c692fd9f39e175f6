// lower(): a flow as the kernels see it. The layers are in order, each tensor is an offset in the flat parameter
// buffer, and each feature has a place in a tile. Both backends pack from this, so that neither knows a LayerSpec.
//
// Placement. A feature of a tile is a row of it, so that any place costs the same. Permutations run no kernel: the
// features after them have other places. The places are chosen such that the first coupling behind the data, or behind
// a linear layer, finds its features one after the other; a coupling whose features lie otherwise takes them by index.
#pragma once

#include <cstdint>
#include <optional>
#include <variant>
#include <vector>

#include <nvpflow/spec.hpp>

#include "base_density.hpp"
#include "kinds.hpp"
#include "log_scale.hpp"
#include "spline_map.hpp"

namespace nvpflow {

constexpr std::int64_t kNoBias = -1;

/// One tensor pair of a dense layer.
struct DensePart {
  std::int64_t kernel = 0;   ///< offset of [in, columns]
  std::int64_t bias = 0;     ///< offset of [columns], or kNoBias
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

/// scale and shift of a block's affine map; offsets of [H].
struct LoweredAffine {
  std::int64_t scale = 0, shift = 0;
};

/// From the conditioning features to the heads.
struct LoweredNetwork {
  NetworkKind kind = NetworkKind::mlp;
  Act activation = Act::relu;
  bool layer_norm = false;
  std::vector<LoweredDense> dense;      // mlp: hidden layers; residual: initial, two per block; then the heads
  std::optional<LoweredDense> context;  // what dense[0] starts from; dense[0] has no bias then
  std::vector<LoweredDense> gates;      // residual: of each block, or none
  std::vector<LoweredAffine> affines;   // the same
};

/// LogScale.
struct LoweredScale {
  ScaleFunction function = ScaleFunction::none;
  double factor = 1, divisor = 1, low = 0, high = 0, offset = 0;
  bool negated = false;
};

/// @{
/// As the kernels read it.
template <class T>
Scale<T> scale_of(const LoweredScale& from);
template <class T>
SplineMap<T> map_of(const Spline& from);
/// @}

/// Base.
struct LoweredBase {
  BaseKind kind = BaseKind::normal;
  double low = 0, high = 0, log_density = 0;  // uniform
  std::int64_t components = 0;                // mixture
  bool full = false;                          // the same
  // Offsets of the tensors: log_df, or logits, means, log_scales and lower.
  std::int64_t offset = 0, means = 0, log_scales = 0, lower = 0;
};

/// As the kernels read it, but for what depends on parameters.
template <class T>
BaseDensity<T> density_of(const LoweredBase& from);

/// Places of features, in the order of the features: begin, begin + 1, ..., or index where they do not follow each
/// other so.
struct Places {
  std::int64_t begin = 0, count = 0;
  std::vector<std::int64_t> index;  // empty: from begin on
};

/// Kind::coupling.
struct LoweredCoupling {
  bool inverse = false;
  Places conditioning, transformed;
  std::vector<std::int64_t> place;  // of each feature of the layer's input; empty: its own index
  LoweredScale scale;
  std::vector<LoweredNetwork> networks;  // of all heads, or one of each
};

/// Kind::diagonal: y = (x - mean) exp(-log_std), offsets of [D].
struct LoweredDiagonal {
  bool inverse = false;
  std::vector<std::int64_t> place;  // as above
  std::int64_t mean = 0, log_std = 0;
};

/// Kind::linear: y = L U x + bias, offsets of the tensors of lu_linear.
struct LoweredLinear {
  bool inverse = false;
  // As above, of the layer's input and of its output on the way from data; x is the input unless inverse.
  std::vector<std::int64_t> in_place, out_place;
  std::int64_t lower = 0, upper = 0, log_diagonal = 0, sign = 0, bias = 0;
};

/// A tensor of numbers that are the same for all rows.
struct LoweredConstants {
  std::int64_t offset = 0, size = 0;
};

/// Kind::spline: a coupling, or features whose splines are the same for all rows.
struct LoweredSpline {
  bool inverse = false;
  Places conditioning, transformed;
  std::vector<std::int64_t> place;  // as above
  Spline spline;
  std::vector<LoweredNetwork> networks;     // one, or none ...
  std::vector<LoweredConstants> constants;  // ... and these in its stead: what it would say, part by part
};

/// The alternatives are in the order of Kind.
using LoweredLayer = std::variant<LoweredCoupling, LoweredDiagonal, LoweredLinear, LoweredSpline>;

/// The networks of a layer.
const std::vector<LoweredNetwork>& networks_of(const LoweredLayer& layer);

struct Lowered {
  std::int64_t input_size = 0, context_size = 0;
  /// Places of the features of data and of the latent space; empty: their own indices.
  std::vector<std::int64_t> data_place, latent_place;
  LoweredBase base;
  std::int64_t context_mean = -1, context_log_std = -1;  // offsets of [C]; -1: the context is not standardized
  std::vector<LoweredLayer> layers;                      // first applied to data first
};

/// What lower() is building: the layers so far, and where the features are.
class Lowering {
 public:
  explicit Lowering(const FlowSpec& spec);

  /// The features of the layers to come are order[0], order[1], ... of the present ones.
  void permute(const std::vector<std::int64_t>& order);
  /// a, b: features that condition, and that are transformed.
  void add_coupling(LoweredCoupling coupling, const std::vector<std::int64_t>& a, const std::vector<std::int64_t>& b);
  void add_spline(LoweredSpline spline, const std::vector<std::int64_t>& a, const std::vector<std::int64_t>& b);
  void add_diagonal(bool inverse, std::int64_t mean, std::int64_t log_std);
  void add_linear(LoweredLinear linear);
  Lowered finish();

  /// Puts the features where the first coupling from layer `index` on, before another linear layer, wants them.
  void place_from(std::size_t index);
  /// The layer that is being lowered.
  void at(std::size_t index) { index_ = index; }

 private:
  Places places_of(const std::vector<std::int64_t>& features) const;
  std::vector<std::int64_t> place_or_empty() const;

  const FlowSpec& spec_;
  Lowered lowered_;
  std::vector<std::int64_t> place_;  // of each feature
  std::size_t index_ = 0;
};

/// Of a valid spec and its layout.
Lowered lower(const FlowSpec& spec, const ParamLayout& layout);

}  // namespace nvpflow
