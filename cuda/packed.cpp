#include "packed.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <nvpflow/error.hpp>
#include <nvpflow/spec.hpp>

#include "../cpp/src/lower.hpp"
#include "kernels.hpp"
#include "runtime.hpp"

namespace nvpflow::cuda {
namespace {

constexpr std::int64_t kUploadBytes = 16 << 20;

std::vector<std::int64_t> places_of(const Places& from) {
  if (!from.index.empty()) return from.index;
  std::vector<std::int64_t> places(static_cast<std::size_t>(from.count));
  std::iota(places.begin(), places.end(), from.begin);
  return places;
}

/// Features of the first part of the state: such that the first coupling finds its features in the two parts. lower()
/// has put them one after the other, those first that place 0 belongs to.
std::int64_t split_of(const Lowered& lowered) {
  const auto of_features = [](const auto& layer) {
    const std::vector<std::int64_t> a = places_of(layer.conditioning);
    const bool a_first = std::find(a.begin(), a.end(), 0) != a.end();
    return a_first ? layer.conditioning.count : layer.transformed.count;
  };
  for (const LoweredLayer& layer : lowered.layers) {
    if (networks_of(layer).empty()) continue;
    return std::visit(
        [&](const auto& with) -> std::int64_t {
          if constexpr (requires { with.networks; }) return of_features(with);
          return 0;
        },
        layer);
  }
  return lowered.input_size / 2;
}

/// Entry i of a list, empty for one that counts.
std::int64_t listed(const std::vector<std::int64_t>& list, std::int64_t i) {
  return list.empty() ? i : list[static_cast<std::size_t>(i)];
}

/// Which of the places is each of those from `begin` on; empty: one after the other.
std::vector<std::int64_t> order_of(const std::vector<std::int64_t>& places, std::int64_t begin) {
  std::vector<std::int64_t> order(places.size());
  bool in_order = true;
  for (std::size_t i = 0; i < places.size(); ++i) {
    order[static_cast<std::size_t>(places[i] - begin)] = static_cast<std::int64_t>(i);
    in_order = in_order && places[i] - begin == static_cast<std::int64_t>(i);
  }
  return in_order ? std::vector<std::int64_t>() : order;
}

/// The first layer for the features and the context: the weights of the context lie behind the others.
LoweredDense joined(const LoweredNetwork& network) {
  LoweredDense first = network.dense.front();
  if (!network.context) return first;
  first.in += network.context->in;
  for (std::size_t part = 0; part < first.parts.size(); ++part)
    first.parts[part].bias = network.context->parts[part].bias;
  return first;
}

/// Numbers of a student_t feature are padded to this, so that whole blocks of noise find some.
constexpr std::int64_t kBaseStride = 16;

template <class T>
void point_base(Program<T>& program) {
  if (program.base_numbers >= 0) point_into(program.base, program.packed + program.base_numbers, program.input_size);
}

}  // namespace

void upload(Memory& to, const void* from, std::int64_t bytes, const char* what, Stream stream) {
  if (bytes == 0) return;
  auto* target = static_cast<unsigned char*>(to.reserve(bytes, what));
  const auto* source = static_cast<const unsigned char*>(from);
  Memory staging(Memory::Kind::pinned);
  void* pinned = staging.reserve(std::min(bytes, kUploadBytes), "a copy to the device");
  for (std::int64_t done = 0; done < bytes; done += kUploadBytes) {
    const std::int64_t here = std::min(kUploadBytes, bytes - done);
    std::memcpy(pinned, source + done, static_cast<std::size_t>(here));
    copy_to_device(target + done, pinned, here, stream);
    synchronize(stream);
  }
}

template <class T>
Layers<T>::Layers(const FlowSpec& spec, const ParamLayout& layout, Stream stream) {
  const Lowered lowered = lower(spec, layout);
  host_.input_size = static_cast<std::int32_t>(spec.input_size);
  host_.split = static_cast<std::int32_t>(split_of(lowered));
  host_.num_parameters = layout.size();
  host_.context_size = static_cast<std::int32_t>(lowered.context_size);
  host_.base = density_of<T>(lowered.base);
  host_.base.stride = round_up(spec.input_size, kBaseStride);
  if (const std::int64_t numbers = base_numbers_size(host_.base, spec.input_size); numbers > 0) {
    host_.base_numbers = reserve_packed(numbers);
    ++host_.num_numbers;
  }
  if (lowered.context_mean >= 0) {
    host_.context_statistics = reserve_packed(2 * lowered.context_size);
    host_.context_mean_offset = lowered.context_mean;
    host_.context_log_std_offset = lowered.context_log_std;
    ++host_.num_numbers;
  }
  host_.data_place = keep(lowered.data_place);
  host_.latent_place = keep(lowered.latent_place);
  for (const LoweredLayer& layer : lowered.layers) {
    std::visit([&](const auto& kind) { add(kind); }, layer);
  }
  host_.num_layers = static_cast<std::int32_t>(layers_.size());
  host_.num_dense = static_cast<std::int32_t>(dense_.size());
  host_.layers = layers_.data();
  host_.dense = dense_.data();
  host_.reach = reach_of(host_);
  if (host_.reach == Reach::all) place_networks(host_, layers_.data(), dense_.data());
  packed_from_.assign(static_cast<std::size_t>(host_.packed_size), -1);
  transposed_from_.assign(static_cast<std::size_t>(host_.transposed_size), -1);
  for (std::size_t i = 0; i < dense_.size(); ++i) fill_sources(dense_[i], sources_[i]);
  for (const Copy& copy : copies_) {
    std::iota(packed_from_.begin() + copy.to, packed_from_.begin() + copy.to + copy.count, copy.from);
  }

  const auto send = [&](Memory& to, const auto& from, const char* what) {
    upload(to, from.data(), static_cast<std::int64_t>(from.size() * sizeof(from[0])), what, stream);
  };
  send(device_layers_, layers_, "the flow's layers");
  send(device_dense_, dense_, "the flow's layers");
  send(device_places_, places_, "the flow's layers");
  send(packed_source_, packed_from_, "the order of the packed parameters");
  send(transposed_source_, transposed_from_, "the order of the packed parameters");
  packed_from_ = {};
  transposed_from_ = {};
  device_ = host_;
  device_.layers = static_cast<const Layer<T>*>(device_layers_.data());
  device_.dense = static_cast<const Dense*>(device_dense_.data());
  device_.places = static_cast<const std::int32_t*>(device_places_.data());
  device_.source = packed_source();
}

/// The list's place; an empty one has none.
template <class T>
std::int64_t Layers<T>::keep(const std::vector<std::int64_t>& places) {
  if (places.empty()) return -1;
  const auto begin = static_cast<std::int64_t>(places_.size());
  for (const std::int64_t place : places) places_.push_back(static_cast<std::int32_t>(place));
  return begin;
}

/// Room for so many elements, rounded up; their place.
template <class T>
std::int64_t Layers<T>::reserve_packed(std::int64_t elements) {
  const std::int64_t place = host_.packed_size;
  host_.packed_size += round_up(elements, 4);
  return place;
}

/// dense: what of it the caller knows; the same below.
template <class T>
void Layers<T>::add_dense(std::int64_t in, std::int64_t out, DenseSource source, Dense dense) {
  dense.in = static_cast<std::int32_t>(in);
  dense.out = static_cast<std::int32_t>(out);
  dense.weights = reserve_packed(weight_size(in, out));
  dense.bias = reserve_packed(bias_size(out));
  dense.transposed = host_.transposed_size;
  host_.transposed_size += weight_size(out, in);
  dense_.push_back(dense);
  sources_.push_back(std::move(source));
}

/// A layer of one tensor, and its order of outputs.
template <class T>
void Layers<T>::add_hidden(const LoweredDense& from, std::vector<std::int64_t> rows, Dense dense) {
  const DensePart& part = from.parts.front();
  dense.kernel_offset[0] = part.kernel;
  dense.bias_offset[0] = part.bias;
  dense.listed = !rows.empty();
  std::vector<Output> outputs;
  for (std::int64_t o = 0; o < part.columns; ++o) outputs.push_back({part.bias + o, part.kernel + o, part.columns});
  add_dense(from.in, part.columns, {std::move(rows), std::move(outputs)}, dense);
}

/// The heads of an affine map, outputs in turn.
template <class T>
void Layers<T>::add_heads(const LoweredDense& from, std::vector<std::int64_t> rows,
                          const std::vector<std::int64_t>& columns, Heads heads, Dense dense) {
  const std::int64_t features = from.parts.front().columns;
  dense.interleaved = true;
  dense.listed = from.parts.size() == 1 || !rows.empty() || !columns.empty();
  std::vector<Output> outputs(static_cast<std::size_t>(2 * features));
  std::size_t turn = heads == Heads::translation ? 1 : 0;
  for (const DensePart& part : from.parts) {
    dense.kernel_offset[turn] = part.kernel;
    dense.bias_offset[turn] = part.bias;
    for (std::int64_t j = 0; j < features; ++j) {
      const std::int64_t column = listed(columns, j);
      outputs[static_cast<std::size_t>(2 * j) + turn] = {part.bias + column, part.kernel + column, features};
    }
    ++turn;
  }
  add_dense(from.in, 2 * features, {std::move(rows), std::move(outputs)}, dense);
}

/// What says the numbers of splines, a tensor for widths, heights and slopes each: SplinePlaces.
template <class T>
void Layers<T>::add_numbers(const LoweredDense& from, std::vector<std::int64_t> rows,
                            const std::vector<std::int64_t>& columns, const Layer<T>& layer, Dense dense) {
  const SplinePlaces at(layer.spline);
  const std::int64_t begin[] = {at.widths, at.heights, at.slopes}, features = layer.num_outputs;
  dense.role = Role::numbers;
  dense.listed = true;
  std::vector<Output> outputs(static_cast<std::size_t>(features * at.stride));
  for (std::size_t p = 0; p < from.parts.size(); ++p) {
    const DensePart& part = from.parts[p];
    for (std::int64_t i = 0; i < part.columns; ++i) {  // number i / features
      const std::int64_t column = i / features * features + listed(columns, i % features);
      const std::int64_t output = i % features * at.stride + begin[p] + i / features;
      outputs[static_cast<std::size_t>(output)] = {part.bias + column, part.kernel + column, part.columns};
    }
  }
  add_dense(from.in, features * at.stride, {std::move(rows), std::move(outputs)}, dense);
}

/// Of dense layer j ahead of the heads.
Role role_of(NetworkKind kind, std::size_t j) {
  switch (kind) {
    case NetworkKind::mlp:
      break;
    case NetworkKind::residual:
      return j == 0 ? Role::initial : j % 2 == 1 ? Role::inner : Role::outer;
  }
  return Role::hidden;
}

/// The dense layers of a network. add_last(from, rows, columns, dense) adds the last.
template <class T>
template <class AddLast>
void Layers<T>::add_network(const LoweredNetwork& from, const NetworkPlaces& places, AddLast add_last) {
  const std::size_t blocks = has_blocks(from.kind) ? (from.dense.size() - 2) / 2 : 0;
  for (std::size_t j = 0; j < from.dense.size(); ++j) {
    Dense dense;
    dense.first = j == 0;
    const LoweredDense here = dense.first ? joined(from) : from.dense[j];
    const std::vector<std::int64_t> rows = dense.first ? places.rows : std::vector<std::int64_t>();
    if (j + 1 == from.dense.size()) return add_last(here, rows, places.columns, dense);
    dense.role = role_of(from.kind, j);
    dense.layer_norm = from.layer_norm;
    if (dense.role == Role::hidden || dense.role == Role::inner) dense.activation = from.activation;
    const std::size_t block = j / 2;  // the next one, behind a layer that makes h
    if (dense.role == Role::outer && !from.gates.empty()) {
      add_hidden(here, {}, dense);
      dense.role = Role::gate;
      enter_block(from, block, blocks, dense);
      add_hidden(from.gates[block - 1], {}, dense);
      continue;
    }
    if (dense.role == Role::initial || dense.role == Role::outer) enter_block(from, block, blocks, dense);
    add_hidden(here, rows, dense);
  }
}

/// What a layer that makes h does to enter a residual block, where there is another one.
template <class T>
void Layers<T>::enter_block(const LoweredNetwork& from, std::size_t block, std::size_t blocks, Dense& dense) {
  if (block >= blocks) return;
  dense.activation = from.activation;
  if (from.affines.empty()) return;
  const LoweredAffine& map = from.affines[block];
  const std::int64_t width = from.dense.front().out();
  dense.map = reserve_packed(2 * bias_size(width));
  dense.scale_offset = map.scale;
  dense.shift_offset = map.shift;
  copies_.push_back({dense.map, map.scale, width});
  copies_.push_back({dense.map + bias_size(width), map.shift, width});
}

/// Where a layer finds its features; gathered: by lists in any case.
template <class T>
typename Layers<T>::NetworkPlaces Layers<T>::find_features(const Places& conditioning, const Places& transformed,
                                                           bool gathered, Layer<T>& layer) {
  layer.num_inputs = static_cast<std::int32_t>(conditioning.count);
  layer.num_outputs = static_cast<std::int32_t>(transformed.count);
  const std::vector<std::int64_t> a = places_of(conditioning), b = places_of(transformed);
  const auto lies_in = [this](const std::vector<std::int64_t>& places, bool first) {
    const std::int64_t size = first ? host_.split : host_.input_size - host_.split;
    return static_cast<std::int64_t>(places.size()) == size &&
           std::all_of(places.begin(), places.end(), [&](std::int64_t p) { return (p < host_.split) == first; });
  };
  if (gathered || host_.context_size > 0 || (!lies_in(a, true) && !lies_in(a, false))) {
    layer.condition = kGathered;
    layer.input_place = keep(a);
    layer.output_place = keep(b);
    return {};
  }
  layer.condition = lies_in(a, true) ? 0 : 1;
  NetworkPlaces places = {order_of(a, layer.condition == 0 ? 0 : host_.split),
                          order_of(b, layer.condition == 0 ? host_.split : 0)};
  layer.output_order = keep(places.columns);
  return places;
}

/// What couplings and splines have in common; the dense layers of their networks come next.
template <class T>
template <class From>
typename Layers<T>::NetworkPlaces Layers<T>::begin(Kind kind, const From& from, Layer<T>& layer) {
  layer.kind = kind;
  layer.inverse = from.inverse;
  layer.place = keep(from.place);
  layer.first_dense = static_cast<std::int32_t>(dense_.size());
  return find_features(from.conditioning, from.transformed, from.networks.empty(), layer);
}

template <class T>
void Layers<T>::add(const LoweredCoupling& from) {
  Layer<T> layer;
  const NetworkPlaces places = begin(Kind::coupling, from, layer);
  layer.activation = from.networks.front().activation;
  layer.scale = scale_of<T>(from.scale);
  const bool two = from.networks.size() > 1;
  for (const LoweredNetwork& network : from.networks) {
    const bool scale_only = two && &network == &from.networks.front();
    const Heads heads = scale_only                                          ? Heads::scale
                        : two || from.scale.function == ScaleFunction::none ? Heads::translation
                                                                            : Heads::both;
    add_network(network, places, [&](const LoweredDense& head, const auto& rows, const auto& columns, Dense dense) {
      dense.role = scale_only ? Role::scale_head : Role::head;
      add_heads(head, rows, columns, heads, dense);
    });
  }
  layer.num_dense = static_cast<std::int32_t>(dense_.size()) - layer.first_dense;
  layers_.push_back(layer);
}

template <class T>
void Layers<T>::add(const LoweredSpline& from) {
  Layer<T> layer;
  const NetworkPlaces places = begin(Kind::spline, from, layer);
  layer.spline = map_of<T>(from.spline);
  const auto add_last = [&](const LoweredDense& head, const auto& rows, const auto& columns, const Dense& dense) {
    add_numbers(head, rows, columns, layer, dense);
  };
  for (const LoweredNetwork& network : from.networks) add_network(network, places, add_last);
  if (from.networks.empty()) {
    LoweredDense constants;
    for (const LoweredConstants& part : from.constants) constants.parts.push_back({-1, part.offset, part.size});
    add_last(constants, places.rows, places.columns, Dense());
  } else {
    layer.num_dense = static_cast<std::int32_t>(dense_.size()) - layer.first_dense;
  }
  layers_.push_back(layer);
}

template <class T>
void Layers<T>::add(const LoweredLinear& from) {
  const std::int64_t features = host_.input_size, triangle = features * (features - 1) / 2;
  Layer<T> layer;
  layer.kind = Kind::linear;
  layer.inverse = from.inverse;
  layer.place = keep(from.in_place);
  layer.input_place = keep(from.inverse ? from.out_place : from.in_place);
  layer.output_place = keep(from.inverse ? from.in_place : from.out_place);
  layer.factors = {from.lower, from.upper, from.log_diagonal, from.sign, from.bias};
  layer.log_det = reserve_packed(1);
  const FactorCopies at(features);
  layer.copies = reserve_packed(at.size);
  copies_.push_back({layer.copies + at.lower, from.lower, triangle});
  copies_.push_back({layer.copies + at.upper, from.upper, triangle});
  copies_.push_back({layer.copies + at.log_diagonal, from.log_diagonal, features});
  copies_.push_back({layer.copies + at.sign, from.sign, features});
  layer.products = host_.products;
  layer.first_dense = static_cast<std::int32_t>(dense_.size());
  layer.num_dense = 1;
  add_matrix();
  copies_.push_back({dense_.back().bias, from.bias, features});
  add_matrix();
  host_.products += products_size(features);
  ++host_.num_linear;
  ++host_.num_numbers;
  layers_.push_back(layer);
}

/// A dense layer of a linear one, that the device forms: the gradient goes to the products.
template <class T>
void Layers<T>::add_matrix() {
  const std::int64_t features = host_.input_size;
  const std::int64_t products = host_.num_parameters + host_.products;
  Dense dense;
  dense.kernel_offset[0] = products;
  dense.bias_offset[0] = products + features * features;
  add_dense(features, features, {}, dense);
}

template <class T>
void Layers<T>::add(const LoweredDiagonal& from) {
  Layer<T> layer;
  layer.kind = Kind::diagonal;
  layer.inverse = from.inverse;
  layer.place = keep(from.place);
  layer.mean_offset = from.mean;
  layer.log_std_offset = from.log_std;
  layer.affine = reserve_packed(affine_size(host_.input_size));
  ++host_.num_numbers;
  layers_.push_back(layer);
}

template <class T>
void Layers<T>::fill_sources(const Dense& dense, const DenseSource& source) {
  for (std::size_t o = 0; o < source.outputs.size(); ++o) {
    const Output& from = source.outputs[o];
    if (from.stride == 0) continue;
    const auto output = static_cast<std::int64_t>(o);
    packed_from_[static_cast<std::size_t>(dense.bias + output)] = from.bias;
    for (std::int64_t i = 0; i < dense.in; ++i) {
      const std::int64_t at = from.kernel + listed(source.rows, i) * from.stride;
      packed_from_[static_cast<std::size_t>(dense.weights + weight_index(i, output, dense.in))] = at;
      transposed_from_[static_cast<std::size_t>(dense.transposed + weight_index(output, i, dense.out))] = at;
    }
  }
}

template <class T>
Packed<T>::Packed(std::shared_ptr<const Layers<T>> layers)
    : layers_(std::move(layers)), program_(layers_->on_device()) {
  const auto bytes = [](std::int64_t elements) { return elements * static_cast<std::int64_t>(sizeof(T)); };
  program_.packed = static_cast<const T*>(packed_.reserve(bytes(program_.packed_size), "packed parameters"));
  point_base(program_);
  program_.transposed =
      static_cast<const T*>(transposed_.reserve(bytes(program_.transposed_size), "transposed parameters"));
  linear_workspace_.reserve(linear_workspace_bytes(program_), "the matrices of linear layers");
}

/// transposed: also the transposed weights.
template <class T>
void Packed<T>::pack_into(const Program<T>& program, const T* parameters, Matrices wanted, bool transposed,
                          Stream stream) {
  T *packed = const_cast<T*>(program.packed),
    *transposed_to = transposed ? const_cast<T*>(program.transposed) : nullptr;
  launch_on(stream, "packing parameters", [layers = layers_, program, parameters, packed, stream] {
    return launch_pack(&program, layers->packed_source(), program.packed_size, parameters, packed, stream);
  });
  if (transposed) {
    launch_on(stream, "packing parameters", [layers = layers_, program, parameters, transposed_to, stream] {
      return launch_pack<T>(nullptr, layers->transposed_source(), program.transposed_size, parameters, transposed_to,
                            stream);
    });
  }
  if (program.num_linear == 0) return;
  void* workspace = linear_workspace_.data();
  launch_on(stream, "forming the matrices of linear layers",
            [program, wanted, packed, transposed_to, workspace, stream] {
              return launch_pack_linear(program, wanted, packed, transposed_to, workspace, stream);
            });
}

template <class T>
void Packed<T>::pack(const T* parameters, Matrices wanted, Stream stream) {
  pack_into(program_, parameters, wanted, true, stream);
}

template <class T>
void Packed<T>::pack_rest(T* parameters, const float* of_host, const float* mean_low, Stream stream) {
  const std::int64_t features = program_.input_size, element = sizeof(T);
  first_.set(features, of_host, of_host + features, mean_low);
  rest_ = program_;
  T* to = static_cast<T*>(rest_packed_.reserve(program_.packed_size * element, "packed parameters"));
  rest_.packed = to;
  point_base(rest_);
  fill_zero(parameters, 2 * features * element, stream);  // mean and log_std: the identity
  pack_into(rest_, parameters, Matrices::both, false, stream);
  const std::int64_t log_det = layers_->on_host().layers[0].affine + 3 * features;
  copy_on_device(to + log_det, program_.packed + log_det, element, stream);
}

template class Layers<float>;
template class Layers<double>;
template class Packed<float>;
template class Packed<double>;

}  // namespace nvpflow::cuda
