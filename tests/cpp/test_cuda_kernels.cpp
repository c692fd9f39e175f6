// The CUDA kernels on the host machine of simt.hpp: every path against the naive oracle, and the machine itself against
// kernels with the faults it is meant to find. No GPU and no CUDA toolkit needed.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#define NVPFLOW_SIMT
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include <nvpflow/flow.hpp>
#include <nvpflow/spec.hpp>

#include "../../cuda/adam.cu"
#include "../../cuda/coupling.cu"
#include "../../cuda/gaussian.cu"
#include "../../cuda/gradient.cu"
#include "oracle.hpp"

namespace {

using namespace nvpflow;
using cuda::Storage;
using simt::GuardedArray;

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

/// Far from the identity: kernels N(0, 1/in), everything else 0.1 N(0, 1).
template <class T>
std::vector<T> random_parameters(const ParamLayout& layout, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  std::vector<T> parameters(static_cast<std::size_t>(layout.size()));
  for (const TensorInfo& tensor : layout.tensors()) {
    const double scale = tensor.role == TensorRole::kernel ? 1 / std::sqrt(static_cast<double>(tensor.shape[0])) : 0.1;
    for (std::int64_t i = 0; i < tensor.size; ++i)
      parameters[static_cast<std::size_t>(tensor.offset + i)] = static_cast<T>(scale * normal(engine));
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
  return std::fabs(actual - expected) <= budget * (1 + std::fabs(expected));  // false for NaN
}

template <class T>
bool same_bits(const std::vector<T>& left, const std::vector<T>& right) {
  return left.size() == right.size() &&
         (left.empty() || std::memcmp(left.data(), right.data(), left.size() * sizeof(T)) == 0);
}

/// A small device: two multiprocessors of the newest kind.
cuda::Device test_device() {
  cuda::Device device;
  device.multiprocessors = 2;
  device.compute_capability = 90;
  device.shared_bytes_per_block = device.shared_bytes_per_processor = 227 << 10;
  return device;
}

/// A flow packed for the kernels, from the definitions in kernels.cuh alone: what the backend's packing has to agree with.
template <class T>
struct PackedFlow {
  explicit PackedFlow(const FlowSpec& s, const std::vector<T>& flat) : spec(s), layout(spec), parameters(flat) {
    program.input_size = static_cast<std::int32_t>(spec.input_size);
    program.num_layers = static_cast<std::int32_t>(spec.layers.size());
    for (std::size_t k = 0; k < spec.layers.size(); ++k) {
      if (spec.layers[k].kind == LayerKind::coupling) {
        add_coupling(k);
      } else {
        add_standardize(k);
      }
    }
    program.num_dense = static_cast<std::int32_t>(dense.size());
    program.layers = layers.data();
    program.dense = dense.data();
    program.packed_size = static_cast<std::int64_t>(source.size());
    program.transposed_size = static_cast<std::int64_t>(transposed_source.size());
    program.num_parameters = layout.size();
    packed = std::make_unique<GuardedArray<T>>(source.size());
    transposed = std::make_unique<GuardedArray<T>>(transposed_source.size());
    program.packed = packed->data();
    program.transposed = transposed->data();
    const GuardedArray<T> from(parameters);
    const GuardedArray<std::int64_t> index(source), transposed_index(transposed_source);
    cuda::launch_pack(&program, num_standardize, index.data(), program.packed_size, from.data(), packed->data(), {});
    cuda::launch_pack<T>(nullptr, 0, transposed_index.data(), program.transposed_size, from.data(), transposed->data(),
                         {});
  }

  /// One dense layer, whose output o is column `column` of tensor `tensor`.
  void add_dense(std::int64_t in, std::int64_t out, const TensorInfo* kernels[2], const TensorInfo* biases[2], int heads) {
    cuda::Dense d;
    d.in = static_cast<std::int32_t>(in);
    d.out = static_cast<std::int32_t>(out);
    d.weights = static_cast<std::int64_t>(source.size());
    source.resize(source.size() + static_cast<std::size_t>(cuda::weight_size(in, out)), -1);
    d.transposed = static_cast<std::int64_t>(transposed_source.size());
    transposed_source.resize(transposed_source.size() + static_cast<std::size_t>(cuda::weight_size(out, in)), -1);
    d.bias = static_cast<std::int64_t>(source.size());
    source.resize(source.size() + static_cast<std::size_t>(cuda::bias_size(out)), -1);
    for (int h = 0; h < heads; ++h) {
      d.kernel_offset[h] = kernels[h]->offset;
      d.bias_offset[h] = biases[h]->offset;
    }
    for (std::int64_t o = 0; o < out; ++o) {
      const std::int64_t head = o % heads, column = o / heads;
      source[static_cast<std::size_t>(d.bias + o)] = biases[head]->offset + column;
      for (std::int64_t i = 0; i < in; ++i) {
        const std::int64_t from = kernels[head]->offset + i * (out / heads) + column;
        source[static_cast<std::size_t>(d.weights + cuda::weight_index(i, o, in))] = from;
        transposed_source[static_cast<std::size_t>(d.transposed + cuda::weight_index(o, i, out))] = from;
      }
    }
    dense.push_back(d);
  }

  void add_coupling(std::size_t k) {
    const LayerSpec& from = spec.layers[k];
    const TensorInfo* tensor = &layout.tensors()[layout.first_tensor(k)];
    cuda::Layer<T> layer;
    layer.condition = from.swapped ? 1 : 0;
    layer.activation = static_cast<cuda::Act>(from.activation);
    layer.bound = static_cast<T>(from.scale_bound);
    layer.inverse_bound = static_cast<T>(1 / from.scale_bound);
    layer.first_dense = static_cast<std::int32_t>(dense.size());
    layer.num_dense = static_cast<std::int32_t>(from.hidden_sizes.size()) + 1;
    std::int64_t in = spec.conditioning(from).count;
    for (const std::int64_t width : from.hidden_sizes) {
      const TensorInfo *kernel[2] = {tensor, nullptr}, *bias[2] = {tensor + 1, nullptr};
      add_dense(in, width, kernel, bias, 1);
      tensor += 2;
      in = width;
    }
    const TensorInfo *kernels[2] = {tensor, tensor + 2}, *biases[2] = {tensor + 1, tensor + 3};
    add_dense(in, 2 * spec.transformed(from).count, kernels, biases, 2);
    layers.push_back(layer);
  }

  void add_standardize(std::size_t k) {
    const TensorInfo* tensor = &layout.tensors()[layout.first_tensor(k)];
    cuda::Layer<T> layer;
    layer.kind = cuda::Kind::standardize;
    layer.affine = static_cast<std::int64_t>(source.size());
    layer.mean_offset = tensor[0].offset;
    layer.log_std_offset = tensor[1].offset;
    source.resize(source.size() + static_cast<std::size_t>(cuda::affine_size(spec.input_size)), -1);
    layers.push_back(layer);
    ++num_standardize;
  }

  FlowSpec spec;
  ParamLayout layout;
  std::vector<T> parameters;
  std::vector<cuda::Layer<T>> layers;
  std::vector<cuda::Dense> dense;
  std::vector<std::int64_t> source, transposed_source;
  std::int32_t num_standardize = 0;
  std::unique_ptr<GuardedArray<T>> packed, transposed;
  cuda::Program<T> program;
};

template <class T>
struct Results {
  std::vector<T> out, log_det, log_prob;

  bool operator==(const Results& other) const {
    return same_bits(out, other.out) && same_bits(log_det, other.log_det) && same_bits(log_prob, other.log_prob);
  }
};

/// One call of every output, in guarded arrays.
template <class T>
Results<T> transform(const PackedFlow<T>& flow, const cuda::TransformPlan& plan, cuda::TransformCall<T> call,
                     const std::vector<T>& in, const std::vector<std::int64_t>& index = {}) {
  const std::int64_t width = flow.spec.input_size;
  if (call.rows == 0) call.rows = static_cast<std::int64_t>(in.size()) / width;
  const auto rows = static_cast<std::size_t>(call.rows);
  const GuardedArray<T> x(in), out(rows * static_cast<std::size_t>(width)), log_det(rows), log_prob(rows);
  const GuardedArray<std::int64_t> rows_of(index);
  const GuardedArray<unsigned char> workspace(static_cast<std::size_t>(plan.workspace_bytes));
  if (!in.empty()) call.in = x.data();
  if (!index.empty()) call.index = rows_of.data();
  call.out = out.data();
  call.log_det = log_det.data();
  call.log_prob = log_prob.data();
  REQUIRE(cuda::launch_transform(plan, flow.program, call, workspace.data(), {}) == 0);
  REQUIRE(out.intact());
  REQUIRE(log_det.intact());
  REQUIRE(log_prob.intact());
  return {out.values(), log_det.values(), log_prob.values()};
}

/// Numbers that are not within `budget` of the oracle.
template <class T>
std::int64_t count_wrong(const Results<T>& results, const oracle::Flow& oracle, bool inverse, const std::vector<T>& in,
                         std::int64_t width, double budget) {
  std::int64_t wrong = 0;
  for (std::size_t r = 0; r < results.log_det.size(); ++r) {
    const auto row = row_of(in, static_cast<std::int64_t>(r), width);
    const auto expected = inverse ? oracle.inverse(row) : oracle.forward(row);
    double square = 0;
    for (std::size_t d = 0; d < static_cast<std::size_t>(width); ++d) {
      wrong += !within(results.out[r * static_cast<std::size_t>(width) + d], expected.values[d], budget);
      square += expected.values[d] * expected.values[d];
    }
    wrong += !within(results.log_det[r], expected.log_det, budget);
    const double log_prob = expected.log_det - 0.5 * square - 0.91893853320467274178 * static_cast<double>(width);
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
                                                  {cuda::Precision::float32, fma, static_cast<int>(storage)});
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

namespace {

template <class T>
struct Gradients {
  std::vector<T> grad_in, gradient;
  double sum = kNaN;
};

/// One gradient call on guarded arrays, the gradient before it being `before` (empty: poison, overwritten).
template <class T>
Gradients<T> run_gradient(const PackedFlow<T>& flow, const cuda::GradientPlan& plan, cuda::GradientCall<T> call,
                          const std::vector<T>& in, const std::vector<T>& grad_out = {},
                          const std::vector<T>& grad_log_det = {}, const std::vector<T>& before = {}) {
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
  REQUIRE(cuda::launch_gradient(plan, flow.program, tasks.data(), call, workspace.data(), {}) == 0);
  REQUIRE(gradient.intact());
  REQUIRE(grad_in.intact());
  REQUIRE(workspace.intact());
  return {grad_in.values(), gradient.values(), sum[0]};
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
        const auto plan = cuda::plan_gradient<T>(flow.program, test_device(), rows, {cuda::Precision::float32, fma, chunk});
        cuda::GradientCall<T> call;
        call.nll = true;
        call.nll_factor = static_cast<T>(1.0 / static_cast<double>(rows));
        const Gradients<T> nll = run_gradient(flow, plan, call, x);
        std::vector<double> expected(count), expected_in(x.size());
        const double value = reference.nll_gradient<double>(widened(x), expected);
        CHECK(within(-nll.sum / static_cast<double>(rows), value, kBudget<T>));
        CHECK(count_different(nll.gradient, expected, kBudget<T>) == 0);
        for (const bool inverse : {false, true}) {
          call = {};
          call.inverse = inverse;
          const Gradients<T> vjp = run_gradient(flow, plan, call, x, g, g_det);
          reference.vjp<double>(inverse ? Direction::inverse : Direction::forward, widened(x), widened(g), widened(g_det),
                                expected_in, expected);
          // Both are sums with cancellation: of several layers, of rows. Their error goes with the largest terms.
          CHECK(count_different(vjp.grad_in, expected_in, kBudget<T> * largest(expected_in)) == 0);
          CHECK(count_different(vjp.gradient, expected, kBudget<T> * largest(expected)) == 0);
        }
      }
    }
  }
}
