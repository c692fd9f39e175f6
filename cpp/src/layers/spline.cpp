// Rational-quadratic splines: what they are made of, for couplings, and the layer whose parameters are its own.
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <nvpflow/spec.hpp>

#include "check.hpp"
#include "layer.hpp"
#include "spline.hpp"

namespace nvpflow::layers {
namespace {

/// More is of no use, and a search through all bins is what the kernels do.
constexpr std::int64_t kMaxBins = 256;

void check_fraction(const std::string& field, double value, std::int64_t num_bins) {
  if (value >= 0 && value * static_cast<double>(num_bins) < 1) return;  // false for NaN
  refuse(field + " is " + text_of(value) + ", expected >= 0 and below 1 / num_bins, which is 1 / " +
         std::to_string(num_bins));
}

}  // namespace

std::vector<Field> fields(KnotSlope& slope) {
  if (slope.function == KnotSlope::Function::exp) return {{"bound", &slope.bound}};
  return {{"offset", &slope.offset}, {"gain", &slope.gain}};
}

std::vector<Field> fields(Spline& spline) {
  return {{"num_bins", &spline.num_bins},
          {"lower", &spline.lower},
          {"upper", &spline.upper},
          {"min_bin_width", &spline.min_bin_width},
          {"min_bin_height", &spline.min_bin_height},
          {"min_derivative", &spline.min_derivative},
          {"derivative", &spline.derivative},
          {"size_bound", &spline.size_bound, /*of_null=*/std::numeric_limits<double>::infinity()},
          {"boundary", &spline.boundary},
          {"tails", &spline.tails}};
}

void check(const Spline& spline, DType dtype, const std::string& prefix) {
  check_named(prefix + "derivative.", spline.derivative.function);
  check_named(prefix, spline.boundary);
  check_named(prefix, spline.tails);
  check_range(prefix + "num_bins", spline.num_bins, 1, kMaxBins);
  check_finite(prefix + "lower", spline.lower, dtype);
  check_finite(prefix + "upper", spline.upper, dtype);
  if (!(spline.upper > spline.lower)) {
    refuse(prefix + "upper is " + text_of(spline.upper) + ", expected > lower, which is " + text_of(spline.lower));
  }
  check_positive(prefix + "upper - lower", spline.upper - spline.lower, dtype);
  if (dtype == DType::float32 && !(static_cast<float>(spline.upper) > static_cast<float>(spline.lower))) {
    refuse(prefix + "upper is " + text_of(spline.upper) + ", expected another float32 number than lower, which is " +
           text_of(spline.lower));
  }
  check_fraction(prefix + "min_bin_width", spline.min_bin_width, spline.num_bins);
  check_fraction(prefix + "min_bin_height", spline.min_bin_height, spline.num_bins);
  if (!(spline.min_derivative >= 0)) {
    refuse(prefix + "min_derivative is " + text_of(spline.min_derivative) + ", expected finite and >= 0");
  }
  check_finite(prefix + "min_derivative", spline.min_derivative, dtype);
  const KnotSlope& slope = spline.derivative;
  if (slope.function == KnotSlope::Function::exp) {
    check_positive(prefix + "derivative.bound", slope.bound, dtype);
  } else {
    check_finite(prefix + "derivative.offset", slope.offset, dtype);
    check_positive(prefix + "derivative.gain", slope.gain, dtype);
  }
  if (!std::isinf(spline.size_bound) || spline.size_bound < 0) {
    check_positive(prefix + "size_bound", spline.size_bound, dtype);
  }
}

std::vector<NetworkHead> heads_of(const Spline& spline, std::int64_t features) {
  std::vector<NetworkHead> heads = {{"widths", spline.num_bins * features}, {"heights", spline.num_bins * features}};
  if (spline.num_slopes() > 0) heads.push_back({"derivatives", spline.num_slopes() * features});
  return heads;
}

// ---- the layer ----

std::vector<Field> fields(ElementSpline& layer) {
  return {{"inverse", &layer.inverse}, {"features", &layer.features}, {"spline", &layer.spline}};
}

void check(const ElementSpline& layer, const FlowSpec& spec, const std::string& prefix) {
  check_features(layer.features, spec, prefix, "features");
  check(layer.spline, spec.dtype, prefix + "spline.");
}

void tensors(const ElementSpline& layer, const FlowSpec& spec, const Site& site, const TensorSink& sink) {
  const std::int64_t features = layer.features.count(spec.input_size);
  for (const NetworkHead& head : heads_of(layer.spline, features)) {
    TensorInfo tensor =
        vector_tensor("spline_" + std::to_string(site.layer) + "." + head.name, head.columns, site.layer);
    tensor.shape = {head.columns / features, features};
    tensor.trained = true;
    sink(std::move(tensor));
  }
}

void lower(const ElementSpline& layer, const FlowSpec& spec, const TensorInfo* first, Lowering& to) {
  LoweredSpline lowered;
  lowered.inverse = layer.inverse;
  lowered.spline = layer.spline;
  for (const NetworkHead& head : heads_of(layer.spline, layer.features.count(spec.input_size))) {
    lowered.constants.push_back({first->offset, head.columns});
    ++first;
  }
  to.add_spline(std::move(lowered), {}, layer.features.of(spec.input_size));
}

LayerFacts facts(const ElementSpline& layer) {
  LayerFacts facts;
  facts.inverse = layer.inverse;
  facts.spline = &layer.spline;
  facts.splined = &layer.features;
  return facts;
}

}  // namespace nvpflow::layers
