// A random recurrence with all the memory it speaks of, and a naive walk through time, in double,
// as judge of what a kernel made of it.
#pragma once

#include <cmath>
#include <iomanip>
#include <sstream>

#include "cuda/walk.h"
#include "device_array.h"
#include "epilogue.h"

namespace check {

using rnn_cuda::Epilogue;
using rnn_cuda::ScalarType;
using rnn_cuda::cuda::Arithmetic;

// How values are stored, and what sums are computed in; the latter is also the type of biases.
template <class S>
struct Type {
  using Compute = float;
};
template <>
struct Type<double> {
  using Compute = double;
};
template <class S>
using Compute = typename Type<S>::Compute;

template <class S>
constexpr ScalarType kScalarType = std::is_same_v<S, float>      ? ScalarType::Float32
                                   : std::is_same_v<S, double>   ? ScalarType::Float64
                                   : std::is_same_v<S, BFloat16> ? ScalarType::BFloat16
                                                                 : ScalarType::Float16;
template <class S>
constexpr double kEpsilon = std::is_same_v<S, float>      ? 0x1p-23
                            : std::is_same_v<S, double>   ? 0x1p-52
                            : std::is_same_v<S, BFloat16> ? 0x1p-7
                                                          : 0x1p-10;

// A sum, more exact than those of float64, and how large its terms are: rounding errors are in
// proportion to that.
struct Sum {
  long double value = 0;
  double magnitude = 0;

  void add(double term) {
    value += term;
    if (std::isfinite(term)) magnitude += std::abs(term);  // what is infinite is not rounded
  }
};

// Of a sum of a few hundred terms; and of rounding it to what it is stored in.
template <class S>
double tolerance(double value, double magnitude) {
  return 300 * kEpsilon<Compute<S>> / 2 * (1 + magnitude) + kEpsilon<S> / 2 * std::abs(value);
}

inline void expect_near(const char* name, int64_t row, int64_t column, double got, double value,
                        double tolerance) {
  // Where an infinite weight takes a value, any kernel has to go.
  if (std::isnan(value) ? std::isnan(got) : std::isinf(value) && got == value) return;
  if (std::isfinite(value) && std::abs(got - value) <= tolerance) return;
  std::ostringstream message;
  message << std::setprecision(17) << name << "[" << row << ", " << column << "] is " << got
          << ", not " << value;
  throw std::runtime_error(message.str());
}

// One problem in so many has an infinite weight: zero times that is NaN, so whoever multiplies
// where nothing is to be multiplied, or lets padding into a result, is seen.
constexpr int64_t kOfInfiniteWeights = 4;

template <class S>
struct RecurrenceProblem {
  const Shape& shape;
  const Arithmetic arithmetic;
  // Rows of M add up to less than one: errors shrink from step to step.
  MatrixArray<S> weight_hidden{shape.H, shape.H, 1.5f / shape.H, one_in(kOfInfiniteWeights)};
  MatrixArray<S> weight_input{shape.H, shape.I, 1};
  RowsArray<S> input{shape, shape.I}, addend{shape, shape.H}, operand{shape, shape.H};
  RowsArray<float> wide_addend{shape, shape.H};
  Array<Compute<S>> bias{shape.H};
  Array<S> initial{shape.B * shape.H}, first_addend{shape.B * shape.H};
  Array<S> output{shape.rows() * shape.H}, last{shape.B * shape.H};
  Array<double> norms{shape.rows()};
  rnn_cuda::Recurrence r;
  const bool wants_norms = one_in(2);

  RecurrenceProblem(const Shape& shape, Arithmetic arithmetic, Epilogue epilogue)
      : shape(shape), arithmetic(arithmetic) {
    fill_randomly(bias, 0, bias.count());
    fill_randomly(initial, 0, initial.count());
    fill_randomly(first_addend, 0, first_addend.count());
    r.dtype = kScalarType<S>;
    r.epilogue = epilogue;
    r.reverse = one_in(2);
    r.time_steps = shape.T, r.batch = shape.B, r.hidden_size = shape.H;
    r.weight_hidden = weight_hidden.matrix();
    if (shape.I > 0) {
      r.input_size = shape.I;
      r.weight_input = weight_input.matrix();
      r.input = input.rows();
    }
    if (one_in(2)) r.bias = bias.device();
    if (!one_in(3)) r.addend = addend.rows();
    if (sizeof(S) == 2 && one_in(3)) r.addend = wide_addend.rows(), r.wide_addend = true;
    r.operand = operand.rows();
    if (one_in(2)) r.initial = initial.device();
    // As the operators ask for it: a forward pass takes no short cut.
    r.multiplies_zero_initial = shape.I > 0 || one_in(2);
    if (one_in(2)) r.first_addend = first_addend.device();
    r.output = output.device();
    r.output_stride = shape.H;
    if (one_in(2)) r.last = last.device();
    norms.device();
  }

  void poison() { output.poison(), norms.poison(); }

  // Calls visit(t) for the time steps of sample b, in their order.
  template <class F>
  void for_each_step(int64_t b, const F& visit) const {
    for (int64_t step = 0; step < shape.T; ++step) {
      const int64_t t = r.reverse ? shape.T - 1 - step : step;
      if (b < shape.samples(t)) visit(t);
    }
  }

  // As the kernel's products see a weight, an input or a state.
  double factor(double value) const {
    namespace emulator = rnn_cuda::emulator;
    return arithmetic == Arithmetic::TensorCoreTF32
               ? emulator::float_of(emulator::tf32_of(static_cast<float>(value)))
               : value;
  }

  Sum sum(int64_t t, int64_t b, int64_t n, const std::vector<double>& state, bool first) const {
    Sum z;
    const bool skips_zero = first && r.initial == nullptr && !r.multiplies_zero_initial;
    if (r.addend.data != nullptr)
      z.add(r.wide_addend ? wide_addend.at(t, b, n) : addend.at(t, b, n));
    if (r.bias != nullptr) z.add(bias[n]);
    if (first && r.first_addend != nullptr) z.add(first_addend[b * shape.H + n]);
    for (int64_t k = 0; k < shape.I; ++k)
      z.add(factor(weight_input.at(n, k)) * factor(input.at(t, b, k)));
    for (int64_t k = 0; k < shape.H && !skips_zero; ++k)
      z.add(factor(weight_hidden.at(n, k)) * factor(state[static_cast<size_t>(k)]));
    return z;
  }

  // Checks all results. The judge goes on from the output that it has checked, as a recurrence has
  // to: what it carries on is what its caller gets to see.
  void judge() {
    output.fetch();
    if (r.last != nullptr) last.fetch();
    if (wants_norms) norms.fetch();
    for (int64_t b = 0; b < shape.B; ++b) judge_sample(b);
  }

 private:
  void judge_sample(int64_t b) const {
    const int64_t H = shape.H;
    std::vector<double> state(static_cast<size_t>(H), 0.0);
    for (int64_t n = 0; r.initial != nullptr && n < H; ++n)
      state[static_cast<size_t>(n)] = initial[b * H + n];
    bool first = true;
    for_each_step(b, [&](int64_t t) {
      const int64_t row = shape.row(t, b);
      long double squares = 0, errors = 0;
      for (int64_t n = 0; n < H; ++n) {
        const Sum z = sum(t, b, n, state, first);
        const double value = apply(r.epilogue, static_cast<double>(z.value), operand.at(t, b, n));
        expect_near("output", row, n, output[row * H + n], value, tolerance<S>(value, z.magnitude));
        const double error = tolerance<Compute<S>>(static_cast<double>(z.value), z.magnitude);
        squares += z.value * z.value;
        errors += error * error;
      }
      if (wants_norms)
        expect_near("norms", row, 0, norms[row], static_cast<double>(std::sqrt(squares)),
                    static_cast<double>(std::sqrt(errors)));
      for (int64_t n = 0; n < H; ++n) state[static_cast<size_t>(n)] = output[row * H + n];
      first = false;
    });
    for (int64_t n = 0; r.last != nullptr && n < H; ++n)
      expect_near("last", b, n, last[b * H + n], state[static_cast<size_t>(n)], 0);
  }
};

}  // namespace check
