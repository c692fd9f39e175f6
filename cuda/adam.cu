// KERNEL: one Adam update (Kingma and Ba 2015) with decoupled weight decay (Loshchilov and Hutter 2019).
//
// It reads 4 and writes 3 arrays once, 28 bytes a float parameter and one more that says what to do with it; about 12
// FLOPs: bound by memory, or by L2 where the arrays fit.

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

}  // namespace

template <class T>
Status launch_adam(const AdamCall<T>& call, Stream stream) {
  return launch(adam_kernel<T>, element_blocks(call.count), kThreads, 0, stream, call);
}

template Status launch_adam(const AdamCall<float>&, Stream);
template Status launch_adam(const AdamCall<double>&, Stream);

}  // namespace nvpflow::cuda
