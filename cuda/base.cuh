// KERNEL PART: the base densities and their noise from counters. Uniform numbers are the CPU's to the bit, where that
// has fused multiply-adds, normal ones to 2 ulp (cpp/src/cpu/base.inl).
#pragma once

#include "elementary.cuh"

namespace nvpflow::cuda {

template <class T>
NVPFLOW_DEVICE bool is_outside(const BaseDensity<T>& base, T z) {
  return z < base.low || z > base.high;
}

// ---- density: log p of a row comes from its log_det and from one sum over its features ------------------------------

/// What latent z adds to the sum. is_feature: else it is padding, which is zero.
template <class T>
NVPFLOW_DEVICE T add_latent(OfBase<BaseKind::normal>, const BaseDensity<T>&, T sum, T z, bool) {
  return multiply_add(z, z, sum);
}
/// 0 for all inside, NaN with NaN.
template <class T>
NVPFLOW_DEVICE T add_latent(OfBase<BaseKind::uniform>, const BaseDensity<T>& base, T sum, T z, bool is_feature) {
  return !is_feature ? sum : is_outside(base, z) ? sum + 1 : z == z ? sum : z;
}

template <class T>
NVPFLOW_DEVICE T log_prob_from(OfBase<BaseKind::normal>, const BaseDensity<T>&, T sum, T log_det, int features) {
  return log_det + multiply_add(sum, T(-0.5), static_cast<T>(-0.91893853320467274178) * static_cast<T>(features));
}
template <class T>
NVPFLOW_DEVICE T log_prob_from(OfBase<BaseKind::uniform>, const BaseDensity<T>& base, T sum, T log_det, int) {
  return sum > 0 ? -infinity<T>() : sum + (log_det + base.log_density);
}

/// What a walk that ends in data takes off log p for the latents that it begins with, from their sum: all of it but
/// for a constant, which log_prob_from adds.
template <class T>
NVPFLOW_DEVICE T latent_cost(OfBase<BaseKind::normal>, T sum) {
  return T(0.5) * sum;
}
template <class T>
NVPFLOW_DEVICE T latent_cost(OfBase<BaseKind::uniform>, T sum) {
  return sum > 0 ? infinity<T>() : sum;
}

/// The cotangent of z from that of log p.
template <class T>
NVPFLOW_DEVICE T latent_cotangent(OfBase<BaseKind::normal>, T z, T g) {
  return -z * g;
}
template <class T>
NVPFLOW_DEVICE T latent_cotangent(OfBase<BaseKind::uniform>, T, T) {
  return T(0);
}

// ---- noise ----------------------------------------------------------------------------------------------------------

/// Columns that one Philox call gives.
template <class T>
inline constexpr int kNoiseColumns = sizeof(T) == 4 ? 4 : 2;

/// Philox 4x32-10 of counter {row, block, 0}; the text for the host is in cpp/src/math.hpp.
NVPFLOW_DEVICE void philox(std::uint64_t key, std::uint64_t row, unsigned block, unsigned (&out)[4]) {
  unsigned c0 = static_cast<unsigned>(row), c1 = static_cast<unsigned>(row >> 32), c2 = block, c3 = 0;
  unsigned k0 = static_cast<unsigned>(key), k1 = static_cast<unsigned>(key >> 32);
  NVPFLOW_UNROLL
  for (int round = 0; round < 10; ++round) {
    const unsigned long long product0 = 0xD2511F53ull * c0, product1 = 0xCD9E8D57ull * c2;
    c0 = static_cast<unsigned>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<unsigned>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<unsigned>(product1);
    c3 = static_cast<unsigned>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

/// Box and Muller (1958): r = sqrt(-2 log u), (r cos a, r sin a), a = 2 pi v, v = quarter / 4 + f / 4, |f| <= 1/2.
template <class T>
NVPFLOW_DEVICE void box_muller(T u, T quarters, T& cosine, T& sine) {
  const T magic = Real<T>::kRoundMagic;
  const T shifted = quarters + magic;
  const T f = quarters - (shifted - magic);
  const int quadrant = static_cast<int>(to_bits(shifted) & 3);
  const T s = sin_quarter(f), c = cos_quarter(f);
  const T radius = square_root(logarithm(u) * T(-2));
  const T cos_magnitude = quadrant % 2 != 0 ? s : c, sin_magnitude = quadrant % 2 != 0 ? c : s;
  cosine = radius * (quadrant == 1 || quadrant == 2 ? -cos_magnitude : cos_magnitude);
  sine = radius * (quadrant >= 2 ? -sin_magnitude : sin_magnitude);
}

/// Columns block * n .. + n of one row.
NVPFLOW_DEVICE void noise_block(OfBase<BaseKind::normal>, const BaseDensity<float>&, std::uint64_t seed,
                                std::uint64_t row, unsigned block, float (&normals)[4]) {
  unsigned words[4];
  philox(seed, row, block, words);
  NVPFLOW_UNROLL
  for (int pair = 0; pair < 2; ++pair) {
    const float u = (static_cast<float>(words[2 * pair]) + 0.5f) * 0x1p-32f;
    // 24 bits are kept exactly: rounding up to 4 would repeat the angle 0.
    const float quarters = static_cast<float>(words[2 * pair + 1] >> 8) * 0x1p-22f;
    box_muller(u, quarters, normals[2 * pair], normals[2 * pair + 1]);
  }
}

NVPFLOW_DEVICE void noise_block(OfBase<BaseKind::normal>, const BaseDensity<double>&, std::uint64_t seed,
                                std::uint64_t row, unsigned block, double (&normals)[2]) {
  unsigned words[4];
  philox(seed, row, block, words);
  const unsigned long long first = (static_cast<unsigned long long>(words[1]) << 32 | words[0]) >> 12;
  const unsigned long long second = (static_cast<unsigned long long>(words[3]) << 32 | words[2]) >> 11;
  box_muller((static_cast<double>(first) + 0.5) * 0x1p-52, static_cast<double>(second) * 0x1p-51, normals[0],
             normals[1]);
}

/// u in (0, 1) to the interval; rounding does not carry it past `high`.
template <class T>
NVPFLOW_DEVICE T uniform_from(const BaseDensity<T>& base, T u) {
  const T z = multiply_add(u, base.range, base.low);
  return z > base.high ? base.high : z;
}

NVPFLOW_DEVICE void noise_block(OfBase<BaseKind::uniform>, const BaseDensity<float>& base, std::uint64_t seed,
                                std::uint64_t row, unsigned block, float (&numbers)[4]) {
  unsigned words[4];
  philox(seed, row, block, words);
  NVPFLOW_UNROLL
  for (int i = 0; i < 4; ++i) {
    numbers[i] = uniform_from(base, (static_cast<float>(words[i] >> 9) + 0.5f) * 0x1p-23f);
  }
}

NVPFLOW_DEVICE void noise_block(OfBase<BaseKind::uniform>, const BaseDensity<double>& base, std::uint64_t seed,
                                std::uint64_t row, unsigned block, double (&numbers)[2]) {
  unsigned words[4];
  philox(seed, row, block, words);
  NVPFLOW_UNROLL
  for (int i = 0; i < 2; ++i) {
    const unsigned long long word = static_cast<unsigned long long>(words[2 * i + 1]) << 32 | words[2 * i];
    numbers[i] = uniform_from(base, (static_cast<double>(word >> 12) + 0.5) * 0x1p-52);
  }
}

}  // namespace nvpflow::cuda
