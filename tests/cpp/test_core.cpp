// What a flow is and how it is kept: FlowSpec, ParamLayout, initial parameters, model files.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <nvpflow/adam.hpp>
#include <nvpflow/density.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/flow.hpp>
#include <nvpflow/spec.hpp>
#include <nvpflow/spec_json.hpp>
#include <nvpflow/train.hpp>

#include "io/model_file.hpp"
#include "io/safetensors.hpp"
#include "random.hpp"
#include "row_order.hpp"

namespace fs = std::filesystem;
using namespace nvpflow;

namespace {

Coupling& coupling(FlowSpec& spec, std::size_t layer) { return std::get<Coupling>(spec.layers.at(layer)); }
const Coupling& coupling(const FlowSpec& spec, std::size_t layer) { return std::get<Coupling>(spec.layers.at(layer)); }

/// Runs `call`, which must throw Error(code) with a message that holds `fragment`.
template <class Call>
void check_refused(ErrorCode code, const std::string& fragment, Call call) {
  CAPTURE(fragment);
  try {
    call();
    FAIL_CHECK("nothing was thrown");
  } catch (const Error& error) {
    const std::string message = error.what();
    CAPTURE(message);
    CHECK(error.code() == code);
    CHECK(message.find(fragment) != std::string::npos);
  }
}

/// A folder of its own, removed at the end.
class Folder {
 public:
  Folder() {
    std::string name = (fs::temp_directory_path() / "nvpflow-test-XXXXXX").string();
    REQUIRE(::mkdtemp(name.data()) != nullptr);
    path_ = name;
  }
  ~Folder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  std::ptrdiff_t entries() const { return std::distance(fs::directory_iterator(path_), fs::directory_iterator()); }
  std::string path() const { return path_.string(); }

 private:
  fs::path path_;
};

std::string read_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void write_bytes(const std::string& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

/// A container with any header, however wrong.
std::string container(const std::string& header, std::size_t data_size) {
  std::string bytes(8, '\0');
  const std::uint64_t length = header.size();
  std::memcpy(bytes.data(), &length, 8);
  return bytes + header + std::string(data_size, '\0');
}

std::string golden(const std::string& name) {
  return (fs::path(__FILE__).parent_path().parent_path() / "data" / name).string();
}

/// A small model with a layer of each kind, and its parameters.
struct Model {
  FlowSpec spec = FlowSpec::real_nvp(5, 2, {4, 3}, Activation::tanh, 2.0, true);
  ParamLayout layout{spec};
  std::vector<float> parameters = std::vector<float>(static_cast<std::size_t>(layout.size()));

  Model() { initialize_parameters(layout, 7, parameters.data()); }

  void save(const std::string& path) const { save_model(path, spec, layout, parameters.data()); }

  std::map<std::string, std::string> metadata() const {
    return {{"nvpflow.format_version", "1.0"},
            {"nvpflow.library_version", "9.8.7"},
            {"nvpflow.dtype", "float32"},
            {"nvpflow.spec", to_json(spec)}};
  }

  std::vector<FileTensor> tensors() const {
    std::vector<FileTensor> list;
    for (const TensorInfo& tensor : layout.tensors()) {
      list.push_back({tensor.name, spec.dtype, tensor.shape, parameters.data() + tensor.offset});
    }
    return list;
  }
};

std::vector<float> floats_of(const LoadedModel& model) {
  std::vector<float> values(model.parameters.size() / sizeof(float));
  std::memcpy(values.data(), model.parameters.data(), model.parameters.size());
  return values;
}

}  // namespace

// ---------------------------------------------------------------------------------------------- spec

TEST_CASE("bounds are the first layer, and are intervals of the dtype") {
  constexpr double kNone = std::numeric_limits<double>::infinity();
  FlowSpec spec = FlowSpec::real_nvp(2);
  const auto with = [&](double low, double high, DType dtype = DType::float32) {
    FlowSpec made = spec;
    made.dtype = dtype;
    made.layers.insert(made.layers.begin(), Bounds{{low, -kNone}, {high, kNone}});
    return made;
  };
  with(0, 1).validate();
  with(-kNone, 3).validate();
  with(1, 1 + 1e-9, DType::float64).validate();
  const auto refused = [](const std::string& message, const FlowSpec& made) {
    check_refused(ErrorCode::invalid_argument, message, [&] { made.validate(); });
  };
  refused("layers[0].high[0] is 0, expected more than layers[0].low[0], which is 0, with numbers of float32",
          with(0, 0));
  refused("layers[0].high[0] is -1, expected more than", with(0, -1));
  refused("with numbers of float32 between them", with(1, 1 + 1e-9));
  refused("layers[0].low[0] is nan, expected finite in float32", with(std::nan(""), 1));
  refused("layers[0].low[0] is inf, expected finite", with(kNone, kNone));
  refused("layers[0].high[0] is 1e+300, expected finite in float32", with(0, 1e300));
  refused("layers[0].low and layers[0].high hold no number", with(-kNone, kNone));
  FlowSpec made = spec;
  made.layers.emplace_back(Bounds{{0, 0}, {1, 1}});
  refused("layers[4] is a bounds layer, expected one only as layers[0]", made);
  made = spec;
  made.layers.insert(made.layers.begin(), Bounds{{0}, {1, 1}});
  refused("layers[0].low has 1 entries, expected 2", made);

  made = with(0, kNone);
  CHECK(parse_spec(to_json(made)) == made);
  CHECK(to_json(made).find(R"({"kind":"bounds","low":[0.0,null],"high":[null,null]})") != std::string::npos);
  CHECK(made.behind_bounds() == spec);
  CHECK(made.bounds() != nullptr);
  CHECK(spec.bounds() == nullptr);
  made.layers.insert(made.layers.begin() + 1, Standardize{});
  CHECK(made.begins_with_standardize());
  CHECK(takes_float64_rows(made));
  CHECK(!takes_float64_rows(with(0, 1)));
}

TEST_CASE("discrete columns are ascending, and their bounds edges of cells") {
  constexpr double kNone = std::numeric_limits<double>::infinity();
  const auto with = [](std::vector<std::int64_t> discrete, double low, double high) {
    FlowSpec made = FlowSpec::real_nvp(2);
    made.layers.insert(made.layers.begin(), Bounds{{low, -kNone}, {high, kNone}, std::move(discrete)});
    return made;
  };
  with({0}, -kNone, kNone).validate();
  with({0, 1}, -0.5, 6.5).validate();
  with({1}, 0, 1).validate();
  const auto refused = [](const std::string& message, const FlowSpec& made) {
    check_refused(ErrorCode::invalid_argument, message, [&] { made.validate(); });
  };
  refused("layers[0].discrete[0] is 2, expected 0 to 1", with({2}, 0, 1));
  refused("layers[0].discrete[0] is -1, expected 0 to 1", with({-1}, 0, 1));
  refused("layers[0].discrete[1] is 1 after 1, expected ascending columns", with({1, 1}, 0, 1));
  refused("layers[0].low[0] is 0 of a discrete column, expected the edge of an integer's cell", with({0}, 0, kNone));
  refused("layers[0].high[0] is 0.25 of a discrete column, expected the edge", with({0}, -kNone, 0.25));

  const FlowSpec made = with({0}, -0.5, kNone);
  CHECK(parse_spec(to_json(made)) == made);
  CHECK(to_json(made).find(R"({"kind":"bounds","low":[-0.5,null],"high":[null,null],"discrete":[0]})") !=
        std::string::npos);
  CHECK(with({}, -0.5, kNone) != made);
  CHECK(made.behind_bounds() == FlowSpec::real_nvp(2));
}

TEST_CASE("a flow with discrete columns scores and draws integers") {
  FlowSpec spec = FlowSpec::real_nvp(2, 2, {8});
  constexpr double kNone = std::numeric_limits<double>::infinity();
  spec.layers.insert(spec.layers.begin(), Bounds{{-0.5, -kNone}, {kNone, kNone}, {0}});
  const Flow flow(spec);
  const std::vector<float> x = {3, 0.25f, 2.5f, 0.25f, -1, 0.25f};
  std::vector<float> log_p(3);
  flow.log_prob<float>(x, log_p);
  CHECK(std::isfinite(log_p[0]));
  CHECK(log_p[1] == -std::numeric_limits<float>::infinity());
  CHECK(log_p[2] == -std::numeric_limits<float>::infinity());
  std::vector<float> rows(200), of_rows(100), again(100);
  flow.sample_and_log_prob<float>(1, rows, of_rows);
  flow.log_prob<float>(rows, again);
  CHECK(of_rows == again);
  for (std::size_t row = 0; row < 100; ++row) {
    CHECK(rows[2 * row] == std::nearbyint(rows[2 * row]));
    CHECK(rows[2 * row] >= 0);
  }
}

TEST_CASE("names of enumerators go both ways and unknown ones list the known") {
  CHECK(name_of(DType::float64) == "float64");
  CHECK(name_of(LayerKind::standardize) == "standardize");
  CHECK(activation_names() ==
        std::vector<std::string>{"relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "sigmoid", "softplus"});
  for (const std::string& name : activation_names()) CHECK(name_of(parse_activation(name)) == name);
  CHECK(parse_dtype("float32") == DType::float32);
  CHECK(parse_layer_kind("coupling") == LayerKind::coupling);
  CHECK(size_of(DType::float32) == 4);
  CHECK(size_of(DType::float64) == 8);
  check_refused(ErrorCode::invalid_argument,
                "activation is 'Relu', expected one of relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus",
                [] { parse_activation("Relu"); });
  check_refused(ErrorCode::invalid_argument, "dtype is 'half', expected one of float32, float64",
                [] { parse_dtype("half"); });
  for (const Weights weights : {Weights::full, Weights::bfloat16}) CHECK(parse_weights(name_of(weights)) == weights);
  check_refused(ErrorCode::invalid_argument, "weights is 'float16', expected 'full' or 'bfloat16'",
                [] { parse_weights("float16"); });
  check_refused(ErrorCode::invalid_argument, "kind is '', expected one of coupling, standardize",
                [] { parse_layer_kind(""); });
}

TEST_CASE("real_nvp alternates the halves, after a standardize layer where asked for") {
  const FlowSpec spec = FlowSpec::real_nvp(7, 3, {8}, Activation::silu, 1.5, true, DType::float64);
  REQUIRE(spec.layers.size() == 4);
  CHECK(spec.num_couplings() == 3);
  CHECK(kind_of(spec.layers[0]) == LayerKind::standardize);
  CHECK(coupling(spec, 1).transformed.name == FeatureSet::Name::second_half);
  CHECK(coupling(spec, 2).transformed.name == FeatureSet::Name::first_half);
  CHECK(coupling(spec, 3).transformed.name == FeatureSet::Name::second_half);
  using Features = std::vector<std::int64_t>;
  CHECK(spec.conditioning(coupling(spec, 1)) == Features{0, 1, 2});
  CHECK(spec.transformed(coupling(spec, 1)) == Features{3, 4, 5, 6});
  CHECK(spec.conditioning(coupling(spec, 2)) == Features{3, 4, 5, 6});
  CHECK(spec.transformed(coupling(spec, 2)) == Features{0, 1, 2});

  const FlowSpec defaults = FlowSpec::real_nvp(2);
  REQUIRE(defaults.layers.size() == 4);
  CHECK(coupling(defaults, 0).network.hidden_sizes == std::vector<std::int64_t>{256});
}

TEST_CASE("real_nvp refuses what no flow can be, before it allocates") {
  const auto refused = [](const std::string& fragment, std::int64_t input_size, std::int64_t num_flows,
                          std::vector<std::int64_t> hidden_sizes, double bound = 1.0) {
    check_refused(ErrorCode::invalid_argument, fragment,
                  [&] { FlowSpec::real_nvp(input_size, num_flows, hidden_sizes, Activation::relu, bound); });
  };
  refused("input_size is 1, expected at least 2: a coupling layer needs a part to condition on and a part to transform",
          1, 4, {8});
  refused("input_size is -3, expected at least 2", -3, 4, {8});
  refused("input_size is 1048577, expected 2 to 1048576", (1 << 20) + 1, 4, {8});
  refused("num_flows is 0, expected 1 to 65536", 4, 0, {8});
  refused("num_flows is -1, expected 1 to 65536", 4, -1, {8});
  refused("num_flows is 1000000000000, expected 1 to 65536", 4, 1'000'000'000'000, {8});
  refused("hidden_sizes[1] is 0, expected 1 to 1048576", 4, 4, {8, 0});
  refused("hidden_sizes[0] is 9223372036854775807", 4, 4, {std::numeric_limits<std::int64_t>::max()});
  refused("more than 524288 parameter tensors", 4, 65536, std::vector<std::int64_t>(10, 1));
  refused("more than 8589934592 parameters", 4, 4, {1 << 20, 1 << 20});
  refused("more than 8589934592 parameters", 1 << 20, 4, {1 << 20});
  refused("more than 524288 parameter tensors", 4, 65536, std::vector<std::int64_t>(100'000, 1));  // of 52 GB
  refused("scale_bound is 0, expected finite and > 0 in float32", 4, 4, {8}, 0.0);
  refused("scale_bound is -1, expected finite and > 0", 4, 4, {8}, -1.0);
  refused("scale_bound is nan", 4, 4, {8}, std::nan(""));
  refused("scale_bound is inf", 4, 4, {8}, HUGE_VAL);
  refused("scale_bound is 1e+300, expected finite and > 0 in float32", 4, 4, {8}, 1e300);
  check_refused(ErrorCode::invalid_argument, "dtype is the enumerator 2, expected one of float32, float64",
                [] { FlowSpec::real_nvp(4, 1, {8}, Activation::relu, 1.0, false, static_cast<DType>(2)); });
  // A caller of real_nvp has named no layers.
  CHECK_THROWS_WITH_AS(FlowSpec::real_nvp(4, 4, {0}), "hidden_sizes[0] is 0, expected 1 to 1048576", Error);
  CHECK_NOTHROW(FlowSpec::real_nvp(4, 1, {8}, Activation::relu, 1e300, false, DType::float64));
  CHECK(FlowSpec::real_nvp(4, 65536, {1}).layers.size() == 65536);
}

TEST_CASE("sizes are taken up to their limits and refused above") {
  const auto refused = [](const std::string& fragment, const auto& make) {
    check_refused(ErrorCode::invalid_argument, fragment, make);
  };
  CHECK_NOTHROW(FlowSpec::real_nvp(1 << 20, 1, {1}));
  CHECK_NOTHROW(FlowSpec::real_nvp(2, 1, {1 << 20}));
  refused("hidden_sizes[0] is 1048577, expected 1 to 1048576", [] { FlowSpec::real_nvp(2, 1, {(1 << 20) + 1}); });
  refused("num_flows is 65537, expected 1 to 65536", [] { FlowSpec::real_nvp(2, 65537, {1}); });
  CHECK(FlowSpec::real_nvp(2, 65535, {1}, Activation::relu, 1.0, true).layers.size() == 65536);
  refused("num_flows is 65536, expected 1 to 65535",
          [] { FlowSpec::real_nvp(2, 65536, {1}, Activation::relu, 1.0, true); });

  FlowSpec tensors = FlowSpec::real_nvp(2, 65536, {1, 1});  // 8 each
  CHECK_NOTHROW(tensors.validate());
  coupling(tensors, 7).network.hidden_sizes = {1, 1, 1};
  refused("more than 524288 parameter tensors", [&] { tensors.validate(); });

  // A coupling of two columns with one hidden layer of n units has 4 n + 2 parameters, two standardize layers have 8.
  FlowSpec parameters = FlowSpec::real_nvp(2, 2050, {1});
  coupling(parameters, 2).network.hidden_sizes = {(1 << 20) - 1029};
  for (std::size_t i = 3; i < parameters.layers.size(); ++i) coupling(parameters, i).network.hidden_sizes = {1 << 20};
  parameters.layers.insert(parameters.layers.begin() + 5, 2, Standardize{});
  CHECK_NOTHROW(parameters.validate());  // 2^33 of them
  ++coupling(parameters, 2).network.hidden_sizes[0];
  refused("more than 8589934592 parameters", [&] { parameters.validate(); });
  --coupling(parameters, 2).network.hidden_sizes[0];
  coupling(parameters, 1).network.hidden_sizes = {1, 1};  // 2 more
  refused("more than 8589934592 parameters", [&] { parameters.validate(); });

  // Without hidden layers the two heads alone: of n columns each that read n, 2 n (n + 1).
  CHECK_NOTHROW(FlowSpec::real_nvp(2 * 65535, 1, {}));
  refused("more than 8589934592 parameters", [] { FlowSpec::real_nvp(2 * 65536, 1, {}); });

  const auto bounded = [](double bound, DType dtype) {
    FlowSpec spec = FlowSpec::real_nvp(2, 1, {1}, Activation::relu, bound, false, dtype);
    return std::get<Affine>(coupling(spec, 0).transform).log_scale == LogScale::bounded(bound);
  };
  for (const double bound : {1.1754943508222875e-38, 3.4028234663852886e+38}) CHECK(bounded(bound, DType::float32));
  for (const double bound : {2.2250738585072014e-308, 1.7976931348623157e+308}) CHECK(bounded(bound, DType::float64));
  for (const double bound : {1.17549435e-38, 3.4028235e+38}) {
    refused("expected finite and > 0 in float32", [&] { bounded(bound, DType::float32); });
  }
  refused("expected finite and > 0 in float64", [&] { bounded(2.225073858507201e-308, DType::float64); });
}

TEST_CASE("validate names the layer and the field") {
  const auto refused = [](const std::string& fragment, const auto& change) {
    FlowSpec spec = FlowSpec::real_nvp(4, 2, {8}, Activation::relu, 1.0, true);
    change(spec);
    check_refused(ErrorCode::invalid_argument, fragment, [&] { spec.validate(); });
    check_refused(ErrorCode::invalid_argument, fragment, [&] { ParamLayout{spec}; });
  };
  refused("layers has no coupling, expected at least one", [](FlowSpec& spec) { spec.layers.clear(); });
  refused("layers has no coupling, expected at least one", [](FlowSpec& spec) { spec.layers.resize(1); });
  refused("layers[2].hidden_sizes[0] is -8", [](FlowSpec& spec) { coupling(spec, 2).network.hidden_sizes = {-8}; });
  refused("layers[1].scale_bound is 0",
          [](FlowSpec& spec) { coupling(spec, 1).transform = Affine{LogScale::bounded(0)}; });
  refused("layers holds 65537 layers, expected at most 65536", [](FlowSpec& spec) { spec.layers.resize(65537); });
  refused("dtype is the enumerator 2, expected one of float32, float64",
          [](FlowSpec& spec) { spec.dtype = static_cast<DType>(2); });
  refused("layers[1].activation is the enumerator 99, expected one of relu",
          [](FlowSpec& spec) { coupling(spec, 1).network.activation = static_cast<Activation>(99); });
}

TEST_CASE("the layout names every parameter in layer order without gaps") {
  FlowSpec spec = FlowSpec::real_nvp(5, 2, {4, 3});
  spec.layers.insert(spec.layers.begin() + 1, Standardize{});
  const ParamLayout layout(spec);
  const std::vector<std::pair<std::string, std::vector<std::int64_t>>> expected = {
      {"flow_0_coupling_dense_0.kernel", {2, 4}},
      {"flow_0_coupling_dense_0.bias", {4}},
      {"flow_0_coupling_dense_1.kernel", {4, 3}},
      {"flow_0_coupling_dense_1.bias", {3}},
      {"flow_0_scale.kernel", {3, 3}},
      {"flow_0_scale.bias", {3}},
      {"flow_0_translation.kernel", {3, 3}},
      {"flow_0_translation.bias", {3}},
      {"standardize_1.mean", {5}},
      {"standardize_1.log_std", {5}},
      {"flow_1_coupling_dense_0.kernel", {3, 4}},
      {"flow_1_coupling_dense_0.bias", {4}},
      {"flow_1_coupling_dense_1.kernel", {4, 3}},
      {"flow_1_coupling_dense_1.bias", {3}},
      {"flow_1_scale.kernel", {3, 2}},
      {"flow_1_scale.bias", {2}},
      {"flow_1_translation.kernel", {3, 2}},
      {"flow_1_translation.bias", {2}}};
  REQUIRE(layout.tensors().size() == expected.size());
  std::int64_t offset = 0;
  for (std::size_t t = 0; t < expected.size(); ++t) {
    const TensorInfo& tensor = layout.tensors()[t];
    CHECK(tensor.name == expected[t].first);
    CHECK(tensor.shape == expected[t].second);
    CHECK(tensor.offset == offset);
    CHECK(layout.find(tensor.name) == &tensor);
    offset += tensor.size;
  }
  CHECK(layout.size() == offset);
  CHECK(layout.first_tensor(0) == 0);
  CHECK(layout.first_tensor(1) == 8);
  CHECK(layout.first_tensor(2) == 10);
  CHECK(layout.multiply_adds_per_row() == 2 * 4 + 4 * 3 + 2 * 3 * 3 + 3 * 4 + 4 * 3 + 2 * 3 * 2);
  for (const TensorInfo& tensor : layout.tensors()) {
    CAPTURE(tensor.name);
    const bool standardize = tensor.name.starts_with("standardize"), kernel = tensor.name.ends_with(".kernel");
    CHECK(tensor.trained == !standardize);
    CHECK(tensor.decayed == kernel);
    CHECK(tensor.multiplies == kernel);
  }
  CHECK(layout.tensors()[9].layer == 1);
  CHECK(layout.find("flow_2_scale.bias") == nullptr);
}

TEST_CASE("without hidden layers the heads read the conditioning part") {
  const ParamLayout layout(FlowSpec::real_nvp(5, 2, {}));
  REQUIRE(layout.tensors().size() == 8);
  CHECK(layout.find("flow_0_scale.kernel")->shape == std::vector<std::int64_t>{2, 3});
  CHECK(layout.find("flow_1_translation.kernel")->shape == std::vector<std::int64_t>{3, 2});
}

TEST_CASE("Philox 4x32-10 gives the published words") {
  // Known answers of Random123 (kat_vectors).
  std::uint32_t word[4];
  const std::uint32_t zeros[4] = {0, 0, 0, 0};
  philox4x32(0, zeros, word);
  CHECK(word[0] == 0x6627e8d5u);
  CHECK(word[3] == 0x9b00dbd8u);
  const std::uint32_t pi[4] = {0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u};
  philox4x32(0x299f31d0a4093822u, pi, word);
  CHECK(word[0] == 0xd16cfe09u);
  CHECK(word[3] == 0x24126ea1u);
}

TEST_CASE("the order of a pass visits every row once, and is the same one by one and many at a time") {
  for (const std::int64_t total : {2, 3, 5, 16, 17, 64, 65, 257, 1000, 4097}) {
    for (const std::int64_t held_out : {std::int64_t{0}, total / 3}) {
      CAPTURE(total);
      CAPTURE(held_out);
      RowOrder order;
      order.shuffled = true;
      order.shuffle = {static_cast<std::uint64_t>(total - held_out), 7, kStreamShuffle, 3};
      order.split = held_out > 0;
      order.first_of_part = static_cast<std::uint64_t>(held_out);
      order.parts = {static_cast<std::uint64_t>(total), 7, kStreamSplit, 0};
      std::set<std::int64_t> rows;
      std::int64_t next = 0;
      order.each(0, total - held_out, [&](std::int64_t i, std::int64_t row) {
        CHECK(i == next++);
        CHECK(row == order(i));
        rows.insert(row);
      });
      CHECK(next == total - held_out);
      CHECK(std::ssize(rows) == total - held_out);
      CHECK(*rows.begin() >= 0);
      CHECK(*rows.rbegin() < total);
      const std::int64_t first = next / 2;
      order.each(first, next - first, [&](std::int64_t i, std::int64_t row) { CHECK(row == order(first + i)); });
    }
  }
  RowOrder().each(5, 0, [](std::int64_t, std::int64_t) { FAIL_CHECK("no row was asked for"); });
}

/// The largest value that may be drawn for an element of `tensor`, whose layer has this kernel.
double expected_limit(Init init, const TensorInfo& tensor, const std::vector<std::int64_t>& kernel) {
  const bool head = tensor.name.find("dense") == std::string::npos, bias = tensor.name.ends_with(".bias");
  if (tensor.name.starts_with("standardize") || (bias && (head || init == Init::glorot))) return 0;
  const auto in = static_cast<double>(kernel[0]), out = static_cast<double>(kernel[1]);
  return (head ? 0.01 : 1.0) * (init == Init::glorot ? std::sqrt(6 / (in + out)) : 1 / std::sqrt(in));
}

TEST_CASE("initial parameters are a function of spec, seed and init, the same in both dtypes") {
  const FlowSpec spec = FlowSpec::real_nvp(6, 2, {5}, Activation::relu, 1.0, true);
  const ParamLayout layout(spec);
  const auto size = static_cast<std::size_t>(layout.size());
  for (const Init init : {Init::glorot, Init::fan_in}) {
    CAPTURE(name_of(init));
    CHECK(parse_init(name_of(init)) == init);
    std::vector<float> narrow(size, 9.0f);
    std::vector<double> wide(size, 9.0), other(size, 9.0);
    initialize_parameters(layout, 3, narrow.data(), init);
    initialize_parameters(layout, 3, wide.data(), init);
    initialize_parameters(layout, 4, other.data(), init);
    CHECK(wide != other);
    for (std::size_t i = 0; i < size; ++i) CHECK(narrow[i] == static_cast<float>(wide[i]));

    std::vector<std::int64_t> kernel;
    for (const TensorInfo& tensor : layout.tensors()) {
      CAPTURE(tensor.name);
      if (tensor.name.ends_with(".kernel")) kernel = tensor.shape;
      const double limit = expected_limit(init, tensor, kernel);
      double largest = 0.0;
      for (std::int64_t at = tensor.offset; at < tensor.offset + tensor.size; ++at) {
        // Element i of the buffer is made of word i of the stream, wherever its tensor begins.
        const auto i = static_cast<std::uint64_t>(at);
        const std::uint32_t counter[4] = {static_cast<std::uint32_t>(i / 4), 0, 0, kStreamInitialize};
        std::uint32_t word[4];
        philox4x32(3, counter, word);
        const double uniform = (word[i % 4] + 0.5) / 4294967296.0;
        CHECK(wide[i] == doctest::Approx((2.0 * uniform - 1.0) * limit).epsilon(1e-14));
        largest = std::max(largest, std::abs(wide[i]));
      }
      CHECK(largest <= limit);
      CHECK(largest >= 0.5 * limit);
    }
  }
  std::vector<double> plain(size), fan_in(size);
  initialize_parameters(layout, 3, plain.data());
  initialize_parameters(layout, 3, fan_in.data(), Init::fan_in);
  CHECK(plain == fan_in);
  CHECK_THROWS_AS(initialize_parameters(layout, 3, plain.data(), static_cast<Init>(7)), Error);
}

// ---------------------------------------------------------------------------------------------- good files

TEST_CASE("a model comes back as it was saved") {
  const Folder folder;
  const std::string path = folder / "model.safetensors";
  const Model model;
  model.save(path);
  const LoadedModel loaded = load_model(path, nullptr);
  CHECK(loaded.spec == model.spec);
  CHECK(floats_of(loaded) == model.parameters);
  CHECK(load_model(path, &model.spec).spec == model.spec);
  CHECK(folder.entries() == 1);

  const std::string bytes = read_bytes(path);
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  CHECK((8 + length) % 64 == 0);
  CHECK(bytes[8] == '{');
  CHECK(bytes.size() == 8 + length + 4 * model.parameters.size());
  const TensorFile file = read_tensor_file(path);
  CHECK(file.metadata.at("nvpflow.format_version") == "1.0");
  CHECK(file.metadata.at("nvpflow.dtype") == "float32");
  REQUIRE(file.tensors.size() == model.layout.tensors().size());
  for (std::size_t t = 0; t < file.tensors.size(); ++t) {
    CHECK(file.tensors[t].name == model.layout.tensors()[t].name);
  }

  model.save(path);
  CHECK(read_bytes(path) == bytes);
}

TEST_CASE("names of columns come back with the model and its copies") {
  const Folder folder;
  const std::string path = folder / "model.safetensors";
  Flow flow(FlowSpec::real_nvp(3, 2, {4}));
  CHECK(flow.column_names().empty());
  const std::vector<std::string> names = {"east", "", "H\xc3\xb6he \"m\""};
  flow.set_column_names(names);
  CHECK(flow.column_names() == names);
  CHECK(Flow(flow).column_names() == names);
  flow.save(path);
  CHECK(Flow::load(path).column_names() == names);
  CHECK(load_model(path, nullptr).column_names == names);

  Flow other(flow.spec(), 1);
  other.set_column_names({"east", "up", "north"});
  check_refused(ErrorCode::file_format, "model.safetensors: column 2 is '', expected 'up'",
                [&] { other.reload(path); });
  other.set_column_names({"West", "", ""});
  check_refused(ErrorCode::file_format, "column 1 is 'east', expected 'West'", [&] { other.reload(path); });
  other.set_column_names(names);
  other.reload(path);
  other.set_column_names({});
  other.reload(path);
  CHECK(other.column_names().empty());
  check_refused(ErrorCode::invalid_argument, "column_names holds 2 names, expected 3 or none",
                [&] { flow.set_column_names({"a", "b"}); });
  check_refused(ErrorCode::invalid_argument, "not UTF-8", [&] { flow.set_column_names({"a", "b", "\xff"}); });
  check_refused(ErrorCode::invalid_argument, "column_names holds 2 names, expected 3 or none", [&] {
    save_model(path, flow.spec(), flow.layout(), flow.parameters<float>().data(), {.column_names = {"a", "b"}});
  });
  CHECK(flow.column_names() == names);

  constexpr std::size_t kLongest = (1 << 24) - std::string_view(R"(["","",""])").size();
  CHECK_NOTHROW(flow.set_column_names({"", "", std::string(kLongest, 'n')}));
  check_refused(ErrorCode::invalid_argument, "column_names takes 16777217 bytes as JSON, expected at most 16777216",
                [&] { flow.set_column_names({"", "", std::string(kLongest + 1, 'n')}); });
}

TEST_CASE("names of contexts come back with the model and its copies") {
  const Folder folder;
  const std::string path = folder / "model.safetensors", plain = folder / "plain.safetensors";
  FlowSpec spec = FlowSpec::real_nvp(3, 2, {4});
  spec.context_size = 2;
  Flow flow(spec);
  CHECK(flow.context_names().empty());
  flow.save(plain);
  CHECK(!read_tensor_file(plain).metadata.contains("nvpflow.context_names"));
  const std::vector<std::string> names = {"hour", "H\xc3\xb6he"};
  flow.set_context_names(names);
  flow.save(path);
  CHECK(read_tensor_file(path).metadata.at("nvpflow.context_names") == "[\"hour\",\"H\xc3\xb6he\"]");
  CHECK(Flow(flow).context_names() == names);
  CHECK(Flow::load(path).context_names() == names);
  CHECK(Flow::load(path).column_names().empty());

  Flow other(spec, 1);
  other.set_context_names({"hour", "up"});
  check_refused(ErrorCode::file_format, "model.safetensors: context column 2 is 'H\\xc3\\xb6he', expected 'up'",
                [&] { other.reload(path); });
  other.reload(plain);
  CHECK(other.context_names().at(1) == "up");
  check_refused(ErrorCode::invalid_argument, "context_names holds 3 names, expected 2 or none",
                [&] { flow.set_context_names({"a", "b", "c"}); });
  check_refused(ErrorCode::invalid_argument, "context_names holds 'a' twice, for columns 1 and 2",
                [&] { flow.set_context_names({"a", "a"}); });
  CHECK(flow.context_names() == names);
  flow.set_column_names({"east", "", "up"});
  const std::string message = "'up' is the name of column 3 and of context column 1, expected names that differ";
  check_refused(ErrorCode::invalid_argument, message, [&] { flow.set_context_names({"up", ""}); });
  flow.set_context_names({"", "north"});
  check_refused(ErrorCode::invalid_argument, "'north' is the name of column 1 and of context column 2",
                [&] { flow.set_column_names({"north", "", "up"}); });
  CHECK(flow.column_names().at(0) == "east");
  const ModelNotes both{.column_names = {"east", "", "up"}, .context_names = {"up", ""}};
  check_refused(ErrorCode::invalid_argument, message,
                [&] { save_model(path, spec, flow.layout(), flow.parameters<float>().data(), both); });
  Flow without(FlowSpec::real_nvp(3, 2, {4}));
  check_refused(ErrorCode::invalid_argument, "context_names holds 1 names, expected none: the flow has no context",
                [&] { without.set_context_names({"a"}); });
  without.set_context_names({});
}

TEST_CASE("a threshold goes where its parameters go") {
  const Folder folder;
  const std::string path = folder / "model.safetensors", plain = folder / "plain.safetensors";
  Flow flow(FlowSpec::real_nvp(3, 2, {4}));
  CHECK_FALSE(flow.threshold());
  flow.save(plain);
  CHECK_FALSE(read_tensor_file(plain).metadata.contains("nvpflow.threshold"));
  flow.set_threshold(Threshold{-0.1, 0.01});
  const auto holds = [](const Flow& of) {
    const std::optional<Threshold> found = of.threshold();
    return found && found->log_prob == -0.1 && found->quantile == 0.01;
  };
  CHECK(holds(flow));
  CHECK(holds(Flow(flow)));
  CHECK(holds(flow.to({}, Precision::float32, Weights::bfloat16)));
  flow.save(path);
  CHECK(read_tensor_file(path).metadata.at("nvpflow.threshold") == R"({"log_prob":-0.1,"quantile":0.01})");
  CHECK(holds(Flow::load(path)));

  Flow other(flow.spec(), 1);
  other.set_threshold(Threshold{-7});
  CHECK(std::isnan(other.threshold()->quantile));
  other.save(folder / "other");
  CHECK(std::isnan(Flow::load(folder / "other").threshold()->quantile));
  other.swap(flow);
  CHECK(holds(other));
  CHECK(flow.threshold()->log_prob == -7);
  flow.reload(path);
  CHECK(holds(flow));
  flow.reload(plain);
  CHECK_FALSE(flow.threshold());
  other.set_parameters<float>(std::vector<float>(static_cast<std::size_t>(other.num_parameters())));
  CHECK_FALSE(other.threshold());

  flow.set_threshold(Threshold{1, 0});
  const double infinity = std::numeric_limits<double>::infinity();
  check_refused(ErrorCode::invalid_argument, "log_prob is -inf, expected a finite number of nats",
                [&] { flow.set_threshold(Threshold{-infinity}); });
  check_refused(ErrorCode::invalid_argument, "quantile is 1.5", [&] { flow.set_threshold(Threshold{1, 1.5}); });
  check_refused(ErrorCode::invalid_argument, "quantile is -", [&] { flow.set_threshold(Threshold{1, -0.5}); });
  CHECK(flow.threshold()->log_prob == 1);
  flow.set_threshold(std::nullopt);
  CHECK_FALSE(flow.threshold());
}

TEST_CASE("an import report goes where its parameters go") {
  const Folder folder;
  const std::string path = folder / "model.safetensors", plain = folder / "plain.safetensors";
  const std::string report = R"({"library":"zuko","layers":[{"path":"flow"}]})";
  Flow flow(FlowSpec::real_nvp(3, 2, {4}));
  CHECK(flow.import_report().empty());
  flow.save(plain);
  CHECK_FALSE(read_tensor_file(plain).metadata.contains("nvpflow.import_report"));
  flow.set_import_report(report);
  CHECK(Flow(flow).import_report() == report);
  CHECK(flow.to({}, Precision::float32, Weights::bfloat16).import_report() == report);
  flow.save(path);
  CHECK(read_tensor_file(path).metadata.at("nvpflow.import_report") == report);
  CHECK(read_tensor_file(path).metadata.at("nvpflow.format_version") == "1.0");
  CHECK(Flow::load(path).import_report() == report);

  Flow other(flow.spec(), 1);
  other.swap(flow);
  CHECK(other.import_report() == report);
  CHECK(flow.import_report().empty());
  flow.reload(path);
  CHECK(flow.import_report() == report);
  flow.reload(plain);
  CHECK(flow.import_report().empty());
  other.set_parameters<float>(std::vector<float>(static_cast<std::size_t>(other.num_parameters())));
  CHECK(other.import_report().empty());

  const std::string deep = "{\"a\":" + std::string(9, '[') + std::string(9, ']') + "}";
  for (const std::string& wrong : {std::string("[]"), std::string("{"), std::string("\xff"), deep}) {
    check_refused(ErrorCode::invalid_argument, "import_report: ", [&] { flow.set_import_report(wrong); });
  }
  for (const std::string& wrong : {std::string(), std::string("[]"), std::string("{")}) {
    auto contents = read_tensor_file(path);
    contents.metadata["nvpflow.import_report"] = wrong;
    write_tensor_file(folder / "wrong", contents.metadata, contents.tensors);
    check_refused(ErrorCode::file_format, "nvpflow.import_report: ", [&] { (void)Flow::load(folder / "wrong"); });
  }
}

TEST_CASE("a flow is assigned with all it has, and loaded under the spec that is expected") {
  const Folder folder;
  const std::string path = folder / "model.safetensors";
  const std::vector<float> x = {0.5f, -1.0f, 2.0f};
  const auto log_prob = [&](const Flow& flow) {
    std::vector<float> out(1);
    flow.log_prob(std::span<const float>(x), std::span<float>(out));
    return out[0];
  };
  Flow flow(FlowSpec::real_nvp(3, 2, {4}), 1);
  flow.set_column_names({"a", "b", "c"});
  flow.set_num_threads(2);
  flow.save(path);

  Flow copy(FlowSpec::real_nvp(5));
  copy = flow;
  CHECK(copy.spec() == FlowSpec::real_nvp(3, 2, {4}));
  CHECK(copy.column_names() == std::vector<std::string>{"a", "b", "c"});
  CHECK(copy.num_threads() == 2);
  CHECK(log_prob(copy) == log_prob(flow));
  const Flow& itself = copy;
  copy = itself;
  CHECK(log_prob(copy) == log_prob(flow));
  copy.set_parameters<float>(std::vector<float>(static_cast<std::size_t>(flow.num_parameters())));
  CHECK(log_prob(copy) != log_prob(flow));
  copy = Flow(flow);
  CHECK(log_prob(copy) == log_prob(flow));

  CHECK(log_prob(Flow::load(path, flow.spec())) == log_prob(flow));
  check_refused(ErrorCode::file_format, "layers[0].hidden_sizes is [4] in the file, expected [5]",
                [&] { Flow::load(path, FlowSpec::real_nvp(3, 2, {5})); });
  check_refused(ErrorCode::invalid_argument, "input_size is 0", [&] { Flow::load(path, FlowSpec()); });
}

TEST_CASE("a float64 model without hidden layers comes back as it was saved") {
  const Folder folder;
  const std::string path = folder / "model.safetensors";
  const FlowSpec spec = FlowSpec::real_nvp(2, 1, {}, Activation::gelu, 0.1, false, DType::float64);
  const ParamLayout layout(spec);
  const std::vector<double> parameters = {0.1, -1e-310, 3.0, 1e300};
  REQUIRE(layout.size() == 4);
  save_model(path, spec, layout, parameters.data());
  const LoadedModel loaded = load_model(path, nullptr);
  CHECK(loaded.spec == spec);
  REQUIRE(loaded.parameters.size() == 32);
  CHECK(std::memcmp(loaded.parameters.data(), parameters.data(), 32) == 0);
}

TEST_CASE("any tensors and metadata make a container") {
  const Folder folder;
  const std::string path = folder / "any.safetensors";
  const std::vector<float> narrow = {1.0f, 2.0f, 3.0f};
  const std::vector<double> wide = {4.0, 5.0};
  const std::map<std::string, std::string> metadata = {{"", "\n\"\u00e9"}, {"key", ""}};
  write_tensor_file(path, metadata,
                    {{"z", DType::float32, {3}, narrow.data()},
                     {"empty", DType::float32, {0, 4}, nullptr},
                     {"a", DType::float64, {1, 2}, wide.data()},
                     {"scalar", DType::float32, {}, narrow.data()}});
  const TensorFile file = read_tensor_file(path);
  CHECK(file.metadata == metadata);
  REQUIRE(file.tensors.size() == 4);
  CHECK(file.tensors[0].name == "z");
  CHECK(std::memcmp(file.tensors[0].data, narrow.data(), 12) == 0);
  CHECK(file.tensors[2].dtype == DType::float64);
  CHECK(std::memcmp(file.tensors[2].data, wide.data(), 16) == 0);
  CHECK(file.tensors[3].shape.empty());

  write_tensor_file(path, {}, {});
  CHECK(read_tensor_file(path).tensors.empty());
  check_refused(ErrorCode::invalid_argument, "tensor name 'z' is reserved or used twice", [&] {
    write_tensor_file(path, {}, {{"z", DType::float32, {0}, nullptr}, {"z", DType::float32, {0}, nullptr}});
  });
  check_refused(ErrorCode::invalid_argument, "reserved",
                [&] { write_tensor_file(path, {}, {{"__metadata__", DType::float32, {0}, nullptr}}); });
  check_refused(ErrorCode::invalid_argument, "not UTF-8", [&] { write_tensor_file(path, {{"key", "\xff"}}, {}); });
}

TEST_CASE("a header longer than any reader takes is not written") {
  const Folder folder;
  check_refused(ErrorCode::invalid_argument, "bytes, expected at most 100000000",
                [&] { write_tensor_file(folder / "any.safetensors", {{"key", std::string(100'000'000, 'x')}}, {}); });
  CHECK(folder.entries() == 0);
}

TEST_CASE("a tensor has up to eight sizes, whose product fits a file") {
  const Folder folder;
  const std::string path = folder / "any.safetensors";
  const std::vector<float> values = {1.0f, 2.0f};
  write_tensor_file(path, {}, {{"t", DType::float32, {1, 1, 1, 2, 1, 1, 1, 1}, values.data()}});
  CHECK(read_tensor_file(path).tensors.at(0).shape == std::vector<std::int64_t>{1, 1, 1, 2, 1, 1, 1, 1});
  const auto refused = [&](const std::string& fragment, const std::vector<std::int64_t>& shape) {
    check_refused(ErrorCode::invalid_argument, fragment + ", expected up to 8 sizes >= 0 that fit a file",
                  [&] { write_tensor_file(path, {}, {{"t", DType::float32, shape, values.data()}}); });
  };
  refused("tensor 't' has shape [1, 1, 1, 1, 1, 1, 1, 1, 1]", {1, 1, 1, 1, 1, 1, 1, 1, 1});
  refused("tensor 't' has shape [2, -1]", {2, -1});
  refused("tensor 't' has shape [4294967296, 4294967296]", {std::int64_t{1} << 32, std::int64_t{1} << 32});
  CHECK(read_tensor_file(path).tensors.at(0).shape.size() == 8);
}

TEST_CASE("the golden files of format 1.0 load") {
  const LoadedModel narrow = load_model(golden("golden_v1_f32.safetensors"), nullptr);
  CHECK(narrow.spec == FlowSpec::real_nvp(5, 2, {4, 3}, Activation::tanh, 2.0, true));
  const LoadedModel wide = load_model(golden("golden_v1_f64.safetensors"), nullptr);
  CHECK(wide.spec == FlowSpec::real_nvp(5, 2, {4, 3}, Activation::tanh, 2.0, true, DType::float64));
}

TEST_CASE("Edifice's tensors alone load, under the spec that their shapes give or the caller's") {
  const std::string path = golden("golden_edifice_v0.safetensors");
  const LoadedModel loaded = load_model(path, nullptr);
  CHECK(loaded.spec == FlowSpec::real_nvp(6, 3, {5}));
  const std::vector<float> parameters = floats_of(loaded);
  const ParamLayout layout(loaded.spec);
  for (const FileTensor& tensor : read_tensor_file(path).tensors) {
    const TensorInfo& info = *layout.find(tensor.name);
    CHECK(std::memcmp(parameters.data() + info.offset, tensor.data, static_cast<std::size_t>(4 * info.size)) == 0);
  }

  const FlowSpec tanh = FlowSpec::real_nvp(6, 3, {5}, Activation::tanh, 3.0);
  CHECK(load_model(path, &tanh).spec == tanh);
  const FlowSpec wider = FlowSpec::real_nvp(6, 3, {7});
  check_refused(ErrorCode::file_format,
                "tensor 'flow_0_coupling_dense_0.kernel' is float32 of shape [3, 5], expected float32 of shape [3, 7]",
                [&] { load_model(path, &wider); });
  const FlowSpec wide = FlowSpec::real_nvp(6, 3, {5}, Activation::relu, 1.0, false, DType::float64);
  check_refused(ErrorCode::file_format, "is float32 of shape [3, 5], expected float64",
                [&] { load_model(path, &wide); });
  const FlowSpec shorter = FlowSpec::real_nvp(6, 2, {5});
  check_refused(ErrorCode::file_format, "tensor 'flow_2_coupling_dense_0.bias' is not part of the model",
                [&] { load_model(path, &shorter); });
  const FlowSpec longer = FlowSpec::real_nvp(6, 4, {5});
  check_refused(ErrorCode::file_format, "tensor 'flow_3_coupling_dense_0.kernel' is missing, expected float32",
                [&] { load_model(path, &longer); });
}

TEST_CASE("tensors alone: the spec is inferred for any number of flows and hidden layers") {
  const Folder folder;
  const std::string path = folder / "model.safetensors";
  const std::vector<std::vector<std::int64_t>> all_hidden_sizes = {{}, {3}, {4, 1, 2}};
  for (const std::int64_t input_size : {2, 3, 8}) {
    for (const std::int64_t num_flows : {1, 2, 11}) {
      for (const auto& hidden_sizes : all_hidden_sizes) {
        const FlowSpec spec = FlowSpec::real_nvp(input_size, num_flows, hidden_sizes);
        const ParamLayout layout(spec);
        const std::vector<float> parameters(static_cast<std::size_t>(layout.size()), 0.5f);
        std::vector<FileTensor> tensors;
        for (const TensorInfo& tensor : layout.tensors()) {
          tensors.insert(tensors.begin(), {tensor.name, spec.dtype, tensor.shape, parameters.data()});
        }
        write_tensor_file(path, {{"format", "pt"}}, tensors);
        CHECK(load_model(path, nullptr).spec == spec);
      }
    }
  }
}

TEST_CASE("tensors alone of float64 make a float64 model") {
  const Folder folder;
  const std::string path = folder / "model.safetensors";
  const std::vector<double> values = {0.1, 0.2, 0.3, 0.4};
  write_tensor_file(path, {},
                    {{"flow_0_scale.kernel", DType::float64, {1, 1}, &values[0]},
                     {"flow_0_scale.bias", DType::float64, {1}, &values[1]},
                     {"flow_0_translation.kernel", DType::float64, {1, 1}, &values[2]},
                     {"flow_0_translation.bias", DType::float64, {1}, &values[3]}});
  const LoadedModel loaded = load_model(path, nullptr);
  CHECK(loaded.spec == FlowSpec::real_nvp(2, 1, {}, Activation::relu, 1.0, false, DType::float64));
  REQUIRE(loaded.parameters.size() == 32);
  CHECK(std::memcmp(loaded.parameters.data(), values.data(), 32) == 0);
}

TEST_CASE("tensors alone that make no model are refused by name") {
  const Folder folder;
  const std::string path = folder / "model.safetensors";
  const FlowSpec spec = FlowSpec::real_nvp(4, 2, {3});
  const ParamLayout layout(spec);
  const std::vector<float> parameters(static_cast<std::size_t>(layout.size()));
  const auto refused = [&](const std::string& fragment, const auto& change) {
    std::vector<FileTensor> tensors;
    for (const TensorInfo& tensor : layout.tensors()) {
      tensors.push_back({tensor.name, spec.dtype, tensor.shape, parameters.data()});
      change(tensors.back());
    }
    write_tensor_file(path, {}, tensors);
    check_refused(ErrorCode::file_format, fragment, [&] { load_model(path, nullptr); });
  };
  const auto rename = [](const std::string& from, const std::string& to) {
    return [=](FileTensor& tensor) {
      if (tensor.name == from) tensor.name = to;
    };
  };
  const auto reshape = [](const std::string& name, const std::vector<std::int64_t>& shape) {
    return [=](FileTensor& tensor) {
      if (tensor.name == name) tensor.shape = shape;
    };
  };
  refused("no tensor 'flow_0_scale.kernel': not a RealNVP model", rename("flow_0_scale.kernel", "conv.weight"));
  refused("tensor 'flow_1_coupling_dense_0.kernel' is not part", rename("flow_1_scale.kernel", "flow_2_scale.kernel"));
  refused("tensor 'flow_0_scale.bias' is missing", rename("flow_0_scale.bias", "flow_0_scale.b"));
  refused("tensor 'flow_0_scale.kernel' has shape [6], expected two sizes", reshape("flow_0_scale.kernel", {6}));
  refused("shapes give is not valid: layers[1].hidden_sizes[0] is 0",
          reshape("flow_1_coupling_dense_0.kernel", {2, 0}));
  refused("tensor 'flow_1_scale.kernel' is float32 of shape [3, 1], expected float32 of shape [3, 2]",
          reshape("flow_1_scale.kernel", {3, 1}));

  constexpr std::int64_t kLarge = std::int64_t{1} << 62;  // of which a tensor without elements may have one
  write_tensor_file(path, {},
                    {{"flow_0_coupling_dense_0.kernel", DType::float32, {kLarge - 1, 0}, nullptr},
                     {"flow_0_scale.kernel", DType::float32, {0, kLarge + 1}, nullptr}});
  check_refused(ErrorCode::file_format,
                "tensor 'flow_0_coupling_dense_0.kernel' has shape [4611686018427387903, 0], which is too large",
                [&] { load_model(path, nullptr); });
}

TEST_CASE("a description of many more tensors than the file holds is refused before they are listed") {
  const Folder folder;
  const std::string path = folder / "model.safetensors";
  const FlowSpec spec = FlowSpec::real_nvp(2, 18, {});  // 72 tensors
  const std::map<std::string, std::string> metadata = {
      {"nvpflow.format_version", "1.0"}, {"nvpflow.dtype", "float32"}, {"nvpflow.spec", to_json(spec)}};
  std::vector<FileTensor> tensors;
  for (const char* name : {"a", "b", "c"}) tensors.push_back({name, DType::float32, {0}, nullptr});
  const auto refused = [&](const std::string& fragment) {
    write_tensor_file(path, metadata, tensors);
    check_refused(ErrorCode::file_format, fragment, [&] { load_model(path, nullptr); });
  };
  refused("the file holds 3 tensors, expected the 72 of its description");
  tensors.push_back({"d", DType::float32, {0}, nullptr});
  refused("tensor 'flow_0_scale.kernel' is missing, expected float32 of shape [1, 1]");
}

// ---------------------------------------------------------------------------------------------- damaged files

TEST_CASE("a file cut at any length, or with a byte too many, is refused") {
  const Folder folder;
  const std::string path = folder / "model.safetensors";
  Model().save(path);
  const std::string bytes = read_bytes(path);
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    write_bytes(path, bytes.substr(0, size));
    check_refused(ErrorCode::file_format, path, [&] { load_model(path, nullptr); });
  }
  write_bytes(path, bytes.substr(0, bytes.size() - 1));
  check_refused(ErrorCode::file_format, "the file is truncated: it holds", [&] { load_model(path, nullptr); });
  write_bytes(path, bytes + "x");
  check_refused(ErrorCode::file_format, "the file is too long: it holds", [&] { load_model(path, nullptr); });
}

TEST_CASE("a file with any byte changed loads, or is refused as one of another format") {
  const Folder folder;
  const std::string path = folder / "model.safetensors";
  Model().save(path);
  const std::string bytes = read_bytes(path);
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    for (const char replacement : {'\0', '"', '[', '9', '}', '\xff'}) {
      std::string changed = bytes;
      changed[i] = replacement;
      write_bytes(path, changed);
      try {
        load_model(path, nullptr);
      } catch (const Error& error) {
        if (error.code() != ErrorCode::file_format) FAIL_CHECK("byte ", i, ": ", error.what());
      }
    }
  }
}

TEST_CASE("a header that lies is refused with what is wrong") {
  const Folder folder;
  const std::string path = folder / "model.safetensors";
  const auto refused = [&](const std::string& fragment, const std::string& header, std::size_t data_size) {
    CAPTURE(header.substr(0, 200));
    write_bytes(path, container(header, data_size));
    check_refused(ErrorCode::file_format, fragment, [&] { read_tensor_file(path); });
    check_refused(ErrorCode::file_format, fragment, [&] { load_model(path, nullptr); });
  };
  const auto tensor = [](const std::string& name, const std::string& dtype, const std::string& shape,
                         const std::string& offsets) {
    std::string entry = "\"";
    entry.append(name).append("\":{\"dtype\":").append(dtype).append(",\"shape\":").append(shape);
    return entry.append(",\"data_offsets\":").append(offsets).append("}");
  };
  const auto object = [](const std::string& members) { return std::string("{").append(members).append("}"); };
  const auto one = [&](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return object(tensor("t", dtype, shape, offsets));
  };
  const std::string good = tensor("t", "\"F32\"", "[2]", "[0,8]");

  SUBCASE("places") {
    refused("'t' has data_offsets [0, 4], expected 8 bytes: float32 of shape [2]", one("\"F32\"", "[2]", "[0,4]"), 8);
    refused("'t' has data_offsets [8, 0]", one("\"F32\"", "[2]", "[8,0]"), 8);
    refused("expected it to start at 0: a hole", one("\"F32\"", "[2]", "[4,12]"), 12);
    refused("'u' has data_offsets [4, 12], expected it to start at 8: it overlaps",
            object(good + "," + tensor("u", "\"F32\"", "[2]", "[4,12]")), 12);
    refused("it overlaps", object(good + "," + tensor("u", "\"F32\"", "[2]", "[0,8]")), 8);
    refused("a hole in the data", object(good + "," + tensor("u", "\"F32\"", "[2]", "[12,20]")), 20);
    refused("the file is truncated: it holds 7 bytes of tensor data, expected 8", object(good), 7);
    refused("the file is too long: it holds 9 bytes of tensor data, expected 8", object(good), 9);
    refused("which is more than any file can hold", one("\"F32\"", "[4294967296,4294967296,4294967296]", "[0,0]"), 0);
    refused("the file is truncated", one("\"F64\"", "[1000000000000]", "[0,8000000000000]"), 8);
  }
  SUBCASE("fields") {
    refused("dtype of tensor 't' is 'BF16', expected 'F32' or 'F64'", one("\"BF16\"", "[2]", "[0,4]"), 4);
    refused("dtype of tensor 't' is a number", one("1", "[2]", "[0,8]"), 8);
    refused("shape of tensor 't' holds -2", one("\"F32\"", "[-2]", "[0,8]"), 8);
    refused("shape of tensor 't' holds a fraction", one("\"F32\"", "[2.0]", "[0,8]"), 8);
    refused("shape of tensor 't' holds a fraction", one("\"F32\"", "[99999999999999999999]", "[0,8]"), 8);
    refused("shape of tensor 't' holds 18446744073709551615", one("\"F32\"", "[18446744073709551615]", "[0,8]"), 8);
    refused("shape of tensor 't' holds a string", one("\"F32\"", "[\"2\"]", "[0,8]"), 8);
    refused("shape of tensor 't' holds a list of more than 8", one("\"F32\"", "[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4);
    refused("shape of tensor 't' is null, expected a list of up to 8 sizes, whole numbers >= 0",
            one("\"F32\"", "null", "[0,8]"), 8);
    refused("shape of tensor 't' is a string", one("\"F32\"", "\"F32\"", "[0,8]"), 8);
    refused("shape of tensor 't' holds an object", one("\"F32\"", "[{}]", "[0,8]"), 8);
    refused("dtype of tensor 't' is an object, expected 'F32' or 'F64'", one("{}", "[2]", "[0,8]"), 8);
    refused("data_offsets of tensor 't' is a list of 1 numbers", one("\"F32\"", "[2]", "[8]"), 8);
    refused("data_offsets of tensor 't' is a boolean, expected a list of two byte offsets, whole numbers >= 0",
            one("\"F32\"", "[2]", "true"), 8);
    refused("tensor 't' has no field data_offsets", R"({"t":{"dtype":"F32","shape":[2]}})", 8);
    refused("tensor 't' has the unknown field 'more'", R"({"t":{"more":1}})", 8);
    refused("tensor 't' has the field shape twice", R"({"t":{"shape":[2],"shape":[2]}})", 8);
    refused("tensor 't' appears twice", object(good + "," + tensor("t", "\"F32\"", "[2]", "[8,16]")), 16);
    refused(
        "tensor 't' appears twice",
        object(good + "," + tensor("u", "\"F32\"", "[2]", "[8,16]") + "," + tensor("t", "\"F32\"", "[2]", "[16,24]")),
        24);
    refused("tensor 't' is a string, expected an object", R"({"t":"F32"})", 0);
    refused("__metadata__ is an array, expected an object", R"({"__metadata__":[]})", 0);
    refused("metadata key 'a' is a number, expected a string", R"({"__metadata__":{"a":1}})", 0);
    refused("metadata key 'a' is an object, expected a string", R"({"__metadata__":{"a":{}}})", 0);
    refused("metadata key 'a' appears twice", R"({"__metadata__":{"a":"","a":""}})", 0);
    refused("holds __metadata__ twice", R"({"__metadata__":{},"__metadata__":{}})", 0);
    refused("'\\x0a\\xc3\\xa9' is a string", "{\"\\n\u00e9\":\"\"}", 0);
    refused("tensor '\\x1f ~\\x7f' is a string", "{\"\\u001f ~\x7f\":\"\"}", 0);
    refused("tensor '" + std::string(80, 'n') + "' is", "{\"" + std::string(80, 'n') + "\":\"\"}", 0);
    refused("tensor '" + std::string(80, 'n') + "..' is", "{\"" + std::string(81, 'n') + "\":\"\"}", 0);
    refused("shape of tensor 't' holds 9223372036854775808", one("\"F32\"", "[9223372036854775808]", "[0,8]"), 8);
    refused("has shape [9223372036854775807], which is more", one("\"F32\"", "[9223372036854775807]", "[0,8]"), 8);
  }
  SUBCASE("JSON") {
    refused("does not start with '{'", "", 0);
    refused("does not start with '{'", "[]", 0);
    refused("does not start with '{'", " {}", 0);
    refused("not valid JSON at its byte", "{", 0);
    refused("not valid JSON at its byte 5", "{}  x", 0);
    refused("not valid JSON", "{\"\xff\":1}", 0);
    refused("the header holds a zero byte", std::string("{}\0 x", 5), 0);
    refused("is an array", "{\"t\":" + std::string(1'000'000, '['), 0);
    std::string nested;
    for (int i = 0; i < 100'000; ++i) nested += "{\"t\":";
    refused("dtype, shape and data_offsets", nested, 0);
  }
  SUBCASE("length of the header") {
    std::string bytes = container("{}", 0);
    for (const std::uint64_t length :
         {std::uint64_t{3}, std::uint64_t{100'000'001}, std::numeric_limits<std::uint64_t>::max()}) {
      std::memcpy(bytes.data(), &length, 8);
      write_bytes(path, bytes);
      check_refused(ErrorCode::file_format, "the header's length is given as " + std::to_string(length),
                    [&] { load_model(path, nullptr); });
    }
    write_bytes(path, "1234567");
    check_refused(ErrorCode::file_format, "it holds 7 bytes", [&] { load_model(path, nullptr); });

    // Files of which the disk holds the first bytes alone.
    const auto sparse = [&](std::uint64_t length) {
      std::memcpy(bytes.data(), &length, 8);
      write_bytes(path, bytes);
      fs::resize_file(path, 8 + length);
    };
    sparse(100'000'001);
    check_refused(ErrorCode::file_format, "is given as 100000001 bytes, expected at most 100000000",
                  [&] { load_model(path, nullptr); });
    sparse(100'000'000);
    check_refused(ErrorCode::file_format, "the header holds a zero byte", [&] { load_model(path, nullptr); });
  }
}

TEST_CASE("a model that does not match its own metadata is refused") {
  const Folder folder;
  const std::string path = folder / "model.safetensors";
  const Model model;
  std::map<std::string, std::string> metadata = model.metadata();
  std::vector<FileTensor> tensors = model.tensors();
  const auto refused = [&](const std::string& fragment) {
    write_tensor_file(path, metadata, tensors);
    check_refused(ErrorCode::file_format, fragment, [&] { load_model(path, nullptr); });
  };

  SUBCASE("version") {
    metadata["nvpflow.format_version"] = "2.0";
    refused("nvpflow.format_version is 2.0 (written by nvpflow '9.8.7'), expected 1.x: this is nvpflow ");
    for (const char* text : {"", "1", "1.", ".1", "1.0.0", "-1.0", "1.0 ", "99999999999.0", "one"}) {
      metadata["nvpflow.format_version"] = text;
      refused("expected MAJOR.MINOR");
    }
    metadata["nvpflow.format_version"] = "1.7";
    write_tensor_file(path, metadata, tensors);
    CHECK(load_model(path, nullptr).spec == model.spec);
    metadata.erase("nvpflow.format_version");
    refused("metadata key nvpflow.format_version is missing");
  }
  SUBCASE("keys") {
    metadata["nvpflow.dtype"] = "float64";
    refused("metadata key nvpflow.dtype is 'float64', expected 'float32' as in nvpflow.spec");
    metadata.erase("nvpflow.dtype");
    refused("metadata key nvpflow.dtype is missing");
    metadata.erase("nvpflow.spec");
    refused("metadata key nvpflow.spec is missing");
  }
  SUBCASE("missing tensor") {
    tensors.erase(tensors.begin() + 3);
    refused("tensor 'flow_0_coupling_dense_0.bias' is missing, expected float32 of shape [4]");
  }
  SUBCASE("unknown tensor") {
    tensors.push_back({"flow_2_scale.bias", DType::float32, {1}, model.parameters.data()});
    refused("tensor 'flow_2_scale.bias' is not part of the model");
  }
  SUBCASE("shape") {
    tensors[2].shape = {4, 2};
    refused("'flow_0_coupling_dense_0.kernel' is float32 of shape [4, 2], expected float32 of shape [2, 4]");
  }
  SUBCASE("dtype") {
    const std::vector<double> wide(5);
    tensors[0] = {tensors[0].name, DType::float64, {5}, wide.data()};
    refused("tensor 'standardize_0.mean' is float64 of shape [5], expected float32 of shape [5]");
  }
  SUBCASE("not finite") {
    std::vector<float> values(8, 1.0f);
    values[6] = std::numeric_limits<float>::quiet_NaN();
    tensors[2].data = values.data();
    refused("'flow_0_coupling_dense_0.kernel' of shape [2, 4] holds NaN at index 6");
    values[5] = -HUGE_VALF;
    refused("holds an infinity at index 5");
  }
}

TEST_CASE("save refuses parameters that load would refuse") {
  const Folder folder;
  const std::string path = folder / "model.safetensors";
  Model model;
  model.parameters[5] = std::numeric_limits<float>::infinity();
  check_refused(ErrorCode::invalid_argument, "not saved: tensor 'standardize_0.log_std' of shape [5] holds an infinity",
                [&] { model.save(path); });
  CHECK(folder.entries() == 0);
}

TEST_CASE("an expected spec that differs is named by its first difference") {
  const Folder folder;
  const std::string path = folder / "model.safetensors";
  const Model model;
  model.save(path);
  const auto refused = [&](const std::string& fragment, const auto& change) {
    FlowSpec expected = model.spec;
    change(expected);
    check_refused(ErrorCode::file_format, fragment, [&] { load_model(path, &expected); });
  };
  refused("input_size is 5 in the file, expected 6", [](FlowSpec& spec) { spec.input_size = 6; });
  refused("dtype is float32 in the file, expected float64", [](FlowSpec& spec) { spec.dtype = DType::float64; });
  refused("the number of layers is 3 in the file, expected 2", [](FlowSpec& spec) { spec.layers.pop_back(); });
  refused("layers[0].kind is standardize in the file, expected coupling",
          [](FlowSpec& spec) { spec.layers[0] = spec.layers[1]; });
  refused("layers[2].swapped is true in the file",
          [](FlowSpec& spec) { coupling(spec, 2).transformed.name = FeatureSet::Name::second_half; });
  refused("layers[1].hidden_sizes is [4, 3] in the file, expected [4]",
          [](FlowSpec& spec) { coupling(spec, 1).network.hidden_sizes = {4}; });
  refused("layers[1].activation is tanh in the file, expected relu",
          [](FlowSpec& spec) { coupling(spec, 1).network.activation = Activation::relu; });
  refused("layers[1].scale_bound is 2.0 in the file, expected 2.5",
          [](FlowSpec& spec) { coupling(spec, 1).transform = Affine{LogScale::bounded(2.5)}; });
  const FlowSpec invalid;
  check_refused(ErrorCode::invalid_argument, "input_size is 0", [&] { load_model(path, &invalid); });
}

TEST_CASE("the spec's JSON comes back equal, and every wrong field is named") {
  FlowSpec spec = FlowSpec::real_nvp(5, 3, {4, 3}, Activation::leaky_relu, 0.1, true, DType::float64);
  coupling(spec, 2).network.hidden_sizes.clear();
  CHECK(parse_spec(to_json(spec)) == spec);
  CHECK(to_json(FlowSpec::real_nvp(4, 1, {8}, Activation::relu, 1.0, true)) ==
        R"({"input_size":4,"dtype":"float32","layers":[{"kind":"standardize"},{"kind":"coupling","swapped":false,)"
        R"("hidden_sizes":[8],"activation":"relu","scale_bound":1.0}]})");

  const auto refused = [](const std::string& fragment, const std::string& text) {
    CAPTURE(text.substr(0, 200));
    check_refused(ErrorCode::file_format, fragment, [&] { parse_spec(text); });
  };
  const auto with_layer = [](const std::string& layer) {
    return R"({"input_size":4,"dtype":"float32","layers":[)" + layer + "]}";
  };
  const auto coupling = [&](const std::string& swapped, const std::string& sizes, const std::string& activation,
                            const std::string& bound) {
    return with_layer(R"({"kind":"coupling","swapped":)" + swapped + R"(,"hidden_sizes":)" + sizes +
                      R"(,"activation":)" + activation + R"(,"scale_bound":)" + bound + "}");
  };
  CHECK(parse_spec(coupling("false", "[8]", "\"relu\"", "1")) == FlowSpec::real_nvp(4, 1, {8}));
  refused("not valid JSON", "");
  refused("not valid JSON", "{\"input_size\":");
  refused("not valid JSON", coupling("false", "[8]", "\"relu\"", "1e999"));
  refused("the spec is '[]', expected an object", "[]");
  refused("input_size is missing", "{}");
  refused("input_size is missing", R"({"dtype":{"layers":1},"layers":[]})");
  refused("'input_sizes' is not a field", R"({"input_size":4,"dtype":"float32","layers":[],"input_sizes":4})");
  refused("the key 'dtype' appears twice", R"({"input_size":4,"dtype":"float32","dtype":"float32","layers":[]})");
  refused("input_size is '4.0', expected a whole number", R"({"input_size":4.0,"dtype":"float32","layers":[]})");
  refused("input_size is '18446744073709551615'", R"({"input_size":18446744073709551615,"dtype":"x","layers":[]})");
  refused("dtype is 'half', expected one of float32", R"({"input_size":4,"dtype":"half","layers":[]})");
  refused("layers is '{}', expected an array", R"({"input_size":4,"dtype":"float32","layers":{}})");
  refused("no coupling, expected at least one", with_layer(""));
  refused("layers[0] is '3', expected an object", with_layer("3"));
  refused("layers[0].kind is missing", with_layer("{}"));
  refused("layers[0].kind is 'spline', expected one of", with_layer(R"({"kind":"spline"})"));
  refused("layers[0].'swapped' is not a field", with_layer(R"({"kind":"standardize","swapped":false})"));
  refused("layers[0].swapped is missing", with_layer(R"({"kind":"coupling"})"));
  refused("layers[0].swapped is '0', expected true or false", coupling("0", "[8]", "\"relu\"", "1.0"));
  refused("layers[0].hidden_sizes is '8', expected an array", coupling("false", "8", "\"relu\"", "1.0"));
  refused("layers[0].hidden_sizes[0] is 'true'", coupling("false", "[true]", "\"relu\"", "1.0"));
  refused("layers[0].hidden_sizes[0] is -8, expected 1 to", coupling("false", "[-8]", "\"relu\"", "1.0"));
  refused("layers[0].activation is 'mish'", coupling("false", "[8]", "\"mish\"", "1.0"));
  refused("layers[0].activation is '1', expected a string", coupling("false", "[8]", "1", "1.0"));
  refused("layers[0].scale_bound is '\"1\"', expected a number", coupling("false", "[8]", "\"relu\"", "\"1\""));
  refused("layers[0].scale_bound is -1, expected finite and > 0", coupling("false", "[8]", "\"relu\"", "-1"));
  refused("input_size is 1, expected at least 2", R"({"input_size":1,"dtype":"float32","layers":[]})");
  refused("not valid JSON", to_json(spec) + std::string("\0 x", 3));
  refused("nested too deeply", std::string(100'000, '['));
  refused("nested too deeply", std::string(9, '[') + std::string(9, ']'));
  refused("the spec is '[[[[[[[[]]]]]]]]', expected an object", std::string(8, '[') + std::string(8, ']'));
  refused("the spec is '[[[[[[[[1]]]]]]]]', expected an object", std::string(8, '[') + "1" + std::string(8, ']'));
  std::string objects;
  for (int i = 0; i < 8; ++i) objects += R"({"a":)";
  refused("nested too deeply", objects + "{}" + std::string(8, '}'));
  refused("dtype is '[\"\\u00e9\"]', expected a string", "{\"input_size\":4,\"layers\":[],\"dtype\":[\"\u00e9\"]}");
  refused("not valid JSON", std::string(1 << 24, ' '));
  refused("dtype is '\"" + std::string(79, 'x') + "..', expected a known name",
          R"({"input_size":4,"layers":[],"dtype":")" + std::string(81, 'x') + R"("})");
  refused("dtype is '" + std::string(80, 'x') + "', expected one of",
          R"({"input_size":4,"layers":[],"dtype":")" + std::string(80, 'x') + R"("})");
  refused("input_size is '9223372036854775808', expected a whole number",
          R"({"input_size":9223372036854775808,"dtype":"float32","layers":[]})");
  refused("input_size is 9223372036854775807, expected 2 to 1048576",
          R"({"input_size":9223372036854775807,"dtype":"float32","layers":[]})");
  refused("nested too deeply", coupling("false", "[[[[[[[[[[[[]]]]]]]]]]]]", "\"relu\"", "1"));
  refused("expected at most 16777216", std::string((1 << 24) + 1, ' '));
}

TEST_CASE("a base comes back with the spec, in format 1.1, and every wrong number is named") {
  FlowSpec spec = FlowSpec::real_nvp(4, 2, {3});
  CHECK(to_full_json(spec).find(R"("base":{"kind":"normal"})") != std::string::npos);
  const FlowSpec normal = spec;
  spec.base = UniformBase{0, 0.5};
  CHECK(spec != normal);
  CHECK(to_json(spec).find(R"("base":{"kind":"uniform","low":0.0,"high":0.5})") != std::string::npos);
  CHECK(parse_spec(to_json(spec)) == spec);
  CHECK(parse_spec(to_full_json(normal)) == normal);
  CHECK(to_json(parse_spec(to_full_json(normal))) == to_json(normal));
  CHECK(ParamLayout(spec).size() == ParamLayout(normal).size());
  CHECK(spec.with_dtype(DType::float64).base == spec.base);

  const auto refused = [&](const std::string& fragment, const Base& base, DType dtype = DType::float32) {
    FlowSpec changed = spec;
    changed.base = base;
    changed.dtype = dtype;
    check_refused(ErrorCode::invalid_argument, fragment, [&] { changed.validate(); });
  };
  refused("base.high is 1, expected more than base.low, which is 1, by a finite number of float32", UniformBase{1, 1});
  refused("base.high is -1, expected more than base.low, which is 1", UniformBase{1, -1});
  refused("base.low is nan, expected finite in float32", UniformBase{std::nan(""), 1});
  refused("base.high is inf, expected finite in float64", UniformBase{0, HUGE_VAL}, DType::float64);
  refused("base.high is 1e+300, expected finite in float32", UniformBase{0, 1e300});
  refused("by a finite number of float32", UniformBase{1, 1 + 1e-9});  // one number of float32
  refused("by a finite number of float32", UniformBase{-3e38, 3e38});
  refused("by a finite number of float64", UniformBase{-1.7e308, 1.7e308}, DType::float64);

  refused("base.df is 0, expected", StudentTBase{0, true});
  refused("base.df is inf, expected", StudentTBase{HUGE_VAL, true});
  refused("base.df is 1e-60, expected", StudentTBase{1e-60, true});
  refused("base.components is 0, expected 1 to 1024", MixtureBase{0});
  refused("base.components is 1025, expected 1 to 1024", MixtureBase{1025});
  FlowSpec wide = FlowSpec::real_nvp(1024, 1, {});
  wide.base = MixtureBase{65};
  check_refused(ErrorCode::invalid_argument, "base.components is 65 with input_size 1024, expected at most 64",
                [&] { wide.validate(); });

  const auto not_parsed = [&](const std::string& fragment, const std::string& base) {
    std::string text = to_json(spec);
    const std::string now = R"({"kind":"uniform","low":0.0,"high":0.5})";
    text.replace(text.find(now), now.size(), base);
    check_refused(ErrorCode::file_format, fragment, [&] { parse_spec(text); });
  };
  not_parsed("base.kind is 'cauchy', expected one of normal, uniform, student_t, mixture", R"({"kind":"cauchy"})");
  not_parsed("base.kind is '3', expected a string", R"({"kind":3})");
  not_parsed("base is '3', expected an object", "3");
  not_parsed("base.high is missing", R"({"kind":"uniform","low":0})");
  not_parsed("base.low is 'null', expected a number", R"({"kind":"uniform","low":null,"high":1})");
  not_parsed("base.'low' is not a field", R"({"kind":"normal","low":0})");
  not_parsed("base.trainable is missing", R"({"kind":"student_t","df":4})");
  not_parsed("base.trainable is '1', expected true or false", R"({"kind":"student_t","df":4,"trainable":1})");
  not_parsed("base.covariance is 'tied', expected one of diagonal, full",
             R"({"kind":"mixture","components":2,"covariance":"tied"})");
  not_parsed("base.components is 0, expected 1 to 1024", R"({"kind":"mixture","components":0,"covariance":"full"})");
  not_parsed("base.high is 0, expected more than base.low", R"({"kind":"uniform","low":0,"high":0})");

  const Folder folder;
  const std::string path = folder / "uniform.safetensors";
  const Flow flow(spec, 3);
  flow.save(path);
  CHECK(Flow::load(path).spec() == spec);
  CHECK(read_tensor_file(path).metadata.at("nvpflow.format_version") == "1.1");
  check_refused(ErrorCode::file_format, "base.kind is uniform in the file, expected normal",
                [&] { load_model(path, &normal); });
  FlowSpec wider = spec;
  wider.base = UniformBase{0, 1};
  check_refused(ErrorCode::file_format, "base.high is 0.5 in the file, expected 1.0",
                [&] { load_model(path, &wider); });
}

// ---------------------------------------------------------------------------------------------- the file system

TEST_CASE("bases with parameters come back with their tensors, which lie behind all layers") {
  using Covariance = MixtureBase::Covariance;
  FlowSpec spec = FlowSpec::real_nvp(3, 2, {3});
  spec.context_size = 2;
  spec.standardize_context = true;
  const auto names_of = [&](const Base& base) {
    spec.base = base;
    CHECK(parse_spec(to_json(spec)) == spec);
    const ParamLayout layout(spec);
    std::string names;
    for (std::size_t i = layout.first_tensor(2); i < layout.tensors().size(); ++i) {
      names += layout.tensors()[i].name + (layout.tensors()[i].trained ? " " : "* ");
    }
    return names;
  };
  CHECK(names_of(NormalBase{}) == "context.mean* context.log_std* ");
  CHECK(names_of(StudentTBase{}) == "base.log_df context.mean* context.log_std* ");
  CHECK(names_of(StudentTBase{2, false}) == "base.log_df* context.mean* context.log_std* ");
  CHECK(names_of(MixtureBase{2}) == "base.logits base.means base.log_scales context.mean* context.log_std* ");
  CHECK(names_of(MixtureBase{2, Covariance::full}) ==
        "base.logits base.means base.log_scales base.lower context.mean* context.log_std* ");
  CHECK(to_json(spec).find(R"("base":{"kind":"mixture","components":2,"covariance":"full"})") != std::string::npos);
  const ParamLayout layout(spec);
  CHECK(layout.find("base.lower")->shape == std::vector<std::int64_t>{2, 3});
  CHECK(layout.multiply_adds_per_row() == ParamLayout(FlowSpec::real_nvp(3, 2, {3})).multiply_adds_per_row() + 12 + 12);

  spec.base = StudentTBase{3, true};
  const Flow flow(spec, 3);
  const TensorInfo& log_df = *flow.layout().find("base.log_df");
  for (std::int64_t j = 0; j < 3; ++j) {
    CHECK(flow.parameters<float>()[static_cast<std::size_t>(log_df.offset + j)] == std::log(3.0f));
  }
  const Folder folder;
  flow.save(folder / "student.safetensors");
  CHECK(read_tensor_file(folder / "student.safetensors").metadata.at("nvpflow.format_version") == "1.1");
  CHECK(Flow::load(folder / "student.safetensors").spec() == spec);
  spec.base = MixtureBase{3};
  const Flow mixture(spec, 3);
  const TensorInfo& means = *mixture.layout().find("base.means");
  std::vector<float> apart(mixture.parameters<float>().begin() + means.offset,
                           mixture.parameters<float>().begin() + means.offset + means.size);
  std::sort(apart.begin(), apart.end());
  CHECK(std::adjacent_find(apart.begin(), apart.end()) == apart.end());
  CHECK(std::max(-apart.front(), apart.back()) <= 2);
}

TEST_CASE("paths that cannot hold a model are refused for what they are") {
  const Folder folder;
  const Model model;
  const auto both = [&](ErrorCode code, const std::string& fragment, const std::string& path) {
    check_refused(code, fragment, [&] { model.save(path); });
    check_refused(code, fragment, [&] { load_model(path, nullptr); });
  };
  both(ErrorCode::invalid_argument, "path is empty", "");
  both(ErrorCode::invalid_argument, "without a zero byte", folder / std::string("a\0b", 3));
  both(ErrorCode::io, "cannot hold a model: Is a directory", folder.path());
  both(ErrorCode::io, "No such file or directory", folder / "none/model.safetensors");
  REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
  both(ErrorCode::io, "is a pipe, socket or device, expected a regular file", folder / "pipe");
  // A device of our own, which root alone can make: a save that broke the promise would replace the system's.
  struct stat null{};
  REQUIRE(::stat("/dev/null", &null) == 0);
  const bool device = ::mknod((folder / "device").c_str(), S_IFCHR | 0600, null.st_rdev) == 0;
  if (device) both(ErrorCode::io, "is a pipe, socket or device, expected a regular file", folder / "device");
  fs::create_symlink("loop", folder / "loop");
  both(ErrorCode::io, "Too many levels of symbolic links", folder / "loop");
  try {
    load_model(folder / "none", nullptr);
  } catch (const Error& error) {
    CHECK(error.system_error() == ENOENT);
  }
  CHECK(folder.entries() == (device ? 3 : 2));
}

TEST_CASE("a name as long as the file system allows can be saved") {
  const Folder folder;
  const std::string path = folder / std::string(255, 'm');
  Model().save(path);
  CHECK(load_model(path, nullptr).spec == Model().spec);
}

TEST_CASE("save writes through symbolic links and leaves them") {
  const Folder folder;
  const Model model;
  fs::create_directory(folder / "store");
  fs::create_symlink("store/model", folder / "relative");
  fs::create_symlink(folder / "relative", folder / "absolute");
  model.save(folder / "absolute");  // the target is not there yet
  CHECK(fs::is_symlink(folder / "absolute"));
  CHECK(fs::is_symlink(folder / "relative"));
  CHECK(fs::is_regular_file(fs::symlink_status(folder / "store/model")));
  model.save(folder / "relative");
  CHECK(fs::is_symlink(folder / "relative"));
  CHECK(load_model(folder / "absolute", nullptr).spec == model.spec);
  CHECK(folder.entries() == 3);
}

TEST_CASE("save follows as many links as the system does, and no more") {
  const Folder folder;
  const Model model;
  for (int i = 1; i <= 41; ++i) {
    fs::create_symlink("link_" + std::to_string(i - 1), folder / ("link_" + std::to_string(i)));
  }
  model.save(folder / "link_40");
  CHECK(fs::is_regular_file(fs::symlink_status(folder / "link_0")));
  CHECK(load_model(folder / "link_40", nullptr).spec == model.spec);
  check_refused(ErrorCode::io, "cannot be resolved: Too many levels of symbolic links",
                [&] { model.save(folder / "link_41"); });
  check_refused(ErrorCode::io, "Too many levels of symbolic links", [&] { load_model(folder / "link_41", nullptr); });
}

TEST_CASE("save keeps the mode of an existing file and gives a new one what the umask leaves") {
  const Folder folder;
  const std::string path = folder / "model.safetensors";
  const mode_t old = ::umask(0027);
  Model().save(path);
  ::umask(old);
  CHECK((fs::status(path).permissions() & fs::perms::mask) == static_cast<fs::perms>(0640));
  ::umask(0);
  Model().save(folder / "open");
  ::umask(old);
  CHECK((fs::status(folder / "open").permissions() & fs::perms::mask) == static_cast<fs::perms>(0666));
  fs::permissions(path, static_cast<fs::perms>(0606));
  Model().save(path);
  CHECK((fs::status(path).permissions() & fs::perms::mask) == static_cast<fs::perms>(0606));
  fs::permissions(path, static_cast<fs::perms>(07751));
  Model().save(path);
  CHECK((fs::status(path).permissions() & fs::perms::mask) == static_cast<fs::perms>(07751));

  if (::geteuid() == 0) return;  // who may write everything
  fs::permissions(path, static_cast<fs::perms>(0400));
  check_refused(ErrorCode::io, "cannot be written: Permission denied", [&] { Model().save(path); });
}

TEST_CASE("a write that fails leaves the old file and no temporary") {
  const Folder folder;
  const std::string path = folder / "model.safetensors";
  const Model model;
  model.save(path);
  const std::string bytes = read_bytes(path);

  struct rlimit old{};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &old) == 0);
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  for (const rlim_t limit : {rlim_t{0}, rlim_t{100}, static_cast<rlim_t>(bytes.size() - 1)}) {
    struct rlimit small = old;
    small.rlim_cur = limit;
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
    int system_error = 0;
    try {
      model.save(path);
    } catch (const Error& error) {
      system_error = error.code() == ErrorCode::io ? error.system_error() : -1;
    }
    // Before anything is reported: standard output may be a file as well.
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &old) == 0);
    CHECK(system_error == EFBIG);
    CHECK(read_bytes(path) == bytes);
    CHECK(folder.entries() == 1);
  }
  std::signal(SIGXFSZ, old_handler);
}

TEST_CASE("names of columns are distinct, but for those that are empty") {
  Flow flow(FlowSpec::real_nvp(4, 1, {}));
  flow.set_column_names({"a", "", "", "b"});
  check_refused(ErrorCode::invalid_argument, "column_names holds 'b' twice, for columns 2 and 4",
                [&] { flow.set_column_names({"a", "b", "c", "b"}); });
  CHECK(flow.column_names().at(3) == "b");
  CHECK(flow.column_names().at(1).empty());
}

TEST_CASE("a sparse file that claims a huge tensor does not get its memory") {
  const Folder folder;
  const std::string path = folder / "model.safetensors";
  write_bytes(path, container(R"({"t":{"dtype":"F64","shape":[1000000000],"data_offsets":[0,8000000000]}})", 0));
  const auto size = fs::file_size(path) + 8'000'000'000;
  std::error_code error;
  fs::resize_file(path, size, error);
  if (error) return;  // a file system without holes, or too small
  check_refused(ErrorCode::file_format, "no tensor 'flow_0_scale.kernel'", [&] { load_model(path, nullptr); });
}

namespace {

/// Lets a fit prepare itself, counts how often it looks up meanwhile, and stops it at the first step.
class PreparationOnly final : public FitObserver {
 public:
  bool on_progress(std::int64_t epoch, std::int64_t, std::int64_t) override {
    looks += epoch == 0;
    return epoch == 0;
  }
  int looks = 0;
};

}  // namespace

TEST_CASE("data that no fit can use are refused") {
  Flow flow(FlowSpec::real_nvp(3, 1, {}));
  const std::vector<float> x(30);
  const std::vector<double> wide(30);
  const auto rows = [&](std::size_t elements) { return std::span<const float>(x).first(elements); };
  FitOptions options;
  options.batch_size = 4;
  check_refused(ErrorCode::type_mismatch, "x is not float32 as the flow is",
                [&] { fit<double>(flow, wide, {}, options); });
  check_refused(ErrorCode::invalid_argument, "x holds 29 elements, expected a multiple of input_size 3",
                [&] { fit<float>(flow, rows(29), {}, options); });
  check_refused(ErrorCode::invalid_argument, "validation holds 4 elements, expected a multiple of input_size 3",
                [&] { fit<float>(flow, rows(30), rows(4), options); });
  options.folds = 1;
  check_refused(ErrorCode::invalid_argument, "of 9 rows, which is less than one row",
                [&] { fit<float>(flow, rows(27), {}, options); });
}

TEST_CASE_TEMPLATE("a flow is fitted to a log-density", T, float, double) {
  FlowSpec spec = FlowSpec::real_nvp(2, 4, {16});
  spec.dtype = sizeof(T) == 4 ? DType::float32 : DType::float64;
  Flow flow(spec, 1);
  std::int64_t calls = 0;
  const LogDensity<T> narrow = [&](const DensityCall<T>& call) {
    ++calls;
    for (std::size_t r = 0; r < call.log_p.size(); ++r) {
      double square = 0;
      for (std::size_t j = 0; j < 2; ++j) {
        const double off = (static_cast<double>(call.x[2 * r + j]) - 0.5) / 0.7;
        square += off * off;
        if (!call.gradient.empty()) call.gradient[2 * r + j] = static_cast<T>(-off / 0.7);
      }
      call.log_p[r] = -0.5 * square;
    }
  };
  DensityOptions options;
  options.steps = 300;
  options.batch_size = 256;
  options.learning_rate = 1e-2;
  const DensityHistory history = fit_density<T>(flow, narrow, options);
  CHECK(history.stop_reason == "steps");
  CHECK(history.reports.size() == 6);
  CHECK(std::abs(history.best_loss + std::log(2 * 3.14159265358979 * 0.49)) < 0.01);
  CHECK(history.reports.back().ess > 0.97);
  CHECK(calls == 300 + 2 * 6);

  options.batch_size = 0;
  check_refused(ErrorCode::invalid_argument, "batch_size is 0, expected at least 1",
                [&] { fit_density<T>(flow, narrow, options); });
  options.batch_size = 16;
  check_refused(ErrorCode::not_finite, "log_density gave NaN at step 1",
                [&] { fit_density<T>(flow, [](const DensityCall<T>&) {}, options); });
  check_refused(ErrorCode::invalid_argument, "log_density is empty", [&] { fit_density<T>(flow, nullptr, options); });
  using Other = std::conditional_t<sizeof(T) == 4, double, float>;
  check_refused(ErrorCode::type_mismatch, "log_density is not of",
                [&] { fit_density<Other>(flow, [](const DensityCall<Other>&) {}, options); });
}

TEST_CASE("weights of rows: ones are none, zeros are rows that are absent") {
  std::mt19937 engine(4);
  std::normal_distribution<float> normal;
  const std::size_t count = 400;
  std::vector<float> x(2 * count), few;
  for (float& value : x) value = normal(engine);
  std::vector<double> ones(count, 1.0), some(count), positive;
  for (std::size_t i = 0; i < count; ++i) {
    some[i] = static_cast<double>(i % 4) / 3;
    if (some[i] == 0) continue;
    positive.push_back(some[i]);
    few.insert(few.end(), x.begin() + static_cast<std::ptrdiff_t>(2 * i),
               x.begin() + static_cast<std::ptrdiff_t>(2 * i + 2));
  }
  FitOptions options;
  options.epochs = 3;
  const auto fitted = [&](const std::vector<float>& rows, const std::vector<double>& weights) {
    Flow flow(FlowSpec::real_nvp(2, 2, {8}, Activation::tanh, 1.0, /*standardize=*/true), 3);
    const History history = weights.empty() ? fit<float>(flow, rows, {}, options)
                                            : fit<float>(flow, rows, {}, FitWeights(weights), options);
    std::vector<float> parameters(static_cast<std::size_t>(flow.num_parameters()));
    flow.copy_parameters<float>(parameters);
    return std::pair(history, parameters);
  };
  const auto [plain, without] = fitted(x, {});
  const auto [same, of_ones] = fitted(x, ones);
  CHECK(of_ones == without);
  CHECK(plain.effective_rows == static_cast<double>(plain.train_rows));
  CHECK(same.effective_rows == plain.effective_rows);
  const auto [weighted, of_some] = fitted(x, some);
  const auto [subset, of_few] = fitted(few, positive);
  CHECK(of_some == of_few);
  CHECK(weighted.train_rows == subset.train_rows);
  CHECK(weighted.effective_rows < static_cast<double>(weighted.train_rows));

  Flow flow(FlowSpec::real_nvp(2, 2, {8}), 3);
  std::vector<float> gradient(static_cast<std::size_t>(flow.num_parameters())), expected = gradient;
  const double loss = flow.nll_gradient<float>(x, gradient, SampleWeights(some));
  CHECK(loss == flow.nll_gradient<float>(few, expected, SampleWeights(positive)));
  CHECK(gradient == expected);
  CHECK(loss == doctest::Approx(flow.nll<float>(x, SampleWeights(some))).epsilon(1e-12));
  const std::span<const double> short_ones = std::span<const double>(ones).first(3);
  check_refused(ErrorCode::invalid_argument, "sample_weight holds 3 weights, expected 400, one for each row",
                [&] { (void)flow.nll<float>(x, SampleWeights(short_ones)); });
  check_refused(ErrorCode::invalid_argument, "sample_weight holds 3 weights, expected 400, one for each row",
                [&] { fit<float>(flow, x, {}, FitWeights(short_ones), options); });
  check_refused(ErrorCode::invalid_argument, "the weights of validation are missing, expected weights of both or of",
                [&] { fit<float>(flow, x, few, FitWeights(ones), options); });
  some[5] = -1;
  check_refused(ErrorCode::invalid_argument, "sample_weight[5] is -1, expected at least 0",
                [&] { fit<float>(flow, x, {}, FitWeights(some), options); });
}

TEST_CASE("a loop over the batches of fit, in pieces and by index, gives its weights") {
  constexpr std::int64_t kRows = 300, kBatch = 64;
  std::mt19937 random(5);
  std::normal_distribution<double> normal;
  std::vector<double> x(2 * kRows);
  for (double& value : x) value = normal(random);
  const FlowSpec spec = FlowSpec::real_nvp(2, 2, {8}, Activation::tanh, 1.0, false, DType::float64);
  FitOptions options;
  options.epochs = 1;
  options.batch_size = kBatch;
  options.validation_fraction = 0;
  options.averaging = 0;
  options.schedule = Schedule::constant;
  options.weight_decay = 0.1;
  Flow fitted(spec, 3), own(spec, 3);
  AdamState state;
  for (int epoch = 0; epoch < 2; ++epoch) fit<double>(fitted, x, {}, options, nullptr, {}, {}, &state);

  Adam adam(own);
  const AdamOptions step{.learning_rate = options.learning_rate, .weight_decay = 0.1, .clip_norm = options.clip_norm};
  std::vector<double> gradient(static_cast<std::size_t>(own.num_parameters()));
  for (std::uint64_t epoch = 1; epoch <= 2; ++epoch) {
    const Shuffle shuffle(kRows, options.seed, kStreamShuffle, epoch);
    for (std::int64_t first = 0; first < kRows; first += kBatch) {
      std::vector<std::int64_t> index;
      for (std::int64_t i = first; i < std::min(first + kBatch, kRows); ++i) {
        index.push_back(static_cast<std::int64_t>(shuffle(static_cast<std::uint64_t>(i))));
      }
      BatchPart part;
      part.rows = static_cast<std::int64_t>(index.size());
      part.index = index.data();
      (void)own.nll_gradient_unchecked(x.data(), part, gradient.data());
      adam.step<double>(own, gradient, step);
    }
  }
  std::vector<double> expected(gradient.size()), found(gradient.size());
  fitted.copy_parameters<double>(expected);
  own.copy_parameters<double>(found);
  CHECK(found == expected);
  CHECK(adam.state().steps == state.steps);
  CHECK(adam.state().second_moment == state.second_moment);

  Flow other(FlowSpec::real_nvp(3, 2, {8}, Activation::tanh, 1.0, false, DType::float64));
  check_refused(ErrorCode::invalid_argument, "gradient holds", [&] { adam.step<double>(other, gradient); });
  check_refused(ErrorCode::type_mismatch, "gradient is of another dtype",
                [&] { adam.step<float>(own, std::vector<float>(gradient.size())); });
  check_refused(ErrorCode::invalid_argument, "learning_rate is 0", [&] { adam.step<double>(own, gradient, {0}); });
  gradient[0] = std::numeric_limits<double>::infinity();
  check_refused(ErrorCode::not_finite, "gradient has the norm inf", [&] { adam.step<double>(own, gradient); });
  own.copy_parameters<double>(found);
  CHECK(found == expected);
  check_refused(ErrorCode::invalid_argument, "state has made", [&] { Adam(other).set_state(adam.state()); });
}

TEST_CASE("a constant column is refused with and without a standardize layer, also by one that is set") {
  std::vector<float> x(3 * 3000);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = i % 3 == 1 ? 5.0f : static_cast<float>(i / 2000);
  std::vector<float> sound = x;
  for (std::size_t i = 1; i < x.size(); i += 3) sound[i] = static_cast<float>(i % 7);
  FitOptions options;
  options.epochs = 1;
  for (const bool standardize : {false, true}) {
    Flow flow(FlowSpec::real_nvp(3, 1, {}, Activation::relu, 1.0, standardize));
    const auto refused = [&](const std::vector<float>& rows, const std::string& column) {
      check_refused(ErrorCode::invalid_argument, "x is constant in " + column + ": a column without variation",
                    [&] { fit<float>(flow, rows, {}, options); });
    };
    refused(x, "column 2");
    flow.set_column_names({"a", "b", "c"});
    refused(x, "column 'b'");
    fit<float>(flow, sound, {}, options);
    refused(x, "column 'b'");
    refused(std::vector<float>(300, 2.0f), "column 'a', column 'b', column 'c'");
  }
}

namespace {

/// Rows around 1.7e9 and 0.25, of spread 60 and 1, and the flow whose first layer standardizes them.
struct FarRows {
  Flow flow{FlowSpec::real_nvp(2, 2, {8}, Activation::silu, 1.0, true)};
  Flow exact{FlowSpec::real_nvp(2, 2, {8}, Activation::silu, 1.0, true, DType::float64)};
  std::vector<double> x;

  explicit FarRows(std::int64_t rows) {
    std::vector<float> values(static_cast<std::size_t>(flow.num_parameters()));
    flow.copy_parameters<float>(values);
    const double mean[] = {1.7e9 + 37.0, 0.25};
    for (std::size_t j = 0; j < 2; ++j) {
      values[j] = static_cast<float>(mean[j]);
      values[2 + j] = j == 0 ? 4.0943446f : 0.0f;
    }
    const float low[] = {static_cast<float>(mean[0] - static_cast<double>(values[0])), 0.0f};
    flow.set_parameters<float>(values, low);
    std::vector<double> wide(values.begin(), values.end());
    wide[0] += static_cast<double>(low[0]);
    exact.set_parameters<double>(wide);
    for (std::int64_t r = 0; r < rows; ++r) {
      x.push_back(mean[0] + 60 * std::sin(0.7 * static_cast<double>(r)));
      x.push_back(mean[1] + std::cos(1.3 * static_cast<double>(r)));
    }
  }
};

}  // namespace

TEST_CASE("float64 rows of a float32 flow keep their digits, in every method") {
  const FarRows far(500);
  const std::vector<double>& x = far.x;
  std::vector<double> expected(500), expected_z(1000), expected_log_det(500);
  far.exact.log_prob<double>(x, expected);
  far.exact.forward<double>(x, expected_z, expected_log_det);
  std::vector<float> log_prob(500), z(1000), log_det(500), inverse_log_det(500);
  far.flow.log_prob(x, log_prob);
  far.flow.forward(x, z, log_det);
  std::vector<double> back(1000);
  far.flow.inverse(z, back, inverse_log_det);
  for (std::size_t r = 0; r < 500; ++r) {
    CHECK(std::abs(static_cast<double>(log_prob[r]) - expected[r]) <= 1e-5 * (1 + std::abs(expected[r])));
    CHECK(std::abs(static_cast<double>(log_det[r]) - expected_log_det[r]) <=
          1e-5 * (1 + std::abs(expected_log_det[r])));
    CHECK(std::abs(back[2 * r] - x[2 * r]) <= 60 * 1e-5);
    CHECK(std::abs(back[2 * r + 1] - x[2 * r + 1]) <= 1e-5);
  }
  CHECK(far.flow.nll<double>(x) == doctest::Approx(far.exact.nll<double>(x)).epsilon(1e-6));
  CHECK(far.flow.round_trip_error<double>(x) < 1e-5);
  std::vector<double> drawn(1000);
  far.flow.sample<double>(3, drawn);
  std::vector<float> rounded(1000);
  far.flow.sample<float>(3, rounded);
  for (std::size_t i = 0; i < 1000; ++i) CHECK(rounded[i] == static_cast<float>(drawn[i]));
  std::vector<float> gradient(static_cast<std::size_t>(far.flow.num_parameters())), twice(gradient.size());
  std::vector<double> exact_gradient(gradient.size());
  const double loss = far.flow.nll_gradient(x, gradient);
  CHECK(loss == doctest::Approx(far.exact.nll_gradient<double>(x, exact_gradient)).epsilon(1e-6));
  for (std::size_t i = 0; i < gradient.size(); ++i) {
    CHECK(std::abs(static_cast<double>(gradient[i]) - exact_gradient[i]) <= 1e-4);
  }
  const std::vector<float> ones(1000, 1.0f), log_det_ones(500, 1.0f);
  std::vector<float> grad_x(1000), once(gradient.size());
  far.flow.vjp(x, ones, log_det_ones, grad_x, once);
  twice = once;
  far.flow.vjp(x, ones, log_det_ones, {}, twice, true);
  std::vector<double> exact_grad_x(1000);
  const std::vector<double> wide_ones(1000, 1.0), wide_log_det_ones(500, 1.0);
  far.exact.vjp<double>(Direction::forward, x, wide_ones, wide_log_det_ones, exact_grad_x, {});
  for (std::size_t i = 0; i < once.size(); ++i) {
    CHECK(std::abs(twice[i] - 2 * once[i]) <= 1e-5f * (1 + std::abs(twice[i])));
  }
  for (std::size_t i = 0; i < 1000; ++i) {
    CHECK(std::abs(static_cast<double>(grad_x[i]) - exact_grad_x[i]) <= 1e-4 * (i % 2 == 0 ? 1.0 / 60 : 1.0));
  }
}

TEST_CASE("float64 rows are refused where the flow does not standardize first") {
  const Flow flow(FlowSpec::real_nvp(2, 2, {8}));
  CHECK(!takes_float64_rows(flow.spec()));
  const std::vector<double> x(4, 0.5);
  std::vector<float> out(2);
  std::vector<double> wide(4);
  check_refused(ErrorCode::type_mismatch, "begins with a standardize layer", [&] { flow.log_prob(x, out); });
  check_refused(ErrorCode::type_mismatch, "begins with a standardize layer", [&] { flow.sample<double>(0, wide); });
  const Flow exact(FlowSpec::real_nvp(2, 2, {8}, Activation::relu, 1.0, true, DType::float64));
  check_refused(ErrorCode::type_mismatch, "the flow is float64", [&] { exact.log_prob(x, out); });
  FarRows far(4);
  const std::vector<float> parameters(far.flow.parameters<float>().begin(), far.flow.parameters<float>().end());
  const std::vector<float> three(3);
  check_refused(ErrorCode::invalid_argument, "mean_low", [&] { far.flow.set_parameters<float>(parameters, three); });
}

TEST_CASE("a fit can be stopped while it takes the fingerprint of large data for its checkpoint") {
  const Folder folder;
  Flow flow(FlowSpec::real_nvp(2, 1, {}));
  std::vector<float> x(std::size_t{20} << 20, 0.5f);  // 80 MiB
  x[0] = x[1] = 1;
  FitOptions options;
  options.validation_fraction = 0;
  PreparationOnly without, with;
  CHECK(fit<float>(flow, x, {}, options, &without).stop_reason == "interrupted");
  options.checkpoint = folder / "checkpoint";
  CHECK(fit<float>(flow, x, {}, options, &with).stop_reason == "interrupted");
  CHECK(with.looks - without.looks >= 5);
}
