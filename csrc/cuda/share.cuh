// What a lane does with a sum once it is complete: terms added, epilogue, stores.
//
// The outputs that the lanes of a warp compute at once fall into shares, so that the warps which
// divided the terms of a sum among them can divide its outputs too.
#pragma once

#include "engines.cuh"
#include "epilogues.cuh"
#include "parameters.cuh"

namespace rnn_cuda {
namespace cuda {

// The outputs of one share: for each of kShareSamples samples, kShareUnits units that lie
// Engine::kUnitStep apart. Output number Engine::output(share, j, u) of the lane.
template <class Engine>
class Share {
 public:
  using T = typename Engine::Element;
  static constexpr int kSamples = Engine::kShareSamples, kUnits = Engine::kShareUnits;
  static constexpr int kStep = Engine::kUnitStep;
  using Values = float[kSamples][kUnits];

  __device__ __forceinline__ Share(const WalkParameters& p, const Recurrence& r,
                                   const TileInTime& tile, const TimeStep& time_step, int row_tile,
                                   int first_column, int share, int lane)
      : p_(p),
        r_(r),
        tile_(tile),
        step_(time_step),
        lane_(lane),
        unit_(row_tile * Engine::kRows + Engine::unit(lane, share)) {
#pragma unroll
    for (int j = 0; j < kSamples; ++j)
      sample_[j] = tile.sample(first_column + Engine::column(lane, share, j));
  }

  // What is added to the sums, and what the epilogue reads, as it lies in device memory: widening
  // or adding it here would wait for it here.
  struct Terms {
    uint32_t addend[kSamples][kUnits];
    uint32_t operand[kSamples][kUnits];
    float bias[kUnits];
  };

  __device__ __forceinline__ void read(Terms& terms) const {
    const float* const bias = static_cast<const float*>(r_.bias);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      terms.bias[u] = 0;
      if (bias != nullptr && inside(u)) terms.bias[u] = bias[unit(u)];
    }
#pragma unroll
    for (int j = 0; j < kSamples; ++j) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) terms.addend[j][u] = terms.operand[j][u] = 0;
    }
    if (r_.addend.data != nullptr) {
      if (r_.wide_addend)
        load<float>(terms.addend, r_.addend);
      else
        load<T>(terms.addend, r_.addend);
    }
    if (r_.operand.data != nullptr) load<T>(terms.operand, r_.operand);
  }

  // Sums to inputs of the epilogue: of a sample's first step there may be no state to multiply.
  __device__ __forceinline__ void add_terms(Values& z, const Terms& terms) const {
    const bool skips_zero = r_.initial == nullptr && !r_.multiplies_zero_initial;
#pragma unroll
    for (int j = 0; j < kSamples; ++j) {
      const bool is_first = step_.is_first(r_, sample_[j]);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const float addend = r_.wide_addend ? device::float_of(terms.addend[j][u])
                                            : device::widen<T>(terms.addend[j][u]);
        z[j][u] = (skips_zero && is_first ? 0 : z[j][u]) + (addend + terms.bias[u]);
      }
      if (r_.first_addend == nullptr || !is_first || sample_[j] >= step_.active) continue;
      const T* const first_addend = state_at(r_.first_addend, j);
#pragma unroll
      for (int u = 0; u < kUnits; ++u)
        if (inside(u)) z[j][u] += device::to_float(first_addend[u * kStep]);
    }
  }

  // Squares of z, summed over the units that the lanes of this warp have, for each sample.
  __device__ __forceinline__ void write_squares(double* parts, const Values& z) const {
#pragma unroll
    for (int j = 0; j < kSamples; ++j) {
      double sum = 0;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) sum += inside(u) ? double(z[j][u]) * double(z[j][u]) : 0.0;
      sum = Engine::sum_units(sum);
      if (Engine::has_sum(lane_) && sample_[j] < step_.active) parts[step_.row + sample_[j]] = sum;
    }
  }

  // Applies the epilogue and stores; z becomes the new states. Of what is no sample or unit that is
  // zero; a sample that has not begun, in reverse, keeps its initial state, and that of one which
  // has ended is read by nobody.
  __device__ __forceinline__ void finish(Values& z, const Terms& terms) const {
    Values operand;
#pragma unroll
    for (int j = 0; j < kSamples; ++j) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) operand[j][u] = device::widen<T>(terms.operand[j][u]);
    }
    apply_epilogue<kSamples, kUnits>(r_.epilogue, z, operand);
    const bool keeps = r_.reverse && r_.initial != nullptr;
#pragma unroll
    for (int j = 0; j < kSamples; ++j) {
      const bool active = sample_[j] < step_.active;
      T* const output =
          static_cast<T*>(r_.output) + (step_.row + sample_[j]) * p_.hidden_size + unit_;
      const bool is_last = r_.last != nullptr && step_.is_last(r_, sample_[j]);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const T s = device::from_float<T>(z[j][u]);
        z[j][u] = 0;
        if (!inside(u)) continue;
        if (active) {
          z[j][u] = device::to_float(s);
          if (Engine::owns_outputs(lane_)) {
            output[u * kStep] = s;
            if (is_last) const_cast<T*>(state_at(r_.last, j))[u * kStep] = s;
          }
        } else if (keeps && sample_[j] < p_.batch) {
          z[j][u] = device::to_float(state_at(r_.initial, j)[u * kStep]);
        }
      }
    }
  }

 private:
  __device__ __forceinline__ int unit(int u) const { return unit_ + u * kStep; }
  __device__ __forceinline__ bool inside(int u) const { return unit(u) < p_.hidden_size; }

  __device__ __forceinline__ const T* state_at(const void* states, int j) const {
    return static_cast<const T*>(states) + int64_t(sample_[j]) * p_.hidden_size + unit_;
  }
  template <class Stored>
  __device__ __forceinline__ void load(uint32_t (&to)[kSamples][kUnits], const Rows& rows) const {
#pragma unroll
    for (int j = 0; j < kSamples; ++j) {
      const Stored* const from = tile_.find<Stored>(rows, step_.t, step_.row, sample_[j]) + unit_;
#pragma unroll
      for (int u = 0; u < kUnits; ++u)
        if (sample_[j] < step_.active && inside(u)) to[j][u] = device::bits_of(from[u * kStep]);
    }
  }

  const WalkParameters& p_;
  const Recurrence& r_;
  const TileInTime& tile_;
  const TimeStep& step_;
  int lane_, unit_;
  int sample_[kSamples];
};

}  // namespace cuda
}  // namespace rnn_cuda
