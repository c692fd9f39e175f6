// KERNEL: the parameters in the layout of the other kernels, and the numbers that follow from them.
//
// It reads an index of 8 bytes and gathers 4 for each element of 4 bytes.

#include "base_numbers.cuh"
#include "context.cuh"
#include "diagonal.cuh"

namespace nvpflow::cuda {
namespace {

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
Status launch_pack(const Program<T>* program, const std::int64_t* source, std::int64_t count, const T* parameters,
                   T* packed, Stream stream) {
  if (const Status s =
          launch(pack_kernel<T>, element_blocks(count), kThreads, 0, stream, source, count, parameters, packed))
    return s;
  if (program == nullptr || program->num_numbers == 0) return 0;
  return launch(pack_numbers_kernel<T>, 1, kThreads, 0, stream, *program, parameters, packed);
}

template Status launch_pack(const Program<float>*, const std::int64_t*, std::int64_t, const float*, float*, Stream);
template Status launch_pack(const Program<double>*, const std::int64_t*, std::int64_t, const double*, double*, Stream);

}  // namespace nvpflow::cuda
