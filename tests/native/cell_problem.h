// A Recurrence of a cell with several values of a kind, and its judge.
#pragma once

#include "problem.h"

namespace check {

using rnn_cuda::Counts;

// One unit in one step, in double. Written from the formulas of the field, not from csrc/cells/.
struct JudgedUnit {
  double sums[4], apart, operands[8], constant, carried;
  double published[4], saved[6];

  void apply(Epilogue epilogue) {
    const auto sigmoid = [](double z) { return 1 / (1 + std::exp(-z)); };
    switch (epilogue) {
      case Epilogue::Gru: {
        const double r = sigmoid(sums[0]), z = sigmoid(sums[1]);
        const double n = std::tanh(apart + r * sums[2]), before = carried;
        carried = (1 - z) * n + z * before;
        published[0] = carried;
        const double all[] = {r, z, n, sums[2], before};
        std::copy_n(all, 5, saved);
        return;
      }
      case Epilogue::GruBackward: {
        const double r = operands[0], z = operands[1], n = operands[2], q = operands[3];
        const double before = operands[4];
        const double dh = sums[0] + carried;
        const double dn = dh * (1 - z), dz = dh * (before - n), before_tanh = dn * (1 - n * n);
        published[0] = before_tanh * q * r * (1 - r);
        published[1] = dz * z * (1 - z);
        published[2] = before_tanh * r;
        saved[0] = before_tanh;
        carried = dh * z;
        return;
      }
      case Epilogue::LeakyTanh:
        saved[0] = std::tanh(sums[0]);
        published[0] = carried = (1 - constant) * carried + constant * saved[0];
        return;
      case Epilogue::LeakyTanhBackward: {
        const double dh = sums[0] + carried;
        published[0] = dh * constant * (1 - operands[0] * operands[0]);
        carried = dh * (1 - constant);
        return;
      }
      case Epilogue::Lstm: {
        const double i = sigmoid(sums[0]), f = sigmoid(sums[1]), g = std::tanh(sums[2]);
        const double o = sigmoid(sums[3]), before = carried;
        carried = f * before + i * g;
        published[0] = o * std::tanh(carried);
        const double all[] = {i, f, g, o, before, std::tanh(carried)};
        std::copy_n(all, 6, saved);
        return;
      }
      case Epilogue::LstmBackward: {
        const double i = operands[0], f = operands[1], g = operands[2], o = operands[3];
        const double before = operands[4], tanh_c = operands[5];
        const double dh = sums[0], dc = carried + dh * o * (1 - tanh_c * tanh_c);
        published[0] = dc * g * i * (1 - i);
        published[1] = dc * before * f * (1 - f);
        published[2] = dc * i * (1 - g * g);
        published[3] = dh * tanh_c * o * (1 - o);
        carried = dc * f;
        return;
      }
      case Epilogue::LinearForward1: return linear(1, false);
      case Epilogue::LinearForward3: return linear(3, false);
      case Epilogue::LinearForward3Exposed: return linear(3, true);
      case Epilogue::LinearTranspose1: return linear_transpose(1, false);
      case Epilogue::LinearTranspose3: return linear_transpose(3, false);
      case Epilogue::LinearTranspose3Exposed: return linear_transpose(3, true);
      default: std::abort();
    }
  }

 private:
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

template <class S>
struct CellProblem {
  static constexpr Epilogue kEpilogues[] = {
      Epilogue::Gru,
      Epilogue::GruBackward,
      Epilogue::Lstm,
      Epilogue::LstmBackward,
      Epilogue::LeakyTanh,
      Epilogue::LeakyTanhBackward,
      Epilogue::LinearForward1,
      Epilogue::LinearForward3,
      Epilogue::LinearForward3Exposed,
      Epilogue::LinearTranspose1,
      Epilogue::LinearTranspose3,
      Epilogue::LinearTranspose3Exposed,
  };

  const Epilogue epilogue = kEpilogues[uniform(0, std::size(kEpilogues) - 1)];
  const Counts counts = rnn_cuda::counts_of(epilogue);
  const Shape shape;
  // A backward recurrence has an addend and no input; a forward one the other way round.
  const bool is_backward = counts.operands > 0;
  const int64_t T = shape.T, B = shape.B, H = shape.H, I = is_backward ? 0 : shape.I;
  const MatrixArray<S> weight_hidden{
      counts.sums * H, counts.published * H,
      std::min(1.5 / static_cast<double>(counts.published * H), 0.9)};
  const MatrixArray<S> weight_input{counts.sums * H, I};
  const RowsArray<S> input{shape, I}, addend{shape, counts.sums * H};
  const RowsArray<S> operand{shape, counts.operands * H};
  const Array<Compute<S>> bias = random_array<Compute<S>>((counts.sums + counts.apart) * H);
  const Array<Compute<S>> constants = random_array<Compute<S>>(counts.constants * H);
  const Array<S> initial = random_array<S>(B * counts.published * H);
  const Array<S> initial_carried = random_array<S>(counts.carried * B * H);
  const Array<S> first_addend = random_array<S>(B * counts.sums * H);
  const int64_t rows = shape.rows(), P = counts.published, K = counts.saved;
  const Array<S> output{rows * P * H}, saved{rows * K * H}, last{B * P * H};
  const Array<S> last_carried{counts.carried * B * H};
  rnn_cuda::Recurrence r;

  CellProblem() {
    for (int64_t i = 0; i < constants.count(); ++i)  // a negative leak makes states grow for ever
      constants.data()[i] = std::abs(constants.data()[i]);
    r.dtype = kScalarType<S>;
    r.epilogue = epilogue;
    r.reverse = one_in(2);
    r.time_steps = T, r.batch = B, r.hidden_size = H, r.input_size = I;
    if (shape.packed()) r.batch_sizes = shape.batch_sizes.data();
    r.weight_hidden = weight_hidden.matrix();
    if (I > 0) r.weight_input = weight_input.matrix(), r.input = input.rows();
    if (is_backward && !one_in(3)) r.addend = addend.rows();
    if (is_backward && one_in(2)) r.first_addend = first_addend.data();
    if (counts.operands > 0) r.operand = operand.rows();
    if (!is_backward && one_in(2)) r.bias = bias.data();
    if (counts.constants > 0) r.constants = constants.data();
    if (one_in(2)) r.initial = initial.data();
    if (one_in(2)) r.initial_carried = initial_carried.data();
    r.multiplies_zero_initial = one_in(2);
    r.output = output.data(), r.output_stride = P * H;
    if (one_in(2)) r.last = last.data();
    if (one_in(2)) r.last_carried = last_carried.data();
    if (!one_in(3)) r.saved = saved.data();
  }

  std::string name() const {
    std::ostringstream name;
    name << "T=" << T << " B=" << B << " I=" << I << " H=" << H << " packed=" << shape.packed()
         << " reverse=" << r.reverse << " dtype=" << static_cast<int>(r.dtype)
         << " epilogue=" << static_cast<int>(r.epilogue);
    return name.str();
  }

  void judge() const {
    for (int64_t b = 0; b < B; ++b) judge_sample(b);
    const Array<S> again(output.count());
    rnn_cuda::Recurrence one_thread = r;
    one_thread.output = again.data();
    rnn_cuda::cpu::run(one_thread, 1);
    if (std::memcmp(again.data(), output.data(), output.count() * sizeof(S)) != 0)
      throw std::runtime_error("output depends on the number of threads");
  }

 private:
  // Goes on from the published values that the kernel wrote, but from its own carried ones.
  void judge_sample(int64_t b) const {
    std::vector<double> published(P * H, 0.0), carried(H, 0.0);
    for (int64_t n = 0; r.initial != nullptr && n < P * H; ++n)
      published[n] = initial[b * P * H + n];
    for (int64_t n = 0; r.initial_carried != nullptr && n < H; ++n)
      carried[n] = initial_carried[b * H + n];
    int64_t row = -1;
    double largest = 1;
    for (int64_t step = 0; step < T; ++step) {
      const int64_t t = r.reverse ? T - 1 - step : step;
      if (b >= shape.samples(t)) continue;
      const bool is_first = row < 0;
      row = shape.first_row[t] + b;
      for (int64_t n = 0; n < H; ++n) {
        JudgedUnit unit = {};
        double magnitude = std::abs(carried[n]);
        for (int s = 0; s < counts.sums; ++s) {
          const int64_t i = s * H + n;
          Sum z, apart;
          Sum& of_input = s < counts.sums - counts.apart ? z : apart;
          if (r.addend.data != nullptr) z.add(addend.at(t, b, i));
          if (is_first && r.first_addend != nullptr) z.add(first_addend[b * counts.sums * H + i]);
          if (r.bias != nullptr) z.add(bias[i]);
          if (r.bias != nullptr && &of_input == &apart) apart.add(bias[counts.sums * H + n]);
          for (int64_t k = 0; k < I; ++k) of_input.add(weight_input.at(i, k) * input.at(t, b, k));
          for (int64_t k = 0; k < P * H; ++k) z.add(weight_hidden.at(i, k) * published[k]);
          unit.sums[s] = static_cast<double>(z.value);
          if (counts.apart > 0 && &of_input == &apart)
            unit.apart = static_cast<double>(apart.value);
          magnitude += z.magnitude + apart.magnitude;
        }
        for (int e = 0; e < counts.operands; ++e) unit.operands[e] = operand.at(t, b, e * H + n);
        if (counts.constants > 0) unit.constant = constants[n];
        unit.carried = carried[n];
        unit.apply(epilogue);
        carried[n] = unit.carried;
        largest = std::max(largest, magnitude);
        for (int64_t p = 0; p < P; ++p)
          expect<S>("output", output, P * H, row * P * H + p * H + n, unit.published[p], largest);
        for (int64_t k = 0; r.saved != nullptr && k < K; ++k)
          expect<S>("saved", saved, K * H, row * K * H + k * H + n, unit.saved[k], largest);
      }
      for (int64_t n = 0; n < P * H; ++n) published[n] = output[row * P * H + n];
    }
    for (int64_t n = 0; r.last_carried != nullptr && n < H; ++n)
      expect<S>("last_carried", last_carried, H, b * H + n, carried[n], largest);
    if (r.last != nullptr &&
        std::memcmp(last.data() + b * P * H, output.data() + row * P * H, P * H * sizeof(S)) != 0)
      throw std::runtime_error("last differs from output, sample " + std::to_string(b));
  }
};

}  // namespace check
