// place_networks(): the buffers of hidden activations, and the places on the tape, that the dense layers of a network
// read and write, for programs of Reach::all.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels.hpp"
#include "plan.hpp"
#include "tape.hpp"

namespace nvpflow::cuda {
namespace {

bool makes_h(const Dense& d) {
  return d.role == Role::initial || d.role == Role::gate || (d.role == Role::outer && d.keeps);
}

/// The buffers that the dense layers of a layer's networks read and write.
void place_buffers(std::span<Dense> networks) {
  const bool two =
      std::any_of(networks.begin(), networks.end(), [](const Dense& d) { return d.role == Role::scale_head; });
  for (std::size_t j = 0; j < networks.size(); ++j) {
    Dense& d = networks[j];
    const bool gated = j + 1 < networks.size() && networks[j + 1].role == Role::gate;
    const bool enters = d.activation != Act::none;  // the next block, or layer
    if (!d.first) d.from = networks[j - 1].to;
    switch (d.role) {
      case Role::hidden:
        d.to = d.first ? 1 : 1 - d.from;
        break;
      case Role::head:
        d.adds = two;
        if (!d.first && makes_h(networks[j - 1])) d.from = kKept;
        break;
      case Role::scale_head:
        d.keeps = true;
        break;
      case Role::numbers:
        if (!d.first && makes_h(networks[j - 1])) d.from = kKept;
        break;
      case Role::initial:
        d.keeps = true;
        d.to = enters ? 1 : -1;
        break;
      case Role::inner:
        d.to = 0;
        break;
      case Role::outer:
        d.adds = d.keeps = !gated;
        d.to = gated || enters ? 1 : -1;
        break;
      case Role::gate:
        d.from = 0;
        d.adds = d.keeps = true;
        d.to = enters ? 1 : -1;
        break;
    }
  }
}

/// Hands out arrays of a layer's part of the tape, in elements a row.
struct TapeRoom {
  std::int64_t used = 0;

  std::int32_t take(std::int64_t elements) {
    const std::int64_t at = used;
    used += elements;
    return static_cast<std::int32_t>(at);
  }
  std::int32_t array(std::int64_t width) { return take(round_up(width, 8)); }
};

/// What the layer in front of dense layer j leaves for it.
std::int32_t input_of(const std::span<Dense> networks, std::size_t j) {
  const Dense& before = networks[j - 1];
  const bool last = networks[j].role == Role::head || networks[j].role == Role::numbers;
  return last && makes_h(before) ? before.tape.h : before.tape.value;
}

/// The arrays of a perceptron's dense layer.
void place_hidden(Dense& d, TapeRoom& room) {
  const bool argument = keeps_argument(d.activation);
  d.tape.value = room.array(d.out);
  if (argument || d.layer_norm) d.tape.argument = room.array(d.out);
  if (d.layer_norm) d.tape.factors = room.take(1);
  d.tape.cotangent = room.array(d.out);
}

/// The arrays of a layer that makes h, or a part of it. initial: the network's first.
void place_block(std::span<Dense> networks, std::size_t j, const Dense& initial, TapeRoom& room) {
  Dense& d = networks[j];
  d.tape.cotangent = room.array(d.out);
  if (d.activation != Act::none || !makes_h(d)) d.tape.value = room.array(d.out);
  if (!makes_h(d)) return;
  const bool gated = std::any_of(networks.begin(), networks.end(), [](const Dense& g) { return g.role == Role::gate; });
  if (d.role == Role::initial) {
    d.tape.h = room.array(d.out);
  } else {
    const std::size_t entry = j - (d.role == Role::gate ? 3 : 2);
    const Dense& before = networks[entry];
    d.tape.from_h = before.tape.h;
    // What a block starts from is kept where its activation needs its argument, or its map its input.
    const bool needed = before.map >= 0 || keeps_argument(before.activation);
    d.tape.h = needed ? room.array(d.out) : before.tape.h;
  }
  d.tape.h_cotangent = gated ? initial.tape.cotangent : d.tape.cotangent;
  if (d.map >= 0) d.tape.sums = room.take(ceil_div(2 * bias_size(d.out), kWarpRows));
  if (d.role != Role::gate) return;
  d.tape.gate = room.array(d.out);
  d.tape.scratch = networks[j - 1].tape.value;
}

/// Where the dense layers of a layer's networks find their numbers on the tape. room: what the layer has of it so far;
/// heads: where the heads lie.
void place_tape(TapeRoom& room, std::int32_t heads, std::span<Dense> networks) {
  std::int32_t network_input = -1;
  for (std::size_t j = 0; j < networks.size(); ++j) {
    Dense& d = networks[j];
    if (d.first && network_input < 0) network_input = room.array(d.in);
    d.tape.input = d.first ? network_input : d.role == Role::gate ? -1 : input_of(networks, j);
    switch (d.role) {
      case Role::hidden:
      case Role::inner:
        place_hidden(d, room);
        break;
      case Role::head:
        d.tape.cotangent = heads;
        if (d.adds) d.tape.from_h = heads;
        break;
      case Role::scale_head:
        d.tape.cotangent = d.tape.h = heads;
        break;
      case Role::numbers:
        d.tape.cotangent = d.tape.value = heads;
        break;
      default:
        place_block(networks, j, networks.front(), room);
    }
  }
  for (std::size_t j = 0; j < networks.size(); ++j) {
    if (networks[j].role != Role::inner) continue;
    // The gates' values are not read any more where the inner layer is reached; without any, the cotangent that comes.
    const Dense& end = networks[j + 1].keeps ? networks[j - 1] : networks[j + 2];
    networks[j].tape.scratch = networks[j + 1].keeps ? end.tape.h_cotangent : end.tape.gate;
  }
}

/// What NetworksTape says of the arrays ahead of the networks'; where the heads lie.
template <class T>
std::int32_t place_heads(const Program<T>& program, const Layer<T>& layer, TapeRoom& room) {
  const bool splines = facts_of(layer.kind).has_splines;
  for (int i = 0; i < (splines ? 2 : 3); ++i) room.array(layer.num_outputs);
  const std::int32_t heads = room.array(splines ? program.dense[numbers_dense(layer)].out : 2 * layer.num_outputs);
  if (splines && layer.spline.squashed) room.take(2 * std::int64_t{layer.spline.num_bins} * layer.num_outputs);
  return heads;
}

}  // namespace

template <class T>
void place_networks(const Program<T>& program, Layer<T>* layers, Dense* dense) {
  for (int k = 0; k < program.num_layers; ++k) {
    if (!facts_of(layers[k].kind).has_networks) continue;
    TapeRoom room;
    const std::int32_t heads = place_heads(program, layers[k], room);
    const std::span<Dense> networks(dense + layers[k].first_dense, static_cast<std::size_t>(layers[k].num_dense));
    place_buffers(networks);
    place_tape(room, heads, networks);
    layers[k].tape_width = round_up(room.used, 8);
  }
}

template void place_networks(const Program<float>&, Layer<float>*, Dense*);
template void place_networks(const Program<double>&, Layer<double>*, Dense*);

}  // namespace nvpflow::cuda
