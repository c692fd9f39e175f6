#include "packed.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <variant>

#include <nvpflow/device.hpp>
#include <nvpflow/spec.hpp>

#include "../lower.hpp"
#include "../parallel.hpp"
#include "kernels.hpp"
#include "round_up.hpp"

namespace nvpflow::cpu {
namespace {

// Bytes that one inference tile's scratch and one gradient tile's tape aim for: in a second-level cache of today, with
// room for the weights beside the scratch. The tape is written once and read once, its weights' gradients added up tile
// by tile: more rows save more of that than a smaller tape saves of traffic.
constexpr std::int64_t kTileBytes = 320 << 10;
constexpr std::int64_t kTapeBytes = 800 << 10;
// Every tile reads all the weights, and one with a tape reads and writes their gradient as well. Where they are large,
// and come from afar, that has to be worth while: this part of their size is the aim then, and this multiple of it.
constexpr std::int64_t kWeightsPerTile = 16, kTapePerWeights = 2;
// Units of an inference tile's rows at most: the tile of a small flow stays close to the first-level cache, that of a
// large one is worth its weights by more.
constexpr std::int64_t kMaxRowUnits = 3, kMaxRowUnitsOfLarge = 8;
// Inputs that are packed in one go: a multiple of every vector's lanes, so that all of a paired layer's are one go.
// Parameters that are worth a thread of their own.
constexpr std::int64_t kBand = 16, kPackSize = 1 << 14;
// Weights that are more than this are taken to lie outside the second-level cache, and outside all of them.
constexpr std::int64_t kNearBytes = 1 << 20, kFarBytes = 16 << 20;

/// Inputs of a segment (Dense::segment), of which there are 1, 2 or 4. More hide the latency of a single row's long
/// sums; each costs the tile path one addition per output.
std::int64_t segment_of(std::int64_t in) {
  const std::int64_t segments = in >= 64 ? 4 : in >= 32 ? 2 : 1;
  return (in + segments - 1) / segments;
}

/// To the nearest bfloat16 number, ties to the even one; NaN stays NaN.
std::uint16_t to_bfloat16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (std::isnan(value)) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/// rows of `count` elements, whose distances are given; `whole`: what count usually is.
template <int whole, class T>
void copy_rows(const T* from, std::int64_t from_stride, T* to, std::int64_t to_stride, std::int64_t rows,
               std::int64_t count) {
  if (count == whole) {  // a size known here is a few moves instead of a call
    for (std::int64_t i = 0; i < rows; ++i) std::memcpy(to + i * to_stride, from + i * from_stride, whole * sizeof(T));
  } else {
    for (std::int64_t i = 0; i < rows; ++i) std::copy_n(from + i * from_stride, count, to + i * to_stride);
  }
}

}  // namespace

template <class T>
Packed<T>::Packed(const FlowSpec& spec, const Lowered& lowered, const Kernels<T>& kernels, Weights weights,
                  bool wide_blocks)
    : lanes_(kernels.lanes), transpose_(kernels.transpose), base_(lowered.base, lowered.input_size, kernels.lanes) {
  reserve(lowered);
  program_.input_size = lowered.input_size;
  program_.data_place = keep(lowered.data_place);
  program_.latent_place = keep(lowered.latent_place);
  program_.base = base_.density();
  program_.context_size = lowered.context_size;
  program_.context_mean_offset = lowered.context_mean;
  program_.context_log_std_offset = lowered.context_log_std;
  if (lowered.context_size > 0) program_.fold_size = lanes_;  // the first: ContextRows::folded
  for (const LoweredLayer& layer : lowered.layers) {
    std::visit([&](const auto& kind) { add(kind); }, layer);
  }
  if (lowered.context_mean >= 0) {
    context_statistics_.resize(static_cast<std::size_t>(2 * lowered.context_size));
    program_.context_mean = context_statistics_.data();
    program_.context_inverse_std = context_statistics_.data() + lowered.context_size;
  }
  program_.layers = layers_.data();
  program_.num_layers = static_cast<std::int64_t>(layers_.size());
  program_.plain = is_plain();
  choose_tiles(kernels, wide_blocks);

  std::int64_t size = 0;
  for (const Dense<T>& d : dense_) size += round_up(d.out, lanes_) * (d.in + 1);
  for (const BlockAffine<T>& map : affines_) size += 2 * round_up(map.width, lanes_);
  size += static_cast<std::int64_t>(diagonal_.size()) * 3 * round_up(spec.input_size, lanes_);
  for (const Splines<T>& splines : splines_) size += constants_size(splines);
  T* next = static_cast<T*>(weights_.reserve(size * static_cast<std::int64_t>(sizeof(T))));
  std::memset(next, 0, static_cast<std::size_t>(size) * sizeof(T));  // the padding stays zero for ever
  for (Dense<T>& d : dense_) {
    d.weights = next;
    d.bias = next + round_up(d.out, lanes_) * d.in;
    next += round_up(d.out, lanes_) * (d.in + 1);
  }
  for (BlockAffine<T>& map : affines_) {
    map.scale = next;
    map.shift = next + round_up(map.width, lanes_);
    next += 2 * round_up(map.width, lanes_);
  }
  for (const std::size_t index : diagonal_) {
    Layer<T>& layer = layers_[index];
    layer.mean = next;
    layer.std = next + round_up(spec.input_size, lanes_);
    layer.inverse_std = next + 2 * round_up(spec.input_size, lanes_);
    next += 3 * round_up(spec.input_size, lanes_);
  }
  for (Splines<T>& splines : splines_) {
    splines.constants = splines.size[0] > 0 ? next : nullptr;
    next += constants_size(splines);
  }
  if (weights == Weights::bfloat16) keep_narrow();
  if (takes_float64_rows(spec)) place_rest(spec);
}

template <class T>
std::int64_t Packed<T>::constants_size(const Splines<T>& splines) const {
  const std::int64_t size = splines.size[0] + splines.size[1] + splines.size[2];
  return size == 0 ? 0 : round_up(size, lanes_) + lanes_;  // vectors are read from any of them on
}

template <class T>
bool Packed<T>::is_plain() const {
  const bool in_order = program_.data_place == nullptr && program_.latent_place == nullptr;
  return in_order && program_.context_size == 0 && !program_.gathers &&
         std::all_of(layers_.begin(), layers_.end(), [](const Layer<T>& layer) { return layer.plain; });
}

template <class T>
void Packed<T>::place_rest(const FlowSpec& spec) {
  const auto padded = static_cast<std::size_t>(round_up(spec.input_size, lanes_));
  identity_.assign(2 * padded, T(0));
  std::fill(identity_.begin() + static_cast<std::ptrdiff_t>(padded), identity_.end(), T(1));
  rest_layers_ = layers_;
  rest_layers_.front().mean = identity_.data();
  rest_layers_.front().std = rest_layers_.front().inverse_std = identity_.data() + padded;
  rest_ = program_;
  rest_.layers = rest_layers_.data();
}

template <class T>
void Packed<T>::keep_narrow() {
  std::int64_t size = 0;
  for (Dense<T>& d : dense_) {
    if (d.in == 0) continue;                            // all of it is the context's
    const std::int64_t whole = (d.in - 1) / d.segment;  // segments before the last
    d.narrow_words = whole * ((d.segment + 1) / 2) + (d.in - whole * d.segment + 1) / 2;
    size += round_up(d.out, lanes_) * d.narrow_words;
  }
  auto* next = static_cast<std::uint32_t*>(narrow_.reserve(size * static_cast<std::int64_t>(sizeof(std::uint32_t))));
  std::memset(next, 0, static_cast<std::size_t>(size) * sizeof(std::uint32_t));
  for (Dense<T>& d : dense_) {
    d.narrow = next;
    next += round_up(d.out, lanes_) * d.narrow_words;
  }
}

/// The program holds pointers into the vectors: they may not grow while layers are added.
template <class T>
void Packed<T>::reserve(const Lowered& lowered) {
  std::size_t num_dense = 0, num_gradients = 0, num_affines = 0;
  for (const LoweredLayer& layer : lowered.layers) {
    for (const LoweredNetwork& network : networks_of(layer)) {
      num_dense += network.dense.size() + network.gates.size() + (network.context ? 1 : 0);
      num_gradients += network.gates.size();
      num_affines += network.affines.size();
      for (const LoweredDense& dense : network.dense) num_gradients += dense.parts.size();
      if (network.context) num_gradients += network.context->parts.size();
    }
  }
  dense_.reserve(num_dense);
  sources_.reserve(num_dense);
  gradients_.reserve(num_gradients);
  affines_.reserve(num_affines);
  layers_.reserve(lowered.layers.size());
}

/// Places that the program points to; null: their own indices.
template <class T>
const std::int64_t* Packed<T>::keep(const std::vector<std::int64_t>& places) {
  return places.empty() ? nullptr : places_.emplace_back(places).data();
}

template <class T>
FeatureRows Packed<T>::rows_of(const Places& places) {
  if (!places.index.empty()) program_.gathers = true;
  return {places.begin, places.count, keep(places.index)};
}

template <class T>
void Packed<T>::add_dense(const LoweredDense& from) {
  dense_.push_back({nullptr, nullptr, nullptr, from.in, from.out(), segment_of(from.in)});
  program_.max_width = std::max({program_.max_width, from.in, from.out()});
  DenseSource source{};
  for (std::size_t part = 0; part < from.parts.size(); ++part) {
    const DensePart& tensors = from.parts[part];
    source.kernel[part] = tensors.kernel;
    source.bias[part] = tensors.bias;
    source.columns[part] = tensors.columns;
    gradients_.push_back({tensors.columns, tensors.kernel, tensors.bias});
  }
  sources_.push_back(source);
}

template <class T>
Network<T> Packed<T>::add_network(const LoweredNetwork& from) {
  Network<T> network;
  network.activation = from.activation;
  network.layer_norm = from.layer_norm;
  network.kind = from.kind;
  network.dense = dense_.data() + dense_.size();
  network.gradients = gradients_.data() + gradients_.size();
  network.num_dense = static_cast<std::int32_t>(from.dense.size());
  network.num_heads = static_cast<std::int32_t>(from.dense.back().parts.size());
  for (const LoweredDense& dense : from.dense) add_dense(dense);
  dense_[dense_.size() - from.dense.size()].paired = 2 * from.dense.front().in <= lanes_;
  if (has_blocks(from.kind)) program_.kept_width = std::max(program_.kept_width, network.dense->out);
  if (!from.affines.empty()) network.affines = affines_.data() + affines_.size();
  for (const LoweredAffine& map : from.affines) {
    affines_.push_back({nullptr, nullptr, network.dense->out, map.scale, map.shift});
  }
  if (from.context) {
    network.context = dense_.data() + dense_.size();
    network.context_gradients = gradients_.data() + gradients_.size();
    add_dense(*from.context);
    network.fold = program_.fold_size;
    program_.fold_size += round_up(from.context->out(), lanes_);
  }
  if (!from.gates.empty()) {
    network.gates = dense_.data() + dense_.size();
    network.gate_gradients = gradients_.data() + gradients_.size();
    network.gate_fold = program_.fold_size;
    for (const LoweredDense& gate : from.gates) {
      add_dense(gate);
      program_.fold_size += round_up(gate.out(), lanes_);
    }
  }
  return network;
}

/// What couplings and splines have in common.
template <class T>
template <class From>
Layer<T> Packed<T>::layer_of(Kind kind, const From& from) {
  Layer<T> layer;
  layer.kind = kind;
  layer.inverse = from.inverse;
  layer.place = keep(from.place);
  layer.a = rows_of(from.conditioning);
  layer.b = rows_of(from.transformed);
  for (const LoweredNetwork& network : from.networks) layer.network[layer.num_networks++] = add_network(network);
  return layer;
}

template <class T>
void Packed<T>::add(const LoweredCoupling& from) {
  Layer<T> layer = layer_of(Kind::coupling, from);
  layer.scale = scale_of<T>(from.scale);
  if (from.scale.function != ScaleFunction::none && from.scale.function != ScaleFunction::tanh) {
    // s and the scale of a row lie side by side in one buffer.
    program_.max_width = std::max(program_.max_width, 2 * round_up(from.transformed.count, lanes_));
  }
  if (layer.num_networks > 1) {
    program_.max_width = std::max(program_.max_width, 2 * layer.b.count);
    program_.kept_width = std::max(program_.kept_width, layer.b.count);
  }
  const Network<T>& net = layer.network[0];
  layer.plain = layer.scale.function == ScaleFunction::tanh && layer.num_networks == 1 &&
                net.kind == NetworkKind::mlp && !net.layer_norm && net.context == nullptr;
  layers_.push_back(layer);
}

template <class T>
void Packed<T>::add(const LoweredDiagonal& from) {
  Layer<T> layer;
  layer.kind = Kind::diagonal;
  layer.plain = true;
  layer.inverse = from.inverse;
  layer.place = keep(from.place);
  if (layer.place != nullptr) {
    std::vector<std::int64_t> feature(from.place.size());
    for (std::size_t j = 0; j < feature.size(); ++j) {
      feature[static_cast<std::size_t>(from.place[j])] = static_cast<std::int64_t>(j);
    }
    layer.feature = keep(feature);
  }
  layer.b.count = program_.input_size;
  layer.mean_offset = from.mean;
  layer.log_std_offset = from.log_std;
  diagonal_.push_back(layers_.size());
  layers_.push_back(layer);
}

template <class T>
void Packed<T>::add(const LoweredLinear& from) {
  const std::int64_t features = program_.input_size;
  Layer<T> layer;
  layer.kind = Kind::linear;
  layer.inverse = from.inverse;
  layer.place = keep(from.in_place);
  layer.b.count = features;
  Linear<T>& linear = matrices_.emplace_back(from, features, lanes_, segment_of(features)).linear();
  linear.products = program_.products;
  layer.linear = &linear;
  program_.products += products_size(features);
  program_.max_width = std::max(program_.max_width, features);
  linear_.push_back(layers_.size());
  layers_.push_back(layer);
}

template <class T>
void Packed<T>::add(const LoweredSpline& from) {
  Layer<T> layer = layer_of(Kind::spline, from);
  Splines<T>& splines = splines_.emplace_back();
  splines.map = map_of<T>(from.spline);
  splines.parameters = from.spline.num_parameters();
  for (std::size_t part = 0; part < from.constants.size(); ++part) {
    splines.offset[part] = from.constants[part].offset;
    splines.size[part] = from.constants[part].size;
  }
  layer.splines = &splines;
  // Of a few rows all numbers of a spline lie side by side in one buffer, with what it makes of them, as whole vectors.
  program_.max_width =
      std::max(program_.max_width, (splines.parameters + 3) * from.transformed.count + kSplineVectors * lanes_);
  layers_.push_back(layer);
}

template <class T>
void Packed<T>::choose_tiles(const Kernels<T>& kernels, bool wide_blocks) {
  const auto units = [](std::int64_t target, std::int64_t elements_of_unit, std::int64_t most) {
    return std::clamp<std::int64_t>(target / (elements_of_unit * static_cast<std::int64_t>(sizeof(T))), 1, most);
  };
  for (Layer<T>& layer : layers_) {
    const TapeSize size = kernels.layer_tape(layer);
    layer.tape_begin = program_.tape;
    program_.tape.row += size.row;
    program_.tape.unit += size.unit;
  }
  const std::int64_t row_unit = wide_blocks ? kernels.wide_row_unit : kernels.row_unit;
  program_.tile_rows = row_unit;
  for (const Dense<T>& d : dense_) transposed_size_ += round_up(d.in, lanes_) * d.out;
  // A call reads one of a linear layer's two matrices.
  const std::int64_t square = round_up(program_.input_size, lanes_) * program_.input_size;
  const std::int64_t matrices = static_cast<std::int64_t>(matrices_.size()) * square;
  const std::int64_t weights = (transposed_size_ + matrices) * static_cast<std::int64_t>(sizeof(T));
  transposed_size_ += 2 * matrices;
  program_.few_at_once = weights > kNearBytes;
  each_dense([&](Dense<T>& d) { d.far = weights > kFarBytes, d.wide_blocks = wide_blocks; });
  program_.tile_rows =
      row_unit * units(std::max(kTileBytes, weights / kWeightsPerTile), kernels.transform_scratch(program_),
                       program_.few_at_once ? kMaxRowUnitsOfLarge : kMaxRowUnits);
  program_.gradient_rows = kGradientUnit * units(std::max(kTapeBytes, weights * kTapePerWeights),
                                                 kernels.tape_size(program_, kGradientUnit), kMaxGradientUnits);
}

template <class T>
void Packed<T>::pack(const T* parameters, bool transposed, int threads, const float* mean_low) {
  if (transposed) place_transposed();
  for (std::size_t i = 0; i < dense_.size(); ++i) {
    Dense<T>& d = dense_[i];
    pack_bias(sources_[i], d, parameters);
    const std::int64_t inputs = round_up(kPackSize / d.out + 1, kBand);  // that are worth a thread
    parallel_for(d.in, inputs, threads, [&](std::int64_t begin, std::int64_t end) {
      pack_inputs(sources_[i], d, parameters, begin, end, transposed ? const_cast<T*>(d.transposed) : nullptr);
    });
    if constexpr (sizeof(T) == 4) {
      if (d.narrow != nullptr) narrow(d);
    }
  }
  for (const BlockAffine<T>& map : affines_) {
    std::copy_n(parameters + map.scale_offset, map.width, const_cast<T*>(map.scale));
    std::copy_n(parameters + map.shift_offset, map.width, const_cast<T*>(map.shift));
  }
  for (const std::size_t index : diagonal_) pack_diagonal(layers_[index], parameters);
  base_.pack(parameters);
  program_.base = rest_.base = base_.density();
  if (!context_statistics_.empty()) pack_context(parameters);
  for (const Splines<T>& splines : splines_) pack_constants(splines, parameters);
  for (std::size_t i = 0; i < linear_.size(); ++i) {
    pack_linear(layers_[linear_[i]], matrices_[i], parameters, transposed, threads);
  }
  if (!rest_layers_.empty() && !transposed) pack_rest(parameters, mean_low);
  transposed_ready_.store(transposed, std::memory_order_relaxed);
}

template <class T>
void Packed<T>::pack_bias(const DenseSource& source, Dense<T>& dense, const T* parameters) {
  T* bias = const_cast<T*>(dense.bias);
  for (int part = 0; part < kMaxHeads; bias += source.columns[part], ++part) {
    if (source.columns[part] > 0 && source.bias[part] >= 0) {
      std::copy_n(parameters + source.bias[part], source.columns[part], bias);
    }
  }
}

/// Inputs [begin, end); transposed: where Dense::transposed goes as well, or null. In bands of a few inputs: each is
/// read from its beginning to its end, as the processor expects it, and transposed while it is in the cache.
template <class T>
void Packed<T>::pack_inputs(const DenseSource& source, Dense<T>& dense, const T* parameters, std::int64_t begin,
                            std::int64_t end, T* transposed) {
  for (std::int64_t i = begin; i < end; i += kBand) {
    const std::int64_t last = std::min(end, i + kBand);
    std::int64_t first = 0;
    for (int part = 0; part < kMaxHeads; first += source.columns[part], ++part) {
      pack_kernel(dense, parameters + source.kernel[part], first, source.columns[part], i, last);
    }
    if (transposed != nullptr) transpose_(dense, i, last, transposed);
  }
}

/// Inputs [begin, end) of kernel [in][n] to outputs first .. first + n of the packed weights.
template <class T>
void Packed<T>::pack_kernel(const Dense<T>& dense, const T* kernel, std::int64_t first, std::int64_t n,
                            std::int64_t begin, std::int64_t end) {
  T* weights = const_cast<T*>(dense.weights);
  for (std::int64_t o = first; o < first + n;) {
    // Outputs [o, last) of this tensor lie in one block of the packed weights.
    const std::int64_t block = o / lanes_, last = std::min(first + n, (block + 1) * lanes_);
    T* to = weights + (block * dense.in + begin) * lanes_ + o % lanes_;
    const T* from = kernel + begin * n + (o - first);
    if (lanes_ * static_cast<std::int64_t>(sizeof(T)) == 64) {
      copy_rows<64 / sizeof(T)>(from, n, to, lanes_, end - begin, last - o);
    } else {
      copy_rows<32 / sizeof(T)>(from, n, to, lanes_, end - begin, last - o);
    }
    o = last;
  }
}

template <class T>
void Packed<T>::narrow(Dense<T>& d) {
  const std::int64_t segment_words = (d.segment + 1) / 2;
  T* from = const_cast<T*>(d.weights);
  for (std::int64_t block = 0; block < d.out; block += lanes_) {
    auto* words = const_cast<std::uint32_t*>(d.narrow) + block * d.narrow_words;
    for (std::int64_t i = 0; i < d.in; ++i) {
      const std::int64_t within = i % d.segment;
      std::uint32_t* to = words + (i / d.segment * segment_words + within / 2) * lanes_;
      for (std::int64_t lane = 0; lane < lanes_; ++lane, ++from) {
        const std::uint32_t rounded = to_bfloat16(static_cast<float>(*from));
        to[lane] = within % 2 == 0 ? rounded : to[lane] | rounded << 16;
        *from = std::bit_cast<float>(rounded << 16);
      }
    }
  }
}

template <class T>
void Packed<T>::pack_diagonal(Layer<T>& layer, const T* parameters) {
  double sum = 0;
  for (std::int64_t j = 0; j < program_.input_size; ++j) {
    const auto log_std = static_cast<double>(parameters[layer.log_std_offset + j]);
    const std::int64_t row = layer.place == nullptr ? j : layer.place[j];
    const_cast<T*>(layer.mean)[row] = parameters[layer.mean_offset + j];
    const_cast<T*>(layer.std)[row] = static_cast<T>(std::exp(log_std));
    const_cast<T*>(layer.inverse_std)[row] = static_cast<T>(std::exp(-log_std));
    sum += log_std;
  }
  layer.log_det = static_cast<T>(-sum);
}

/// In double, rounded once.
template <class T>
void Packed<T>::pack_context(const T* parameters) {
  for (std::int64_t i = 0; i < program_.context_size; ++i) {
    const auto log_std = static_cast<double>(parameters[program_.context_log_std_offset + i]);
    context_statistics_[static_cast<std::size_t>(i)] = parameters[program_.context_mean_offset + i];
    context_statistics_[static_cast<std::size_t>(program_.context_size + i)] = static_cast<T>(std::exp(-log_std));
  }
}

template <class T>
void Packed<T>::pack_constants(const Splines<T>& splines, const T* parameters) {
  T* to = const_cast<T*>(splines.constants);
  for (int part = 0; part < kMaxHeads; to += splines.size[part], ++part) {
    if (splines.size[part] > 0) std::copy_n(parameters + splines.offset[part], splines.size[part], to);
  }
}

template <class T>
void Packed<T>::pack_linear(Layer<T>& layer, LuMatrix<T>& matrix, const T* parameters, bool training, int threads) {
  const Linear<T>& linear = matrix.linear();
  matrix.pack(parameters, !training || !layer.inverse, !training || layer.inverse, threads);
  layer.log_det = matrix.log_det();
  if (!training) return;
  const Dense<T>& dense = layer.inverse ? linear.inverse : linear.forward;
  transpose_(dense, 0, dense.in, const_cast<T*>(dense.transposed));
}

template <class T>
void Packed<T>::pack_rest(const T* parameters, const float* mean_low) {
  if constexpr (sizeof(T) == 4) {
    const Layer<T>& layer = layers_.front();
    first_.set(program_.input_size, parameters + layer.mean_offset, parameters + layer.log_std_offset, mean_low);
  }
  for (std::size_t k = 0; k < layers_.size(); ++k) rest_layers_[k].log_det = layers_[k].log_det;
}

/// Readers that do not want gradients never look at these pointers.
template <class T>
void Packed<T>::place_transposed() const {
  T* next = static_cast<T*>(transposed_.reserve(transposed_size_ * static_cast<std::int64_t>(sizeof(T))));
  each_dense([&](const Dense<T>& d) {
    const_cast<Dense<T>&>(d).transposed = next;
    next += round_up(d.in, lanes_) * d.out;
  });
}

template <class T>
void Packed<T>::ensure_transposed() const {
  if (transposed_ready_.load(std::memory_order_acquire)) return;
  const std::lock_guard<ForkSafeMutex> lock(transpose_mutex_);
  if (transposed_ready_.load(std::memory_order_relaxed)) return;
  place_transposed();
  each_dense([&](const Dense<T>& d) { transpose_(d, 0, d.in, const_cast<T*>(d.transposed)); });
  transposed_ready_.store(true, std::memory_order_release);
}

template class Packed<float>;
template class Packed<double>;

}  // namespace nvpflow::cpu
