// KERNEL: the reverse pass of a flow, tile by tile: a tile goes forward, its activations stay on the tape, and it comes
// back before the next one starts. No array as long as the batch exists; a row costs 3 times the FLOPs of its forward.
//
// The features of a tile lie feature-major, [feature][row], as in coupling.inl; inside the conditioner everything is
// row-major, [row][unit], in both directions, which is also what the gradients of the weights read: nothing as wide as
// a hidden layer is ever transposed.
//
// gradient_tile does the forward and the cotangents; it leaves the input of every dense layer and the cotangent of its
// output. weight_gradient multiplies the two for any part of one kernel, so that threads can share the parameters out
// among themselves: each element of the gradient is summed over the rows of a tile, and over the tiles in order,
// whatever the number of threads. A register block is kGradientIn inputs x kGradientOut vectors of outputs and reads
// kGradientIn + kGradientOut values a row for kGradientIn * kGradientOut multiply-adds; where the outputs fill one
// vector only, inputs and outputs change places, or, of few inputs, kNarrowIn inputs x 1.

namespace nvpflow::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kGradientIn = 8, kGradientOut = 3;  // of 32 registers: 24 sums, 3 cotangents, 1 input
constexpr int kNarrowIn = 16;
#elif defined(__AVX2__)
constexpr int kGradientIn = 4, kGradientOut = 3, kNarrowIn = 8;
#elif defined(__aarch64__)
constexpr int kGradientIn = 8, kGradientOut = 3, kNarrowIn = 16;
#else
constexpr int kGradientIn = 4, kGradientOut = 2, kNarrowIn = 8;
#endif

// Rows of the tape from the one that is multiplied to those that are fetched meanwhile: each row of a block lies in a
// page of its own where layers are wide, and the processor's own prefetching ends with the page.
constexpr int64_t kRowsAhead = 16;
// Columns of a kernel's gradient from which on a block's rows are fetched also where they are only written: fewer lie
// near each other, and the processor fetches them by itself.
constexpr int64_t kWideGradient = 256;
// Vectors of inputs from which on outer_exchanged is worth its transposition.
constexpr int64_t kManyInputs = 2;

/// gelu and silu need their argument for the derivative; the others' derivative follows from their value.
NVPFLOW_INLINE bool keeps_argument(Act act) { return act == Act::gelu || act == Act::silu; }

template <class T>
NVPFLOW_INLINE Vec<T> activation_derivative(Act act, Vec<T> value, Vec<T> argument) {
  const Vec<T> one = set1(T(1));
  switch (act) {
    case Act::relu:
      return value > T(0) ? one : set1(T(0));
    case Act::leaky_relu:
      return value > T(0) ? one : set1(T(0.01));
    case Act::elu:
      return value > T(0) ? one : value + T(1);
    case Act::gelu:
      return gelu_derivative<T>(argument);
    case Act::silu:
      return silu_derivative<T>(argument);
    case Act::tanh:
      return fma(-value, value, one);
    case Act::sigmoid:
      return value * (one - value);
    case Act::softplus:
      return -expm1_bounded<T>(-value);
    default:
      return one;
  }
}

// ---- the tape ----------------------------------------------------------------------------------------------------
// One tile's numbers, in the order below; `rows` is the tile's rows up to whole vectors, widths are up to whole
// vectors where they are the columns of row-major parts:
//   fixed part        state [D][rows], partial [kLanes][rows], log_prob [rows], two buffers of rows x max_width,
//                     cotangent [D][rows], log_det cotangent [rows]
//   per coupling      s, exp(+-s), product [b][rows] each; input [rows][a]; per hidden layer value [rows][H] and, where
//                     kept, argument [rows][H]; cotangents per hidden layer [rows][H], of both heads [rows][2 b]
//   per standardize   output [D][rows]; per unit of rows, sums of the gradients of mean and log_std, [2 D]

template <class T>
struct FixedTape {
  T *state, *partial, *log_prob, *buffer0, *buffer1, *cotangent, *log_det_cotangent, *layers;
  int64_t size;  // elements before `layers`

  FixedTape(const Program<T>& p, T* tape, int64_t rows) {
    Carver<T> carver{tape};
    state = carver.take(p.input_size * rows);
    partial = carver.take(kLanes<T> * rows);
    log_prob = carver.take(rows);
    buffer0 = carver.take(row_stride<T>(p.max_width) * rows);
    buffer1 = carver.take(row_stride<T>(p.max_width) * rows);
    cotangent = carver.take(p.input_size * rows);
    log_det_cotangent = carver.take(rows);
    layers = carver.take(0);
    size = carver.used;
  }
};

/// Elements of a row of hidden layer j: its value and, where kept, its argument.
template <class T>
int64_t hidden_tape(const Layer<T>& layer, int32_t j) {
  return row_stride<T>(layer.dense[j].out) * (keeps_argument(layer.activation) ? 2 : 1);
}

NVPFLOW_INLINE int64_t units_of(int64_t rows) { return (rows + kGradientUnit - 1) / kGradientUnit; }

template <class T>
int64_t layer_tape(const Program<T>& program, const Layer<T>& layer, int64_t rows) {
  if (layer.kind == Kind::standardize) {
    return program.input_size * rows + row_stride<T>(2 * program.input_size) * units_of(rows);
  }
  int64_t n = 3 * layer.b_count + row_stride<T>(layer.a_count);
  for (int32_t j = 0; j < layer.num_dense; ++j) {
    n += row_stride<T>(layer.dense[j].out);
    if (j + 1 < layer.num_dense) n += hidden_tape(layer, j);
  }
  return n * rows;
}

template <class T>
int64_t tape_size(const Program<T>& program, int64_t rows) {
  int64_t n = FixedTape<T>(program, nullptr, rows).size;
  for (int64_t k = 0; k < program.num_layers; ++k) n += layer_tape(program, program.layers[k], rows);
  return n;
}

template <class T>
struct CouplingTape {
  T *s, *scale, *product;  // product: d(output) / d(s)
  T* input;
  T* hidden;      // values and arguments of the hidden layers, one after the other
  T* cotangents;  // of the outputs of the dense layers

  CouplingTape(const Layer<T>& layer, T* tape, int64_t rows) {
    s = tape;
    scale = s + layer.b_count * rows;
    product = scale + layer.b_count * rows;
    input = product + layer.b_count * rows;
    hidden = input + row_stride<T>(layer.a_count) * rows;
    cotangents = hidden;
    for (int32_t j = 0; j + 1 < layer.num_dense; ++j) cotangents += hidden_tape(layer, j) * rows;
  }

  T* value(const Layer<T>& layer, int32_t j, int64_t rows) const {
    T* p = hidden;
    for (int32_t i = 0; i < j; ++i) p += hidden_tape(layer, i) * rows;
    return p;
  }
  T* argument(const Layer<T>& layer, int32_t j, int64_t rows) const {
    T* p = value(layer, j, rows);
    return keeps_argument(layer.activation) ? p + row_stride<T>(layer.dense[j].out) * rows : p;
  }
  /// What dense layer j reads.
  const T* input_of(const Layer<T>& layer, int32_t j, int64_t rows) const {
    return j == 0 ? input : value(layer, j - 1, rows);
  }
  T* cotangent(const Layer<T>& layer, int32_t j, int64_t rows) const {
    T* p = cotangents;
    for (int32_t i = 0; i < j; ++i) p += row_stride<T>(layer.dense[i].out) * rows;
    return p;
  }
};

template <class T>
T* layer_tape_at(const Program<T>& program, int64_t layer, T* layers, int64_t rows) {
  for (int64_t k = 0; k < layer; ++k) layers += layer_tape(program, program.layers[k], rows);
  return layers;
}

// ---- forward with a tape -----------------------------------------------------------------------------------------

/// The conditioner on `count` rows, row-major from the tape's input to [u_s, t] [count][2 b] in `head`.
template <class T>
void conditioner_taped(const Layer<T>& layer, const CouplingTape<T>& keep, T* head, int64_t count, int64_t rows) {
  for (int32_t j = 0; j < layer.num_dense; ++j) {
    const Dense<T>& d = layer.dense[j];
    const bool last = j + 1 == layer.num_dense;
    const Act act = last ? Act::none : layer.activation;
    const int64_t stride = row_stride<T>(d.out);
    T* y = last ? head : keep.argument(layer, j, rows);
    dense_rows<T>(view(d), keep.input_of(layer, j, rows), row_stride<T>(d.in), y, stride, count, act);
    if (needs_pass(act)) activate<T>(act, y, keep.value(layer, j, rows), count * stride);
  }
}

/// Affine (coupling.inl) that leaves on the tape what the way back needs.
template <class T>
struct TapedAffine {
  const Layer<T>& layer;
  bool inverse;

  template <class V>
  NVPFLOW_INLINE void apply(int64_t i, const T* u, int64_t size, T* b, T* log_det, const CouplingTape<T>& keep) const {
    constexpr int64_t L = kLanes<T>;
    const V s = log_scale<T>(layer, load_steps<T, V>(u + i, L, L)), t = load_steps<T, V>(u + size + i, L, L);
    const V in = load_steps<T, V>(b + i, L, L), sum = load_steps<T, V>(log_det + i, L, L);
    const V scale = scale_of<T>(layer, inverse ? -s : s);
    const V out = inverse ? (in - t) * scale : fma(in, scale, t);
    store_steps<T>(log_det + i, L, inverse ? sum - s : sum + s, L);
    store_steps<T>(b + i, L, out, L);
    store_steps<T>(keep.s + i, L, s, L);
    store_steps<T>(keep.scale + i, L, scale, L);
    store_steps<T>(keep.product + i, L, inverse ? -out : in * scale, L);
  }
};

template <class T>
void coupling_forward_taped(const Layer<T>& layer, bool inverse, const FixedTape<T>& fixed, T* tape, int64_t count,
                            int64_t rows) {
  const CouplingTape<T> keep(layer, tape, rows);
  const int64_t n = layer.b_count;
  scatter_tile<T>(fixed.state + layer.a_begin * rows, rows, count, layer.a_count, keep.input,
                  row_stride<T>(layer.a_count));
  conditioner_taped<T>(layer, keep, fixed.buffer0, count, rows);
  T* head = fixed.buffer1;
  const int64_t stride = row_stride<T>(2 * n);
  gather_tile<T>([&](int64_t r) { return fixed.buffer0 + r * stride; }, count, 2 * n, head, rows);
  const TapedAffine<T> affine = {layer, inverse};
  constexpr int64_t L = kLanes<T>, kStep = kVectors<Steps<T>> * L;
  const int64_t size = n * rows, partials = L * rows;
  T* b = fixed.state + layer.b_begin * rows;
  for (int64_t begin = 0; begin < size; begin += partials) {  // as in coupling_tile
    const int64_t end = smaller(begin + partials, size);
    T* log_det = fixed.partial - begin;
    int64_t i = begin;
    for (; i + kStep <= end; i += kStep) affine.template apply<Steps<T>>(i, head, size, b, log_det, keep);
    for (; i < end; i += L) affine.template apply<Vec<T>>(i, head, size, b, log_det, keep);
  }
}

template <class T>
void flow_forward_taped(const Program<T>& program, bool inverse, const FixedTape<T>& fixed, int64_t count,
                        int64_t rows) {
  for (int64_t i = 0; i < kLanes<T> * rows; i += kLanes<T>) store<T>(fixed.partial + i, Vec<T>{});
  for (int64_t k = 0; k < program.num_layers; ++k) {
    const int64_t index = inverse ? program.num_layers - 1 - k : k;
    const Layer<T>& layer = program.layers[index];
    T* tape = layer_tape_at(program, index, fixed.layers, rows);
    if (layer.kind == Kind::coupling) {
      coupling_forward_taped<T>(layer, inverse, fixed, tape, count, rows);
    } else {
      standardize_tile<T>(layer, inverse, program.input_size, fixed.state, fixed.partial, rows);
      __builtin_memcpy(tape, fixed.state, static_cast<size_t>(program.input_size * rows) * sizeof(T));
    }
  }
}

// ---- gradients of the weights ------------------------------------------------------------------------------------

/// A dense layer's part of the flat gradient. Its columns may lie in two tensors, one after the other: the heads'.
template <class T>
struct Columns {
  T* to[2];      // element 0 of each
  int64_t n[2];  // columns of each; the second may be 0
  bool add;      // to what is there; else what is there is replaced

  /// Fetches what put() will write: MI rows from i, NO vectors from column o. A block's rows lie a page or so apart,
  /// where the processor fetches nothing by itself.
  template <int MI, int NO>
  NVPFLOW_INLINE void fetch(int64_t i, int64_t o) const {
    for (int k = 0; k < NO; ++k, o += kLanes<T>) {
      const int64_t width = o < n[0] ? n[0] : n[1];
      const T* p = o < n[0] ? to[0] + i * width + o : to[1] + i * width + (o - n[0]);
      for (int m = 0; m < MI; ++m) __builtin_prefetch(p + m * width, 1);
    }
  }

  /// v[m][k] to NO vectors of columns from o of row i + m; of the last ones those columns that there are.
  template <int MI, int NO>
  NVPFLOW_INLINE void put(int64_t i, int64_t o, const Vec<T> (&v)[MI][NO]) const {
    constexpr int64_t kColumns = NO * kLanes<T>;
    if (o + kColumns <= n[0]) return put_whole(to[0] + i * n[0] + o, n[0], v);
    if (o >= n[0] && o + kColumns <= n[0] + n[1]) return put_whole(to[1] + i * n[1] + (o - n[0]), n[1], v);
    Vec<T> waiting[MI][NO];  // a copy, or the sums would have to be in memory all the time
#pragma GCC unroll 16
    for (int m = 0; m < MI; ++m) {
      for (int k = 0; k < NO; ++k) waiting[m][k] = v[m][k];
    }
    for (int m = 0; m < MI; ++m) {
      for (int k = 0; k < NO; ++k) put_lanes(i + m, o + k * kLanes<T>, waiting[m][k]);
    }
  }

 private:
  template <int MI, int NO>
  NVPFLOW_INLINE void put_whole(T* p, int64_t stride, const Vec<T> (&v)[MI][NO]) const {
#pragma GCC unroll 16
    for (int m = 0; m < MI; ++m) {
      for (int k = 0; k < NO; ++k) {
        T* at = p + m * stride + k * kLanes<T>;
        store<T>(at, add ? load<T>(at) + v[m][k] : v[m][k]);
      }
    }
  }

  void put_lanes(int64_t i, int64_t o, Vec<T> v) const {
    const int64_t valid = smaller(kLanes<T>, n[0] + n[1] - o);
    const int64_t first = smaller(valid, n[0] > o ? n[0] - o : 0);  // lanes that belong to the first tensor
    if (first > 0) put_part(to[0] + i * n[0] + o, v, 0, first);
    if (first < valid) put_part(to[1] + i * n[1] + (o - n[0]), v, first, valid);
  }
  void put_part(T* p, Vec<T> v, int64_t begin, int64_t end) const {
    store_lanes<T>(p, add ? load_lanes<T>(p, begin, end) + v : v, begin, end);
  }
};

/// Rows x and g of a tile: x [count][in] and g [count][out], row-major; every `rows` of them lie `tape_stride` further.
template <class T>
struct OuterProduct {
  const T* x;
  int64_t x_stride;
  const T* g;
  int64_t g_stride;
  int64_t count, rows, tape_stride;
  int64_t out;
};

/// Where a dense layer's two gradients go.
template <class T>
struct DenseColumns {
  Columns<T> kernel, bias;
};

/// sum[m][n] = the sum over the rows of x g for inputs i + m and vector n of outputs from o; each(n, g): every vector
/// of cotangents on the way.
template <class T, int MI, int NO, class Each>
NVPFLOW_INLINE void outer_sums(const OuterProduct<T>& p, int64_t i, int64_t o, Vec<T> (&sum)[MI][NO], Each each) {
  constexpr int L = kLanes<T>;
  int64_t tape = 0;
  for (int64_t first = 0; first < p.count; first += p.rows, tape += p.tape_stride) {
    const T* x = p.x + tape + i;
    const T* g = p.g + tape + o;
    const int64_t here = smaller(p.rows, p.count - first);
    for (int64_t r = 0; r < here; ++r, x += p.x_stride, g += p.g_stride) {
      Vec<T> cotangent[NO];
      __builtin_prefetch(x + kRowsAhead * p.x_stride);
      for (int n = 0; n < NO; ++n) {
        __builtin_prefetch(g + kRowsAhead * p.g_stride + n * L);
        cotangent[n] = load<T>(g + n * L);
        each(n, cotangent[n]);
      }
#pragma GCC unroll 16
      for (int m = 0; m < MI; ++m) {
        const Vec<T> input = set1(x[m]);
        for (int n = 0; n < NO; ++n) sum[m][n] = fma(input, cotangent[n], sum[m][n]);
      }
    }
  }
}

/// Inputs i .. i + MI x NO vectors of outputs from o: the sum over the rows of x g. With `bias`, also that of g.
template <class T, int MI, int NO, bool bias>
NVPFLOW_INLINE void outer_block(const OuterProduct<T>& p, int64_t i, int64_t o, const DenseColumns<T>& to) {
  if (to.kernel.add || to.kernel.n[0] > kWideGradient) to.kernel.template fetch<MI, NO>(i, o);
  Vec<T> sum[MI][NO] = {}, bias_sum[1][NO] = {};
  outer_sums<T, MI, NO>(p, i, o, sum, [&](int n, Vec<T> g) __attribute__((always_inline)) {
    if constexpr (bias) bias_sum[0][n] = bias_sum[0][n] + g;
  });
  to.kernel.put(i, o, sum);
  if constexpr (bias) to.bias.put(0, o, bias_sum);
}

/// The sum of g alone, of one vector of outputs from o.
template <class T>
void sum_cotangents(const OuterProduct<T>& p, int64_t o, const Columns<T>& to) {
  Vec<T> sum[1][1] = {};
  Vec<T> none[1][1] = {};
  outer_sums<T, 1, 1>(p, 0, o, none, [&](int, Vec<T> g) __attribute__((always_inline)) { sum[0][0] = sum[0][0] + g; });
  to.put(0, o, sum);
}

template <class T, int MI, int NO>
NVPFLOW_INLINE void outer_inputs(const OuterProduct<T>& p, int64_t i, int64_t o, const DenseColumns<T>& to) {
  if (i == 0) return outer_block<T, MI, NO, true>(p, i, o, to);
  outer_block<T, MI, NO, false>(p, i, o, to);
}

/// Inputs first .. last, NO vectors of outputs from o; they stay in the first cache while the inputs go on.
template <class T, int MI, int NO>
void outer_columns(const OuterProduct<T>& p, int64_t first, int64_t last, int64_t o, const DenseColumns<T>& to) {
  int64_t i = first;
  for (; i + MI <= last; i += MI) outer_inputs<T, MI, NO>(p, i, o, to);
  if constexpr (MI > 4) {
    for (; i + 4 <= last; i += 4) outer_inputs<T, 4, NO>(p, i, o, to);
  }
  for (; i < last; ++i) outer_inputs<T, 1, NO>(p, i, o, to);
}

/// to[output][stride]: the sums for NI vectors of inputs from i; p: with inputs and outputs exchanged.
template <class T, int NI>
void outer_by_output(const OuterProduct<T>& p, int64_t outputs, int64_t i, T* to, int64_t stride) {
  constexpr int L = kLanes<T>;
  int64_t o = 0;
  const auto block = [&](auto count) __attribute__((always_inline)) {
    constexpr int n = decltype(count)::value;
    Vec<T> sum[n][NI] = {};
    outer_sums<T, n, NI>(p, o, i, sum, [](int, Vec<T>) __attribute__((always_inline)) {});
#pragma GCC unroll 16
    for (int m = 0; m < n; ++m) {
      for (int k = 0; k < NI; ++k) store<T>(to + (o + m) * stride + k * L, sum[m][k]);
    }
    o += n;
  };
  // The last block may go beyond the outputs, but not beyond their vector.
  constexpr int kMost = kGradientIn < L ? kGradientIn : L;
  while (outputs - o > kMost / 2) block(Count<kMost>{});
  if (o < outputs) block(Count<kMost / 2>{});
}

/// Inputs i .. i + inputs of columns [o, o + outputs), whose sums lie by output, `stride` apart, to where they belong.
/// In runs as long as there are: the rows of a narrow kernel follow each other.
template <class T>
void put_by_input(const T* by_output, int64_t stride, int64_t outputs, int64_t i, int64_t inputs, int64_t o,
                  const Columns<T>& to) {
  constexpr int L = kLanes<T>;
  alignas(64) T by_input[kGradientOut * L * L];
  int64_t begin = 0;
  for (int part = 0; part < 2; begin += to.n[part], ++part) {
    const int64_t width = to.n[part], first = o > begin ? o : begin;
    const int64_t columns = smaller(o + outputs, begin + width) - first;
    if (columns <= 0) continue;
    gather_tile<T>([&](int64_t n) { return by_output + (first - o + n) * stride; }, columns, inputs, by_input, columns);
    const int64_t rows = columns == width ? 1 : inputs, run = inputs / rows * columns;
    T* at = to.to[part] + i * width + (first - begin);
    for (int64_t r = 0; r < rows; ++r, at += width) {
      for (int64_t n = 0; n < run; n += L) {
        const Vec<T> sum = load_upto<T>(by_input + r * run + n, run - n);
        store_upto<T>(at + n, to.add ? load_upto<T>(at + n, run - n) + sum : sum, run - n);
      }
    }
  }
}

/// The last vector of outputs, from o, where the inputs are many: vectors of inputs times single outputs, of which each
/// serves several multiply-adds, while a single vector of outputs serves one for each input that is read. Lanes without
/// an output are not computed either. The sums are the same ones, in the same order.
template <class T>
void outer_exchanged(const OuterProduct<T>& p, int64_t first, int64_t last, int64_t o, const DenseColumns<T>& to) {
  constexpr int L = kLanes<T>;
  constexpr int64_t kStride = int64_t{kGradientOut} * L;
  const OuterProduct<T> exchanged = {p.g + o, p.g_stride, p.x, p.x_stride, p.count, p.rows, p.tape_stride, last};
  const int64_t outputs = p.out - o;
  alignas(64) T by_output[L * kStride];
  for (int64_t i = first, inputs = 0; i < last; i += inputs) {
    const int64_t vectors = (last - i + L - 1) / L;
    const int64_t now = vectors >= kGradientOut && vectors != kGradientOut + 1 ? kGradientOut : smaller(2, vectors);
    inputs = smaller(now * L, last - i);
    if (now > 2) {
      outer_by_output<T, kGradientOut>(exchanged, outputs, i, by_output, kStride);
    } else if (now == 2) {
      outer_by_output<T, 2>(exchanged, outputs, i, by_output, kStride);
    } else {
      outer_by_output<T, 1>(exchanged, outputs, i, by_output, kStride);
    }
    put_by_input<T>(by_output, kStride, outputs, i, inputs, o, to.kernel);
  }
  if (first == 0) sum_cotangents<T>(p, o, to.bias);
}

/// The bias goes with input 0.
template <class T>
void outer_product(const OuterProduct<T>& p, int64_t first, int64_t last, const DenseColumns<T>& to) {
  constexpr int L = kLanes<T>;
  int64_t o = 0;
  for (; o + (kGradientOut - 1) * L < p.out; o += kGradientOut * L) {
    outer_columns<T, kGradientIn, kGradientOut>(p, first, last, o, to);
  }
  if constexpr (kGradientOut > 2) {
    if (o + L < p.out) {
      outer_columns<T, kGradientIn, 2>(p, first, last, o, to);
      o += 2 * L;
    }
  }
  if (o >= p.out) return;
  if (last - first >= kManyInputs * L) return outer_exchanged<T>(p, first, last, o, to);
  outer_columns<T, kNarrowIn, 1>(p, first, last, o, to);
}

template <class T>
void coupling_weight_gradient(const Layer<T>& layer, int32_t j, int64_t first, int64_t last, const TileTapes<T>& tapes,
                              T* gradient, bool add) {
  const int64_t rows = tapes.rows;
  const CouplingTape<T> keep(layer, const_cast<T*>(tapes.first), rows);
  const Dense<T>& d = layer.dense[j];
  const bool heads = j + 1 == layer.num_dense;
  const DenseGradient& one = layer.gradients[j];
  const DenseGradient& two = layer.gradients[heads ? j + 1 : j];
  const int64_t n[2] = {one.out, heads ? two.out : 0};
  const OuterProduct<T> p = {keep.input_of(layer, j, rows),
                             row_stride<T>(d.in),
                             keep.cotangent(layer, j, rows),
                             row_stride<T>(d.out),
                             tapes.count,
                             rows,
                             tapes.stride,
                             d.out};
  outer_product<T>(p, first, last,
                   {{{gradient + one.kernel_offset, gradient + two.kernel_offset}, {n[0], n[1]}, add},
                    {{gradient + one.bias_offset, gradient + two.bias_offset}, {n[0], n[1]}, add}});
}

template <class T>
void standardize_gradient(const Layer<T>& layer, int64_t features, int64_t first, int64_t last,
                          const TileTapes<T>& tapes, T* gradient, bool add) {
  const int64_t unit_stride = row_stride<T>(2 * features);
  for (int64_t j = first; j < last; ++j) {
    T mean = 0, log_std = 0;
    for (int64_t row = 0; row < tapes.count; row += kGradientUnit) {
      const T* tape = tapes.first + row / tapes.rows * tapes.stride;
      const T* sums = tape + features * tapes.rows + row % tapes.rows / kGradientUnit * unit_stride;
      mean += sums[j];
      log_std += sums[features + j];
    }
    T* to_mean = gradient + layer.mean_offset + j;
    T* to_log_std = gradient + layer.log_std_offset + j;
    *to_mean = add ? *to_mean + mean : mean;
    *to_log_std = add ? *to_log_std + log_std : log_std;
  }
}

/// All of one layer's gradient, while its part of the tape is in the cache.
template <class T>
void layer_gradient(const Program<T>& program, const Layer<T>& layer, const TileTapes<T>& tape, T* gradient, bool add) {
  if (layer.kind == Kind::standardize) {
    return standardize_gradient<T>(layer, program.input_size, 0, program.input_size, tape, gradient, add);
  }
  for (int32_t j = 0; j < layer.num_dense; ++j) {
    coupling_weight_gradient<T>(layer, j, 0, layer.dense[j].in, tape, gradient, add);
  }
}

// ---- backward ----------------------------------------------------------------------------------------------------

/// From the cotangent of the layer's output to that of its input, in place; head [2 b][rows] = cotangent of [u_s, t].
template <class T>
void affine_backward(const Layer<T>& layer, bool inverse, const CouplingTape<T>& keep, const FixedTape<T>& fixed,
                     T* head, int64_t rows) {
  const int64_t n = layer.b_count;
  T* b = fixed.cotangent + layer.b_begin * rows;
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      const int64_t at = j * rows + r;
      const Vec<T> g = load<T>(b + at), g_log_det = load<T>(fixed.log_det_cotangent + r);
      const Vec<T> scaled = g * load<T>(keep.scale + at);
      const Vec<T> tanh_u = load<T>(keep.s + at) * layer.inverse_bound;
      const Vec<T> g_s = fma(g, load<T>(keep.product + at), inverse ? -g_log_det : g_log_det);
      store<T>(b + at, scaled);
      store<T>(head + at, g_s * fma(-tanh_u, tanh_u, set1(T(1))));
      store<T>(head + n * rows + at, inverse ? -scaled : g);
    }
  }
}

/// MR rows of g_in[rows][lanes] = W g_out[rows][out] in two parts each (Dense::paired): lane 2 i + q has that of input
/// i and of the outputs 2 o + q.
template <class T, int MR>
NVPFLOW_INLINE void paired_block(const Dense<T>& d, const T* g_out, int64_t stride, T* g_in) {
  Vec<T> sum[MR] = {};
  const T* w = d.transposed;
  int64_t o = 0;
  for (; o + 2 <= d.out; o += 2, w += kLanes<T>) {
    const Vec<T> weight = load<T>(w);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) sum[m] = fma(weight, set_pairs(g_out + m * stride + o), sum[m]);
  }
  for (int m = 0; m < MR; ++m) {
    if (o < d.out) {
      const T last[2] = {g_out[m * stride + o], T(0)};
      sum[m] = fma(load<T>(w), set_pairs(last), sum[m]);
    }
    store<T>(g_in + m * kLanes<T>, sum[m]);
  }
}

template <class T>
void dense_rows_paired(const Dense<T>& d, const T* g_out, int64_t stride, T* g_in, int64_t rows) {
  int64_t r = 0;
  const auto blocks = [&](auto count) __attribute__((always_inline)) {
    constexpr int n = decltype(count)::value;
    for (; r + n <= rows; r += n) paired_block<T, n>(d, g_out + r * stride, stride, g_in + r * kLanes<T>);
  };
  blocks(Count<kRowsBlock>{});
  blocks(Count<1>{});
}

/// Cotangent of the input of dense layer j, W times that of its output, both row-major; where the input is a hidden
/// layer's value, of that layer's argument.
template <class T>
void dense_backward(const Layer<T>& layer, const CouplingTape<T>& keep, int32_t j, const T* g_out, T* g_in,
                    int64_t count, int64_t rows) {
  const Dense<T>& d = layer.dense[j];
  const DenseView<T> transposed = {d.transposed, nullptr, d.out, d.in, d.out, nullptr, 0, d.far, d.wide_blocks};
  const int64_t out_stride = row_stride<T>(d.out), in_stride = row_stride<T>(d.in);
  if (d.paired) return dense_rows_paired<T>(d, g_out, out_stride, g_in, count);
  if (j == 0) return dense_rows<T>(transposed, g_out, out_stride, g_in, in_stride, count, Act::none);
  const T* value = keep.value(layer, j - 1, rows);
  if (layer.activation == Act::relu) {
    const auto finish = [=](int64_t row, int64_t unit, Vec<T> g) __attribute__((always_inline)) {
      const Vec<T> derivative = activation_derivative<T>(Act::relu, load<T>(value + row * in_stride + unit), Vec<T>{});
      return g * derivative;  // not a selection: NaN must stay
    };
    return dense_rows_finish<T>(transposed, g_out, out_stride, g_in, in_stride, count, finish);
  }
  dense_rows<T>(transposed, g_out, out_stride, g_in, in_stride, count, Act::none);
  const T* argument = keep.argument(layer, j - 1, rows);
  for (int64_t i = 0; i < count * in_stride; i += kLanes<T>) {
    const Vec<T> derivative = activation_derivative<T>(layer.activation, load<T>(value + i), load<T>(argument + i));
    store<T>(g_in + i, load<T>(g_in + i) * derivative);
  }
}

template <class T>
void coupling_backward(const Layer<T>& layer, bool inverse, bool input_wanted, T* tape, const FixedTape<T>& fixed,
                       int64_t count, int64_t rows) {
  const CouplingTape<T> keep(layer, tape, rows);
  const int32_t last = layer.num_dense - 1;
  const int64_t a_stride = row_stride<T>(layer.a_count), head_stride = row_stride<T>(layer.dense[last].out);
  affine_backward<T>(layer, inverse, keep, fixed, fixed.buffer0, rows);
  scatter_tile<T>(fixed.buffer0, rows, count, layer.dense[last].out, keep.cotangent(layer, last, rows), head_stride);
  for (int32_t j = last; j > 0; --j) {
    dense_backward<T>(layer, keep, j, keep.cotangent(layer, j, rows), keep.cotangent(layer, j - 1, rows), count, rows);
  }
  if (!input_wanted) return;
  T* g_input = fixed.buffer0;
  T* g = fixed.buffer1;
  dense_backward<T>(layer, keep, 0, keep.cotangent(layer, 0, rows), g_input, count, rows);
  const int64_t parts = layer.dense[0].paired ? 2 : 1;  // of each input's cotangent
  gather_tile<T>([&](int64_t r) { return g_input + r * a_stride; }, count, parts * layer.a_count, g, rows);
  T* a = fixed.cotangent + layer.a_begin * rows;
  for (int64_t i = 0; i < layer.a_count; ++i, a += rows, g += parts * rows) {
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      const Vec<T> sum = parts == 2 ? load<T>(g + r) + load<T>(g + rows + r) : load<T>(g + r);
      store<T>(a + r, load<T>(a + r) + sum);
    }
  }
}

/// Sums of the gradients of mean [D] and log_std [D] over rows [begin, end); tape: the layer's output.
template <class T>
void standardize_sums(const Layer<T>& layer, bool inverse, int64_t features, const T* tape, const FixedTape<T>& fixed,
                      int64_t begin, int64_t end, int64_t rows, T* sums) {
  for (int64_t j = 0; j < features; ++j) {
    T g_mean = 0, g_log_std = 0;
    const T* out = tape + j * rows;
    const T* g = fixed.cotangent + j * rows;
    for (int64_t r = begin; r < end; ++r) {
      const T g_log_det = fixed.log_det_cotangent[r];
      if (inverse) {  // out = in * std + mean, log_det = +sum log_std
        g_mean += g[r];
        g_log_std += g[r] * (out[r] - layer.mean[j]) + g_log_det;
      } else {  // out = (in - mean) / std, log_det = -sum log_std
        g_mean -= g[r] * layer.inverse_std[j];
        g_log_std -= g[r] * out[r] + g_log_det;
      }
    }
    sums[j] = g_mean;
    sums[features + j] = g_log_std;
  }
}

/// tape: the layer's output, then room for the sums over each unit's rows.
template <class T>
void standardize_backward(const Layer<T>& layer, bool inverse, int64_t features, T* tape, const FixedTape<T>& fixed,
                          int64_t count, int64_t rows) {
  T* sums = tape + features * rows;
  for (int64_t r = 0; r < count; r += kGradientUnit, sums += row_stride<T>(2 * features)) {
    standardize_sums<T>(layer, inverse, features, tape, fixed, r, smaller(r + kGradientUnit, count), rows, sums);
  }
  for (int64_t j = 0; j < features; ++j) {
    T* g = fixed.cotangent + j * rows;
    const Vec<T> factor = set1(inverse ? layer.std[j] : layer.inverse_std[j]);
    for (int64_t r = 0; r < rows; r += kLanes<T>) store<T>(g + r, load<T>(g + r) * factor);
  }
}

/// The cotangents that the backward pass starts from; rows past `count` hold numbers that nobody reads.
template <class T>
void start_cotangents(const Program<T>& program, const GradientCall<T>& call, const FixedTape<T>& fixed, int64_t begin,
                      int64_t count, int64_t rows) {
  const int64_t features = program.input_size;
  for (int64_t r = 0; r < rows; ++r) {
    const bool given = call.grad_log_det != nullptr && r < count;
    fixed.log_det_cotangent[r] = call.nll ? -call.nll_factor : given ? call.grad_log_det[begin + r] : T(0);
  }
  if (call.nll) {
    for (int64_t i = 0; i < features * rows; i += kLanes<T>) {
      store<T>(fixed.cotangent + i, load<T>(fixed.state + i) * call.nll_factor);
    }
  } else if (call.density) {
    for (int64_t i = 0; i < features * rows; i += kLanes<T>) {
      const Vec<T> g = load<T>(fixed.log_det_cotangent + i % rows);
      store<T>(fixed.cotangent + i, -load<T>(fixed.state + i) * g);
    }
  } else if (call.grad_out != nullptr) {
    load_tile<T>(call.grad_out, nullptr, begin, count, features, fixed.cotangent, rows);
  } else {
    for (int64_t i = 0; i < features * rows; i += kLanes<T>) store<T>(fixed.cotangent + i, Vec<T>{});
  }
}

template <class T>
void sum_units(const T* values, int64_t count, double* sums) {
  for (int64_t r = 0; r < count; ++r) {
    double& sum = sums[r / kGradientUnit];
    sum = (r % kGradientUnit == 0 ? 0 : sum) + static_cast<double>(values[r]);
  }
}

template <class T>
void gradient_tile(const Program<T>& program, const GradientCall<T>& call, int64_t begin, int64_t end, int64_t rows,
                   T* tape, double* sums) {
  const int64_t count = end - begin, features = program.input_size;
  const FixedTape<T> fixed(program, tape, rows);
  load_tile<T>(call.in, call.index, begin, count, features, fixed.state, rows);
  T* poison = fixed.log_prob;  // free until the densities are written
  const bool poisoned = find_poison<T>(fixed.state, features, poison, rows);
  if (poisoned) spread_poison<T>(poison, fixed.state, features, rows);
  flow_forward_taped<T>(program, call.inverse, fixed, count, rows);
  start_cotangents<T>(program, call, fixed, begin, count, rows);
  if (poisoned) {
    spread_poison<T>(poison, fixed.cotangent, features, rows);
    spread_poison<T>(poison, fixed.log_det_cotangent, 1, rows);
  }
  if (call.nll || call.log_prob != nullptr) {
    T* log_det = fixed.buffer0;
    sum_partials_tile<T>(fixed.partial, log_det, rows);
    log_prob_tile<T>(fixed.state, features, log_det, fixed.log_prob, rows);
    if (find_poison<T>(fixed.log_prob, 1, log_det, rows)) {
      for (int64_t r = 0; r < count; ++r) {  // as settle_tile
        T& value = fixed.log_prob[r];
        if (__builtin_isnan(value) && input_is_finite<T>(call, begin + r, features)) value = -kInfinity<T>;
      }
    }
    if (call.nll) sum_units<T>(fixed.log_prob, count, sums);
    for (int64_t r = 0; call.log_prob != nullptr && r < count; ++r) call.log_prob[begin + r] = fixed.log_prob[r];
  }
  for (int64_t k = program.num_layers - 1; k >= 0; --k) {
    const int64_t index = call.inverse ? program.num_layers - 1 - k : k;
    const Layer<T>& layer = program.layers[index];
    T* layer_tape = layer_tape_at(program, index, fixed.layers, rows);
    if (layer.kind == Kind::coupling) {
      const bool input_wanted = k > 0 || call.grad_in != nullptr;
      coupling_backward<T>(layer, call.inverse, input_wanted, layer_tape, fixed, count, rows);
    } else {
      standardize_backward<T>(layer, call.inverse, features, layer_tape, fixed, count, rows);
    }
    if (call.gradient == nullptr) continue;
    layer_gradient<T>(program, layer, {layer_tape, 0, rows, count}, call.gradient, call.add);
  }
  if (call.grad_in != nullptr) {
    scatter_tile<T>(fixed.cotangent, rows, count, features, call.grad_in + begin * features, features);
  }
}

template <class T>
void weight_gradient(const Program<T>& program, int64_t index, int32_t dense, int64_t first, int64_t last,
                     const TileTapes<T>& tapes, T* gradient, bool add) {
  const Layer<T>& layer = program.layers[index];
  const FixedTape<T> fixed(program, const_cast<T*>(tapes.first), tapes.rows);
  TileTapes<T> of_layer = tapes;
  of_layer.first = layer_tape_at(program, index, fixed.layers, tapes.rows);
  if (layer.kind == Kind::coupling) {
    return coupling_weight_gradient<T>(layer, dense, first, last, of_layer, gradient, add);
  }
  standardize_gradient<T>(layer, program.input_size, first, last, of_layer, gradient, add);
}

}  // namespace
}  // namespace nvpflow::cpu
