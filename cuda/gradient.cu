// KERNEL: the reverse pass of a flow in three kernels over a chunk of tiles; a row costs 3 times the FLOPs of its
// forward.
//
// gradient_tiles   takes a tile forward and back. Its activations lie on the tape, global memory that stays in the L2
// cache
//                  for narrow flows: the input of every dense layer, the cotangent of its output, and the scale and
//                  shift's derivatives. Weights are streamed through shared memory (dense.cuh), transposed on the way
//                  back. Bound: the multiply-adds, or writing 4 (a + 2 sum(hidden) + 5 b) bytes a row and coupling.
// weight_gradient  multiplies inputs and cotangents, X^T G over the rows: a block forms 64 inputs x 64 outputs of one
//                  kernel and loops over the tiles of its part of the chunk in order, one accumulator a parameter.
//                  Reads 4 (in / 64 + out / 64) 64 bytes a row and layer. Few parameters: the tiles are cut in `splits`
//                  parts.
// add_partials     adds the parts up in order. No atomics: gradients have the same bits from run to run.

#include <algorithm>
#include <bit>

#include "dense.cuh"
#include "plan.hpp"
#include "tile.cuh"

namespace nvpflow::cuda {
namespace {

constexpr int kGradientThreads = 256;
constexpr int kTaskIn = 64, kTaskOut = 64, kTaskThreads = 128, kTaskRows = 32;

// ---- the tape ----------------------------------------------------------------------------------------------------
// Arrays of activations (kernels.cuh) of one tile, one after the other:
//   state, cotangent of the state
//   per coupling: input of the conditioner [a]; per hidden layer value [H], where kept argument [H], cotangent [H];
//                 cotangent of the head [2 b]; log-scale, scale = exp(+-s), product = d(output) / d(s), [b] each
//   per standardize: its output, in the form of a state; sums over the rows for mean and log_std, [2 D] numbers

/// gelu and silu need their argument for the derivative; the others' derivative follows from their value.
NVPFLOW_HOST_DEVICE inline bool keeps_argument(Act act) { return act == Act::gelu || act == Act::silu; }

NVPFLOW_HOST_DEVICE inline std::int64_t array_size(std::int64_t rows, std::int64_t features) {
  return rows * round_up(features, 8);
}

/// Offsets within a coupling's part of the tape.
template <class T>
struct CouplingTape {
  const Program<T>& program;
  const Layer<T>& layer;
  std::int64_t rows, a, b;

  NVPFLOW_HOST_DEVICE CouplingTape(const Program<T>& p, const Layer<T>& l, std::int64_t tile_rows)
      : program(p), layer(l), rows(tile_rows) {
    const std::int64_t half = p.input_size / 2;
    a = l.condition == 0 ? half : p.input_size - half;
    b = p.input_size - a;
  }
  NVPFLOW_HOST_DEVICE std::int64_t width(int j) const { return program.dense[layer.first_dense + j].out; }
  NVPFLOW_HOST_DEVICE std::int64_t hidden(int j) const {
    std::int64_t at = array_size(rows, a);
    for (int i = 0; i < j; ++i) at += (keeps_argument(layer.activation) ? 3 : 2) * array_size(rows, width(i));
    return at;
  }
  NVPFLOW_HOST_DEVICE std::int64_t value(int j) const { return hidden(j); }
  NVPFLOW_HOST_DEVICE std::int64_t argument(int j) const {
    return hidden(j) + (keeps_argument(layer.activation) ? array_size(rows, width(j)) : 0);
  }
  /// j: a hidden layer, or the head.
  NVPFLOW_HOST_DEVICE std::int64_t cotangent(int j) const {
    return j + 1 == layer.num_dense ? hidden(j) : argument(j) + array_size(rows, width(j));
  }
  NVPFLOW_HOST_DEVICE std::int64_t log_scale() const { return hidden(layer.num_dense - 1) + array_size(rows, 2 * b); }
  NVPFLOW_HOST_DEVICE std::int64_t scale() const { return log_scale() + array_size(rows, b); }
  NVPFLOW_HOST_DEVICE std::int64_t product() const { return scale() + array_size(rows, b); }
  NVPFLOW_HOST_DEVICE std::int64_t size() const { return product() + array_size(rows, b); }
  /// The input of dense layer j.
  NVPFLOW_HOST_DEVICE std::int64_t input(int j) const { return j == 0 ? 0 : value(j - 1); }
};

template <class T>
NVPFLOW_HOST_DEVICE std::int64_t layer_tape_size(const Program<T>& program, const Layer<T>& layer, std::int64_t rows) {
  if (layer.kind == Kind::coupling) return CouplingTape<T>(program, layer, rows).size();
  return state_elements(program.input_size, rows) + round_up(2 * program.input_size, 16);
}

/// Where the part of layer k begins; k = num_layers: the size of the tape.
template <class T>
NVPFLOW_HOST_DEVICE std::int64_t layer_tape(const Program<T>& program, int k, std::int64_t rows) {
  std::int64_t at = 2 * state_elements(program.input_size, rows);
  for (int i = 0; i < k; ++i) at += layer_tape_size(program, program.layers[i], rows);
  return at;
}

/// Shared memory beside the stages: sums of the warps across, cotangents of the log-determinant, poison.
template <class T>
std::int64_t row_bytes(const GradientPlan& plan) {
  const std::int64_t elements = (plan.warps_across > 1 ? 2 * plan.warps_across : 0) * plan.tile_rows + plan.tile_rows;
  return elements * static_cast<std::int64_t>(sizeof(T)) + plan.tile_rows * static_cast<std::int64_t>(sizeof(int));
}

// ---- tiles forward and back ----------------------------------------------------------------------------------------

template <class T>
NVPFLOW_DEVICE T activation_derivative(Act act, T value, T argument) {
  switch (act) {
    case Act::relu:
      return value > T(0) ? T(1) : T(0);
    case Act::leaky_relu:
      return value > T(0) ? T(1) : T(0.01);
    case Act::elu:
      return value > T(0) ? T(1) : value + T(1);
    case Act::gelu:
      return gelu_derivative(argument);
    case Act::silu:
      return silu_derivative(argument);
    case Act::tanh:
      return multiply_add(-value, value, T(1));
    case Act::sigmoid:
      return value * (T(1) - value);
    case Act::softplus:
      return -expm1_bounded(-value);
    default:
      return T(1);
  }
}

template <class T, Multiply M>
struct Reverse {
  const GradientPlan& plan;
  const Program<T>& program;
  const GradientCall<T>& call;
  WeightStream<T, true>& stream;
  Tile<T> tile, cotangents;  // of the state; they share the notes on rows
  Lane lane;
  int across, row_block;
  T* log_det_cotangent;  // [rows], shared memory
  T* tape = nullptr;     // of the tile
  T log_det[kRowBlocks][2];

  NVPFLOW_DEVICE Reverse(const GradientPlan& p, const Program<T>& f, const GradientCall<T>& c, WeightStream<T, true>& s,
                         T* shared)
      : plan(p),
        program(f),
        call(c),
        stream(s),
        tile(f.input_size),
        cotangents(f.input_size),
        lane(thread_index() % kWarp),
        across(thread_index() / kWarp % p.warps_across),
        row_block(thread_index() / kWarp / p.warps_across * kRowBlocks) {
    tile.rows = p.tile_rows;
    tile.sums = shared;
    if (p.warps_across > 1) shared += 2 * p.warps_across * p.tile_rows;
    log_det_cotangent = shared;
    tile.poison = reinterpret_cast<int*>(shared + p.tile_rows);
  }

  NVPFLOW_DEVICE Team team() const { return {thread_index(), num_threads()}; }
  NVPFLOW_DEVICE const Layer<T>& layer_at(int step) const {
    return program.layers[call.inverse ? program.num_layers - 1 - step : step];
  }
  NVPFLOW_DEVICE T* tape_at(int step) const {
    return tape + layer_tape(program, call.inverse ? program.num_layers - 1 - step : step, plan.tile_rows);
  }
  /// The warp's rows of an array on the tape.
  NVPFLOW_DEVICE MemoryRows<T, false> rows_of(T* base, std::int64_t features) const {
    const int stride = blocks_of(static_cast<int>(features)) * kBlock;
    return {base + row_block * stride, stride};
  }
  NVPFLOW_DEVICE void copy(const T* from, T* to, std::int64_t count) const {
    for (std::int64_t i = 4 * thread_index(); i < count; i += 4 * num_threads()) store4(to + i, load4(from + i));
  }

  NVPFLOW_DEVICE void begin(std::int64_t index, T* tile_tape) {
    tape = tile_tape;
    const std::int64_t size = state_elements(program.input_size, plan.tile_rows);
    tile.begin(index, call.rows);
    tile.state0 = tape;
    cotangents = tile;
    cotangents.state0 += size;
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) log_det[rb][0] = log_det[rb][1] = T(0);
  }

  // ---- forward -----------------------------------------------------------------------------------------------------

  /// From the sums of the head to the transformed half, with what the way back needs.
  NVPFLOW_DEVICE void transform_features(const CouplingTape<T>& keep, T* part, int first_block, int valid,
                                         const Sums<T>& sums) {
    const int half = 1 - keep.layer.condition, count = tile.count(half), blocks = blocks_of(count);
    NVPFLOW_UNROLL
    for (int nb = 0; nb < kOutBlocks; ++nb) {
      const int j = 4 * (first_block + nb) + lane.t;
      if (nb >= valid || j >= count) continue;
      NVPFLOW_UNROLL
      for (int rb = 0; rb < kRowBlocks; ++rb) {
        NVPFLOW_UNROLL
        for (int low = 0; low < 2; ++low) {
          const int at = place(16 * (row_block + rb) + lane.g + 8 * low, j, blocks);
          const T s = log_scale(keep.layer, sums[rb * kOutBlocks + nb][2 * low]);
          const T t = sums[rb * kOutBlocks + nb][2 * low + 1];
          const T in = tile.state(half)[at], scale = exponential(call.inverse ? -s : s);
          const T out = call.inverse ? (in - t) * scale : multiply_add(in, scale, t);
          tile.state(half)[at] = out;
          part[keep.log_scale() + at] = s;
          part[keep.scale() + at] = scale;
          part[keep.product() + at] = call.inverse ? -out : in * scale;
          log_det[rb][low] = call.inverse ? log_det[rb][low] - s : log_det[rb][low] + s;
        }
      }
    }
  }

  NVPFLOW_DEVICE void coupling_forward(const Layer<T>& layer, T* part) {
    const CouplingTape<T> keep(program, layer, plan.tile_rows);
    copy(tile.state(layer.condition), part, array_size(plan.tile_rows, keep.a));
    for (int j = 0; j < layer.num_dense; ++j) {
      const Dense& d = program.dense[layer.first_dense + j];
      const bool head = j + 1 == layer.num_dense;
      const bool keeps = keeps_argument(layer.activation);
      const auto value = rows_of(head ? part : part + keep.value(j), d.out);
      const auto argument = rows_of(head ? part : part + keep.argument(j), d.out);
      dense_streamed<M>(stream, d.in, d.out, program.packed + d.bias, rows_of(part + keep.input(j), d.in), across,
                        plan.warps_across, lane, [&](int first, int valid, Sums<T>& sums) {
                          if (head) return transform_features(keep, part, first, valid, sums);
                          if (keeps) store_sums(sums, first, valid, lane, argument);
                          activate_sums(layer.activation, sums);
                          store_sums(sums, first, valid, lane, value);
                        });
    }
  }

  NVPFLOW_DEVICE void standardize_forward(const Layer<T>& layer, T* part) {
    const int features = program.input_size;
    const T* mean = program.packed + layer.affine;
    const T* factor = mean + (call.inverse ? features : 2 * features);
    tile.for_each(team(), [&](int, int f, T& value) {
      value = call.inverse ? multiply_add(value, factor[f], mean[f]) : (value - mean[f]) * factor[f];
    });
    block_barrier();
    copy(tile.state0, part, state_elements(features, plan.tile_rows));
    if (lane.t != 0 || across != 0) return;
    const T total = call.inverse ? -mean[3 * features] : mean[3 * features];
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) {
      log_det[rb][0] += total;
      log_det[rb][1] += total;
    }
  }

  NVPFLOW_DEVICE void forward() {
    for (int step = 0; step < program.num_layers; ++step) {
      block_barrier();
      const Layer<T>& layer = layer_at(step);
      if (layer.kind == Kind::coupling) {
        coupling_forward(layer, tape_at(step));
      } else {
        standardize_forward(layer, tape_at(step));
      }
    }
    block_barrier();
  }

  // ---- back --------------------------------------------------------------------------------------------------------

  /// The cotangents that the way back starts from: zero for rows past the end, NaN for poisoned ones.
  NVPFLOW_DEVICE void start_cotangents() {
    cotangents.for_each(team(), [&](int r, int f, T& value) {
      T g = 0;
      if (r < tile.valid) {
        if (call.nll) g = tile.at(r, f) * call.nll_factor;
        if (call.density) g = -tile.at(r, f) * call.grad_log_det[tile.first + r];
        if (!call.nll && call.grad_out != nullptr) g = call.grad_out[(tile.first + r) * program.input_size + f];
        g = tile.clean(r, g);
      }
      value = g;
    });
    for (int r = thread_index(); r < tile.rows; r += num_threads()) {
      T g = 0;
      if (r < tile.valid) {
        if (call.nll) g = -call.nll_factor;
        if (!call.nll && call.grad_log_det != nullptr) g = call.grad_log_det[tile.first + r];
        g = tile.clean(r, g);
      }
      log_det_cotangent[r] = g;
    }
    block_barrier();
  }

  /// From the cotangent of the layer's output to that of its input, in place, and to that of the head's sums.
  NVPFLOW_DEVICE void affine_backward(const CouplingTape<T>& keep, T* part) {
    const int half = 1 - keep.layer.condition, count = tile.count(half), blocks = blocks_of(count);
    const auto head = rows_of(part + keep.cotangent(keep.layer.num_dense - 1), 2 * count);
    for (int nb = across; nb < blocks_of(2 * count); nb += plan.warps_across) {
      const int j = 4 * nb + lane.t;
      NVPFLOW_UNROLL
      for (int rb = 0; rb < kRowBlocks; ++rb) {
        T result[4] = {};
        NVPFLOW_UNROLL
        for (int low = 0; low < 2; ++low) {
          if (j >= count) continue;
          const int r = 16 * (row_block + rb) + lane.g + 8 * low, at = place(r, j, blocks);
          const T g = cotangents.state(half)[at], g_log_det = log_det_cotangent[r];
          const T scaled = g * part[keep.scale() + at];
          const T tanh_u = part[keep.log_scale() + at] * keep.layer.inverse_bound;
          const T g_s = multiply_add(g, part[keep.product() + at], call.inverse ? -g_log_det : g_log_det);
          cotangents.state(half)[at] = scaled;
          result[2 * low] = g_s * multiply_add(-tanh_u, tanh_u, T(1));
          result[2 * low + 1] = call.inverse ? -scaled : g;
        }
        store4(head.at(rb * head.stride + nb * kBlock + lane.chunk),
               Vec4<T>{result[0], result[1], result[2], result[3]});
      }
    }
  }

  /// Multiplies the cotangents of hidden layer j's values by the activation's derivative.
  NVPFLOW_DEVICE void derive(const CouplingTape<T>& keep, T* part, int j, int first, int valid, Sums<T>& sums) {
    const std::int64_t width = keep.width(j);
    const auto value = rows_of(part + keep.value(j), width), argument = rows_of(part + keep.argument(j), width);
    const auto to = rows_of(part + keep.cotangent(j), width);
    store_sums(sums, first, valid, lane, to);
    // Each lane meets its own numbers again, one at a time: one copy of the text for all of them.
#if !defined(NVPFLOW_SIMT)
#pragma unroll 1
#endif
    for (int i = 0; i < kRowBlocks * valid; ++i) {
      const int rb = i % kRowBlocks, at = rb * to.stride + (first + i / kRowBlocks) * kBlock + lane.chunk;
      Vec4<T> g = load4(to.at(at));
      const Vec4<T> v = load4(value.at(at)), u = load4(argument.at(at));
      g.x *= activation_derivative(keep.layer.activation, v.x, u.x);
      g.y *= activation_derivative(keep.layer.activation, v.y, u.y);
      g.z *= activation_derivative(keep.layer.activation, v.z, u.z);
      g.w *= activation_derivative(keep.layer.activation, v.w, u.w);
      store4(to.at(at), g);
    }
  }

  /// Adds to the cotangent of the conditioning half.
  NVPFLOW_DEVICE void add_to_input(const Layer<T>& layer, int first, int valid, const Sums<T>& sums) {
    const auto to = rows_of(cotangents.state(layer.condition), tile.count(layer.condition));
    NVPFLOW_UNROLL
    for (int nb = 0; nb < kOutBlocks; ++nb) {
      if (nb >= valid) continue;
      NVPFLOW_UNROLL
      for (int rb = 0; rb < kRowBlocks; ++rb) {
        T* at = to.at(rb * to.stride + (first + nb) * kBlock + lane.chunk);
        const T(&sum)[4] = sums[rb * kOutBlocks + nb];
        const Vec4<T> g = load4(at);
        store4(at, Vec4<T>{g.x + sum[0], g.y + sum[1], g.z + sum[2], g.w + sum[3]});
      }
    }
  }

  NVPFLOW_DEVICE void coupling_backward(const Layer<T>& layer, T* part, bool input_wanted) {
    const CouplingTape<T> keep(program, layer, plan.tile_rows);
    affine_backward(keep, part);
    for (int j = layer.num_dense - 1; j >= 0; --j) {
      if (j == 0 && !input_wanted) return;
      const Dense& d = program.dense[layer.first_dense + j];
      dense_streamed<M>(stream, d.out, d.in, static_cast<const T*>(nullptr), rows_of(part + keep.cotangent(j), d.out),
                        across, plan.warps_across, lane, [&](int first, int valid, Sums<T>& sums) {
                          if (j > 0) {
                            derive(keep, part, j - 1, first, valid, sums);
                          } else {
                            add_to_input(layer, first, valid, sums);
                          }
                        });
    }
  }

  NVPFLOW_DEVICE void standardize_backward(const Layer<T>& layer, T* part) {
    const int features = program.input_size;
    const T* mean = program.packed + layer.affine;
    const T *std = mean + features, *inverse_std = mean + 2 * features;
    T* sums = part + state_elements(features, plan.tile_rows);
    Tile<T> output = tile;
    output.state0 = part;
    for (int f = thread_index(); f < features; f += num_threads()) {
      T g_mean = 0, g_log_std = 0;
      const T factor = call.inverse ? std[f] : inverse_std[f];
      for (int r = 0; r < tile.rows; ++r) {
        T& g = cotangents.at(r, f);
        if (r < tile.valid) {
          const T out = output.at(r, f);
          if (call.inverse) {  // out = in * std + mean, log_det = +sum log_std
            g_mean += g;
            g_log_std += multiply_add(g, out - mean[f], log_det_cotangent[r]);
          } else {  // out = (in - mean) / std, log_det = -sum log_std
            g_mean -= g * factor;
            g_log_std -= multiply_add(g, out, log_det_cotangent[r]);
          }
        }
        g *= factor;
      }
      sums[f] = g_mean;
      sums[features + f] = g_log_std;
    }
  }

  NVPFLOW_DEVICE void backward() {
    for (int step = program.num_layers - 1; step >= 0; --step) {
      const Layer<T>& layer = layer_at(step);
      if (layer.kind == Kind::coupling) {
        coupling_backward(layer, tape_at(step), step > 0 || call.grad_in != nullptr);
      } else {
        standardize_backward(layer, tape_at(step));
      }
      block_barrier();
    }
  }
};

/// Tiles [first_tile, first_tile + tiles) of the call; tape [tiles][tape_elements], log_prob [tiles * tile_rows].
template <class T, Multiply M>
NVPFLOW_KERNEL(kGradientThreads)
gradient_tiles(NVPFLOW_ARGUMENT GradientPlan plan, NVPFLOW_ARGUMENT Program<T> program,
               NVPFLOW_ARGUMENT GradientCall<T> call, const std::int64_t first_tile, const std::int64_t tiles, T* tape,
               T* log_prob) {
  if constexpr (M != Multiply::fma && !kHasMatrixUnits) return;
  T* stages = reinterpret_cast<T*>(shared_memory());
  const std::int64_t mine = block_index() < tiles ? ceil_div(tiles - block_index(), num_blocks()) : 0;
  WeightStream<T, true> stream(Passes<T, true>(program, call.inverse, 0, program.num_layers, call.grad_in != nullptr),
                               stages, plan.warps_across * kOutBlocks, plan.stage_inputs, mine);
  Reverse<T, M> reverse(plan, program, call, stream, stages + 2 * stream.stage_size());
  TransformCall<T> density;
  density.log_prob = call.nll ? log_prob - first_tile * plan.tile_rows : call.log_prob;
  for (std::int64_t i = block_index(); i < tiles; i += num_blocks()) {
    reverse.begin(first_tile + i, tape + i * plan.tape_elements);
    block_barrier();
    reverse.tile.clear(reverse.team());
    reverse.cotangents.clear_padding(reverse.team());
    block_barrier();
    reverse.tile.load(reverse.team(), call.in, call.index);
    reverse.forward();
    write_row_sums(reverse.tile, density, reverse.team(), reverse.lane, reverse.row_block, reverse.across,
                   plan.warps_across, reverse.log_det, [] { block_barrier(); });
    reverse.start_cotangents();
    reverse.backward();
    if (call.grad_in != nullptr) reverse.cotangents.store(reverse.team(), call.grad_in, not_a_number<T>());
  }
}

// ---- gradients of the parameters -----------------------------------------------------------------------------------

/// Chunk of features 2 pair, 2 pair + 1 of row r < 8 (and r + 8) in [row block][8 feature blocks][128].
NVPFLOW_DEVICE int pair_chunk(int row_block, int pair, int r) {
  return (row_block * 8 + pair / 4) * kBlock + Lane::at(r, pair % 4);
}

/// sums[m][n] += X^T G over 16 rows for 32 inputs and 32 outputs from the pairs first_in, first_out; m: blocks of 16
/// inputs, n: blocks of 16 outputs by even and odd. Lane 4 g + t has inputs 2 g, 2 g + 1 and outputs 4 t .. 4 t + 3:
/// sums[2 m + n / 2 ..] as matrix fragments, [input parity][output].
template <Multiply M, class T>
NVPFLOW_DEVICE void outer16(const T* x, const T* g, int row_block, int first_in, int first_out, const Lane& lane,
                            T (&sums)[2][4][4]) {
  if constexpr (M == Multiply::fma) {
    NVPFLOW_UNROLL
    for (int r = 0; r < 8; ++r) {
      Vec4<T> in[2], out[2][2];
      NVPFLOW_UNROLL
      for (int m = 0; m < 2; ++m) in[m] = load4(x + pair_chunk(row_block, first_in + 8 * m + lane.g, r));
      NVPFLOW_UNROLL
      for (int p = 0; p < 2; ++p) {
        out[p][0] = load4(g + pair_chunk(row_block, first_out + 8 * p + 2 * lane.t, r));
        out[p][1] = load4(g + pair_chunk(row_block, first_out + 8 * p + 2 * lane.t + 1, r));
      }
      NVPFLOW_UNROLL
      for (int m = 0; m < 2; ++m) {
        NVPFLOW_UNROLL
        for (int p = 0; p < 2; ++p) {
          NVPFLOW_UNROLL
          for (int i = 0; i < 2; ++i) {  // output 4 t + 2 i (even: n = 2 p) and the one after it (odd: 2 p + 1)
            T(&even)[4] = sums[m][2 * p], (&odd)[4] = sums[m][2 * p + 1];
            even[i] = multiply_add(in[m].z, out[p][i].z, multiply_add(in[m].x, out[p][i].x, even[i]));
            even[2 + i] = multiply_add(in[m].w, out[p][i].z, multiply_add(in[m].y, out[p][i].x, even[2 + i]));
            odd[i] = multiply_add(in[m].z, out[p][i].w, multiply_add(in[m].x, out[p][i].y, odd[i]));
            odd[2 + i] = multiply_add(in[m].w, out[p][i].w, multiply_add(in[m].y, out[p][i].y, odd[2 + i]));
          }
        }
      }
    }
  } else {
    NVPFLOW_UNROLL
    for (int step = 0; step < 2; ++step) {
      // Rows of the fragment's k = t and t + 4: r and r + 8. These four rows, and no others, lie in different banks.
      const int r = lane.t % 2 + lane.t / 2 * 4 + 2 * step;
      unsigned in_hi[2][4], in_lo[2][4];
      NVPFLOW_UNROLL
      for (int m = 0; m < 2; ++m) {
        const Vec4<T> v = load4(x + pair_chunk(row_block, first_in + 8 * m + lane.g, r));
        const float parts[4] = {v.x, v.y, v.z, v.w};
        NVPFLOW_UNROLL
        for (int i = 0; i < 4; ++i) {
          const Split split(parts[i]);
          in_hi[m][i] = split.hi;
          in_lo[m][i] = split.lo;
        }
      }
      NVPFLOW_UNROLL
      for (int p = 0; p < 2; ++p) {
        const Vec4<T> v = load4(g + pair_chunk(row_block, first_out + 8 * p + lane.g, r));
        const Split s0(v.x), s1(v.z), s2(v.y), s3(v.w);
        const unsigned hi[2][2] = {{s0.hi, s1.hi}, {s2.hi, s3.hi}}, lo[2][2] = {{s0.lo, s1.lo}, {s2.lo, s3.lo}};
        NVPFLOW_UNROLL
        for (int n = 0; n < 2; ++n) {
          NVPFLOW_UNROLL
          for (int m = 0; m < 2; ++m) {
            if constexpr (M == Multiply::tf32x3) {
              float d[4] = {};
              multiply_tf32(d, in_lo[m], hi[n]);
              multiply_tf32(d, in_hi[m], lo[n]);
              multiply_tf32(d, in_hi[m], hi[n]);
              NVPFLOW_UNROLL
              for (int i = 0; i < 4; ++i) sums[m][2 * p + n][i] += d[i];
            } else {
              multiply_tf32(sums[m][2 * p + n], in_hi[m], hi[n]);
            }
          }
        }
      }
    }
  }
}

/// One task over the tiles of one split.
template <class T, Multiply M>
struct TaskWorker {
  static constexpr int kStage = 2 * 2 * 8 * kBlock;  // elements: X and G of 32 rows x 64 features

  const GradientPlan& plan;
  const Program<T>& program;
  GradientTask task;
  const T* tape;
  T* stages;
  T* partial;

  /// Copies 32 rows of one array, 64 features from first / 8 of its blocks on.
  NVPFLOW_DEVICE void copy_rows(const T* array, int features, int first, int row_block, T* to) const {
    constexpr int kCopy = 16 / static_cast<int>(sizeof(T));
    const int blocks = blocks_of(features), begin = first / 8;
    const int here = blocks - begin < 8 ? blocks - begin : 8, run = here * kBlock / kCopy;
    for (int i = thread_index(); i < 2 * run; i += num_threads()) {
      const int rb = i >= run ? 1 : 0, at = (i - rb * run) * kCopy;
      copy16_async(to + rb * 8 * kBlock + at, array + ((row_block + rb) * blocks + begin) * kBlock + at);
    }
  }
  /// step: 32 rows of a tile after the other.
  NVPFLOW_DEVICE void issue(const Dense& d, std::int64_t first_tile, std::int64_t step, std::int64_t steps) const {
    if (step < steps) {
      const int steps_of_tile = plan.tile_rows / kTaskRows;
      const std::int64_t t = step / steps_of_tile;
      const int row_block = static_cast<int>(step - t * steps_of_tile) * 2;
      const T* from = tape + (first_tile + t) * plan.tape_elements;
      T* to = stages + step % 2 * kStage;
      copy_rows(from + task.input, d.in, task.first_in, row_block, to);
      copy_rows(from + task.cotangent, d.out, task.first_out, row_block, to + kStage / 2);
    }
    copies_commit();
  }

  NVPFLOW_DEVICE void dense(std::int64_t first_tile, std::int64_t tiles) const {
    const Dense& d = program.dense[task.dense];
    const Lane lane(thread_index() % kWarp);
    const int warp = thread_index() / kWarp, first_in = warp / 2 * 16, first_out = warp % 2 * 16;  // pairs
    const std::int64_t steps = tiles * (plan.tile_rows / kTaskRows);
    T sums[2][4][4] = {};
    T bias = 0;
    issue(d, first_tile, 0, steps);
    for (std::int64_t step = 0; step < steps; ++step) {
      copies_wait<0>();
      block_barrier();
      issue(d, first_tile, step + 1, steps);
      const T* x = stages + step % 2 * kStage;
      const T* g = x + kStage / 2;
      outer16<M>(x, g, 0, first_in, first_out, lane, sums);
      outer16<M>(x, g, 1, first_in, first_out, lane, sums);
      if (task.first_in != 0 || thread_index() >= kTaskOut) continue;
      for (int r = 0; r < kTaskRows; ++r) bias += g[place(r, thread_index(), 8)];
    }
    store(d, lane, 2 * first_in, 2 * first_out, sums);
    const int o = task.first_out + thread_index();
    if (task.first_in != 0 || thread_index() >= kTaskOut || o >= d.out) return;
    partial[is_head(d) ? d.bias_offset[o % 2] + o / 2 : d.bias_offset[0] + o] = bias;
  }

  NVPFLOW_DEVICE bool is_head(const Dense& d) const {
    const Layer<T>& layer = program.layers[task.layer];
    return program.dense + layer.first_dense + layer.num_dense - 1 == &d;
  }

  NVPFLOW_DEVICE void store(const Dense& d, const Lane& lane, int first_in, int first_out,
                            const T (&sums)[2][4][4]) const {
    const bool head = is_head(d);
    NVPFLOW_UNROLL
    for (int m = 0; m < 2; ++m) {
      NVPFLOW_UNROLL
      for (int n = 0; n < 4; ++n) {
        NVPFLOW_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int i = task.first_in + first_in + 16 * m + 2 * lane.g + e / 2;
          const int o = task.first_out + first_out + 16 * (n / 2) + 4 * lane.t + 2 * (e % 2) + n % 2;
          if (i >= d.in || o >= d.out) continue;
          const std::int64_t at = head ? d.kernel_offset[n % 2] + static_cast<std::int64_t>(i) * (d.out / 2) + o / 2
                                       : d.kernel_offset[0] + static_cast<std::int64_t>(i) * d.out + o;
          partial[at] = sums[m][n][e];
        }
      }
    }
  }

  NVPFLOW_DEVICE void standardize(std::int64_t first_tile, std::int64_t tiles) const {
    const Layer<T>& layer = program.layers[task.layer];
    const int features = program.input_size;
    for (int f = thread_index(); f < features; f += num_threads()) {
      T mean = 0, log_std = 0;
      for (std::int64_t t = 0; t < tiles; ++t) {
        const T* sums = tape + (first_tile + t) * plan.tape_elements + task.input;
        mean += sums[f];
        log_std += sums[features + f];
      }
      partial[layer.mean_offset + f] = mean;
      partial[layer.log_std_offset + f] = log_std;
    }
  }
};

/// Block b: task b % num_tasks over the tiles of split b / num_tasks; partials [splits][num_parameters].
template <class T, Multiply M>
NVPFLOW_KERNEL(kTaskThreads)
weight_gradient(NVPFLOW_ARGUMENT GradientPlan plan, NVPFLOW_ARGUMENT Program<T> program, const GradientTask* tasks,
                const std::int64_t tiles, const T* tape, T* partials) {
  if constexpr (M != Multiply::fma && !kHasMatrixUnits) return;
  const int split = block_index() / plan.num_tasks;
  const std::int64_t length = ceil_div(tiles, plan.splits), first = split * length;
  const std::int64_t count = first >= tiles ? 0 : tiles - first < length ? tiles - first : length;
  const TaskWorker<T, M> worker{plan,
                                program,
                                tasks[block_index() % plan.num_tasks],
                                tape,
                                reinterpret_cast<T*>(shared_memory()),
                                partials + split * program.num_parameters};
  if (worker.task.dense < 0) {
    worker.standardize(first, count);
  } else {
    worker.dense(first, count);
  }
}

/// gradient = partials added up in order, or += with accumulate.
template <class T>
NVPFLOW_KERNEL(kThreads)
add_partials(const T* partials, const int splits, const std::int64_t count, const bool accumulate, T* gradient) {
  for (std::int64_t i = first_element(); i < count; i += element_step()) {
    T sum = accumulate ? gradient[i] : T(0);
    for (int s = 0; s < splits; ++s) sum += partials[s * count + i];
    gradient[i] = sum;
  }
}

NVPFLOW_KERNEL(kThreads)
set_double(double* to, const double value) {
  if (thread_index() == 0 && block_index() == 0) *to = value;
}

// ---- launches ------------------------------------------------------------------------------------------------------

template <class T, Multiply M>
Status launch_chunk(const GradientPlan& plan, const Program<T>& program, const GradientTask* tasks,
                    const GradientCall<T>& call, std::int64_t first, std::int64_t tiles, unsigned char* workspace,
                    Stream stream) {
  // bfloat16 would need the rows in pairs; TF32 is at hand and more accurate.
  constexpr Multiply kOuter = M == Multiply::bf16 ? Multiply::tf32 : M;
  T* tape = reinterpret_cast<T*>(workspace);
  T* partials = reinterpret_cast<T*>(workspace + plan.partials_at);
  T* log_prob = reinterpret_cast<T*>(workspace + plan.log_prob_at);
  const std::int64_t blocks = std::min<std::int64_t>(plan.blocks, tiles);
  if (const Status s = launch(gradient_tiles<T, M>, blocks, plan.warps * kWarp, plan.shared_bytes, stream, plan,
                              program, call, first, tiles, tape, log_prob)) {
    return s;
  }
  if (call.nll && call.sum_log_prob != nullptr) {
    const std::int64_t rows = std::min(tiles * plan.tile_rows, call.rows - first * plan.tile_rows);
    const T* values = log_prob;
    if (const Status s = launch_sum(values, rows, first > 0, call.sum_log_prob, workspace + plan.sums_at, stream)) {
      return s;
    }
  }
  if (call.gradient == nullptr) return 0;
  const std::int64_t weight_blocks = std::int64_t{plan.num_tasks} * plan.splits;
  const T* from = tape;
  if (const Status s = launch(weight_gradient<T, kOuter>, weight_blocks, kTaskThreads, plan.weight_shared_bytes, stream,
                              plan, program, tasks, tiles, from, partials)) {
    return s;
  }
  const T* parts = partials;
  return launch(add_partials<T>, element_blocks(program.num_parameters), kThreads, 0, stream, parts, plan.splits,
                program.num_parameters, call.accumulate || first > 0, call.gradient);
}

template <class T, Multiply M>
Status launch_gradient_with(const GradientPlan& plan, const Program<T>& program, const GradientTask* tasks,
                            const GradientCall<T>& call, void* workspace, Stream stream) {
  const std::int64_t tiles = ceil_div(call.rows, plan.tile_rows);
  for (std::int64_t first = 0; first < tiles; first += plan.chunk_tiles) {
    const std::int64_t here = std::min(plan.chunk_tiles, tiles - first);
    if (const Status s = launch_chunk<T, M>(plan, program, tasks, call, first, here,
                                            static_cast<unsigned char*>(workspace), stream)) {
      return s;
    }
  }
  return 0;
}

/// Visits the tasks in order; returns their number.
template <class T, class Visit>
std::int32_t for_each_task(const Program<T>& program, const GradientPlan& plan, Visit visit) {
  std::int32_t count = 0;
  for (int k = 0; k < program.num_layers; ++k) {
    const Layer<T>& layer = program.layers[k];
    const std::int64_t at = layer_tape(program, k, plan.tile_rows);
    GradientTask task;
    task.layer = k;
    if (layer.kind == Kind::standardize) {
      task.input = at + state_elements(program.input_size, plan.tile_rows);
      visit(task, count++);
      continue;
    }
    const CouplingTape<T> tape(program, layer, plan.tile_rows);
    for (int j = 0; j < layer.num_dense; ++j) {
      task.dense = layer.first_dense + j;
      task.input = at + tape.input(j);
      task.cotangent = at + tape.cotangent(j);
      const Dense& d = program.dense[task.dense];
      for (task.first_in = 0; task.first_in < d.in; task.first_in += kTaskIn) {
        for (task.first_out = 0; task.first_out < d.out; task.first_out += kTaskOut) visit(task, count++);
      }
    }
  }
  return count;
}

template <class T, Multiply M>
Status prepare_gradient_with(std::int64_t bytes) {
  if (const Status s = allow_shared(gradient_tiles<T, M>, bytes)) return s;
  if constexpr (M != Multiply::bf16) return allow_shared(weight_gradient<T, M>, bytes);
  return 0;
}

}  // namespace

template <class T>
std::int32_t gradient_tasks(const Program<T>& program, const GradientPlan& plan, GradientTask* tasks) {
  return for_each_task(program, plan, [&](const GradientTask& task, std::int32_t i) {
    if (tasks != nullptr) tasks[i] = task;
  });
}

template <class T>
GradientPlan plan_gradient(const Program<T>& program, const Device& device, std::int64_t rows,
                           const GradientOptions<T>& options) {
  constexpr auto kSize = static_cast<std::int64_t>(sizeof(T));
  GradientPlan plan;
  plan.multiply = choose_multiply(sizeof(T) == 8, device, options.precision, options.force_fma);
  std::int64_t widest = 1;
  for (int i = 0; i < program.num_dense; ++i) widest = std::max<std::int64_t>(widest, program.dense[i].out);
  constexpr int kWarps = kGradientThreads / kWarp;
  const int preferred = widest <= 128 ? 1 : widest <= 256 ? 2 : widest <= 512 ? 4 : 8;
  // Fewer rows a block keep more multiprocessors busy where the call is short.
  const std::int64_t wanted = std::max<std::int64_t>(1, rows / (kWarpRows * device.multiprocessors));
  auto along = static_cast<int>(std::min<std::int64_t>(kWarps, std::bit_floor(static_cast<std::uint64_t>(wanted))));
  plan.stage_inputs = sizeof(T) == 4 ? 32 : 16;
  plan.blocks = device.multiprocessors;
  plan.weight_shared_bytes = 2 * TaskWorker<T, Multiply::fma>::kStage * kSize;
  std::int64_t tiles = 1;
  for (;; along /= 2) {
    for (plan.warps_across = preferred; plan.warps_across > 0; plan.warps_across /= 2) {
      plan.warps = std::min(kWarps / plan.warps_across, along) * plan.warps_across;
      plan.tile_rows = plan.warps / plan.warps_across * kWarpRows;
      plan.shared_bytes =
          2 * std::int64_t{plan.warps_across} * 8 * kOutBlocks * plan.stage_inputs * kSize + row_bytes<T>(plan);
      if (plan.shared_bytes <= device.shared_bytes_per_block) break;
    }
    plan.tape_elements = layer_tape(program, program.num_layers, plan.tile_rows);
    tiles = std::max<std::int64_t>(1, ceil_div(rows, plan.tile_rows));
    plan.chunk_tiles = std::clamp<std::int64_t>(device.workspace_bytes / (plan.tape_elements * kSize), 1, tiles);
    if (along == 1 || plan.chunk_tiles >= std::min<std::int64_t>(plan.blocks, tiles)) break;
  }
  // Whole rounds of the blocks, so that none waits for the last tiles of a chunk.
  if (plan.chunk_tiles < tiles && plan.chunk_tiles > plan.blocks) plan.chunk_tiles -= plan.chunk_tiles % plan.blocks;
  if (options.force_chunk_tiles > 0) plan.chunk_tiles = std::min(tiles, options.force_chunk_tiles);
  plan.num_tasks = gradient_tasks<T>(program, plan, nullptr);
  // Two blocks of tasks for each multiprocessor, as far as there are tiles to share out.
  plan.splits = static_cast<int>(std::clamp<std::int64_t>(ceil_div(2 * device.multiprocessors, plan.num_tasks), 1,
                                                          std::min<std::int64_t>(plan.chunk_tiles, 64)));
  const auto aligned = [](std::int64_t bytes) { return round_up(bytes, 256); };
  plan.partials_at = aligned(plan.chunk_tiles * plan.tape_elements * kSize);
  plan.log_prob_at = plan.partials_at + aligned(plan.splits * program.num_parameters * kSize);
  plan.sums_at = plan.log_prob_at + aligned(plan.chunk_tiles * plan.tile_rows * kSize);
  plan.workspace_bytes = plan.sums_at + aligned(sum_workspace_bytes(plan.chunk_tiles * plan.tile_rows));
  return plan;
}

template <class T>
Status launch_gradient(const GradientPlan& plan, const Program<T>& program, const GradientTask* tasks,
                       const GradientCall<T>& call, void* workspace, Stream stream) {
  if (call.rows == 0) {
    if (call.sum_log_prob != nullptr) {
      if (const Status s = launch(set_double, 1, kWarp, 0, stream, call.sum_log_prob, 0.0)) return s;
    }
    if (call.gradient == nullptr || call.accumulate) return 0;
    return launch(add_partials<T>, element_blocks(program.num_parameters), kThreads, 0, stream,
                  static_cast<const T*>(nullptr), 0, program.num_parameters, false, call.gradient);
  }
  if constexpr (sizeof(T) == 4) {
    switch (plan.multiply) {
      case Multiply::tf32x3:
        return launch_gradient_with<T, Multiply::tf32x3>(plan, program, tasks, call, workspace, stream);
      case Multiply::tf32:
        return launch_gradient_with<T, Multiply::tf32>(plan, program, tasks, call, workspace, stream);
      case Multiply::bf16:
        return launch_gradient_with<T, Multiply::bf16>(plan, program, tasks, call, workspace, stream);
      default:
        break;
    }
  }
  return launch_gradient_with<T, Multiply::fma>(plan, program, tasks, call, workspace, stream);
}

Status prepare_gradient(const Device& device) {
  const std::int64_t bytes = device.shared_bytes_per_block;
  if (const Status s = prepare_gradient_with<float, Multiply::fma>(bytes)) return s;
  if (const Status s = prepare_gradient_with<float, Multiply::tf32x3>(bytes)) return s;
  if (const Status s = prepare_gradient_with<float, Multiply::tf32>(bytes)) return s;
  if (const Status s = prepare_gradient_with<float, Multiply::bf16>(bytes)) return s;
  return prepare_gradient_with<double, Multiply::fma>(bytes);
}

#define NVPFLOW_INSTANTIATE(T)                                                                                         \
  template std::int32_t gradient_tasks(const Program<T>&, const GradientPlan&, GradientTask*);                         \
  template GradientPlan plan_gradient(const Program<T>&, const Device&, std::int64_t, const GradientOptions<T>&);      \
  template Status launch_gradient(const GradientPlan&, const Program<T>&, const GradientTask*, const GradientCall<T>&, \
                                  void*, Stream);
NVPFLOW_INSTANTIATE(float)
NVPFLOW_INSTANTIATE(double)
#undef NVPFLOW_INSTANTIATE

}  // namespace nvpflow::cuda
