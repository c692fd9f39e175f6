// What the library knows of a kind of layer: its fields, what they may be, its tensors and how it is lowered. Each kind
// has a file here that defines the five functions; std::visit calls them, so a kind that lacks one does not compile or
// does not link.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include <nvpflow/spec.hpp>

#include "../lower.hpp"

namespace nvpflow::layers {

/// One field of a layer, or of what it is made of: its name in JSON, Python and messages, and where its value is.
struct Field {
  const char* name;
  std::variant<bool*, std::int64_t*, double*, std::vector<std::int64_t>*, std::vector<double>*, Activation*,
               FeatureSet*, Transform*, LogScale*, Network*, Spline*, KnotSlope*, Spline::Boundary*, Spline::Tails*,
               MixtureBase::Covariance*>
      value;
  double of_null = 0;  // the infinite number that is null in JSON, of a double or of doubles; 0: there is none
};

/// Where a layer stands in its flow.
struct Site {
  std::int64_t layer = 0;     // its index
  std::int64_t coupling = 0;  // coupling layers before it
  bool zero_heads = false;    // what couplings start with: they are the identity
};

using TensorSink = std::function<void(TensorInfo)>;

/// What of the rows a layer is set from before training.
enum class SetFrom {
  nothing,
  columns,     // the columns of data
  sample,      // a sample of the rows, as they arrive at the layer
  covariance,  // the covariance of all of them, as they arrive
};

/// What the code around a layer asks of it.
struct LayerFacts {
  SetFrom set_from = SetFrom::nothing;
  bool inverse = false;                              ///< its formula is read from latent to data
  bool has_kernel = true;                            ///< the kernels do something at it
  bool keeps_columns = false;                        ///< each feature that leaves is one that came
  bool places_anew = false;                          ///< its output lies where the layers behind it want it
  const std::vector<std::int64_t>* order = nullptr;  ///< where features come from; null: they keep their indices
  const Spline* spline = nullptr;                    ///< null: it has none
  const FeatureSet* splined = nullptr;               ///< the features of the spline
};

// ---- five functions per kind ----

/// The one list of a kind's fields, in the order of the JSON text.
std::vector<Field> fields(Coupling& layer);
std::vector<Field> fields(Standardize& layer);
std::vector<Field> fields(ActNorm& layer);
std::vector<Field> fields(Permutation& layer);
std::vector<Field> fields(LULinear& layer);
std::vector<Field> fields(ElementSpline& layer);
std::vector<Field> fields(Bounds& layer);

/// Throws Error(invalid_argument) naming the field that is wrong. `prefix` is put before the names: "layers[3]." or
/// nothing.
void check(const Coupling& layer, const FlowSpec& spec, const std::string& prefix);
void check(const Standardize& layer, const FlowSpec& spec, const std::string& prefix);
void check(const ActNorm& layer, const FlowSpec& spec, const std::string& prefix);
void check(const Permutation& layer, const FlowSpec& spec, const std::string& prefix);
void check(const LULinear& layer, const FlowSpec& spec, const std::string& prefix);
void check(const ElementSpline& layer, const FlowSpec& spec, const std::string& prefix);
void check(const Bounds& layer, const FlowSpec& spec, const std::string& prefix);

/// The layer's tensors in the order of the flat buffer, without their offsets.
void tensors(const Coupling& layer, const FlowSpec& spec, const Site& site, const TensorSink& sink);
void tensors(const Standardize& layer, const FlowSpec& spec, const Site& site, const TensorSink& sink);
void tensors(const ActNorm& layer, const FlowSpec& spec, const Site& site, const TensorSink& sink);
void tensors(const Permutation& layer, const FlowSpec& spec, const Site& site, const TensorSink& sink);
void tensors(const LULinear& layer, const FlowSpec& spec, const Site& site, const TensorSink& sink);
void tensors(const ElementSpline& layer, const FlowSpec& spec, const Site& site, const TensorSink& sink);
void tensors(const Bounds& layer, const FlowSpec& spec, const Site& site, const TensorSink& sink);

/// Appends what the kernels do at the layer; first: its first tensor in the layout.
void lower(const Coupling& layer, const FlowSpec& spec, const TensorInfo* first, Lowering& to);
void lower(const Standardize& layer, const FlowSpec& spec, const TensorInfo* first, Lowering& to);
void lower(const ActNorm& layer, const FlowSpec& spec, const TensorInfo* first, Lowering& to);
void lower(const Permutation& layer, const FlowSpec& spec, const TensorInfo* first, Lowering& to);
void lower(const LULinear& layer, const FlowSpec& spec, const TensorInfo* first, Lowering& to);
void lower(const ElementSpline& layer, const FlowSpec& spec, const TensorInfo* first, Lowering& to);
void lower(const Bounds& layer, const FlowSpec& spec, const TensorInfo* first, Lowering& to);

LayerFacts facts(const Coupling& layer);
LayerFacts facts(const Standardize& layer);
LayerFacts facts(const ActNorm& layer);
LayerFacts facts(const Permutation& layer);
LayerFacts facts(const LULinear& layer);
LayerFacts facts(const ElementSpline& layer);
LayerFacts facts(const Bounds& layer);

// ---- what couplings are made of ----

/// A set of features with at least one; field: its name.
void check_features(const FeatureSet& set, const FlowSpec& spec, const std::string& prefix, const char* field);
std::vector<Field> fields(Transform& transform);
std::vector<Field> fields(LogScale& log_scale);
std::vector<Field> fields(Network& network);
std::vector<Field> fields(Spline& spline);
std::vector<Field> fields(KnotSlope& slope);

// ---- the base ----

/// "normal".
std::string_view name_of(const Base& base);
/// A base of the kind with all fields at their defaults.
Base parse_base(std::string_view name);
std::vector<Field> fields(Base& base);
void check_base(const FlowSpec& spec);
/// What the code around a base asks of it.
struct BaseFacts {
  bool is_bounded = false;       ///< there are latents without a density
  bool has_heavy_tails = false;  ///< far rows are what it is for
  bool has_temperature = false;  ///< at a temperature it is of the same kind
  bool starts_at_rows = false;   ///< its parameters are set from latents before training
};
BaseFacts facts_of(const Base& base);
/// Its tensors, behind those of all layers, as above.
void base_tensors(const FlowSpec& spec, const TensorSink& sink);
/// first: its first tensor in the layout.
LoweredBase lower_base(const FlowSpec& spec, const TensorInfo* first);

// ---- format 1.0 ----

/// A coupling that format 1.0 can say: of halves, not inverse, F tanh(u / F), one mlp.
bool is_plain(const Coupling& layer);
/// Its fields there. swapped: set where the first half is transformed; the values of the others are the layer's own.
std::vector<Field> plain_fields(Coupling& layer, bool& swapped);

/// Whether the heads are those of y = x exp(s) + t.
bool has_scale_and_shift(const Transform& transform);

// ---- any kind ----

/// Floating-point operations of a row's splines there, roughly.
double spline_flops(const LayerSpec& layer, const FlowSpec& spec);
LayerFacts facts_of(const LayerSpec& layer);
std::vector<Field> fields(LayerSpec& layer);
void check_layer(const LayerSpec& layer, const FlowSpec& spec, const std::string& prefix);
/// A layer of the kind with all fields at their defaults.
LayerSpec make_layer(LayerKind kind);
/// Every tensor of the flow in order, without offsets. Sizes of the spec's fields must be valid, their sums need not
/// be.
void each_tensor(const FlowSpec& spec, const TensorSink& sink);
/// Tensors of a coupling layer.
std::int64_t num_tensors(const Coupling& layer);
/// Tensors of the flow.
std::int64_t num_tensors(const FlowSpec& spec);
/// "" where the tensor may hold the numbers of `values` [size]: a sign is 1 or -1.
std::string describe_wrong_sign(const TensorInfo& tensor, DType dtype, const void* values);
/// [size], one number per feature or context number.
TensorInfo vector_tensor(std::string name, std::int64_t size, std::int64_t layer);

}  // namespace nvpflow::layers
