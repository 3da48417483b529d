// A random recurrence with all the memory it speaks of, and a naive walk through time, in double,
// as judge of what a kernel made of it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iomanip>
#include <iterator>
#include <sstream>

#include "arrays.h"

namespace check {

using rnn_cuda::Counts;
using rnn_cuda::Epilogue;
using rnn_cuda::Function;
using rnn_cuda::Functions;
using rnn_cuda::ScalarType;

// What sums are computed in; also the type of biases.
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

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

// ---- cells --------------------------------------------------------------------------------------

constexpr Epilogue kElmanEpilogues[] = {
    Epilogue::ElmanTanh,
    Epilogue::ElmanRelu,
    Epilogue::ElmanSigmoid,
    Epilogue::ElmanIdentity,
    Epilogue::ElmanSoftplus,
    Epilogue::ElmanTanhBackward,
    Epilogue::ElmanReluBackward,
    Epilogue::ElmanSigmoidBackward,
    Epilogue::ElmanIdentityBackward,
    Epilogue::ElmanSoftplusBackward,
    Epilogue::ElmanLinear,
};
constexpr Epilogue kLeakyBackwards[] = {
    Epilogue::LeakyTanhBackward,     Epilogue::LeakyReluBackward,
    Epilogue::LeakySigmoidBackward,  Epilogue::LeakyIdentityBackward,
    Epilogue::LeakySoftplusBackward,
};
constexpr Epilogue kOtherEpilogues[] = {
    Epilogue::Gru,
    Epilogue::GruBackward,
    Epilogue::GruOf,
    Epilogue::GruOfBackward,
    Epilogue::Lstm,
    Epilogue::LstmBackward,
    Epilogue::LstmOf,
    Epilogue::LstmOfBackward,
    Epilogue::LeakyTanh,
    Epilogue::LeakyRelu,
    Epilogue::LeakySigmoid,
    Epilogue::LeakyIdentity,
    Epilogue::LeakySoftplus,
    Epilogue::LeakyTanhBackward,
    Epilogue::LeakyReluBackward,
    Epilogue::LeakySigmoidBackward,
    Epilogue::LeakyIdentityBackward,
    Epilogue::LeakySoftplusBackward,
    Epilogue::LinearForward1,
    Epilogue::LinearForward2,
    Epilogue::LinearForward3,
    Epilogue::LinearForward3Exposed,
    Epilogue::LinearTranspose1,
    Epilogue::LinearTranspose2,
    Epilogue::LinearTranspose3,
    Epilogue::LinearTranspose3Exposed,
};

// One of an array, or of the first `count` in it.
template <class T, size_t n>
T any_of(const T (&values)[n], int64_t first = 0, int64_t count = n) {
  return values[uniform(first, first + count - 1)];
}

// Functions of gated cells; what a gate lets pass stays bounded, so that states do not grow.
inline Functions any_functions() {
  constexpr Function kCandidates[] = {Function::Tanh, Function::Relu, Function::Sigmoid,
                                      Function::HardSigmoid, Function::Identity};
  constexpr Function kGates[] = {Function::Sigmoid, Function::HardSigmoid};
  return {any_of(kCandidates), any_of(kGates)};
}

// One unit in one step, in double. Written from the formulas of the field, not from csrc/cells/.
struct JudgedUnit {
  double sums[4], apart, operands[8], constants[2], carried;
  double published[4], saved[6], adjoints[3];
  Functions functions;  // of gated cells

  void apply(Epilogue epilogue) {
    const auto sigmoid = [](double z) { return 1 / (1 + std::exp(-z)); };
    const auto softplus = [](double z) { return std::log1p(std::exp(z)); };
    const double sum = sums[0], e = operands[0];
    switch (epilogue) {
      case Epilogue::ElmanTanh: published[0] = std::tanh(sum); return;
      case Epilogue::ElmanRelu: published[0] = sum <= 0 ? 0 : sum; return;  // a NaN stays one
      case Epilogue::ElmanSigmoid: published[0] = sigmoid(sum); return;
      case Epilogue::ElmanIdentity: published[0] = sum; return;
      case Epilogue::ElmanSoftplus: published[0] = softplus(sum); return;
      case Epilogue::ElmanIdentityBackward: published[0] = adjoints[0] = sum; return;
      case Epilogue::ElmanTanhBackward: adjoints[0] = sum, published[0] = sum * (1 - e * e); return;
      case Epilogue::ElmanReluBackward: adjoints[0] = sum, published[0] = e <= 0 ? 0 : sum; return;
      case Epilogue::ElmanSigmoidBackward:
        adjoints[0] = sum, published[0] = sum * e * (1 - e);
        return;
      case Epilogue::ElmanSoftplusBackward:
        adjoints[0] = sum, published[0] = sum * (1 - std::exp(-e));
        return;
      case Epilogue::ElmanLinear: published[0] = sum * e; return;
      case Epilogue::Gru:
      case Epilogue::GruOf: {
        const double r = gate(sums[0]), z = gate(sums[1]);
        const double n = candidate(apart + r * sums[2]), before = carried;
        carried = (1 - z) * n + z * before;
        published[0] = carried;
        const double all[] = {r, z, n, sums[2], before};
        std::copy_n(all, 5, saved);
        return;
      }
      case Epilogue::GruBackward:
      case Epilogue::GruOfBackward: {
        const double r = operands[0], z = operands[1], n = operands[2], q = operands[3];
        const double before = operands[4];
        const double dh = sum + carried;
        const double dn = dh * (1 - z), dz = dh * (before - n), before_f = dn * candidate_slope(n);
        published[0] = before_f * q * gate_slope(r);
        published[1] = dz * gate_slope(z);
        published[2] = before_f * r;
        saved[0] = before_f;
        adjoints[0] = dh;
        carried = dh * z;
        return;
      }
      case Epilogue::LeakyTanh: return leaky(std::tanh(sum));
      case Epilogue::LeakyRelu: return leaky(sum <= 0 ? 0 : sum);
      case Epilogue::LeakySigmoid: return leaky(sigmoid(sum));
      case Epilogue::LeakyIdentity: return leaky(sum);
      case Epilogue::LeakySoftplus: return leaky(softplus(sum));
      case Epilogue::LeakyTanhBackward: return leaky_backward(1 - e * e);
      case Epilogue::LeakyReluBackward: return leaky_backward(e > 0);
      case Epilogue::LeakySigmoidBackward: return leaky_backward(e * (1 - e));
      case Epilogue::LeakyIdentityBackward: return leaky_backward(1);
      case Epilogue::LeakySoftplusBackward: return leaky_backward(1 - std::exp(-e));
      case Epilogue::Lstm:
      case Epilogue::LstmOf: {
        const double i = gate(sums[0]), f = gate(sums[1]), g = candidate(sums[2]);
        const double o = gate(sums[3]), before = carried;
        carried = f * before + i * g;
        published[0] = o * candidate(carried);
        const double all[] = {i, f, g, o, before, candidate(carried)};
        std::copy_n(all, 6, saved);
        return;
      }
      case Epilogue::LstmBackward:
      case Epilogue::LstmOfBackward: {
        const double i = operands[0], f = operands[1], g = operands[2], o = operands[3];
        const double before = operands[4], shown = operands[5];
        const double dh = sums[0], dc = carried + dh * o * candidate_slope(shown);
        published[0] = dc * g * gate_slope(i);
        published[1] = dc * before * gate_slope(f);
        published[2] = dc * i * candidate_slope(g);
        published[3] = dh * shown * gate_slope(o);
        adjoints[0] = dh, adjoints[1] = dc, adjoints[2] = carried;
        carried = dc * f;
        return;
      }
      case Epilogue::LinearForward1: return linear(1, false);
      case Epilogue::LinearForward2: return linear(2, false);
      case Epilogue::LinearForward3: return linear(3, false);
      case Epilogue::LinearForward3Exposed: return linear(3, true);
      case Epilogue::LinearTranspose1: return linear_transpose(1, false);
      case Epilogue::LinearTranspose2: return linear_transpose(2, false);
      case Epilogue::LinearTranspose3: return linear_transpose(3, false);
      case Epilogue::LinearTranspose3Exposed: return linear_transpose(3, true);
    }
  }

 private:
  static double value(Function function, double z) {
    switch (function) {
      case Function::Tanh: return std::tanh(z);
      case Function::Relu: return z <= 0 ? 0 : z;
      case Function::Sigmoid: return 1 / (1 + std::exp(-z));
      case Function::HardSigmoid: return z <= -3 ? 0 : z >= 3 ? 1 : (z + 3) / 6;
      case Function::Identity: break;
    }
    return z;
  }
  // Of a function that returned h.
  static double slope(Function function, double h) {
    switch (function) {
      case Function::Tanh: return 1 - h * h;
      case Function::Relu: return h <= 0 ? 0 : 1;
      case Function::Sigmoid: return h * (1 - h);
      case Function::HardSigmoid: return h <= 0 || h >= 1 ? 0 : 1.0 / 6;
      case Function::Identity: break;
    }
    return 1;
  }
  double candidate(double z) const { return value(functions.candidate, z); }
  double gate(double z) const { return value(functions.gate, z); }
  double candidate_slope(double h) const { return slope(functions.candidate, h); }
  double gate_slope(double h) const { return slope(functions.gate, h); }

  void leaky(double f) {
    saved[0] = f;
    published[0] = carried = constants[0] * carried + constants[1] * f;
  }

  void leaky_backward(double derivative) {
    adjoints[0] = sums[0] + carried;
    published[0] = adjoints[0] * constants[1] * derivative;
    carried = adjoints[0] * constants[0];
  }

  void linear(int gates, bool exposes) {
    const double* const rest = operands + gates;
    double v = rest[0] * carried + rest[exposes ? 3 : 1];
    for (int g = 0; g < gates; ++g) v += operands[g] * sums[g];
    carried = published[0] = v;
    if (exposes) published[0] = rest[1] * v + rest[2] * sums[gates] + rest[4];
    saved[0] = published[0], saved[1] = v;
  }

  void linear_transpose(int gates, bool exposes) {
    const double* const rest = operands + gates;
    const double of_y = exposes ? sums[0] : sums[0] + carried;
    const double of_v = exposes ? carried + rest[1] * of_y + rest[3] : of_y;
    for (int g = 0; g < gates; ++g) published[g] = operands[g] * of_v;
    if (exposes) published[gates] = rest[2] * of_y;
    saved[0] = of_y, saved[1] = of_v, carried = rest[0] * of_v;
  }
};

#ifdef __CUDACC__  // cells.h counts for host compilers only; CUDA has no other cell than Elman's
inline Counts counts_of(Epilogue) {
  Counts counts;
  counts.operands = 1;
  return counts;
}
#else
using rnn_cuda::counts_of;
#endif

// ---- results ------------------------------------------------------------------------------------

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

// Of a sum of up to a few hundred terms of the given magnitude (a kernel adds up longer ones in
// pieces); and of rounding it to what it is stored in.
template <class S>
double tolerance(double value, double magnitude) {
  return 300 * kEpsilon<Compute<S>> / 2 * (1 + magnitude) + kEpsilon<S> / 2 * std::abs(value);
}

// Element `i` of an array with so many columns.
template <class Stored>
void expect_near(const char* name, const Array<Stored>& array, int64_t columns, int64_t i,
                 double value, double tolerance) {
  const double got = array[i];
  if (std::abs(got - value) <= tolerance) return;
  // Where an infinite weight takes a value, any kernel has to go.
  if (std::isnan(value) ? std::isnan(got) : std::isinf(value) && got == value) return;
  std::ostringstream message;
  message << std::setprecision(17) << name << "[" << i / columns << ", " << i % columns << "] is "
          << got << ", not " << value;
  throw std::runtime_error(message.str());
}

// ---- problems -----------------------------------------------------------------------------------

enum class Kernels { Cpu, Cuda, CudaTF32 };

// Which optional parts there are is drawn.
template <class S>
struct Problem {
  const Shape& shape;
  const Kernels kernels;
  const Counts counts;
  // Elman cells may have an addend and an input. Of the others, a backward recurrence has an addend
  // and no input, a forward one the other way round.
  const bool is_elman, has_addend = is_elman || counts.operands > 0,
                       has_input = is_elman || counts.operands == 0;
  const int64_t T = shape.T, B = shape.B, I = has_input ? shape.I : 0, H = shape.H,
                rows = shape.rows();
  const int64_t sums_size = counts.sums * H, published_size = counts.published * H,
                saved_size = counts.saved * H;
  // One problem in four has an infinite weight: zero times that is NaN, so whoever multiplies where
  // nothing is to be multiplied, or lets padding into a result, is seen. Rows of M add up to less
  // than one: errors shrink from step to step.
  MatrixArray<S> weight_hidden{sums_size, published_size,
                               std::min(1.5f / static_cast<float>(published_size), 0.9f),
                               kernels != Kernels::Cpu && one_in(4)};
  MatrixArray<S> weight_input{sums_size, I, 1};
  RowsArray<S> input{shape, I}, addend{shape, sums_size}, operand{shape, counts.operands * H};
  RowsArray<float> wide_addend{shape, sums_size};
  Array<Compute<S>> bias{sums_size + counts.apart * H}, constants{counts.constants * H};
  Array<S> initial{B * published_size}, initial_carried{counts.carried * B * H};
  Array<S> first_addend{B * sums_size};
  Array<S> output{rows * published_size}, saved{rows * saved_size};
  Array<S> last{B * published_size}, last_carried{counts.carried * B * H};
  Array<double> norms{rows};  // of CUDA kernels
  const bool wants_norms = kernels != Kernels::Cpu && one_in(2);
  Array<Compute<S>> adjoints{counts.adjoints * rows * H};
  Array<double> adjoint_norms{counts.adjoints * rows};
  rnn_cuda::Recurrence r;

  // What the judge found: the sums z of all rows, and what is published, as far as it is no output.
  std::vector<Sum> sums;
  std::vector<double> published;
  std::vector<double> final_carried;  // (B, H), of cells with carried values

  Problem(const Shape& shape, Epilogue epilogue, Kernels kernels)
      : shape(shape),
        kernels(kernels),
        counts(counts_of(epilogue)),
        is_elman(epilogue <= Epilogue::ElmanLinear) {
    for (auto* array : {&bias, &constants}) fill_randomly(*array, 0, array->count());
    for (auto& value : constants.host) value = std::abs(value) / 2;  // states do not grow for ever
    for (auto* array : {&initial, &initial_carried, &first_addend})
      fill_randomly(*array, 0, array->count());
    r.dtype = kScalarType<S>;
    r.epilogue = epilogue;
    constexpr Epilogue kOfFunctions[] = {Epilogue::GruOf, Epilogue::GruOfBackward, Epilogue::LstmOf,
                                         Epilogue::LstmOfBackward};
    if (std::find(std::begin(kOfFunctions), std::end(kOfFunctions), epilogue) !=
        std::end(kOfFunctions))
      r.functions = any_functions();
    r.reverse = one_in(2);
    r.time_steps = T, r.batch = B, r.hidden_size = H, r.input_size = I;
    if (kernels == Kernels::Cpu && shape.packed()) r.batch_sizes = shape.batch_sizes.data();
    r.weight_hidden = weight_hidden.matrix();
    if (I > 0) r.weight_input = weight_input.matrix(), r.input = input.rows();
    if (has_addend && !one_in(3)) r.addend = addend.rows();
    if (kernels != Kernels::Cpu && sizeof(S) == 2 && one_in(3))
      r.addend = wide_addend.rows(), r.wide_addend = true;
    if (has_addend && one_in(2)) r.first_addend = first_addend.device();
    if (counts.operands > 0) r.operand = operand.rows();
    if (has_input && one_in(2)) r.bias = bias.device();
    if (counts.constants > 0) r.constants = constants.device();
    if (one_in(2)) r.initial = initial.device();
    if (counts.carried > 0 && one_in(2)) r.initial_carried = initial_carried.device();
    // As the operators ask for it: a forward pass takes no short cut.
    r.multiplies_zero_initial = I > 0 || one_in(2);
    r.output = output.device(), r.output_stride = published_size;
    if (one_in(2)) r.last = last.device();
    if (counts.carried > 0 && one_in(2)) r.last_carried = last_carried.device();
    if (counts.saved > 0 && !one_in(3)) r.saved = saved.device();
    for (int a = 0; kernels == Kernels::Cpu && a < counts.adjoints; ++a) {
      if (one_in(3)) r.adjoints[a] = adjoints.device() + a * rows * H;
      if (one_in(2)) r.adjoint_norms[a] = adjoint_norms.device() + a * rows;
    }
    norms.device();
  }

  std::string name() const {
    std::ostringstream text;
    text << "dtype=" << static_cast<int>(r.dtype) << " epilogue=" << static_cast<int>(r.epilogue)
         << " reverse=" << r.reverse << " initial=" << (r.initial != nullptr)
         << " last=" << (r.last != nullptr) << " addend=" << (r.addend.data != nullptr)
         << " wide_addend=" << r.wide_addend << " first_addend=" << (r.first_addend != nullptr)
         << " bias=" << (r.bias != nullptr) << " norms=" << wants_norms;
    return text.str();
  }

  void poison() { output.poison(), norms.poison(); }

  // Calls visit(t) for the time steps of sample b, in their order.
  template <class F>
  void for_each_step(int64_t b, const F& visit) const {
    for (int64_t step = 0; step < T; ++step) {
      const int64_t t = r.reverse ? T - 1 - step : step;
      if (b < shape.samples(t)) visit(t);
    }
  }

  // Checks all results. The judge goes on from the output that it has checked, as a recurrence has
  // to: what it carries on is what its caller gets to see. Carried values are its own.
  void judge() {
    for (auto* array : {&output, &saved, &last, &last_carried}) array->fetch();
    norms.fetch(), adjoints.fetch(), adjoint_norms.fetch();
    sums.assign(static_cast<size_t>(rows * sums_size), {});
    published.assign(static_cast<size_t>(rows * published_size), 0.0);
    final_carried.clear();
    for (int64_t b = 0; b < B; ++b) judge_sample(b);
  }

 private:
  // The squares of a row's values, and of what they may be wrong by.
  struct Squares {
    long double values = 0, errors = 0;

    void add(double value, double error) {
      values += static_cast<long double>(value) * value;
      errors += static_cast<long double>(error) * error;
    }
    void expect_root(const char* name, const Array<double>& norms, int64_t i) const {
      expect_near(name, norms, 1, i, static_cast<double>(std::sqrt(values)),
                  static_cast<double>(std::sqrt(errors)));
    }
  };

  // As the kernel's products see a weight, an input or a state.
  double factor(double value) const {
    namespace emulator = rnn_cuda::emulator;
    return kernels == Kernels::CudaTF32
               ? emulator::float_of(emulator::tf32_of(static_cast<float>(value)))
               : value;
  }

  void judge_sample(int64_t b) {
    std::vector<double> state(static_cast<size_t>(published_size), 0.0), carried(size_t(H), 0.0);
    for (int64_t n = 0; r.initial != nullptr && n < published_size; ++n)
      state[size_t(n)] = initial[b * published_size + n];
    for (int64_t n = 0; r.initial_carried != nullptr && n < H; ++n)
      carried[size_t(n)] = initial_carried[b * H + n];
    int64_t row = -1;
    double largest = 1;  // of all terms that a carried value is made of
    for_each_step(b, [&](int64_t t) {
      const bool is_first = row < 0;
      row = shape.row(t, b);
      Squares of_sums, of_adjoints[rnn_cuda::kMaxAdjoints];
      for (int64_t n = 0; n < H; ++n) {
        JudgedUnit unit = {};
        unit.functions = r.functions;
        double magnitude = std::abs(carried[size_t(n)]);
        for (int s = 0; s < counts.sums; ++s) {
          const bool is_apart = s >= counts.sums - counts.apart;
          Sum apart;
          Sum& z = sums[size_t(row * sums_size + s * H + n)];
          add_terms(t, b, s * H + n, is_first, state, z, is_apart ? apart : z);
          if (is_apart && r.bias != nullptr) apart.add(bias[sums_size + n]);
          unit.sums[s] = static_cast<double>(z.value);
          if (is_apart) unit.apart = static_cast<double>(apart.value);
          magnitude += z.magnitude + apart.magnitude;
        }
        for (int e = 0; e < counts.operands; ++e) unit.operands[e] = operand.at(t, b, e * H + n);
        for (int k = 0; k < counts.constants; ++k) unit.constants[k] = constants[k * H + n];
        unit.carried = carried[size_t(n)];
        unit.apply(r.epilogue);
        carried[size_t(n)] = unit.carried;
        largest = std::max(largest, magnitude);
        if (counts.carried > 0) magnitude = largest;
        for (int p = 0; p < counts.published; ++p) {
          const int64_t i = row * published_size + p * H + n;
          const double value = published[size_t(i)] = unit.published[p];
          if (r.output != nullptr)
            expect_near("output", output, published_size, i, value, tolerance<S>(value, magnitude));
        }
        for (int k = 0; r.saved != nullptr && k < counts.saved; ++k)
          expect_near("saved", saved, saved_size, row * saved_size + k * H + n, unit.saved[k],
                      tolerance<S>(unit.saved[k], magnitude));
        const double z = unit.sums[0];
        of_sums.add(z, tolerance<Compute<S>>(z, magnitude));
        for (int a = 0; a < counts.adjoints; ++a) {
          // As exact as deltas: not rounded to what these are stored in, but made of some.
          const double value = unit.adjoints[a], error = tolerance<S>(value, magnitude);
          of_adjoints[a].add(value, error);
          if (r.adjoints[a] != nullptr)
            expect_near("adjoints", adjoints, H, (a * rows + row) * H + n, value, error);
        }
      }
      if (wants_norms) of_sums.expect_root("norms", norms, row);
      for (int a = 0; a < counts.adjoints; ++a)
        if (r.adjoint_norms[a] != nullptr)
          of_adjoints[a].expect_root("adjoint_norms", adjoint_norms, a * rows + row);
      for (int64_t n = 0; n < published_size; ++n) {
        const int64_t i = row * published_size + n;
        if (r.output != nullptr) published[size_t(i)] = output[i];
        state[size_t(n)] = published[size_t(i)];
      }
    });
    for (int64_t n = 0; r.last != nullptr && n < published_size; ++n)
      expect_near("last", last, published_size, b * published_size + n, state[size_t(n)], 0);
    if (counts.carried > 0)
      final_carried.insert(final_carried.end(), carried.begin(), carried.end());
    for (int64_t n = 0; r.last_carried != nullptr && n < H; ++n)
      expect_near("last_carried", last_carried, H, b * H + n, carried[size_t(n)],
                  tolerance<S>(carried[size_t(n)], largest));
  }

  // Of the sum with number i: those of the input go to `of_input`.
  void add_terms(int64_t t, int64_t b, int64_t i, bool is_first, const std::vector<double>& state,
                 Sum& z, Sum& of_input) const {
    if (r.addend.data != nullptr)
      z.add(r.wide_addend ? wide_addend.at(t, b, i) : addend.at(t, b, i));
    if (is_first && r.first_addend != nullptr) z.add(first_addend[b * sums_size + i]);
    if (r.bias != nullptr) z.add(bias[i]);
    for (int64_t k = 0; k < I; ++k)
      of_input.add(factor(weight_input.at(i, k)) * factor(input.at(t, b, k)));
    const bool skips_zero = is_first && r.initial == nullptr && !r.multiplies_zero_initial;
    for (int64_t k = 0; k < published_size && !skips_zero; ++k)
      z.add(factor(weight_hidden.at(i, k)) * factor(state[size_t(k)]));
  }
};

}  // namespace check
