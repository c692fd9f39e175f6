#include "network.hpp"

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <nvpflow/spec.hpp>

#include "../kinds.hpp"
#include "check.hpp"
#include "layer.hpp"

namespace nvpflow::layers {
namespace {

constexpr bool same(Act act, Activation activation) { return static_cast<int>(act) == static_cast<int>(activation); }
static_assert(same(Act::relu, Activation::relu) && same(Act::leaky_relu, Activation::leaky_relu) &&
                  same(Act::elu, Activation::elu) && same(Act::gelu, Activation::gelu) &&
                  same(Act::silu, Activation::silu) && same(Act::tanh, Activation::tanh) &&
                  same(Act::sigmoid, Activation::sigmoid) && same(Act::softplus, Activation::softplus),
              "Act and Activation have one order");

constexpr NetworkKind lowered(Network::Kind kind) {
  switch (kind) {
    case Network::Kind::mlp:
      break;
    case Network::Kind::residual:
      return NetworkKind::residual;
  }
  return NetworkKind::mlp;
}

/// More make no network better; a wrong number fails with its name.
constexpr std::int64_t kMaxBlocks = 1 << 16;

}  // namespace

std::vector<Field> fields(Network& network) {
  switch (network.kind) {
    case Network::Kind::mlp:
      return {{"hidden_sizes", &network.hidden_sizes},
              {"activation", &network.activation},
              {"layer_norm", &network.layer_norm}};
    case Network::Kind::residual:
      break;
  }
  network.hidden_sizes.resize(1);
  return {{"hidden_size", network.hidden_sizes.data()},
          {"num_blocks", &network.num_blocks},
          {"activation", &network.activation},
          {"context_gates", &network.context_gates},
          {"block_affines", &network.block_affines}};
}

void check(const Network& network, const FlowSpec& spec, const std::string& prefix) {
  check_named(prefix, network.kind);
  check_named(prefix, network.activation);
  const bool residual = has_blocks(lowered(network.kind));
  if (residual && network.hidden_sizes.size() != 1) {
    refuse(prefix + "hidden_sizes has " + std::to_string(network.hidden_sizes.size()) +
           " entries, expected 1 for a residual network: the width of all its blocks");
  }
  for (std::size_t j = 0; j < network.hidden_sizes.size(); ++j) {
    const std::string name = prefix + (residual ? "hidden_size" : "hidden_sizes[" + std::to_string(j) + "]");
    check_range(name, network.hidden_sizes[j], 1, kMaxSize);
    if (network.layer_norm && network.hidden_sizes[j] < 2) {
      refuse(name + " is 1, expected at least 2 with layer_norm: one number has no variance");
    }
  }
  if (residual) {
    check_range(prefix + "num_blocks", network.num_blocks, 0, kMaxBlocks);
    if (network.layer_norm) refuse(prefix + "layer_norm is true, expected false for a residual network");
    if (network.context_gates && spec.context_size == 0) {
      refuse(prefix + "context_gates is true, expected false where context_size is 0");
    }
  } else if (network.context_gates || network.block_affines) {
    refuse(prefix + (network.context_gates ? "context_gates" : "block_affines") +
           " is true, expected false for an mlp; it belongs to residual networks");
  }
}

std::int64_t num_tensors(const Network& network) {
  switch (network.kind) {
    case Network::Kind::mlp:
      return 2 * static_cast<std::int64_t>(network.hidden_sizes.size());
    case Network::Kind::residual:
      break;
  }
  return 2 + network.num_blocks * (4 + (network.block_affines ? 2 : 0) + (network.context_gates ? 2 : 0));
}

namespace {

/// Tensors of one network, in order.
struct NetworkTensors {
  const FlowSpec& spec;
  const std::string& prefix;
  std::int64_t layer;
  const TensorSink& sink;

  void dense(const std::string& name, std::int64_t in, std::int64_t out, Initial kernel, Initial bias) const {
    TensorInfo tensor;
    tensor.layer = layer;
    tensor.fan_in = in;
    tensor.fan_out = out;
    tensor.trained = true;

    TensorInfo weights = tensor;
    weights.name = prefix + name + ".kernel";
    weights.shape = {in, out};
    weights.size = in * out;
    weights.initial = kernel;
    weights.decayed = weights.multiplies = true;
    sink(std::move(weights));

    tensor.name = prefix + name + ".bias";
    tensor.shape = {out};
    tensor.size = out;
    tensor.initial = bias;
    sink(std::move(tensor));
  }

  void hidden(const std::string& name, std::int64_t in, std::int64_t out) const {
    dense(name, in, out, Initial::hidden_kernel, Initial::hidden_bias);
  }

  void affine(const std::string& name, std::int64_t width) const {
    for (const char* const what : {".scale", ".shift"}) {
      TensorInfo tensor = vector_tensor(prefix + name + what, width, layer);
      tensor.trained = true;
      tensor.initial = what[2] == 'c' ? Initial::one : Initial::zero;
      sink(std::move(tensor));
    }
  }

  void block(const Network& network, std::int64_t j) const {
    const std::int64_t width = network.hidden_sizes[0];
    const std::string name = "block_" + std::to_string(j);
    if (network.block_affines) affine(name + "_affine", width);
    hidden(name + "_dense_0", width, width);
    dense(name + "_dense_1", width, width, Initial::small_kernel, Initial::zero);
    if (network.context_gates)
      dense(name + "_context", spec.context_size, width, Initial::hidden_kernel, Initial::zero);
  }
};

}  // namespace

void tensors(const Network& network, const FlowSpec& spec, std::int64_t inputs, const NetworkNames& names,
             const Site& site, const TensorSink& sink) {
  const NetworkTensors put{spec, names.prefix, site.layer, sink};
  std::int64_t in = inputs + spec.context_size;
  switch (network.kind) {
    case Network::Kind::mlp:
      for (std::size_t j = 0; j < network.hidden_sizes.size(); ++j) {
        put.hidden(names.network + "dense_" + std::to_string(j), in, network.hidden_sizes[j]);
        in = network.hidden_sizes[j];
      }
      break;
    case Network::Kind::residual:
      put.hidden(names.network + "initial", in, network.hidden_sizes[0]);
      for (std::int64_t j = 0; j < network.num_blocks; ++j) put.block(network, j);
      in = network.hidden_sizes[0];
      break;
  }
  const Initial kernel = site.zero_heads ? Initial::zero : Initial::small_kernel;
  for (const NetworkHead& head : names.heads) put.dense(head.name, in, head.columns, kernel, Initial::zero);
}

namespace {

/// Takes a network's tensors off the layout, in the order of tensors().
struct NetworkLowering {
  const TensorInfo*& next;
  std::int64_t inputs, context_size;
  LoweredNetwork& to;

  DensePart part(std::int64_t columns) const {
    const DensePart made{next[0].offset, next[1].offset, columns};
    next += 2;
    return made;
  }

  /// The first dense layer that reads [x_a, c]: the rows of its kernel for c are a layer of their own, with the bias.
  void first(std::vector<DensePart> parts) const {
    LoweredDense of_inputs{inputs, std::move(parts)};
    if (context_size > 0) {
      to.context = of_inputs;
      to.context->in = context_size;
      for (std::size_t i = 0; i < of_inputs.parts.size(); ++i) {
        to.context->parts[i].kernel += inputs * of_inputs.parts[i].columns;
        of_inputs.parts[i].bias = kNoBias;
      }
    }
    to.dense.push_back(std::move(of_inputs));
  }
};

}  // namespace

LoweredNetwork lower(const Network& network, std::int64_t inputs, std::int64_t context_size,
                     const std::vector<std::int64_t>& heads, const TensorInfo*& next) {
  LoweredNetwork lowered;
  lowered.kind = layers::lowered(network.kind);
  lowered.activation = static_cast<Act>(network.activation);
  lowered.layer_norm = network.layer_norm;
  const NetworkLowering take{next, inputs, context_size, lowered};
  const auto dense = [&](std::int64_t in, std::vector<DensePart> parts) {
    if (lowered.dense.empty()) {
      take.first(std::move(parts));
    } else {
      lowered.dense.push_back({in, std::move(parts)});
    }
  };
  std::int64_t width = 0;
  for (const std::int64_t size : network.hidden_sizes) {
    dense(width, {take.part(size)});
    width = size;
  }
  for (std::int64_t j = 0; has_blocks(lowered.kind) && j < network.num_blocks; ++j) {
    if (network.block_affines) {
      lowered.affines.push_back({next[0].offset, next[1].offset});
      next += 2;
    }
    for (int i = 0; i < 2; ++i) dense(width, {take.part(width)});
    if (network.context_gates) lowered.gates.push_back({context_size, {take.part(width)}});
  }
  std::vector<DensePart> parts;
  for (const std::int64_t columns : heads) parts.push_back(take.part(columns));
  dense(width, std::move(parts));
  return lowered;
}

}  // namespace nvpflow::layers
