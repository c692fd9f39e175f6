// The CUDA kernels on the host machine of simt.hpp: every path against the naive oracle, and the machine itself against
// kernels with the faults it is meant to find. No GPU and no CUDA toolkit needed.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#define NVPFLOW_SIMT
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

#include <nvpflow/flow.hpp>
#include <nvpflow/spec.hpp>

#include "../../cuda/adam.cu"
#include "../../cuda/gradient.cu"
#include "../../cuda/lu.cu"
#include "../../cuda/noise.cu"
#include "../../cuda/pack.cu"
#include "../../cuda/sums.cu"
#include "../../cuda/transform.cu"
#include "flow_access.hpp"
#include "lower.hpp"
#include "mixed_spec.hpp"
#include "oracle.hpp"
#include "training.hpp"

namespace {

using namespace nvpflow;
using cuda::Storage;
using simt::GuardedArray;

/// The bases with parameters.
const std::vector<Base> kTrainedBases = {StudentTBase{4, true}, MixtureBase{3, MixtureBase::Covariance::diagonal},
                                         MixtureBase{4, MixtureBase::Covariance::full}};

template <class T>
constexpr DType dtype_of = std::is_same_v<T, float> ? DType::float32 : DType::float64;
/// |result - oracle| <= kBudget (1 + |oracle|)
template <class T>
constexpr double kBudget = std::is_same_v<T, float> ? 1e-5 : 1e-12;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Shape {
  std::int64_t input_size, num_flows;
  std::vector<std::int64_t> hidden_sizes;
  Activation activation = Activation::relu;
  double scale_bound = 1.0;
  bool standardize = false;
};

template <class T>
FlowSpec spec_of(const Shape& shape) {
  return FlowSpec::real_nvp(shape.input_size, shape.num_flows, shape.hidden_sizes, shape.activation, shape.scale_bound,
                            shape.standardize, dtype_of<T>);
}

/// Far from the identity: kernels N(0, 1/in), triangles of n rows N(0, 1/(4 n)), so that large ones are no worse
/// conditioned than small ones, signs -1 or 1, everything else 0.1 N(0, 1).
template <class T>
std::vector<T> random_parameters(const ParamLayout& layout, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  std::vector<T> parameters(static_cast<std::size_t>(layout.size()));
  for (const TensorInfo& tensor : layout.tensors()) {
    const bool triangle = tensor.name.ends_with(".lower") || tensor.name.ends_with(".upper");
    const double scale = tensor.shape.size() == 2 ? 1 / std::sqrt(static_cast<double>(tensor.shape[0]))
                         : triangle               ? 0.5 / std::sqrt(std::sqrt(2 * static_cast<double>(tensor.size)))
                                                  : 0.1;
    for (std::int64_t i = 0; i < tensor.size; ++i) {
      const double value = normal(engine);
      parameters[static_cast<std::size_t>(tensor.offset + i)] =
          static_cast<T>(tensor.name.ends_with(".sign") ? std::copysign(1.0, value) : scale * value);
    }
  }
  return parameters;
}

template <class T>
std::vector<T> random_values(std::int64_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  std::vector<T> values(static_cast<std::size_t>(count));
  for (T& value : values) value = static_cast<T>(normal(engine));
  return values;
}

template <class T>
std::vector<double> widened(const std::vector<T>& values) {
  return {values.begin(), values.end()};
}

template <class T>
std::vector<double> row_of(const std::vector<T>& values, std::int64_t row, std::int64_t width) {
  return {values.begin() + row * width, values.begin() + (row + 1) * width};
}

bool within(double actual, double expected, double budget) {
  if (std::isinf(expected)) return actual == expected;
  return std::fabs(actual - expected) <= budget * (1 + std::fabs(expected));  // false for NaN
}

template <class T>
bool same_bits(const std::vector<T>& left, const std::vector<T>& right) {
  return left.size() == right.size() &&
         (left.empty() || std::memcmp(left.data(), right.data(), left.size() * sizeof(T)) == 0);
}

/// Threads run in that order.
struct InOrder {
  explicit InOrder(simt::Order order) { simt::order = order; }
  ~InOrder() { simt::order = simt::Order::ascending; }
  InOrder(const InOrder&) = delete;
  InOrder& operator=(const InOrder&) = delete;
};

/// A small device: two multiprocessors of the newest kind.
cuda::Device test_device() {
  cuda::Device device;
  device.multiprocessors = 2;
  device.compute_capability = 90;
  device.shared_bytes_per_block = device.shared_bytes_per_processor = 227 << 10;
  return device;
}

/// A flow packed for the kernels, from the definitions in kernels.hpp alone: what the backend's packing has to agree
/// with.
template <class T>
struct PackedFlow {
  /// gather: also where the features lie in the parts of the state.
  explicit PackedFlow(const FlowSpec& s, const std::vector<T>& flat, bool gather = false)
      : spec(s), layout(spec), parameters(flat), gathers(gather) {
    const Lowered lowered = lower(spec, layout);
    program.input_size = static_cast<std::int32_t>(spec.input_size);
    program.num_parameters = layout.size();
    program.num_layers = static_cast<std::int32_t>(lowered.layers.size());
    program.split = program.input_size / 2;
    program.base = density_of<T>(lowered.base);
    program.base.stride = (spec.input_size + 15) / 16 * 16;
    if (const std::int64_t numbers = cuda::base_numbers_size(program.base, spec.input_size); numbers > 0) {
      program.base_numbers = reserve(numbers);
      ++program.num_numbers;
    }
    program.data_place = keep(lowered.data_place);
    program.latent_place = keep(lowered.latent_place);
    program.context_size = static_cast<std::int32_t>(spec.context_size);
    if (spec.standardize_context) {
      program.context_statistics = reserve(2 * spec.context_size);
      program.context_mean_offset = lowered.context_mean;
      program.context_log_std_offset = lowered.context_log_std;
      ++program.num_numbers;
    }
    for (const LoweredLayer& layer : lowered.layers) {
      std::visit([&](const auto& kind) { add(kind); }, layer);
    }
    program.num_dense = static_cast<std::int32_t>(dense.size());
    program.layers = layers.data();
    program.dense = dense.data();
    program.reach = cuda::reach_of(program);
    if (program.reach == cuda::Reach::all) cuda::place_networks(program, layers.data(), dense.data());
    program.packed_size = static_cast<std::int64_t>(source.size());
    program.transposed_size = static_cast<std::int64_t>(transposed_source.size());
    packed = std::make_unique<GuardedArray<T>>(source.size());
    transposed = std::make_unique<GuardedArray<T>>(transposed_source.size());
    program.packed = packed->data();
    if (program.base_numbers >= 0) {
      cuda::point_into(program.base, program.packed + program.base_numbers, spec.input_size);
    }
    program.transposed = transposed->data();
    const GuardedArray<T> from(parameters);
    const GuardedArray<std::int64_t> index(source), transposed_index(transposed_source);
    program.places = places.data();
    packed_from = std::make_unique<GuardedArray<std::int64_t>>(source);
    program.source = packed_from->data();
    cuda::launch_pack(&program, index.data(), program.packed_size, from.data(), packed->data(), {});
    cuda::launch_pack<T>(nullptr, transposed_index.data(), program.transposed_size, from.data(), transposed->data(),
                         {});
    const GuardedArray<unsigned char> workspace(static_cast<std::size_t>(cuda::linear_workspace_bytes(program)));
    cuda::launch_pack_linear(program, cuda::Matrices::both, packed->data(), transposed->data(), workspace.data(), {});
  }

  std::int64_t keep(const std::vector<std::int64_t>& list) {
    if (list.empty()) return -1;
    places.insert(places.end(), list.begin(), list.end());
    return static_cast<std::int64_t>(places.size() - list.size());
  }
  std::int64_t keep(const Places& from) {
    if (!from.index.empty()) return keep(from.index);
    for (std::int64_t i = 0; i < from.count; ++i) places.push_back(static_cast<std::int32_t>(from.begin + i));
    return static_cast<std::int64_t>(places.size()) - from.count;
  }

  /// The outputs of several parts alternate; of heads one of which is missing, it is zeros. d: what is known of it.
  void add_dense(LoweredDense from, cuda::Dense d, bool heads = false, bool formed = false) {
    if (heads && from.parts.size() == 1) {
      const std::int64_t columns = from.out();
      from.parts.insert(d.role == cuda::Role::scale_head ? from.parts.end() : from.parts.begin(), {-1, -1, columns});
      d.listed = true;
    }
    const std::int64_t in = from.in, out = from.out(), parts = static_cast<std::int64_t>(from.parts.size());
    d.in = static_cast<std::int32_t>(in);
    d.out = static_cast<std::int32_t>(out);
    d.weights = static_cast<std::int64_t>(source.size());
    source.resize(source.size() + static_cast<std::size_t>(cuda::weight_size(in, out)), -1);
    d.transposed = static_cast<std::int64_t>(transposed_source.size());
    transposed_source.resize(transposed_source.size() + static_cast<std::size_t>(cuda::weight_size(out, in)), -1);
    d.bias = static_cast<std::int64_t>(source.size());
    source.resize(source.size() + static_cast<std::size_t>(cuda::bias_size(out)), -1);
    for (std::size_t p = 0; p < from.parts.size(); ++p) {
      d.kernel_offset[p] = from.parts[p].kernel;
      d.bias_offset[p] = from.parts[p].bias;
    }
    d.interleaved = heads;
    for (std::int64_t o = 0; o < out; ++o) {
      const DensePart& part = from.parts[static_cast<std::size_t>(o % parts)];
      if (part.kernel < 0 || formed) continue;
      const std::int64_t column = o / parts;
      source[static_cast<std::size_t>(d.bias + o)] = part.bias + column;
      for (std::int64_t i = 0; i < in; ++i) {
        const std::int64_t at = part.kernel + i * part.columns + column;
        source[static_cast<std::size_t>(d.weights + cuda::weight_index(i, o, in))] = at;
        transposed_source[static_cast<std::size_t>(d.transposed + cuda::weight_index(o, i, out))] = at;
      }
    }
    dense.push_back(d);
  }

  /// The numbers of splines, feature by feature: widths, heights and slopes of each from an even place on.
  void add_numbers(const LoweredDense& from, cuda::Dense d, const cuda::Layer<T>& layer) {
    const std::int64_t n = layer.num_outputs, bins = layer.spline.num_bins, even = (bins + 1) / 2 * 2;
    const std::int64_t stride = cuda::round_up(2 * even + layer.spline.num_slopes, 8), out = n * stride;
    d.role = cuda::Role::numbers;
    d.listed = true;
    d.in = static_cast<std::int32_t>(from.in);
    d.out = static_cast<std::int32_t>(out);
    d.weights = reserve(cuda::weight_size(from.in, out));
    d.bias = reserve(cuda::bias_size(out));
    d.transposed = static_cast<std::int64_t>(transposed_source.size());
    transposed_source.resize(transposed_source.size() + static_cast<std::size_t>(cuda::weight_size(out, from.in)), -1);
    for (std::size_t p = 0; p < from.parts.size(); ++p) {
      const DensePart& part = from.parts[p];
      for (std::int64_t number = 0; number < part.columns / n; ++number) {
        for (std::int64_t j = 0; j < n; ++j) {
          const std::int64_t o = j * stride + static_cast<std::int64_t>(p) * even + number, column = number * n + j;
          source[static_cast<std::size_t>(d.bias + o)] = part.bias + column;
          for (std::int64_t i = 0; i < from.in; ++i) {
            const std::int64_t at = part.kernel + i * part.columns + column;
            source[static_cast<std::size_t>(d.weights + cuda::weight_index(i, o, from.in))] = at;
            transposed_source[static_cast<std::size_t>(d.transposed + cuda::weight_index(o, i, out))] = at;
          }
        }
      }
    }
    dense.push_back(d);
  }

  /// Where a layer finds its features.
  void find_features(const Places& conditioning, const Places& transformed, cuda::Layer<T>& layer) {
    layer.num_inputs = static_cast<std::int32_t>(conditioning.count);
    layer.num_outputs = static_cast<std::int32_t>(transformed.count);
    layer.condition = conditioning.begin == 0 ? 0 : 1;
    const std::int64_t first = layer.condition == 0 ? layer.num_inputs : layer.num_outputs;
    if (gathers || conditioning.count == 0 || spec.context_size > 0 || first != program.split ||
        !conditioning.index.empty() || !transformed.index.empty()) {
      layer.condition = cuda::kGathered;
      layer.input_place = keep(conditioning);
      layer.output_place = keep(transformed);
    }
  }

  void add(const LoweredCoupling& from) {
    cuda::Layer<T> layer;
    layer.inverse = from.inverse;
    layer.place = keep(from.place);
    find_features(from.conditioning, from.transformed, layer);
    layer.activation = from.networks.front().activation;
    layer.scale = scale_of<T>(from.scale);
    layer.first_dense = static_cast<std::int32_t>(dense.size());
    for (const LoweredNetwork& network : from.networks) {
      const bool scale_only = &network != &from.networks.back();
      add_network(network, [&](const LoweredDense& head, cuda::Dense d) {
        d.role = scale_only ? cuda::Role::scale_head : cuda::Role::head;
        add_dense(head, d, true);
      });
    }
    layer.num_dense = static_cast<std::int32_t>(dense.size()) - layer.first_dense;
    layers.push_back(layer);
  }

  /// What a network reads first: the features, then the context.
  static LoweredDense first_of(const LoweredNetwork& network) {
    LoweredDense first = network.dense.front();
    if (!network.context) return first;
    first.in += network.context->in;
    for (std::size_t p = 0; p < first.parts.size(); ++p) first.parts[p].bias = network.context->parts[p].bias;
    return first;
  }

  /// add_last(heads, what is known of them)
  template <class AddLast>
  void add_network(const LoweredNetwork& network, AddLast add_last) {
    if (has_blocks(network.kind)) {
      add_residual(network);
      return add_last(network.dense.back(), {});
    }
    for (std::size_t j = 0; j < network.dense.size(); ++j) {
      cuda::Dense d;
      d.first = j == 0;
      const LoweredDense& here = d.first ? first_of(network) : network.dense[j];
      if (j + 1 == network.dense.size()) return add_last(here, d);
      d.role = cuda::Role::hidden;
      d.activation = network.activation;
      d.layer_norm = network.layer_norm;
      add_dense(here, d);
    }
  }

  /// All but the heads.
  void add_residual(const LoweredNetwork& network) {
    const std::size_t blocks = network.dense.size() / 2 - 1;
    const std::int64_t width = network.dense.front().out();
    const auto entering = [&](cuda::Role role, std::size_t block) {
      cuda::Dense d;
      d.role = role;
      if (block == blocks) return d;
      d.activation = network.activation;
      if (network.affines.empty()) return d;
      d.map = reserve(2 * cuda::bias_size(width));
      d.scale_offset = network.affines[block].scale;
      d.shift_offset = network.affines[block].shift;
      copy(d.map, d.scale_offset, width);
      copy(d.map + cuda::bias_size(width), d.shift_offset, width);
      return d;
    };
    cuda::Dense initial = entering(cuda::Role::initial, 0);
    initial.first = true;
    add_dense(first_of(network), initial);
    for (std::size_t block = 0; block < blocks; ++block) {
      cuda::Dense inner, outer;
      inner.role = cuda::Role::inner;
      inner.activation = network.activation;
      add_dense(network.dense[1 + 2 * block], inner);
      outer.role = cuda::Role::outer;
      const bool gated = !network.gates.empty();
      add_dense(network.dense[2 + 2 * block], gated ? outer : entering(cuda::Role::outer, block + 1));
      if (gated) add_dense(network.gates[block], entering(cuda::Role::gate, block + 1));
    }
  }

  std::int64_t reserve(std::int64_t count) {
    const std::size_t begin = source.size();
    source.resize(begin + static_cast<std::size_t>(cuda::round_up(count, 4)), -1);
    return static_cast<std::int64_t>(begin);
  }
  void copy(std::int64_t to, std::int64_t from, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) source[static_cast<std::size_t>(to + i)] = from + i;
  }

  void add(const LoweredSpline& from) {
    cuda::Layer<T> layer;
    layer.kind = Kind::spline;
    layer.inverse = from.inverse;
    layer.place = keep(from.place);
    layer.spline = map_of<T>(from.spline);
    find_features(from.conditioning, from.transformed, layer);
    layer.first_dense = static_cast<std::int32_t>(dense.size());
    for (const LoweredNetwork& network : from.networks) {
      add_network(network, [&](const LoweredDense& head, cuda::Dense d) { add_numbers(head, d, layer); });
    }
    if (from.networks.empty()) {
      LoweredDense constants;
      for (const LoweredConstants& part : from.constants) constants.parts.push_back({-1, part.offset, part.size});
      add_numbers(constants, {}, layer);
    } else {
      layer.num_dense = static_cast<std::int32_t>(dense.size()) - layer.first_dense;
    }
    layers.push_back(layer);
  }

  void add(const LoweredLinear& from) {
    const std::int64_t features = spec.input_size, triangle = features * (features - 1) / 2;
    cuda::Layer<T> layer;
    layer.kind = Kind::linear;
    layer.inverse = from.inverse;
    layer.place = keep(from.in_place);
    layer.input_place = keep(from.inverse ? from.out_place : from.in_place);
    layer.output_place = keep(from.inverse ? from.in_place : from.out_place);
    layer.factors = {from.lower, from.upper, from.log_diagonal, from.sign, from.bias};
    layer.log_det = reserve(1);
    layer.copies = reserve(2 * triangle + 2 * features);
    copy(layer.copies, from.lower, triangle);
    copy(layer.copies + triangle, from.upper, triangle);
    copy(layer.copies + 2 * triangle, from.log_diagonal, features);
    copy(layer.copies + 2 * triangle + features, from.sign, features);
    layer.products = program.products;
    layer.first_dense = static_cast<std::int32_t>(dense.size());
    layer.num_dense = 1;
    for (int matrix = 0; matrix < 2; ++matrix) {
      const std::int64_t to = program.num_parameters + program.products;
      add_dense({features, {{to, to + features * features, features}}}, {}, false, true);
      if (matrix == 0) copy(dense.back().bias, from.bias, features);
    }
    program.products += features * features + features + 1;
    ++program.num_linear;
    ++program.num_numbers;
    layers.push_back(layer);
  }

  void add(const LoweredDiagonal& from) {
    cuda::Layer<T> layer;
    layer.kind = Kind::diagonal;
    layer.inverse = from.inverse;
    layer.place = keep(from.place);
    layer.affine = static_cast<std::int64_t>(source.size());
    layer.mean_offset = from.mean;
    layer.log_std_offset = from.log_std;
    source.resize(source.size() + static_cast<std::size_t>(cuda::affine_size(spec.input_size)), -1);
    layers.push_back(layer);
    ++program.num_numbers;
  }

  FlowSpec spec;
  ParamLayout layout;
  std::vector<T> parameters;
  std::vector<cuda::Layer<T>> layers;
  std::vector<cuda::Dense> dense;
  std::vector<std::int64_t> source, transposed_source;
  std::vector<std::int32_t> places;
  bool gathers;
  std::unique_ptr<GuardedArray<T>> packed, transposed;
  std::unique_ptr<GuardedArray<std::int64_t>> packed_from;
  cuda::Program<T> program;
};

template <class T>
struct Results {
  std::vector<T> out, log_det, log_prob;

  bool operator==(const Results& other) const {
    return same_bits(out, other.out) && same_bits(log_det, other.log_det) && same_bits(log_prob, other.log_prob);
  }
};

/// One call of every output, in guarded arrays; of an inverse log_prob from a call of its own.
template <class T>
Results<T> transform(const PackedFlow<T>& flow, const cuda::TransformPlan& plan, cuda::TransformCall<T> call,
                     const std::vector<T>& in, const std::vector<std::int64_t>& index = {},
                     const std::vector<T>& context = {}) {
  const std::int64_t width = flow.spec.input_size;
  if (call.rows == 0) call.rows = static_cast<std::int64_t>(in.size()) / width;
  const auto rows = static_cast<std::size_t>(call.rows);
  const GuardedArray<T> x(in), out(rows * static_cast<std::size_t>(width)), log_det(rows), log_prob(rows);
  const GuardedArray<T> given(context);
  if (!context.empty()) call.context.rows = given.data();
  const GuardedArray<std::int64_t> rows_of(index);
  const GuardedArray<unsigned char> workspace(static_cast<std::size_t>(plan.workspace_bytes));
  if (!in.empty()) call.in = x.data();
  if (!index.empty()) call.index = rows_of.data();
  call.out = out.data();
  call.log_det = log_det.data();
  if (!call.inverse) call.log_prob = log_prob.data();
  REQUIRE(cuda::launch_transform(plan, flow.program, call, workspace.data(), {}) == 0);
  if (call.inverse) {
    const std::vector<T> values = out.values();
    call.log_det = nullptr;
    call.log_prob = log_prob.data();
    REQUIRE(cuda::launch_transform(plan, flow.program, call, workspace.data(), {}) == 0);
    REQUIRE(same_bits(out.values(), values));
  }
  REQUIRE(out.intact());
  REQUIRE(log_det.intact());
  REQUIRE(log_prob.intact());
  return {out.values(), log_det.values(), log_prob.values()};
}

/// Numbers that are not within `budget` of the oracle.
template <class T>
std::int64_t count_wrong(const Results<T>& results, const oracle::Flow& oracle, bool inverse, const std::vector<T>& in,
                         std::int64_t width, double budget, const std::vector<T>& context = {},
                         std::int64_t repeat = 1) {
  std::int64_t wrong = 0;
  const auto context_rows = static_cast<std::int64_t>(results.log_det.size()) / repeat;
  for (std::size_t r = 0; r < results.log_det.size(); ++r) {
    const auto row = row_of(in, static_cast<std::int64_t>(r), width);
    std::vector<double> given;
    if (!context.empty()) {
      given = row_of(context, static_cast<std::int64_t>(r) / repeat,
                     static_cast<std::int64_t>(context.size()) / context_rows);
    }
    const auto expected = inverse ? oracle.inverse(row, given) : oracle.forward(row, given);
    for (std::size_t d = 0; d < static_cast<std::size_t>(width); ++d) {
      wrong += !within(results.out[r * static_cast<std::size_t>(width) + d], expected.values[d], budget);
    }
    wrong += !within(results.log_det[r], expected.log_det, budget);
    const double log_prob =
        inverse ? oracle.base_density(row) - expected.log_det : oracle.base_density(expected.values) + expected.log_det;
    wrong += !within(results.log_prob[r], log_prob, budget);
  }
  return wrong;
}

const std::vector<Shape> kShapes = {
    {2, 1, {}},
    {2, 3, {1}},
    {3, 2, {3}, Activation::leaky_relu},
    {3, 8, {7, 5}, Activation::silu},
    {5, 4, {16, 17, 18}, Activation::elu, 2.0, true},
    {6, 1, {64}, Activation::gelu},
    {7, 3, {31, 5}, Activation::tanh, 0.5},
    {17, 2, {33, 129}, Activation::softplus, 1.0, true},
    {31, 2, {33}, Activation::sigmoid},
    {40, 2, {}, Activation::tanh, 1.5},
    {101, 2, {65}, Activation::gelu, 1.0, true},
};

}  // namespace

TEST_CASE_TEMPLATE("every path agrees with the oracle", T, float, double) {
  for (const Shape& shape : kShapes) {
    const FlowSpec spec = spec_of<T>(shape);
    const std::vector<T> parameters = random_parameters<T>(ParamLayout(spec), 1);
    const PackedFlow<T> flow(spec, parameters);
    const oracle::Flow oracle(spec, widened(parameters));
    const std::int64_t rows = 37;
    const std::vector<T> x = random_values<T>(rows * shape.input_size, 2);
    for (const Storage storage : {Storage::resident, Storage::streamed, Storage::workspace}) {
      for (const bool fma : {true, false}) {
        if (sizeof(T) == 8 && !fma) continue;
        const auto plan = cuda::plan_transform<T>(flow.program, test_device(), rows,
                                                  {Precision::float32, fma, static_cast<int>(storage)});
        if (storage == Storage::resident && plan.storage != storage) continue;  // double: does not fit
        REQUIRE(plan.storage == storage);
        for (const bool inverse : {false, true}) {
          CAPTURE(shape.input_size);
          CAPTURE(name_of(shape.activation));
          CAPTURE(static_cast<int>(storage));
          CAPTURE(fma);
          CAPTURE(inverse);
          cuda::TransformCall<T> call;
          call.inverse = inverse;
          const Results<T> results = transform(flow, plan, call, x);
          CHECK(count_wrong(results, oracle, inverse, x, shape.input_size, kBudget<T>) == 0);
        }
      }
    }
  }
}

TEST_CASE_TEMPLATE("layers of all features, directions and places agree with the oracle on every path", T, float,
                   double) {
  for (const std::int64_t features : {2, 3, 8, 17, 33}) {
    for (std::uint64_t seed = 0; seed < 6; ++seed) {
      const FlowSpec spec = mixed_spec(features, seed, dtype_of<T>);
      const std::vector<T> parameters = random_parameters<T>(ParamLayout(spec), static_cast<unsigned>(seed));
      const PackedFlow<T> flow(spec, parameters, seed % 2 == 1);
      const oracle::Flow oracle(spec, widened(parameters));
      const std::vector<T> x = random_values<T>(35 * features, 2);
      for (const Storage storage : {Storage::resident, Storage::streamed, Storage::workspace}) {
        const auto plan = cuda::plan_transform<T>(flow.program, test_device(), 35,
                                                  {Precision::float32, false, static_cast<int>(storage)});
        for (const bool inverse : {false, true}) {
          CAPTURE(features);
          CAPTURE(seed);
          CAPTURE(static_cast<int>(storage));
          CAPTURE(inverse);
          cuda::TransformCall<T> call;
          call.inverse = inverse;
          CHECK(count_wrong(transform(flow, plan, call, x), oracle, inverse, x, features, 4 * kBudget<T>) == 0);
        }
      }
    }
  }
}

namespace {

/// Some rows are inside.
Base uniform_base(std::int64_t features) { return UniformBase{features > 5 ? -2.75 : -1.25, 2.5}; }

/// Flows under a base, half of them with a context; step: from one seed of four to the next, of many features.
template <class T, class BaseOf, class Check>
void each_flow_under(BaseOf base_of, std::uint64_t step, Check check) {
  for (const std::int64_t features : {2, 5, 33}) {
    for (std::uint64_t seed = 0; seed < 4; seed += features > 5 ? step : 1) {
      CAPTURE(features);
      CAPTURE(seed);
      FlowSpec spec =
          seed < 2 ? mixed_spec(features, seed, dtype_of<T>) : conditional_spec(features, seed, 3, dtype_of<T>);
      spec.base = base_of(features);
      check(spec, static_cast<unsigned>(seed));
    }
  }
}

/// A flow with its parameters on the kernels and in the oracle.
template <class T>
void check_transforms(const FlowSpec& spec, unsigned seed, bool gather, double budget,
                      std::initializer_list<bool> fma = {false}) {
  const std::vector<T> parameters = random_parameters<T>(ParamLayout(spec), seed);
  const PackedFlow<T> flow(spec, parameters, gather);
  const oracle::Flow oracle(spec, widened(parameters));
  const std::vector<T> x = random_values<T>(35 * spec.input_size, 2);
  const std::int64_t repeat = spec.context_size == 0 ? 1 : seed % 3 == 0 ? 5 : 1;
  const std::vector<T> context = random_values<T>(35 / repeat * spec.context_size, 9);
  for (const Storage storage : {Storage::streamed, Storage::workspace}) {
    for (const bool without_units : fma) {
      const auto plan = cuda::plan_transform<T>(flow.program, test_device(), 35,
                                                {Precision::float32, without_units, static_cast<int>(storage)});
      if (plan.storage != storage) continue;  // does not fit
      for (const bool inverse : {false, true}) {
        CAPTURE(static_cast<int>(storage));
        CAPTURE(without_units);
        CAPTURE(inverse);
        cuda::TransformCall<T> call;
        call.inverse = inverse;
        call.context.repeat = repeat;
        const Results<T> results = transform(flow, plan, call, x, {}, context);
        CHECK(count_wrong(results, oracle, inverse, x, spec.input_size, budget, context, repeat) == 0);
        if (inverse) continue;
        for (const simt::Order order : {simt::Order::descending, simt::Order::mixed}) {
          const InOrder in_order(order);
          CHECK(transform(flow, plan, call, x, {}, context) == results);
        }
      }
    }
  }
}

}  // namespace

TEST_CASE_TEMPLATE("networks of every kind agree with the oracle", T, float, double) {
  for (const Networks kind : {Networks::two, Networks::layer_norm, Networks::residual, Networks::affine_maps}) {
    for (const std::int64_t features : {2, 5, 33}) {
      for (std::uint64_t seed = 0; seed < 3; ++seed) {
        CAPTURE(static_cast<int>(kind));
        CAPTURE(features);
        CAPTURE(seed);
        check_transforms<T>(networks_spec(features, seed, kind, dtype_of<T>), static_cast<unsigned>(seed),
                            seed % 2 == 1, 4 * kBudget<T>);
      }
    }
  }
}

TEST_CASE_TEMPLATE("a uniform base agrees with the oracle", T, float, double) {
  each_flow_under<T>(uniform_base, 1, [](const FlowSpec& spec, unsigned seed) {
    check_transforms<T>(spec, seed, seed % 2 == 1, 4 * kBudget<T>);
  });
}

TEST_CASE_TEMPLATE("bases with parameters agree with the oracle", T, float, double) {
  for (const Base& base : kTrainedBases) {
    CAPTURE(base.index());
    each_flow_under<T>(
        [&](std::int64_t) { return base; }, 3,
        [](const FlowSpec& spec, unsigned seed) { check_transforms<T>(spec, seed, seed % 2 == 1, 8 * kBudget<T>); });
  }
}

TEST_CASE_TEMPLATE("densities given a context agree with the oracle", T, float, double) {
  for (const std::int64_t features : {1, 2, 5, 64}) {
    for (std::uint64_t seed = 0; seed < (features > 50 ? 2 : 6); ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      check_transforms<T>(conditional_spec(features, seed, static_cast<std::int64_t>(1 + seed * 7), dtype_of<T>),
                          static_cast<unsigned>(seed), seed % 2 == 1, 4 * kBudget<T>);
    }
  }
}

// What float32 keeps of a spline depends on its slopes; the budget is that of the CPU's kernels.
TEST_CASE_TEMPLATE("splines agree with the oracle", T, float, double) {
  for (const std::int64_t features : {2, 3, 5, 17, 33}) {
    for (std::uint64_t seed = 0; seed < (features > 10 ? 4 : 8); ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      check_transforms<T>(spline_spec(features, seed, dtype_of<T>), static_cast<unsigned>(seed), seed % 2 == 1,
                          100 * kBudget<T>, {false, true});
    }
  }
}

TEST_CASE_TEMPLATE("splines of the most bins agree with the oracle", T, float, double) {
  FlowSpec spec = FlowSpec::real_nvp(3, 1, {5}, Activation::tanh, 1.0, false, dtype_of<T>);
  Spline spline;
  spline.num_bins = 256;
  std::get<Coupling>(spec.layers[0]).transform = spline;
  check_transforms<T>(spec, 1, false, 100 * kBudget<T>);
}

TEST_CASE_TEMPLATE("splines given a context agree with the oracle", T, float, double) {
  for (const std::int64_t features : {1, 2, 5, 20}) {
    for (std::uint64_t seed = 0; seed < (features > 10 ? 2 : 6); ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      check_transforms<T>(conditional_spline_spec(features, seed, static_cast<std::int64_t>(1 + seed * 7), dtype_of<T>),
                          static_cast<unsigned>(seed), seed % 2 == 1, 100 * kBudget<T>);
    }
  }
}

TEST_CASE_TEMPLATE("linear layers agree with the oracle", T, float, double) {
  for (const std::int64_t features : {2, 5, 64, 130}) {
    CAPTURE(features);
    for (std::uint64_t seed = 0; seed < (features > 50 ? 2 : 6); ++seed) {
      CAPTURE(seed);
      check_transforms<T>(linear_spec(features, seed, dtype_of<T>), static_cast<unsigned>(seed), seed % 2 == 1,
                          4 * kBudget<T>, {false, true});
    }
  }
}

TEST_CASE("linear layers are exact in the rounded modes") {
  FlowSpec spec = FlowSpec::real_nvp(33, 1, {}, Activation::relu, 1.0, false, DType::float32);
  spec.layers.emplace_back(LULinear{false});
  spec.layers.emplace_back(LULinear{true});
  const ParamLayout layout(spec);
  std::vector<float> parameters = random_parameters<float>(layout, 3);
  for (const TensorInfo& tensor : layout.tensors()) {  // the coupling is the identity
    if (tensor.layer == 0) std::fill_n(parameters.begin() + tensor.offset, tensor.size, 0.0f);
  }
  const PackedFlow<float> flow(spec, parameters);
  const std::vector<float> x = random_values<float>(35 * 33, 2);
  const auto results = [&](Precision precision) {
    return transform(flow, cuda::plan_transform<float>(flow.program, test_device(), 35, {precision}), {}, x);
  };
  CHECK(results(Precision::tf32) == results(Precision::float32));
  CHECK(results(Precision::bfloat16) == results(Precision::float32));
}

namespace {

/// Every log-scale function, in a coupling that is read from data to latent and in one that is read backwards.
std::vector<FlowSpec> log_scale_specs(DType dtype) {
  using Function = LogScale::Function;
  const double inf = std::numeric_limits<double>::infinity();
  const LogScale scales[] = {{Function::softsign, 2, 1.5},
                             {Function::atan, 1.2, 0.8},
                             {Function::identity},
                             {Function::sigmoid, 1, 1, 0.001, 1.001, 2},
                             {Function::sigmoid, 1, 1, 0, 1, 2, true},
                             {Function::softplus, 1, 1, 0.01, inf, 0.5},
                             {Function::softplus, 1, 1, 0, 3, -2},
                             {Function::softplus, 1, 1, 0, 0.7, 0, true}};
  std::vector<FlowSpec> specs;
  for (const LogScale& scale : scales) {
    FlowSpec spec = FlowSpec::real_nvp(5, 2, {9}, Activation::tanh, 1.0, false, dtype);
    for (LayerSpec& layer : spec.layers) std::get<Coupling>(layer).transform = Affine{scale};
    std::get<Coupling>(spec.layers[1]).inverse = true;
    specs.push_back(spec);
  }
  return specs;
}

}  // namespace

TEST_CASE_TEMPLATE("every log-scale function agrees with the oracle", T, float, double) {
  for (const FlowSpec& spec : log_scale_specs(dtype_of<T>)) {
    const std::vector<T> parameters = random_parameters<T>(ParamLayout(spec), 3);
    const PackedFlow<T> flow(spec, parameters);
    const oracle::Flow oracle(spec, widened(parameters));
    const std::vector<T> x = random_values<T>(40 * 5, 4);
    for (const Storage storage : {Storage::resident, Storage::streamed}) {
      const auto plan = cuda::plan_transform<T>(flow.program, test_device(), 40,
                                                {Precision::float32, false, static_cast<int>(storage)});
      for (const bool inverse : {false, true}) {
        const LogScale& scale = std::get<Affine>(std::get<Coupling>(spec.layers[0]).transform).log_scale;
        CAPTURE(name_of(scale.function));
        CAPTURE(scale.offset);
        CAPTURE(inverse);
        cuda::TransformCall<T> call;
        call.inverse = inverse;
        CHECK(count_wrong(transform(flow, plan, call, x), oracle, inverse, x, 5, kBudget<T>) == 0);
      }
    }
  }
}

TEST_CASE_TEMPLATE("the logarithm of softplus is exact far below 0", T, float, double) {
  Scale<T> scale;
  scale.function = ScaleFunction::softplus;
  scale.high = 3;
  scale.log_high = static_cast<T>(std::log(3.0));
  scale.tail = T(sizeof(T) == 4 ? -9 : -20);
  for (double u = -60; u < 0; u += 0.37) {
    const T x = static_cast<T>(u);
    const double softplus = std::log1p(std::exp(static_cast<double>(x)));
    const cuda::LogScaleAt<T> at = cuda::log_scale_at(scale, x);
    CHECK(within(at.s, std::log(softplus), kBudget<T> / 10));
    CHECK(within(at.slope, 1 / (1 + std::exp(-static_cast<double>(x))) / softplus, kBudget<T> / 10));
  }
}

namespace {

template <class T>
struct Gradients {
  std::vector<T> grad_in, gradient, grad_context;
  double sum = kNaN;
};

/// One gradient call on guarded arrays, the gradient before it being `before` (empty: poison, overwritten).
template <class T>
Gradients<T> run_gradient(const PackedFlow<T>& flow, const cuda::GradientPlan& plan, cuda::GradientCall<T> call,
                          const std::vector<T>& in, const std::vector<T>& grad_out = {},
                          const std::vector<T>& grad_log_det = {}, const std::vector<T>& before = {},
                          const std::vector<T>& context = {}) {
  const GuardedArray<T> given(context), grad_context(context.size());
  const GuardedArray<T> x(in), g(grad_out), g_det(grad_log_det), grad_in(in.size());
  const GuardedArray<T> gradient(static_cast<std::size_t>(flow.layout.size()));
  if (!before.empty()) std::memcpy(gradient.data(), before.data(), before.size() * sizeof(T));
  const GuardedArray<cuda::GradientTask> tasks(static_cast<std::size_t>(plan.num_tasks));
  REQUIRE(cuda::gradient_tasks(flow.program, plan, tasks.data()) == plan.num_tasks);
  const GuardedArray<unsigned char> workspace(static_cast<std::size_t>(plan.workspace_bytes));
  const GuardedArray<double> sum(2);
  call.in = x.data();
  call.rows = static_cast<std::int64_t>(in.size()) / flow.spec.input_size;
  if (!grad_out.empty()) call.grad_out = g.data();
  if (!grad_log_det.empty()) call.grad_log_det = g_det.data();
  call.grad_in = grad_in.data();
  call.gradient = gradient.data();
  call.accumulate = !before.empty();
  call.sum_log_prob = call.nll ? sum.data() : nullptr;
  if (!context.empty()) {
    call.context.rows = given.data();
    call.grad_context = grad_context.data();
  }
  REQUIRE(cuda::launch_gradient(plan, flow.program, tasks.data(), call, workspace.data(), {}) == 0);
  REQUIRE(gradient.intact());
  REQUIRE(grad_in.intact());
  REQUIRE(workspace.intact());
  REQUIRE(grad_context.intact());
  return {grad_in.values(), gradient.values(), grad_context.values(), sum[0]};
}

double largest(const std::vector<double>& values) {
  double most = 1;
  for (const double v : values) most = std::max(most, std::fabs(v));
  return most;
}

/// Numbers that differ by more than budget * (1 + |expected|).
template <class T>
std::int64_t count_different(const std::vector<T>& actual, const std::vector<double>& expected, double budget) {
  REQUIRE(actual.size() == expected.size());
  std::int64_t wrong = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) wrong += !within(actual[i], expected[i], budget);
  return wrong;
}

}  // namespace

TEST_CASE_TEMPLATE("gradients agree with the CPU backend in float64", T, float, double) {
  for (const Shape& shape : kShapes) {
    const FlowSpec spec = spec_of<T>(shape);
    const std::vector<T> parameters = random_parameters<T>(ParamLayout(spec), 1);
    const PackedFlow<T> flow(spec, parameters);
    Flow reference(spec_of<double>(shape));
    reference.set_parameters<double>(widened(parameters));
    const std::int64_t rows = 75, width = shape.input_size;
    const std::vector<T> x = random_values<T>(rows * width, 2), g = random_values<T>(rows * width, 3),
                         g_det = random_values<T>(rows, 4);
    const auto count = static_cast<std::size_t>(flow.layout.size());
    for (const std::int64_t chunk : {0, 1}) {
      for (const bool fma : {true, false}) {
        if (sizeof(T) == 8 && !fma) continue;
        CAPTURE(shape.input_size);
        CAPTURE(name_of(shape.activation));
        CAPTURE(chunk);
        CAPTURE(fma);
        const auto plan = cuda::plan_gradient<T>(flow.program, test_device(), rows, {Precision::float32, fma, chunk});
        cuda::GradientCall<T> call;
        call.nll = true;
        call.nll_factor = 1.0 / static_cast<double>(rows);
        const Gradients<T> nll = run_gradient(flow, plan, call, x);
        std::vector<double> expected(count), expected_in(x.size());
        const double value = reference.nll_gradient<double>(widened(x), expected);
        CHECK(within(-nll.sum / static_cast<double>(rows), value, kBudget<T>));
        CHECK(count_different(nll.gradient, expected, kBudget<T>) == 0);
        for (const bool inverse : {false, true}) {
          call = {};
          call.inverse = inverse;
          const Gradients<T> vjp = run_gradient(flow, plan, call, x, g, g_det);
          reference.vjp<double>(inverse ? Direction::inverse : Direction::forward, widened(x), widened(g),
                                widened(g_det), expected_in, expected);
          // Both are sums with cancellation: of several layers, of rows. Their error goes with the largest terms.
          CHECK(count_different(vjp.grad_in, expected_in, kBudget<T> * largest(expected_in)) == 0);
          CHECK(count_different(vjp.gradient, expected, kBudget<T> * largest(expected)) == 0);
        }
      }
    }
  }
}

namespace {

/// The gradients of a flow with the CPU backend's in float64.
template <class T>
void check_gradients(const FlowSpec& spec, unsigned seed, bool gather, std::int64_t chunk = 0,
                     double budget = kBudget<T>) {
  const std::vector<T> parameters = random_parameters<T>(ParamLayout(spec), seed);
  const PackedFlow<T> flow(spec, parameters, gather);
  Flow reference(spec.with_dtype(DType::float64));
  reference.set_parameters<double>(widened(parameters));
  const std::int64_t rows = 70, features = spec.input_size;
  const std::vector<T> x = random_values<T>(rows * features, 2), g = random_values<T>(rows * features, 3),
                       g_det = random_values<T>(rows, 4), before = random_values<T>(flow.layout.size(), 5),
                       context = random_values<T>(rows * spec.context_size, 9);
  const std::vector<double> wide_context = widened(context);
  const Context given = context.empty() ? Context() : Context(wide_context);
  std::vector<double> expected(parameters.size()), expected_in(x.size()), expected_context(context.size());
  const auto plan = cuda::plan_gradient<T>(flow.program, test_device(), rows, {Precision::float32, false, chunk});
  cuda::GradientCall<T> call;
  call.nll = true;
  call.nll_factor = 1.0 / static_cast<double>(rows);
  const Gradients<T> nll = run_gradient(flow, plan, call, x, {}, {}, {}, context);
  const double value = reference.nll_gradient<double>(widened(x), expected, given);
  CHECK(within(-nll.sum / static_cast<double>(rows), value, budget));
  CHECK(count_different(nll.gradient, expected, budget * largest(expected)) == 0);
  for (const bool inverse : {false, true}) {
    CAPTURE(inverse);
    call = {};
    call.inverse = inverse;
    const Gradients<T> vjp = run_gradient(flow, plan, call, x, g, g_det, before, context);
    const Direction direction = inverse ? Direction::inverse : Direction::forward;
    expected = widened(before);
    reference.vjp<double>(direction, widened(x), widened(g), widened(g_det), expected_in, expected, true, given,
                          expected_context);
    CHECK(count_different(vjp.grad_in, expected_in, budget * largest(expected_in)) == 0);
    CHECK(count_different(vjp.grad_context, expected_context, budget * largest(expected_context)) == 0);
    CHECK(count_different(vjp.gradient, expected, budget * largest(expected)) == 0);
    if (inverse) continue;
    for (const simt::Order order : {simt::Order::descending, simt::Order::mixed}) {
      const InOrder in_order(order);
      const Gradients<T> again = run_gradient(flow, plan, call, x, g, g_det, before, context);
      CHECK(same_bits(again.gradient, vjp.gradient));
      CHECK(same_bits(again.grad_in, vjp.grad_in));
      CHECK(same_bits(again.grad_context, vjp.grad_context));
    }
  }
}

}  // namespace

TEST_CASE_TEMPLATE("gradients of layers of all features, directions and places agree with the CPU backend", T, float,
                   double) {
  for (const std::int64_t features : {2, 3, 17, 33}) {
    for (std::uint64_t seed = 0; seed < 4; ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      check_gradients<T>(mixed_spec(features, seed, dtype_of<T>), static_cast<unsigned>(seed), seed % 2 == 1);
    }
  }
}

TEST_CASE_TEMPLATE("gradients of networks of every kind agree with the CPU backend", T, float, double) {
  for (const Networks kind : {Networks::two, Networks::layer_norm, Networks::residual, Networks::affine_maps}) {
    for (const std::int64_t features : {2, 5, 33}) {
      for (std::uint64_t seed = 0; seed < 3; ++seed) {
        CAPTURE(static_cast<int>(kind));
        CAPTURE(features);
        CAPTURE(seed);
        check_gradients<T>(networks_spec(features, seed, kind, dtype_of<T>), static_cast<unsigned>(seed), seed % 2 == 1,
                           seed == 1 ? 1 : 0);
      }
    }
  }
}

TEST_CASE_TEMPLATE("gradients under a uniform base agree with the CPU backend", T, float, double) {
  each_flow_under<T>(uniform_base, 1, [](const FlowSpec& spec, unsigned seed) {
    check_gradients<T>(spec, seed, seed % 2 == 1, seed == 1 ? 1 : 0);
  });
}

TEST_CASE_TEMPLATE("gradients under bases with parameters agree with the CPU backend", T, float, double) {
  for (const Base& base : kTrainedBases) {
    CAPTURE(base.index());
    each_flow_under<T>(
        [&](std::int64_t) { return base; }, 3,
        [](const FlowSpec& spec, unsigned seed) { check_gradients<T>(spec, seed, seed % 2 == 1, seed == 1 ? 1 : 0); });
  }
}

TEST_CASE_TEMPLATE("gradients of densities given a context agree with the CPU backend", T, float, double) {
  for (const std::int64_t features : {1, 2, 5, 64}) {
    for (std::uint64_t seed = 0; seed < (features > 50 ? 2 : 6); ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      check_gradients<T>(conditional_spec(features, seed, static_cast<std::int64_t>(1 + seed * 7), dtype_of<T>),
                         static_cast<unsigned>(seed), seed % 2 == 1, seed == 1 ? 1 : 0);
    }
  }
}

/// On these flows the CPU's kernels are off by as much in float32: 4.8e-5, where CUDA's are by 4.9e-5.
template <class T>
constexpr double kSplineGradientBudget = std::is_same_v<T, float> ? 1e-4 : 1e-12;

TEST_CASE_TEMPLATE("gradients of splines agree with the CPU backend", T, float, double) {
  for (const std::int64_t features : {2, 3, 5, 17}) {
    for (std::uint64_t seed = 0; seed < (features > 10 ? 3 : 8); ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      check_gradients<T>(spline_spec(features, seed, dtype_of<T>), static_cast<unsigned>(seed), seed % 2 == 1,
                         seed == 1 ? 1 : 0, kSplineGradientBudget<T>);
    }
  }
}

TEST_CASE_TEMPLATE("gradients of splines given a context agree with the CPU backend", T, float, double) {
  for (const std::int64_t features : {1, 2, 5}) {
    for (std::uint64_t seed = 0; seed < 6; ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      check_gradients<T>(conditional_spline_spec(features, seed, static_cast<std::int64_t>(1 + seed * 7), dtype_of<T>),
                         static_cast<unsigned>(seed), seed % 2 == 1, seed == 1 ? 1 : 0, kSplineGradientBudget<T>);
    }
  }
}

TEST_CASE_TEMPLATE("gradients of linear layers agree with the CPU backend", T, float, double) {
  for (const std::int64_t features : {2, 5, 64, 130}) {
    CAPTURE(features);
    for (std::uint64_t seed = 0; seed < (features > 50 ? 1 : 4); ++seed) {
      CAPTURE(seed);
      check_gradients<T>(linear_spec(features, seed, dtype_of<T>), static_cast<unsigned>(seed), seed % 2 == 1,
                         seed == 1 ? 1 : 0);
    }
  }
}

TEST_CASE_TEMPLATE("gradients of every log-scale function agree with the CPU backend", T, float, double) {
  for (const FlowSpec& spec : log_scale_specs(dtype_of<T>)) {
    const std::vector<T> parameters = random_parameters<T>(ParamLayout(spec), 3);
    const PackedFlow<T> flow(spec, parameters);
    Flow reference(spec.with_dtype(DType::float64));
    reference.set_parameters<double>(widened(parameters));
    const std::vector<T> x = random_values<T>(40 * 5, 4), g = random_values<T>(40 * 5, 5),
                         g_det = random_values<T>(40, 6);
    std::vector<double> expected(parameters.size()), expected_in(x.size());
    for (const bool inverse : {false, true}) {
      CAPTURE(name_of(std::get<Affine>(std::get<Coupling>(spec.layers[0]).transform).log_scale.function));
      CAPTURE(inverse);
      cuda::GradientCall<T> call;
      call.inverse = inverse;
      const auto plan = cuda::plan_gradient<T>(flow.program, test_device(), 40);
      const Gradients<T> vjp = run_gradient(flow, plan, call, x, g, g_det);
      reference.vjp<double>(inverse ? Direction::inverse : Direction::forward, widened(x), widened(g), widened(g_det),
                            expected_in, expected);
      CHECK(count_different(vjp.grad_in, expected_in, kBudget<T> * largest(expected_in)) == 0);
      CHECK(count_different(vjp.gradient, expected, kBudget<T> * largest(expected)) == 0);
    }
  }
}

// ---- the flows of the benchmark ------------------------------------------------------------------------------------

namespace {

/// A 16/4/[128], B 16/4/[256], C 64/8/[256,256], D 6/8/[64,64], E 784/8/[1024]; C and E with fewer layers.
struct Configuration {
  Shape shape;
  Storage storage;  // on a device with 227 KB of shared memory
  std::int64_t rows;
};
const std::vector<Configuration> kConfigurations = {
    {{16, 4, {128}}, Storage::resident, 70},      {{16, 4, {256}}, Storage::resident, 33},
    {{64, 2, {256, 256}}, Storage::streamed, 35}, {{6, 8, {64, 64}}, Storage::resident, 70},
    {{784, 1, {1024}}, Storage::workspace, 3},
};

/// Results of one plan against the oracle.
template <class T>
double largest_error(const Results<T>& results, const oracle::Flow& oracle, const std::vector<T>& x,
                     std::int64_t width) {
  double most = 0;
  for (std::size_t r = 0; r < results.log_prob.size(); ++r) {
    const double expected = oracle.log_prob(row_of(x, static_cast<std::int64_t>(r), width));
    const double error = std::fabs(results.log_prob[r] - expected) / (1 + std::fabs(expected));
    most = error <= most ? most : error;  // NaN becomes the largest
  }
  return most;
}

}  // namespace

TEST_CASE("the benchmark's flows take the paths they are meant to take and meet the budget of float32") {
  for (const Configuration& c : kConfigurations) {
    const FlowSpec spec = spec_of<float>(c.shape);
    const std::vector<float> parameters = random_parameters<float>(ParamLayout(spec), 5);
    const PackedFlow<float> flow(spec, parameters);
    const oracle::Flow oracle(spec, widened(parameters));
    const std::vector<float> x = random_values<float>(c.rows * c.shape.input_size, 6);
    for (const bool fma : {false, true}) {
      CAPTURE(c.shape.input_size);
      CAPTURE(fma);
      const auto plan = cuda::plan_transform<float>(flow.program, test_device(), 1 << 20, {{}, fma});
      CHECK(plan.storage == c.storage);
      CHECK(plan.multiply == (fma ? cuda::Multiply::fma : cuda::Multiply::tf32x3));
      for (const bool inverse : {false, true}) {
        cuda::TransformCall<float> call;
        call.inverse = inverse;
        const Results<float> results = transform(flow, plan, call, x);
        CHECK(count_wrong(results, oracle, inverse, x, c.shape.input_size, kBudget<float>) == 0);
      }
    }
  }
}

TEST_CASE("whole flows of the size of C and E fit the plans of every architecture") {
  struct Chip {
    std::int32_t capability;
    std::int64_t shared;
  };
  for (const Chip chip : {Chip{75, 64 << 10}, Chip{80, 163 << 10}, Chip{89, 99 << 10}, Chip{90, 227 << 10},
                          Chip{100, 227 << 10}, Chip{120, 99 << 10}}) {
    for (const Shape& shape : {Shape{16, 4, {128}}, Shape{64, 8, {256, 256}}, Shape{784, 8, {1024}},
                               Shape{3001, 1, {5000, 1}}, Shape{2, 1, {}}}) {
      CAPTURE(chip.capability);
      CAPTURE(shape.input_size);
      const FlowSpec spec = spec_of<double>(shape);
      const ParamLayout layout(spec);
      cuda::Device device = test_device();
      device.compute_capability = chip.capability;
      device.shared_bytes_per_block = chip.shared;
      // Plans look at sizes alone: no weights here.
      std::vector<cuda::Layer<double>> layers(1);
      std::vector<cuda::Dense> dense;
      std::int64_t in = shape.input_size / 2;
      cuda::Program<double> program;
      const auto add = [&](std::int64_t inputs, std::int64_t outputs) {
        cuda::Dense& d = dense.emplace_back();
        d.in = static_cast<std::int32_t>(inputs);
        d.out = static_cast<std::int32_t>(outputs);
      };
      for (const std::int64_t width : shape.hidden_sizes) {
        add(in, width);
        in = width;
      }
      add(in, (shape.input_size + 1) / 2 * 2);
      layers[0].num_inputs = static_cast<std::int32_t>(shape.input_size / 2);
      layers[0].num_outputs = static_cast<std::int32_t>(shape.input_size + 1) / 2;
      program.split = layers[0].num_inputs;
      for (const cuda::Dense& d : dense) program.packed_size += cuda::weight_size(d.in, d.out) + cuda::bias_size(d.out);
      layers[0].num_dense = program.num_dense = static_cast<std::int32_t>(dense.size());
      program.input_size = static_cast<std::int32_t>(shape.input_size);
      program.num_layers = 1;
      program.layers = layers.data();
      program.dense = dense.data();
      program.num_parameters = layout.size();
      const auto plan = cuda::plan_transform<double>(program, device, 1 << 20);
      CHECK(plan.warps > 0);
      CHECK(plan.shared_bytes <= chip.shared);
      CHECK(plan.multiply == cuda::Multiply::fma);
      const auto gradient = cuda::plan_gradient<double>(program, device, 1 << 20);
      CHECK(gradient.shared_bytes <= chip.shared);
      CHECK(gradient.weight_shared_bytes <= chip.shared);
      CHECK((gradient.chunk_tiles == 1 || gradient.workspace_bytes <= 2 * device.workspace_bytes));
    }
  }
}

TEST_CASE("tf32 and bfloat16 round the operands and nothing else") {
  // A rounded operand is off by at most 2^-11 (tf32) or 2^-9 (bfloat16) of itself, and later couplings pass on and
  // amplify what earlier ones were off by. Allowed are three roundings for each dense layer, for weights as far from
  // the identity as these; D, with 24 of them, uses most of it.
  for (const Configuration& c : kConfigurations) {
    const FlowSpec spec = spec_of<float>(c.shape);
    const std::vector<float> parameters = random_parameters<float>(ParamLayout(spec), 5);
    const PackedFlow<float> flow(spec, parameters);
    const oracle::Flow oracle(spec, widened(parameters));
    const std::vector<float> x = random_values<float>(c.rows * c.shape.input_size, 6);
    for (const auto precision : {Precision::tf32, Precision::bfloat16}) {
      const double rounding = precision == Precision::tf32 ? 0x1p-11 : 0x1p-9;
      const double budget = 3 * static_cast<double>(flow.dense.size()) * rounding;
      for (const int storage : {-1, 1, 2}) {
        CAPTURE(c.shape.input_size);
        CAPTURE(static_cast<int>(precision));
        CAPTURE(storage);
        if (storage == 1 && c.storage == Storage::workspace) continue;
        const auto plan = cuda::plan_transform<float>(flow.program, test_device(), c.rows, {precision, false, storage});
        const double error = largest_error(transform(flow, plan, {}, x), oracle, x, c.shape.input_size);
        CHECK(error <= budget);
        CHECK(error >= rounding / 100);  // the path that was asked for, not a better one
      }
    }
  }
}

// ---- rows are independent ------------------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("a row keeps its bits in every batch, at every place and for every order of the threads", T, float,
                   double) {
  // The head of the second is too wide for registers, its layers go through both buffers.
  const Shape shapes[] = {{17, 3, {40}, Activation::gelu, 1.0, true},
                          {41, 2, {16, 17, 18}, Activation::relu, 2.0, true}};
  for (int i = 0; i < 6; ++i) {
    const Shape& shape = shapes[i / 3];
    const int storage = i % 3;
    const FlowSpec spec = spec_of<T>(shape);
    const PackedFlow<T> flow(spec, random_parameters<T>(ParamLayout(spec), 1));
    const std::int64_t most = 150, width = shape.input_size;
    const std::vector<T> x = random_values<T>(most * width, 2);
    for (const bool fma : {true, false}) {
      if (sizeof(T) == 8 && !fma) continue;
      CAPTURE(storage);
      CAPTURE(fma);
      const auto plan_for = [&](std::int64_t rows, int processors) {
        cuda::Device device = test_device();
        device.multiprocessors = processors;
        return cuda::plan_transform<T>(flow.program, device, rows, {Precision::float32, fma, storage});
      };
      const Results<T> whole = transform(flow, plan_for(most, 1), {}, x);
      for (const std::int64_t rows : {1, 2, 15, 17, 31, 33, 64, 65, 129}) {
        CAPTURE(rows);
        // The last `rows` of them: at other places of their tiles, in other blocks.
        const std::vector<T> part(x.end() - rows * width, x.end());
        const Results<T> some = transform(flow, plan_for(rows, rows % 2 == 0 ? 1 : 7), {}, part);
        CHECK(same_bits(some.out, {whole.out.end() - rows * width, whole.out.end()}));
        CHECK(same_bits(some.log_det, {whole.log_det.end() - rows, whole.log_det.end()}));
        CHECK(same_bits(some.log_prob, {whole.log_prob.end() - rows, whole.log_prob.end()}));
      }
      for (const simt::Order order : {simt::Order::descending, simt::Order::mixed}) {
        const InOrder in_order(order);
        CHECK(transform(flow, plan_for(most, 1), {}, x) == whole);
      }
      std::vector<std::int64_t> index;
      std::vector<T> gathered;
      for (std::int64_t r = 0; r < 50; ++r) index.push_back(r * 37 % most);
      for (const std::int64_t r : index)
        gathered.insert(gathered.end(), x.begin() + r * width, x.begin() + (r + 1) * width);
      cuda::TransformCall<T> call;
      call.rows = 50;
      CHECK(transform(flow, plan_for(50, 2), call, x, index) == transform(flow, plan_for(50, 2), {}, gathered));
    }
  }
}

TEST_CASE_TEMPLATE("no rows are no launch, and outputs that are not wanted may be null", T, float, double) {
  const FlowSpec spec = spec_of<T>({6, 2, {9}, Activation::silu});
  const PackedFlow<T> flow(spec, random_parameters<T>(ParamLayout(spec), 1));
  for (const int storage : {0, 1, 2}) {
    const auto plan = cuda::plan_transform<T>(flow.program, test_device(), 0, {{}, false, storage});
    const GuardedArray<unsigned char> workspace(static_cast<std::size_t>(plan.workspace_bytes));
    cuda::TransformCall<T> call;
    CHECK(cuda::launch_transform(plan, flow.program, call, workspace.data(), {}) == 0);
    const std::vector<T> x = random_values<T>(6 * 21, 2);
    const Results<T> all = transform(flow, plan, {}, x);
    const GuardedArray<T> in(x), out(x.size()), log_det(21), log_prob(21);
    call.in = in.data();
    call.rows = 21;
    for (int wanted = 0; wanted < 3; ++wanted) {
      call.out = wanted == 0 ? out.data() : nullptr;
      call.log_det = wanted == 1 ? log_det.data() : nullptr;
      call.log_prob = wanted == 2 ? log_prob.data() : nullptr;
      REQUIRE(cuda::launch_transform(plan, flow.program, call, workspace.data(), {}) == 0);
    }
    CHECK(Results<T>{out.values(), log_det.values(), log_prob.values()} == all);
  }
}

TEST_CASE_TEMPLATE("a poisoned row yields NaN for itself alone", T, float, double) {
  const std::int64_t rows = 300, width = 7;
  // One coupling, and the poison in what it transforms: arithmetic alone would leave most of the row untouched.
  const FlowSpec spec = spec_of<T>({width, 1, {33, 5}, Activation::relu, 1.0, true});
  const PackedFlow<T> flow(spec, random_parameters<T>(ParamLayout(spec), 1));
  const std::vector<T> clean = random_values<T>(rows * width, 2);
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const std::vector<std::pair<std::size_t, T>> poisons = {{1, nan},   {3, nan},  {17, inf},
                                                          {33, -inf}, {62, nan}, {255, inf}};
  std::vector<T> x = clean;
  std::vector<bool> poisoned(static_cast<std::size_t>(rows));
  for (const auto& [row, value] : poisons) {
    x[row * 7 + 3 + row % 4] = value;
    poisoned[row] = true;
  }
  // One multiprocessor: several tiles one after the other in each block.
  cuda::Device device = test_device();
  device.multiprocessors = 1;
  for (int i = 0; i < 18; ++i) {
    const int storage = i / 6;
    const InOrder in_order(static_cast<simt::Order>(i % 3));
    for (const bool fma : {true, false}) {
      auto plan = cuda::plan_transform<T>(flow.program, device, rows, {{}, fma, storage});
      if (storage == 0) {
        plan.shared_bytes -= (plan.warps - 1) * cuda::tile_bytes<T>(flow.program, plan);
        plan.warps = 1;
      }
      cuda::TransformCall<T> call;
      call.inverse = i / 3 % 2 == 1;
      const Results<T> expected = transform(flow, plan, call, clean), results = transform(flow, plan, call, x);
      std::int64_t wrong = 0;
      for (std::size_t r = 0; r < static_cast<std::size_t>(rows); ++r) {
        const auto check = [&](T actual, T without) {
          wrong += poisoned[r] ? !std::isnan(actual) : std::memcmp(&actual, &without, sizeof(T)) != 0;
        };
        for (std::size_t d = 0; d < 7; ++d) check(results.out[r * 7 + d], expected.out[r * 7 + d]);
        check(results.log_det[r], expected.log_det[r]);
        check(results.log_prob[r], expected.log_prob[r]);
      }
      CAPTURE(storage);
      CAPTURE(fma);
      CAPTURE(i % 3);
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE_TEMPLATE("conditioner gives the log-scale and shift of one layer", T, float, double) {
  for (const Shape& shape : {kShapes[1], kShapes[4], kShapes[7], kShapes[9]}) {
    const FlowSpec spec = spec_of<T>(shape);
    const std::vector<T> parameters = random_parameters<T>(ParamLayout(spec), 1);
    const PackedFlow<T> flow(spec, parameters);
    const oracle::Flow oracle(spec, widened(parameters));
    const std::int64_t rows = 35;
    const std::vector<T> x = random_values<T>(rows * shape.input_size, 3);
    const GuardedArray<T> in(x);
    for (std::size_t k = 0; k < spec.layers.size(); ++k) {
      const auto* coupling = std::get_if<Coupling>(&spec.layers[k]);
      if (coupling == nullptr) continue;
      const std::int64_t count = coupling->transformed.count(spec.input_size);
      for (const int storage : {-1, 1, 2}) {
        const auto plan = cuda::plan_transform<T>(flow.program, test_device(), rows, {{}, false, storage});
        const GuardedArray<unsigned char> workspace(static_cast<std::size_t>(plan.workspace_bytes));
        const GuardedArray<T> s(static_cast<std::size_t>(rows * count)), t(static_cast<std::size_t>(rows * count));
        cuda::TransformCall<T> call;
        call.in = in.data();
        call.rows = rows;
        call.conditioner = static_cast<std::int32_t>(k);
        call.log_scale = s.data();
        call.shift = t.data();
        REQUIRE(cuda::launch_transform(plan, flow.program, call, workspace.data(), {}) == 0);
        std::int64_t wrong = 0;
        for (std::int64_t r = 0; r < rows; ++r) {
          const auto expected = oracle.conditioner(k, row_of(x, r, shape.input_size));
          for (std::int64_t i = 0; i < count; ++i) {
            const auto at = static_cast<std::size_t>(r * count + i);
            wrong += !within(s[at], expected.log_scale[static_cast<std::size_t>(i)], kBudget<T>);
            wrong += !within(t[at], expected.shift[static_cast<std::size_t>(i)], kBudget<T>);
          }
        }
        CHECK(wrong == 0);
      }
    }
  }
}

// ---- noise, sums, Adam ----------------------------------------------------------------------------------------------

namespace {

template <class T>
void check_noise(std::int64_t width, const Base& base, int ulps = 2) {
  FlowSpec spec = spec_of<T>({width, 2, {12}, Activation::silu});
  spec.base = base;
  const std::vector<T> parameters = random_parameters<T>(ParamLayout(spec), 1);
  const PackedFlow<T> flow(spec, parameters);
  Flow reference(spec);
  reference.set_parameters<T>(parameters);
  const std::int64_t rows = 531;
  for (const std::uint64_t first : {std::uint64_t{0}, (std::uint64_t{1} << 32) - 100}) {
    const GuardedArray<T> z(static_cast<std::size_t>(rows * width));
    REQUIRE(cuda::launch_noise(flow.program.base, width, 7, first, rows, z.data(), {}) == 0);
    std::vector<T> expected(z.size());
    FlowAccess::backend(reference).noise(7, first, rows, expected.data(), Execution(1));
    std::int64_t wrong = 0;
    for (std::size_t i = 0; i < z.size(); ++i) {
      // A power of a uniform number, far out, has some digits less, and so has a sum that cancels.
      const T size = ulps > 2 ? std::fmax(T(1), std::fabs(expected[i])) : std::fabs(expected[i]);
      const T ulp = std::nextafter(size, std::numeric_limits<T>::max()) - size;
      wrong += !(std::fabs(z[i] - expected[i]) <= static_cast<T>(ulps) * ulp);
    }
    CHECK(wrong == 0);
    for (const int storage : {0, 1, 2}) {
      const auto plan = cuda::plan_transform<T>(flow.program, test_device(), rows, {{}, false, storage});
      cuda::TransformCall<T> call;
      call.inverse = true;
      call.rows = rows;
      call.seed = 7;
      call.first_row = first;
      const Results<T> sample = transform(flow, plan, call, {});
      call.seed = 0;
      CHECK(sample == transform(flow, plan, call, z.values()));
    }
  }
}

}  // namespace

TEST_CASE_TEMPLATE("noise is the CPU's to 2 ulp, and a sample is its inverse", T, float, double) {
  for (const std::int64_t width : {2, 3, 5, 16, 33}) check_noise<T>(width, NormalBase{});
  for (const std::int64_t width : {3, 16}) check_noise<T>(width, UniformBase{0.1, 0.3});
  for (const std::int64_t width : {3, 16}) {
    for (const Base& base : kTrainedBases) check_noise<T>(width, base, 64);
  }
}

TEST_CASE_TEMPLATE("sums are exact to float64 and do not depend on the threads' order", T, float, double) {
  for (const std::int64_t count : {0, 1, 255, 4096, 4097, 20001}) {
    const std::vector<T> values = random_values<T>(count, 3);
    const GuardedArray<T> in(values);
    const GuardedArray<double> result(2);
    const GuardedArray<unsigned char> workspace(static_cast<std::size_t>(cuda::sum_workspace_bytes(count)));
    long double sum = 0, squares = 0;
    for (const T v : values) sum += v, squares += static_cast<long double>(v) * v;
    REQUIRE(cuda::launch_sum(in.data(), {}, count, false, result.data(), workspace.data(), {}) == 0);
    CHECK(within(result[0], static_cast<double>(sum), 1e-12));
    const double before = result[0];
    REQUIRE(cuda::launch_sum_of_squares(in.data(), count, true, result.data(), workspace.data(), {}) == 0);
    CHECK(within(result[0] - before, static_cast<double>(squares), 1e-12));
    const InOrder in_order(simt::Order::descending);
    REQUIRE(cuda::launch_sum(in.data(), {}, count, false, result.data(), workspace.data(), {}) == 0);
    CHECK(std::memcmp(&result[0], &before, sizeof before) == 0);
  }
}

TEST_CASE_TEMPLATE("a sum by weight takes the weights of its rows", T, float, double) {
  const std::int64_t count = 5001;
  const std::vector<T> values = random_values<T>(count, 3);
  std::vector<double> given;
  std::vector<std::int64_t> places;
  for (std::int64_t i = 0; i < count; ++i) given.push_back(0.1 + static_cast<double>(i % 7));
  for (std::int64_t i = 0; i < count; ++i) places.push_back((i * 17) % count);
  const GuardedArray<T> in(values);
  const GuardedArray<double> weights(given), result(1);
  const GuardedArray<std::int64_t> index(places);
  const GuardedArray<unsigned char> workspace(static_cast<std::size_t>(cuda::sum_workspace_bytes(count)));
  const std::int64_t first = 12;
  for (const bool indexed : {false, true}) {
    const cuda::RowWeights all{weights.data(), indexed ? index.data() : nullptr};
    long double sum = 0;
    for (std::int64_t i = first; i < count; ++i) {
      const auto row = static_cast<std::size_t>(indexed ? places[static_cast<std::size_t>(i)] : i);
      sum += static_cast<long double>(given[row]) * values[static_cast<std::size_t>(i)];
    }
    REQUIRE(cuda::launch_sum(in.data() + first, all.from(first), count - first, false, result.data(), workspace.data(),
                             {}) == 0);
    CHECK(within(result[0], static_cast<double>(sum), 1e-12));
  }
}

/// Kingma and Ba's formulas with Loshchilov and Hutter's decay, as they are written.
template <class T>
void adam_oracle(const AdamStep& step, const std::vector<T>& gradient, std::vector<double>& m, std::vector<double>& v,
                 std::vector<double>& p) {
  const auto t = static_cast<double>(step.step);
  for (std::size_t i = 0; i < p.size(); ++i) {
    const double g = static_cast<double>(gradient[i]) * step.gradient_factor;
    m[i] = step.beta1 * m[i] + (1 - step.beta1) * g;
    v[i] = step.beta2 * v[i] + (1 - step.beta2) * g * g;
    const double mean = m[i] / (1 - std::pow(step.beta1, t)), square = v[i] / (1 - std::pow(step.beta2, t));
    p[i] -= step.learning_rate * (mean / (std::sqrt(square) + step.epsilon) + step.weight_decay * p[i]);
  }
}

TEST_CASE_TEMPLATE("Adam is the formula, clips by a norm in memory, and leaves alone what it is told to", T, float,
                   double) {
  const std::int64_t count = 1001;
  const auto n = static_cast<std::size_t>(count);
  const std::vector<T> gradient = random_values<T>(count, 1), moment = random_values<T>(count, 2),
                       parameters = random_values<T>(count, 3);
  std::vector<T> second = random_values<T>(count, 4);
  for (T& v : second) v *= v;
  for (const double clip : {0.0, 1.5}) {
    AdamStep step;
    step.step = 3;
    step.weight_decay = 0.1;
    double norm = 0;
    for (const T g : gradient) norm += static_cast<double>(g) * static_cast<double>(g);
    if (clip > 0) step.gradient_factor = clip / std::sqrt(norm);
    std::vector<double> m(moment.begin(), moment.end()), v(second.begin(), second.end()),
        p(parameters.begin(), parameters.end());
    adam_oracle(step, gradient, m, v, p);

    std::vector<cuda::Update> updates(n, cuda::Update::decayed);
    updates[5] = cuda::Update::none;
    const GuardedArray<T> g(gradient), m2(moment), v2(second), p2(parameters);
    const GuardedArray<cuda::Update> which(updates);
    const GuardedArray<double> norm_squared(std::vector<double>{norm, 0});
    cuda::AdamCall<T> call;
    AdamStep unclipped = step;
    unclipped.gradient_factor = 1;
    call.coefficients = coefficients(unclipped);
    call.norm_squared = norm_squared.data();
    call.clip_norm = clip;
    call.updates = which.data();
    call.count = count;
    call.gradient = g.data();
    call.first_moment = m2.data();
    call.second_moment = v2.data();
    call.parameters = p2.data();
    REQUIRE(cuda::launch_adam(call, {}) == 0);
    std::int64_t wrong = 0;
    const double ulps = sizeof(T) == 4 ? 1e-6 : 1e-15;
    for (std::size_t i = 0; i < n; ++i) {
      if (i == 5) continue;
      wrong += !within(m2[i], m[i], ulps) + !within(v2[i], v[i], ulps) + !within(p2[i], p[i], ulps);
    }
    CHECK(wrong == 0);
    CHECK(m2[5] == moment[5]);
    CHECK(v2[5] == second[5]);
    CHECK(p2[5] == parameters[5]);
    CHECK(p2[6] != parameters[6]);
    // A norm that is not finite stops the update.
    norm_squared[0] = kNaN;
    const std::vector<T> before = p2.values();
    REQUIRE(cuda::launch_adam(call, {}) == 0);
    CHECK(same_bits(p2.values(), before));
  }
}

TEST_CASE_TEMPLATE("elementary functions", T, float, double) {
  struct Case {
    const char* name;
    T (*function)(T);
    double low, high, ulps;  // bounds as in test_elementary.cpp
    long double (*exact)(long double);
  };
  const std::vector<Case> cases = {
      {"exp", cuda::exponential<T>, -80, 80, 1.0, [](long double x) { return std::exp(x); }},
      {"tanh", cuda::hyperbolic_tangent<T>, -12, 12, 2.0, [](long double x) { return std::tanh(x); }},
      {"sigmoid", cuda::sigmoid<T>, -30, 30, 2.0, [](long double x) { return 1 / (1 + std::exp(-x)); }},
      {"softplus", cuda::softplus<T>, -30, 30, 2.0,
       [](long double x) { return std::fmax(x, 0.0L) + std::log1p(std::exp(-std::fabs(x))); }},
      {"atan", cuda::arctangent<T>, -20, 20, 2.0, [](long double x) { return std::atan(x); }},
      {"gelu", cuda::gelu<T>, -8, 8, 2.0, [](long double x) { return 0.5L * x * std::erfc(-x / std::sqrt(2.0L)); }},
      {"silu", cuda::silu<T>, -30, 30, 2.0, [](long double x) { return x / (1 + std::exp(-x)); }},
      {"elu", cuda::elu<T>, -20, 5, 2.0, [](long double x) { return x > 0 ? x : std::expm1(x); }},
      {"log", cuda::logarithm<T>, 1e-9, 1, 1.0, [](long double x) { return std::log(x); }},
      {"sin_quarter", cuda::sin_quarter<T>, -0.5, 0.5, 1.0,
       [](long double x) { return std::sin(std::acos(-1.0L) / 2 * x); }},
      {"cos_quarter", cuda::cos_quarter<T>, -0.5, 0.5, 1.0,
       [](long double x) { return std::cos(std::acos(-1.0L) / 2 * x); }},
  };
  for (const Case& c : cases) {
    std::mt19937 engine(1);
    std::uniform_real_distribution<double> uniform(c.low, c.high);
    std::vector<T> values(20000);
    for (T& v : values) v = static_cast<T>(uniform(engine));
    double most = 0;
    for (std::size_t i = 0; i < values.size(); ++i) {
      const long double exact = c.exact(values[i]);
      const T rounded = static_cast<T>(std::fabs(exact));
      const long double ulp = std::nextafter(rounded, std::numeric_limits<T>::max()) - rounded;
      const auto error = static_cast<double>(std::fabs(c.function(values[i]) - exact) / ulp);
      most = error <= most ? most : error;
    }
    CAPTURE(c.name);
    CHECK(most <= c.ulps);
  }
}

// ---- gradients, beyond their values --------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("gradients accumulate, are deterministic, and leave out what is not wanted", T, float, double) {
  const Shape shape{9, 3, {70, 20}, Activation::silu, 1.0, true};
  const FlowSpec spec = spec_of<T>(shape);
  const PackedFlow<T> flow(spec, random_parameters<T>(ParamLayout(spec), 1));
  const std::int64_t rows = 200, width = 9;
  const std::vector<T> x = random_values<T>(rows * width, 2), g = random_values<T>(rows * width, 3),
                       g_det = random_values<T>(rows, 4);
  const std::vector<T> before = random_values<T>(flow.layout.size(), 5);
  for (const bool fma : {true, false}) {
    if (sizeof(T) == 8 && !fma) continue;
    const auto plan = cuda::plan_gradient<T>(flow.program, test_device(), rows, {{}, fma, 3});
    const Gradients<T> once = run_gradient(flow, plan, {}, x, g, g_det);
    for (const simt::Order order : {simt::Order::descending, simt::Order::mixed}) {
      const InOrder in_order(order);
      const Gradients<T> again = run_gradient(flow, plan, {}, x, g, g_det);
      CHECK(same_bits(again.gradient, once.gradient));
      CHECK(same_bits(again.grad_in, once.grad_in));
    }
    const Gradients<T> more = run_gradient(flow, plan, {}, x, g, g_det, before);
    std::int64_t wrong = 0;
    for (std::size_t i = 0; i < before.size(); ++i) {
      wrong +=
          !within(more.gradient[i], static_cast<double>(before[i]) + static_cast<double>(once.gradient[i]), kBudget<T>);
    }
    CHECK(wrong == 0);

    // Null means zero in, not wanted out.
    const std::vector<T> zeros(x.size(), T(0)), zero_det(static_cast<std::size_t>(rows), T(0));
    CHECK(same_bits(run_gradient(flow, plan, {}, x, {}, g_det).gradient,
                    run_gradient(flow, plan, {}, x, zeros, g_det).gradient));
    CHECK(same_bits(run_gradient(flow, plan, {}, x, g, {}).grad_in,
                    run_gradient(flow, plan, {}, x, g, zero_det).grad_in));
    const GuardedArray<T> in(x), out(g), det(g_det), gradient(before.size()), grad_in(x.size());
    const GuardedArray<cuda::GradientTask> tasks(static_cast<std::size_t>(plan.num_tasks));
    cuda::gradient_tasks(flow.program, plan, tasks.data());
    const GuardedArray<unsigned char> workspace(static_cast<std::size_t>(plan.workspace_bytes));
    cuda::GradientCall<T> call;
    call.in = in.data();
    call.rows = rows;
    call.grad_out = out.data();
    call.grad_log_det = det.data();
    call.gradient = gradient.data();
    REQUIRE(cuda::launch_gradient(plan, flow.program, tasks.data(), call, workspace.data(), {}) == 0);
    CHECK(same_bits(gradient.values(), once.gradient));
    call.gradient = nullptr;
    call.grad_in = grad_in.data();
    REQUIRE(cuda::launch_gradient(plan, flow.program, tasks.data(), call, workspace.data(), {}) == 0);
    CHECK(same_bits(grad_in.values(), once.grad_in));

    // No rows: nothing to add.
    call.rows = 0;
    call.gradient = gradient.data();
    REQUIRE(cuda::launch_gradient(plan, flow.program, tasks.data(), call, workspace.data(), {}) == 0);
    CHECK(gradient.values() == std::vector<T>(before.size(), T(0)));
  }
}

TEST_CASE_TEMPLATE("gradients of gathered rows, and of a poisoned one", T, float, double) {
  const std::int64_t rows = 90, width = 6;
  const FlowSpec spec = spec_of<T>({width, 1, {40}, Activation::tanh, 1.0, true});
  const PackedFlow<T> flow(spec, random_parameters<T>(ParamLayout(spec), 1));
  std::vector<T> x = random_values<T>(rows * width, 2), gathered;
  std::vector<std::int64_t> index;
  for (std::int64_t r = 0; r < rows; ++r) index.push_back(r * 29 % rows);
  for (const std::int64_t r : index)
    gathered.insert(gathered.end(), x.begin() + r * width, x.begin() + (r + 1) * width);
  const auto plan = cuda::plan_gradient<T>(flow.program, test_device(), rows);
  const GuardedArray<std::int64_t> order(index);
  cuda::GradientCall<T> call;
  call.nll = true;
  call.nll_factor = 0.125;
  const Gradients<T> expected = run_gradient(flow, plan, call, gathered);
  call.index = order.data();
  const Gradients<T> results = run_gradient(flow, plan, call, x);
  CHECK(same_bits(results.gradient, expected.gradient));
  CHECK(results.sum == expected.sum);

  call.index = nullptr;
  cuda::Device device = test_device();
  device.multiprocessors = 1;
  auto small = cuda::plan_gradient<T>(flow.program, device, 32);  // tiles of 32 rows, one after the other
  REQUIRE(small.tile_rows == 32);
  small.chunk_tiles = 3;
  small.log_prob_at = small.sums_at = small.workspace_bytes = 0;
  small.partials_at = cuda::round_up(3 * small.tape_elements * static_cast<std::int64_t>(sizeof(T)), 256);
  small.log_prob_at = small.products_at =
      small.partials_at + cuda::round_up(small.splits * flow.layout.size() * 8, 256);
  small.sums_at = small.log_prob_at + 1024;
  small.workspace_bytes = small.sums_at + 256;
  std::vector<T> bad = x;
  for (const std::size_t row : {1u, 9u, 40u}) bad[row * 6 + 4] = std::numeric_limits<T>::infinity();
  for (const auto thread_order : {simt::Order::ascending, simt::Order::descending, simt::Order::mixed}) {
    const InOrder in_order(thread_order);
    const Gradients<T> clean = run_gradient(flow, small, call, x), poisoned = run_gradient(flow, small, call, bad);
    CHECK(std::isnan(poisoned.sum));
    std::int64_t wrong = 0;
    for (const T value : poisoned.gradient) wrong += !std::isnan(value);
    for (std::size_t i = 0; i < x.size(); ++i) {
      const bool is_bad = i / 6 == 1 || i / 6 == 9 || i / 6 == 40;
      wrong += is_bad ? !std::isnan(poisoned.grad_in[i]) : poisoned.grad_in[i] != clean.grad_in[i];
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("gradients of the benchmark's flows, in every precision") {
  for (const Configuration& c : kConfigurations) {
    Shape shape = c.shape;
    if (shape.input_size == 784) shape = {100, 1, {600}};
    const std::int64_t rows = std::min<std::int64_t>(c.rows, 40);
    const FlowSpec spec = spec_of<float>(shape);
    const std::vector<float> parameters = random_parameters<float>(ParamLayout(spec), 5);
    const PackedFlow<float> flow(spec, parameters);
    Flow reference(spec_of<double>(shape));
    reference.set_parameters<double>(widened(parameters));
    const std::vector<float> x = random_values<float>(rows * shape.input_size, 6);
    std::vector<double> expected(parameters.size());
    reference.nll_gradient<double>(widened(x), expected);
    double scale = 0;
    for (const double e : expected) scale += e * e;
    for (const auto precision : {Precision::float32, Precision::tf32, Precision::bfloat16}) {
      const auto plan = cuda::plan_gradient<float>(flow.program, test_device(), rows, {precision, false, 0});
      cuda::GradientCall<float> call;
      call.nll = true;
      call.nll_factor = 1.0 / static_cast<double>(rows);
      const Gradients<float> results = run_gradient(flow, plan, call, x);
      double error = 0;
      for (std::size_t i = 0; i < expected.size(); ++i) error += std::pow(results.gradient[i] - expected[i], 2);
      error = std::sqrt(error / scale);
      const double rounding = precision == Precision::bfloat16 ? 0x1p-9 : 0x1p-11;
      CAPTURE(shape.input_size);
      CAPTURE(static_cast<int>(precision));
      CAPTURE(error);
      if (precision == Precision::float32) {
        CHECK(error <= 1e-5);
      } else {
        // Forward and back, each with its roundings, and units of relu that a rounding switches on or off: four
        // roundings of the whole gradient's length for each dense layer, and for the two ends.
        CHECK(error <= 4 * static_cast<double>(flow.dense.size() + 2) * rounding);
        CHECK(error >= rounding / 100);
      }
    }
  }
}

// ---- the machine finds what it is meant to find --------------------------------------------------------------------

namespace {

/// Threads exchange numbers through shared memory; `barrier`: as they should.
void exchange(float* out, bool barrier) {
  auto* shared = reinterpret_cast<float*>(cuda::shared_memory());
  const int i = cuda::thread_index(), n = cuda::num_threads();
  shared[i] = static_cast<float>(i);
  if (barrier) cuda::block_barrier();
  out[i] = shared[n - 1 - i];
}

void divergent(int kind) {
  const int i = cuda::thread_index();
  if (kind == 0 && i % 2 == 0) cuda::block_barrier();  // half of the threads, the others end
  if (kind == 1) {
    if (i < 32) {
      cuda::block_barrier();
    } else {
      cuda::block_barrier();  // a barrier, but another one
    }
  }
  if (kind == 2 && i % 32 < 16) cuda::warp_barrier();
  if (kind == 3) {
    if (i % 2 == 0) {
      cuda::shuffle(i, 0);
    } else {
      cuda::warp_barrier();
    }
  }
}

void copies(const float* in, float* out, bool wait) {
  auto* shared = reinterpret_cast<float*>(cuda::shared_memory());
  const int i = 4 * cuda::thread_index();
  cuda::copy16_async(shared + i, in + i);
  cuda::copies_commit();
  if (wait) cuda::copies_wait<0>();
  out[i] = shared[i];
}

void touch(float* p, int at, int kind) {
  if (cuda::thread_index() != 5) return;
  auto* shared = reinterpret_cast<float*>(cuda::shared_memory());
  if (kind == 0) shared[at] = 1;
  if (kind == 1) p[at] = 1;
  if (kind == 2) p[0] = p[at];
  if (kind == 3) cuda::load4(p + at);
}

void product(const float* a, const float* b, float* d, bool bf16) {
  const int lane = cuda::thread_index(), g = lane / 4, t = lane % 4;
  float sums[4] = {1, 1, 1, 1};
  unsigned x[4], y[2];
  if (bf16) {
    for (int i = 0; i < 4; ++i) {
      const float* at = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
      x[i] = cuda::pack_bf16(at[0], at[1]);
    }
    for (int i = 0; i < 2; ++i) y[i] = cuda::pack_bf16(b[(2 * t + 8 * i) * 8 + g], b[(2 * t + 8 * i + 1) * 8 + g]);
    cuda::multiply_bf16(sums, x, y);
  } else {
    for (int i = 0; i < 4; ++i) x[i] = cuda::to_bits(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
    for (int i = 0; i < 2; ++i) y[i] = cuda::to_bits(b[(t + 4 * i) * 8 + g]);
    cuda::multiply_tf32(sums, x, y);
  }
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

template <class Function>
std::string failure_of(Function&& run) {
  try {
    run();
  } catch (const simt::Failure& failure) {
    return failure.what();
  }
  return "none";
}

}  // namespace

TEST_CASE("the machine finds missing and divergent barriers") {
  const GuardedArray<float> out(64);
  for (const simt::Order order : {simt::Order::ascending, simt::Order::descending, simt::Order::mixed}) {
    const InOrder in_order(order);
    for (const bool barrier : {true, false}) {
      cuda::launch(exchange, 1, 64, 64 * 4, {}, out.data(), barrier);
      int wrong = 0;
      for (int i = 0; i < 64; ++i) wrong += !(out[static_cast<std::size_t>(i)] == static_cast<float>(63 - i));
      CHECK((wrong == 0) == barrier);
    }
    for (int kind = 0; kind < 4; ++kind) {
      CAPTURE(kind);
      const std::string message = failure_of([&] { cuda::launch(divergent, 1, 64, 0, {}, kind); });
      CHECK(message.find("divergent") != std::string::npos);
      CHECK(message.find("test_cuda_kernels.cpp:") != std::string::npos);
    }
  }
}

TEST_CASE("the machine finds accesses out of bounds or of what nothing wrote, and copies nobody waited for") {
  const GuardedArray<float> p(64);
  const auto touching = [&](int at, int kind) {
    return failure_of([&] { cuda::launch(touch, 2, 32, 128, {}, p.data(), at, kind); });
  };
  CHECK(touching(31, 0) == "none");
  CHECK(touching(32, 0).find("out of bounds") != std::string::npos);
  CHECK(touching(-1, 0).find("outside its shared memory") != std::string::npos);
  CHECK(touching(63, 1) == "none");
  CHECK(touching(64, 1).find("block 0, thread 5") != std::string::npos);
  CHECK(touching(-2000, 1).find("out of bounds") != std::string::npos);
  CHECK(touching(64, 2).find("out of bounds") != std::string::npos);
  CHECK(touching(2, 3).find("misaligned") != std::string::npos);
  CHECK(touching(60, 3).find("unwritten") != std::string::npos);
  for (int i = 60; i < 64; ++i) CHECK(touching(i, 1) == "none");
  CHECK(touching(60, 3) == "none");
  CHECK(p.intact());
  CHECK(touching(-1, 1) == "none");
  CHECK_FALSE(p.intact());  // found afterwards

  const GuardedArray<float> in(random_values<float>(128, 1)), out(128);
  for (const bool wait : {true, false}) {
    cuda::launch(copies, 1, 32, 512, {}, static_cast<const float*>(in.data()), out.data(), wait);
    CHECK(std::isnan(out[4]) != wait);
  }
  CHECK(failure_of([&] { cuda::launch(exchange, 1, 64, 1 << 20, {}, out.data(), true); }) != "none");
  CHECK(failure_of([&] { cuda::launch(exchange, 1, 33, 256, {}, out.data(), true); }) != "none");
}

TEST_CASE("matrix products have the layout and the roundings of the hardware") {
  const GuardedArray<float> a(random_values<float>(16 * 16, 1)), b(random_values<float>(16 * 8, 2)), d(16 * 8);
  for (const bool bf16 : {false, true}) {
    const int depth = bf16 ? 16 : 8;
    cuda::launch(product, 1, 32, 0, {}, static_cast<const float*>(a.data()), static_cast<const float*>(b.data()),
                 d.data(), bf16);
    int wrong = 0, exact = 0;
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 8; ++n) {
        double sum = 1, size = 1;
        for (int k = 0; k < depth; ++k) {
          const double term = static_cast<double>(a[static_cast<std::size_t>(m * depth + k)]) *
                              static_cast<double>(b[static_cast<std::size_t>(k * 8 + n)]);
          sum += term;
          size += std::fabs(term);
        }
        const double error = std::fabs(d[static_cast<std::size_t>(m * 8 + n)] - sum);
        wrong += !(error <= size * (bf16 ? 0x1p-8 : 0x1p-9));
        exact += error <= size * 0x1p-20;
      }
    }
    CHECK(wrong == 0);
    CHECK(exact < 20);
  }
  // Sums are cut off, never rounded up: 1 + 8 (2^-24 - 2^-26) stays 1.
  const double small[8] = {0x1.8p-25, 0x1.8p-25, 0x1.8p-25, 0x1.8p-25, 0x1.8p-25, 0x1.8p-25, 0x1.8p-25, 0x1.8p-25};
  CHECK(simt::truncated_sum(1.0f, small) == 1.0f);
  const double large[8] = {0x1p-22, 0x1p-23, 0, 0, 0, 0, 0, -0x1.8p-24};
  CHECK(simt::truncated_sum(1.0f, large) == 1.0f + 0x1.8p-22f);
}
