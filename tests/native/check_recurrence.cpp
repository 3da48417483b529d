// Checks run(const Recurrence&) against the contract of recurrence.h, word by word.
#include "cell_problem.h"

namespace {

using check::Array;
using check::one_in;
using check::Sum;
using check::uniform;

template <class S>
void check_cell() {
  check::CellProblem<S> p;
  check::run_and_judge(
      p.name(), [&](int threads) { rnn_cuda::cpu::run(p.r, threads); }, [&] { p.judge(); });
}

template <class S>
void check_random_problem(S) {
  if (one_in(3)) return check_cell<S>();
  using Bias = check::Compute<S>;
  check::RecurrenceProblem<S> p(
      check::kElmanEpilogues[uniform(0, std::size(check::kElmanEpilogues) - 1)]);
  const int64_t I = p.shape.I, H = p.H;
  const check::RowsArray<S> input(p.shape, I);
  const check::MatrixArray<S> weight_input(H, I);
  const auto bias = check::random_array<Bias>(H);
  const auto initial = check::random_array<S>(p.B * H);
  const Array<S> last(p.B * H);
  if (I > 0) p.r.input_size = I, p.r.weight_input = weight_input.matrix(), p.r.input = input.rows();
  if (one_in(2)) p.r.bias = bias.data();
  if (one_in(2)) p.r.initial = initial.data();
  if (one_in(2)) p.r.last = last.data();

  const auto judge = [&] {
    const std::vector<double> states =
        p.states(initial, [&](int64_t t, int64_t b, int64_t n, Sum& z) {
          if (p.r.bias != nullptr) z.add(bias[n]);
          for (int64_t k = 0; k < I; ++k) z.add(weight_input.at(n, k) * input.at(t, b, k));
        });
    for (int64_t b = 0; p.r.last != nullptr && b < p.B; ++b) {
      int64_t last_row = 0;
      p.for_each_step(b, [&](int64_t t) { last_row = p.shape.first_row[t] + b; });
      if (std::memcmp(last.data() + b * H, p.output.data() + last_row * H, H * sizeof(S)) != 0)
        throw std::runtime_error("last differs from output, sample " + std::to_string(b));
    }
    const Array<S> of_one_thread(p.output.count());
    rnn_cuda::Recurrence again = p.r;
    again.output = of_one_thread.data();
    rnn_cuda::cpu::run(again, 1);
    if (std::memcmp(of_one_thread.data(), p.output.data(), p.output.count() * sizeof(S)) != 0)
      throw std::runtime_error("output depends on the number of threads");
  };
  check::run_and_judge(p.name(), [&](int threads) { rnn_cuda::cpu::run(p.r, threads); }, judge);
}

}  // namespace

int main(int argc, char** argv) {
  return check::main_loop(argc, argv, [](auto type) { check_random_problem(type); });
}
