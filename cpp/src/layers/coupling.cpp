// The affine coupling layer: hidden dense layers, then the heads scale and translation.
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <nvpflow/spec.hpp>

#include "../program.hpp"
#include "layer.hpp"

namespace nvpflow::layers {
namespace {

constexpr bool same(Act act, Activation activation) { return static_cast<int>(act) == static_cast<int>(activation); }
static_assert(same(Act::relu, Activation::relu) && same(Act::leaky_relu, Activation::leaky_relu) &&
                  same(Act::elu, Activation::elu) && same(Act::gelu, Activation::gelu) &&
                  same(Act::silu, Activation::silu) && same(Act::tanh, Activation::tanh) &&
                  same(Act::sigmoid, Activation::sigmoid) && same(Act::softplus, Activation::softplus),
              "Act and Activation have one order");

/// Kernel and bias of a dense layer; `kernel` and `bias`: what they start as.
void dense_tensors(const std::string& name, std::int64_t in, std::int64_t out, Initial kernel, Initial bias,
                   std::int64_t layer, const TensorSink& sink) {
  TensorInfo tensor;
  tensor.layer = layer;
  tensor.fan_in = in;
  tensor.fan_out = out;
  tensor.trained = true;

  TensorInfo weights = tensor;
  weights.name = name + ".kernel";
  weights.shape = {in, out};
  weights.size = in * out;
  weights.initial = kernel;
  weights.decayed = weights.multiplies = true;
  sink(std::move(weights));

  tensor.name = name + ".bias";
  tensor.shape = {out};
  tensor.size = out;
  tensor.initial = bias;
  sink(std::move(tensor));
}

}  // namespace

std::vector<Field> fields(Coupling& layer) {
  return {{"swapped", &layer.swapped},
          {"hidden_sizes", &layer.hidden_sizes},
          {"activation", &layer.activation},
          {"scale_bound", &layer.scale_bound}};
}

void tensors(const Coupling& layer, const FlowSpec& spec, const Site& site, const TensorSink& sink) {
  const std::string name = "flow_" + std::to_string(site.coupling);
  std::int64_t in = spec.conditioning(layer).count;
  for (std::size_t j = 0; j < layer.hidden_sizes.size(); ++j) {
    dense_tensors(name + "_coupling_dense_" + std::to_string(j), in, layer.hidden_sizes[j], Initial::hidden_kernel,
                  Initial::hidden_bias, site.layer, sink);
    in = layer.hidden_sizes[j];
  }
  for (const char* const head : {"_scale", "_translation"}) {
    dense_tensors(name + head, in, spec.transformed(layer).count, Initial::head_kernel, Initial::zero, site.layer,
                  sink);
  }
}

std::int64_t num_tensors(const Coupling& layer) {
  return 2 * (static_cast<std::int64_t>(layer.hidden_sizes.size()) + 2);
}

void lower(const Coupling& layer, const FlowSpec& spec, const TensorInfo* first, Lowered& to) {
  LoweredCoupling lowered;
  lowered.conditioning = spec.conditioning(layer);
  lowered.transformed = spec.transformed(layer);
  lowered.activation = static_cast<Act>(layer.activation);
  lowered.bound = layer.scale_bound;
  const auto part = [&first](std::int64_t columns) {
    const DensePart made{first[0].offset, first[1].offset, columns};
    first += 2;
    return made;
  };
  std::int64_t in = lowered.conditioning.count;
  for (const std::int64_t width : layer.hidden_sizes) {
    lowered.dense.push_back({in, {part(width)}});
    in = width;
  }
  const DensePart scale = part(lowered.transformed.count), translation = part(lowered.transformed.count);
  lowered.dense.push_back({in, {scale, translation}});
  to.layers.emplace_back(std::move(lowered));
}

}  // namespace nvpflow::layers
