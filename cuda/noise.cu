// KERNEL: noise of the base.
//
// One Philox call gives 4 float or 2 double numbers; of normal ones about 30 integer and 40 floating-point operations a
// pair, 4 bytes written a float: bound by arithmetic on recent devices, near the memory's rate.

#include "base.cuh"

namespace nvpflow::cuda {
namespace {

template <class T>
NVPFLOW_KERNEL(kThreads)
mixture_noise_kernel(NVPFLOW_ARGUMENT BaseDensity<T> base, const std::int64_t features, const std::uint64_t seed,
                     const std::uint64_t first_row, const std::int64_t rows, T* z) {
  for (std::int64_t r = first_element(); r < rows; r += element_step()) {
    mixture_noise(base, seed, first_row + static_cast<std::uint64_t>(r), static_cast<int>(features),
                  [&](int f) -> T& { return z[r * features + f]; });
  }
}

template <class T>
NVPFLOW_KERNEL(kThreads)
noise_kernel(NVPFLOW_ARGUMENT BaseDensity<T> base, const std::int64_t features, const std::uint64_t seed,
             const std::uint64_t first_row, const std::int64_t rows, T* z) {
  constexpr int kColumns = kNoiseColumns<T>;
  const std::int64_t width = ceil_div(features, kColumns), size = rows * width;
  for (std::int64_t e = first_element(); e < size; e += element_step()) {
    const std::int64_t r = e / width, block = e - r * width;
    T numbers[kColumns];
    visit_base(base, [&]<BaseKind kind>(OfBase<kind> of) {
      if constexpr (kind != BaseKind::mixture) {
        noise_block(of, base, seed, first_row + static_cast<std::uint64_t>(r), static_cast<unsigned>(block), numbers);
      }
    });
    NVPFLOW_UNROLL
    for (int i = 0; i < kColumns; ++i) {
      const std::int64_t f = block * kColumns + i;
      if (f < features) z[r * features + f] = numbers[i];
    }
  }
}

}  // namespace

template <class T>
Status launch_noise(const BaseDensity<T>& base, std::int64_t input_size, std::uint64_t seed, std::uint64_t first_row,
                    std::int64_t rows, T* z, Stream stream) {
  if (base.kind == BaseKind::mixture) {
    return launch(mixture_noise_kernel<T>, element_blocks(rows), kThreads, 0, stream, base, input_size, seed, first_row,
                  rows, z);
  }
  const std::int64_t calls = rows * ceil_div(input_size, kNoiseColumns<T>);
  return launch(noise_kernel<T>, element_blocks(calls), kThreads, 0, stream, base, input_size, seed, first_row, rows,
                z);
}

template Status launch_noise(const BaseDensity<float>&, std::int64_t, std::uint64_t, std::uint64_t, std::int64_t,
                             float*, Stream);
template Status launch_noise(const BaseDensity<double>&, std::int64_t, std::uint64_t, std::uint64_t, std::int64_t,
                             double*, Stream);

}  // namespace nvpflow::cuda
