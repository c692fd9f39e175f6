// KERNEL: the reverse pass of a flow in three kernels over a chunk of tiles; a row costs 3 times the FLOPs of its
// forward.
//
// clang-format off
// gradient_tiles   takes a tile forward and back. Its activations lie on the tape, global memory that stays in the L2
//                  cache for narrow flows: the input of every dense layer, the cotangent of its output, and the scale
//                  and shift's derivatives. Weights are streamed through shared memory (dense.cuh), transposed on the
//                  way back. Bound: the multiply-adds, or writing 4 (a + 2 sum(hidden) + 5 b) bytes a row and coupling.
// weight_gradient  multiplies inputs and cotangents, X^T G over the rows: a block forms 64 inputs x 64 outputs of one
//                  kernel and loops over the tiles of its part of the chunk in order, one accumulator a parameter.
//                  Reads 4 (in / 64 + out / 64) 64 bytes a row and layer. Few parameters: the tiles are cut in `splits`
//                  parts.
// add_partials     adds the parts up in order. No atomics: gradients have the same bits from run to run.
// clang-format on

#include <algorithm>

#include "affine.cuh"
#include "dense.cuh"
#include "diagonal.cuh"
#include "linear.cuh"
#include "networks.cuh"
#include "perceptron.cuh"
#include "plan.hpp"
#include "spline.cuh"
#include "tape.hpp"
#include "tile.cuh"

namespace nvpflow::cuda {
namespace {

// ---- tiles forward and back ----------------------------------------------------------------------------------------

/// reach: Program::reach, or more.
template <class T, Multiply M, Reach reach>
struct Reverse {
  static constexpr bool kGeneral = true;
  using Rows = MemoryRows<T, false>;
  const GradientPlan& plan;
  const Program<T>& program;
  const GradientCall<T>& call;
  WeightStream<T, true, reach>& stream;
  Tile<T> tile, cotangents;  // of the state; they share the notes on rows
  const T* packed;           // where biases and affine numbers are read
  Lane lane;
  int across, row_block;
  T* log_det_cotangent;  // [rows], shared memory
  T* tape = nullptr;     // of the tile
  bool context_wanted;
  T log_det[kRowBlocks][2];

  NVPFLOW_DEVICE Reverse(const GradientPlan& p, const Program<T>& f, const GradientCall<T>& c,
                         WeightStream<T, true, reach>& s, T* shared)
      : plan(p),
        program(f),
        call(c),
        stream(s),
        tile(f),
        cotangents(f),
        packed(f.packed),
        lane(thread_index() % kWarp),
        across(thread_index() / kWarp % p.warps_across),
        row_block(thread_index() / kWarp / p.warps_across * kRowBlocks),
        context_wanted(is_context_wanted(f, c)) {
    tile.rows = p.tile_rows;
    tile.sums = shared;
    if (p.warps_across > 1) shared += 2 * p.warps_across * p.tile_rows;
    log_det_cotangent = shared;
    tile.poison = reinterpret_cast<int*>(shared + p.tile_rows);
  }

  NVPFLOW_DEVICE Team team() const { return {thread_index(), num_threads()}; }
  NVPFLOW_DEVICE void barrier() const { block_barrier(); }
  NVPFLOW_DEVICE const Layer<T>& layer_at(int step) const {
    return program.layers[call.inverse ? program.num_layers - 1 - step : step];
  }
  NVPFLOW_DEVICE T* tape_at(int step) const {
    return tape + layer_tape<reach>(program, call.inverse ? program.num_layers - 1 - step : step, plan.tile_rows);
  }
  /// The warp's rows of an array on the tape.
  NVPFLOW_DEVICE Rows rows_of(T* base, std::int64_t features) const {
    const int stride = blocks_of(static_cast<int>(features)) * kBlock;
    return {base + row_block * stride, stride};
  }
  NVPFLOW_DEVICE T* context() const { return tape + ContextTape<T>(program, plan.tile_rows).context; }
  NVPFLOW_DEVICE T* context_cotangent() const { return tape + ContextTape<T>(program, plan.tile_rows).cotangent(); }
  NVPFLOW_DEVICE void copy(const T* from, T* to, std::int64_t count) const {
    for (std::int64_t i = 4 * thread_index(); i < count; i += 4 * num_threads()) store4(to + i, load4(from + i));
  }

  NVPFLOW_DEVICE void begin(std::int32_t index, T* tile_tape) {
    tape = tile_tape;
    const std::int64_t size = state_elements(program, plan.tile_rows);
    tile.begin(index, call.rows);
    tile.state0 = tape;
    cotangents = tile;
    cotangents.state0 += size;
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) log_det[rb][0] = log_det[rb][1] = T(0);
  }

  // ---- forward -----------------------------------------------------------------------------------------------------

  template <class Tape>
  NVPFLOW_DEVICE auto affine_of(const Tape& keep, T* part) {
    return [this, &keep, part](int first, int valid, Sums<T>& sums) {
      affine_taped(*this, keep, part, first, valid, sums);
    };
  }

  /// As on the way of inference: networks run ahead of what a layer's kind does, and, on the way back, behind it.
  NVPFLOW_DEVICE void networks_forward(const Layer<T>& layer, T* part) {
    if constexpr (reach == Reach::all) {
      const NetworksTape<T> keep(program, layer, plan.tile_rows);
      networks_taped<M>(*this, keep, part, affine_of(keep, part));
    }
  }
  NVPFLOW_DEVICE void forward(Of<Kind::coupling>, const Layer<T>& layer, T* part) {
    if constexpr (reach != Reach::all) {
      const CouplingTape<T> keep(program, layer, plan.tile_rows);
      network_taped<M>(*this, keep, part, affine_of(keep, part));
    }
  }
  NVPFLOW_DEVICE void forward(Of<Kind::spline>, const Layer<T>& layer, T* part) {
    if constexpr (reach == Reach::all) splines_taped(*this, layer, part);
  }
  NVPFLOW_DEVICE void forward(Of<Kind::diagonal>, const Layer<T>& layer, T* part) {
    diagonal_taped(*this, layer, part);
  }
  NVPFLOW_DEVICE void forward(Of<Kind::linear>, const Layer<T>& layer, T* part) {
    if constexpr (reach == Reach::all) {
      linear_taped<M>(*this, layer, part, [&]<Multiply N>(By<N>, const Dense& d, const auto& rows, auto finish) {
        dense_streamed<N>(stream, d.in, d.out, packed + d.bias, rows, across, plan.warps_across, lane, finish);
      });
    }
  }

  NVPFLOW_DEVICE void forward() {
    for (int step = 0; step < program.num_layers; ++step) {
      block_barrier();
      const Layer<T>& layer = layer_at(step);
      networks_forward(layer, tape_at(step));
      visit(layer, [&](auto kind) { forward(kind, layer, tape_at(step)); });
    }
    block_barrier();
  }

  // ---- back --------------------------------------------------------------------------------------------------------

  /// Of the log-determinant of row r, and of log p where the call is of that.
  NVPFLOW_DEVICE T given_cotangent(int r) const {
    if (call.nll) return -static_cast<T>(call.weights(tile.first() + r) * call.nll_factor);
    return call.grad_log_det != nullptr ? call.grad_log_det[tile.first() + r] : T(call.density ? 1 : 0);
  }

  /// The cotangents that the way back starts from: zero for rows past the end, NaN for poisoned ones.
  template <BaseKind kind>
  NVPFLOW_DEVICE void start_cotangents(OfBase<kind> base) {
    const std::int32_t* places = program.places_out(call.inverse);
    const bool of_density = call.nll || call.density;
    if constexpr (OfBase<kind>::kByRows) note_base(base, of_density, places);
    cotangents.for_each(team(), [&](int r, int f) {
      T g = 0;
      const int at = listed(places, f);
      if (r < tile.valid) {
        if constexpr (OfBase<kind>::kByRows) {
          if (of_density) g = latent_cotangent(base, r, f, tile.at(r, at));
        } else {
          if (of_density) g = cuda::latent_cotangent(base, tile.at(r, at), given_cotangent(r));
        }
        if (!of_density && call.grad_out != nullptr) g = call.grad_out[(tile.first() + r) * program.input_size + f];
        g = tile.clean(r, g);
      }
      cotangents.at(r, at) = g;
    });
    for (int r = thread_index(); r < tile.rows; r += num_threads()) {
      T g = 0;
      if (r < tile.valid) {
        g = given_cotangent(r);
        if constexpr (kind == BaseKind::uniform) {
          if (of_density && is_row_outside(r)) g = 0;  // where the density is flat, nothing moves
        }
        g = tile.clean(r, g);
      }
      log_det_cotangent[r] = g;
    }
    block_barrier();
  }

  // ---- bases with parameters, whose part of the tape is zero where the call is of no density

  NVPFLOW_DEVICE T* base_tape() const { return tape + BaseTape<T>(program, plan.tile_rows).begin; }

  /// Sums over the rows.
  NVPFLOW_DEVICE void note_base(OfBase<BaseKind::student_t>, bool of_density, const std::int32_t* places) const {
    const BaseDensity<T>& base = program.base;
    for (int f = thread_index(); f < program.input_size; f += num_threads()) {
      T sum = 0;
      for (int r = 0; of_density && r < tile.valid; ++r) {
        const StudentPoint<T> point =
            student_point(tile.at(r, listed(places, f)), student_number(base, kInverseRoot, f));
        const T by_log_df = multiply_add(
            point.share, student_number(base, kPower, f),
            multiply_add(point.log_term, -student_number(base, kHalf, f), student_number(base, kNormSlope, f)));
        sum = multiply_add(by_log_df, given_cotangent(r), sum);
      }
      base_tape()[f] = sum;
    }
  }
  NVPFLOW_DEVICE T latent_cotangent(OfBase<BaseKind::student_t>, int r, int f, T z) const {
    const T slope = student_number(program.base, kSlope, f);
    const StudentPoint<T> point = student_point(z, student_number(program.base, kInverseRoot, f));
    return copy_sign(slope * point.slope, -z) * given_cotangent(r);
  }

  /// A row each.
  NVPFLOW_DEVICE void note_base(OfBase<BaseKind::mixture>, bool of_density, const std::int32_t* places) const {
    const BaseTape<T> at(program, plan.tile_rows);
    T* keep = base_tape();
    for (int r = thread_index(); r < tile.rows; r += num_threads()) {
      if (of_density && r < tile.valid) {
        note_row(at, keep + r, r, places);
      } else {
        for (std::int64_t i = 0; i < at.whitened(2 * at.components); i += at.rows) keep[i + r] = T(0);
      }
    }
    block_barrier();
  }
  NVPFLOW_DEVICE void note_row(const BaseTape<T>& at, T* keep, int r, const std::int32_t* places) const {
    const BaseDensity<T>& base = program.base;
    const auto z = [&](int f) { return tile.at(r, listed(places, f)); };
    LogSum<T> sum;
    for (std::int64_t m = 0; m < base.components; ++m) {
      T* e = keep + at.whitened(m);
      const T a = Component<T>(base, program.input_size, m).log_density(z, [&](int i, T v) { e[i * at.rows] = v; });
      keep[at.share(m)] = a;
      sum.add(a);
    }
    const T density = sum.value(), g = given_cotangent(r);
    for (std::int64_t m = 0; m < base.components; ++m) {
      const T share = exponential(keep[at.share(m)] - density) * g;
      keep[at.share(m)] = share;
      keep[at.excess(m)] = share - g * base.weights[m];
      const Component<T> component(base, program.input_size, m);
      const T* e = keep + at.whitened(m);
      for (int f = 0; f < program.input_size; ++f) {
        keep[at.pulled(m) + f * at.rows] = component.pulled_back(f, [&](int i) { return e[i * at.rows]; });
      }
    }
  }
  NVPFLOW_DEVICE T latent_cotangent(OfBase<BaseKind::mixture>, int r, int f, T) const {
    const BaseTape<T> at(program, plan.tile_rows);
    const T* keep = base_tape() + r;
    T g = 0;
    for (std::int64_t m = 0; m < at.components; ++m) {
      g = multiply_add(-keep[at.share(m)], keep[at.pulled(m) + f * at.rows], g);
    }
    return g;
  }

  NVPFLOW_DEVICE bool is_row_outside(int r) const {
    for (int f = 0; f < program.input_size; ++f) {
      if (is_outside(program.base, tile.at(r, f))) return true;
    }
    return false;
  }

  NVPFLOW_DEVICE void backward(Of<Kind::coupling>, const Layer<T>& layer, T* part, bool input_wanted) {
    const auto keep = tape_of<reach>(Of<Kind::coupling>(), program, layer, plan.tile_rows);
    affine_backward(*this, keep, part);
    if constexpr (reach != Reach::all) network_backward<M>(*this, keep, part, input_wanted);
  }
  NVPFLOW_DEVICE void backward(Of<Kind::spline>, const Layer<T>& layer, T* part, bool) {
    if constexpr (reach == Reach::all) splines_backward(*this, layer, part);
  }
  NVPFLOW_DEVICE void networks_backward_of(const Layer<T>& layer, T* part, bool input_wanted) {
    if constexpr (reach == Reach::all) {
      networks_backward<M>(*this, NetworksTape<T>(program, layer, plan.tile_rows), part, input_wanted);
    }
  }
  NVPFLOW_DEVICE void backward(Of<Kind::diagonal>, const Layer<T>& layer, T* part, bool) {
    diagonal_backward(*this, layer, part);
  }
  NVPFLOW_DEVICE void backward(Of<Kind::linear>, const Layer<T>& layer, T* part, bool input_wanted) {
    if constexpr (reach == Reach::all) {
      linear_backward<M>(*this, layer, part, is_linear_wanted(input_wanted, layer, call.inverse),
                         [&]<Multiply N>(By<N>, const Dense& d, const auto& rows, auto finish) {
                           dense_streamed<N>(stream, d.out, d.in, NoBias(), rows, across, plan.warps_across, lane,
                                             finish);
                         });
    }
  }

  NVPFLOW_DEVICE void backward() {
    for (int step = program.num_layers - 1; step >= 0; --step) {
      const Layer<T>& layer = layer_at(step);
      const bool input_wanted = step > 0 || call.grad_in != nullptr;
      visit(layer, [&](auto kind) { backward(kind, layer, tape_at(step), input_wanted); });
      networks_backward_of(layer, tape_at(step), input_wanted);
      block_barrier();
    }
  }
};

/// The context on the tape, its poison, and zero for its cotangent.
template <class Walk>
NVPFLOW_DEVICE void start_context(Walk& walk) {
  note_context_poison(walk);
  take_context(walk, walk.context());
  const std::int64_t count = array_size(walk.plan.tile_rows, walk.program.context_size);
  for (std::int64_t i = thread_index(); i < count; i += num_threads()) walk.context_cotangent()[i] = 0;
}

/// What the context's cotangent gives.
template <class Walk, class T>
NVPFLOW_DEVICE void finish_context(const Walk& walk, T* grad_context) {
  if (!walk.context_wanted) return;
  if (grad_context != nullptr) store_context_cotangent(walk, walk.context_cotangent(), grad_context);
  const ContextTape<T> at(walk.program, walk.plan.tile_rows);
  if (at.standardized) sum_context_statistics(walk, at, walk.tape);
}

/// Tiles [first_tile, first_tile + tiles) of the call; tape [tiles][tape_elements], log_prob [tiles * tile_rows].
template <class T, Multiply M, Reach reach>
NVPFLOW_KERNEL(kGradientThreads)
gradient_tiles(NVPFLOW_ARGUMENT GradientPlan plan, NVPFLOW_ARGUMENT Program<T> program,
               NVPFLOW_ARGUMENT GradientCall<T> call, const std::int64_t first_tile, const std::int64_t tiles, T* tape,
               T* log_prob) {
  if constexpr (M != Multiply::fma && !kHasMatrixUnits) return;
  T* stages = reinterpret_cast<T*>(shared_memory());
  const std::int64_t mine = block_index() < tiles ? ceil_div(tiles - block_index(), num_blocks()) : 0;
  const Passes<T, true, reach> passes(program, call.inverse, 0, program.num_layers, call.grad_in != nullptr,
                                      is_context_wanted(program, call));
  WeightStream<T, true, reach> stream(passes, stages, plan.warps_across * kOutBlocks, plan.stage_inputs, mine);
  Reverse<T, M, reach> reverse(plan, program, call, stream, stages + 2 * stream.stage_size());
  TransformCall<T> density;
  density.log_prob = call.nll ? log_prob - first_tile * plan.tile_rows : call.log_prob;
  for (std::int64_t i = block_index(); i < tiles; i += num_blocks()) {
    reverse.begin(static_cast<std::int32_t>(first_tile + i), tape + i * plan.tape_elements);
    block_barrier();
    reverse.tile.clear(reverse.team());
    reverse.cotangents.clear_padding(reverse.team());
    block_barrier();
    reverse.tile.load(reverse.team(), call.in, call.index, program.places_in(call.inverse));
    if constexpr (reach == Reach::all) start_context(reverse);
    reverse.forward();
    with_base<reach>(program, [&](auto base) {
      write_row_sums(base, program.base, reverse.tile, density, reverse.team(), reverse.lane, reverse.row_block,
                     reverse.across, plan.warps_across, program.places_out(call.inverse), reverse.log_det,
                     [] { block_barrier(); });
      reverse.start_cotangents(base);
    });
    reverse.backward();
    if (call.grad_in != nullptr)
      reverse.cotangents.store(reverse.team(), call.grad_in, program.places_in(call.inverse), not_a_number<T>());
    if constexpr (reach == Reach::all) finish_context(reverse, call.grad_context);
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

template <class T>
NVPFLOW_DEVICE void student_gradient(const Program<T>& program, const T* sums, std::int64_t tape_elements,
                                     std::int64_t tiles, T* gradient) {
  for (int f = thread_index(); f < program.input_size; f += num_threads()) {
    T sum = 0;
    for (std::int64_t t = 0; t < tiles; ++t) sum += sums[t * tape_elements + f];
    gradient[program.base.offset + f] = sum;
  }
}

/// The gradient of the parameters of component m, a number a thread.
template <class T>
struct MixtureGradient {
  const Program<T>& program;
  const std::int64_t m;
  const T* first;
  const BaseTape<T> at;
  const std::int64_t stride, tiles;

  NVPFLOW_DEVICE MixtureGradient(const Program<T>& p, std::int64_t component, const T* tape, const GradientPlan& plan,
                                 std::int64_t count)
      : program(p), m(component), first(tape), at(p, plan.tile_rows), stride(plan.tape_elements), tiles(count) {}

  /// The sum over all rows of f(the row's numbers on its tape).
  template <class F>
  NVPFLOW_DEVICE T sum_of_rows(F f) const {
    T sum = 0;
    for (std::int64_t t = 0; t < tiles; ++t) {
      for (std::int64_t r = 0; r < at.rows; ++r) sum += f(first + t * stride + r);
    }
    return sum;
  }

  NVPFLOW_DEVICE void write(T* gradient) const {
    const BaseDensity<T>& base = program.base;
    const std::int64_t features = at.features, below = base.full ? features * (features - 1) / 2 : 0;
    const Component<T> component(base, program.input_size, m);
    for (std::int64_t i = thread_index(); i < 1 + 2 * features + below; i += num_threads()) {
      if (i == 0) {
        gradient[base.offset + m] = sum_of_rows([&](const T* row) { return row[at.excess(m)]; });
      } else if (i <= features) {
        const std::int64_t j = i - 1;
        gradient[base.means_offset + m * features + j] =
            sum_of_rows([&](const T* row) { return row[at.share(m)] * row[at.pulled(m) + j * at.rows]; });
      } else if (i <= 2 * features) {
        const std::int64_t j = i - 1 - features;
        gradient[base.log_scales_offset + m * features + j] = sum_of_rows([&](const T* row) {
          const T e = row[at.whitened(m) + j * at.rows];
          return row[at.share(m)] * multiply_add(e, e, T(-1));
        });
      } else {
        const std::int64_t k = i - 1 - 2 * features;  // row by row below the diagonal
        std::int64_t row_of = 1;
        while (row_of * (row_of + 1) / 2 <= k) ++row_of;
        const std::int64_t j = k - row_of * (row_of - 1) / 2;
        const T sum = sum_of_rows([&](const T* row) {
          return row[at.share(m)] * row[at.pulled(m) + row_of * at.rows] * row[at.whitened(m) + j * at.rows];
        });
        gradient[base.lower_offset + m * below + k] = sum * component.factor[component.row(j) + j];
      }
    }
  }
};

/// One task over the tiles of one split.
template <class T, Multiply M>
struct TaskWorker {
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
      T* to = stages + step % 2 * kTaskStage;
      copy_rows(from + task.input, d.in, task.first_in, row_block, to);
      copy_rows(from + task.cotangent, d.out, task.first_out, row_block, to + kTaskStage / 2);
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
      const T* x = stages + step % 2 * kTaskStage;
      const T* g = x + kTaskStage / 2;
      outer16<M>(x, g, 0, first_in, first_out, lane, sums);
      outer16<M>(x, g, 1, first_in, first_out, lane, sums);
      if (task.first_in != 0 || thread_index() >= kTaskOut) continue;
      for (int r = 0; r < kTaskRows; ++r) bias += g[place(r, thread_index(), 8)];
    }
    store(d, lane, 2 * first_in, 2 * first_out, sums);
    const int o = task.first_out + thread_index();
    if (task.first_in != 0 || thread_index() >= kTaskOut || o >= d.out) return;
    const std::int64_t at = bias_at(d, o);
    if (at >= 0) partial[at] = bias;
  }

  /// Where the gradient of a weight goes, or of a bias; -1: it is no parameter.
  NVPFLOW_DEVICE std::int64_t weight_at(const Dense& d, int i, int o, int part) const {
    if (d.listed) return program.source[d.weights + weight_index(i, o, d.in)];
    return d.interleaved ? d.kernel_offset[part] + static_cast<std::int64_t>(i) * (d.out / 2) + o / 2
                         : d.kernel_offset[0] + static_cast<std::int64_t>(i) * d.out + o;
  }
  NVPFLOW_DEVICE std::int64_t bias_at(const Dense& d, int o) const {
    if (d.listed) return program.source[d.bias + o];
    return d.interleaved ? d.bias_offset[o % 2] + o / 2 : d.bias_offset[0] + o;
  }

  NVPFLOW_DEVICE void store(const Dense& d, const Lane& lane, int first_in, int first_out,
                            const T (&sums)[2][4][4]) const {
    NVPFLOW_UNROLL
    for (int m = 0; m < 2; ++m) {
      NVPFLOW_UNROLL
      for (int n = 0; n < 4; ++n) {
        NVPFLOW_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int i = task.first_in + first_in + 16 * m + 2 * lane.g + e / 2;
          const int o = task.first_out + first_out + 16 * (n / 2) + 4 * lane.t + 2 * (e % 2) + n % 2;
          if (i >= d.in || o >= d.out) continue;
          const std::int64_t at = weight_at(d, i, o, n % 2);
          if (at >= 0) partial[at] = sums[m][n][e];
        }
      }
    }
  }

  /// What the tiles hold as sums.
  NVPFLOW_DEVICE void sums(std::int64_t first_tile, std::int64_t tiles) const {
    const Layer<T>& layer = program.layers[task.layer];
    const T* first = tape + first_tile * plan.tape_elements + task.input;
    if (task.task == Task::context) return context_gradient(program, first, plan.tape_elements, tiles, partial);
    if (task.task == Task::base) {
      if (program.base.kind == BaseKind::student_t) {
        return student_gradient(program, first, plan.tape_elements, tiles, partial);
      }
      const MixtureGradient<T> of(program, task.layer, first, plan, tiles);
      return of.write(partial);
    }
    if (task.task == Task::map) {
      return map_gradient(program.dense[task.dense], first, plan.tape_elements, tiles, plan.tile_rows / kWarpRows,
                          partial);
    }
    if (facts_of(layer.kind).has_matrices)
      return linear_gradient(program, layer, first, plan.tape_elements, tiles, partial);
    diagonal_gradient(program, layer, first, plan.tape_elements, tiles, partial);
  }
};

/// Block b: task b % num_tasks over the tiles of split b / num_tasks; partials [splits][partial_size].
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
                                partials + split * partial_size(program)};
  if (worker.task.task == Task::product) {
    worker.dense(first, count);
  } else {
    worker.sums(first, count);
  }
}

/// gradient [count] = partials, `stride` elements apart, added up in order, or += with accumulate.
template <class T>
NVPFLOW_KERNEL(kThreads)
add_partials(const T* partials, const int splits, const std::int64_t stride, const std::int64_t count,
             const bool accumulate, T* gradient) {
  for (std::int64_t i = first_element(); i < count; i += element_step()) {
    T sum = accumulate ? gradient[i] : T(0);
    for (int s = 0; s < splits; ++s) sum += partials[s * stride + i];
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
  const auto tiles_kernel =
      program.reach == Reach::all ? gradient_tiles<T, M, Reach::all> : gradient_tiles<T, M, Reach::general>;
  if (const Status s = launch(tiles_kernel, blocks, plan.warps * kWarp, plan.shared_bytes, stream, plan, program, call,
                              first, tiles, tape, log_prob)) {
    return s;
  }
  if (call.nll && call.sum_log_prob != nullptr) {
    const std::int64_t rows = std::min(tiles * plan.tile_rows, call.rows - first * plan.tile_rows);
    const T* values = log_prob;
    if (const Status s = launch_sum(values, call.weights.from(first * plan.tile_rows), rows, first > 0,
                                    call.sum_log_prob, workspace + plan.sums_at, stream)) {
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
  const std::int64_t stride = partial_size(program);
  if (const Status s =
          launch(add_partials<T>, element_blocks(program.num_parameters), kThreads, 0, stream, parts, plan.splits,
                 stride, program.num_parameters, call.accumulate || first > 0, call.gradient)) {
    return s;
  }
  if (program.products == 0) return 0;
  T* products = reinterpret_cast<T*>(workspace + plan.products_at);
  parts += program.num_parameters;
  return launch(add_partials<T>, element_blocks(program.products), kThreads, 0, stream, parts, plan.splits, stride,
                program.products, first > 0, products);
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
  if (call.gradient == nullptr || program.products == 0) return 0;
  const auto* products = static_cast<const unsigned char*>(workspace) + plan.products_at;
  return launch_linear_gradient(program, call.inverse, reinterpret_cast<const T*>(products), call.gradient, stream);
}

template <class T, Multiply M>
Status prepare_gradient_with(std::int64_t bytes) {
  if (const Status s = allow_shared(gradient_tiles<T, M, Reach::general>, bytes)) return s;
  if (const Status s = allow_shared(gradient_tiles<T, M, Reach::all>, bytes)) return s;
  if constexpr (M != Multiply::bf16) return allow_shared(weight_gradient<T, M>, bytes);
  return 0;
}

}  // namespace

template <class T>
Status launch_gradient(const GradientPlan& plan, const Program<T>& program, const GradientTask* tasks,
                       const GradientCall<T>& call, void* workspace, Stream stream) {
  if (call.rows == 0) {
    if (call.sum_log_prob != nullptr) {
      if (const Status s = launch(set_double, 1, kWarp, 0, stream, call.sum_log_prob, 0.0)) return s;
    }
    if (call.gradient == nullptr || call.accumulate) return 0;
    return launch(add_partials<T>, element_blocks(program.num_parameters), kThreads, 0, stream,
                  static_cast<const T*>(nullptr), 0, program.num_parameters, program.num_parameters, false,
                  call.gradient);
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

template Status launch_gradient(const GradientPlan&, const Program<float>&, const GradientTask*,
                                const GradientCall<float>&, void*, Stream);
template Status launch_gradient(const GradientPlan&, const Program<double>&, const GradientTask*,
                                const GradientCall<double>&, void*, Stream);

}  // namespace nvpflow::cuda
