#include <nvpflow/spec.hpp>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <nvpflow/error.hpp>

#include "io/messages.hpp"
#include "layers/layer.hpp"
#include "math.hpp"
#include "overloaded.hpp"

namespace nvpflow {
namespace {

// Far above any useful model, far below where sizes overflow: a wrong number fails with its name, not as bad_alloc.
constexpr std::int64_t kMaxInputSize = std::int64_t{1} << 20;
constexpr std::int64_t kMaxHiddenSize = std::int64_t{1} << 20;
constexpr std::int64_t kMaxLayers = std::int64_t{1} << 16;
constexpr std::int64_t kMaxTensors = std::int64_t{1} << 19;
constexpr std::int64_t kMaxParameters = std::int64_t{1} << 33;

template <class Enum, std::size_t N>
using Names = std::array<std::pair<Enum, std::string_view>, N>;

constexpr Names<DType, 2> kDTypes = {{{DType::float32, "float32"}, {DType::float64, "float64"}}};
constexpr Names<LayerKind, 2> kLayerKinds = {
    {{LayerKind::coupling, "coupling"}, {LayerKind::standardize, "standardize"}}};
static_assert(std::variant_size_v<LayerSpec> == kLayerKinds.size(), "each kind of layer has a name");
static_assert(
    std::is_same_v<std::variant_alternative_t<static_cast<std::size_t>(LayerKind::coupling), LayerSpec>, Coupling> &&
        std::is_same_v<std::variant_alternative_t<static_cast<std::size_t>(LayerKind::standardize), LayerSpec>,
                       Standardize>,
    "LayerKind and LayerSpec have one order");
constexpr Names<Init, 2> kInits = {{{Init::glorot, "glorot"}, {Init::fan_in, "fan_in"}}};
constexpr Names<Activation, 8> kActivations = {{{Activation::relu, "relu"},
                                                {Activation::leaky_relu, "leaky_relu"},
                                                {Activation::elu, "elu"},
                                                {Activation::gelu, "gelu"},
                                                {Activation::silu, "silu"},
                                                {Activation::tanh, "tanh"},
                                                {Activation::sigmoid, "sigmoid"},
                                                {Activation::softplus, "softplus"}}};

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

template <class Enum, std::size_t N>
std::string list_of(const Names<Enum, N>& names) {
  std::string list;
  for (const auto& [value, name] : names) list.append(list.empty() ? "" : ", ").append(name);
  return list;
}

template <class Enum, std::size_t N>
std::string_view find_name(const Names<Enum, N>& names, Enum value, const char* field) {
  for (const auto& [known, name] : names) {
    if (known == value) return name;
  }
  refuse(std::string(field) + " is the enumerator " + std::to_string(static_cast<int>(value)) + ", expected one of " +
         list_of(names));
}

template <class Enum, std::size_t N>
Enum find_value(const Names<Enum, N>& names, std::string_view text, const char* field) {
  for (const auto& [value, name] : names) {
    if (name == text) return value;
  }
  refuse(std::string(field) + " is " + io::quote(text) + ", expected one of " + list_of(names));
}

std::string text_of(double value) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof text, value).ptr};
}

void check_range(const std::string& field, std::int64_t value, std::int64_t lowest, std::int64_t highest) {
  if (value >= lowest && value <= highest) return;
  refuse(field + " is " + std::to_string(value) + ", expected " + std::to_string(lowest) + " to " +
         std::to_string(highest));
}

void check_input_size(std::int64_t input_size) {
  if (input_size < 2) {
    refuse("input_size is " + std::to_string(input_size) +
           ", expected at least 2: a coupling layer needs a part to condition on and a part to transform");
  }
  check_range("input_size", input_size, 2, kMaxInputSize);
}

/// The bound must survive the rounding to `dtype`: 1e300 would be infinite and 1e-300 zero in float32.
void check_scale_bound(const std::string& field, double value, DType dtype) {
  const bool narrow = dtype == DType::float32;
  const double lowest = narrow ? double{std::numeric_limits<float>::min()} : std::numeric_limits<double>::min();
  const double highest = narrow ? double{std::numeric_limits<float>::max()} : std::numeric_limits<double>::max();
  if (value >= lowest && value <= highest) return;  // false for NaN
  refuse(field + " is " + text_of(value) + ", expected finite and > 0 in " + std::string(name_of(dtype)));
}

/// `prefix` is put before the field names: "layers[3]." or nothing.
void check_layer(const std::string& prefix, LayerSpec layer, DType dtype) {
  for (const layers::Field& field : layers::fields(layer)) {
    const std::string name = prefix + field.name;
    std::visit(Overloaded{[](const bool*) {},
                          [&](const std::vector<std::int64_t>* sizes) {
                            for (std::size_t j = 0; j < sizes->size(); ++j) {
                              check_range(name + "[" + std::to_string(j) + "]", (*sizes)[j], 1, kMaxHiddenSize);
                            }
                          },
                          [&](const Activation* value) { find_name(kActivations, *value, name.c_str()); },
                          [&](const double* value) { check_scale_bound(name, *value, dtype); }},
               field.value);
  }
}

void check_num_tensors(std::int64_t tensors) {
  if (tensors <= kMaxTensors) return;
  refuse("layers and hidden_sizes give more than " + std::to_string(kMaxTensors) +
         " parameter tensors, expected at most that many");
}

void check_num_parameters(std::int64_t parameters) {
  if (parameters <= kMaxParameters) return;
  refuse("input_size, layers and hidden_sizes give more than " + std::to_string(kMaxParameters) +
         " parameters, expected at most that many");
}

/// Counts without overflow: sizes are at most 2^20 here, and the sum is checked after each term of at most 2^41.
void check_totals(const FlowSpec& spec) {
  std::int64_t tensors = 0, parameters = 0;
  layers::each_tensor(spec, [&](const TensorInfo& tensor) {
    check_num_tensors(++tensors);
    check_num_parameters(parameters += tensor.size);
  });
}

/// The largest initial weight of a tensor.
double initial_limit(Init init, const TensorInfo& tensor) {
  const auto in = static_cast<double>(tensor.fan_in), fans = static_cast<double>(tensor.fan_in + tensor.fan_out);
  const double kernel = init == Init::glorot ? std::sqrt(6.0 / fans) : 1 / std::sqrt(in);
  switch (tensor.initial) {
    case Initial::zero:
      return 0;
    case Initial::hidden_kernel:
      return kernel;
    case Initial::hidden_bias:
      return init == Init::glorot ? 0 : kernel;
    case Initial::head_kernel:
      return 0.01 * kernel;
  }
  refuse("initial is no Initial");
}

template <class T>
void initialize(const ParamLayout& layout, std::uint64_t seed, T* parameters, Init init) {
  find_name(kInits, init, "init");
  std::uint64_t block = std::numeric_limits<std::uint64_t>::max();  // the one that `words` holds
  std::uint32_t words[4] = {};
  const auto word_of = [&](std::uint64_t i) {
    if (i / 4 != block) {
      block = i / 4;
      // There are 2^33 parameters at most (kMaxParameters), so one word counts the blocks.
      const std::uint32_t counter[4] = {static_cast<std::uint32_t>(block), 0, 0, kStreamInitialize};
      philox4x32(seed, counter, words);
    }
    return words[i % 4];
  };
  for (const TensorInfo& tensor : layout.tensors()) {
    T* values = parameters + tensor.offset;
    const double limit = initial_limit(init, tensor);
    if (limit == 0) {
      std::fill_n(values, tensor.size, T{0});
      continue;
    }
    for (std::int64_t i = 0; i < tensor.size; ++i) {
      const double uniform = (word_of(static_cast<std::uint64_t>(tensor.offset + i)) + 0.5) * 0x1p-32;  // (0, 1)
      values[i] = static_cast<T>((2.0 * uniform - 1.0) * limit);
    }
  }
}

}  // namespace

std::string_view name_of(DType dtype) { return find_name(kDTypes, dtype, "dtype"); }
std::string_view name_of(Activation activation) { return find_name(kActivations, activation, "activation"); }
std::string_view name_of(LayerKind kind) { return find_name(kLayerKinds, kind, "kind"); }
std::string_view name_of(Init init) { return find_name(kInits, init, "init"); }

DType parse_dtype(std::string_view name) { return find_value(kDTypes, name, "dtype"); }
Activation parse_activation(std::string_view name) { return find_value(kActivations, name, "activation"); }
LayerKind parse_layer_kind(std::string_view name) { return find_value(kLayerKinds, name, "kind"); }
Init parse_init(std::string_view name) { return find_value(kInits, name, "init"); }

std::vector<std::string> activation_names() {
  std::vector<std::string> names;
  for (const auto& [value, name] : kActivations) names.emplace_back(name);
  return names;
}

std::int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 8; }

void FlowSpec::validate() const {
  check_input_size(input_size);
  find_name(kDTypes, dtype, "dtype");
  if (layers.size() > static_cast<std::size_t>(kMaxLayers)) {
    refuse("layers holds " + std::to_string(layers.size()) + " layers, expected at most " + std::to_string(kMaxLayers));
  }
  for (std::size_t i = 0; i < layers.size(); ++i) {
    check_layer("layers[" + std::to_string(i) + "].", layers[i], dtype);
  }
  if (num_couplings() == 0) refuse("layers has no coupling, expected at least one");
  check_totals(*this);
}

FlowSpec FlowSpec::real_nvp(std::int64_t input_size, std::int64_t num_flows, std::vector<std::int64_t> hidden_sizes,
                            Activation activation, double scale_bound, bool standardize, DType dtype) {
  FlowSpec spec;
  spec.input_size = input_size;
  spec.dtype = dtype;
  Coupling coupling;
  coupling.hidden_sizes = std::move(hidden_sizes);
  coupling.activation = activation;
  coupling.scale_bound = scale_bound;

  // Before `layers` exists: a num_flows of 10^12 must not get as far as an allocation. Here the caller knows no layers.
  check_range("num_flows", num_flows, 1, kMaxLayers - (standardize ? 1 : 0));
  check_layer("", coupling, dtype);
  check_num_tensors(num_flows * layers::num_tensors(coupling));

  if (standardize) spec.layers.emplace_back(Standardize{});
  for (std::int64_t k = 0; k < num_flows; ++k) {
    coupling.swapped = k % 2 == 1;
    spec.layers.emplace_back(coupling);
  }
  spec.validate();
  return spec;
}

FlowSpec FlowSpec::with_dtype(DType other) const {
  FlowSpec spec = *this;
  spec.dtype = other;
  spec.validate();
  return spec;
}

std::int64_t FlowSpec::num_couplings() const {
  return std::count_if(layers.begin(), layers.end(),
                       [](const LayerSpec& layer) { return std::holds_alternative<Coupling>(layer); });
}

FeatureRange FlowSpec::conditioning(const Coupling& layer) const {
  const std::int64_t half = input_size / 2;
  return layer.swapped ? FeatureRange{half, input_size - half} : FeatureRange{0, half};
}

FeatureRange FlowSpec::transformed(const Coupling& layer) const {
  const std::int64_t half = input_size / 2;
  return layer.swapped ? FeatureRange{0, half} : FeatureRange{half, input_size - half};
}

bool FlowSpec::begins_with_standardize() const {
  return !layers.empty() && std::holds_alternative<Standardize>(layers.front());
}

bool takes_float64_rows(const FlowSpec& spec) { return spec.dtype == DType::float32 && spec.begins_with_standardize(); }

ParamLayout::ParamLayout(const FlowSpec& spec) {
  spec.validate();
  first_of_layer_.reserve(spec.layers.size());
  layers::each_tensor(spec, [&](TensorInfo tensor) {
    // A layer without tensors of its own begins where the next one does.
    first_of_layer_.resize(static_cast<std::size_t>(tensor.layer) + 1, tensors_.size());
    tensor.offset = size_;
    size_ += tensor.size;
    tensors_.push_back(std::move(tensor));
  });
  first_of_layer_.resize(spec.layers.size(), tensors_.size());
}

double ParamLayout::multiply_adds_per_row() const {
  std::int64_t sum = 0;
  for (const TensorInfo& tensor : tensors_) sum += tensor.multiplies ? tensor.size : 0;
  return static_cast<double>(sum);
}

const TensorInfo* ParamLayout::find(std::string_view name) const {
  for (const TensorInfo& tensor : tensors_) {
    if (tensor.name == name) return &tensor;
  }
  return nullptr;
}

void initialize_parameters(const ParamLayout& layout, std::uint64_t seed, float* parameters, Init init) {
  initialize(layout, seed, parameters, init);
}

void initialize_parameters(const ParamLayout& layout, std::uint64_t seed, double* parameters, Init init) {
  initialize(layout, seed, parameters, init);
}

}  // namespace nvpflow
