// KERNEL PART: a tile of rows in shared memory: rows in and out, noise, poison, sums over features.
#pragma once

#include "base.cuh"
#include "dense.cuh"

namespace nvpflow::cuda {

// ---- the tile ------------------------------------------------------------------------------------------------------

/// Threads that work on a tile together.
struct Team {
  int index, size;
};

/// Sum over the lanes that share g: the same bits in all of them.
template <class T>
NVPFLOW_DEVICE T sum_over_lanes(T value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

/// One feature of all rows of a tile.
template <class T>
struct Column {
  T* array;
  int feature, blocks;  // of the array

  NVPFLOW_DEVICE T& at(int r) const { return array[place(r, feature, blocks)]; }
};

/// Entry i of a list, null for one that counts.
NVPFLOW_DEVICE int listed(const std::int32_t* list, int i) { return list == nullptr ? i : list[i]; }

/// Whether a layer's formula runs backwards.
template <class Walk, class T>
NVPFLOW_DEVICE bool is_backwards(const Walk& walk, const Layer<T>& layer) {
  return Walk::kGeneral ? walk.call.inverse != layer.inverse : walk.call.inverse;
}

template <class T>
struct Tile {
  int features, half;       // half: of the first part of the features, those in the places [0, half)
  int rows = 0;             // of a full tile
  int valid = 0;            // of them that are rows of the call
  std::int32_t number = 0;  // of the tile in the call
  T* state0 = nullptr;      // the first part of the features, then the second
  T* hidden0 = nullptr;
  int hidden_size = 0;    // of one of the buffers of hidden activations
  T* sums = nullptr;      // [2][warps across][rows]
  int* poison = nullptr;  // [rows]: not 0 where the row holds NaN or inf

  NVPFLOW_DEVICE explicit Tile(const Program<T>& program) : features(program.input_size), half(program.split) {}

  /// Of its rows.
  NVPFLOW_DEVICE std::int64_t first() const { return static_cast<std::int64_t>(number) * rows; }
  NVPFLOW_DEVICE int count(int part) const { return part == 0 ? half : features - half; }
  NVPFLOW_DEVICE T* state(int part) const { return state0 + part * rows * 8 * blocks_of(half); }
  NVPFLOW_DEVICE T* hidden(int buffer) const { return hidden0 + buffer * hidden_size; }

  NVPFLOW_DEVICE void carve(unsigned char* shared, T* global, const Program<T>& program, const TransformPlan& plan) {
    rows = plan.tile_rows;
    T* next = reinterpret_cast<T*>(shared);
    state0 = plan.state_shared ? next : global;
    if (plan.state_shared) {
      next += state_elements(program, rows);
    } else {
      global += state_elements(program, rows);
    }
    hidden0 = plan.hidden_shared ? next : global;
    hidden_size = static_cast<int>(rows * round_up(plan.hidden_width, 8));
    if (plan.hidden_shared) next += hidden_elements(plan);
    sums = next;
    if (plan.warps_across > 1) next += 2 * plan.warps_across * rows;
    poison = reinterpret_cast<int*>(next);
  }

  NVPFLOW_DEVICE void begin(std::int32_t index, std::int64_t total) {
    number = index;
    const std::int64_t left = total - first();
    valid = static_cast<int>(left < rows ? left : rows);
  }

  /// The column of a part of the state, or of the feature in a place.
  NVPFLOW_DEVICE Column<T> column(int part, int feature) const {
    return {state(part), feature, blocks_of(count(part))};
  }
  NVPFLOW_DEVICE Column<T> column_at(int f) const {
    const int part = f < half ? 0 : 1;
    return column(part, f - part * half);
  }
  /// Transformed feature j of a coupling.
  template <bool kGeneral>
  NVPFLOW_DEVICE Column<T> transformed(const Program<T>& program, const Layer<T>& layer, int j) const {
    return kGeneral && layer.condition == kGathered ? column_at(program.places[layer.output_place + j])
                                                    : column(1 - layer.condition, j);
  }
  /// Of the feature in place f.
  NVPFLOW_DEVICE T& at(int r, int f) const { return column_at(f).at(r); }

  /// No poison; zeros in the features that pad a block.
  NVPFLOW_DEVICE void clear(Team team) const {
    for (int r = team.index; r < rows; r += team.size) {
      poison[r] = 0;
      clear_padding(r);
    }
  }

  /// Vector accesses read padding with the features beside it: what lies there must be somebody's.
  NVPFLOW_DEVICE void clear_padding(Team team) const {
    for (int r = team.index; r < rows; r += team.size) clear_padding(r);
  }
  NVPFLOW_DEVICE void clear_padding(int r) const {
    for (int part = 0; part < 2; ++part) {
      const int n = count(part), blocks = blocks_of(n);
      for (int f = n; f < 8 * blocks; ++f) state(part)[place(r, f, blocks)] = T(0);
    }
  }

  /// visit(r, f) for every feature of every row.
  template <class Visit>
  NVPFLOW_DEVICE void for_each(Team team, Visit visit) const {
    const auto width = static_cast<unsigned>(features), size = static_cast<unsigned>(rows) * width;
    for (auto e = static_cast<unsigned>(team.index); e < size; e += static_cast<unsigned>(team.size)) {
      const auto r = static_cast<int>(e / width), f = static_cast<int>(e - static_cast<unsigned>(r) * width);
      visit(r, f);
    }
  }

  /// Runs of four features where rows of `array` begin at multiples of 16 bytes.
  NVPFLOW_DEVICE bool in_quads(const T* array) const {
    return features % 4 == 0 && reinterpret_cast<unsigned long long>(array) % 16 == 0;
  }

  /// Rows of `in`; past the end the last one again, whose numbers are as finite as they should be. Notes the poisoned.
  /// places: of the features.
  NVPFLOW_DEVICE void load(Team team, const T* in, const std::int64_t* index, const std::int32_t* places) const {
    const bool quads = in_quads(in);
    const auto step = quads ? 4u : 1u, width = static_cast<unsigned>(features) / step;
    const auto size = static_cast<unsigned>(rows) * width;
    for (auto e = static_cast<unsigned>(team.index); e < size; e += static_cast<unsigned>(team.size)) {
      const auto r = static_cast<int>(e / width);
      const auto f = static_cast<int>((e - static_cast<unsigned>(r) * width) * step);
      const std::int64_t row = first() + (r < valid ? r : valid - 1);
      const T* from = in + (index == nullptr ? row : index[row]) * features + f;
      Vec4<T> v = {};
      if (quads) {
        v = load4(from);
      } else {
        v.x = *from;
      }
      if (!is_finite(v.x) || !is_finite(v.y) || !is_finite(v.z) || !is_finite(v.w)) poison[r] = 1;
      at(r, listed(places, f)) = v.x;
      if (!quads) continue;
      at(r, listed(places, f + 1)) = v.y;
      at(r, listed(places, f + 2)) = v.z;
      at(r, listed(places, f + 3)) = v.w;
    }
  }

  /// lost: what stands for a NaN of a row that is finite, which has met inf - inf on the way.
  NVPFLOW_DEVICE T clean(int r, T value, T lost) const {
    if (poison[r] != 0) return not_a_number<T>();
    return value == value ? value : lost;
  }
  NVPFLOW_DEVICE T clean(int r, T value) const { return clean(r, value, value); }

  NVPFLOW_DEVICE void store(Team team, T* out, const std::int32_t* places, T lost) const {
    const auto cleaned = [&](int r, int f) { return clean(r, at(r, listed(places, f)), lost); };
    const bool quads = in_quads(out);
    const auto step = quads ? 4u : 1u, width = static_cast<unsigned>(features) / step;
    const auto size = static_cast<unsigned>(valid) * width;
    for (auto e = static_cast<unsigned>(team.index); e < size; e += static_cast<unsigned>(team.size)) {
      const auto r = static_cast<int>(e / width);
      const auto f = static_cast<int>((e - static_cast<unsigned>(r) * width) * step);
      T* to = out + (first() + r) * features + f;
      if (quads) {
        store4(to, Vec4<T>{cleaned(r, f), cleaned(r, f + 1), cleaned(r, f + 2), cleaned(r, f + 3)});
      } else {
        *to = cleaned(r, f);
      }
    }
  }

  /// log_prob(): of the row.
  template <class LogProb>
  NVPFLOW_DEVICE void store_row(const TransformCall<T>& call, int r, T log_det, LogProb log_prob) const {
    if (r >= valid) return;
    // What is lost is such that the density of the row is 0.
    const T inf = infinity<T>(), lost = call.inverse ? inf : -inf;
    if (call.log_det != nullptr) call.log_det[first() + r] = clean(r, is_finite(log_det) ? log_det : lost);
    if (call.log_prob != nullptr) call.log_prob[first() + r] = clean(r, log_prob(), -inf);
  }

  NVPFLOW_DEVICE void store_conditioner(const TransformCall<T>& call, int r, int j, int width, T s, T t) const {
    if (r >= valid) return;
    call.log_scale[(first() + r) * width + j] = clean(r, s);
    call.shift[(first() + r) * width + j] = clean(r, t);
  }

  /// Latents of the call's rows (base.cuh); of rows past the end too, which are not read.
  template <BaseKind kind>
  NVPFLOW_DEVICE void fill_noise(OfBase<kind> of, const BaseDensity<T>& base, Team team, std::uint64_t seed,
                                 std::uint64_t first_row, const std::int32_t* places) const {
    if constexpr (kind == BaseKind::mixture) {
      for (int r = team.index; r < rows; r += team.size) {
        mixture_noise(base, seed, first_row + static_cast<std::uint64_t>(first() + r), features,
                      [&](int f) -> T& { return at(r, listed(places, f)); });
      }
    } else {
      fill_blocks(of, base, team, seed, first_row, places);
    }
  }

 private:
  template <BaseKind kind>
  NVPFLOW_DEVICE void fill_blocks(OfBase<kind> of, const BaseDensity<T>& base, Team team, std::uint64_t seed,
                                  std::uint64_t first_row, const std::int32_t* places) const {
    const unsigned width = static_cast<unsigned>((features + kNoiseColumns<T> - 1) / kNoiseColumns<T>);
    const auto size = static_cast<unsigned>(rows) * width;
    for (auto e = static_cast<unsigned>(team.index); e < size; e += static_cast<unsigned>(team.size)) {
      const unsigned r = e / width, block = e - r * width;
      T numbers[kNoiseColumns<T>];
      noise_block(of, base, seed, first_row + static_cast<std::uint64_t>(first() + r), block, numbers);
      NVPFLOW_UNROLL
      for (int i = 0; i < kNoiseColumns<T>; ++i) {
        const int f = static_cast<int>(block) * kNoiseColumns<T> + i;
        if (f < features) at(static_cast<int>(r), listed(places, f)) = numbers[i];
      }
    }
  }
};

/// f(OfBase) for the base of a program; those of less than Reach::all have the normal one.
template <Reach reach, class T, class F>
NVPFLOW_DEVICE void with_base(const Program<T>& program, F&& f) {
  if constexpr (reach == Reach::all) {
    visit_base(program.base, f);
  } else {
    f(OfBase<BaseKind::normal>());
  }
}

template <BaseKind kind, class T>
NVPFLOW_DEVICE void sum_by_blocks(OfBase<kind> of, const BaseDensity<T>& base, const Tile<T>& tile, const Lane& lane,
                                  int row_block, int across, int num_across, T (&sums)[kRowBlocks][2]) {
  for (int part = 0; part < 2; ++part) {
    const int n = tile.count(part), blocks = blocks_of(n);
    for (int b = across; b < blocks_of(n); b += num_across) {
      const int f = 8 * b + 2 * lane.t;
      NVPFLOW_UNROLL
      for (int rb = 0; rb < kRowBlocks; ++rb) {
        const Vec4<T> v = load4(tile.state(part) + ((row_block + rb) * blocks + b) * kBlock + lane.chunk);
        sums[rb][0] = add_latent(of, base, add_latent(of, base, sums[rb][0], v.x, f < n), v.y, f + 1 < n);
        sums[rb][1] = add_latent(of, base, add_latent(of, base, sums[rb][1], v.z, f < n), v.w, f + 1 < n);
      }
    }
  }
}

/// sums[row block][upper, lower half] = the lane's part of the sum that the density comes from (add_latent): of the
/// blocks of 8 features that fall to this one of the warps across. places: of the latents.
template <BaseKind kind, class T>
NVPFLOW_DEVICE void sum_latents(OfBase<kind> of, const BaseDensity<T>& base, const Tile<T>& tile, const Lane& lane,
                                int row_block, int across, int num_across, const std::int32_t* places,
                                T (&sums)[kRowBlocks][2]) {
  if constexpr (OfBase<kind>::kByRows) {
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) {
      NVPFLOW_UNROLL
      for (int low = 0; low < 2; ++low) {
        const int r = 16 * (row_block + rb) + lane.g + 8 * low;
        const auto z = [&](int f) { return tile.at(r, listed(places, f)); };
        sums[rb][low] += row_sum(of, base, tile.features, z, 4 * across + lane.t, 4 * num_across);
      }
    }
  } else {
    sum_by_blocks(of, base, tile, lane, row_block, across, num_across, sums);
  }
}

/// From the lanes' parts of the log-determinant, with the latents' cost where log_prob of an inverse is wanted, to
/// call.log_det and call.log_prob, for the rows of the tile. All threads of the team come here; barrier() is theirs.
template <BaseKind kind, class T, class Barrier>
NVPFLOW_DEVICE void write_row_sums(OfBase<kind> of, const BaseDensity<T>& base, const Tile<T>& tile,
                                   const TransformCall<T>& call, Team team, const Lane& lane, int row_block, int across,
                                   int num_across, const std::int32_t* places, const T (&log_det)[kRowBlocks][2],
                                   Barrier barrier) {
  if (call.log_det == nullptr && call.log_prob == nullptr) return;
  T latents[kRowBlocks][2] = {};
  if (call.log_prob != nullptr && !call.inverse) {
    sum_latents(of, base, tile, lane, row_block, across, num_across, places, latents);
  }
  const auto store = [&](int r, T det, T sum) {
    tile.store_row(call, r, det,
                   [&] { return log_prob_from(of, base, sum, call.inverse ? -det : det, tile.features); });
  };
  NVPFLOW_UNROLL
  for (int rb = 0; rb < kRowBlocks; ++rb) {
    NVPFLOW_UNROLL
    for (int low = 0; low < 2; ++low) {
      const int r = 16 * (row_block + rb) + lane.g + 8 * low;
      const T det = sum_over_lanes(log_det[rb][low]), sum = sum_over_lanes(latents[rb][low]);
      if (lane.t != 0) continue;
      if (num_across == 1) {
        store(r, det, sum);
      } else {
        tile.sums[across * tile.rows + r] = det;
        tile.sums[(num_across + across) * tile.rows + r] = sum;
      }
    }
  }
  if (num_across == 1) return;
  barrier();
  for (int r = team.index; r < tile.rows; r += team.size) {
    T det = 0, sum = 0;
    for (int a = 0; a < num_across; ++a) {
      det += tile.sums[a * tile.rows + r];
      sum += tile.sums[(num_across + a) * tile.rows + r];
    }
    store(r, det, sum);
  }
}

}  // namespace nvpflow::cuda
