// Stand-alone check of the CPU kernel, to be compiled with AddressSanitizer and UBSan: buffers of
// exactly the size the contract promises, outputs filled with NaN, a naive loop in double as judge.
// PyTorch's allocator would hide an overrun of a few bytes; operator new under ASan does not.
//
//   check_recurrence <problems>        prints "ok" and exits 0, or says what differs
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "recurrence.h"

namespace {

using rnn_cuda::Epilogue;
using rnn_cuda::Recurrence;

std::mt19937 generator(0);

int64_t uniform(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

using Buffer = std::unique_ptr<float[]>;

Buffer random_buffer(int64_t count) {
  Buffer buffer(new float[count]);
  for (int64_t i = 0; i < count; ++i)
    buffer[i] = std::uniform_real_distribution<float>(-1, 1)(generator);
  return buffer;
}

Buffer nan_buffer(int64_t count) {
  Buffer buffer(new float[count]);
  for (int64_t i = 0; i < count; ++i) buffer[i] = std::numeric_limits<float>::quiet_NaN();
  return buffer;
}

double apply(Epilogue epilogue, double z, double e) {
  switch (epilogue) {
    case Epilogue::Tanh: return std::tanh(z);
    case Epilogue::Relu: return z > 0 ? z : 0;
    case Epilogue::Sigmoid: return 1 / (1 + std::exp(-z));
    case Epilogue::Identity:
    case Epilogue::IdentityBackward: return z;
    case Epilogue::TanhBackward: return z * (1 - e * e);
    case Epilogue::ReluBackward: return e > 0 ? z : 0;
    case Epilogue::SigmoidBackward: return z * e * (1 - e);
    case Epilogue::Modulate: return z * e;
  }
  std::abort();
}

float at(const rnn_cuda::Matrix& m, int64_t n, int64_t k) {
  return static_cast<const float*>(m.data)[m.transposed ? k * m.stride + n : n * m.stride + k];
}

// The contract of recurrence.h, word by word, one element at a time.
bool check(const Recurrence& r, int threads) {
  std::vector<int64_t> first_row(r.time_steps + 1, 0);
  auto samples = [&](int64_t t) { return r.batch_sizes ? r.batch_sizes[t] : r.batch; };
  for (int64_t t = 0; t < r.time_steps; ++t) first_row[t + 1] = first_row[t] + samples(t);

  rnn_cuda::cpu::run(r, threads);

  const int64_t H = r.hidden_size, step = r.reverse ? -1 : 1;
  const float* output = static_cast<const float*>(r.output);
  for (int64_t b = 0; b < r.batch; ++b) {
    std::vector<double> state(H, 0.0);
    if (r.initial)
      for (int64_t n = 0; n < H; ++n) state[n] = static_cast<const float*>(r.initial)[b * H + n];
    bool first = true;
    for (int64_t t = r.reverse ? r.time_steps - 1 : 0; 0 <= t && t < r.time_steps; t += step) {
      if (b >= samples(t)) continue;
      auto row = [&](const rnn_cuda::Rows& rows) {
        return static_cast<const float*>(rows.data) +
               (r.batch_sizes ? (first_row[t] + b) * rows.batch_stride
                              : t * rows.time_stride + b * rows.batch_stride);
      };
      std::vector<double> next(H);
      for (int64_t n = 0; n < H; ++n) {
        double z = 0;
        if (r.addend.data) z += row(r.addend)[n];
        if (r.bias) z += static_cast<const float*>(r.bias)[n];
        if (first && r.first_addend) z += static_cast<const float*>(r.first_addend)[b * H + n];
        for (int64_t k = 0; k < r.input_size; ++k)
          z += double(at(r.weight_input, n, k)) * row(r.input)[k];
        for (int64_t k = 0; k < H; ++k) z += at(r.weight_hidden, n, k) * state[k];
        next[n] = apply(r.epilogue, z, r.operand.data ? row(r.operand)[n] : 0);
        const float got = output[(first_row[t] + b) * H + n];
        if (!(std::abs(got - next[n]) <= 1e-4 * (1 + std::abs(next[n])))) {
          std::printf("output t=%ld b=%ld n=%ld: got %g, expected %g\n", long(t), long(b), long(n),
                      got, next[n]);
          return false;
        }
        // Go on from what the kernel published, so that errors do not add up along time.
        next[n] = got;
      }
      state = next;
      first = false;
    }
    for (int64_t n = 0; r.last && n < H; ++n)
      if (static_cast<const float*>(r.last)[b * H + n] != static_cast<float>(state[n])) {
        std::printf("last state b=%ld n=%ld differs from the output\n", long(b), long(n));
        return false;
      }
  }
  return true;
}

bool check_random_problem() {
  int64_t T = uniform(1, 10), B = uniform(1, 9), I = uniform(0, 20), H = uniform(1, 70);
  if (uniform(0, 6) == 0) T = uniform(1, 4), B = uniform(1, 2), H = uniform(130, 200);
  std::vector<int64_t> sizes;
  int64_t rows = T * B;
  if (uniform(0, 1)) {
    rows = 0;
    for (int64_t t = 0, size = B; t < T; ++t, rows += size)
      sizes.push_back(size = t == 0 ? B : uniform(1, size));
  }
  const Buffer matrix = random_buffer(H * H), weight = random_buffer(H * I),
               x = random_buffer(rows * I);
  const Buffer bias = random_buffer(H), addend = random_buffer(rows * H),
               operand = random_buffer(rows * H);
  const Buffer initial = random_buffer(B * H), first = random_buffer(B * H);
  const Buffer output = nan_buffer(rows * H), last = nan_buffer(B * H);
  for (int64_t i = 0; i < H * H; ++i) matrix[i] /= std::sqrt(float(H));

  Recurrence r;
  r.epilogue = static_cast<Epilogue>(uniform(0, static_cast<int>(Epilogue::Modulate)));
  r.reverse = uniform(0, 1);
  r.time_steps = T, r.batch = B, r.input_size = I, r.hidden_size = H;
  if (!sizes.empty()) r.batch_sizes = sizes.data();
  r.weight_hidden = {matrix.get(), H, uniform(0, 1) == 1};
  if (I > 0) r.weight_input = {weight.get(), I}, r.input = {x.get(), B * I, I};
  if (uniform(0, 1))
    r.addend = {addend.get(), B * H, H};
  else if (uniform(0, 1))
    r.bias = bias.get();
  r.operand = {operand.get(), B * H, H};
  if (uniform(0, 1)) r.initial = initial.get();
  if (uniform(0, 1)) r.first_addend = first.get();
  r.output = output.get();
  if (uniform(0, 1)) r.last = last.get();

  const int threads = static_cast<int>(uniform(1, 4));
  if (check(r, threads)) return true;
  std::printf(
      "in the problem T=%ld B=%ld I=%ld H=%ld packed=%d reverse=%d epilogue=%d threads=%d\n",
      long(T), long(B), long(I), long(H), !sizes.empty(), r.reverse, static_cast<int>(r.epilogue),
      threads);
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  const int problems = argc > 1 ? std::atoi(argv[1]) : 100;
  for (int i = 0; i < problems; ++i)
    if (!check_random_problem()) return 1;
  std::printf("ok: %d problems\n", problems);
}
