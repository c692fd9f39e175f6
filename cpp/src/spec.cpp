#include <nvpflow/spec.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <nvpflow/error.hpp>

#include "layers/check.hpp"
#include "layers/layer.hpp"
#include "names.hpp"
#include "random.hpp"

namespace nvpflow {

using layers::check_range;
using layers::kMaxSize;
using layers::refuse;

namespace {

constexpr std::int64_t kMaxLayers = std::int64_t{1} << 16;
constexpr std::int64_t kMaxTensors = std::int64_t{1} << 19;
constexpr std::int64_t kMaxParameters = std::int64_t{1} << 33;

constexpr Names<DType, 2> kDTypes = {{{DType::float32, "float32"}, {DType::float64, "float64"}}};
constexpr Names<Init, 2> kInits = {{{Init::glorot, "glorot"}, {Init::fan_in, "fan_in"}}};

void check_sizes(const FlowSpec& spec) {
  check_range("context_size", spec.context_size, 0, kMaxSize);
  if (spec.input_size < 2 && spec.context_size == 0) {
    refuse("input_size is " + std::to_string(spec.input_size) +
           ", expected at least 2: a coupling layer needs a part to condition on and a part to transform; a flow "
           "with a context may have 1");
  }
  check_range("input_size", spec.input_size, spec.context_size == 0 ? 2 : 1, kMaxSize);
  if (spec.standardize_context && spec.context_size == 0) {
    refuse("standardize_context is true, expected false where context_size is 0");
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

/// The means of a mixture's components start as far out as this: a standardized column's standard deviation is 1.
constexpr double kMostMean = 2;

/// The largest initial weight of a tensor.
double initial_limit(Init init, const TensorInfo& tensor) {
  const auto in = static_cast<double>(tensor.fan_in), fans = static_cast<double>(tensor.fan_in + tensor.fan_out);
  const double kernel = init == Init::glorot ? std::sqrt(6.0 / fans) : 1 / std::sqrt(in);
  switch (tensor.initial) {
    case Initial::zero:
    case Initial::one:
    case Initial::value:
      return 0;
    case Initial::hidden_kernel:
      return kernel;
    case Initial::hidden_bias:
      return init == Init::glorot ? 0 : kernel;
    case Initial::small_kernel:
      return 0.01 * kernel;
    case Initial::mean:
      return kMostMean;
  }
  refuse("initial is " + std::to_string(static_cast<int>(tensor.initial)) + ", expected an enumerator of Initial");
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
      std::fill_n(values, tensor.size, static_cast<T>(tensor.initial == Initial::one ? 1.0 : tensor.value));
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
std::string_view name_of(Init init) { return find_name(kInits, init, "init"); }

DType parse_dtype(std::string_view name) { return find_value(kDTypes, name, "dtype"); }
Init parse_init(std::string_view name) { return find_value(kInits, name, "init"); }

std::int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 8; }

void FlowSpec::validate() const {
  check_sizes(*this);
  find_name(kDTypes, dtype, "dtype");
  layers::check_base(*this);
  if (layers.size() > static_cast<std::size_t>(kMaxLayers)) {
    refuse("layers holds " + std::to_string(layers.size()) + " layers, expected at most " + std::to_string(kMaxLayers));
  }
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const std::string name = "layers[" + std::to_string(i) + "]";
    if (i > 0 && std::holds_alternative<Bounds>(layers[i])) {
      refuse(name + " is a bounds layer, expected one only as layers[0]: they are bounds of the columns of data");
    }
    layers::check_layer(layers[i], *this, name + ".");
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
  coupling.network.hidden_sizes = std::move(hidden_sizes);
  coupling.network.activation = activation;
  coupling.transform = Affine{LogScale::bounded(scale_bound)};

  // Before `layers` exists: a num_flows of 10^12 must not get as far as an allocation. Here the caller knows no layers.
  check_range("num_flows", num_flows, 1, kMaxLayers - (standardize ? 1 : 0));
  check_sizes(spec);
  layers::check(coupling, spec, "");
  check_num_tensors(num_flows * layers::num_tensors(coupling));

  if (standardize) spec.layers.emplace_back(Standardize{});
  for (std::int64_t k = 0; k < num_flows; ++k) {
    coupling.transformed.name = k % 2 == 1 ? FeatureSet::Name::first_half : FeatureSet::Name::second_half;
    spec.layers.emplace_back(coupling);
  }
  spec.validate();
  return spec;
}

FlowSpec FlowSpec::whitened() const {
  FlowSpec spec = *this;
  if (!begins_with_standardize()) spec.layers.insert(spec.layers.begin(), Standardize{});
  LULinear linear;
  linear.whitens = true;
  spec.layers.insert(spec.layers.begin() + 1, linear);
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

std::vector<std::int64_t> FlowSpec::conditioning(const Coupling& layer) const {
  const std::vector<std::int64_t> b = layer.transformed.of(input_size);
  std::vector<std::int64_t> a;
  a.reserve(static_cast<std::size_t>(input_size) - b.size());
  std::size_t next = 0;  // of b
  for (std::int64_t i = 0; i < input_size; ++i) {
    if (next < b.size() && b[next] == i) {
      ++next;
    } else {
      a.push_back(i);
    }
  }
  return a;
}

std::vector<std::int64_t> FlowSpec::transformed(const Coupling& layer) const {
  return layer.transformed.of(input_size);
}

const Bounds* FlowSpec::bounds() const { return layers.empty() ? nullptr : std::get_if<Bounds>(&layers.front()); }

bool FlowSpec::begins_with_standardize() const {
  const std::size_t first = bounds() == nullptr ? 0 : 1;
  return layers.size() > first && std::holds_alternative<Standardize>(layers[first]);
}

FlowSpec FlowSpec::behind_bounds() const {
  FlowSpec spec = *this;
  if (bounds() != nullptr) spec.layers.erase(spec.layers.begin());
  return spec;
}

bool FlowSpec::whitens() const {
  return std::any_of(layers.begin(), layers.end(), [](const LayerSpec& layer) {
    return layers::facts_of(layer).set_from == layers::SetFrom::covariance;
  });
}

bool takes_float64_rows(const FlowSpec& spec) { return spec.dtype == DType::float32 && spec.begins_with_standardize(); }

ParamLayout::ParamLayout(const FlowSpec& spec) {
  spec.validate();
  first_of_layer_.reserve(spec.layers.size() + 1);
  layers::each_tensor(spec, [&](TensorInfo tensor) {
    // A layer without tensors of its own begins where the next one does.
    first_of_layer_.resize(static_cast<std::size_t>(tensor.layer) + 1, tensors_.size());
    tensor.offset = size_;
    size_ += tensor.size;
    tensors_.push_back(std::move(tensor));
  });
  first_of_layer_.resize(spec.layers.size() + 1, tensors_.size());
  for (const LayerSpec& layer : spec.layers) spline_flops_ += layers::spline_flops(layer, spec);
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
