// Checks run(const Gradients&) against sums over samples and time steps, written out.
#include "cpu_checks.h"

namespace check {

template <class S>
void check_random_problem(S) {
  const Shape shape = draw_shape();
  Shape without_input = shape;
  without_input.I = 0;
  const Epilogue epilogue = one_in(3) ? any_of(kLeakyBackwards) : any_of(kElmanEpilogues, 5, 5);
  Problem<S> p(without_input, epilogue, Kernels::Cpu);
  const int64_t B = shape.B, I = shape.I, H = shape.H, rows = shape.rows();
  RowsArray<S> input(shape, I), states(shape, H);
  MatrixArray<S> weight_input(H, I, 1);
  Array<S> initial(B * H);
  fill_randomly(initial, 0, initial.count());
  Array<S> grad_input(rows * I), grad_initial(B * H), grad_weight_input(H * I),
      grad_weight_hidden(H * H);
  Array<Compute<S>> grad_bias(H);

  rnn_cuda::Gradients g;
  g.input_size = I;
  g.input = input.rows();
  g.states = states.rows();
  if (one_in(2)) g.initial = initial.device();
  if (one_in(2)) g.grad_input = grad_input.device(), g.weight_input = weight_input.matrix();
  if (one_in(2)) g.grad_initial = grad_initial.device();
  if (!one_in(3)) g.grad_weight_input = grad_weight_input.device();
  if (!one_in(3)) g.grad_weight_hidden = grad_weight_hidden.device();
  if (one_in(2)) g.grad_bias = grad_bias.device();
  const bool is_rounded = multiplies_pairs && std::is_same_v<S, BFloat16>;
  if (one_in(2) && !is_rounded) p.r.output = nullptr;
  p.r.bias = p.r.initial = p.r.last = nullptr;
  p.r.multiplies_zero_initial = false;
  g.backward = p.r;

  const auto judge = [&] {
    p.judge();
    for (auto* array : {&grad_input, &grad_initial, &grad_weight_input, &grad_weight_hidden})
      array->fetch();
    grad_bias.fetch();
    const auto expect_sum = [](const char* name, const auto& array, int64_t columns, int64_t i,
                               const Sum& sum) {
      using Stored = typename std::decay_t<decltype(array)>::Value;
      const double value = static_cast<double>(sum.value);
      expect_near(name, array, columns, i, value, tolerance<Stored>(value, sum.magnitude));
    };
    std::vector<Sum> of_weight_input(H * I), of_weight_hidden(H * H), of_bias(H);
    for (int64_t b = 0; b < B; ++b) {
      const double* last_delta = nullptr;
      p.for_each_step(b, [&](int64_t t) {
        const int64_t row = shape.row(t, b);
        const double* const d = last_delta = p.published.data() + row * H;
        // The forward pass goes the other way.
        const int64_t before = p.r.reverse ? t - 1 : t + 1;
        const auto previous = [&](int64_t k) {
          if (b < shape.samples(before)) return states.at(before, b, k);
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
          expect_sum("grad_input", grad_input, I, row * I + k, sum);
        }
      });
      for (int64_t k = 0; g.grad_initial != nullptr && k < H; ++k) {
        Sum sum;
        for (int64_t n = 0; n < H; ++n) sum.add(p.weight_hidden.at(k, n) * last_delta[n]);
        if (p.counts.carried > 0) sum.add(p.final_carried[size_t(b * H + k)]);
        expect_sum("grad_initial", grad_initial, H, b * H + k, sum);
      }
    }
    const auto expect_all = [&](const char* name, const void* wanted, const auto& array,
                                int64_t columns, const std::vector<Sum>& sums) {
      for (int64_t i = 0; wanted != nullptr && i < array.count(); ++i)
        expect_sum(name, array, columns, i, sums[i]);
    };
    expect_all("grad_weight_input", g.grad_weight_input, grad_weight_input, I, of_weight_input);
    expect_all("grad_weight_hidden", g.grad_weight_hidden, grad_weight_hidden, H, of_weight_hidden);
    expect_all("grad_bias", g.grad_bias, grad_bias, H, of_bias);
  };
  run_and_judge(p, [&](int threads) { rnn_cuda::cpu::run(g, threads); }, judge);
}

}  // namespace check

int main(int argc, char** argv) {
  return check::main_loop(argc, argv, [](auto type) { check::check_random_problem(type); });
}
