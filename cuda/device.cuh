// Everything that depends on the hardware: indices, barriers, shuffles, shared memory, asynchronous copies, matrix
// fragments. Kernels use nothing else of CUDA, so that tests can put another implementation (tests/cpp/simt.hpp, with
// NVPFLOW_SIMT defined) in its place and run them on a host.
//
// Kernels are compiled with -fmad=false: fused multiply-adds are written out, so that one formula gives the same bits
// wherever the compiler inlines it.
#pragma once

#include "kernels.hpp"
#include "plan.hpp"

#if defined(NVPFLOW_SIMT)
#include "simt.hpp"
#define NVPFLOW_DEVICE inline
#define NVPFLOW_KERNEL(threads) void
#define NVPFLOW_UNROLL
#define NVPFLOW_ROLLED
#define NVPFLOW_ARGUMENT const
#else
#include <cuda_runtime.h>
#define NVPFLOW_DEVICE __device__ __forceinline__
#define NVPFLOW_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define NVPFLOW_UNROLL _Pragma("unroll")
#define NVPFLOW_ROLLED _Pragma("unroll 1")
#define NVPFLOW_ARGUMENT const __grid_constant__  // read where it is, not copied to a thread's local memory
#endif

namespace nvpflow::cuda {

inline constexpr int kThreads = 256;                 // of a block of the kernels that go element by element
inline constexpr std::int64_t kMaxBlocks = 1 << 16;  // and blocks of them at most

/// Four elements that move together: 16 bytes of float, twice 16 of double.
template <class T>
struct alignas(16) Vec4 {
  T x, y, z, w;
};

/// Two of them.
template <class T>
struct alignas(2 * sizeof(T)) Vec2 {
  T x, y;
};

#if !defined(NVPFLOW_SIMT)

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
inline constexpr bool kHasMatrixUnits = false;  // for TF32 and bfloat16
#else
inline constexpr bool kHasMatrixUnits = true;
#endif

// ---- the grid ----------------------------------------------------------------------------------------------------

NVPFLOW_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
NVPFLOW_DEVICE int num_threads() { return static_cast<int>(blockDim.x); }
NVPFLOW_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
NVPFLOW_DEVICE int num_blocks() { return static_cast<int>(gridDim.x); }

/// The block's dynamic shared memory.
NVPFLOW_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char nvpflow_shared[];
  return nvpflow_shared;
}

NVPFLOW_DEVICE void block_barrier() { __syncthreads(); }
NVPFLOW_DEVICE void warp_barrier() { __syncwarp(); }

template <class T>
NVPFLOW_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
NVPFLOW_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// ---- memory ------------------------------------------------------------------------------------------------------

template <class T>
NVPFLOW_DEVICE Vec4<T> load4(const T* p) {
  return *reinterpret_cast<const Vec4<T>*>(p);
}
template <class T>
NVPFLOW_DEVICE void store4(T* p, Vec4<T> v) {
  *reinterpret_cast<Vec4<T>*>(p) = v;
}

template <class T>
NVPFLOW_DEVICE Vec2<T> load2(const T* p) {
  return *reinterpret_cast<const Vec2<T>*>(p);
}
template <class T>
NVPFLOW_DEVICE void store2(T* p, Vec2<T> v) {
  *reinterpret_cast<Vec2<T>*>(p) = v;
}

/// 16 bytes from global to shared memory; they are there after copies_wait of their group (and a barrier, for others).
NVPFLOW_DEVICE void copy16_async(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#else
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}
NVPFLOW_DEVICE void copies_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
/// Waits until all but the newest `pending` groups of this thread have arrived.
template <int pending>
NVPFLOW_DEVICE void copies_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// ---- matrix fragments --------------------------------------------------------------------------------------------

/// d += a b, 16 x 8 x 8, TF32 operands (the hardware reads the upper 19 bits), float32 sums. Lane 4 g + t holds
/// a (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b (t, g), (t + 4, g); d (g, 2t), (g, 2t + 1), (g + 8, 2t), ...
NVPFLOW_DEVICE void multiply_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

/// d += a b, 16 x 8 x 16, bfloat16 pairs (lower half: the lower k). Lane 4 g + t holds a (g, 2t..), (g + 8, 2t..),
/// (g, 2t + 8..), (g + 8, 2t + 8..); b (2t.., g), (2t + 8.., g); d as above.
NVPFLOW_DEVICE void multiply_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

/// Two bfloat16, rounded to nearest even, `low` in the lower half.
NVPFLOW_DEVICE unsigned pack_bf16(float low, float high) {
  unsigned packed = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
  return packed;
}

// ---- scalars -----------------------------------------------------------------------------------------------------

NVPFLOW_DEVICE unsigned to_bits(float x) { return __float_as_uint(x); }
NVPFLOW_DEVICE float from_bits(unsigned x) { return __uint_as_float(x); }
NVPFLOW_DEVICE unsigned long long to_bits(double x) { return static_cast<unsigned long long>(__double_as_longlong(x)); }
NVPFLOW_DEVICE double from_bits(unsigned long long x) { return __longlong_as_double(static_cast<long long>(x)); }
NVPFLOW_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
NVPFLOW_DEVICE double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
/// a / b for a in [0, 2^100] and b in [1, 2^100], of which b is 1 where a is below 2^-24: what division computes there,
/// without its branch for the ends of the range.
NVPFLOW_DEVICE float divide_inside(float a, float b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  inverse = __fmaf_rn(inverse, __fmaf_rn(-b, inverse, 1.0f), inverse);
  const float q = a * inverse;
  return __fmaf_rn(inverse, __fmaf_rn(-b, q, a), q);
}
NVPFLOW_DEVICE double divide_inside(double a, double b) { return a / b; }
/// max(x, 0), NaN where x is: one instruction.
NVPFLOW_DEVICE float positive_part(float x) {
#if __CUDA_ARCH__ >= 800
  float larger;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(larger) : "f"(x));
  return larger;
#else
  return x <= 0.0f ? 0.0f : x;
#endif
}
NVPFLOW_DEVICE double positive_part(double x) { return x <= 0.0 ? 0.0 : x; }
NVPFLOW_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
NVPFLOW_DEVICE double square_root(double x) { return __dsqrt_rn(x); }

// ---- launching ---------------------------------------------------------------------------------------------------

template <class... P, class... A>
Status launch(void (*kernel)(P...), std::int64_t blocks, int threads, std::int64_t shared_bytes, Stream stream,
              A... arguments) {
  if (blocks == 0) return 0;
  const auto call = [&](P... values) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&values))...};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                            dim3(static_cast<unsigned>(threads)), pointers, static_cast<std::size_t>(shared_bytes),
                            stream);
  };
  return static_cast<Status>(call(arguments...));
}

/// Lets a kernel ask for that much dynamic shared memory.
template <class... P>
Status allow_shared(void (*kernel)(P...), std::int64_t bytes) {
  return static_cast<Status>(cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

#endif  // !NVPFLOW_SIMT

// ---- kernels that go element by element ----------------------------------------------------------------------------

NVPFLOW_DEVICE std::int64_t first_element() {
  return static_cast<std::int64_t>(block_index()) * num_threads() + thread_index();
}
NVPFLOW_DEVICE std::int64_t element_step() { return static_cast<std::int64_t>(num_blocks()) * num_threads(); }

/// Blocks for so many elements.
inline std::int64_t element_blocks(std::int64_t count) {
  const std::int64_t blocks = ceil_div(count, kThreads);
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

}  // namespace nvpflow::cuda
