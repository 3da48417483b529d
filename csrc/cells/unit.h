// What one step of a cell does within a unit, and how many values of each kind it has there.
//
// The recurrence computes the sums, which need what all units published a step ago:
//
//   z_t = a_t + b + W x_t + M p_{t-1}                   M (S H, P H), W (S H, I)
//   p_t, c_t, saved_t = epilogue(z_t, c_{t-1}, e_t)     within a unit
//
// A cell may want the last sums of W x_t for themselves, as GRU does, whose reset gate weighs M h
// but not W x: these are then `apart`, and b has S + apart values per unit.
//
// An epilogue is a type with a `kCounts` and a function `apply`, which turns the first part of a
// Unit into the second. It is written once, for the vectors of the CPU kernel and for the numbers
// of a CUDA thread.
#pragma once

namespace rnn_cuda {

// Values of a unit in one step.
struct Counts {
  int sums = 1;       // S, z
  int apart = 0;      // of W x + b, not added to the last of these
  int published = 1;  // P, p: what every unit reads a step later
  int carried = 0;    // C, c: what only the unit itself reads a step later
  int operands = 0;   // E, e: read at this time step
  int constants = 0;  // k: read at every time step. c_t = k_0 c_{t-1} + k_1 times what is saved
  int saved = 0;      // written for the backward pass
  int adjoints = 0;  // of a backward pass: total adjoints of the states, for those who measure them
};
constexpr int kMaxAdjoints = 3;

// One sum, one published value, nothing that is carried, constant or saved.
constexpr bool is_simple(const Counts& counts) {
  return counts.sums == 1 && counts.apart == 0 && counts.published == 1 && counts.carried == 0 &&
         counts.constants == 0 && counts.saved == 0;
}
// The same for device code, which calls no function of the host.
template <class Epilogue>
constexpr bool kIsSimple = is_simple(Epilogue::kCounts);

// Of a backward pass: whether the gradients of a layer are products and sums of one value of a
// unit, what it publishes.
constexpr bool has_one_delta(const Counts& counts) {
  return counts.sums == 1 && counts.published == 1 && counts.saved == 0 && counts.adjoints == 1;
}

// The functions of a gated cell, where they are chosen when it runs (nonlinearities.h, `Chosen`).
enum class Function { Tanh, Relu, Sigmoid, HardSigmoid, Identity };
struct Functions {
  Function candidate = Function::Tanh;  // of the new value, and of what an LSTM shows of c
  Function gate = Function::Sigmoid;
};

// Value is a number, or a vector of the same value of neighbouring units.
template <class Value, class Epilogue>
struct Unit {
  static constexpr Counts kCounts = Epilogue::kCounts;

  Value sums[kCounts.sums];
  Value apart[kCounts.apart + 1];  // + 1: C++ has no empty arrays
  Value operands[kCounts.operands + 1];
  Value constants[kCounts.constants + 1];
  Value carried[kCounts.carried + 1];  // c_{t-1} before `apply`, c_t after it
  Functions functions;

  Value published[kCounts.published];
  Value saved[kCounts.saved + 1];
  Value adjoints[kCounts.adjoints + 1];
};

}  // namespace rnn_cuda

#ifdef __CUDACC__
#define RNN_CUDA_CELL __device__ __forceinline__
#else
#define RNN_CUDA_CELL inline __attribute__((always_inline))
#endif
