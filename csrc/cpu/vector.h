// Vectors of the width the compiler was asked for, through the compilers' own vector extension, so
// that one source serves AVX-512, AVX2 and plain builds (SSE2, NEON) in float and double.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace rnn_cuda::cpu {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// The type a storage type is computed in.
template <class Storage>
struct ComputeOf {
  using type = Storage;
};
template <>
struct ComputeOf<c10::BFloat16> {
  using type = float;
};
template <>
struct ComputeOf<c10::Half> {
  using type = float;
};

template <class T>
inline Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Reads or writes a whole vector of compute values, at any alignment.
template <class T>
inline Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
inline void store(T* to, Vec<T> v) {
  std::memcpy(to, &v, sizeof v);
}

// The smaller one; b where either is a NaN.
inline Vec<float> minimum(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// Reads the first `count` < kLanes values, and not a byte more; the other lanes are zero.
template <class T>
inline Vec<T> load_first(const T* from, int64_t count) {
  // Masks are of words of 32 bits, so that float and double share them.
  [[maybe_unused]] const int64_t words = count * static_cast<int64_t>(sizeof(T) / sizeof(int32_t));
#if defined(__AVX512F__)
  return bit_cast<Vec<T>>(
      _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << words) - 1), from));
#elif defined(__AVX2__)
  alignas(64) static constexpr int32_t kMasks[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  const __m256i mask = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMasks + 8 - words));
  return bit_cast<Vec<T>>(_mm256_maskload_epi32(reinterpret_cast<const int*>(from), mask));
#else
  Vec<T> v{};
  std::memcpy(&v, from, count * sizeof(T));
  return v;
#endif
}

// Writes the first `count` < kLanes values, and not a byte more. With AVX2 in pieces: writes under
// a mask are slow on some processors, and so is memcpy for a length it learns late.
inline void store_first(float* to, Vec<float> v, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), v);
#elif defined(__AVX2__)
  __m128 rest = _mm256_castps256_ps128(v);
  if (count & 4) {
    _mm_storeu_ps(to, rest);
    rest = _mm256_extractf128_ps(v, 1);
    to += 4;
  }
  if (count & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(to), rest);
    rest = _mm_movehl_ps(rest, rest);
    to += 2;
  }
  if (count & 1) _mm_store_ss(to, rest);
#else
  std::memcpy(to, &v, count * sizeof(float));
#endif
}

inline void store_first(double* to, Vec<double> v, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << count) - 1), v);
#elif defined(__AVX2__)
  __m128d rest = _mm256_castpd256_pd128(v);
  if (count & 2) {
    _mm_storeu_pd(to, rest);
    rest = _mm256_extractf128_pd(v, 1);
    to += 2;
  }
  if (count & 1) _mm_store_sd(to, rest);
#else
  std::memcpy(to, &v, count * sizeof(double));
#endif
}

// ---- half precisions: kLanes<float> values of 16 bits -------------------------------------------

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t WordBits __attribute__((vector_size(kVectorBytes)));

inline Vec<float> widen(HalfBits bits, c10::BFloat16) {
  return bit_cast<Vec<float>>(__builtin_convertvector(bits, WordBits) << 16);
}

// To the nearest, ties to even; a NaN stays one.
inline HalfBits narrow(Vec<float> v, c10::BFloat16) {
  const WordBits bits = bit_cast<WordBits>(v);
  const WordBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const auto is_number = v == v;
  return __builtin_convertvector(is_number ? rounded : (bits >> 16) | 0x40, HalfBits);
}

inline Vec<float> widen(HalfBits bits, c10::Half) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(bit_cast<__m256i>(bits));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(bit_cast<__m128i>(bits));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i)
    v[i] = static_cast<float>(c10::Half(bits[i], c10::Half::from_bits()));
  return v;
#endif
}

inline HalfBits narrow(Vec<float> v, c10::Half) {
#if defined(__AVX512F__)
  return bit_cast<HalfBits>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return bit_cast<HalfBits>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  HalfBits bits;
  for (int i = 0; i < kLanes<float>; ++i) bits[i] = static_cast<c10::Half>(v[i]).x;
  return bits;
#endif
}

// ---- values as tensors store them ---------------------------------------------------------------

// Reads the first `count` values of storage type (a whole vector if there are more); the other
// lanes are zero.
template <class Storage, class T = typename ComputeOf<Storage>::type>
inline Vec<T> load_converted(const Storage* from, int64_t count) {
  if constexpr (sizeof(Storage) == sizeof(T)) {
    return count >= kLanes<T> ? load<T>(from) : load_first(from, count);
  } else {
    HalfBits bits{};
    if (count >= kLanes<T>)
      std::memcpy(&bits, from, sizeof bits);
    else
      std::memcpy(&bits, from, count * sizeof(Storage));
    return widen(bits, Storage());
  }
}

// Writes the first `count` values (a whole vector if there are more) in storage type and returns
// what was written, in compute type: the value that the recurrence carries on is the value the
// caller gets to see.
template <class Storage, class T = typename ComputeOf<Storage>::type>
inline Vec<T> store_converted(Storage* to, Vec<T> v, int64_t count) {
  if constexpr (sizeof(Storage) == sizeof(T)) {
    if (count >= kLanes<T>)
      store<T>(to, v);
    else
      store_first(to, v, count);
    return v;
  } else {
    const HalfBits bits = narrow(v, Storage());
    if (count >= kLanes<T>)
      std::memcpy(to, &bits, sizeof bits);
    else
      std::memcpy(to, &bits, count * sizeof(Storage));
    return widen(bits, Storage());
  }
}

// ---- operands of products -----------------------------------------------------------------------

// What products multiply: values in compute type; or, where the machine has an instruction for
// that, pairs of bfloat16 values, whose two products are added to one float.
typedef uint32_t BFloat16Pair;
// The same of sums over rows: the values of a column in two rows.
typedef int32_t BFloat16RowPair;

template <class Storage>
struct OperandOf {
  using type = typename ComputeOf<Storage>::type;
  using of_rows = type;
};
#if defined(__AVX512BF16__)
template <>
struct OperandOf<c10::BFloat16> {
  using type = BFloat16Pair;
  using of_rows = BFloat16RowPair;
};
#endif

template <class E>
constexpr int kValuesPer = std::is_same_v<E, BFloat16Pair> ? 2 : 1;
template <class R>
constexpr int kRowsPer = std::is_same_v<R, BFloat16RowPair> ? 2 : 1;

template <class E>
using SumOf = std::conditional_t<kValuesPer<E> == 2 || kRowsPer<E> == 2, float, E>;

// How many operands `values` values are.
template <class E>
constexpr int64_t operands(int64_t values) {
  return (values + kValuesPer<E> - 1) / kValuesPer<E>;
}

inline Vec<float> multiply_add(Vec<float> sum, Vec<float> a, Vec<float> b) { return sum + a * b; }
inline Vec<double> multiply_add(Vec<double> sum, Vec<double> a, Vec<double> b) {
  return sum + a * b;
}
#if defined(__AVX512BF16__)
template <class Pairs>  // of a row or of two rows
inline Vec<float> multiply_add(Vec<float> sum, Pairs a, Pairs b) {
#if defined(__clang__)
  // Its intrinsic crashes Clang 16 where an operand is a broadcast.
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
#else
  return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
#endif
}
#endif

// Pairs of values that are bfloat16 values.
inline WordBits paired(Vec<float> first, Vec<float> second) {
  return bit_cast<WordBits>(first) >> 16 | bit_cast<WordBits>(second);
}

// Reads the first `count` values of a row (as many as a vector of operands holds, if there are
// more); the others are zero.
template <class E, class Storage>
inline Vec<E> load_operands(const Storage* from, int64_t count) {
  if constexpr (kValuesPer<E> == 1) {
    return load_converted(from, count);
  } else {
    Vec<E> pairs{};
    if (count >= 2 * kLanes<E>)
      std::memcpy(&pairs, from, sizeof pairs);
    else
      std::memcpy(&pairs, from, count * sizeof(Storage));
    return pairs;
  }
}

// Reads one operand for each of the first `count` columns of a matrix of which `rows` rows are
// left, a stride apart: a row, or pairs out of two.
template <class E, class Storage>
inline Vec<E> load_operands_across(const Storage* from, int64_t stride, int64_t rows,
                                   int64_t count) {
  if constexpr (kValuesPer<E> == 1) {
    return load_converted(from, count);
  } else {
    const Vec<float> first = load_converted(from, count);
    const Vec<float> second = rows > 1 ? load_converted(from + stride, count) : Vec<float>{};
    return paired(first, second);
  }
}

// Writes a vector of values as operands.
inline void store_operands(float* to, Vec<float> v) { store<float>(to, v); }
inline void store_operands(double* to, Vec<double> v) { store<double>(to, v); }
inline void store_operands(BFloat16Pair* to, Vec<float> v) {
  const HalfBits bits = narrow(v, c10::BFloat16());
  std::memcpy(to, &bits, sizeof bits);
}

// Picks lanes out of a (numbers below kLanes) and b (the following numbers).
template <class T, class Lanes>
inline Vec<T> shuffle(Vec<T> a, Vec<T> b, Lanes lanes) {
#if defined(__clang__)
  Vec<T> picked;
  for (int i = 0; i < kLanes<T>; ++i)
    picked[i] = lanes[i] < kLanes<T> ? a[lanes[i]] : b[lanes[i] - kLanes<T>];
  return picked;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}

// Transposes a square of vectors: swaps off-diagonal blocks of ever smaller size.
template <class T, int Block = kLanes<T> / 2>
inline void transpose(Vec<T> (&rows)[kLanes<T>]) {
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  Vec<Int> upper{}, lower{};
  for (int i = 0; i < kLanes<T>; ++i) {
    const bool second = i & Block;
    upper[i] = second ? i - Block + kLanes<T> : i;
    lower[i] = second ? i + kLanes<T> : i + Block;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i & Block) continue;
    const Vec<T> a = rows[i], b = rows[i + Block];
    rows[i] = shuffle<T>(a, b, upper);
    rows[i + Block] = shuffle<T>(a, b, lower);
  }
  if constexpr (Block > 1) transpose<T, Block / 2>(rows);
}

// ---- nonlinearities -----------------------------------------------------------------------------

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  using Bits = int32_t;
  static constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
  static constexpr float kLogTwoHigh = 0.693359375f, kLogTwoLow = -2.12194440e-4f;
  static constexpr int kTerms = 7, kMantissaBits = 23;
  static constexpr int32_t kOne = 0x3f800000;
  static constexpr float kTanhIsOne = 9.1f, kLargest = 87.0f;
};

template <>
struct ExpConstants<double> {
  using Bits = int64_t;
  static constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLogTwoHigh = 0x1.62e42fee00000p-1, kLogTwoLow = 0x1.a39ef35793c76p-33;
  static constexpr int kTerms = 13, kMantissaBits = 52;
  static constexpr int64_t kOne = 0x3ff0000000000000;
  static constexpr double kTanhIsOne = 19.1, kLargest = 708.0;
};

// e^u = scale * (1 + e), scale a power of two, for |u| up to kLargest. Keeping e apart spares expm1
// the cancellation. A NaN in u comes out as a NaN in e.
template <class T>
struct SplitExp {
  Vec<T> scale, e;
};

template <class T>
inline SplitExp<T> split_exp(Vec<T> u) {
  using C = ExpConstants<T>;
  using Bits = Vec<typename C::Bits>;
  // Adding the shift rounds to the nearest integer, which is then found in the low mantissa bits.
  const Vec<T> shift = broadcast(C::kShift);
  const Vec<T> shifted = u * T(1.44269504088896340736) + shift;
  const Vec<T> n = shifted - shift;
  // u - n ln 2 in two parts; |r| <= ln(2) / 2. The first part has few bits, so n times it is exact.
  const Vec<T> r = (u - n * C::kLogTwoHigh) - n * C::kLogTwoLow;
  // Taylor series of (e^r - 1) / r; the first term left out is below half an ulp of the sum.
  T factorial = 1;
  for (int i = 2; i <= C::kTerms; ++i) factorial *= i;
  Vec<T> p = broadcast(T(1) / factorial);
#pragma GCC unroll 16
  for (int i = C::kTerms; i > 1; --i) {
    factorial /= i;
    p = p * r + T(1) / factorial;
  }
  const Bits exponent = (bit_cast<Bits>(shifted) << C::kMantissaBits) + C::kOne;
  return {bit_cast<Vec<T>>(exponent), p * r};
}

// tanh(x) = expm1(2x) / (expm1(2x) + 2) for x >= 0, odd; from kTanhIsOne on it is 1.
template <class T>
inline Vec<T> tanh_of(Vec<T> x) {
  using C = ExpConstants<T>;
  using Bits = Vec<typename C::Bits>;
  const Bits sign = bit_cast<Bits>(x) & std::numeric_limits<typename C::Bits>::min();
  Vec<T> magnitude = bit_cast<Vec<T>>(bit_cast<Bits>(x) ^ sign);
  magnitude =
      magnitude > C::kTanhIsOne ? broadcast(C::kTanhIsOne) : magnitude;  // NaN falls through
  const SplitExp<T> exp = split_exp<T>(T(2) * magnitude);
  const Vec<T> expm1 = exp.scale * exp.e + (exp.scale - T(1));
  return bit_cast<Vec<T>>(bit_cast<Bits>(expm1 / (expm1 + T(2))) | sign);
}

// The same in fewer, shorter chains: a vector's tanh takes as long as its longest one, as few
// others fit beside it. With n and r so that 2 |x| = n ln 2 + 2 r, |r| <= ln(2) / 4,
//
//   e^(2r) - 1 = 2 r + r^2 q(r),   q the polynomial of degree 4 that makes the relative error least
//
// (`python -m benchmarks.tanh`; 1.3e-8). The first term has no rounding error. One constant for ln
// 2 will do: n times its error is lost beside 2 where e^(2|x|) is large.
template <>
inline Vec<float> tanh_of<float>(Vec<float> x) {
  using C = ExpConstants<float>;
  using Bits = Vec<int32_t>;
  const Bits sign = bit_cast<Bits>(x) & std::numeric_limits<int32_t>::min();
  const Vec<float> magnitude =
      minimum(broadcast(C::kTanhIsOne), bit_cast<Vec<float>>(bit_cast<Bits>(x) ^ sign));
  const Vec<float> shifted = magnitude * 2.88539008f + C::kShift;  // 2 / ln 2
  const Vec<float> r = magnitude - (shifted - C::kShift) * 0.346573591f;
  const Vec<float> square = r * r;
  Vec<float> q = square * 0.0888481662f + (r * 0.267728448f + 0.666675210f);
  q = square * q + (r * 1.33332348f + 1.99999988f);
  const Vec<float> e = square * q + (r + r);
  const Bits exponent = (bit_cast<Bits>(shifted) << C::kMantissaBits) + C::kOne;
  const Vec<float> scale = bit_cast<Vec<float>>(exponent);
  const Vec<float> expm1 = scale * e + (scale - 1.0f);
  return bit_cast<Vec<float>>(bit_cast<Bits>(expm1 / (expm1 + 2.0f)) | sign);
}

// e^x - 1 for x <= 0.
template <class T>
inline Vec<T> expm1_of(Vec<T> x) {
  using C = ExpConstants<T>;
  const SplitExp<T> exp = split_exp<T>(x < -C::kLargest ? broadcast(-C::kLargest) : x);
  return exp.scale * exp.e + (exp.scale - T(1));
}

// log(1 + e^x) = max(x, 0) + log(1 + t) with t = e^-|x|, and
//
//   log(1 + t) = 2 artanh(s) = 2 (s + s^3 / 3 + s^5 / 5 + ..)    with s = t / (2 + t) <= 1 / 3
//
// The first term left out is below half an ulp of the sum.
template <class T>
inline Vec<T> softplus_of(Vec<T> x) {
  using C = ExpConstants<T>;
  Vec<T> magnitude = x < T(0) ? -x : x;
  magnitude = magnitude > C::kLargest ? broadcast(C::kLargest) : magnitude;  // NaN falls through
  const SplitExp<T> exp = split_exp<T>(-magnitude);
  const Vec<T> t = exp.scale * exp.e + exp.scale;
  const Vec<T> s = t / (t + T(2)), square = s * s;
  constexpr int kTerms = sizeof(T) == sizeof(float) ? 8 : 17;
  Vec<T> sum = broadcast(T(1) / (2 * kTerms - 1));
#pragma GCC unroll 20
  for (int i = kTerms - 1; i > 0; --i) sum = sum * square + T(1) / (2 * i - 1);
  return (x > T(0) ? x : Vec<T>{}) + T(2) * s * sum;
}

// 1 / (1 + e^-x)
template <class T>
inline Vec<T> sigmoid_of(Vec<T> x) {
  using C = ExpConstants<T>;
  // Comparisons so written that a NaN falls through them.
  Vec<T> u = -x > C::kLargest ? broadcast(C::kLargest) : -x;
  u = u < -C::kLargest ? broadcast(-C::kLargest) : u;
  const SplitExp<T> exp = split_exp<T>(u);
  return T(1) / (T(1) + (exp.scale * exp.e + exp.scale));
}

}  // namespace rnn_cuda::cpu
