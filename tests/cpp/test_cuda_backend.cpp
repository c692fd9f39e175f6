// The CUDA backend's host side on the emulated runtime (NVPFLOW_CUDA=EMULATED): a flow on "cuda" against the same flow
// on the CPU, through nvpflow::Flow and fit, in chunks, in threads, after forks and without memory.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <random>
#include <thread>
#include <type_traits>
#include <variant>
#include <vector>

#include <nvpflow/density.hpp>
#include <nvpflow/train.hpp>

#include "backend.hpp"
#include "flow_access.hpp"
#include "mixed_spec.hpp"
#include "oracle.hpp"
#include "row_order.hpp"
#include "training.hpp"

using namespace nvpflow;

namespace nvpflow::cuda {
std::int64_t emulated_bytes_in_use(int device);  // emulated_runtime.cpp
}

namespace {

constexpr Device kCuda0 = {DeviceKind::cuda, 0}, kCuda1 = {DeviceKind::cuda, 1};

template <class T>
constexpr DType dtype_of = std::is_same_v<T, float> ? DType::float32 : DType::float64;
/// Both sides keep 1e-5 and 1e-12 of the oracle, here a sum of them.
template <class T>
constexpr double kBudget = std::is_same_v<T, float> ? 2e-5 : 2e-12;

template <class T>
std::vector<T> normals(std::int64_t count, unsigned seed, double scale = 1) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal(0, scale);
  std::vector<T> values(static_cast<std::size_t>(count));
  for (T& v : values) v = static_cast<T>(normal(engine));
  return values;
}

template <class T>
std::vector<T> zeros(std::int64_t count) {
  return std::vector<T>(static_cast<std::size_t>(count));
}

/// Parameters far from the identity; signs are -1 or 1, triangles half as far, so that their product is well
/// conditioned.
template <class T>
std::vector<T> some_parameters(const Flow& flow, unsigned seed) {
  std::vector<T> values = normals<T>(flow.num_parameters(), seed, 0.2);
  for (const TensorInfo& tensor : flow.layout().tensors()) {
    const bool sign = tensor.name.ends_with(".sign");
    if (!sign && !tensor.name.ends_with(".lower") && !tensor.name.ends_with(".upper")) continue;
    for (std::int64_t i = 0; i < tensor.size; ++i) {
      T& value = values[static_cast<std::size_t>(tensor.offset + i)];
      value = sign ? std::copysign(T(1), value) : value / 2;
    }
  }
  return values;
}

/// A flow on the CPU, far from the identity.
template <class T>
Flow cpu_flow(std::int64_t d = 5, std::int64_t k = 3, std::vector<std::int64_t> hidden = {12},
              Activation activation = Activation::silu, bool standardize = true) {
  Flow flow(FlowSpec::real_nvp(d, k, std::move(hidden), activation, 1.0, standardize, dtype_of<T>), 3);
  flow.set_parameters<T>(normals<T>(flow.num_parameters(), 4, 0.2));
  return flow;
}

template <class T>
double worst(const std::vector<T>& a, const std::vector<T>& b) {
  REQUIRE(a.size() == b.size());
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const auto x = static_cast<double>(a[i]), y = static_cast<double>(b[i]);
    const double off = std::isnan(x) && std::isnan(y) ? 0 : std::abs(x - y) / (1 + std::abs(y));
    worst = off <= worst ? worst : off;  // NaN stays
  }
  return worst;
}

template <class T>
struct AllResults {
  std::vector<T> z, log_det, x, inverse_log_det, log_prob, samples, samples_again, sample_log_prob, gradient, grad_in,
      grad_parameters, s, t, grad_context;
  double nll = 0, nll_of_gradient = 0;
};

/// shared: one context for all rows.
template <class T>
AllResults<T> all_results(const Flow& flow, std::int64_t rows, bool shared) {
  const std::int64_t d = flow.spec().input_size, p = flow.num_parameters();
  const std::vector<T> in = normals<T>(rows * d, 1), cotangent = normals<T>(rows * d, 2),
                       log_det_cotangent = normals<T>(rows, 3);
  const std::vector<T> given = normals<T>((shared ? 1 : rows) * flow.spec().context_size, 8);
  const Context context = given.empty() ? Context() : Context(given);
  AllResults<T> r;
  r.grad_context = std::vector<T>(given.size(), T(7));
  r.z = r.x = r.grad_in = r.samples = r.samples_again = zeros<T>(rows * d);
  r.log_det = r.inverse_log_det = r.log_prob = r.sample_log_prob = zeros<T>(rows);
  r.gradient = zeros<T>(p);
  r.grad_parameters = std::vector<T>(static_cast<std::size_t>(p), T(1));
  flow.forward<T>(in, r.z, r.log_det, context);
  flow.inverse<T>(in, r.x, r.inverse_log_det, context);
  flow.log_prob<T>(in, r.log_prob, context);
  flow.sample<T>(9, r.samples, 100, context);
  flow.sample_and_log_prob<T>(9, r.samples_again, r.sample_log_prob, 100, context);
  r.nll = flow.nll<T>(in, context);
  r.nll_of_gradient = flow.nll_gradient<T>(in, r.gradient, context);
  flow.vjp<T>(Direction::inverse, in, cotangent, log_det_cotangent, r.grad_in, r.grad_parameters, true, context,
              r.grad_context);
  for (std::size_t layer = flow.spec().layers.size(); layer-- > 0;) {
    const auto* coupling = std::get_if<Coupling>(&flow.spec().layers[layer]);
    if (coupling == nullptr || std::holds_alternative<Spline>(coupling->transform)) continue;
    r.s = r.t = zeros<T>(rows * coupling->transformed.count(d));
    flow.conditioner<T>(static_cast<std::int64_t>(layer), in, r.s, r.t, context);
    break;
  }
  return r;
}

/// factor: of the budgets.
template <class T>
void check_equal(const Flow& cpu, const Flow& cuda, std::int64_t rows, bool shared = false, double factor = 1) {
  const double budget = factor * kBudget<T>;
  CAPTURE(rows);
  const AllResults<T> a = all_results<T>(cuda, rows, shared), b = all_results<T>(cpu, rows, shared);
  CHECK(a.samples_again == a.samples);
  CHECK(worst(a.sample_log_prob, b.sample_log_prob) < budget);
  CHECK(worst(a.z, b.z) < budget);
  CHECK(worst(a.log_det, b.log_det) < budget);
  CHECK(worst(a.x, b.x) < budget);
  CHECK(worst(a.inverse_log_det, b.inverse_log_det) < budget);
  CHECK(worst(a.log_prob, b.log_prob) < budget);
  CHECK(worst(a.samples, b.samples) < budget);
  CHECK(worst(a.s, b.s) < budget);
  CHECK(worst(a.t, b.t) < budget);
  CHECK(a.nll == doctest::Approx(b.nll).epsilon(budget));
  CHECK(a.nll_of_gradient == doctest::Approx(b.nll).epsilon(budget));
  CHECK(worst(a.gradient, b.gradient) < 10 * budget);
  CHECK(worst(a.grad_in, b.grad_in) < 10 * budget);
  CHECK(worst(a.grad_context, b.grad_context) < 10 * budget * (shared ? std::sqrt(static_cast<double>(rows)) : 1));
  CHECK(worst(a.grad_parameters, b.grad_parameters) < 10 * budget * std::sqrt(static_cast<double>(rows)));
}

FitOptions short_fit() {
  FitOptions options;
  options.epochs = 3;
  options.batch_size = 64;
  options.learning_rate = 5e-3;
  options.weight_decay = 0.01;
  options.clip_norm = 1.0;
  options.validation_fraction = 0.25;
  options.max_round_trip = 1;
  return options;
}

}  // namespace

TEST_CASE_TEMPLATE("a flow on cuda gives what it gives on the CPU", T, float, double) {
  const Flow cpu = cpu_flow<T>();
  const Flow cuda = cpu.to(kCuda0);
  CHECK(name_of(cuda.device()) == "cuda:0");
  for (const std::int64_t rows : {1, 2, 17, 300}) check_equal<T>(cpu, cuda, rows);
  check_equal<T>(cpu, cuda, 1500);  // chunks of 16 KiB
}

TEST_CASE("other shapes, and no rows") {
  const Flow cpu = cpu_flow<float>(6, 2, {}, Activation::relu, false);
  check_equal<float>(cpu, cpu.to(kCuda0), 40);
  const Flow deep = cpu_flow<float>(9, 2, {20, 33}, Activation::gelu, true);
  check_equal<float>(deep, deep.to(kCuda1), 40);
  const Flow cuda = cpu.to(kCuda0);
  std::vector<float> none;
  cuda.log_prob<float>(none, none);
  std::vector<float> gradient(static_cast<std::size_t>(cuda.num_parameters()), 5.0f);
  cuda.vjp<float>(Direction::forward, none, none, none, none, gradient);
  CHECK(gradient == zeros<float>(cuda.num_parameters()));
}

TEST_CASE_TEMPLATE("layers of all features, directions and places", T, float, double) {
  for (const std::int64_t features : {2, 3, 6, 17}) {
    for (std::uint64_t seed = 0; seed < 6; ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      Flow cpu(mixed_spec(features, seed, dtype_of<T>));
      cpu.set_parameters<T>(normals<T>(cpu.num_parameters(), static_cast<unsigned>(seed), 0.2));
      const Flow cuda = cpu.to(kCuda0);
      check_equal<T>(cpu, cuda, 40);

      // Of the layer that the spec counts, permutations with the others.
      const FlowSpec& spec = cpu.spec();
      const std::size_t last = spec.layers.size() - 1;
      const auto parameters = cpu.parameters<T>();
      const oracle::Flow oracle(spec, {parameters.begin(), parameters.end()});
      const std::vector<T> row = normals<T>(features, 5);
      const auto expected = oracle.conditioner(last, {row.begin(), row.end()});
      for (const Flow* flow : std::initializer_list<const Flow*>{&cpu, &cuda}) {
        std::vector<T> s(expected.shift.size()), t(expected.shift.size());
        flow->conditioner<T>(static_cast<std::int64_t>(last), row, s, t);
        CHECK(worst(std::vector<double>(s.begin(), s.end()), expected.log_scale) < kBudget<T>);
        CHECK(worst(std::vector<double>(t.begin(), t.end()), expected.shift) < kBudget<T>);
      }
    }
  }
}

TEST_CASE_TEMPLATE("a uniform base", T, float, double) {
  for (const std::int64_t features : {2, 3, 6}) {
    for (std::uint64_t seed = 0; seed < 4; ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      FlowSpec spec = mixed_spec(features, seed, dtype_of<T>);
      spec.base = UniformBase{-20, 20};  // all rows are inside
      Flow wide(spec);
      wide.set_parameters<T>(normals<T>(wide.num_parameters(), static_cast<unsigned>(seed), 0.2));
      check_equal<T>(wide, wide.to(kCuda0), 40);
      spec.base = UniformBase{-1.5, 1.25};
      Flow narrow(spec);
      narrow.set_parameters<T>(wide.parameters<T>());
      const Flow cuda = narrow.to(kCuda0);
      std::vector<T> x = normals<T>(60 * features, 5), ours(60), theirs(60), of_cpu(x.size()), of_cuda(x.size());
      narrow.log_prob<T>(x, theirs);
      cuda.log_prob<T>(x, ours);
      std::int64_t outside = 0;
      for (std::size_t r = 0; r < ours.size(); ++r) {
        CHECK(std::isinf(ours[r]) == std::isinf(theirs[r]));
        outside += std::isinf(ours[r]);
        if (std::isinf(theirs[r])) ours[r] = theirs[r] = 0;
      }
      CHECK(outside > 0);
      CHECK(outside < 60);
      CHECK(worst(ours, theirs) < kBudget<T>);
      CHECK(cuda.nll<T>(x) == HUGE_VAL);
      x[0] = std::numeric_limits<T>::quiet_NaN();
      cuda.log_prob<T>(x, ours);
      CHECK(std::isnan(ours[0]));
      narrow.sample<T>(9, of_cpu);
      cuda.sample<T>(9, of_cuda);
      CHECK(worst(of_cuda, of_cpu) < kBudget<T>);
      const std::vector<T> rows = of_cuda;
      narrow.sample_and_log_prob<T>(9, of_cpu, theirs);
      cuda.sample_and_log_prob<T>(9, of_cuda, ours);
      CHECK(of_cuda == rows);
      CHECK(worst(ours, theirs) < kBudget<T>);
    }
  }
}

TEST_CASE_TEMPLATE("bases with parameters", T, float, double) {
  using Covariance = MixtureBase::Covariance;
  for (const Base& base : {Base(StudentTBase{4, true}), Base(MixtureBase{3, Covariance::diagonal}),
                           Base(MixtureBase{2, Covariance::full})}) {
    for (const std::int64_t features : {2, 3, 6}) {
      CAPTURE(base.index());
      CAPTURE(features);
      FlowSpec spec = mixed_spec(features, 1, dtype_of<T>);
      spec.base = base;
      Flow cpu(spec);
      cpu.set_parameters<T>(normals<T>(cpu.num_parameters(), 1, 0.2));
      const Flow cuda = cpu.to(kCuda0);
      check_equal<T>(cpu, cuda, 40);
      std::vector<T> ours(60), theirs(60), of_cpu(static_cast<std::size_t>(60 * features)), of_cuda(of_cpu.size());
      cpu.sample_and_log_prob<T>(9, of_cpu, theirs);
      cuda.sample_and_log_prob<T>(9, of_cuda, ours);
      CHECK(worst(of_cuda, of_cpu) < 4 * kBudget<T>);
      CHECK(worst(ours, theirs) < 4 * kBudget<T>);
    }
    const std::vector<T> x = normals<T>(400 * 4, 40, 2.0);
    FlowSpec spec = FlowSpec::real_nvp(4, 2, {16}, Activation::silu, 1.0, true, dtype_of<T>);
    spec.base = base;
    Flow cpu(spec, 1);
    Flow cuda = cpu.to(kCuda0);
    const History a = fit<T>(cpu, x, {}, short_fit()), b = fit<T>(cuda, x, {}, short_fit());
    REQUIRE(a.epochs.size() == b.epochs.size());
    const double budget = std::is_same_v<T, float> ? 1e-4 : 1e-10;
    for (std::size_t i = 0; i < a.epochs.size(); ++i) {
      CHECK(b.epochs[i].train_loss == doctest::Approx(a.epochs[i].train_loss).epsilon(budget));
    }
  }
}

TEST_CASE_TEMPLATE("linear layers", T, float, double) {
  for (const std::int64_t features : {2, 3, 6, 17}) {
    for (std::uint64_t seed = 0; seed < 4; ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      Flow cpu(linear_spec(features, seed, dtype_of<T>));
      cpu.set_parameters<T>(some_parameters<T>(cpu, static_cast<unsigned>(seed)));
      check_equal<T>(cpu, cpu.to(kCuda0), 40);
    }
  }
}

// What float32 keeps of a spline depends on its slopes.
TEST_CASE_TEMPLATE("splines", T, float, double) {
  for (const std::int64_t features : {2, 3, 17}) {
    for (std::uint64_t seed = 0; seed < 5; ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      Flow cpu(spline_spec(features, seed, dtype_of<T>));
      cpu.set_parameters<T>(some_parameters<T>(cpu, static_cast<unsigned>(seed)));
      const Flow cuda = cpu.to(kCuda0);
      check_equal<T>(cpu, cuda, 40, false, 100);
      if (features == 3) check_equal<T>(cpu, cuda, 900, false, 100);  // chunks of 16 KiB
    }
  }
}

TEST_CASE_TEMPLATE("splines given a context", T, float, double) {
  for (const std::int64_t features : {1, 2, 5}) {
    for (std::uint64_t seed = 0; seed < 4; ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      Flow cpu(conditional_spline_spec(features, seed, static_cast<std::int64_t>(1 + seed * 7), dtype_of<T>));
      cpu.set_parameters<T>(some_parameters<T>(cpu, static_cast<unsigned>(seed)));
      const Flow cuda = cpu.to(kCuda0);
      check_equal<T>(cpu, cuda, 40, false, 100);
      check_equal<T>(cpu, cuda, 37, true, 100);
    }
  }
}

TEST_CASE_TEMPLATE("networks of every kind", T, float, double) {
  for (const Networks kind : {Networks::two, Networks::layer_norm, Networks::residual, Networks::affine_maps}) {
    for (const std::int64_t features : {2, 3, 17}) {
      for (std::uint64_t seed = 0; seed < 4; ++seed) {
        CAPTURE(static_cast<int>(kind));
        CAPTURE(features);
        CAPTURE(seed);
        Flow cpu(networks_spec(features, seed, kind, dtype_of<T>));
        cpu.set_parameters<T>(some_parameters<T>(cpu, static_cast<unsigned>(seed)));
        check_equal<T>(cpu, cpu.to(kCuda0), 40);
      }
    }
  }
}

TEST_CASE_TEMPLATE("a context, by rows and one for all", T, float, double) {
  for (const std::int64_t features : {1, 2, 5, 17}) {
    for (std::uint64_t seed = 0; seed < 6; ++seed) {
      CAPTURE(features);
      CAPTURE(seed);
      Flow cpu(conditional_spec(features, seed, static_cast<std::int64_t>(1 + seed * 7), dtype_of<T>));
      cpu.set_parameters<T>(some_parameters<T>(cpu, static_cast<unsigned>(seed)));
      const Flow cuda = cpu.to(kCuda0);
      check_equal<T>(cpu, cuda, 40);
      check_equal<T>(cpu, cuda, 1);
      check_equal<T>(cpu, cuda, 37, true);
      if (features != 5 || seed != 3) continue;
      check_equal<T>(cpu, cuda, 700);  // chunks of 16 KiB
      check_equal<T>(cpu, cuda, 701, true);
    }
  }
}

namespace {

/// An array on device 0 with the values of the host's.
template <class T>
struct OnDevice {
  explicit OnDevice(const std::vector<T>& from) : memory(0, bytes(from)), count(from.size()) {
    memory.upload(from.data(), bytes(from));
  }
  explicit OnDevice(std::size_t size) : OnDevice(std::vector<T>(size)) {}
  static std::int64_t bytes(const std::vector<T>& from) { return static_cast<std::int64_t>(from.size() * sizeof(T)); }
  T* data() const { return static_cast<T*>(memory.data()); }
  std::vector<T> values() const {
    std::vector<T> to(count);
    cuda_download(0, to.data(), memory.data(), bytes(to), nullptr);
    return to;
  }

  DeviceMemory memory;
  std::size_t count;
};

}  // namespace

TEST_CASE_TEMPLATE("contexts that several rows share, in the host's memory and the device's", T, float, double) {
  Flow cpu(conditional_spec(5, 3, 4, dtype_of<T>));
  cpu.set_parameters<T>(some_parameters<T>(cpu, 3));
  const Flow flow = cpu.to(kCuda0);
  const Backend& backend = FlowAccess::backend(flow);
  for (const std::int64_t rows : {60, 720}) {  // 720: several chunks
    const std::vector<T> x = normals<T>(rows * 5, 1), g_det = normals<T>(rows, 2);
    const auto n = static_cast<std::size_t>(rows), p = static_cast<std::size_t>(flow.num_parameters());
    for (const std::int64_t repeat : {std::int64_t{1}, std::int64_t{3}, ContextRows::kForAll}) {
      CAPTURE(rows);
      CAPTURE(repeat);
      const std::vector<T> context = normals<T>((repeat > rows ? 1 : rows / repeat) * 4, 3);
      std::vector<T> each;  // a row for each row
      for (std::int64_t r = 0; r < rows; ++r) {
        const auto from = context.begin() + r / repeat * 4;
        each.insert(each.end(), from, from + 4);
      }
      std::vector<T> expected(n), log_prob(n);
      flow.log_prob<T>(x, expected, each);
      Execution how(1);
      how.context.rows = context.data();
      how.context.repeat = repeat;
      backend.log_prob(x.data(), rows, log_prob.data(), how);
      CHECK(log_prob == expected);
      const double sum = backend.sum_log_prob(x.data(), {.count = rows}, how);

      std::vector<T> grad_in(x.size()), gradient(p), grad_context(each.size());
      how.context.gradient = grad_context.data();
      backend.vjp(Direction::forward, x.data(), rows, x.data(), g_det.data(), grad_in.data(), gradient.data(), false,
                  how);
      const OnDevice<T> x2(x), g_det2(g_det), context2(context), log_prob2(n), grad_in2(x.size()), gradient2(p),
          grad_context2(each.size());
      Execution there = Execution::on_stream(nullptr);
      there.context.rows = context2.data();
      there.context.repeat = repeat;
      backend.log_prob(x2.data(), rows, log_prob2.data(), there);
      CHECK(backend.sum_log_prob(x2.data(), {.count = rows}, there) == doctest::Approx(sum).epsilon(1e-12));
      there.context.gradient = grad_context2.data();
      backend.vjp(Direction::forward, x2.data(), rows, x2.data(), g_det2.data(), grad_in2.data(), gradient2.data(),
                  false, there);
      CHECK(log_prob2.values() == expected);
      CHECK(worst(grad_in2.values(), grad_in) < kBudget<T>);
      CHECK(worst(grad_context2.values(), grad_context) < kBudget<T>);
      CHECK(worst(gradient2.values(), gradient) < 10 * kBudget<T> * std::sqrt(static_cast<double>(rows)));

      std::vector<T> cpu_in(x.size()), cpu_gradient(p), cpu_context(each.size());
      how.context.gradient = cpu_context.data();
      FlowAccess::backend(cpu).vjp(Direction::forward, x.data(), rows, x.data(), g_det.data(), cpu_in.data(),
                                   cpu_gradient.data(), false, how);
      CHECK(worst(grad_context, cpu_context) < 10 * kBudget<T>);
      CHECK(worst(grad_in, cpu_in) < 10 * kBudget<T>);
    }
  }
}

TEST_CASE("rows whose context holds NaN or inf are NaN, and no others") {
  Flow cpu(conditional_spec(3, 0, 5, DType::float32));
  cpu.set_parameters<float>(some_parameters<float>(cpu, 1));
  const Flow cuda = cpu.to(kCuda0);
  const std::vector<float> x = normals<float>(30 * 3, 45);
  std::vector<float> context = normals<float>(30 * 5, 46), clean(30), out(30), gradient(x.size()), of_context(30 * 5);
  cuda.log_prob<float>(x, clean, context);
  context[7 * 5 + 4] = std::numeric_limits<float>::quiet_NaN();
  context[20 * 5] = std::numeric_limits<float>::infinity();
  cuda.log_prob<float>(x, out, context);
  cuda.vjp<float>(Direction::forward, x, x, {}, gradient, {}, false, context, of_context);
  for (std::size_t i = 0; i < 30; ++i) {
    const bool bad = i == 7 || i == 20;
    CHECK((bad ? std::isnan(out[i]) : out[i] == clean[i]));
    CHECK(std::isnan(gradient[i * 3]) == bad);
    CHECK(std::isnan(of_context[i * 5 + 2]) == bad);
  }
}

TEST_CASE("every log-scale function") {
  using Function = LogScale::Function;
  for (const auto function :
       {Function::softsign, Function::atan, Function::identity, Function::sigmoid, Function::softplus}) {
    FlowSpec spec = FlowSpec::real_nvp(5, 2, {8}, Activation::tanh, 1.0, false, DType::float64);
    for (LayerSpec& layer : spec.layers) {
      std::get<Coupling>(layer).transform = Affine{{function, 1.0, 1.0, 0.001, 1.001, 2.0}};
    }
    Flow cpu(spec);
    cpu.set_parameters<double>(normals<double>(cpu.num_parameters(), 5, 0.2));
    CAPTURE(name_of(function));
    check_equal<double>(cpu, cpu.to(kCuda0), 40);
  }
}

TEST_CASE("a row's bits do not depend on the batch") {
  const Flow cuda = cpu_flow<float>().to(kCuda0);
  const std::vector<float> x = normals<float>(1000 * 5, 7);
  std::vector<float> together(1000), alone(1);
  cuda.log_prob<float>(x, together);
  for (const std::size_t row : {0u, 1u, 500u, 999u}) {
    cuda.log_prob<float>(std::span(x).subspan(row * 5, 5), alone);
    CHECK(alone[0] == together[row]);
  }
}

TEST_CASE("parameters: set, copied, moved between devices") {
  Flow cpu = cpu_flow<double>();
  Flow cuda = cpu.to(kCuda1);
  for (unsigned seed = 0; seed < 3; ++seed) {
    const std::vector<double> parameters = normals<double>(cpu.num_parameters(), 20 + seed, 0.2);
    cpu.set_parameters<double>(parameters);
    cuda.set_parameters<double>(parameters);
    check_equal<double>(cpu, cuda, 20);
  }
  const Flow copy = cuda;
  CHECK(copy.device() == kCuda1);
  check_equal<double>(cpu, copy, 20);
  check_equal<double>(cuda, copy.to({}), 20);
}

TEST_CASE("calls from many threads while another replaces the parameters see one set or the other") {
  Flow cuda = cpu_flow<float>(4, 2, {8}).to(kCuda0);
  const std::vector<float> old(cuda.parameters<float>().begin(), cuda.parameters<float>().end());
  const std::vector<float> other = normals<float>(cuda.num_parameters(), 30, 0.2);
  const std::vector<float> x = normals<float>(40 * 4, 31);
  const auto results_of = [&](const std::vector<float>& parameters) {
    cuda.set_parameters<float>(parameters);
    std::vector<float> out(40);
    cuda.log_prob<float>(x, out);
    return out;
  };
  const std::vector<float> first = results_of(old), second = results_of(other);
  std::atomic<bool> stop{false};
  std::atomic<int> mixed{0}, calls{0};
  std::vector<std::thread> readers;
  for (int i = 0; i < 3; ++i) {
    readers.emplace_back([&] {
      while (!stop.load()) {
        std::vector<float> out(40);
        cuda.log_prob<float>(x, out);
        mixed += out != first && out != second;
        ++calls;
      }
    });
  }
  for (int i = 0; i < 20 || calls.load() < 20; ++i) cuda.set_parameters<float>(i % 2 == 0 ? old : other);
  stop = true;
  for (std::thread& reader : readers) reader.join();
  CHECK(mixed.load() == 0);
}

TEST_CASE_TEMPLATE("fit on cuda follows fit on the CPU", T, float, double) {
  const std::vector<T> x = normals<T>(400 * 4, 40, 2.0);
  Flow cpu(FlowSpec::real_nvp(4, 2, {16}, Activation::silu, 1.0, true, dtype_of<T>), 1);
  Flow cuda = cpu.to(kCuda0);
  const History a = fit<T>(cpu, x, {}, short_fit()), b = fit<T>(cuda, x, {}, short_fit());
  REQUIRE(a.epochs.size() == b.epochs.size());
  const double budget = std::is_same_v<T, float> ? 1e-4 : 1e-10;
  for (std::size_t i = 0; i < a.epochs.size(); ++i) {
    CHECK(b.epochs[i].train_loss == doctest::Approx(a.epochs[i].train_loss).epsilon(budget));
    CHECK(b.epochs[i].validation_loss == doctest::Approx(a.epochs[i].validation_loss).epsilon(budget));
    CHECK(b.epochs[i].gradient_norm == doctest::Approx(a.epochs[i].gradient_norm).epsilon(100 * budget));
    CHECK(b.epochs[i].learning_rate == a.epochs[i].learning_rate);
    CHECK(b.epochs[i].round_trip > 0);
    CHECK(b.epochs[i].round_trip < kBudget<T>);
  }
  CHECK(a.best_epoch == b.best_epoch);
  const std::vector<T> pa(cpu.parameters<T>().begin(), cpu.parameters<T>().end());
  const std::vector<T> pb(cuda.parameters<T>().begin(), cuda.parameters<T>().end());
  CHECK(worst(pb, pa) < 100 * budget);
}

TEST_CASE_TEMPLATE("the score and a temperature follow the CPU", T, float, double) {
  const Flow cpu(FlowSpec::real_nvp(4, 2, {16}, Activation::silu, 1.0, true, dtype_of<T>), 1);
  const Flow cuda = cpu.to(kCuda0);
  const std::vector<T> x = normals<T>(150 * 4, 41);
  std::vector<T> a = zeros<T>(150 * 4), b = a, p = zeros<T>(150), q = p;
  cpu.score<T>(x, a);
  cuda.score<T>(x, b);
  CHECK(worst(b, a) < 10 * kBudget<T>);
  cpu.log_prob<T>(x, p, {}, 0.3);
  cuda.log_prob<T>(x, q, {}, 0.3);
  CHECK(worst(q, p) < kBudget<T>);
  cpu.sample_and_log_prob<T>(3, a, p, 7, {}, 2.5);
  cuda.sample_and_log_prob<T>(3, b, q, 7, {}, 2.5);
  CHECK(worst(b, a) < kBudget<T>);
  CHECK(worst(q, p) < kBudget<T>);
}

TEST_CASE_TEMPLATE("fit_density follows fit_density on the CPU", T, float, double) {
  const LogDensity<T> target = [](const DensityCall<T>& call) {
    for (std::size_t r = 0; r < call.log_p.size(); ++r) {
      call.log_p[r] = 0;
      for (std::size_t i = 4 * r; i < 4 * r + 4; ++i) {
        const T off = (call.x[i] - T(0.5)) / T(0.7);
        call.log_p[r] -= 0.5 * static_cast<double>(off * off);
        if (!call.gradient.empty()) call.gradient[i] = -off / T(0.7);
      }
    }
  };
  DensityOptions options;
  options.steps = 6;
  options.batch_size = 70;
  options.report_every = 3;
  options.validation = 50;
  for (const Estimator estimator : {Estimator::reparameterized, Estimator::path}) {
    options.estimator = estimator;
    Flow cpu(FlowSpec::real_nvp(4, 2, {16}, Activation::silu, 1.0, true, dtype_of<T>), 1);
    Flow cuda = cpu.to(kCuda0);
    const DensityHistory a = fit_density(cpu, target, options), b = fit_density(cuda, target, options);
    const double budget = std::is_same_v<T, float> ? 1e-4 : 1e-10;
    REQUIRE(a.reports.size() == b.reports.size());
    for (std::size_t i = 0; i < a.reports.size(); ++i) {
      CHECK(b.reports[i].loss == doctest::Approx(a.reports[i].loss).epsilon(budget));
      CHECK(b.reports[i].ess == doctest::Approx(a.reports[i].ess).epsilon(budget));
      CHECK(b.reports[i].gradient_norm == doctest::Approx(a.reports[i].gradient_norm).epsilon(100 * budget));
    }
  }
}

TEST_CASE_TEMPLATE("fit of linear layers follows fit on the CPU", T, float, double) {
  const std::vector<T> x = normals<T>(300 * 5, 45, 2.0);
  Flow cpu(linear_spec(5, 1, dtype_of<T>), 1);
  Flow cuda = cpu.to(kCuda0);
  const History a = fit<T>(cpu, x, {}, short_fit()), b = fit<T>(cuda, x, {}, short_fit());
  CHECK(b.best_loss == doctest::Approx(a.best_loss).epsilon(std::is_same_v<T, float> ? 1e-4 : 1e-10));
  const std::vector<T> pa(cpu.parameters<T>().begin(), cpu.parameters<T>().end());
  const std::vector<T> pb(cuda.parameters<T>().begin(), cuda.parameters<T>().end());
  CHECK(worst(pb, pa) < (std::is_same_v<T, float> ? 1e-2 : 1e-8));
}

TEST_CASE_TEMPLATE("fit of splines follows fit on the CPU", T, float, double) {
  const std::vector<T> x = normals<T>(300 * 5, 45);
  Flow cpu(spline_spec(5, 1, dtype_of<T>), 1);
  Flow cuda = cpu.to(kCuda0);
  const History a = fit<T>(cpu, x, {}, short_fit()), b = fit<T>(cuda, x, {}, short_fit());
  CHECK(b.best_loss == doctest::Approx(a.best_loss).epsilon(std::is_same_v<T, float> ? 1e-4 : 1e-10));
  const std::vector<T> pa(cpu.parameters<T>().begin(), cpu.parameters<T>().end());
  const std::vector<T> pb(cuda.parameters<T>().begin(), cuda.parameters<T>().end());
  CHECK(worst(pb, pa) < (std::is_same_v<T, float> ? 1e-2 : 1e-8));
}

TEST_CASE_TEMPLATE("fit with a context follows fit on the CPU", T, float, double) {
  const std::vector<T> x = normals<T>(300 * 3, 45, 2.0), context = normals<T>(300 * 4, 46),
                       other = normals<T>(50 * 3, 47), other_context = normals<T>(50 * 4, 48);
  for (const bool with_rows : {true, false}) {
    Flow cpu(conditional_spec(3, 3, 4, dtype_of<T>), 1);
    Flow cuda = cpu.to(kCuda0);
    const auto run = [&](Flow& flow) {
      return with_rows ? fit<T>(flow, x, other, short_fit(), nullptr, context, other_context)
                       : fit<T>(flow, x, {}, short_fit(), nullptr, context);
    };
    const History a = run(cpu), b = run(cuda);
    CHECK(b.best_loss == doctest::Approx(a.best_loss).epsilon(std::is_same_v<T, float> ? 1e-4 : 1e-10));
    const std::vector<T> pa(cpu.parameters<T>().begin(), cpu.parameters<T>().end());
    const std::vector<T> pb(cuda.parameters<T>().begin(), cuda.parameters<T>().end());
    CHECK(worst(pb, pa) < (std::is_same_v<T, float> ? 1e-2 : 1e-8));
  }
}

TEST_CASE("fit with validation rows, without any, and twice the same") {
  const std::vector<float> x = normals<float>(300 * 4, 41), held_out = normals<float>(50 * 4, 42);
  const Flow start(FlowSpec::real_nvp(4, 2, {8}), 1);
  FitOptions options = short_fit();
  options.validation_fraction = 0;
  for (const bool with_rows : {true, false}) {
    Flow cpu = start, cuda = start.to(kCuda1), again = start.to(kCuda0);
    const std::span<const float> validation = with_rows ? std::span<const float>(held_out) : std::span<const float>();
    const History a = fit<float>(cpu, x, validation, options), b = fit<float>(cuda, x, validation, options);
    fit<float>(again, x, validation, options);
    CHECK(b.best_loss == doctest::Approx(a.best_loss).epsilon(1e-4));
    CHECK(std::equal(cuda.parameters<float>().begin(), cuda.parameters<float>().end(),
                     again.parameters<float>().begin()));
  }
}

TEST_CASE("a training run that goes on from a checkpoint ends where an uninterrupted one does") {
  const std::vector<float> x = normals<float>(300 * 4, 43);
  const Flow start = Flow(FlowSpec::real_nvp(4, 2, {8}), 1).to(kCuda0);
  const std::string path =
      (std::filesystem::temp_directory_path() / ("nvpflow_cuda_" + std::to_string(getpid()))).string();
  FitOptions options = short_fit();
  options.schedule = Schedule::constant;
  Flow whole = start, halves = start;
  fit<float>(whole, x, {}, options);
  options.checkpoint = path;
  options.epochs = 1;
  fit<float>(halves, x, {}, options);
  options.epochs = 3;
  fit<float>(halves, x, {}, options);
  std::filesystem::remove(path);
  CHECK(std::equal(whole.parameters<float>().begin(), whole.parameters<float>().end(),
                   halves.parameters<float>().begin()));
}

TEST_CASE("training that diverges says where, as on the CPU") {
  const std::vector<float> x = normals<float>(200 * 4, 44);
  FitOptions options = short_fit();
  options.learning_rate = 1e30;
  options.clip_norm = 0;
  const auto message = [&](Flow flow) {
    try {
      fit<float>(flow, x, {}, options);
    } catch (const Error& error) {
      CHECK(error.code() == ErrorCode::not_finite);
      return std::string(error.what());
    }
    return std::string();
  };
  const Flow flow(FlowSpec::real_nvp(4, 2, {8}), 1);
  CHECK(!message(flow).empty());
  CHECK(message(flow.to(kCuda0)) == message(flow));
}

TEST_CASE("rows with NaN touch no other") {
  const Flow cuda = cpu_flow<float>().to(kCuda0);
  std::vector<float> x = normals<float>(30 * 5, 45), clean(30), out(30);
  cuda.log_prob<float>(x, clean);
  x[7 * 5 + 2] = std::numeric_limits<float>::quiet_NaN();
  cuda.log_prob<float>(x, out);
  for (std::size_t i = 0; i < 30; ++i) CHECK((i == 7 ? std::isnan(out[i]) : out[i] == clean[i]));
}

TEST_CASE("finite rows that overflow give infinities, never NaN") {
  const Flow cpu = cpu_flow<float>(), cuda = cpu.to(kCuda0);
  std::vector<float> x = normals<float>(30 * 5, 46), log_prob(30), expected(30), z(x.size()), log_det(30);
  const float largest = std::numeric_limits<float>::max();
  for (std::size_t j = 0; j < 5; ++j) x[7 * 5 + j] = j % 2 == 0 ? largest : -largest;
  x[9 * 5] = -largest;
  cpu.log_prob<float>(x, expected);
  cuda.log_prob<float>(x, log_prob);
  for (const std::size_t r : {7, 9}) {
    CHECK(expected[r] == -std::numeric_limits<float>::infinity());
    CHECK(log_prob[r] == expected[r]);
  }
  for (const bool inverse : {false, true}) {
    if (inverse) {
      cuda.inverse<float>(x, z, log_det);
    } else {
      cuda.forward<float>(x, z, log_det);
    }
    for (const float value : z) CHECK(!std::isnan(value));
    for (const float value : log_det) CHECK((inverse ? value > -1e30f : value < 1e30f));
  }
  std::vector<float> gradient(static_cast<std::size_t>(cuda.num_parameters()));
  CHECK(cuda.nll<float>(x) == HUGE_VAL);
  CHECK(cuda.nll_gradient<float>(x, gradient) == HUGE_VAL);
}

TEST_CASE_TEMPLATE("rows behind bounds are the CPU's, and rows outside have density 0 and no gradient", T, float,
                   double) {
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    CAPTURE(seed);
    Flow cpu(bounded_spec(5, seed, dtype_of<T>));
    cpu.set_parameters<T>(some_parameters<T>(cpu, 7));
    const Flow cuda = cpu.to(kCuda0);
    const std::size_t rows = 200, size = 5 * rows;
    std::vector<T> x = normals<T>(static_cast<std::int64_t>(size), 46, 1.0);
    const Bounds& bounds = *cpu.spec().bounds();
    const std::size_t bounded = static_cast<std::size_t>(
        std::find_if(bounds.low.begin(), bounds.low.end(), [](double v) { return std::isfinite(v); }) -
        bounds.low.begin());
    for (std::size_t row = 3; row < rows; row += 7) x[5 * row + bounded] = T(-20);
    std::vector<T> z(size), expected(size), log_det(rows), expected_log_det(rows), log_prob(rows),
        expected_log_prob(rows);
    cuda.forward<T>(x, z, log_det);
    cpu.forward<T>(x, expected, expected_log_det);
    cuda.log_prob<T>(x, log_prob);
    cpu.log_prob<T>(x, expected_log_prob);
    const auto is_close = [](T a, T b) { return a == b || worst<T>({a}, {b}) < 10 * kBudget<T>; };
    std::size_t wrong = 0;
    for (std::size_t row = 0; row < rows; ++row) {
      if (row % 7 == 3) wrong += log_prob[row] != -HUGE_VAL || log_det[row] != -HUGE_VAL || z[5 * row] != HUGE_VAL;
      wrong += !is_close(log_prob[row], expected_log_prob[row]) + !is_close(log_det[row], expected_log_det[row]);
    }
    for (std::size_t i = 0; i < size; ++i) wrong += !is_close(z[i], expected[i]);
    CHECK(wrong == 0);

    const std::vector<T> weights(rows, T(0.01));
    std::vector<T> gradient(static_cast<std::size_t>(cpu.num_parameters())), expected_gradient = gradient, grad_x(size),
                                                                             expected_grad_x(size);
    cuda.log_prob_vjp_unchecked(x.data(), static_cast<std::int64_t>(rows), weights.data(), log_prob.data(),
                                grad_x.data(), gradient.data(), false);
    cpu.log_prob_vjp_unchecked(x.data(), static_cast<std::int64_t>(rows), weights.data(), expected_log_prob.data(),
                               expected_grad_x.data(), expected_gradient.data(), false);
    CHECK(worst<T>(gradient, expected_gradient) < 100 * kBudget<T>);
    CHECK(worst<T>(grad_x, expected_grad_x) < 100 * kBudget<T>);
    for (std::size_t row = 3; row < rows; row += 7) CHECK(grad_x[5 * row] == 0);
    CHECK(cuda.nll_gradient<T>(x, gradient) == HUGE_VAL);
    cpu.nll_gradient<T>(x, expected_gradient);
    CHECK(worst<T>(gradient, expected_gradient) < 100 * kBudget<T>);

    cuda.sample_and_log_prob<T>(3, z, log_prob);
    cpu.sample_and_log_prob<T>(3, expected, expected_log_prob);
    for (std::size_t i = 0; i < size; ++i) {
      CHECK(static_cast<double>(z[i]) > bounds.low[i % 5]);
      CHECK(static_cast<double>(z[i]) < bounds.high[i % 5]);
    }
    CHECK(worst<T>(z, expected) < 1000 * kBudget<T>);
    cuda.vjp<T>(nvpflow::Direction::inverse, x, x, weights, grad_x, gradient);
    cpu.vjp<T>(nvpflow::Direction::inverse, x, x, weights, expected_grad_x, expected_gradient);
    CHECK(worst<T>(grad_x, expected_grad_x) < 1000 * kBudget<T>);
  }
}

TEST_CASE_TEMPLATE("rows far outside of splines, and rows with NaN or inf, are the CPU's", T, float, double) {
  for (const std::uint64_t seed : {1, 2, 3}) {  // slopes that go on outside; bounded sizes; many bins
    CAPTURE(seed);
    FlowSpec spec;
    spec.input_size = 3;
    spec.dtype = dtype_of<T>;
    Coupling coupling;
    coupling.network.hidden_sizes = {6};
    coupling.transform = some_spline(seed);
    spec.layers.emplace_back(coupling);
    spec.layers.emplace_back(ElementSpline{seed == 2, {FeatureSet::Name::all, {}}, some_spline(seed)});
    Flow cpu(spec);
    cpu.set_parameters<T>(some_parameters<T>(cpu, 7));
    const Flow cuda = cpu.to(kCuda0);
    const T most = std::numeric_limits<T>::max(), inf = std::numeric_limits<T>::infinity();
    const auto is_close = [](T a, T b) { return a == b || worst<T>({a}, {b}) < 100 * kBudget<T>; };
    std::vector<T> x = normals<T>(40 * 3, 46, 3.0);
    for (const T value : {most, -most, T(1e8), T(-1e8), inf, -inf, std::numeric_limits<T>::quiet_NaN(), T(0)}) {
      for (std::size_t j = 0; j < 3; ++j) {
        std::vector<T> z(x.size()), expected(x.size()), log_det(40), expected_log_det(40), log_prob(40),
            expected_log_prob(40);
        x[9 * 3 + j] = value;
        cuda.forward<T>(x, z, log_det);
        cpu.forward<T>(x, expected, expected_log_det);
        cuda.log_prob<T>(x, log_prob);
        cpu.log_prob<T>(x, expected_log_prob);
        for (std::size_t i = 0; i < 40; ++i) CHECK(is_close(log_prob[i], expected_log_prob[i]));
        if (j == 0 && std::fabs(value) == most) {  // lost in the network: no TF32 number is as large
          for (const T v : z) CHECK(!std::isnan(v));
        } else {
          for (std::size_t i = 0; i < 40; ++i) CHECK(is_close(log_det[i], expected_log_det[i]));
          for (std::size_t i = 0; i < z.size(); ++i) CHECK(is_close(z[i], expected[i]));
        }
        x[9 * 3 + j] = 1;
      }
    }
  }
}

/// What three updates by two slices of a batch leave, the last two of them clipped.
template <class T>
std::vector<std::vector<T>> trained(const Flow& flow, const std::vector<T>& x, TrainingReport& report) {
  const auto rows = static_cast<std::int64_t>(x.size()) / flow.spec().input_size;
  const auto size = static_cast<std::size_t>(flow.num_parameters());
  std::vector<T> parameters(size);
  flow.copy_parameters<T>(parameters);
  const std::int64_t slice = rows - rows / 2;
  const auto run = FlowAccess::backend(flow).begin_training({x.data(), rows}, parameters.data(), slice, Execution(1));
  AdamStep step;
  step.weight_decay = 0.1;
  for (step.step = 1; step.step <= 3; ++step.step) {
    run->gradient(RowOrder(), 0, slice, rows, false);
    run->gradient(RowOrder(), slice, rows - slice, rows, true);
    run->update(step, step.step == 1 ? 0 : 0.01);
  }
  report = run->report();
  const Training::Arrays arrays = run->read(true);
  std::vector<std::vector<T>> all;
  for (const void* array : {arrays.parameters, arrays.first_moment, arrays.second_moment}) {
    all.emplace_back(static_cast<const T*>(array), static_cast<const T*>(array) + size);
  }
  return all;
}

TEST_CASE_TEMPLATE("updates are the CPU's", T, float, double) {
  const Flow cpu = cpu_flow<T>();
  const std::vector<T> x = normals<T>(7 * 5, 50);
  TrainingReport a, b;
  const auto ours = trained<T>(cpu.to(kCuda0), x, a), theirs = trained<T>(cpu, x, b);
  for (std::size_t i = 0; i < 3; ++i) CHECK(worst(ours[i], theirs[i]) < kBudget<T>);
  CHECK(a.sum_log_prob == doctest::Approx(b.sum_log_prob).epsilon(kBudget<T>));
  CHECK(a.gradient_norm == doctest::Approx(b.gradient_norm).epsilon(10 * kBudget<T>));
  CHECK(b.gradient_norm > 0.01);
  CHECK(b.bad_step == 0);
}

TEST_CASE("noise is the CPU's") {
  const Flow cpu = cpu_flow<float>();
  const Flow cuda = cpu.to(kCuda0);
  std::vector<float> z(60), z2(60);
  FlowAccess::backend(cpu).noise(3, 5, 12, z.data(), Execution(1));
  FlowAccess::backend(cuda).noise(3, 5, 12, z2.data(), Execution(1));
  CHECK(worst(z2, z) < 1e-6);
}

TEST_CASE("out of memory says how much, and leaves the flow as it was") {
  const std::vector<float> x = normals<float>(2000 * 5, 60);
  Flow cuda = cpu_flow<float>().to(kCuda0);
  std::vector<float> before(2000), after(2000);
  cuda.log_prob<float>(x, before);
  setenv("NVPFLOW_EMULATED_BYTES", "1000", 1);
  const auto code_of = [](auto f) {
    try {
      f();
    } catch (const Error& error) {
      CHECK(std::string(error.what()).find("bytes") != std::string::npos);
      return error.code();
    }
    return ErrorCode::io;
  };
  CHECK(code_of([&] { fit<float>(cuda, x, {}, short_fit()); }) == ErrorCode::out_of_memory);
  const std::vector<float> parameters = normals<float>(cuda.num_parameters(), 61);
  CHECK(code_of([&] { cuda.set_parameters<float>(parameters); }) == ErrorCode::out_of_memory);
  CHECK(code_of([&] { (void)cuda.to(kCuda1); }) == ErrorCode::out_of_memory);
  unsetenv("NVPFLOW_EMULATED_BYTES");
  cuda.log_prob<float>(x, after);
  CHECK(before == after);
  CHECK(cuda.parameters<float>()[0] != parameters[0]);
  cuda.set_parameters<float>(parameters);
  CHECK(cuda.parameters<float>()[0] == parameters[0]);
}

TEST_CASE("threads share a stream's workspace, but not that of the stream which is another one in each of them") {
  const std::int64_t rows = 64;
  const Flow flow = cpu_flow<float>().to(kCuda0);
  const std::vector<float> values = normals<float>(rows * 5, 62);
  const auto bytes_of = [](std::int64_t count) { return count * static_cast<std::int64_t>(sizeof(float)); };
  DeviceMemory x(0, bytes_of(rows * 5)), gradient(0, bytes_of(flow.num_parameters()));
  x.upload(values.data(), bytes_of(rows * 5));
  const auto growth = [&](std::uintptr_t stream) {
    const std::int64_t before = cuda::emulated_bytes_in_use(0);
    std::thread([&] {
      void* const on = reinterpret_cast<void*>(stream);
      FlowAccess::backend(flow).vjp(Direction::forward, x.data(), rows, x.data(), nullptr, nullptr, gradient.data(),
                                    false, Execution::on_stream(on));
      cuda_synchronize(0, on);
    }).join();
    return cuda::emulated_bytes_in_use(0) - before;
  };
  CHECK(growth(777) > 0);
  CHECK(growth(777) == 0);
  CHECK(growth(2) > 0);
  std::int64_t in_this_thread = 0, here_again = 0;
  const auto here = [&] {
    const std::int64_t before = cuda::emulated_bytes_in_use(0);
    void* const on = reinterpret_cast<void*>(std::uintptr_t{2});
    FlowAccess::backend(flow).vjp(Direction::forward, x.data(), rows, x.data(), nullptr, nullptr, gradient.data(),
                                  false, Execution::on_stream(on));
    cuda_synchronize(0, on);
    return cuda::emulated_bytes_in_use(0) - before;
  };
  in_this_thread = here();
  here_again = here();
  CHECK(in_this_thread > 0);
  CHECK(here_again == 0);
}

TEST_CASE("devices and precisions that are not there") {
  const Flow flow = cpu_flow<double>();
  const auto message = [](auto f) {
    try {
      f();
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  CHECK(message([&] { (void)flow.to({DeviceKind::cuda, 7}); }).find("cuda:0 to cuda:1") != std::string::npos);
  CHECK(message([&] { (void)flow.to(kCuda0, Precision::tf32); }).find("float64") != std::string::npos);
  CHECK(message([&] { (void)cpu_flow<float>().to({}, Precision::bfloat16); }).find("CUDA") != std::string::npos);
  for (const char* bad : {"gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:1 "}) {
    CHECK(message([&] { (void)parse_device(bad); }).find(bad) != std::string::npos);
  }
  CHECK(parse_device("cuda:3").index == 3);
}

TEST_CASE("after a fork the CPU goes on and CUDA says why it does not") {
  const Flow cpu = cpu_flow<float>();
  const std::vector<float> x = normals<float>(5, 70);
  std::vector<float> out(1);
  Flow cuda = cpu.to(kCuda0);
  cuda.log_prob<float>(x, out);
  const pid_t child = fork();
  if (child == 0) {
    int bad = 0;
    try {
      cuda.log_prob<float>(x, out);
      bad = 1;
    } catch (const Error& error) {
      bad = error.code() == ErrorCode::device ? 0 : 2;
    }
    try {
      (void)cpu.to(kCuda0);
      bad = 3;
    } catch (const Error&) {
    }
    try {
      (void)cuda_device_count();
      bad = 4;
    } catch (const Error&) {
    }
    cpu.log_prob<float>(x, out);
    {
      const Flow gone = std::move(cuda);
    }
    _exit(bad);
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}
