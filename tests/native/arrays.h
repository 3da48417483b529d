// Arrays for the checkers: in host memory, and where the kernel finds them in memory of exactly the
// size that the contract promises. (PyTorch's allocator would hide an overrun of a few bytes;
// operator new under AddressSanitizer does not.) There they are NaN until set, and so is the room
// between rows. On a card that is device memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../emulator/numbers.h"
#include "recurrence.h"
#ifdef __CUDACC__
#include "cuda/device.h"
#endif

namespace check {

// ---- numbers ------------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits = 0x7fff;
  BFloat16() = default;
  explicit BFloat16(float value) : bits(rnn_cuda::emulator::bfloat16_of(value)) {}
  operator float() const { return rnn_cuda::emulator::float_of_bfloat16(bits); }
};

struct Float16 {
  uint16_t bits = 0x7fff;
  Float16() = default;
  explicit Float16(float value) : bits(rnn_cuda::emulator::float16_of(value)) {}
  operator float() const { return rnn_cuda::emulator::float_of_float16(bits); }
};

template <class S>
S not_a_number() {
  return S(std::numeric_limits<float>::quiet_NaN());
}
template <>
inline int64_t not_a_number() {
  return INT64_MIN;
}

// ---- drawing ------------------------------------------------------------------------------------

inline std::mt19937_64 generator;

inline int64_t uniform(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}
inline bool one_in(int64_t n) { return uniform(1, n) == 1; }
inline float random_value() { return std::uniform_real_distribution<float>(-1, 1)(generator); }

// ---- memory -------------------------------------------------------------------------------------

#ifndef __CUDACC__
inline void require(int, const char*) {}
inline void* allocate(size_t bytes) { return ::operator new(bytes); }
inline void release(void* memory) { ::operator delete(memory); }
inline int copy(void* to, const void* from, size_t bytes) {
  std::copy_n(static_cast<const char*>(from), bytes, static_cast<char*>(to));
  return 0;
}
inline int synchronize() { return 0; }
#else
// Ends the process: not even the judge can go on after this.
inline void require(int error, const char* what) {
  if (error == 0) return;
  std::printf("%s: %s\n", what, rnn_cuda::device::error_string(error));
  std::exit(1);
}
inline void* allocate(size_t bytes) {
  void* memory = nullptr;
  require(cudaMalloc(&memory, bytes), "cudaMalloc");
  return memory;
}
inline void release(void* memory) { cudaFree(memory); }
inline int copy(void* to, const void* from, size_t bytes) {
  return cudaMemcpy(to, from, bytes, cudaMemcpyDefault);
}
inline int synchronize() { return cudaDeviceSynchronize(); }
#endif

template <class S>
class Array {
 public:
  using Value = S;

  // `lead`: a view of a tensor begins anywhere, so not every array is aligned to more than its
  // values.
  explicit Array(int64_t count, int64_t lead = uniform(0, 1))
      : lead_(lead), host(static_cast<size_t>(count), not_a_number<S>()) {}
  ~Array() { release(memory_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  int64_t count() const { return static_cast<int64_t>(host.size()); }
  double operator[](int64_t i) const { return static_cast<double>(host[static_cast<size_t>(i)]); }

  // On the device, as on the host when it was called first.
  S* device() {
    if (memory_ == nullptr) {
      memory_ = static_cast<S*>(allocate((lead_ + host.size()) * sizeof(S)));
      require(copy(data(), host.data(), bytes()), "copy to the device");
    }
    return data();
  }
  void fetch() {
    if (memory_ != nullptr) require(copy(host.data(), data(), bytes()), "copy from the device");
  }
  void poison() {
    std::fill(host.begin(), host.end(), not_a_number<S>());
    require(copy(data(), host.data(), bytes()), "copy to the device");
  }

 private:
  S* data() const { return memory_ + lead_; }
  size_t bytes() const { return host.size() * sizeof(S); }

  int64_t lead_;
  S* memory_ = nullptr;

 public:
  std::vector<S> host;
};

template <class S>
void fill_randomly(Array<S>& array, int64_t first, int64_t count, float scale = 1) {
  for (int64_t i = first; i < first + count; ++i)
    array.host[static_cast<size_t>(i)] = S(random_value() * scale);
}

// ---- shapes of tensors --------------------------------------------------------------------------

struct Shape {
  int64_t T = 1, B = 1, I = 0, H = 1;
  std::vector<int64_t> batch_sizes;  // empty: every sample has every step
  std::vector<int64_t> first_row;    // of each time step, and the end

  void draw_rows(bool packed) {
    first_row.assign(1, 0);
    for (int64_t t = 0, size = B; t < T; ++t) {
      // The samples' ends are spread over the steps.
      if (packed && t > 0 && uniform(1, T) <= 2 * B)
        size -= std::min(size - 1, uniform(0, 2 * B / T + 1));
      if (packed) batch_sizes.push_back(size);
      first_row.push_back(first_row.back() + size);
    }
  }
  bool packed() const { return !batch_sizes.empty(); }
  int64_t samples(int64_t t) const {
    return t < 0 || t >= T ? 0 : first_row[size_t(t) + 1] - first_row[size_t(t)];
  }
  int64_t row(int64_t t, int64_t sample) const { return first_row[size_t(t)] + sample; }
  int64_t rows() const { return first_row.back(); }
  std::string name() const {
    const auto entry = [](const char* name, int64_t value) { return name + std::to_string(value); };
    return entry("T=", T) + entry(" B=", B) + entry(" I=", I) + entry(" H=", H) +
           entry(" packed=", packed());
  }
};

// Rows of features as a caller may hold them: contiguous, with gaps, batch first, or expanded.
template <class S>
class RowsArray {
 public:
  RowsArray(const Shape& shape, int64_t features)
      : shape_(shape), layout_(shape, features), array_(layout_.end) {
    for_each_row([&](int64_t offset) { fill_randomly(array_, offset, features); });
  }

  rnn_cuda::Rows rows() { return {array_.device(), layout_.time_stride, layout_.batch_stride}; }
  double at(int64_t t, int64_t b, int64_t feature) const { return array_[offset(t, b) + feature]; }

 private:
  struct Strides {
    int64_t time_stride, batch_stride, end = 0;

    Strides(const Shape& shape, int64_t features) {
      const int64_t row = features + (one_in(2) ? 0 : uniform(1, 5));
      batch_stride = row;
      time_stride = shape.B * row;
      if (shape.packed())
        time_stride = 0;
      else if (one_in(3))
        time_stride = row, batch_stride = shape.T * row;
      if (one_in(8)) time_stride = 0;
      if (one_in(8)) batch_stride = 0;
      for (int64_t t = 0; t < shape.T; ++t)
        for (int64_t b = 0; b < shape.samples(t); ++b)
          end = std::max(end, offset(shape, t, b) + features);
    }
    int64_t offset(const Shape& shape, int64_t t, int64_t b) const {
      return shape.packed() ? shape.row(t, b) * batch_stride : t * time_stride + b * batch_stride;
    }
  };

  int64_t offset(int64_t t, int64_t b) const { return layout_.offset(shape_, t, b); }
  template <class F>
  void for_each_row(const F& f) const {
    for (int64_t t = 0; t < shape_.T; ++t)
      for (int64_t b = 0; b < shape_.samples(t); ++b) f(offset(t, b));
  }

  const Shape& shape_;
  Strides layout_;
  Array<S> array_;
};

// A matrix (N, K), stored by rows or by columns, with or without a gap between them.
template <class S>
class MatrixArray {
 public:
  MatrixArray(int64_t n, int64_t k, float scale, bool has_infinity = false)
      : transposed_(one_in(2)),
        lines_(transposed_ ? k : n),
        length_(transposed_ ? n : k),
        stride_(length_ + (one_in(2) ? 0 : uniform(1, 5))),
        array_(n * k == 0 ? 0 : (lines_ - 1) * stride_ + length_) {
    for (int64_t i = 0; n > 0 && i < lines_; ++i)
      fill_randomly(array_, i * stride_, length_, scale);
    if (has_infinity)
      array_.host[static_cast<size_t>(uniform(0, lines_ - 1) * stride_ + uniform(0, length_ - 1))] =
          S(std::numeric_limits<float>::infinity());
  }

  rnn_cuda::Matrix matrix() { return {array_.device(), stride_, transposed_}; }
  double at(int64_t n, int64_t k) const {
    return array_[transposed_ ? k * stride_ + n : n * stride_ + k];
  }

 private:
  bool transposed_;
  int64_t lines_, length_, stride_;
  Array<S> array_;
};

}  // namespace check
