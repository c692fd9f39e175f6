/* What one core of this machine can do: multiply-adds per second in registers, and bytes read per second.
 *
 * Compiled when the benchmark runs, without instruction-set flags: each function names what it needs, and `supported`
 * tells whether this processor has it.
 */
#define _POSIX_C_SOURCE 199309L
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

static double seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Emits nothing, but the compiler must assume that the value has changed: nothing is hoisted out of a loop. */
#if defined(__aarch64__)
#define OPAQUE(value) __asm__ volatile("" : "+w"(value))
#else
#define OPAQUE(value) __asm__ volatile("" : "+x"(value))
#endif

/* Twelve named sums: enough to hide the latency of two units of four cycles, and they fit in 16 registers. (An array of
 * them is kept in memory by some compilers.) */
#define FOR_TWELVE(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define DECLARE_SUM(i) vector sum##i = {0};
#define MULTIPLY_ADD(i) \
  OPAQUE(a);            \
  sum##i += a * b;
#define KEEP(i) OPAQUE(sum##i);

/* Operations per second in `rounds` rounds. A multiplication and an addition count as 2, fused or not. */
#define DEFINE_FMA(isa, lanes, attribute)                             \
  attribute double fma_##isa(long rounds) {                           \
    typedef float vector __attribute__((vector_size(4 * (lanes))));   \
    FOR_TWELVE(DECLARE_SUM)                                           \
    vector a = (vector){0} + 1e-3f, b = (vector){0} + 1e-3f;          \
    OPAQUE(b);                                                        \
    const double start = seconds();                                   \
    for (long r = 0; r < rounds; ++r) {                               \
      FOR_TWELVE(MULTIPLY_ADD)                                        \
    }                                                                 \
    FOR_TWELVE(KEEP)                                                  \
    return 2.0 * (lanes) * 12 * (double)rounds / (seconds() - start); \
  }

#define READ(stream, i) sum##stream ^= *(const vector*)(stream##_at + (i) * sizeof(vector));
#define READ_FOUR(i) READ(first, i) READ(second, i) READ(third, i) READ(fourth, i)

/* Seconds of one pass over `bytes`, the mean of `passes`; bytes is rounded down to a multiple of 1 KiB. Four streams,
 * because one does not reach what the first and second level can give. */
#define DEFINE_READ(isa, vector_bytes, attribute)                                               \
  attribute double read_##isa(const char* from, size_t bytes, long passes) {                    \
    typedef uint64_t vector __attribute__((vector_size(vector_bytes), aligned(8)));             \
    vector sumfirst = {0}, sumsecond = {0}, sumthird = {0}, sumfourth = {0};                    \
    const size_t stream = bytes / 1024 * 256;                                                   \
    const double start = seconds();                                                             \
    for (long p = 0; p < passes; ++p) {                                                         \
      __asm__ volatile("" : "+r"(from) : : "memory");                                           \
      const char *first_at = from, *second_at = from + stream, *third_at = from + 2 * stream,   \
                 *fourth_at = from + 3 * stream;                                                \
      for (const char* end = first_at + stream; first_at < end; first_at += 4 * sizeof(vector), \
                       second_at += 4 * sizeof(vector), third_at += 4 * sizeof(vector),         \
                       fourth_at += 4 * sizeof(vector)) {                                       \
        READ_FOUR(0) READ_FOUR(1) READ_FOUR(2) READ_FOUR(3)                                     \
      }                                                                                         \
    }                                                                                           \
    OPAQUE(sumfirst);                                                                           \
    OPAQUE(sumsecond);                                                                          \
    OPAQUE(sumthird);                                                                           \
    OPAQUE(sumfourth);                                                                          \
    return (seconds() - start) / (double)passes;                                                \
  }

#if defined(__x86_64__)
DEFINE_FMA(avx512, 16, __attribute__((target("avx512f"))))
DEFINE_FMA(avx2, 8, __attribute__((target("avx2,fma"))))
DEFINE_READ(avx512, 64, __attribute__((target("avx512f"))))
DEFINE_READ(avx2, 32, __attribute__((target("avx2"))))
#endif
#if defined(__aarch64__)
DEFINE_FMA(neon, 4, )
DEFINE_READ(neon, 16, )
#else
DEFINE_FMA(baseline, 4, )
DEFINE_READ(baseline, 16, )
#endif

int supported(const char* isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!strcmp(isa, "avx512")) return __builtin_cpu_supports("avx512f") != 0;
  if (!strcmp(isa, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#if defined(__aarch64__)
  return !strcmp(isa, "neon");
#else
  return !strcmp(isa, "baseline");
#endif
}
