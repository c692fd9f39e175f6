/// @file
/// What a flow is: FlowSpec names the layers, ParamLayout gives every parameter its name, shape and place in one
/// flat buffer. Nothing else in the library knows either.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <nvpflow/export.h>
#include <nvpflow/base.hpp>
#include <nvpflow/layers.hpp>

namespace nvpflow {

/// The type of parameters, arrays and arithmetic.
enum class DType { float32, float64 };
/// How initial weights are drawn; initialize_parameters() says what each of them is.
enum class Init { glorot, fan_in };
/// @{
/// "float32", "glorot"; the parsers throw Error(invalid_argument) that lists the known names.
NVPFLOW_API std::string_view name_of(DType dtype);
NVPFLOW_API std::string_view name_of(Init init);
NVPFLOW_API DType parse_dtype(std::string_view name);
NVPFLOW_API Init parse_init(std::string_view name);
/// @}

/// Bytes of one element: 4 or 8.
NVPFLOW_API std::int64_t size_of(DType dtype);

/// A whole flow: ordered layers, first applied to data first.
struct NVPFLOW_API FlowSpec {
  std::int64_t input_size = 0;    ///< D
  std::int64_t context_size = 0;  ///< C, numbers of a context row; 0: the flow has no context
  /// The context is standardized by a mean and log_std per number, set from the data, before all layers.
  bool standardize_context = false;
  DType dtype = DType::float32;   ///< of parameters and arrays
  Base base;                      ///< the distribution of the latents
  std::vector<LayerSpec> layers;  ///< first applied to data first

  /// Every field is equal.
  bool operator==(const FlowSpec&) const = default;

  /// Throws Error(invalid_argument) naming the field that is wrong. Sizes are checked before anything is allocated.
  void validate() const;

  /// num_flows couplings that alternate halves (Dinh et al. 2017), after a standardize layer where asked for.
  static FlowSpec real_nvp(std::int64_t input_size, std::int64_t num_flows = 4,
                           std::vector<std::int64_t> hidden_sizes = {256}, Activation activation = Activation::relu,
                           double scale_bound = 1.0, bool standardize = false, DType dtype = DType::float32);

  /// The same layers behind Standardize, where they do not begin with it, and LULinear{.whitens = true}: the flow
  /// begins as a Gaussian of the rows' shrunk covariance.
  FlowSpec whitened() const;

  /// The same layers with parameters and arrays of another type.
  FlowSpec with_dtype(DType other) const;

  /// Coupling layers.
  std::int64_t num_couplings() const;
  /// Features that condition a coupling layer of this flow, a, ascending.
  std::vector<std::int64_t> conditioning(const Coupling& layer) const;
  /// Features that a coupling layer of this flow transforms, b, ascending.
  std::vector<std::int64_t> transformed(const Coupling& layer) const;
  /// The first layer applied to data where it is a bounds layer, else null.
  const Bounds* bounds() const;
  /// Whether the first layer applied to data, but for bounds, is a standardize layer.
  bool begins_with_standardize() const;
  /// Whether there is an lu_linear layer that whitens.
  bool whitens() const;
  /// The same flow of rows as they come out of the bounds layer.
  FlowSpec behind_bounds() const;
};

/// Whether a flow takes and gives rows of data as float64, too: it is float32 and begins_with_standardize(). That
/// layer, with bounds in front of it, is then applied in float64, and `(x - mean) * exp(-log_std)` rounded to float32
/// once. So values that are large beside their spread keep their digits. All else is computed as for float32 rows.
NVPFLOW_API bool takes_float64_rows(const FlowSpec& spec);

/// What a parameter starts as; initialize_parameters() says how each is drawn.
enum class Initial { zero, one, value, hidden_kernel, hidden_bias, small_kernel, mean };

/// One named parameter. Kernels are [in, out], row-major.
struct TensorInfo {
  std::string name;                 ///< "flow_0_coupling_dense_0.kernel"
  std::vector<std::int64_t> shape;  ///< [in, out], [out] or [D]
  std::int64_t offset = 0;          ///< elements from the start of the flat buffer
  std::int64_t size = 0;            ///< elements
  std::int64_t layer = 0;           ///< index into FlowSpec::layers; their number: it belongs to none
  Initial initial = Initial::zero;  ///< what it starts as
  double value = 0;                 ///< of Initial::value, each element
  std::int64_t fan_in = 0;          ///< inputs of its dense layer; 0: it has none
  std::int64_t fan_out = 0;         ///< outputs of its dense layer; 0: it has none
  bool trained = false;             ///< training changes it by its gradient
  bool decayed = false;             ///< weight decay acts on it
  bool from_data = false;           ///< fit() and Flow::initialize_from set it from data
  bool signs = false;               ///< each element is 1 or -1
  bool multiplies = false;          ///< a row takes one multiply-add per element
};

/// The flat parameter buffer: tensors in layer order without gaps. k counts couplings, i layers, j dense layers.
///
///     coupling, mlp             flow_{k}_coupling_dense_{j}.kernel/.bias, then the heads
///     coupling, two networks    flow_{k}_scale_dense_{j}.*, flow_{k}_scale.*,
///                               flow_{k}_translation_dense_{j}.*, flow_{k}_translation.*
///     coupling, residual        flow_{k}_initial.*; per block j flow_{k}_block_{j}_affine.scale/.shift [H],
///                               flow_{k}_block_{j}_dense_0.*, flow_{k}_block_{j}_dense_1.*,
///                               flow_{k}_block_{j}_context.*; then the heads
///     heads                     affine: flow_{k}_scale.*, flow_{k}_translation.*; additive: flow_{k}_translation.*;
///                               spline: flow_{k}_widths.*, flow_{k}_heights.*, and flow_{k}_derivatives.* if any
///     standardize               standardize_{i}.mean/.log_std [D]
///     actnorm                   actnorm_{i}.log_scale/.shift [D]
///     lu_linear                 lu_linear_{i}.lower/.upper [D (D - 1) / 2], .log_diagonal/.sign/.bias [D]
///     element_spline            spline_{i}.widths/.heights [num_bins, n], .derivatives [num_slopes(), n] if any
///     the base, behind layers   student_t: base.log_df [D]; mixture: base.logits [M], base.means/.log_scales [M, D],
///                               and base.lower [M, D (D - 1) / 2] where covariances are full
///     a standardized context    context.mean/.log_std [C], behind all others
///     permutation, bounds       none
///
/// The kernel of a network's first layer has a row for each conditioning feature, then one for each context number.
/// lower and upper hold the elements off the diagonal row by row; n is the number of features that a spline bends.
class NVPFLOW_API ParamLayout {
 public:
  /// Of a valid spec.
  explicit ParamLayout(const FlowSpec& spec);

  /// All parameters, in the buffer's order.
  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  /// Tensors of layer `layer` start at this index of tensors(); those that belong to none, at that of the layer behind
  /// the last one.
  std::size_t first_tensor(std::size_t layer) const { return first_of_layer_[layer]; }
  /// Elements of the whole buffer.
  std::int64_t size() const { return size_; }
  /// Multiply-adds that one row takes in the dense layers, in one direction.
  double multiply_adds_per_row() const;
  /// Floating-point operations that one row takes in one direction: two for each multiply-add, and an estimate for the
  /// splines.
  double flops_per_row() const { return 2 * multiply_adds_per_row() + spline_flops_; }
  /// nullptr where there is no such tensor.
  const TensorInfo* find(std::string_view name) const;

 private:
  std::vector<TensorInfo> tensors_;
  std::vector<std::size_t> first_of_layer_;
  double spline_flops_ = 0;
  std::int64_t size_ = 0;
};

/// @{
/// Initial parameters, a function of (layout, seed, init) only. `parameters` holds ParamLayout::size() elements.
///
/// fan_in  kernels and biases of hidden layers U(-1, 1) / sqrt(in): what torch.nn.Linear draws. The biases put the
///         bends of the units at different places.
/// glorot  kernels of hidden layers U(-1, 1) sqrt(6 / (in + out)) (Glorot and Bengio 2010), biases zero.
///
/// The kernels of the heads are a hundredth of that and their biases zero, so that a new flow is near the identity. Of
/// a flow that whitens they are zero, too, so that its couplings are the identity. Means and log_stds are zero. The
/// components of a mixture are alike but for their means, U(-2, 2).
NVPFLOW_API void initialize_parameters(const ParamLayout& layout, std::uint64_t seed, float* parameters,
                                       Init init = Init::fan_in);
NVPFLOW_API void initialize_parameters(const ParamLayout& layout, std::uint64_t seed, double* parameters,
                                       Init init = Init::fan_in);
/// @}

}  // namespace nvpflow
