#include "packed.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <variant>

#include <nvpflow/error.hpp>
#include <nvpflow/spec.hpp>

#include "../cpp/src/lower.hpp"
#include "kernels.cuh"
#include "runtime.hpp"

namespace nvpflow::cuda {
namespace {

constexpr std::int64_t kUploadBytes = 16 << 20;

void refuse_on_cuda(bool there, const std::string& what) {
  if (there) throw Error(ErrorCode::unavailable, what + " is in the spec, which CUDA does not compute yet; use 'cpu'");
}

void refuse_unavailable(const LoweredNetwork& network) {
  refuse_on_cuda(network.residual, "a residual network");
  refuse_on_cuda(network.layer_norm, "layer_norm");
}

void refuse_unavailable(const LoweredCoupling& layer, std::int64_t input_size) {
  refuse_on_cuda(layer.inverse, "a coupling with inverse: true");
  refuse_on_cuda(layer.networks.size() > 1, "a network for each head");
  for (const LoweredNetwork& network : layer.networks) refuse_unavailable(network);
  refuse_on_cuda(layer.scale.function == ScaleFunction::none, "an additive coupling");
  refuse_on_cuda(layer.scale.function != ScaleFunction::tanh || layer.scale.factor != layer.scale.divisor,
                 "a log-scale other than B tanh(u / B)");
  const Places& a = layer.conditioning;
  const bool first = a.begin == 0 && a.count == input_size / 2;
  const bool second = a.begin == input_size / 2 && a.count == input_size - input_size / 2;
  const bool listed = !a.index.empty() || !layer.transformed.index.empty() || !layer.place.empty();
  refuse_on_cuda(!(first || second) || listed, "a coupling of other features than halves");
}

void refuse_unavailable(const LoweredDiagonal& layer, std::int64_t) {
  refuse_on_cuda(layer.inverse, "an actnorm layer");
}

void refuse_unavailable(const LoweredLinear&, std::int64_t) { refuse_on_cuda(true, "a layer of kind lu_linear"); }

/// What the kernels do not compute: each by its name.
void refuse_unavailable(const Lowered& lowered) {
  refuse_on_cuda(lowered.context_size > 0, "a context");
  for (const LoweredLayer& layer : lowered.layers) {
    std::visit([&](const auto& kind) { refuse_unavailable(kind, lowered.input_size); }, layer);
  }
  refuse_on_cuda(!lowered.data_place.empty() || !lowered.latent_place.empty(), "a permutation");
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
  host_.input_size = static_cast<std::int32_t>(spec.input_size);
  host_.num_parameters = layout.size();
  const Lowered lowered = lower(spec, layout);
  refuse_unavailable(lowered);
  for (const LoweredLayer& layer : lowered.layers) {
    std::visit([&](const auto& kind) { add(kind); }, layer);
  }
  host_.num_layers = static_cast<std::int32_t>(layers_.size());
  host_.num_dense = static_cast<std::int32_t>(dense_.size());
  host_.layers = layers_.data();
  host_.dense = dense_.data();
  packed_from_.assign(static_cast<std::size_t>(host_.packed_size), -1);
  transposed_from_.assign(static_cast<std::size_t>(host_.transposed_size), -1);
  for (std::size_t i = 0; i < dense_.size(); ++i) fill_sources(dense_[i], heads_[i]);

  const auto send = [&](Memory& to, const auto& from, const char* what) {
    upload(to, from.data(), static_cast<std::int64_t>(from.size() * sizeof(from[0])), what, stream);
  };
  send(device_layers_, layers_, "the flow's layers");
  send(device_dense_, dense_, "the flow's layers");
  send(packed_source_, packed_from_, "the order of the packed parameters");
  send(transposed_source_, transposed_from_, "the order of the packed parameters");
  packed_from_ = {};
  transposed_from_ = {};
  device_ = host_;
  device_.layers = static_cast<const Layer<T>*>(device_layers_.data());
  device_.dense = static_cast<const Dense*>(device_dense_.data());
}

template <class T>
void Layers<T>::add_dense(const LoweredDense& from) {
  const std::int64_t in = from.in, out = from.out();
  Dense dense;
  dense.in = static_cast<std::int32_t>(in);
  dense.out = static_cast<std::int32_t>(out);
  for (std::size_t part = 0; part < from.parts.size(); ++part) {
    dense.kernel_offset[part] = from.parts[part].kernel;
    dense.bias_offset[part] = from.parts[part].bias;
  }
  dense.weights = host_.packed_size;
  dense.bias = dense.weights + weight_size(in, out);
  host_.packed_size = dense.bias + bias_size(out);
  dense.transposed = host_.transposed_size;
  host_.transposed_size += weight_size(out, in);
  dense_.push_back(dense);
  heads_.push_back(from.parts.size() > 1);
}

template <class T>
void Layers<T>::add(const LoweredCoupling& from) {
  Layer<T> layer;
  layer.kind = Kind::coupling;
  layer.condition = from.conditioning.begin == 0 ? 0 : 1;
  const LoweredNetwork& network = from.networks.front();
  layer.activation = network.activation;
  layer.first_dense = static_cast<std::int32_t>(dense_.size());
  layer.num_dense = static_cast<std::int32_t>(network.dense.size());
  layer.bound = static_cast<T>(from.scale.factor);
  layer.inverse_bound = static_cast<T>(1.0 / from.scale.factor);
  for (const LoweredDense& dense : network.dense) add_dense(dense);
  layers_.push_back(layer);
}

template <class T>
void Layers<T>::add(const LoweredLinear&) {}  // refused

template <class T>
void Layers<T>::add(const LoweredDiagonal& from) {
  Layer<T> layer;
  layer.kind = Kind::diagonal;
  layer.mean_offset = from.mean;
  layer.log_std_offset = from.log_std;
  layer.affine = host_.packed_size;
  host_.packed_size += affine_size(host_.input_size);
  layers_.push_back(layer);
  ++num_diagonal_;
}

/// The head's outputs alternate between scale and translation.
template <class T>
void Layers<T>::fill_sources(const Dense& dense, bool head) {
  const std::int64_t parts = head ? 2 : 1, columns = dense.out / parts;
  for (std::int64_t o = 0; o < dense.out; ++o) {
    const std::int64_t part = o % parts, column = o / parts;
    packed_from_[static_cast<std::size_t>(dense.bias + o)] = dense.bias_offset[part] + column;
    for (std::int64_t i = 0; i < dense.in; ++i) {
      const std::int64_t from = dense.kernel_offset[part] + i * columns + column;
      packed_from_[static_cast<std::size_t>(dense.weights + weight_index(i, o, dense.in))] = from;
      transposed_from_[static_cast<std::size_t>(dense.transposed + weight_index(o, i, dense.out))] = from;
    }
  }
}

template <class T>
Packed<T>::Packed(std::shared_ptr<const Layers<T>> layers)
    : layers_(std::move(layers)), program_(layers_->on_device()) {
  const auto bytes = [](std::int64_t elements) { return elements * static_cast<std::int64_t>(sizeof(T)); };
  program_.packed = static_cast<const T*>(packed_.reserve(bytes(program_.packed_size), "packed parameters"));
  program_.transposed =
      static_cast<const T*>(transposed_.reserve(bytes(program_.transposed_size), "transposed parameters"));
}

template <class T>
void Packed<T>::pack(const T* parameters, Stream stream) {
  launch_on(stream, "packing parameters", [layers = layers_, program = program_, parameters, stream] {
    return launch_pack(&program, layers->num_diagonal(), layers->packed_source(), program.packed_size, parameters,
                       const_cast<T*>(program.packed), stream);
  });
  launch_on(stream, "packing parameters", [layers = layers_, program = program_, parameters, stream] {
    return launch_pack<T>(nullptr, 0, layers->transposed_source(), program.transposed_size, parameters,
                          const_cast<T*>(program.transposed), stream);
  });
}

template <class T>
void Packed<T>::pack_rest(T* parameters, const float* of_host, const float* mean_low, Stream stream) {
  const std::int64_t features = program_.input_size, element = sizeof(T);
  first_.set(features, of_host, of_host + features, mean_low);
  rest_ = program_;
  T* to = static_cast<T*>(rest_packed_.reserve(program_.packed_size * element, "packed parameters"));
  rest_.packed = to;
  fill_zero(parameters, 2 * features * element, stream);  // mean and log_std: the identity
  launch_on(stream, "packing parameters", [layers = layers_, program = rest_, parameters, to, stream] {
    return launch_pack(&program, layers->num_diagonal(), layers->packed_source(), program.packed_size, parameters, to,
                       stream);
  });
  const std::int64_t log_det = layers_->on_host().layers[0].affine + 3 * features;
  copy_on_device(to + log_det, program_.packed + log_det, element, stream);
}

template class Layers<float>;
template class Layers<double>;
template class Packed<float>;
template class Packed<double>;

}  // namespace nvpflow::cuda
