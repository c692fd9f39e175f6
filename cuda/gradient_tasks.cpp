// gradient_tasks(): the pieces into which a gradient of parameters is cut, and where each finds what it reads on the
// tape.

#include <cstdint>

#include "kernels.hpp"
#include "plan.hpp"
#include "tape.hpp"

namespace nvpflow::cuda {
namespace {

/// Visits the blocks of inputs and outputs of one dense layer.
template <class T, class Visit>
void each_block(const Program<T>& program, GradientTask task, Visit visit) {
  const Dense& d = program.dense[task.dense];
  for (task.first_in = 0; task.first_in == 0 || task.first_in < d.in; task.first_in += kTaskIn) {  // 0: of the bias
    for (task.first_out = 0; task.first_out < d.out; task.first_out += kTaskOut) visit(task);
  }
}

/// Visits the tasks of the networks of layer k, of Reach::all, whose part of the tape begins at `at`.
template <class T, class Visit>
void each_network_task(const Program<T>& program, const GradientPlan& plan, int k, std::int64_t at, Visit visit) {
  const Layer<T>& layer = program.layers[k];
  const NetworksTape<T> tape(program, layer, plan.tile_rows);
  for (int j = 0; j < layer.num_dense; ++j) {
    const int dense = layer.first_dense + j;
    const Dense& d = program.dense[dense];
    const std::int64_t input =
        d.role == Role::gate ? ContextTape<T>(program, plan.tile_rows).context : at + tape.at(d.tape.input);
    each_block(program, {Task::product, k, dense, 0, 0, input, at + tape.cotangent(j)}, visit);
    if (d.map >= 0) visit({Task::map, k, dense, 0, 0, at + tape.at(d.tape.sums), 0});
  }
}

/// Visits the tasks of layer k, whose part of the tape begins at `at`, in order.
template <Reach reach, class T, class Visit>
void each_task(Of<Kind::coupling>, const Program<T>& program, const GradientPlan& plan, int k, std::int64_t at,
               Visit visit) {
  if constexpr (reach == Reach::all) {
    each_network_task(program, plan, k, at, visit);
  } else {
    const CouplingTape<T> tape(program, program.layers[k], plan.tile_rows);
    for (int j = 0; j < program.layers[k].num_dense; ++j) {
      const int dense = program.layers[k].first_dense + j;
      each_block(program, {Task::product, k, dense, 0, 0, at + tape.input(j), at + tape.cotangent(j)}, visit);
    }
  }
}

template <Reach reach, class T, class Visit>
void each_task(Of<Kind::spline>, const Program<T>& program, const GradientPlan& plan, int k, std::int64_t at,
               Visit visit) {
  const Layer<T>& layer = program.layers[k];
  if (layer.num_dense > 0) return each_network_task(program, plan, k, at, visit);
  const NetworksTape<T> tape(program, layer, plan.tile_rows);  // the constants' gradient is that of a bias
  each_block(program, {Task::product, k, layer.first_dense, 0, 0, 0, at + tape.numbers()}, visit);
}

template <Reach reach, class T, class Visit>
void each_task(Of<Kind::diagonal>, const Program<T>& program, const GradientPlan& plan, int k, std::int64_t at,
               Visit visit) {
  visit({Task::sums, k, 0, 0, 0, at + DiagonalTape<T>(program, program.layers[k], plan.tile_rows).sums(), 0});
}

template <Reach reach, class T, class Visit>
void each_task(Of<Kind::linear>, const Program<T>& program, const GradientPlan& plan, int k, std::int64_t at,
               Visit visit) {
  const LinearTape<T> tape(program, program.layers[k], plan.tile_rows);
  each_block(program, {Task::product, k, program.layers[k].first_dense, 0, 0, at + tape.x(), at + tape.cotangent()},
             visit);
  visit({Task::sums, k, 0, 0, 0, at + tape.sum(), 0});
}

template <Reach reach, class T, class Visit>
void each_task(const Program<T>& program, const GradientPlan& plan, Visit visit_task) {
  for (int k = 0; k < program.num_layers; ++k) {
    const std::int64_t at = layer_tape<reach>(program, k, plan.tile_rows);
    visit(program.layers[k], [&](auto kind) { each_task<reach>(kind, program, plan, k, at, visit_task); });
  }
  const std::int64_t components = program.base.kind == BaseKind::mixture ? program.base.components : 1;
  for (std::int64_t m = 0; program.base_numbers >= 0 && m < components; ++m) {
    const std::int64_t at = BaseTape<T>(program, plan.tile_rows).begin;
    visit_task({Task::base, static_cast<std::int32_t>(m), 0, 0, 0, at, 0});
  }
  if (program.context_statistics < 0) return;
  visit_task({Task::context, 0, 0, 0, 0, ContextTape<T>(program, plan.tile_rows).sums(), 0});
}

}  // namespace

template <class T>
std::int32_t gradient_tasks(const Program<T>& program, const GradientPlan& plan, GradientTask* tasks) {
  std::int32_t count = 0;
  const auto add = [&](const GradientTask& task) {
    if (tasks != nullptr) tasks[count] = task;
    ++count;
  };
  if (program.reach == Reach::all) {
    each_task<Reach::all>(program, plan, add);
  } else {
    each_task<Reach::general>(program, plan, add);
  }
  return count;
}

template std::int32_t gradient_tasks(const Program<float>&, const GradientPlan&, GradientTask*);
template std::int32_t gradient_tasks(const Program<double>&, const GradientPlan&, GradientTask*);

}  // namespace nvpflow::cuda
