// The narrow types of a card, bit by bit; conversions round as the card's do.
#pragma once

#include <cstdint>
#include <cstring>

namespace rnn_cuda::emulator {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

constexpr uint32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;

inline float float_of_bfloat16(uint16_t bits) { return float_of(uint32_t{bits} << 16); }

inline uint16_t bfloat16_of(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & kMagnitude) > kInfinity) return 0x7fff;
  const uint32_t is_odd = bits >> 16 & 1;
  return static_cast<uint16_t>((bits + 0x7fff + is_odd) >> 16);
}

inline float float_of_float16(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
  constexpr uint32_t kLargestExponent = 0x1fu << 23;
  if (magnitude >= kLargestExponent) return float_of(sign | kInfinity | magnitude);
  // The exponents of the two types have different zeros. This way denormal numbers come out right.
  return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));
}

inline uint16_t float16_of(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & kMagnitude;
  if (magnitude > kInfinity) return 0x7fff;
  if (magnitude >= bits_of(65520.0f)) return static_cast<uint16_t>(sign | 0x7c00);
  // Denormal numbers are multiples of 2^-24, the last place of one half: the sum rounds.
  if (magnitude < bits_of(0x1p-14f))
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  const uint32_t is_odd = magnitude >> 13 & 1;
  return static_cast<uint16_t>(sign | (magnitude - (112u << 23) + 0xfff + is_odd) >> 13);
}

// To nearest; adding half of the last place that stays rounds ties away from zero.
inline uint32_t tf32_of(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & kMagnitude) > kInfinity) return kMagnitude;
  return (bits + 0x1000) & ~0x1fffu;
}

// Tensor cores overlook the bits that TF32 does not have.
inline float float_of_tf32(uint32_t bits) { return float_of(bits & ~0x1fffu); }

}  // namespace rnn_cuda::emulator
