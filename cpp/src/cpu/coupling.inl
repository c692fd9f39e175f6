// KERNEL: the layers of a flow on a tile of rows, in either direction, with their log-determinant.
//
// A tile is feature-major, X[feature][row], a few vectors of rows wide, and goes from the first layer to the last in
// the same scratch: no [B, H] array exists. A row costs 2 sum(in * out) FLOPs of the dense layers and reads and writes
// 4 D bytes; the weights are read once per tile from L1 or L2. Bound: fused multiply-adds (two a cycle where the
// processor has two such units); a register block of kBlockOut x kBlockRows vectors needs kBlockOut + kBlockRows loads
// for kBlockOut * kBlockRows multiply-adds.
//
// The row path does one row with vectors over outputs, for single rows and small remainders. Every number of a row is
// formed by the same operations in the same order on both paths: the sums follow Dense::segment, and sums over
// features are kept in kLanes partial sums (feature j in partial j mod kLanes) that sum_lanes or its tile form adds up
// at the end.

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
constexpr int kRowsBlock = 4, kRowsVectors = 3, kRegisters = 16;
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

// Vectors of weights from one that is used to one that is fetched meanwhile, where they may come from afar: the
// processor's own prefetching ends with each page of memory.
constexpr int64_t kAhead = 64;

// Rows of shuffled data that are fetched before they are needed, for they come from afar and in no order that a
// processor could foresee, and the cache lines of each: of more it fetches the rest by itself.
constexpr int64_t kGatherAhead = 16, kFetchedLines = 4;

// Rows left over after whole vectors take the row path up to this many; more fill a padded vector.
template <class T>
constexpr int64_t kMaxFewRows = kLanes<T> - 1;

// ---- activations -------------------------------------------------------------------------------------------------

template <class T>
NVPFLOW_INLINE Vec<T> rectify(Vec<T> x, Act act) {
  if (act == Act::relu) return at_least(x, T(0));
  if (act == Act::leaky_relu) return x < T(0) ? x * T(0.01) : x;
  return x;
}

/// relu and leaky_relu are applied to the sums while they are in registers; the others in a pass of their own.
NVPFLOW_INLINE bool needs_pass(Act act) { return act != Act::relu && act != Act::leaky_relu && act != Act::none; }

template <class T, class F>
NVPFLOW_INLINE void map(const T* in, T* out, int64_t count, F f) {
  for (int64_t i = 0; i < count; i += kLanes<T>) store<T>(out + i, f(load<T>(in + i)));
}

/// count: a multiple of the lanes.
template <class T>
void activate(Act act, const T* in, T* out, int64_t count) {
  switch (act) {
    case Act::elu:
      return map(in, out, count, [](Vec<T> v) { return elu<T>(v); });
    case Act::gelu:
      return map(in, out, count, [](Vec<T> v) { return gelu<T>(v); });
    case Act::silu:
      return map(in, out, count, [](Vec<T> v) { return silu<T>(v); });
    case Act::tanh:
      return map(in, out, count, [](Vec<T> v) { return tanh<T>(v); });
    case Act::sigmoid:
      return map(in, out, count, [](Vec<T> v) { return sigmoid<T>(v); });
    case Act::softplus:
      return map(in, out, count, [](Vec<T> v) { return softplus<T>(v); });
    default:
      return;
  }
}

// ---- dense layers on a tile --------------------------------------------------------------------------------------

NVPFLOW_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
NVPFLOW_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

template <class T>
NVPFLOW_INLINE int64_t padded(int64_t n) {
  return round_up(n, kLanes<T>);
}

/// Distance between rows of n numbers: whole vectors, and never a multiple of 4096 bytes, or the rows of a block would
/// fight for the same few places of the first-level cache.
template <class T>
NVPFLOW_INLINE int64_t row_stride(int64_t n) {
  const int64_t stride = padded<T>(n);
  return stride % static_cast<int64_t>(4096 / sizeof(T)) == 0 ? stride + kLanes<T> : stride;
}

/// Hands out consecutive parts of one piece of memory; without memory it only counts them.
template <class T>
struct Carver {
  T* base;
  int64_t used = 0;

  T* take(int64_t count) {
    T* part = base == nullptr ? nullptr : base + used;
    used += count;
    return part;
  }
};

template <int n>
struct Count {
  static constexpr int value = n;
};

template <class T>
struct DenseView {
  const T* weights;  // packed blocks
  const T* bias;     // null: zero
  int64_t in, out;
  int64_t segment;  // inputs of a segment
  const uint32_t* narrow = nullptr;
  int64_t narrow_words = 0;
  bool far = false;
  bool wide_blocks = false;
};

/// sum[m][n] += W[i][m] x[i][n] for inputs i in [begin, end), in order.
template <class T, int MO, int NV>
NVPFLOW_INLINE void accumulate(const T* w, const T* x, int64_t begin, int64_t end, int64_t rows,
                               Vec<T> (&sum)[MO][NV]) {
  constexpr int L = kLanes<T>;
  const T* xi = x + begin * rows;
  const T* wi = w + begin * L;
  for (int64_t i = begin; i < end; ++i, xi += rows, wi += L) {
    Vec<T> input[NV];
    if constexpr (NV > 1) __builtin_prefetch(wi + kAhead * L);  // with one vector the loads are the bottleneck
    for (int n = 0; n < NV; ++n) input[n] = load<T>(xi + n * L);
#pragma GCC unroll 16
    for (int m = 0; m < MO; ++m) {
      const Vec<T> weight = set1(wi[m]);
      for (int n = 0; n < NV; ++n) sum[m][n] = fma(weight, input[n], sum[m][n]);
    }
  }
}

/// MO outputs x NV vectors of rows. w: weight of input 0 and the first output; x, y: first row of the block.
template <class T, int MO, int NV, Act act>
NVPFLOW_INLINE void dense_block(const DenseView<T>& d, const T* w, const T* bias, const T* x, T* y, int64_t rows) {
  // The total of finished segments waits in registers, or where the outputs go.
  constexpr bool kInRegisters = 2 * MO * NV <= kRegisters;
  Vec<T> sum[MO][NV], total[kInRegisters ? MO : 1][NV] = {};
  for (int m = 0; m < MO; ++m) {
    for (int n = 0; n < NV; ++n) sum[m][n] = set1(bias == nullptr ? T(0) : bias[m]);
  }
  const auto each = [&](auto&& f) __attribute__((always_inline)) {
    T* to = y;
#pragma GCC unroll 16
    for (int m = 0; m < MO; ++m, to += rows) {
      for (int n = 0; n < NV; ++n) f(m, n, to + n * kLanes<T>);
      asm("" : "+r"(to));  // or the compiler holds the distance of each output in a register, and has too few
    }
  };
  for (int64_t begin = 0;; begin += d.segment) {
    accumulate<T, MO, NV>(w, x, begin, smaller(begin + d.segment, d.in), rows, sum);
    if (begin > 0) {
      each([&](int m, int n, T* to) __attribute__((always_inline)) {
        if constexpr (kInRegisters) {
          sum[m][n] = total[m][n] + sum[m][n];
        } else {
          sum[m][n] = load<T>(to) + sum[m][n];
        }
      });
    }
    if (begin + d.segment >= d.in) break;
    each([&](int m, int n, T* to) __attribute__((always_inline)) {
      if constexpr (kInRegisters) {
        total[m][n] = sum[m][n];
      } else {
        store<T>(to, sum[m][n]);
      }
      sum[m][n] = Vec<T>{};
    });
  }
  each([&](int m, int n, T* to) __attribute__((always_inline)) { store<T>(to, rectify<T>(sum[m][n], act)); });
}

/// Blocks of NV vectors of rows from row r on, as far as whole ones go; returns where they end. Not inlined: several
/// blocks in one function take the registers of each other's addresses.
template <class T, int MO, int NV, Act act>
NVPFLOW_NOINLINE int64_t dense_blocks(const DenseView<T>& d, const T* w, const T* bias, const T* x, T* y, int64_t rows,
                                      int64_t r, int64_t end) {
  constexpr int64_t kStep = NV * kLanes<T>;
  for (; r + kStep <= end; r += kStep) dense_block<T, MO, NV, act>(d, w, bias, x + r, y + r, rows);
  return r;
}

/// Rows [begin, end) of the tile for MO consecutive outputs.
template <class T, int MO, Act act>
void dense_strip(const DenseView<T>& d, const T* w, const T* bias, const T* x, T* y, int64_t rows, int64_t begin,
                 int64_t end) {
  constexpr int L = kLanes<T>;
  int64_t r = begin;
  if constexpr (MO <= kBlockOut) {
    if constexpr (kCanBeWide) {
      if (d.wide_blocks) r = dense_blocks<T, MO, kBlockRows + 1, act>(d, w, bias, x, y, rows, r, end);
    }
    if (r + kBlockRows * L <= end) r = dense_blocks<T, MO, kBlockRows, act>(d, w, bias, x, y, rows, r, end);
    if constexpr (kBlockRows > 2) {
      if (r + 2 * L <= end) r = dense_blocks<T, MO, 2, act>(d, w, bias, x, y, rows, r, end);
    }
  }
  if (r < end) dense_blocks<T, MO, 1, act>(d, w, bias, x, y, rows, r, end);
}

/// Rows [begin, end) of the tile, by strips of MO outputs.
template <class T, Act act, int MO>
void dense_strips(const DenseView<T>& d, const T* x, T* y, int64_t rows, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  for (int64_t block = 0; block < d.out; block += L) {
    const T* w = d.weights + block * d.in;
    const int64_t last = smaller(L, d.out - block);
    int64_t o = 0;
    const auto strips = [&](auto outputs) __attribute__((always_inline)) {
      constexpr int n = decltype(outputs)::value;
      if constexpr (n <= MO && n <= L) {
        for (; o + n <= last; o += n) {
          const T* bias = d.bias == nullptr ? nullptr : d.bias + block + o;
          dense_strip<T, n, act>(d, w + o, bias, x, y + (block + o) * rows, rows, begin, end);
        }
      }
    };
    strips(Count<16>{});
    strips(Count<8>{});
    strips(Count<4>{});
    strips(Count<2>{});
    strips(Count<1>{});
  }
}

template <class T, Act act>
void dense_tile_act(const DenseView<T>& d, const T* x, T* y, int64_t rows) {
  constexpr int64_t L = kLanes<T>;
  // A last single vector of rows wants more outputs under way than a strip has, in a pass of its own; where a strip has
  // enough of them to hide the latency of the sums, reading the weights twice costs more than it brings.
  const bool alone = rows == L, again = kBlockOut < 8 && !d.far && rows % (kBlockRows * L) == L;
  const int64_t main = alone || again ? rows - L : rows;
  if (main > 0) dense_strips<T, act, kBlockOut>(d, x, y, rows, 0, main);
  if (main < rows) dense_strips<T, act, 2 * kBlockOut>(d, x, y, rows, main, rows);
}

/// y[out][rows] = rectify(W^T x[in][rows] + c). rows: a multiple of the lanes.
template <class T>
void dense_tile(const DenseView<T>& d, const T* x, T* y, int64_t rows, Act act) {
  switch (act) {
    case Act::relu:
      return dense_tile_act<T, Act::relu>(d, x, y, rows);
    case Act::leaky_relu:
      return dense_tile_act<T, Act::leaky_relu>(d, x, y, rows);
    default:
      return dense_tile_act<T, Act::none>(d, x, y, rows);
  }
}

template <class T>
NVPFLOW_INLINE DenseView<T> view(const Dense<T>& d) {
  return {d.weights, d.bias, d.in, d.out, d.segment, d.narrow, d.narrow_words, d.far, d.wide_blocks};
}

// ---- a hidden layer and the head behind it ------------------------------------------------------------------------

// Stores between the layers of a small conditioner take the place of multiply-adds. With one hidden layer, up to 8
// inputs and up to 16 outputs, the hidden units can stay in registers: 8 inputs, 8 units and 16 sums. Every
// multiply-add then loads its weight, which pays where wide blocks do.

constexpr int kHeadUnits = 8;
template <class T>
constexpr bool kHasHiddenHead = kCanBeWide && kLanes<T> == 16;

/// y[NO][rows] = V^T relu(W^T x[NI][rows] + b) + c, the same sums as two calls of dense_tile.
template <class T, int NI, int NO>
NVPFLOW_NOINLINE void hidden_and_head(const DenseView<T>& hidden, const DenseView<T>& head, const T* x, T* y,
                                      int64_t rows) {
  constexpr int L = kLanes<T>;
  for (int64_t r = 0; r < rows; r += L) {
    Vec<T> in[NI], sum[NO];
    for (int i = 0; i < NI; ++i) in[i] = load<T>(x + i * rows + r);
    for (int o = 0; o < NO; ++o) sum[o] = set1(head.bias[o]);
    for (int64_t begin = 0; begin < head.in; begin += head.segment) {
      const int64_t end = smaller(begin + head.segment, head.in);
      for (int64_t h = begin; h < end; h += kHeadUnits) {
        const T *w = hidden.weights + h / L * L * NI + h % L, *v = head.weights + h * L;
        Vec<T> unit[kHeadUnits];
        for (int k = 0; k < kHeadUnits; ++k) unit[k] = set1(hidden.bias[h + k]);
        if (r == 0) {  // the other rows find the weights in the first-level cache
          for (int k = 0; k < NI; ++k) __builtin_prefetch(w + (NI + k) * L);
          for (int k = 0; k < kHeadUnits; ++k) __builtin_prefetch(v + (2 * kHeadUnits + k) * L);
        }
#pragma GCC unroll 16
        for (int i = 0; i < NI; ++i) {
#pragma GCC unroll 16
          for (int k = 0; k < kHeadUnits; ++k) unit[k] = fma(set1(w[i * L + k]), in[i], unit[k]);
        }
        for (int k = 0; k < kHeadUnits; ++k) unit[k] = rectify<T>(unit[k], Act::relu);
#pragma GCC unroll 16
        for (int k = 0; k < kHeadUnits; ++k) {
#pragma GCC unroll 16
          for (int o = 0; o < NO; ++o) sum[o] = fma(set1(v[k * L + o]), unit[k], sum[o]);
        }
      }
      for (int o = 0; o < NO; ++o) {
        T* to = y + o * rows + r;  // where the total of finished segments waits
        store<T>(to, begin > 0 ? load<T>(to) + sum[o] : sum[o]);
        sum[o] = Vec<T>{};
      }
    }
  }
}

/// hidden_and_head of the sizes it is made for: the halves of a flow differ by a feature at most. Returns whether it
/// ran.
template <class T, int NI = 1>
bool hidden_and_head_of(const DenseView<T>& hidden, const DenseView<T>& head, const T* x, T* y, int64_t rows) {
  if constexpr (2 * NI <= kLanes<T>) {
    if (hidden.in != NI) return hidden_and_head_of<T, NI + 1>(hidden, head, x, y, rows);
    const auto run = [&](auto outputs) __attribute__((always_inline)) {
      constexpr int n = decltype(outputs)::value;
      if constexpr (n > 0 && n <= kLanes<T>) {
        if (head.out == n) return hidden_and_head<T, NI, n>(hidden, head, x, y, rows), true;
      }
      return false;
    };
    return run(Count<2 * NI - 2>{}) || run(Count<2 * NI>{}) || run(Count<2 * NI + 2>{});
  } else {
    return false;
  }
}

/// The conditioner in one kernel, where there is one for it. Returns whether it ran.
template <class T>
bool conditioner_at_once(const Layer<T>& layer, const T* x, T* y, int64_t rows) {
  if constexpr (kHasHiddenHead<T>) {
    if (layer.num_dense != 2 || layer.activation != Act::relu) return false;
    const DenseView<T> hidden = view(layer.dense[0]), head = view(layer.dense[1]);
    if (!head.wide_blocks || head.in % kHeadUnits != 0 || head.segment % kHeadUnits != 0) return false;
    return hidden_and_head_of<T>(hidden, head, x, y, rows);
  } else {
    return false;
  }
}

// ---- dense layers on rows ------------------------------------------------------------------------------------------

/// sum[m][n] += x[m][i] W[i][n] for inputs i in [begin, end), in order. w: first of the blocks, `stride` apart.
template <class T, int MR, int NV, bool fetch_ahead = false>
NVPFLOW_INLINE void accumulate_rows(const T* w, int64_t stride, const T* x, int64_t x_stride, int64_t begin,
                                    int64_t end, Vec<T> (&sum)[MR][NV]) {
  constexpr int L = kLanes<T>;
  const T* wi = w + begin * L;
  const T* xi = x + begin;
  for (int64_t i = begin; i < end; ++i, wi += L, ++xi) {
    Vec<T> weight[NV];
    for (int n = 0; n < NV; ++n) {
      weight[n] = load<T>(wi + n * stride);
      if constexpr (fetch_ahead) __builtin_prefetch(wi + n * stride + kAhead * L);
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const Vec<T> input = set1(xi[m * x_stride]);
      for (int n = 0; n < NV; ++n) sum[m][n] = fma(weight[n], input, sum[m][n]);
    }
  }
}

/// MR rows x NV vectors of outputs, the first of which is `o`. finish(row, output, sum): what is stored.
template <class T, int MR, int NV, class Finish>
NVPFLOW_INLINE void rows_block(const DenseView<T>& d, int64_t o, const T* x, int64_t x_stride, T* y, int64_t y_stride,
                               int64_t row, Finish finish) {
  constexpr int L = kLanes<T>;
  const T* w = d.weights + o * d.in;
  const int64_t stride = d.in * L;
  x += row * x_stride;
  Vec<T> total[MR][NV];
  for (int n = 0; n < NV; ++n) {
    const Vec<T> bias = d.bias == nullptr ? Vec<T>{} : load<T>(d.bias + o + n * L);
    for (int m = 0; m < MR; ++m) total[m][n] = bias;
  }
  accumulate_rows<T, MR, NV>(w, stride, x, x_stride, 0, d.segment, total);
  for (int64_t begin = d.segment; begin < d.in; begin += d.segment) {
    Vec<T> sum[MR][NV] = {};
    accumulate_rows<T, MR, NV>(w, stride, x, x_stride, begin, smaller(begin + d.segment, d.in), sum);
    for (int m = 0; m < MR; ++m) {
      for (int n = 0; n < NV; ++n) total[m][n] = total[m][n] + sum[m][n];
    }
  }
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NV; ++n) {
      store<T>(y + (row + m) * y_stride + o + n * L, finish(row + m, o + n * L, total[m][n]));
    }
  }
}

/// All rows for NV vectors of outputs.
template <class T, int NV, class Finish>
void rows_strip(const DenseView<T>& d, int64_t o, const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t rows,
                Finish finish) {
  int64_t r = 0;
  for (; r + kRowsBlock <= rows; r += kRowsBlock) {
    rows_block<T, kRowsBlock, NV>(d, o, x, x_stride, y, y_stride, r, finish);
  }
  if constexpr (kRowsBlock > 4) {
    if (r + 4 <= rows) {
      rows_block<T, 4, NV>(d, o, x, x_stride, y, y_stride, r, finish);
      r += 4;
    }
  }
  if (r + 2 <= rows) {
    rows_block<T, 2, NV>(d, o, x, x_stride, y, y_stride, r, finish);
    r += 2;
  }
  if (r < rows) rows_block<T, 1, NV>(d, o, x, x_stride, y, y_stride, r, finish);
}

/// y[rows][out] = finish(W^T x[rows][in] + c), row-major; whole vectors of y are written.
template <class T, class Finish>
void dense_rows_finish(const DenseView<T>& d, const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t rows,
                       Finish finish) {
  constexpr int L = kLanes<T>;
  int64_t o = 0;
  if constexpr (kCanBeWide) {
    constexpr int64_t kWide = int64_t{kRowsVectors + 1} * L;
    // Not down to one vector, whose strip reads twice as much for each multiply-add.
    const auto fits = [&] { return o + kWide - L < d.out && (o + kWide >= d.out || o + kWide + L < d.out); };
    for (; d.wide_blocks && d.in >= kWideFrom && fits(); o += kWide) {
      rows_strip<T, kRowsVectors + 1>(d, o, x, x_stride, y, y_stride, rows, finish);
    }
  }
  for (; o + (kRowsVectors - 1) * L < d.out; o += kRowsVectors * L) {
    rows_strip<T, kRowsVectors>(d, o, x, x_stride, y, y_stride, rows, finish);
  }
  if constexpr (kRowsVectors > 2) {
    if (o + L < d.out) {
      rows_strip<T, 2>(d, o, x, x_stride, y, y_stride, rows, finish);
      o += 2 * L;
    }
  }
  for (; o < d.out; o += L) rows_strip<T, 1>(d, o, x, x_stride, y, y_stride, rows, finish);
}

template <class T, Act act>
void dense_rows_act(const DenseView<T>& d, const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t rows) {
  dense_rows_finish<T>(d, x, x_stride, y, y_stride, rows,
                       [](int64_t, int64_t, Vec<T> v) __attribute__((always_inline)) { return rectify<T>(v, act); });
}

/// y[rows][out] = rectify(W^T x[rows][in] + c).
template <class T>
void dense_rows(const DenseView<T>& d, const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t rows, Act act) {
  switch (act) {
    case Act::relu:
      return dense_rows_act<T, Act::relu>(d, x, x_stride, y, y_stride, rows);
    case Act::leaky_relu:
      return dense_rows_act<T, Act::leaky_relu>(d, x, x_stride, y, y_stride, rows);
    default:
      return dense_rows_act<T, Act::none>(d, x, x_stride, y, y_stride, rows);
  }
}

/// The conditioner on a tile: x is its input [a_count][rows]; returns [u_s, t] [2 b_count][rows], in one of the
/// buffers.
template <class T>
const T* conditioner_tile(const Layer<T>& layer, const T* x, T* buffer0, T* buffer1, int64_t rows) {
  if (conditioner_at_once<T>(layer, x, buffer0, rows)) return buffer0;
  for (int32_t j = 0; j < layer.num_dense; ++j) {
    const bool head = j + 1 == layer.num_dense;
    T* y = j % 2 == 0 ? buffer0 : buffer1;
    const Act act = head ? Act::none : layer.activation;
    dense_tile<T>(view(layer.dense[j]), x, y, rows, act);
    if (needs_pass(act)) activate<T>(act, y, y, layer.dense[j].out * rows);
    x = y;
  }
  return x;
}

// ---- layers on a tile --------------------------------------------------------------------------------------------

template <class T, class V>
NVPFLOW_INLINE V log_scale(const Layer<T>& layer, V u) {
  return tanh<T>(u * set1(layer.inverse_bound)) * set1(layer.bound);
}

/// e^s of a log-scale, or of its negative. |s| <= bound, and 1 is what nearly all flows have.
template <class T, class V>
NVPFLOW_INLINE V scale_of(const Layer<T>& layer, V s) {
  return layer.bound <= T(1) ? exp_within_one<T>(s) : exp<T>(s);
}

/// The vectors that the transformed part is taken through in step: what fits in the registers.
#if defined(__AVX512F__)
template <class T>
constexpr auto steps_of() {
  if constexpr (sizeof(T) == 4) {
    return Pair<Pair<Vec<T>>>{};  // short chains, from tables
  } else {
    return Pair<Pair<Pair<Vec<T>>>>{};
  }
}
template <class T>
using Steps = decltype(steps_of<T>());
#else
template <class T>
using Steps = Pair<Vec<T>>;
#endif

/// What a coupling layer does to its transformed part: vectors of it, of u_s and t, and of the partial sums of the
/// log-determinant, each kind with its own distance between one vector and the next.
template <class T>
struct Affine {
  const Layer<T>& layer;
  bool inverse;
  int64_t u_stride, b_stride, log_det_stride;

  /// n: elements of each vector.
  template <class V>
  NVPFLOW_INLINE void apply(const T* u, const T* t, T* b, T* log_det, int64_t n) const {
    const V s = log_scale<T>(layer, load_steps<T, V>(u, u_stride, n));
    const V in = load_steps<T, V>(b, b_stride, n), shift = load_steps<T, V>(t, u_stride, n);
    const V sum = load_steps<T, V>(log_det, log_det_stride, n);
    store_steps<T>(b, b_stride, inverse ? (in - shift) * scale_of<T>(layer, -s) : fma(in, scale_of<T>(layer, s), shift),
                   n);
    store_steps<T>(log_det, log_det_stride, inverse ? sum - s : sum + s, n);
  }
};

/// state [D][rows] in place; partial [kLanes][rows]: partial sums of the log-determinant.
template <class T>
void coupling_tile(const Layer<T>& layer, bool inverse, T* state, T* partial, T* buffer0, T* buffer1, int64_t rows) {
  constexpr int64_t L = kLanes<T>, kStep = kVectors<Steps<T>> * L;
  const int64_t size = layer.b_count * rows, partials = L * rows;
  const T* u = conditioner_tile<T>(layer, state + layer.a_begin * rows, buffer0, buffer1, rows);
  const T* t = u + size;
  T* b = state + layer.b_begin * rows;
  const Affine<T> affine = {layer, inverse, L, L, L};
  // As many features as there are partial sums lie beside each other just as the sums do.
  for (int64_t begin = 0; begin < size; begin += partials) {
    const int64_t end = smaller(begin + partials, size);
    T* log_det = partial - begin;
    int64_t i = begin;
    for (; i + kStep <= end; i += kStep) affine.template apply<Steps<T>>(u + i, t + i, b + i, log_det + i, L);
    for (; i < end; i += L) affine.template apply<Vec<T>>(u + i, t + i, b + i, log_det + i, L);
  }
}

template <class T>
void standardize_tile(const Layer<T>& layer, bool inverse, int64_t features, T* state, T* partial, int64_t rows) {
  for (int64_t j = 0; j < features; ++j) {
    const Vec<T> mean = set1(layer.mean[j]);
    const Vec<T> factor = set1(inverse ? layer.std[j] : layer.inverse_std[j]);
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      const Vec<T> in = load<T>(state + j * rows + r);
      store<T>(state + j * rows + r, inverse ? fma(in, factor, mean) : (in - mean) * factor);
    }
  }
  const T log_det = inverse ? -layer.log_det : layer.log_det;
  for (int64_t r = 0; r < rows; r += kLanes<T>) store<T>(partial + r, load<T>(partial + r) + log_det);
}

template <class T>
void flow_tile(const Program<T>& program, bool inverse, T* state, T* partial, T* buffer0, T* buffer1, int64_t rows) {
  for (int64_t i = 0; i < kLanes<T> * rows; i += kLanes<T>) store<T>(partial + i, Vec<T>{});
  for (int64_t k = 0; k < program.num_layers; ++k) {
    const Layer<T>& layer = program.layers[inverse ? program.num_layers - 1 - k : k];
    if (layer.kind == Kind::coupling) {
      coupling_tile<T>(layer, inverse, state, partial, buffer0, buffer1, rows);
    } else {
      standardize_tile<T>(layer, inverse, program.input_size, state, partial, rows);
    }
  }
}

// ---- rows to tiles and back --------------------------------------------------------------------------------------

/// 16 bytes of consecutive elements: the unit of the transposes on every instruction set.
template <class T>
struct Quad {
  static constexpr int n = 16 / static_cast<int>(sizeof(T));
  typedef T V __attribute__((vector_size(16)));
  typedef typename Simd<T>::Int I __attribute__((vector_size(16)));
};

/// The named elements of a and b, counted through both.
template <class T, int... elements>
NVPFLOW_INLINE typename Quad<T>::V shuffle(typename Quad<T>::V a, typename Quad<T>::V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, elements...);
#else  // g++ 11 has only the older name
  return __builtin_shuffle(a, b, typename Quad<T>::I{elements...});
#endif
}

/// in[Q rows][Q] with strides to out[Q][Q rows].
template <class T>
NVPFLOW_INLINE void transpose_quad(const T* const (&in)[Quad<T>::n], T* out, int64_t out_stride) {
  using V = typename Quad<T>::V;
  constexpr int Q = Quad<T>::n;
  V a[Q];
  for (int q = 0; q < Q; ++q) __builtin_memcpy(&a[q], in[q], sizeof(V));
  V b[Q];
  if constexpr (Q == 4) {
    const V t0 = shuffle<T, 0, 4, 1, 5>(a[0], a[1]), t1 = shuffle<T, 0, 4, 1, 5>(a[2], a[3]);
    const V t2 = shuffle<T, 2, 6, 3, 7>(a[0], a[1]), t3 = shuffle<T, 2, 6, 3, 7>(a[2], a[3]);
    b[0] = shuffle<T, 0, 1, 4, 5>(t0, t1);
    b[1] = shuffle<T, 2, 3, 6, 7>(t0, t1);
    b[2] = shuffle<T, 0, 1, 4, 5>(t2, t3);
    b[3] = shuffle<T, 2, 3, 6, 7>(t2, t3);
  } else {
    b[0] = shuffle<T, 0, 2>(a[0], a[1]);
    b[1] = shuffle<T, 1, 3>(a[0], a[1]);
  }
  for (int q = 0; q < Q; ++q) __builtin_memcpy(out + q * out_stride, &b[q], sizeof(V));
}

/// out[column][rows] = in[row][column]; rows `count` and beyond of the tile are zero. row(r): where row r lies.
template <class T, class RowPointer>
NVPFLOW_INLINE void gather_tile(RowPointer row, int64_t count, int64_t columns, T* out, int64_t rows) {
  constexpr int Q = Quad<T>::n;
  int64_t r = 0;
  for (; r + Q <= count; r += Q) {
    const T* in[Q];
    for (int q = 0; q < Q; ++q) in[q] = row(r + q);
    int64_t j = 0;
    for (; j + Q <= columns; j += Q) {
      transpose_quad<T>(in, out + j * rows + r, rows);
      for (int q = 0; q < Q; ++q) in[q] += Q;
    }
    for (; j < columns; ++j) {
      for (int q = 0; q < Q; ++q) out[j * rows + r + q] = *in[q]++;
    }
  }
  for (; r < rows; ++r) {
    const T* in = r < count ? row(r) : nullptr;
    for (int64_t j = 0; j < columns; ++j) out[j * rows + r] = r < count ? in[j] : T(0);
  }
}

/// out[row][column] with stride = in[column][rows], for `count` rows.
template <class T>
void scatter_tile(const T* in, int64_t rows, int64_t count, int64_t columns, T* out, int64_t stride) {
  constexpr int Q = Quad<T>::n;
  int64_t j = 0;
  for (; j + Q <= columns; j += Q) {
    int64_t r = 0;
    for (; r + Q <= count; r += Q) {
      const T* from[Q];
      for (int q = 0; q < Q; ++q) from[q] = in + (j + q) * rows + r;
      transpose_quad<T>(from, out + r * stride + j, stride);
    }
    for (; r < count; ++r) {
      for (int q = 0; q < Q; ++q) out[r * stride + j + q] = in[(j + q) * rows + r];
    }
  }
  for (; j < columns; ++j) {
    for (int64_t r = 0; r < count; ++r) out[r * stride + j] = in[j * rows + r];
  }
}

template <class T>
void load_tile(const T* in, const int64_t* index, int64_t first, int64_t count, int64_t columns, T* out, int64_t rows) {
  if (index != nullptr) {
    const auto row = [=](int64_t r) { return in + index[first + r] * columns; };
    const auto fetch = [=](int64_t r) {
      constexpr int64_t kLine = 64 / sizeof(T);
      const int64_t fetched = smaller(columns, kFetchedLines * kLine);
      for (int64_t j = 0; j < fetched; j += kLine) __builtin_prefetch(row(r) + j);
      __builtin_prefetch(row(r) + fetched - 1);  // rows begin anywhere in a line
    };
    for (int64_t r = 0; r < smaller(count, kGatherAhead); ++r) fetch(r);
    const auto fetching = [=](int64_t r) {
      if (r + kGatherAhead < count) fetch(r + kGatherAhead);
      return row(r);
    };
    gather_tile<T>(fetching, count, columns, out, rows);
  } else {
    gather_tile<T>([=](int64_t r) { return in + (first + r) * columns; }, count, columns, out, rows);
  }
}

/// Dense::transposed of a paired layer.
template <class T>
void pair_weights(const Dense<T>& d, T* to) {
  constexpr int L = kLanes<T>;
  for (int64_t o = 0; o < d.out; o += 2, to += L) {
    const T* w = d.weights + o / L * L * d.in + o % L;
    store<T>(to, Vec<T>{});
    for (int64_t i = 0; i < d.in; ++i) {  // the weight past the last output is a zero of the padding
      to[2 * i] = w[i * L];
      to[2 * i + 1] = w[i * L + 1];
    }
  }
}

/// Dense::transposed, of inputs [first, last).
template <class T>
void transpose_weights(const Dense<T>& d, int64_t first, int64_t last, T* to) {
  constexpr int L = kLanes<T>;
  if (d.paired) return pair_weights<T>(d, to);
  to += first * d.out;
  for (int64_t i = first; i < last; i += L) {
    for (int64_t o = 0; o < d.out; o += L) {
      const int64_t columns = smaller(L, d.out - o);
      gather_tile<T>([&](int64_t l) { return d.weights + o * d.in + (i + l) * L; }, smaller(L, d.in - i), columns, to,
                     L);
      to += columns * L;
    }
  }
}

/// poison[rows] = 0, or NaN for a row that holds NaN or inf. Returns whether any row does.
template <class T>
bool find_poison(const T* state, int64_t columns, T* poison, int64_t rows) {
  IntVec<T> any = {};
  for (int64_t r = 0; r < rows; r += kLanes<T>) {
    Vec<T> sum = {};
    for (int64_t j = 0; j < columns; ++j) sum = fma(load<T>(state + j * rows + r), Vec<T>{}, sum);
    store<T>(poison + r, sum);
    any |= sum != sum;
  }
  typename Simd<T>::Int found = 0;
  for (int l = 0; l < kLanes<T>; ++l) found |= any[l];
  return found != 0;
}

/// Every number of a poisoned row becomes NaN; other rows keep their bits.
template <class T>
void spread_poison(const T* poison, T* values, int64_t features, int64_t rows) {
  for (int64_t j = 0; j < features; ++j) {
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      const Vec<T> p = load<T>(poison + r);
      store<T>(values + j * rows + r, p != p ? p : load<T>(values + j * rows + r));
    }
  }
}

// Finite rows never give NaN, which stays with rows that came in with NaN or inf. A number beyond the format is
// infinite, and so is one that got lost on the way, as inf - inf; a log-determinant that got lost is such that the
// density of the row is 0.

template <class T>
constexpr T kNaN = static_cast<T>(__builtin_nan(""));
template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

template <class T>
NVPFLOW_INLINE bool is_finite(T x) {
  return x - x == T(0);
}

/// Row r of the input of a call that has one.
template <class T, class Call>
NVPFLOW_INLINE const T* input_row(const Call& call, int64_t r, int64_t features) {
  return call.in + (call.index == nullptr ? r : call.index[r]) * features;
}

template <class T, class Call>
bool input_is_finite(const Call& call, int64_t r, int64_t features) {
  const T* row = input_row<T>(call, r, features);
  bool finite = true;
  for (int64_t j = 0; j < features; ++j) finite &= is_finite(row[j]);
  return finite;
}

template <class T>
NVPFLOW_INLINE T settled(T value) {
  return __builtin_isnan(value) ? kInfinity<T> : value;
}

template <class T>
NVPFLOW_INLINE T settled_log_det(T value, bool inverse) {
  if (is_finite(value)) return value;
  return inverse ? kInfinity<T> : -kInfinity<T>;
}

// ---- a few rows --------------------------------------------------------------------------------------------------

// One block takes all the rows, so that each weight is read once. What hides the latency of the sums is, where the
// outputs are many, several vectors of them; where they are few, all S segments at once.

/// Sums that one block has under way.
constexpr int kFewSums = 2 * kRowsBlock;
/// Vectors of outputs of a wide block: its sums, a vector of weights for each and one of inputs stay in registers.
constexpr int few_vectors(int rows) {
  const int fitting = (kRegisters - 1) / (rows + 1);
  return rows == 1 ? 8 : fitting > 4 ? 4 : fitting;
}

/// The weights of a layer as few rows read them, with the sums over a segment or a step of several segments.
/// fetch_ahead: pays where the rows are so many that a block reads one stream of weights.
template <class T, bool fetch_ahead = false>
struct FullWeights {
  static constexpr bool kCanFetchAhead = true;
  const DenseView<T>& d;

  const T* block(int64_t o) const { return d.weights + o * d.in; }
  int64_t stride() const { return d.in * kLanes<T>; }

  /// sum[m][n] += x[m][i] W[i][n] for the inputs i of segment s, in order.
  template <int MR, int NV>
  NVPFLOW_INLINE void segment(const T* w, int64_t s, const T* x, int64_t x_stride, Vec<T> (&sum)[MR][NV]) const {
    const int64_t begin = s * d.segment;
    accumulate_rows<T, MR, NV, fetch_ahead>(w, stride(), x, x_stride, begin, smaller(begin + d.segment, d.in), sum);
  }

  static constexpr int64_t kStep = 1;
  /// The same for inputs i, ..., i + kStep - 1 of segment s.
  template <int MR, int NV>
  NVPFLOW_INLINE void step(const T* w, int64_t s, int64_t i, const T* x, int64_t x_stride,
                           Vec<T> (&sum)[MR][NV]) const {
    accumulate_rows<T, MR, NV>(w, stride(), x, x_stride, s * d.segment + i, s * d.segment + i + 1, sum);
  }
  template <int MR, int NV>
  NVPFLOW_INLINE void one(const T* w, int64_t s, int64_t i, const T* x, int64_t x_stride, Vec<T> (&sum)[MR][NV]) const {
    step<MR, NV>(w, s, i, x, x_stride, sum);
  }
};

/// Dense::narrow.
struct NarrowWeights {
  static constexpr bool kCanFetchAhead = false;
  using T = float;
  const DenseView<T>& d;

  const uint32_t* block(int64_t o) const { return d.narrow + o * d.narrow_words; }
  int64_t stride() const { return d.narrow_words * kLanes<T>; }
  const uint32_t* words(const uint32_t* w, int64_t s, int64_t i) const {
    return w + (s * ((d.segment + 1) / 2) + i / 2) * kLanes<T>;
  }

  template <int MR, int NV>
  NVPFLOW_INLINE void segment(const uint32_t* w, int64_t s, const T* x, int64_t x_stride, Vec<T> (&sum)[MR][NV]) const {
    const int64_t count = smaller(d.segment, d.in - s * d.segment);
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) step<MR, NV>(w, s, i, x, x_stride, sum);
    if (i < count) one<MR, NV>(w, s, i, x, x_stride, sum);
  }

  static constexpr int64_t kStep = 2;
  /// i: even.
  template <int MR, int NV>
  NVPFLOW_INLINE void step(const uint32_t* w, int64_t s, int64_t i, const T* x, int64_t x_stride,
                           Vec<T> (&sum)[MR][NV]) const {
    Vec<T> first[NV], second[NV];
    for (int n = 0; n < NV; ++n) load_pairs(words(w, s, i) + n * stride(), first[n], second[n]);
    x += s * d.segment + i;
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const Vec<T> input0 = set1(x[m * x_stride]), input1 = set1(x[m * x_stride + 1]);
      for (int n = 0; n < NV; ++n) sum[m][n] = fma(second[n], input1, fma(first[n], input0, sum[m][n]));
    }
  }
  /// Any one input.
  template <int MR, int NV>
  NVPFLOW_INLINE void one(const uint32_t* w, int64_t s, int64_t i, const T* x, int64_t x_stride,
                          Vec<T> (&sum)[MR][NV]) const {
    for (int n = 0; n < NV; ++n) {
      Vec<T> first, second;
      load_pairs(words(w, s, i) + n * stride(), first, second);
      const Vec<T> weight = i % 2 == 0 ? first : second;
      for (int m = 0; m < MR; ++m) sum[m][n] = fma(weight, set1(x[m * x_stride + s * d.segment + i]), sum[m][n]);
    }
  }
};

/// All S segments at once; total holds the first segment's start and ends with the sum of all.
template <class T, int MR, int NV, int S, class W>
NVPFLOW_INLINE void accumulate_segments(const W& weights, int64_t o, const T* x, int64_t x_stride,
                                        Vec<T> (&total)[MR][NV]) {
  const DenseView<T>& d = weights.d;
  const auto* w = weights.block(o);
  Vec<T> sum[S][MR][NV];
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NV; ++n) {
      sum[0][m][n] = total[m][n];
      for (int s = 1; s < S; ++s) sum[s][m][n] = Vec<T>{};
    }
  }
  const int64_t last = d.in - (S - 1) * d.segment;  // the last segment may be shorter
  int64_t i = 0;
  for (; i + W::kStep <= last; i += W::kStep) {
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) weights.template step<MR, NV>(w, s, i, x, x_stride, sum[s]);
  }
  for (; i < d.segment; ++i) {
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      if (s + 1 < S || i < last) weights.template one<MR, NV>(w, s, i, x, x_stride, sum[s]);
    }
  }
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NV; ++n) {
      for (int s = 1; s < S; ++s) sum[0][m][n] = sum[0][m][n] + sum[s][m][n];
      total[m][n] = sum[0][m][n];
    }
  }
}

/// MR rows x NV vectors of outputs from o. S: segments at once, all or (1) one after the other.
template <class T, int MR, int NV, int S, class W>
NVPFLOW_INLINE void few_block(const W& weights, int64_t o, const T* x, int64_t x_stride, T* y, int64_t y_stride,
                              Act act) {
  constexpr int L = kLanes<T>;
  const DenseView<T>& d = weights.d;
  Vec<T> total[MR][NV];
  for (int n = 0; n < NV; ++n) {
    for (int m = 0; m < MR; ++m) total[m][n] = load<T>(d.bias + o + n * L);
  }
  if constexpr (S == 1) {
    const auto* w = weights.block(o);
    weights.template segment<MR, NV>(w, 0, x, x_stride, total);
    for (int64_t s = 1; s * d.segment < d.in; ++s) {
      Vec<T> sum[MR][NV] = {};
      weights.template segment<MR, NV>(w, s, x, x_stride, sum);
      for (int m = 0; m < MR; ++m) {
        for (int n = 0; n < NV; ++n) total[m][n] = total[m][n] + sum[m][n];
      }
    }
  } else {
    accumulate_segments<T, MR, NV, S>(weights, o, x, x_stride, total);
  }
  const auto put = [&](auto&& finish) __attribute__((always_inline)) {
    for (int m = 0; m < MR; ++m) {
      for (int n = 0; n < NV; ++n) store<T>(y + m * y_stride + o + n * L, finish(total[m][n]));
    }
  };
  if (act == Act::relu) return put([](Vec<T> v) __attribute__((always_inline)) { return rectify<T>(v, Act::relu); });
  put([=](Vec<T> v) __attribute__((always_inline)) { return rectify<T>(v, act); });
}

/// MR rows; S: the layer's segments. Not inlined: in one large function gcc leaves the blocks' sums in memory.
template <class T, int MR, int S, class W>
NVPFLOW_NOINLINE void few_rows(const W& weights, const T* x, int64_t x_stride, T* y, int64_t y_stride, Act act) {
  const DenseView<T>& d = weights.d;
  constexpr int L = kLanes<T>, kWide = few_vectors(MR);
  constexpr int kParallel = MR * S <= kFewSums ? S : 1;
  constexpr int kFitting = kFewSums / (MR * S);  // vectors of which all segments can be under way
  constexpr int kMiddle = kFitting < kWide / 2 ? kFitting : kWide / 2;
  int64_t o = 0;
  for (; o + (kWide - 1) * L < d.out; o += kWide * L) {
    few_block<T, MR, kWide, 1>(weights, o, x, x_stride, y, y_stride, act);
  }
  if constexpr (kMiddle > 1) {
    for (; o + (kMiddle - 1) * L < d.out; o += kMiddle * L) {
      few_block<T, MR, kMiddle, kParallel>(weights, o, x, x_stride, y, y_stride, act);
    }
  }
  for (; o < d.out; o += L) few_block<T, MR, 1, kParallel>(weights, o, x, x_stride, y, y_stride, act);
}

/// y[rows][out] = rectify(W^T x[rows][in] + c), row-major, for MR <= rows <= kMaxFewRows; whole vectors of y are
/// written.
template <class T, int MR = 1, class W>
void dense_few_rows(const W& weights, const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t rows, Act act) {
  if constexpr (MR < kMaxFewRows<T>) {
    if (rows > MR) return dense_few_rows<T, MR + 1>(weights, x, x_stride, y, y_stride, rows, act);
  }
  const DenseView<T>& d = weights.d;
  if constexpr (W::kCanFetchAhead && MR >= kFewSums / 2) {
    if (d.far) return few_rows<T, MR, 1>(FullWeights<T, true>{d}, x, x_stride, y, y_stride, act);
  }
  if constexpr (MR <= kFewSums / 2) {
    if (2 * d.segment < d.in) return few_rows<T, MR, 4>(weights, x, x_stride, y, y_stride, act);
    if (d.segment < d.in) return few_rows<T, MR, 2>(weights, x, x_stride, y, y_stride, act);
  }
  few_rows<T, MR, 1>(weights, x, x_stride, y, y_stride, act);
}

/// Row-major numbers of a few rows on their way through the flow.
template <class T>
struct RowState {
  T* state;  // [rows][stride]
  int64_t stride;
  T* log_det;  // [rows][kLanes]: partial sums
  T *buffer0, *buffer1;
  int64_t rows;
};

template <class T>
const T* conditioner_rows(const Layer<T>& layer, const RowState<T>& s) {
  const T* x = s.state + layer.a_begin;
  int64_t stride = s.stride;
  for (int32_t j = 0; j < layer.num_dense; ++j) {
    const Dense<T>& d = layer.dense[j];
    const Act act = j + 1 == layer.num_dense ? Act::none : layer.activation;
    const int64_t y_stride = row_stride<T>(d.out);
    T* y = j % 2 == 0 ? s.buffer0 : s.buffer1;
    const DenseView<T> v = view(d);
    if (d.narrow == nullptr) {
      dense_few_rows<T>(FullWeights<T>{v}, x, stride, y, y_stride, s.rows, act);
    } else if constexpr (sizeof(T) == 4) {
      dense_few_rows<T>(NarrowWeights{v}, x, stride, y, y_stride, s.rows, act);
    }
    if (needs_pass(act)) activate<T>(act, y, y, s.rows * y_stride);
    x = y;
    stride = y_stride;
  }
  return x;
}

template <class T>
void coupling_rows(const Layer<T>& layer, bool inverse, const RowState<T>& s) {
  constexpr int64_t L = kLanes<T>, kStep = kVectors<Steps<T>>;
  const int64_t n = layer.b_count, u_stride = row_stride<T>(2 * n);
  const T* u = conditioner_rows<T>(layer, s);
  T* b = s.state + layer.b_begin;
  const Affine<T> affine = {layer, inverse, u_stride, s.stride, L};
  for (int64_t j = 0; j < n; j += L) {
    // Lanes past n hold s = tanh(0) = 0.
    const auto at = [&](int64_t r, auto&& apply) __attribute__((always_inline)) {
      apply(u + r * u_stride + j, u + r * u_stride + n + j, b + r * s.stride + j, s.log_det + r * L, n - j);
    };
    int64_t r = 0;
    for (; r + kStep <= s.rows; r += kStep) {
      at(r, [&](auto... p) __attribute__((always_inline)) { affine.template apply<Steps<T>>(p...); });
    }
    if constexpr (kStep > 4) {
      for (; r + 4 <= s.rows; r += 4) {
        at(r, [&](auto... p) __attribute__((always_inline)) { affine.template apply<Pair<Pair<Vec<T>>>>(p...); });
      }
    }
    for (; r < s.rows; ++r) {
      at(r, [&](auto... p) __attribute__((always_inline)) { affine.template apply<Vec<T>>(p...); });
    }
  }
}

template <class T>
void standardize_rows(const Layer<T>& layer, bool inverse, int64_t features, const RowState<T>& s) {
  for (int64_t r = 0; r < s.rows; ++r) {
    T* state = s.state + r * s.stride;
    for (int64_t j = 0; j < features; j += kLanes<T>) {
      const int64_t n = features - j;
      const Vec<T> mean = load_upto<T>(layer.mean + j, n);
      const Vec<T> factor = load_upto<T>((inverse ? layer.std : layer.inverse_std) + j, n);
      const Vec<T> in = load_upto<T>(state + j, n);
      store_upto<T>(state + j, inverse ? fma(in, factor, mean) : (in - mean) * factor, n);
    }
    s.log_det[r * kLanes<T>] += inverse ? -layer.log_det : layer.log_det;
  }
}

template <class T>
void flow_rows(const Program<T>& program, bool inverse, const RowState<T>& s) {
  for (int64_t i = 0; i < s.rows * kLanes<T>; i += kLanes<T>) store<T>(s.log_det + i, Vec<T>{});
  for (int64_t k = 0; k < program.num_layers; ++k) {
    const Layer<T>& layer = program.layers[inverse ? program.num_layers - 1 - k : k];
    if (layer.kind == Kind::coupling) {
      coupling_rows<T>(layer, inverse, s);
    } else {
      standardize_rows<T>(layer, inverse, program.input_size, s);
    }
  }
}

}  // namespace
}  // namespace nvpflow::cpu
