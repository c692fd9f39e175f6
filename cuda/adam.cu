// KERNEL: one Adam update (Kingma and Ba 2015) with decoupled weight decay (Loshchilov and Hutter 2019), and the copy
// of the parameters into the layout of the other kernels.
//
// Adam reads 4 and writes 3 arrays once, 28 bytes a float parameter and one more that says what to do with it; about 12
// FLOPs: bound by memory, or by L2 where the arrays fit. Packing reads an index of 8 bytes and gathers 4 for each
// element of 4 bytes.

#include "base_numbers.cuh"
#include "context.cuh"
#include "diagonal.cuh"
#include "elementary.cuh"

namespace nvpflow::cuda {
namespace {

/// What the gradients are multiplied by: NaN where the norm is not finite, so that nothing is updated.
template <class T>
NVPFLOW_DEVICE double factor_of(const AdamCall<T>& call) {
  const double factor = call.coefficients.gradient_factor;
  if (call.norm_squared == nullptr) return factor;
  const double norm = square_root(*call.norm_squared);
  if (!is_finite(norm)) return not_a_number<double>();
  return call.clip_norm > 0 && norm > call.clip_norm ? factor * (call.clip_norm / norm) : factor;
}

template <class T>
NVPFLOW_KERNEL(kThreads)
adam_kernel(NVPFLOW_ARGUMENT AdamCall<T> call) {
  const AdamCoefficients& c = call.coefficients;
  const double scale = factor_of(call);
  if (call.norm_squared != nullptr && scale != scale) return;
  const T factor = static_cast<T>(scale);
  const T beta1 = static_cast<T>(c.beta1), beta2 = static_cast<T>(c.beta2);
  const T rest1 = static_cast<T>(1 - c.beta1), rest2 = static_cast<T>(1 - c.beta2);
  const T correction = static_cast<T>(c.root_correction), epsilon = static_cast<T>(c.epsilon);
  const T step = static_cast<T>(c.step_size), keep_decayed = static_cast<T>(1 - c.decay);
  for (std::int64_t i = first_element(); i < call.count; i += element_step()) {
    const Update update = call.updates == nullptr ? Update::decayed : call.updates[i];
    if (update == Update::none) continue;
    const T keep = update == Update::decayed ? keep_decayed : T(1);
    const T g = call.gradient[i] * factor;
    const T m = multiply_add(beta1, call.first_moment[i], rest1 * g);
    const T v = multiply_add(beta2, call.second_moment[i], rest2 * (g * g));
    const T change = step * m / multiply_add(square_root(v), correction, epsilon);
    call.first_moment[i] = m;
    call.second_moment[i] = v;
    call.parameters[i] = multiply_add(call.parameters[i], keep, -change);
  }
}

template <class T>
NVPFLOW_KERNEL(kThreads)
pack_kernel(const std::int64_t* source, const std::int64_t count, const T* parameters, T* packed) {
  for (std::int64_t i = first_element(); i < count; i += element_step()) {
    packed[i] = source[i] < 0 ? T(0) : parameters[source[i]];
  }
}

template <class T>
NVPFLOW_DEVICE void pack_numbers(Of<Kind::coupling>, const Program<T>&, const Layer<T>&, const T*, T*) {}
template <class T>
NVPFLOW_DEVICE void pack_numbers(Of<Kind::spline>, const Program<T>&, const Layer<T>&, const T*, T*) {}
template <class T>
NVPFLOW_DEVICE void pack_numbers(Of<Kind::diagonal>, const Program<T>& program, const Layer<T>& layer,
                                 const T* parameters, T* packed) {
  pack_diagonal(program, layer, parameters, packed);
}

template <class T>
NVPFLOW_DEVICE void pack_numbers(Of<Kind::linear>, const Program<T>& program, const Layer<T>& layer,
                                 const T* parameters, T* packed) {
  if (thread_index() != 0) return;
  double sum = 0;
  for (int f = 0; f < program.input_size; ++f) sum += static_cast<double>(parameters[layer.factors.log_diagonal + f]);
  packed[layer.log_det] = static_cast<T>(sum);
}

/// One block: the numbers of all layers that are no copies of parameters.
template <class T>
NVPFLOW_KERNEL(kThreads)
pack_numbers_kernel(NVPFLOW_ARGUMENT Program<T> program, const T* parameters, T* packed) {
  for (int k = 0; k < program.num_layers; ++k) {
    const Layer<T>& layer = program.layers[k];
    visit(layer, [&](auto kind) { pack_numbers(kind, program, layer, parameters, packed); });
  }
  if (program.context_statistics >= 0) pack_context(program, parameters, packed);
  if (program.base_numbers >= 0) pack_base(program, parameters, packed + program.base_numbers);
}

}  // namespace

template <class T>
Status launch_adam(const AdamCall<T>& call, Stream stream) {
  return launch(adam_kernel<T>, element_blocks(call.count), kThreads, 0, stream, call);
}

template <class T>
Status launch_pack(const Program<T>* program, const std::int64_t* source, std::int64_t count, const T* parameters,
                   T* packed, Stream stream) {
  if (const Status s =
          launch(pack_kernel<T>, element_blocks(count), kThreads, 0, stream, source, count, parameters, packed))
    return s;
  if (program == nullptr || program->num_numbers == 0) return 0;
  return launch(pack_numbers_kernel<T>, 1, kThreads, 0, stream, *program, parameters, packed);
}

template Status launch_adam(const AdamCall<float>&, Stream);
template Status launch_adam(const AdamCall<double>&, Stream);
template Status launch_pack(const Program<float>*, const std::int64_t*, std::int64_t, const float*, float*, Stream);
template Status launch_pack(const Program<double>*, const std::int64_t*, std::int64_t, const double*, double*, Stream);

}  // namespace nvpflow::cuda
