// What the checkers share: random problems, in buffers of exactly the size that the contract
// promises (PyTorch's allocator would hide an overrun of a few bytes; operator new under
// AddressSanitizer does not), and a naive walk through time, in double, as judge.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <future>
#include <iomanip>
#include <limits>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "epilogue.h"
#include "recurrence.h"
#include "threads.h"

namespace check {

using rnn_cuda::Epilogue;
using rnn_cuda::ScalarType;

template <class S>
constexpr ScalarType kScalarType = std::is_same_v<S, float>           ? ScalarType::Float32
                                   : std::is_same_v<S, double>        ? ScalarType::Float64
                                   : std::is_same_v<S, c10::BFloat16> ? ScalarType::BFloat16
                                                                      : ScalarType::Float16;

// What sums are computed in; also the type of biases.
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

// ---- random problems ----------------------------------------------------------------------------

inline std::mt19937 generator(0);

inline int64_t uniform(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

inline bool one_in(int64_t n) { return uniform(1, n) == 1; }

// `count` values, NaN until set.
template <class S>
class Array {
 public:
  Array() = default;
  // A view of a tensor begins anywhere: not every array is aligned to more than its values.
  explicit Array(int64_t count)
      : lead_(uniform(0, 1)), count_(count), values_(new S[lead_ + count]) {
    std::fill_n(data(), count, std::numeric_limits<S>::quiet_NaN());
  }

  S* data() const { return values_.get() + lead_; }
  int64_t count() const { return count_; }
  double operator[](int64_t i) const { return static_cast<double>(data()[i]); }
  void set_random(int64_t i, double scale = 1) {
    data()[i] =
        static_cast<S>(std::uniform_real_distribution<float>(-1, 1)(generator) * float(scale));
  }

 private:
  int64_t lead_ = 0, count_ = 0;
  std::unique_ptr<S[]> values_;
};

template <class S>
Array<S> random_array(int64_t count) {
  Array<S> array(count);
  for (int64_t i = 0; i < count; ++i) array.set_random(i);
  return array;
}

struct Shape {
  int64_t T = uniform(1, 14), B = uniform(1, 12), I = uniform(0, 20), H = uniform(1, 80);
  std::vector<int64_t> batch_sizes;  // empty: every sample has every step
  std::vector<int64_t> first_row;    // of each time step, and the end

  Shape() {
    switch (uniform(0, 8)) {
      case 0:  // several chunks
        T = uniform(60, 200), H = uniform(1, 20);
        break;
      case 1:  // more samples than a chunk has rows
        T = uniform(1, 5), B = uniform(200, 300), H = uniform(1, 20);
        break;
      case 2:  // so few samples that the hidden dimension is cut
        T = uniform(2, 8), B = uniform(1, 4), H = uniform(100, 260);
        break;
      case 3:  // both
        T = uniform(80, 120), B = uniform(3, 6), H = uniform(100, 150);
    }
    if (one_in(4)) I = uniform(60, 80);                      // x may be projected a chunk at a time
    if (one_in(10)) I = uniform(64, 80), H = uniform(1, 4);  // W has few rows for its columns
    if (one_in(15)) T = uniform(1, 2), B = 1;                // outer products are written at once
    if (one_in(12)) T = 1, H = uniform(250, 300);  // a matrix used where it lies, in blocks
    // A matrix beyond a core's own cache, in panels that several tiles use block by block.
    if (one_in(40)) T = 3, B = uniform(4, 12), H = 730;
    const bool packed = one_in(2);
    first_row.push_back(0);
    for (int64_t t = 0, size = B; t < T; ++t) {
      // The samples' ends are spread over the steps.
      if (packed && t > 0 && uniform(1, T) <= 2 * B)
        size -= std::min(size - 1, uniform(0, 2 * B / T + 1));
      if (packed) batch_sizes.push_back(size);
      first_row.push_back(first_row[t] + size);
    }
  }

  bool packed() const { return !batch_sizes.empty(); }
  int64_t samples(int64_t t) const { return t < 0 || t >= T ? 0 : first_row[t + 1] - first_row[t]; }
  int64_t rows() const { return first_row[T]; }
};

// Rows of features as a caller may hold them: contiguous, with gaps, batch first, or expanded.
// Gaps hold NaN.
template <class S>
class RowsArray {
 public:
  RowsArray(const Shape& shape, int64_t features) : shape_(shape) {
    const int64_t row = features + (one_in(2) ? 0 : uniform(1, 5));
    batch_stride_ = row;
    time_stride_ = shape.B * row;
    if (shape.packed())
      time_stride_ = 0;
    else if (one_in(3))
      time_stride_ = row, batch_stride_ = shape.T * row;
    if (one_in(8)) time_stride_ = 0;
    if (one_in(8)) batch_stride_ = 0;
    int64_t end = 0;
    for_each_row([&](int64_t offset) { end = std::max(end, offset + features); });
    array_ = Array<S>(end);
    for_each_row([&](int64_t offset) {
      for (int64_t k = 0; k < features; ++k) array_.set_random(offset + k);
    });
  }

  rnn_cuda::Rows rows() const { return {array_.data(), time_stride_, batch_stride_}; }
  double at(int64_t t, int64_t b, int64_t feature) const { return array_[offset(t, b) + feature]; }

 private:
  int64_t offset(int64_t t, int64_t b) const {
    return shape_.packed() ? (shape_.first_row[t] + b) * batch_stride_
                           : t * time_stride_ + b * batch_stride_;
  }
  template <class F>
  void for_each_row(const F& f) const {
    for (int64_t t = 0; t < shape_.T; ++t)
      for (int64_t b = 0; b < shape_.samples(t); ++b) f(offset(t, b));
  }

  const Shape& shape_;
  int64_t time_stride_, batch_stride_;
  Array<S> array_;
};

// A matrix (N, K), stored by rows or by columns, with or without a gap between them.
template <class S>
class MatrixArray {
 public:
  MatrixArray(int64_t n, int64_t k, double scale = 1) : transposed_(one_in(2)) {
    const int64_t lines = transposed_ ? k : n, length = transposed_ ? n : k;
    stride_ = length + (one_in(2) ? 0 : uniform(1, 5));
    array_ = Array<S>(n * k == 0 ? 0 : (lines - 1) * stride_ + length);
    for (int64_t i = 0; i < lines; ++i)
      for (int64_t j = 0; j < length; ++j) array_.set_random(i * stride_ + j, scale);
  }

  rnn_cuda::Matrix matrix() const { return {array_.data(), stride_, transposed_}; }
  double at(int64_t n, int64_t k) const {
    return array_[transposed_ ? k * stride_ + n : n * stride_ + k];
  }

 private:
  bool transposed_;
  int64_t stride_;
  Array<S> array_;
};

// ---- the judge ----------------------------------------------------------------------------------

// A sum, more exact than those of float64, and how large its terms are: rounding errors are in
// proportion to that.
struct Sum {
  long double value = 0;
  double magnitude = 0;

  void add(double term) {
    value += term;
    magnitude += std::abs(term);
  }
};

// Of a sum of up to a few hundred terms of the given magnitude (a kernel adds up longer ones in
// pieces); and of rounding it to what it is stored in.
template <class S>
double tolerance(double value, double magnitude) {
  const double stored = std::numeric_limits<S>::epsilon() / 2.0;
  const double computed = std::numeric_limits<Compute<S>>::epsilon() / 2.0;
  return 300 * computed * (1 + magnitude) + stored * std::abs(value);
}

// Element `i` of an array with so many columns, computed from values of type S.
template <class S, class Stored>
void expect(const char* name, const Array<Stored>& got, int64_t columns, int64_t i, double value,
            double magnitude) {
  if (std::abs(got[i] - value) <= tolerance<S>(value, magnitude)) return;
  std::ostringstream message;
  message << std::setprecision(17) << name << "[" << i / columns << ", " << i % columns << "] is "
          << got[i] << ", not " << value;
  throw std::runtime_error(message.str());
}

// A Recurrence with all the memory it speaks of; which optional parts there are is drawn.
template <class S>
struct RecurrenceProblem {
  Shape shape;
  const int64_t T = shape.T, B = shape.B, H = shape.H;
  // Rows of M add up to less than one: errors shrink from step to step.
  MatrixArray<S> weight_hidden{H, H, std::min(1.5 / static_cast<double>(H), 0.9)};
  RowsArray<S> addend{shape, H}, operand{shape, H};
  Array<S> first_addend = random_array<S>(B * H);
  Array<S> output{shape.rows() * H};
  rnn_cuda::Recurrence r;

  explicit RecurrenceProblem(Epilogue epilogue) {
    r.dtype = kScalarType<S>;
    r.epilogue = epilogue;
    r.reverse = one_in(2);
    r.time_steps = T, r.batch = B, r.hidden_size = H;
    if (shape.packed()) r.batch_sizes = shape.batch_sizes.data();
    r.weight_hidden = weight_hidden.matrix();
    if (!one_in(3)) r.addend = addend.rows();
    r.operand = operand.rows();
    if (one_in(2)) r.first_addend = first_addend.data();
    r.output = output.data();
    r.output_stride = H;
  }

  std::string name() const {
    std::ostringstream name;
    name << "T=" << T << " B=" << B << " I=" << shape.I << " H=" << H
         << " packed=" << shape.packed() << " reverse=" << r.reverse
         << " dtype=" << static_cast<int>(r.dtype) << " epilogue=" << static_cast<int>(r.epilogue);
    return name.str();
  }

  // Calls visit(t) for the time steps of sample b, in their order.
  template <class F>
  void for_each_step(int64_t b, const F& visit) const {
    for (int64_t step = 0; step < T; ++step) {
      const int64_t t = r.reverse ? T - 1 - step : step;
      if (b < shape.samples(t)) visit(t);
    }
  }

  // The states of all rows, once the kernel has run; checks `output`. If there is one, the judge
  // goes on from it, as a recurrence has to: what it carries on is what its caller gets to see.
  //
  // add_inputs(t, b, n, sum) adds what is not the addend or a product with a state to z; all z, if
  // wanted, go to `sums`.
  template <class F>
  std::vector<double> states(const Array<S>& initial, const F& add_inputs,
                             std::vector<Sum>* sums = nullptr) const {
    std::vector<double> states(shape.rows() * H);
    if (sums != nullptr) sums->resize(states.size());
    for (int64_t b = 0; b < B; ++b) {
      std::vector<double> state(H, 0.0);
      for (int64_t n = 0; r.initial != nullptr && n < H; ++n) state[n] = initial[b * H + n];
      bool first = true;
      for_each_step(b, [&](int64_t t) {
        double* const next = states.data() + (shape.first_row[t] + b) * H;
        for (int64_t n = 0; n < H; ++n) {
          Sum z;
          if (r.addend.data != nullptr) z.add(addend.at(t, b, n));
          if (first && r.first_addend != nullptr) z.add(first_addend[b * H + n]);
          add_inputs(t, b, n, z);
          for (int64_t k = 0; k < H; ++k) z.add(weight_hidden.at(n, k) * state[k]);
          const int64_t i = next + n - states.data();
          next[n] = apply(r.epilogue, z.value, operand.at(t, b, n));
          if (sums != nullptr) (*sums)[i] = z;
          if (r.output == nullptr) continue;
          expect<S>("output", output, H, i, next[n], z.magnitude);
          next[n] = output[i];
        }
        std::copy_n(next, H, state.begin());
        first = false;
      });
    }
    return states;
  }
};

// Whether the kernels multiply pairs of bfloat16 values: what they multiply is rounded then,
// whether or not it is stored, and the judge knows only what is stored.
inline bool multiplies_pairs = false;

// check<S>() checks one problem; its type is drawn, or float32 alone.
//
//   checker <problems> [float32 | pairs]       prints "ok" and exits 0, or says what differs
template <class Check>
int main_loop(int argc, char** argv, const Check& check) {
  const int problems = argc > 1 ? std::atoi(argv[1]) : 100;
  const std::string option = argc > 2 ? argv[2] : "";
  if (option != "" && option != "float32" && option != "pairs") {
    std::fprintf(stderr, "unknown option %s\n", option.c_str());
    return 2;
  }
  multiplies_pairs = option == "pairs";
  const bool all_types = option != "float32";
  for (int i = 0; i < problems; ++i) {
    available_threads = one_in(4) ? static_cast<int>(uniform(1, 4)) : 4;
    switch (all_types ? uniform(0, 5) : 0) {
      case 3: check(double()); break;
      case 4: check(c10::BFloat16()); break;
      case 5: check(c10::Half()); break;
      default: check(float());
    }
  }
  std::printf("ok: %d problems\n", problems);
  return 0;
}

// Runs `kernel(threads)`, then `judge`; where that throws, names the problem and gives up.
//
// The kernel is called from a thread of its own each time: memory that a thread keeps for its next
// call does not hide that something was read before it was written.
template <class Kernel, class Judge>
void run_and_judge(const std::string& problem, const Kernel& kernel, const Judge& judge) {
  const int threads = one_in(4) ? 1 : static_cast<int>(uniform(2, 4));
  try {
    std::async(std::launch::async, kernel, threads).get();
    judge();
  } catch (const std::exception& error) {
    std::printf("%s\nin the problem %s threads=%d available=%d\n", error.what(), problem.c_str(),
                threads, available_threads);
    std::exit(1);
  }
}

}  // namespace check
