#include "cpu_flow.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <nvpflow/spec.hpp>

#include "../parallel.hpp"
#include "kernels.hpp"
#include "lu_matrix.hpp"

namespace nvpflow::cpu {
namespace {

/// Below this much arithmetic a call is not worth another thread.
constexpr double kFlopsPerThread = 4e6;
/// Multiply-adds per row of one weight-gradient task.
constexpr std::int64_t kTaskSize = 16384;
/// Inputs of a task are a multiple of this: whole register blocks, and whole vectors of every width, or a kernel that
/// takes inputs by vectors would read past the end of a row.
constexpr std::int64_t kTaskRows = 16;
/// Tape that each of several threads may fill before they meet.
constexpr std::int64_t kTapeBytesPerThread = 3 << 19;

}  // namespace

template <class T>
CpuFlow<T>::CpuFlow(const FlowSpec& spec, const ParamLayout& layout, const Kernels<T>& kernels,
                    const Program<T>& program)
    : kernels_(kernels),
      features_(spec.input_size),
      num_parameters_(layout.size()),
      flops_per_row_(layout.flops_per_row()),
      tile_rows_(program.tile_rows),
      gradient_rows_(program.gradient_rows),
      transform_scratch_(kernels.transform_scratch(program)),
      tape_size_(kernels.tape_size(program, program.gradient_rows)) {
  const double rows = std::ceil(kFlopsPerThread / flops_per_row_);
  grain_ = std::max<std::int64_t>(1, static_cast<std::int64_t>(std::ceil(rows / static_cast<double>(tile_rows_)))) *
           tile_rows_;
  plan_tasks(program);
  const std::size_t first = layout.first_tensor(spec.layers.size());
  base_end_ = layout.size() - (spec.standardize_context ? 2 * spec.context_size : 0);
  base_begin_ = first < layout.tensors().size() ? layout.tensors()[first].offset : base_end_;
}

template <class T>
void CpuFlow<T>::plan_tasks(const Program<T>& program) {
  for (std::int64_t k = 0; k < program.num_layers; ++k) {
    const Layer<T>& layer = program.layers[k];
    for (std::int32_t part = 0; part < kernels_.gradient_parts(layer); ++part) {
      add_tasks(k, part, kernels_.gradient_part(layer, part));
    }
  }
  num_layer_tasks_ = tasks_.size();
  add_tasks(program.num_layers, 0, kernels_.base_part(program));
}

template <class T>
void CpuFlow<T>::add_tasks(std::int64_t layer, std::int32_t part, PartSize size) {
  const std::int64_t strip =
      size.weight == 0 ? size.count : std::max<std::int64_t>(1, kTaskSize / size.weight / kTaskRows) * kTaskRows;
  for (std::int64_t i = 0; i < size.count; i += strip) {
    tasks_.push_back({layer, part, i, std::min(size.count, i + strip)});
  }
}

template <class T>
int CpuFlow<T>::threads_for(std::int64_t rows, int threads) const {
  const double worth = static_cast<double>(rows) * flops_per_row_ / kFlopsPerThread;
  return worth >= static_cast<double>(threads) ? threads : std::max(1, static_cast<int>(worth));
}

/// Tiles between two meetings of the threads. Meetings cost, most of all on a busy machine; so does memory.
template <class T>
std::int64_t CpuFlow<T>::tiles_per_thread() const {
  return std::clamp<std::int64_t>(kTapeBytesPerThread / (tape_size_ * static_cast<std::int64_t>(sizeof(T))), 1, 8);
}

template <class T>
double CpuFlow<T>::gradient(const Program<T>& program, GradientCall<T> call, std::int64_t rows, T* gradient,
                            bool accumulate, int threads) const {
  const bool of_density = call.nll || call.density;
  if (gradient != nullptr && !accumulate) {
    if (rows == 0) std::fill_n(gradient, num_parameters_, T(0));
    if (!of_density) std::fill_n(gradient + base_begin_, base_end_ - base_begin_, T(0));
  }
  const int team = threads_for(rows, threads);
  if (team > 1) return gradient_by_team(program, call, rows, gradient, accumulate, team);
  T* tape = thread_scratch<T>(tape_size_ + program.products);
  call.gradient = gradient;
  call.products = start_products(program, tape + tape_size_);
  double total = 0;
  for (std::int64_t row = 0; row < rows; row += gradient_rows_) {
    call.add = accumulate || row > 0;
    double sums[kMaxGradientUnits] = {};
    const std::int64_t count = std::min(gradient_rows_, rows - row);
    const std::int64_t tape_rows = (count + kernels_.lanes - 1) / kernels_.lanes * kernels_.lanes;
    kernels_.gradient_tile(program, call, row, row + count, tape_rows, tape, sums);
    for (const double sum : sums) total += sum;
  }
  if (gradient != nullptr && rows > 0) finish_gradient(program, call, gradient, accumulate, team);
  return total;
}

/// Zero, so that every tile adds to them.
template <class T>
T* CpuFlow<T>::start_products(const Program<T>& program, T* products) const {
  std::fill_n(products, program.products, T(0));
  return products;
}

/// Once for each call: the products of linear layers are sums over all its rows.
template <class T>
void CpuFlow<T>::finish_gradient(const Program<T>& program, const GradientCall<T>& call, T* gradient, bool accumulate,
                                 int threads) const {
  for (std::int64_t k = 0; program.products > 0 && k < program.num_layers; ++k) {
    const Layer<T>& layer = program.layers[k];
    if (!facts_of(layer.kind).has_matrices) continue;
    add_lu_gradient(*layer.linear, call.inverse != layer.inverse, call.products, gradient, accumulate, threads);
  }
}

/// How the threads share the tiles: rows of the parts that a tile is cut into where there are more threads than
/// tiles.
template <class T>
std::int64_t CpuFlow<T>::part_rows(std::int64_t tiles, int team) const {
  const std::int64_t units = gradient_rows_ / kGradientUnit, parts = std::min(units, (team + tiles - 1) / tiles);
  return (units + parts - 1) / parts * kGradientUnit;
}

/// The threads share a few tiles, meet, and share the parameters: the same sums in the same order as one thread's.
template <class T>
double CpuFlow<T>::gradient_by_team(const Program<T>& program, GradientCall<T> call, std::int64_t rows, T* gradient,
                                    bool accumulate, int team) const {
  const std::int64_t tiles = (rows + gradient_rows_ - 1) / gradient_rows_;
  const std::int64_t tape_rows = part_rows(tiles, team), parts = (gradient_rows_ + tape_rows - 1) / tape_rows;
  const std::int64_t tape_size = kernels_.tape_size(program, tape_rows);
  const std::int64_t group = std::min<std::int64_t>(tiles, team * tiles_per_thread());
  T* tapes = thread_scratch<T>(group * parts * tape_size + program.products);
  call.products = start_products(program, tapes + group * parts * tape_size);
  std::vector<double> sums(static_cast<std::size_t>(group * parts * kMaxGradientUnits));
  double total = 0;
  for (std::int64_t first = 0; first < tiles; first += group) {
    const std::int64_t here = std::min(group, tiles - first);
    std::fill(sums.begin(), sums.end(), 0.0);
    parallel_for(here * parts, 1, team, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t tile = (first + i / parts) * gradient_rows_, row = tile + i % parts * tape_rows;
        const std::int64_t last = std::min({rows, tile + gradient_rows_, row + tape_rows});
        if (row >= last) continue;
        kernels_.gradient_tile(program, call, row, last, tape_rows, tapes + i * tape_size,
                               sums.data() + i * kMaxGradientUnits);
      }
    });
    for (const double sum : sums) total += sum;
    if (gradient == nullptr) continue;
    // The base is part of densities only.
    const auto num_tasks = static_cast<std::int64_t>(call.nll || call.density ? tasks_.size() : num_layer_tasks_);
    parallel_for(num_tasks, 1, team, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const Task& task = tasks_[static_cast<std::size_t>(i)];
        const bool of_layer = task.layer < program.num_layers;
        T* to = of_layer && facts_of(program.layers[task.layer].kind).has_matrices ? call.products : gradient;
        for (std::int64_t tile = 0; tile < here; ++tile) {
          const std::int64_t row = (first + tile) * gradient_rows_;
          kernels_.weight_gradient(
              program, task.layer, task.part, task.first, task.last,
              {tapes + tile * parts * tape_size, tape_size, tape_rows, std::min(gradient_rows_, rows - row)}, to,
              accumulate || row > 0);
        }
      }
    });
  }
  if (gradient != nullptr) finish_gradient(program, call, gradient, accumulate, team);
  return total;
}

template class CpuFlow<float>;
template class CpuFlow<double>;

}  // namespace nvpflow::cpu
