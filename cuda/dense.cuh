// KERNEL PART: dense layers on a tile of rows, Y = X W + c, and the stream of weights through shared memory.
//
// A warp forms 32 rows x 32 outputs at a time: two blocks of 16 rows by four of 8 outputs, 4 sums a lane for each pair,
// in the ownership of the matrix instructions' result: lane 4 g + t has rows g, g + 8 and outputs 2t, 2t + 1.
// Activations and weights lie in the blocks of block_layout.hpp, so that the result of one layer, stored with one
// 16-byte access a lane, is read as the operand of the next with another; inputs of a block are numbered so that no
// lane needs another's numbers. For 16 inputs a warp reads 16 x 512 bytes of shared memory and multiplies 16,384 times
// (three times that in tf32x3): 64 cycles of reading at 128 bytes a cycle beside 48 to 80 of a Hopper multiprocessor's
// mma.sync rate in tf32x3. The fma path reads the same bytes four chunks at a time, 48 broadcast accesses a warp for
// 128 cycles of multiply-adds.
//
// tf32x3: a = hi + lo, both TF32; hi hi + hi lo + lo hi misses lo lo, 2^-22 of the product. The hardware cuts its sums
// off instead of rounding them, so products of 16 inputs are summed from zero and then added with rounding.
#pragma once

#include <type_traits>

#include "elementary.cuh"

namespace nvpflow::cuda {

/// A thread's place in its warp.
struct Lane {
  int g, t;
  int chunk;  // elements from the start of a block to the lane's own four

  NVPFLOW_DEVICE explicit Lane(int index) : g(index / 4), t(index % 4), chunk(at(g, t)) {}
  NVPFLOW_DEVICE static int at(int g, int t) { return 16 * g + 4 * (t ^ (g >> 1)); }
};

/// activation_index for the sizes of a tile; blocks: of 8 features.
NVPFLOW_DEVICE int place(int r, int f, int blocks) {
  return ((r >> 4) * blocks + (f >> 3)) * kBlock + Lane::at(r & 7, (f >> 1) & 3) + ((r >> 3) & 1) * 2 + (f & 1);
}

/// Blocks of 8 features, or outputs.
NVPFLOW_DEVICE int blocks_of(int features) { return (features + 7) / 8; }

/// Rows of activations in memory: at the first block of the warp's rows. kShared: in shared memory for certain, kept as
/// an offset, so that the compiler knows it too.
template <class T, bool kShared>
struct MemoryRows {
  T* base = nullptr;
  int offset = 0;
  int stride = 0;  // elements between blocks of 16 rows

  NVPFLOW_DEVICE MemoryRows(T* p, int elements) : stride(elements) {
    if constexpr (kShared) {
      offset = static_cast<int>(p - reinterpret_cast<T*>(shared_memory()));
    } else {
      base = p;
    }
  }
  NVPFLOW_DEVICE T* at(int element) const {
    if constexpr (kShared) return reinterpret_cast<T*>(shared_memory()) + (offset + element);
    return base + element;
  }
  NVPFLOW_DEVICE Vec4<T> own(const Lane& lane, int row_block, int block) const {
    return load4(at(row_block * stride + block * kBlock + lane.chunk));
  }
  /// What the lane (g, t) of the same rows owns.
  NVPFLOW_DEVICE Vec4<T> of(const Lane& lane, int row_block, int block, int t) const {
    return load4(at(row_block * stride + block * kBlock + Lane::at(lane.g, t)));
  }
};

/// Operand rows that are the result of the layer before, still in its registers.
template <class T>
struct RegisterRows {
  const T (&values)[kRowBlocks * kOutBlocks][4];

  NVPFLOW_DEVICE Vec4<T> own(const Lane&, int row_block, int block) const {
    const auto& v = values[row_block * kOutBlocks + block];
    return {v[0], v[1], v[2], v[3]};
  }
  NVPFLOW_DEVICE Vec4<T> of(const Lane& lane, int row_block, int block, int t) const {
    const auto& v = values[row_block * kOutBlocks + block];
    const int from = 4 * lane.g + t;
    return {shuffle(v[0], from), shuffle(v[1], from), shuffle(v[2], from), shuffle(v[3], from)};
  }
};

/// Sums of a warp: [row block x output block][4].
template <class T, int NB = kOutBlocks>
using Sums = T[kRowBlocks * NB][4];

/// The bias of products that have none.
struct NoBias {};

/// sums = bias for outputs from 8 * first_block; blocks past `valid` stay zero.
template <class T, int NB, class Bias>
NVPFLOW_DEVICE void start_sums(Bias bias, int first_block, int valid, const Lane& lane, T (&sums)[kRowBlocks * NB][4]) {
  NVPFLOW_UNROLL
  for (int nb = 0; nb < NB; ++nb) {
    Vec2<T> c = {};
    if constexpr (!std::is_same_v<Bias, NoBias>) {
      if (nb < valid) c = load2(bias + 8 * (first_block + nb) + 2 * lane.t);
    }
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) {
      T(&sum)[4] = sums[rb * NB + nb];
      sum[0] = sum[2] = c.x;
      sum[1] = sum[3] = c.y;
    }
  }
}

// ---- products of 16 inputs -----------------------------------------------------------------------------------------

/// The nearest TF32, ties away from zero.
NVPFLOW_DEVICE unsigned round_tf32(float x) { return (to_bits(x) + 0x1000u) & 0xffffe000u; }

/// x = hi + lo. NaN stays in lo: the rounding may lose it from hi.
struct Split {
  unsigned hi, lo;
  NVPFLOW_DEVICE explicit Split(float x) : hi(round_tf32(x)), lo(to_bits(x - from_bits(hi))) {}
  Split() = default;
};

/// Whether block nb of NB is formed where `valid` of them are wanted: all where more than half are, else half of them.
/// So products run without a branch; what nobody wants is at most one block, which takes the weights of the last one.
template <int NB>
NVPFLOW_DEVICE bool is_formed(int nb, bool all) {
  return all || nb < NB / 2;
}
template <int NB>
NVPFLOW_DEVICE int weight_block(int nb, bool all, int valid) {
  return nb == (all ? NB : NB / 2) - 1 ? valid - 1 : nb;
}

/// sums += x W for the inputs of two blocks of 8 (of the first only, unless `both`). w: the weights' block of the
/// first outputs; stride: to that of the next 8 outputs. all: is_formed.
template <class T, int NB, class Rows>
NVPFLOW_DEVICE void multiply_fma(const Rows& rows, int block, bool both, const T* w, int stride, int valid,
                                 const Lane& lane, T (&sums)[kRowBlocks * NB][4]) {
  NVPFLOW_UNROLL
  for (int t = 0; t < 4; ++t) {
    Vec4<T> x[kRowBlocks][2];
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) {
      x[rb][0] = rows.of(lane, rb, block, t);
      x[rb][1] = both ? rows.of(lane, rb, block + 1, t) : Vec4<T>{};
    }
    NVPFLOW_UNROLL
    for (int nb = 0; nb < NB; ++nb) {
      if (nb >= valid) continue;
      NVPFLOW_UNROLL
      for (int j = 0; j < 2; ++j) {
        const Vec4<T> weight = load4(w + nb * stride + Lane::at(2 * lane.t + j, t));
        NVPFLOW_UNROLL
        for (int rb = 0; rb < kRowBlocks; ++rb) {
          T &upper = sums[rb * NB + nb][j], &lower = sums[rb * NB + nb][2 + j];
          upper = multiply_add(x[rb][0].x, weight.x, upper);
          lower = multiply_add(x[rb][0].z, weight.x, lower);
          upper = multiply_add(x[rb][0].y, weight.y, upper);
          lower = multiply_add(x[rb][0].w, weight.y, lower);
          upper = multiply_add(x[rb][1].x, weight.z, upper);
          lower = multiply_add(x[rb][1].z, weight.z, lower);
          upper = multiply_add(x[rb][1].y, weight.w, upper);
          lower = multiply_add(x[rb][1].w, weight.w, lower);
        }
      }
    }
  }
}

template <int NB, class Rows>
NVPFLOW_DEVICE void multiply_tf32x3(const Rows& rows, int block, bool both, bool all, const float* w, int stride,
                                    int valid, const Lane& lane, float (&sums)[kRowBlocks * NB][4]) {
  unsigned hi[kRowBlocks][2][4], lo[kRowBlocks][2][4];
  NVPFLOW_UNROLL
  for (int rb = 0; rb < kRowBlocks; ++rb) {
    NVPFLOW_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Vec4<float> v = half == 0 || both ? rows.own(lane, rb, block + half) : Vec4<float>{};
      const float parts[4] = {v.x, v.z, v.y, v.w};
      NVPFLOW_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Split split(parts[i]);
        hi[rb][half][i] = split.hi;
        lo[rb][half][i] = split.lo;
      }
    }
  }
  NVPFLOW_UNROLL
  for (int nb = 0; nb < NB; ++nb) {
    if (!is_formed<NB>(nb, all)) continue;
    const Vec4<float> weight = load4(w + weight_block<NB>(nb, all, valid) * stride + lane.chunk);
    const Split w0(weight.x), w1(weight.y), w2(weight.z), w3(weight.w);
    const unsigned w_hi[2][2] = {{w0.hi, w1.hi}, {w2.hi, w3.hi}}, w_lo[2][2] = {{w0.lo, w1.lo}, {w2.lo, w3.lo}};
    float d[kRowBlocks][4] = {};
    // The small products first, and the two row blocks in turn, so that neighbours do not wait for each other.
    NVPFLOW_UNROLL
    for (int step = 0; step < 6; ++step) {
      const int half = step % 2;
      if (half == 1 && !both) continue;
      NVPFLOW_UNROLL
      for (int rb = 0; rb < kRowBlocks; ++rb) {
        multiply_tf32(d[rb], step / 2 == 0 ? lo[rb][half] : hi[rb][half], step / 2 == 1 ? w_lo[half] : w_hi[half]);
      }
    }
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) {
      NVPFLOW_UNROLL
      for (int i = 0; i < 4; ++i) sums[rb * NB + nb][i] += d[rb][i];
    }
  }
}

template <int NB, class Rows>
NVPFLOW_DEVICE void multiply_rounded_tf32(const Rows& rows, int block, bool both, bool all, const float* w, int stride,
                                          int valid, const Lane& lane, float (&sums)[kRowBlocks * NB][4]) {
  unsigned x[kRowBlocks][2][4];
  NVPFLOW_UNROLL
  for (int rb = 0; rb < kRowBlocks; ++rb) {
    NVPFLOW_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Vec4<float> v = half == 0 || both ? rows.own(lane, rb, block + half) : Vec4<float>{};
      x[rb][half][0] = round_tf32(v.x);
      x[rb][half][1] = round_tf32(v.z);
      x[rb][half][2] = round_tf32(v.y);
      x[rb][half][3] = round_tf32(v.w);
    }
  }
  NVPFLOW_UNROLL
  for (int nb = 0; nb < NB; ++nb) {
    if (!is_formed<NB>(nb, all)) continue;
    const Vec4<float> v = load4(w + weight_block<NB>(nb, all, valid) * stride + lane.chunk);
    const unsigned weight[2][2] = {{round_tf32(v.x), round_tf32(v.y)}, {round_tf32(v.z), round_tf32(v.w)}};
    NVPFLOW_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (half == 1 && !both) continue;
      NVPFLOW_UNROLL
      for (int rb = 0; rb < kRowBlocks; ++rb) multiply_tf32(sums[rb * NB + nb], x[rb][half], weight[half]);
    }
  }
}

template <int NB, class Rows>
NVPFLOW_DEVICE void multiply_rounded_bf16(const Rows& rows, int block, bool both, bool all, const float* w, int stride,
                                          int valid, const Lane& lane, float (&sums)[kRowBlocks * NB][4]) {
  unsigned x[kRowBlocks][4];
  NVPFLOW_UNROLL
  for (int rb = 0; rb < kRowBlocks; ++rb) {
    const Vec4<float> v0 = rows.own(lane, rb, block);
    const Vec4<float> v1 = both ? rows.own(lane, rb, block + 1) : Vec4<float>{};
    x[rb][0] = pack_bf16(v0.x, v0.y);
    x[rb][1] = pack_bf16(v0.z, v0.w);
    x[rb][2] = pack_bf16(v1.x, v1.y);
    x[rb][3] = pack_bf16(v1.z, v1.w);
  }
  NVPFLOW_UNROLL
  for (int nb = 0; nb < NB; ++nb) {
    if (!is_formed<NB>(nb, all)) continue;
    const Vec4<float> v = load4(w + weight_block<NB>(nb, all, valid) * stride + lane.chunk);
    const unsigned weight[2] = {pack_bf16(v.x, v.y), pack_bf16(v.z, v.w)};
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) multiply_bf16(sums[rb * NB + nb], x[rb], weight);
  }
}

/// both, all: where these are literals the products run without branches.
template <Multiply M, class T, int NB, class Rows>
NVPFLOW_DEVICE void multiply16(const Rows& rows, int block, bool both, bool all, const T* w, int stride, int valid,
                               const Lane& lane, T (&sums)[kRowBlocks * NB][4]) {
  if constexpr (M == Multiply::fma) multiply_fma<T, NB>(rows, block, both, w, stride, valid, lane, sums);
  if constexpr (M == Multiply::tf32x3) multiply_tf32x3<NB>(rows, block, both, all, w, stride, valid, lane, sums);
  if constexpr (M == Multiply::tf32) multiply_rounded_tf32<NB>(rows, block, both, all, w, stride, valid, lane, sums);
  if constexpr (M == Multiply::bf16) multiply_rounded_bf16<NB>(rows, block, both, all, w, stride, valid, lane, sums);
}

/// Inputs of the blocks [begin, end) of 16, of `in` in all. w: the weights of block `begin`.
template <Multiply M, class T, int NB, class Rows>
NVPFLOW_DEVICE void multiply_blocks(const Rows& rows, int in, int begin, int end, const T* w, int stride, int valid,
                                    const Lane& lane, T (&sums)[kRowBlocks * NB][4]) {
  const auto multiply = [&](int b, bool both, bool all) {
    multiply16<M, T, NB>(rows, 2 * b, both, all, w + (b - begin) * kBlock, stride, valid, lane, sums);
  };
  if constexpr (M == Multiply::fma) {
    for (int b = begin; b < end; ++b) multiply(b, 16 * b + 8 < in, true);
  } else {
    const bool odd = 16 * end - 8 >= in;  // the last block has 8 inputs
    const int whole = odd ? end - 1 : end;
    if (valid > NB / 2) {
      NVPFLOW_ROLLED
      for (int b = begin; b < whole; ++b) multiply(b, true, true);
      if (odd) multiply(whole, false, true);
    } else {
      NVPFLOW_ROLLED
      for (int b = begin; b < whole; ++b) multiply(b, true, false);
      if (odd) multiply(whole, false, false);
    }
  }
}

// ---- results -----------------------------------------------------------------------------------------------------

/// Applies the activation to all sums. relu at once; of the others one copy of the text serves all sums, which move
/// past it.
template <class T, int N>
NVPFLOW_DEVICE void activate_sums(Act act, T (&sums)[N][4]) {
  if (act == Act::none) return;
  if (act == Act::relu) {
    NVPFLOW_UNROLL
    for (int n = 0; n < N; ++n) {
      NVPFLOW_UNROLL
      for (int i = 0; i < 4; ++i) sums[n][i] = positive_part(sums[n][i]);
    }
    return;
  }
  NVPFLOW_ROLLED
  for (int turn = 0; turn < N; ++turn) {
    T first[4];
    NVPFLOW_UNROLL
    for (int i = 0; i < 4; ++i) first[i] = activate(act, sums[0][i]);
    NVPFLOW_UNROLL
    for (int n = 0; n + 1 < N; ++n) {
      NVPFLOW_UNROLL
      for (int i = 0; i < 4; ++i) sums[n][i] = sums[n + 1][i];
    }
    NVPFLOW_UNROLL
    for (int i = 0; i < 4; ++i) sums[N - 1][i] = first[i];
  }
}

/// Stores outputs from 8 * first_block.
template <class T, bool kShared>
NVPFLOW_DEVICE void store_sums(const Sums<T>& sums, int first_block, int valid, const Lane& lane,
                               const MemoryRows<T, kShared>& to) {
  NVPFLOW_UNROLL
  for (int nb = 0; nb < kOutBlocks; ++nb) {
    if (nb >= valid) continue;
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) {
      const T(&sum)[4] = sums[rb * kOutBlocks + nb];
      store4(to.at(rb * to.stride + (first_block + nb) * kBlock + lane.chunk), Vec4<T>{sum[0], sum[1], sum[2], sum[3]});
    }
  }
}

// ---- weights through shared memory ---------------------------------------------------------------------------------

/// Whether a layer's matrix is multiplied on the way back: for the cotangent of its input, or, of a linear layer that
/// runs backwards, also for that of y, from which its gradient is formed.
template <class T>
NVPFLOW_DEVICE bool is_linear_wanted(bool input_wanted, const Layer<T>& layer, bool inverse) {
  return input_wanted || layer.inverse != inverse;
}

/// The same of a dense layer of Reach::all.
NVPFLOW_DEVICE bool is_dense_wanted(const Dense& d, bool input_wanted, bool context_wanted) {
  if (d.role == Role::gate) return context_wanted;
  return !d.first || input_wanted || context_wanted;
}

/// The dense layers of a flow in the order in which a tile meets them: layer by layer, and with kGradient all the way
/// back with transposed weights. reach: Program::reach.
template <class T, bool kGradient, Reach reach>
struct Passes {
  const Program<T>& program;
  bool inverse;
  int first_step, last_step;  // layers in the order of the run; [0, num_layers) or one of them
  bool input_wanted;          // of the backward pass: also the cotangent of the flow's input
  bool context_wanted;        // the same of the context
  int step, j;
  bool backward;

  NVPFLOW_DEVICE Passes(const Program<T>& p, bool run_inverse, int first, int last, bool of_input = false,
                        bool of_context = false)
      : program(p),
        inverse(run_inverse),
        first_step(first),
        last_step(last),
        input_wanted(of_input),
        context_wanted(of_context) {
    restart();
  }
  NVPFLOW_DEVICE const Layer<T>& layer_at(int s) const {
    return program.layers[inverse ? program.num_layers - 1 - s : s];
  }
  NVPFLOW_DEVICE void restart() {
    backward = false;
    step = first_step;
    j = -1;
  }
  NVPFLOW_DEVICE int num_dense(int s) const { return layer_at(s).num_dense; }
  /// Of the way back.
  NVPFLOW_DEVICE bool is_wanted() const {
    const bool of_input = step > first_step || input_wanted;
    if constexpr (reach == Reach::all) {
      if (facts_of(layer_at(step).kind).has_matrices) return is_linear_wanted(of_input, layer_at(step), inverse);
      return is_dense_wanted(dense(), of_input, context_wanted);
    }
    return j > 0 || of_input;
  }
  /// False at the end of the tile, from where restart() leads on.
  NVPFLOW_DEVICE bool next() {
    if (!backward) {
      ++j;
      for (; step < last_step; ++step, j = 0) {
        if (j < num_dense(step)) return true;
      }
      if (!kGradient || first_step >= last_step) return false;
      backward = true;
      step = last_step - 1;
      j = num_dense(step);
    }
    for (;;) {
      for (--j; j < 0; j = num_dense(step) - 1) {
        if (--step < first_step) return false;
      }
      if (is_wanted()) return true;
    }
  }
  NVPFLOW_DEVICE const Dense& dense() const {
    const Layer<T>& layer = layer_at(step);
    const bool other = reach == Reach::all && facts_of(layer.kind).has_matrices && layer.inverse != inverse;
    return program.dense[layer.first_dense + j + (other ? 1 : 0)];
  }
  NVPFLOW_DEVICE int in() const { return backward ? dense().out : dense().in; }
  NVPFLOW_DEVICE int out() const { return backward ? dense().in : dense().out; }
  NVPFLOW_DEVICE const T* weights() const {
    return backward ? program.transposed + dense().transposed : program.packed + dense().weights;
  }
};

/// Two stages of shared memory, [output blocks][stage_blocks][128] each: one is read while the next one fills.
template <class T, bool kGradient, Reach reach>
struct WeightStream {
  Passes<T, kGradient, reach> passes;
  T* stages;
  int across_blocks;   // output blocks of a stage: of all warps that share their rows
  int stage_blocks;    // blocks of 16 inputs of a stage
  std::int64_t tiles;  // still to begin
  int group = 0, block = 0, parity = 0;
  bool more;

  NVPFLOW_DEVICE WeightStream(const Passes<T, kGradient, reach>& order, T* memory, int out_blocks_of_stage,
                              int inputs_of_stage, std::int64_t num_tiles)
      : passes(order),
        stages(memory),
        across_blocks(out_blocks_of_stage),
        stage_blocks(inputs_of_stage / 16),
        tiles(num_tiles),
        more(tiles > 0) {
    if (more) more = passes.next();
    --tiles;
    issue();
  }

  NVPFLOW_DEVICE int stage_size() const { return across_blocks * stage_blocks * kBlock; }
  NVPFLOW_DEVICE int stride() const { return stage_blocks * kBlock; }

  /// Starts the copy of the next stage into the memory that is free, and goes on to the one after it.
  NVPFLOW_DEVICE void issue() {
    if (more) {
      const int blocks = (passes.in() + 15) / 16, outs = blocks_of(passes.out());
      const int here = blocks - block < stage_blocks ? blocks - block : stage_blocks;
      const int first_out = group * across_blocks;
      const int outs_here = outs - first_out < across_blocks ? outs - first_out : across_blocks;
      constexpr int kCopy = 16 / static_cast<int>(sizeof(T));
      const int run = here * kBlock / kCopy;  // copies for one output block
      T* to = stages + parity * stage_size();
      const T* from = passes.weights() + (static_cast<std::int64_t>(first_out) * blocks + block) * kBlock;
      for (int i = thread_index(); i < outs_here * run; i += num_threads()) {
        const int o = i / run, at = (i - o * run) * kCopy;
        copy16_async(to + o * stride() + at, from + static_cast<std::int64_t>(o) * blocks * kBlock + at);
      }
      block += here;
      if (block >= blocks) {
        block = 0;
        ++group;
        if (group * across_blocks >= outs) advance();
      }
    }
    copies_commit();
  }

  NVPFLOW_DEVICE void advance() {
    group = 0;
    if (passes.next()) return;
    passes.restart();
    more = tiles > 0 && passes.next();
    --tiles;
  }

  /// The next stage, complete for all threads. What acquire() returned before may be overwritten from here on.
  NVPFLOW_DEVICE const T* acquire() {
    copies_wait<0>();
    block_barrier();
    const T* ready = stages + parity * stage_size();
    parity ^= 1;
    issue();
    return ready;
  }
};

/// How a dense layer multiplies, as a type.
template <Multiply M>
struct By {};

/// One dense layer with weights in shared memory, formed by one warp. finish(first output block, valid, sums).
template <Multiply M, class T, class Rows, class Finish>
NVPFLOW_DEVICE void dense_resident(const Dense& d, const T* packed, const Rows& rows, const Lane& lane, Finish finish) {
  const int in_blocks = (d.in + 15) / 16, outs = blocks_of(d.out);
  for (int first = 0; first < outs; first += kOutBlocks) {
    const int valid = outs - first < kOutBlocks ? outs - first : kOutBlocks;
    Sums<T> sums;
    start_sums<T, kOutBlocks>(packed + d.bias, first, valid, lane, sums);
    multiply_blocks<M, T, kOutBlocks>(rows, d.in, 0, in_blocks, packed + d.weights + first * in_blocks * kBlock,
                                      in_blocks * kBlock, valid, lane, sums);
    finish(first, valid, sums);
  }
}

/// One dense layer with weights from the stream. Whatever has been stored before by any thread of the block may be the
/// input: acquire() is a barrier. bias: a pointer, or NoBias. finish(first output block, valid, sums).
template <Multiply M, class T, bool kGradient, Reach reach, class Bias, bool kShared, class Finish>
NVPFLOW_DEVICE void dense_streamed(WeightStream<T, kGradient, reach>& stream, int in, int out, Bias bias,
                                   const MemoryRows<T, kShared>& rows, int across, int num_across, const Lane& lane,
                                   Finish finish) {
  const int blocks = (in + 15) / 16, outs = blocks_of(out);
  for (int first = 0; first < outs; first += num_across * kOutBlocks) {
    const int mine = first + across * kOutBlocks;
    const int valid = outs - mine < kOutBlocks ? outs - mine : kOutBlocks;  // may be negative
    Sums<T> sums;
    start_sums<T, kOutBlocks>(bias, mine, valid, lane, sums);
    for (int b = 0; b < blocks; b += stream.stage_blocks) {
      const T* w = stream.acquire() + across * kOutBlocks * stream.stride();
      const int end = b + stream.stage_blocks < blocks ? b + stream.stage_blocks : blocks;
      if (valid > 0) multiply_blocks<M, T, kOutBlocks>(rows, in, b, end, w, stream.stride(), valid, lane, sums);
    }
    if (valid > 0) finish(mine, valid, sums);
  }
}

}  // namespace nvpflow::cuda
