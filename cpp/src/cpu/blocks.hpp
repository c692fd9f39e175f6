// The sizes of the kernels' register blocks on this instruction set, and what loops over blocks share.
#pragma once

#include <stdint.h>

#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

// Register blocks: kBlockOut single outputs x kBlockRows vectors of rows on a tile, kRowsBlock single rows x
// kRowsVectors vectors of outputs where the numbers lie row-major. With wide blocks (Dense::wide_blocks) a vector more,
// among rows for sums of kWideFrom inputs and more: fewer loads for each multiply-add, but no registers for the totals
// of finished segments.
#if defined(__AVX512F__)
constexpr int kBlockOut = 8, kBlockRows = 2;  // of 32 registers: 16 sums under way, and room for the segments' totals
constexpr int kRowsBlock = 8, kRowsVectors = 2, kRegisters = 32;
constexpr bool kCanBeWide = true;
constexpr int64_t kWideFrom = 200;
#elif defined(__AVX2__)
constexpr int kBlockOut = 4, kBlockRows = 3;  // of 16: 12 sums, 3 inputs, 1 weight; totals wait in memory
constexpr int kRowsBlock = 6, kRowsVectors = 2, kRegisters = 16;  // of 16: 12 sums, 2 weights, 1 input
#elif defined(__aarch64__)
constexpr int kBlockOut = 4, kBlockRows = 4;
constexpr int kRowsBlock = 4, kRowsVectors = 4, kRegisters = 32;
#else
constexpr int kBlockOut = 4, kBlockRows = 2;
constexpr int kRowsBlock = 4, kRowsVectors = 2, kRegisters = 16;
#endif
#if !defined(__AVX512F__)
constexpr bool kCanBeWide = false;
constexpr int64_t kWideFrom = 0;
#endif

// Sums that a block of a few rows has under way, and rows of one vector of sums each.
constexpr int kFewSums = 2 * kBlockOut, kPairedRows = kVectorBytes < 32 ? 4 : 8;

// Vectors of weights from one that is used to one that is fetched meanwhile, where they may come from afar: the
// processor's own prefetching ends with each page of memory.
constexpr int64_t kAhead = 64;

// Register blocks of an outer product (dense_outer.inl): kGradientIn inputs x kGradientOut vectors of outputs, or, of
// few outputs, kNarrowIn inputs x 1, or kExchangedOut single outputs x kExchangedIn vectors of inputs.
#if defined(__AVX512F__)
constexpr int kGradientIn = 8, kGradientOut = 3;  // of 32 registers: 24 sums, 3 cotangents, 1 input
constexpr int kNarrowIn = 16, kExchangedOut = 8, kExchangedIn = 3;
#elif defined(__AVX2__)
constexpr int kGradientIn = 6, kGradientOut = 2;  // of 16: 12 sums, 2 cotangents that fill a cache line, 1 input
constexpr int kNarrowIn = 8, kExchangedOut = 4, kExchangedIn = 3;
#elif defined(__aarch64__)
constexpr int kGradientIn = 8, kGradientOut = 3, kNarrowIn = 16, kExchangedOut = 8, kExchangedIn = 3;
#else
constexpr int kGradientIn = 4, kGradientOut = 2, kNarrowIn = 8, kExchangedOut = 4, kExchangedIn = 2;
#endif
// A second-level cache that gives half a line a cycle bounds outer products of AVX2: cotangents whose rows would fight
// for places in the first cache are copied, and inputs that do not fit in the second one are taken in bands.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool kSavesSecondCache = true;
#else
constexpr bool kSavesSecondCache = false;
#endif

NVPFLOW_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <int n>
struct Count {
  static constexpr int value = n;
};

}  // namespace
}  // namespace nvpflow::cpu
