// The list of CPU kernels and the plain structures they read. Kernels take pointers, cannot fail, allocate nothing
// and lock nothing. Files built with instruction-set flags include this header, so it holds no function and no
// standard library header that could emit one.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../adam_coefficients.hpp"
#include "../base_density.hpp"
#include "../kinds.hpp"
#include "../log_scale.hpp"
#include "../spline_map.hpp"

namespace nvpflow::cpu {

/// y = W^T x + c, packed: blocks of `lanes` outputs, [ceil(out / lanes)][in][lanes], zero where padded, so that the
/// tile path broadcasts and the row path loads the same bytes. The sum over `in` runs in consecutive segments,
/// each added up in order, the first starting from the bias; the parts are then added in order. Both paths follow it.
template <class T>
struct Dense {
  const T* weights = nullptr;
  const T* bias = nullptr;  // [ceil(out / lanes) * lanes]; null: zero, or with `adds` what the output holds
  // The weights with inputs and outputs exchanged, null until gradients are wanted: [ceil(in / lanes)][out][lanes], or,
  // if `paired`, [ceil(out / 2)][lanes] with the weight of input i and output 2 o + q in lane 2 i + q of o.
  const T* transposed = nullptr;
  int64_t in = 0;
  int64_t out = 0;
  int64_t segment = 0;  // inputs of a segment; the last may have fewer
  // `weights`, where they are bfloat16 numbers, stored as such, else null: [ceil(out / lanes)][narrow_words][lanes].
  // A word holds an output's weights of two consecutive inputs of a segment, the first in its lower half.
  const uint32_t* narrow = nullptr;
  int64_t narrow_words = 0;
  bool adds = false;    // without a bias: the sums start from what the output holds
  bool paired = false;  // the first layer of a conditioner whose inputs fill at most half a vector
  bool far = false;     // the flow's weights come from beyond the caches
  // Use the wider register blocks (one more vector of rows) and the fused hidden layer and head, where there are such
  // kernels.
  bool wide_blocks = false;
};

/// Tensor pairs that the outputs of a dense layer may belong to.
constexpr int kMaxHeads = 3;

/// Where the gradient of a part of a dense layer lies in the flat gradient.
struct DenseGradient {
  int64_t out = 0;
  int64_t kernel_offset = 0;  // [in, out]
  int64_t bias_offset = -1;   // [out]; -1: the part has no bias
};

/// An affine map of each unit, before the first activation of a residual block.
template <class T>
struct BlockAffine {
  const T* scale = nullptr;  // zero up to whole vectors
  const T* shift = nullptr;  // the same
  int64_t width = 0;
  int64_t scale_offset = 0, shift_offset = 0;  // in the flat parameters
};

/// From the conditioning features to the heads: hidden layers, or the initial layer and two of each residual block;
/// then one layer with all heads side by side.
template <class T>
struct Network {
  const Dense<T>* dense = nullptr;
  int32_t num_dense = 0;
  Act activation = Act::relu;
  const DenseGradient* gradients = nullptr;  // one per dense layer before the last, then one per head
  int32_t num_heads = 0;                     // 1 to kMaxHeads
  bool layer_norm = false;                   // after each activation
  NetworkKind kind = NetworkKind::mlp;
  const BlockAffine<T>* affines = nullptr;  // residual: of each block; null: none
  // With a context: what dense[0], which adds to it, starts from; holds the bias. A context that is one for all rows
  // makes it a bias, which lies `fold` elements into the call's folded context.
  const Dense<T>* context = nullptr;
  const DenseGradient* context_gradients = nullptr;  // one, or one per head where dense[0] is the heads
  int64_t fold = 0;
  // Residual: what the context makes the gates of each block of; null: there are none. The gates of a context that is
  // one for all rows lie, block after block, `gate_fold` elements into the call's folded context.
  const Dense<T>* gates = nullptr;
  const DenseGradient* gate_gradients = nullptr;
  int64_t gate_fold = 0;
};

/// Rows of a tile that hold the features of a part, in the order of the features.
struct FeatureRows {
  int64_t begin = 0, count = 0;
  const int64_t* index = nullptr;  // null: from begin on
};

/// Elements of a tape: so many for each row, and so many for each unit of rows.
struct TapeSize {
  int64_t row = 0;
  int64_t unit = 0;
};

/// A linear layer, y = W x + bias, x = W^-1 (y - bias), W = L U. Inputs of the dense layers are in the order of the
/// features, so that no sum depends on their places; outputs are in the order of a tile's rows.
template <class T>
struct Linear {
  Dense<T> forward;  // W and the bias
  Dense<T> inverse;  // W^-1; its bias is zero: the layer's is taken off first, which rounds less
  const int64_t *x_place = nullptr, *y_place = nullptr;  // as Layer::place
  // Where the products that its gradient comes from lie in GradientCall::products: the sums over the rows of x times
  // the cotangents of y [x][y], of these cotangents [y], and of those of the log-determinant.
  int64_t products = 0;
  // As lu_matrix.cpp reads them: the tensors' values, and the offsets of their gradients.
  const T *lower = nullptr, *upper = nullptr;
  const double* diagonal = nullptr;  // of U
  int64_t lower_offset = 0, upper_offset = 0, log_diagonal_offset = 0, sign_offset = 0, bias_offset = 0;
};

/// Vectors of a few rows' splines that may hold less than whole rows.
constexpr int kSplineVectors = 4;

/// A spline of each transformed feature.
template <class T>
struct Splines {
  SplineMap<T> map;
  int64_t parameters = 0;  // of each feature
  // Without a network, what it would say, the same for all rows: parameter p of feature j at p n + j. Its tensors'
  // places in the flat parameters, one after the other.
  const T* constants = nullptr;
  int64_t offset[kMaxHeads] = {}, size[kMaxHeads] = {};
};

/// Elements of GradientCall::products that a linear layer of so many features takes.
constexpr int64_t products_size(int64_t features) { return features * features + features + 1; }

template <class T>
struct Layer {
  Kind kind = Kind::coupling;
  bool inverse = false;              // the layer runs its formula backwards when the flow goes forward
  TapeSize tape_begin;               // of the layers before this one in the program
  const int64_t* place = nullptr;    // the row of a tile that holds feature j of the layer's input; null: j
  const int64_t* feature = nullptr;  // the other way round
  // A diagonal layer, or a coupling with tanh, one mlp without a context and LayerNorm: what most flows are made of. A
  // few rows of those take a path of their own, where every instruction counts.
  bool plain = false;
  // coupling: a conditions b
  FeatureRows a, b;
  Scale<T> scale;
  Network<T> network[2];  // of all heads, or one of each
  int32_t num_networks = 0;
  // diagonal: in the order of a tile's rows
  const T* mean = nullptr;
  const T* std = nullptr;          // exp(log_std)
  const T* inverse_std = nullptr;  // exp(-log_std)
  T log_det = 0;                   // -sum(log_std), linear: sum(log_diagonal)
  int64_t mean_offset = 0, log_std_offset = 0;
  const Linear<T>* linear = nullptr;    // linear; b.count: features
  const Splines<T>* splines = nullptr;  // spline: a, network[0] (none: num_networks is 0) and b, as a coupling's
};

/// Rows of a unit of a gradient tile. Threads share a tile by whole units, and what is added up row by row is added up
/// by units, so that no sum depends on the threads.
constexpr int64_t kGradientUnit = 32;
constexpr int64_t kMaxGradientUnits = 8;

template <class T>
struct Program {
  int64_t input_size = 0;
  /// Rows of a tile that hold the features of data and of the latent space; null: feature j lies in row j.
  const int64_t* data_place = nullptr;
  const int64_t* latent_place = nullptr;
  BaseDensity<T> base;
  int64_t context_size = 0;
  const T* context_mean = nullptr;                                // of a context that is standardized
  const T* context_inverse_std = nullptr;                         // the same
  int64_t fold_size = 0;                                          // elements of a folded context
  int64_t context_mean_offset = -1, context_log_std_offset = -1;  // -1: it is not standardized
  bool gathers = false;  // a coupling's features lie in rows that do not follow each other
  bool plain = false;    // plain couplings and diagonal layers, features in their order, no context, nothing gathered
  int64_t num_layers = 0;
  const Layer<T>* layers = nullptr;
  int64_t max_width = 0;      // widest dense output or input, or all heads of a coupling
  int64_t kept_width = 0;     // widest of what networks keep while they use both buffers; 0: nothing
  bool few_at_once = false;   // less than two vectors of rows are faster as few rows twice: the weights are many
  int64_t tile_rows = 0;      // rows of an inference tile: results do not depend on it
  int64_t gradient_rows = 0;  // rows of a gradient tile: sums over rows are formed tile by tile
  TapeSize tape;              // of all layers
  int64_t products = 0;       // elements of GradientCall::products; 0: no linear layer
};

/// The context rows of a call: one for `repeat` rows, or one for all, folded.
template <class T>
struct ContextRows {
  const T* rows = nullptr;         // [.., C]; null: folded, or the flow has no context
  const int64_t* index = nullptr;  // row r of the call goes with context row index[r]; null: ...
  int64_t first = 0, repeat = 1;   // ... with (first + r) / repeat
  const T* folded = nullptr;       // [Program::fold_size]: 0 or NaN, then the biases that the context makes
};

/// Rows [begin, end) of one call. Any of out, log_det, log_prob may be null.
template <class T>
struct TransformCall {
  bool inverse = false;
  const T* in = nullptr;           // null: noise of `seed`, row first_row + r
  const int64_t* index = nullptr;  // rows of `in` to take; null: all, in order
  T* out = nullptr;
  T* log_det = nullptr;
  T* log_prob = nullptr;  // of data: of `in`, or, of an inverse, which then begins with noise, of `out`
  uint64_t seed = 0, first_row = 0;
  ContextRows<T> context;
};

template <class T>
struct GradientCall {
  bool inverse = false;
  const T* in = nullptr;
  const int64_t* index = nullptr;
  bool nll = false;  // cotangents of nll_factor * weight * -log p instead of grad_out, grad_log_det
  double nll_factor = 0;
  const double* weights = nullptr;  // nll only: above 0, of the rows of `in`, which index takes; null: all are 1
  const T* grad_out = nullptr;      // null: zero
  const T* grad_log_det = nullptr;  // null: zero, or one where `density`
  bool density = false;             // grad_log_det is the cotangent of log p
  T* log_prob = nullptr;            // density only, may be null: = log p of the rows
  T* grad_in = nullptr;             // null: not wanted
  T* gradient = nullptr;            // flat; null: left to weight_gradient, or not wanted
  T* products = nullptr;            // Linear::products are added to here, whatever `add` says
  bool add = false;                 // to the gradient; else it is replaced
  ContextRows<T> context;           // by rows
  T* grad_context = nullptr;        // [rows, C], one for each row of the call; null: not wanted
};

/// The `count` rows of a gradient tile on tapes of `rows` each (the last may hold fewer), `stride` elements apart.
template <class T>
struct TileTapes {
  const T* first;
  int64_t stride, rows, count;
  const T* context = nullptr;  // where the rows' context begins on the first tape
};

/// How a part of a layer's gradient is shared out.
struct PartSize {
  int64_t count = 0;   // of what can be shared out
  int64_t weight = 0;  // multiply-adds for each row and each of these
};

template <class T>
struct Kernels {
  int64_t lanes;          // elements of a vector
  int64_t row_unit;       // rows of a full register block: tile sizes are multiples of it
  int64_t wide_row_unit;  // with wide blocks
  /// Elements of scratch that transform, conditioner and noise need; `scratch` is aligned to 64 bytes.
  int64_t (*transform_scratch)(const Program<T>&);
  void (*transform)(const Program<T>&, const TransformCall<T>&, int64_t begin, int64_t end, T* scratch);
  void (*conditioner)(const Program<T>&, int64_t layer, const T* in, const ContextRows<T>&, int64_t begin, int64_t end,
                      T* s, T* t, T* scratch);
  /// One context row [C] to ContextRows::folded. scratch: as for transform.
  void (*fold)(const Program<T>&, const T* context, T* folded, T* scratch);
  void (*noise)(const Program<T>&, uint64_t seed, uint64_t first_row, int64_t begin, int64_t end, T* z, T* scratch);

  /// Inputs [first, last) of Dense::transposed; first: a multiple of the lanes, last: another or all of them.
  void (*transpose)(const Dense<T>&, int64_t first, int64_t last, T* transposed);
  /// What a layer keeps on the tape.
  TapeSize (*layer_tape)(const Layer<T>&);
  /// Elements of a whole tape for so many rows.
  int64_t (*tape_size)(const Program<T>&, int64_t rows);
  /// Forward and backward of rows [begin, end), a gradient tile or a part of one from one of its units on; leaves what
  /// weight_gradient needs on the tape, which is laid out for `rows`: a multiple of the lanes. sums: of log p over the
  /// rows of each unit, by weight (nll only).
  void (*gradient_tile)(const Program<T>&, const GradientCall<T>&, int64_t begin, int64_t end, int64_t rows, T* tape,
                        double* sums);
  /// Parts of a layer's gradient, and what part `part` is shared out by: inputs of a dense layer, rows of a tile of a
  /// diagonal layer; a thread's share is worth `size` multiply-adds for each of them.
  int32_t (*gradient_parts)(const Layer<T>&);
  PartSize (*gradient_part)(const Layer<T>&, int32_t part);
  /// The same of the base's parameters, by features or components; of none where it has none.
  PartSize (*base_part)(const Program<T>&);
  /// One tile's share of a part of a layer's gradient: [first, last) of what it is shared out by; the bias goes with
  /// the first. Added to what is there, or in its place. gradient: flat, or the products for a
  /// linear layer. layer: the number of layers means the base.
  void (*weight_gradient)(const Program<T>&, int64_t layer, int32_t part, int64_t first, int64_t last,
                          const TileTapes<T>&, T* gradient, bool add);

  void (*adam)(const AdamCoefficients&, int64_t count, const T* gradient, T* first_moment, T* second_moment,
               T* parameters);
  /// words[i] += llrint(values[i] * factor) where that is below limit, at most 2^62; returns how many are not.
  int64_t (*add_to_grid)(const T* values, int64_t count, double factor, double limit, int64_t* words);
  double (*sum_of_squares)(const T* values, int64_t count);
};

/// One per instruction set built in; isa.cpp asks the processor before any of its kernels runs.
struct IsaEntry {
  const char* name;
  const Kernels<float>* float32;
  const Kernels<double>* float64;
};

}  // namespace nvpflow::cpu
