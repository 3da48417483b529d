// Checks run(const Gradients&) against sums over samples and time steps, written out.
#include "problem.h"

namespace {

using check::Array;
using check::Epilogue;
using check::one_in;
using check::Sum;
using check::uniform;

template <class S>
void check_random_problem(S) {
  using Bias = check::Compute<S>;
  constexpr Epilogue kEpilogues[] = {Epilogue::ElmanTanhBackward, Epilogue::ElmanReluBackward,
                                     Epilogue::ElmanSigmoidBackward,
                                     Epilogue::ElmanIdentityBackward};
  check::RecurrenceProblem<S> p(kEpilogues[uniform(0, 3)]);
  const int64_t B = p.B, I = p.shape.I, H = p.H, rows = p.shape.rows();
  const check::RowsArray<S> input(p.shape, I);
  const check::MatrixArray<S> weight_input(H, I);
  const auto initial = check::random_array<S>(B * H);
  const Array<S> grad_input(rows * I), grad_initial(B * H), grad_weight_input(H * I),
      grad_weight_hidden(H * H);
  const Array<Bias> grad_bias(H);
  const Array<double> adjoint_norm(rows);

  rnn_cuda::Gradients g;
  g.input_size = I;
  g.input = input.rows();
  if (one_in(2)) g.initial = initial.data();
  if (one_in(2)) g.grad_input = grad_input.data(), g.weight_input = weight_input.matrix();
  if (one_in(2)) g.grad_initial = grad_initial.data();
  if (!one_in(3)) g.grad_weight_input = grad_weight_input.data();
  if (!one_in(3)) g.grad_weight_hidden = grad_weight_hidden.data();
  if (one_in(2)) g.grad_bias = grad_bias.data();
  if (one_in(2)) g.adjoint_norm = adjoint_norm.data();
  const bool is_rounded = check::multiplies_pairs && std::is_same_v<S, c10::BFloat16>;
  if (one_in(2) && !is_rounded) p.r.output = nullptr;
  g.backward = p.r;

  const auto judge = [&] {
    std::vector<Sum> adjoints;
    const std::vector<double> delta =
        p.states({}, [](int64_t, int64_t, int64_t, Sum&) {}, &adjoints);
    for (int64_t row = 0; g.adjoint_norm != nullptr && row < rows; ++row) {
      double squares = 0, tolerances = 0;
      for (int64_t i = row * H; i < (row + 1) * H; ++i) {
        squares += adjoints[i].value * adjoints[i].value;
        // As of a sum: an adjoint is not rounded to what deltas are stored in, but is made of some.
        tolerances += std::pow(check::tolerance<S>(adjoints[i].value, adjoints[i].magnitude), 2);
      }
      if (!(std::abs(adjoint_norm[row] - std::sqrt(squares)) <= std::sqrt(tolerances)))
        throw std::runtime_error("adjoint_norm[" + std::to_string(row) + "] is " +
                                 std::to_string(adjoint_norm[row]) + ", not " +
                                 std::to_string(std::sqrt(squares)));
    }
    std::vector<Sum> of_weight_input(H * I), of_weight_hidden(H * H), of_bias(H);
    for (int64_t b = 0; b < B; ++b) {
      const double* last_delta = nullptr;
      p.for_each_step(b, [&](int64_t t) {
        const int64_t row = p.shape.first_row[t] + b;
        const double* const d = last_delta = delta.data() + row * H;
        // The forward pass goes the other way.
        const int64_t before = p.r.reverse ? t - 1 : t + 1;
        const auto previous = [&](int64_t k) {
          if (b < p.shape.samples(before)) return p.operand.at(before, b, k);
          return g.initial == nullptr ? 0.0 : initial[b * H + k];
        };
        for (int64_t n = 0; n < H; ++n) {
          for (int64_t k = 0; k < I; ++k) of_weight_input[n * I + k].add(d[n] * input.at(t, b, k));
          for (int64_t k = 0; k < H; ++k) of_weight_hidden[n * H + k].add(d[n] * previous(k));
          of_bias[n].add(d[n]);
        }
        for (int64_t k = 0; g.grad_input != nullptr && k < I; ++k) {
          Sum sum;
          for (int64_t n = 0; n < H; ++n) sum.add(weight_input.at(n, k) * d[n]);
          check::expect<S>("grad_input", grad_input, I, row * I + k, sum.value, sum.magnitude);
        }
      });
      for (int64_t k = 0; g.grad_initial != nullptr && k < H; ++k) {
        Sum sum;
        for (int64_t n = 0; n < H; ++n) sum.add(p.weight_hidden.at(k, n) * last_delta[n]);
        check::expect<S>("grad_initial", grad_initial, H, b * H + k, sum.value, sum.magnitude);
      }
    }
    const auto expect_all = [](const char* name, const void* wanted, const auto& got,
                               int64_t columns, const std::vector<Sum>& sums) {
      using Stored = std::remove_reference_t<decltype(*got.data())>;
      for (int64_t i = 0; wanted != nullptr && i < got.count(); ++i)
        check::expect<Stored>(name, got, columns, i, sums[i].value, sums[i].magnitude);
    };
    expect_all("grad_weight_input", g.grad_weight_input, grad_weight_input, I, of_weight_input);
    expect_all("grad_weight_hidden", g.grad_weight_hidden, grad_weight_hidden, H, of_weight_hidden);
    expect_all("grad_bias", g.grad_bias, grad_bias, H, of_bias);
  };
  check::run_and_judge(p.name(), [&](int threads) { rnn_cuda::cpu::run(g, threads); }, judge);
}

}  // namespace

int main(int argc, char** argv) {
  return check::main_loop(argc, argv, [](auto type) { check_random_problem(type); });
}
