// Candidates that lost, in the terms of cpp/src/cpu/*.inl. Figures: tests/bench/NOTEBOOK.md.

namespace nvpflow::cpu {
namespace {

/// dense_tile with register blocks of MO outputs x NV vectors of rows: 8 x 1 reads nine values for eight multiply-adds.
template <class T, int MO, int NV>
void tile_blocks(const Dense<T>& d, const T* x, T* y, int64_t rows) {
  constexpr int L = kLanes<T>;
  for (int64_t o = 0; o < d.out; o += MO) {
    const T* w = d.weights + o / L * L * d.in + o % L;
    int64_t r = 0;
    for (; r + NV * L <= rows; r += NV * L) {
      dense_block<T, MO, NV, Act::relu>(d, w, d.bias + o, x + r, y + o * rows + r, rows);
    }
    for (; r < rows; r += L) dense_block<T, MO, 1, Act::relu>(d, w, d.bias + o, x + r, y + o * rows + r, rows);
  }
}

/// Scale and translation each by themselves: where a head has half a vector's outputs, half the arithmetic is wasted.
/// The bias one vector of outputs at a time: each addition waits for the one before, and the cotangents come from the
/// second cache.
template <class T>
void heads_apart(const OuterProduct<T>& p, int64_t in, const DenseColumns<T>& to) {
  constexpr int L = kLanes<T>;
  for (int head = 0; head < 2; ++head) {
    const int64_t n = to.kernel.n[head], begin = head == 0 ? 0 : to.kernel.n[0];
    const OuterProduct<T> part = {p.x, p.x_stride, p.g + begin, p.g_stride, p.count, p.rows, p.tape_stride, n};
    for (int64_t o = 0; o < n; o += L) {
      const Columns<T> kernel = {{to.kernel.to[head], to.kernel.to[head]}, {n, 0}, true};
      const Columns<T> bias = {{to.bias.to[head], to.bias.to[head]}, {n, 0}, true};
      for (int64_t i = 0; i < in; i += 8) outer_block<T, 8, 1, false>(part, i, o, {kernel, bias});
      Vec<T> sum[1][1] = {};
      for (int64_t r = 0; r < p.count; ++r) sum[0][0] = sum[0][0] + load<T>(part.g + r * p.g_stride + o);
      bias.put(0, o, sum);
    }
  }
}

}  // namespace
}  // namespace nvpflow::cpu
