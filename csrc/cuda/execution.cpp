#include "execution.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <stdexcept>

#include "plan/current.h"
#include "products.h"
#include "runtime.h"
#include "streamed.h"
#include "to_device.h"

namespace rnn_cuda {
namespace cuda {
namespace {

Problem problem_of(const Recurrence& r, size_t directions) {
  Problem problem;
  problem.dtype = r.dtype;
  problem.time_steps = r.time_steps;
  problem.batch = r.batch;
  problem.input_size = r.input_size;
  problem.hidden_size = r.hidden_size;
  problem.directions = static_cast<int>(directions);
  problem.allow_tf32 = r.dtype == ScalarType::Float32 && allows_tf32();
  return problem;
}

Plan plan_for(const Problem& problem, const DeviceFigures& figures) {
  try {
    return current_plan(problem, figures);
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, "rnn_cuda: ", error.what());
  }
}

// W x_t of all steps, to be added to z_t. It stays in the type that halves compute in.
Tensor project_input(const RecurrenceBuilder& builder, Recurrence& r) {
  const Tensor rows = builder.input_tensor().reshape({builder.total_rows(), r.input_size});
  Tensor product = wide_product(rows, builder.weight_input_tensor().t());
  r.addend = {product.const_data_ptr(), r.batch_sizes != nullptr ? 0 : r.batch * r.hidden_size,
              r.hidden_size};
  r.wide_addend = is_half(builder.type());
  r.input_size = 0;
  r.input = {};
  r.weight_input = {};
  return product;
}

// Device copies of batch_sizes and of the number of rows before each step.
Tensor lengths_on_device(const RecurrenceBuilder& builder) {
  const Tensor& sizes = *builder.batch_sizes();
  const int64_t steps = sizes.numel();
  const Tensor host = at::empty({2, steps}, sizes.options());
  int64_t* lengths = host.mutable_data_ptr<int64_t>();
  int64_t rows = 0;
  for (int64_t t = 0; t < steps; ++t) {
    lengths[t] = builder.recurrence().batch_sizes[t];
    lengths[steps + t] = rows;
    rows += lengths[t];
  }
  return to_device(host, builder.options().device());
}

double* data_of(const Tensor& norms) {
  return norms.defined() ? norms.mutable_data_ptr<double>() : nullptr;
}

// In one launch; returns with the work queued.
void launch_walk(c10::ArrayRef<Job*> jobs, c10::ArrayRef<Recurrence> recurrences,
                 const Problem& problem, const Plan& plan, const DeviceFigures& figures,
                 void* stream) {
  const RecurrenceBuilder& builder = jobs[0]->builder;
  Walk walk;
  walk.directions = static_cast<int>(jobs.size());
  walk.total_rows = builder.total_rows();
  for (size_t i = 0; i < jobs.size(); ++i) {
    walk.direction[i] = recurrences[i];
    walk.norms[i] = data_of(jobs[i]->norms);
  }
  Tensor lengths;
  if (builder.batch_sizes()) {
    lengths = lengths_on_device(builder);
    walk.batch_sizes = lengths.const_data_ptr<int64_t>();
    walk.row_starts = walk.batch_sizes + problem.time_steps;
  }
  const bool norms = walk.norms[0] != nullptr || walk.norms[1] != nullptr;
  const int64_t bytes = workspace_of(problem, plan, builder.total_rows(), norms);
  const Tensor workspace = at::empty({bytes}, builder.options().dtype(at::kByte));
  walk.workspace = workspace.mutable_data_ptr();
  check_launch(launch(walk, problem, plan, figures, stream), plan);
}

}  // namespace

void run(c10::ArrayRef<Job*> jobs) {
  const RecurrenceBuilder& first = jobs[0]->builder;
  const int64_t batch = first.recurrence().batch, hidden = first.recurrence().hidden_size;
  const c10::DeviceGuard guard(first.options().device());
  TORCH_CHECK_NOT_IMPLEMENTED(is_simple(counts_of(first.recurrence().epilogue)),
                              "rnn_cuda: there is no CUDA kernel for this cell yet");
  for (Job* job : jobs) {
    const RecurrenceBuilder& builder = job->builder;
    job->output = at::empty(builder.shape_with(hidden), builder.options());
    if (job->wants_last) job->last = at::empty({1, batch, hidden}, builder.options());
    if (job->wants_norms)
      job->norms = at::empty(builder.shape_of_norms(), builder.options().dtype(at::kDouble));
  }
  if (batch == 0) return;

  const Problem problem = problem_of(first.recurrence(), jobs.size());
  const c10::Device device = jobs[0]->output.device();
  const DeviceFigures figures = figures_of(device);
  const Plan plan = plan_for(problem, figures);
  void* const stream = current_stream(device);
  std::vector<Recurrence> recurrences;
  std::vector<Tensor> projected;
  for (Job* job : jobs) {
    Recurrence r = job->builder.recurrence();
    if (r.input_size > 0 && !plan.fuse_input) projected.push_back(project_input(job->builder, r));
    r.output = job->output.mutable_data_ptr();
    if (job->wants_last) r.last = job->last.mutable_data_ptr();
    recurrences.push_back(r);
  }
  if (plan.residency != Residency::Streamed)
    return launch_walk(jobs, recurrences, problem, plan, figures, stream);
  for (size_t i = 0; i < jobs.size(); ++i)
    run_streamed(jobs[i]->builder, recurrences[i], jobs[i]->output, data_of(jobs[i]->norms), plan,
                 stream);
}

}  // namespace cuda
}  // namespace rnn_cuda
