/// @file
/// What a flow is: FlowSpec names the layers, ParamLayout gives every parameter its name, shape and place in one
/// flat buffer. Nothing else in the library knows either.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include <nvpflow/export.h>

namespace nvpflow {

/// The type of parameters, arrays and arithmetic.
enum class DType { float32, float64 };
/// What follows each hidden dense layer; leaky_relu has slope 0.01 and elu alpha 1, gelu is the exact one.
enum class Activation { relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus };
/// How initial weights are drawn; initialize_parameters() says what each of them is.
enum class Init { glorot, fan_in };
/// The alternatives of LayerSpec, in its order.
enum class LayerKind { coupling, standardize };

/// @{
/// "float32", "relu", "coupling"; the parsers throw Error(invalid_argument) that lists the known names.
NVPFLOW_API std::string_view name_of(DType dtype);
NVPFLOW_API std::string_view name_of(Activation activation);
NVPFLOW_API std::string_view name_of(LayerKind kind);
NVPFLOW_API std::string_view name_of(Init init);
NVPFLOW_API DType parse_dtype(std::string_view name);
NVPFLOW_API Activation parse_activation(std::string_view name);
NVPFLOW_API LayerKind parse_layer_kind(std::string_view name);
NVPFLOW_API Init parse_init(std::string_view name);
/// @}
/// Every activation's name, in the order of the enum.
NVPFLOW_API std::vector<std::string> activation_names();

/// Bytes of one element: 4 or 8.
NVPFLOW_API std::int64_t size_of(DType dtype);

/// A run of consecutive features.
struct FeatureRange {
  std::int64_t begin = 0;  ///< the first one's index
  std::int64_t count = 0;  ///< how many
};

/// An affine coupling layer, read in the data -> latent direction:
///
///     y_b = x_b * exp(s) + t,  y_a = x_a,  with s = B tanh(u_s / B),  [u_s, t] = MLP(x_a),  B = scale_bound
///
/// (Dinh et al., Density estimation using Real NVP, 2017, eq. 7-8).
struct Coupling {
  /// false: the first half, features [0, D / 2), conditions the second half; true: the second conditions the first.
  bool swapped = false;
  std::vector<std::int64_t> hidden_sizes;    ///< units of each hidden layer; none: linear heads
  Activation activation = Activation::relu;  ///< after each hidden layer
  double scale_bound = 1.0;                  ///< B, the largest |s|

  /// Every field is equal.
  bool operator==(const Coupling&) const = default;
};

/// y = (x - mean) * exp(-log_std), one mean and log_std per feature, set from the data and not trained.
struct Standardize {
  /// Two standardize layers are always equal: they have no fields.
  bool operator==(const Standardize&) const = default;
};

/// One invertible layer; the alternatives are in the order of LayerKind.
using LayerSpec = std::variant<Coupling, Standardize>;

/// Which alternative it is.
inline LayerKind kind_of(const LayerSpec& layer) { return static_cast<LayerKind>(layer.index()); }

/// A whole flow: ordered layers, first applied to data first.
struct NVPFLOW_API FlowSpec {
  std::int64_t input_size = 0;    ///< D
  DType dtype = DType::float32;   ///< of parameters and arrays
  std::vector<LayerSpec> layers;  ///< first applied to data first

  /// Every field is equal.
  bool operator==(const FlowSpec&) const = default;

  /// Throws Error(invalid_argument) naming the field that is wrong. Sizes are checked before anything is allocated.
  void validate() const;

  /// num_flows couplings that alternate halves (Dinh et al. 2017), after a standardize layer where asked for.
  static FlowSpec real_nvp(std::int64_t input_size, std::int64_t num_flows = 4,
                           std::vector<std::int64_t> hidden_sizes = {256}, Activation activation = Activation::relu,
                           double scale_bound = 1.0, bool standardize = false, DType dtype = DType::float32);

  /// The same layers with parameters and arrays of another type.
  FlowSpec with_dtype(DType other) const;

  /// Coupling layers.
  std::int64_t num_couplings() const;
  /// Features that condition a coupling layer of this flow, a.
  FeatureRange conditioning(const Coupling& layer) const;
  /// Features that a coupling layer of this flow transforms, b.
  FeatureRange transformed(const Coupling& layer) const;
  /// Whether the first layer applied to data is a standardize layer.
  bool begins_with_standardize() const;
};

/// Whether a flow takes and gives rows of data as float64, too: it is float32 and begins with a standardize layer,
/// which is then applied in float64, `(x - mean) * exp(-log_std)` rounded to float32 once, so that the digits of values
/// that are large beside their spread are not lost. All else is computed as for float32 rows.
NVPFLOW_API bool takes_float64_rows(const FlowSpec& spec);

/// What a parameter starts as; initialize_parameters() says how each is drawn.
enum class Initial { zero, hidden_kernel, hidden_bias, head_kernel };

/// One named parameter. Kernels are [in, out], row-major.
struct TensorInfo {
  std::string name;                 ///< "flow_0_coupling_dense_0.kernel"
  std::vector<std::int64_t> shape;  ///< [in, out], [out] or [D]
  std::int64_t offset = 0;          ///< elements from the start of the flat buffer
  std::int64_t size = 0;            ///< elements
  std::int64_t layer = 0;           ///< index into FlowSpec::layers
  Initial initial = Initial::zero;  ///< what it starts as
  std::int64_t fan_in = 0;          ///< inputs of its dense layer; 0: it has none
  std::int64_t fan_out = 0;         ///< outputs of its dense layer; 0: it has none
  bool trained = false;             ///< training changes it by its gradient
  bool decayed = false;             ///< weight decay acts on it
  bool multiplies = false;          ///< a row takes one multiply-add per element
};

/// The flat parameter buffer: tensors in layer order without gaps. Per coupling k (counted over couplings only):
/// flow_{k}_coupling_dense_{j}.kernel/.bias for each hidden layer, flow_{k}_scale.*, flow_{k}_translation.*.
/// Per standardize layer i: standardize_{i}.mean, standardize_{i}.log_std.
class NVPFLOW_API ParamLayout {
 public:
  /// Of a valid spec.
  explicit ParamLayout(const FlowSpec& spec);

  /// All parameters, in the buffer's order.
  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  /// Tensors of layer `layer` start at this index of tensors().
  std::size_t first_tensor(std::size_t layer) const { return first_of_layer_[layer]; }
  /// Elements of the whole buffer.
  std::int64_t size() const { return size_; }
  /// Multiply-adds that one row takes in the dense layers, in one direction.
  double multiply_adds_per_row() const;
  /// nullptr where there is no such tensor.
  const TensorInfo* find(std::string_view name) const;

 private:
  std::vector<TensorInfo> tensors_;
  std::vector<std::size_t> first_of_layer_;
  std::int64_t size_ = 0;
};

/// @{
/// Initial parameters, a function of (layout, seed, init) only. `parameters` holds ParamLayout::size() elements.
///
/// fan_in  kernels and biases of hidden layers U(-1, 1) / sqrt(in): what torch.nn.Linear draws. The biases put the
///         bends of the units at different places.
/// glorot  kernels of hidden layers U(-1, 1) sqrt(6 / (in + out)) (Glorot and Bengio 2010, what Axon uses by default),
///         biases zero.
///
/// The kernels of the two heads are a hundredth of that and their biases zero, so that a new flow is near the identity.
/// Means and log_stds are zero.
NVPFLOW_API void initialize_parameters(const ParamLayout& layout, std::uint64_t seed, float* parameters,
                                       Init init = Init::fan_in);
NVPFLOW_API void initialize_parameters(const ParamLayout& layout, std::uint64_t seed, double* parameters,
                                       Init init = Init::fan_in);
/// @}

}  // namespace nvpflow
