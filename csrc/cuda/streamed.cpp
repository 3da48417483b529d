#include "streamed.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "products.h"
#include "runtime.h"

namespace rnn_cuda {
namespace cuda {
namespace {

// Which samples have, begin and end at each step, in the order in which the steps are visited.
class Steps {
 public:
  explicit Steps(const Recurrence& r) : r_(r) {
    int64_t row = 0;
    for (int64_t t = 0; t < r.time_steps; row += size(t++)) first_rows_.push_back(row);
  }

  Step visited(int64_t number) const {
    Step step;
    step.t = r_.reverse ? r_.time_steps - 1 - number : number;
    step.row = first_rows_[step.t];
    step.rows = size(step.t);
    // A sample has the first steps: it begins at t = 0 and ends where its successors have ended, or
    // the other way round.
    const int64_t earlier = step.t == 0 ? 0 : step.rows, later = size(step.t + 1);
    step.begun = r_.reverse ? later : earlier;
    step.continued = r_.reverse ? earlier : later;
    return step;
  }

  int64_t previous_row(const Step& step) const {
    return first_rows_[r_.reverse ? step.t + 1 : step.t - 1];
  }

 private:
  int64_t size(int64_t t) const {
    if (t >= r_.time_steps) return 0;
    return r_.batch_sizes != nullptr ? r_.batch_sizes[t] : r_.batch;
  }

  const Recurrence& r_;
  std::vector<int64_t> first_rows_;
};

}  // namespace

void run_streamed(const RecurrenceBuilder& builder, const Recurrence& r, const Tensor& output,
                  double* norms, const Plan& plan, void* stream) {
  const int64_t hidden = r.hidden_size;
  const Tensor matrix = builder.weight_hidden_tensor().t();
  const Tensor states = output.view({-1, hidden});
  const Tensor z = at::empty({r.batch, hidden}, builder.options().dtype(builder.compute_type()));
  OptionalTensor initial = builder.initial_tensor();
  if (!initial && r.multiplies_zero_initial)
    initial = at::zeros({r.batch, hidden}, builder.options());
  const Steps steps(r);
  for (int64_t number = 0; number < r.time_steps; ++number) {
    const Step step = steps.visited(number);
    if (step.begun > 0)
      wide_product_out(z.narrow(0, 0, step.begun),
                       states.narrow(0, steps.previous_row(step), step.begun), matrix);
    const int64_t fresh = step.rows - step.begun;
    if (fresh > 0 && initial)
      wide_product_out(z.narrow(0, step.begun, fresh), initial->narrow(0, step.begun, fresh),
                       matrix);
    else if (fresh > 0 && step.begun > 0)
      z.narrow(0, step.begun, fresh).zero_();
    const bool is_zero = step.begun == 0 && !initial;
    check_launch(launch_epilogue(r, step, is_zero ? nullptr : z.const_data_ptr(), norms, stream),
                 plan);
  }
}

}  // namespace cuda
}  // namespace rnn_cuda
