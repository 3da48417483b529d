// The cells by name. A new one has its own header, and its lines in each of the three lists here.
#pragma once

#include <string_view>

#include "elman.h"
#include "gru.h"
#include "leaky.h"
#include "linear.h"
#include "lstm.h"

namespace rnn_cuda {

enum class Epilogue {
  ElmanTanh,
  ElmanRelu,
  ElmanSigmoid,
  ElmanIdentity,
  ElmanSoftplus,
  ElmanTanhBackward,
  ElmanReluBackward,
  ElmanSigmoidBackward,
  ElmanIdentityBackward,
  ElmanSoftplusBackward,
  ElmanLinear,
  Gru,
  GruBackward,
  GruOf,  // of functions that are chosen when it runs
  GruOfBackward,
  LeakyTanh,
  LeakyRelu,
  LeakySigmoid,
  LeakyIdentity,
  LeakySoftplus,
  LeakyTanhBackward,
  LeakyReluBackward,
  LeakySigmoidBackward,
  LeakyIdentityBackward,
  LeakySoftplusBackward,
  Lstm,
  LstmBackward,
  LstmOf,
  LstmOfBackward,
  LinearForward1,
  LinearForward2,
  LinearForward3,
  LinearForward3Exposed,
  LinearTranspose1,
  LinearTranspose2,
  LinearTranspose3,
  LinearTranspose3Exposed,
};

// f(the epilogue's type)
template <class F>
RNN_CUDA_CELL auto with_epilogue(Epilogue epilogue, const F& f) {
  switch (epilogue) {
    case Epilogue::ElmanTanh: return f(elman::Forward<Tanh>());
    case Epilogue::ElmanRelu: return f(elman::Forward<Relu>());
    case Epilogue::ElmanSigmoid: return f(elman::Forward<Sigmoid>());
    case Epilogue::ElmanIdentity: return f(elman::Forward<Identity>());
    case Epilogue::ElmanSoftplus: return f(elman::Forward<Softplus>());
    case Epilogue::ElmanTanhBackward: return f(elman::Backward<Tanh>());
    case Epilogue::ElmanReluBackward: return f(elman::Backward<Relu>());
    case Epilogue::ElmanSigmoidBackward: return f(elman::Backward<Sigmoid>());
    case Epilogue::ElmanIdentityBackward: return f(elman::Backward<Identity>());
    case Epilogue::ElmanSoftplusBackward: return f(elman::Backward<Softplus>());
    case Epilogue::Gru: return f(gru::Forward<Tanh, Sigmoid>());
    case Epilogue::GruBackward: return f(gru::Backward<Tanh, Sigmoid>());
    case Epilogue::GruOf: return f(gru::Forward<Chosen, Chosen>());
    case Epilogue::GruOfBackward: return f(gru::Backward<Chosen, Chosen>());
    case Epilogue::LeakyTanh: return f(leaky::Forward<Tanh>());
    case Epilogue::LeakyRelu: return f(leaky::Forward<Relu>());
    case Epilogue::LeakySigmoid: return f(leaky::Forward<Sigmoid>());
    case Epilogue::LeakyIdentity: return f(leaky::Forward<Identity>());
    case Epilogue::LeakySoftplus: return f(leaky::Forward<Softplus>());
    case Epilogue::LeakyTanhBackward: return f(leaky::Backward<Tanh>());
    case Epilogue::LeakyReluBackward: return f(leaky::Backward<Relu>());
    case Epilogue::LeakySigmoidBackward: return f(leaky::Backward<Sigmoid>());
    case Epilogue::LeakyIdentityBackward: return f(leaky::Backward<Identity>());
    case Epilogue::LeakySoftplusBackward: return f(leaky::Backward<Softplus>());
    case Epilogue::Lstm: return f(lstm::Forward<Tanh, Sigmoid>());
    case Epilogue::LstmBackward: return f(lstm::Backward<Tanh, Sigmoid>());
    case Epilogue::LstmOf: return f(lstm::Forward<Chosen, Chosen>());
    case Epilogue::LstmOfBackward: return f(lstm::Backward<Chosen, Chosen>());
    case Epilogue::LinearForward1: return f(linear::Forward<1, false>());
    case Epilogue::LinearForward2: return f(linear::Forward<2, false>());
    case Epilogue::LinearForward3: return f(linear::Forward<3, false>());
    case Epilogue::LinearForward3Exposed: return f(linear::Forward<3, true>());
    case Epilogue::LinearTranspose1: return f(linear::Transpose<1, false>());
    case Epilogue::LinearTranspose2: return f(linear::Transpose<2, false>());
    case Epilogue::LinearTranspose3: return f(linear::Transpose<3, false>());
    case Epilogue::LinearTranspose3Exposed: return f(linear::Transpose<3, true>());
    case Epilogue::ElmanLinear: break;
  }
  return f(elman::Linear());
}

// A cell with its functions: what the operators' argument `cell` names.
struct Cell {
  std::string_view name;
  Epilogue forward, backward;
  // What a layer takes and returns besides its sequence: h, and c if that is what a unit carries.
  int states = 1;
  Functions functions = {};
};

constexpr Cell kCells[] = {
    {"elman.tanh", Epilogue::ElmanTanh, Epilogue::ElmanTanhBackward},
    {"elman.relu", Epilogue::ElmanRelu, Epilogue::ElmanReluBackward},
    {"elman.sigmoid", Epilogue::ElmanSigmoid, Epilogue::ElmanSigmoidBackward},
    {"elman.identity", Epilogue::ElmanIdentity, Epilogue::ElmanIdentityBackward},
    {"elman.softplus", Epilogue::ElmanSoftplus, Epilogue::ElmanSoftplusBackward},
    {"leaky.tanh", Epilogue::LeakyTanh, Epilogue::LeakyTanhBackward},
    {"leaky.relu", Epilogue::LeakyRelu, Epilogue::LeakyReluBackward},
    {"leaky.sigmoid", Epilogue::LeakySigmoid, Epilogue::LeakySigmoidBackward},
    {"leaky.identity", Epilogue::LeakyIdentity, Epilogue::LeakyIdentityBackward},
    {"leaky.softplus", Epilogue::LeakySoftplus, Epilogue::LeakySoftplusBackward},
    {"gru", Epilogue::Gru, Epilogue::GruBackward},
    {"lstm", Epilogue::Lstm, Epilogue::LstmBackward, /*states=*/2},
};

// NAME.CANDIDATE.GATE, such as gru.relu.sigmoid: these with other functions than tanh and sigmoid.
constexpr Cell kCellsOfFunctions[] = {
    {"gru", Epilogue::GruOf, Epilogue::GruOfBackward},
    {"lstm", Epilogue::LstmOf, Epilogue::LstmOfBackward, /*states=*/2},
};
constexpr std::string_view kFunctionNames[] = {"tanh", "relu", "sigmoid", "hard_sigmoid",
                                               "identity"};  // in the order of `Function`

// The linearised recurrences (linear.h), by gates without o and by whether there is an exposure.
// Higher derivatives of a cell whose units carry a value need the row of its number of gates.
struct LinearForm {
  int gates;
  bool exposes;
  Epilogue forward, transpose;
};

constexpr LinearForm kLinearForms[] = {
    {1, false, Epilogue::LinearForward1, Epilogue::LinearTranspose1},
    {2, false, Epilogue::LinearForward2, Epilogue::LinearTranspose2},
    {3, false, Epilogue::LinearForward3, Epilogue::LinearTranspose3},
    {3, true, Epilogue::LinearForward3Exposed, Epilogue::LinearTranspose3Exposed},
};

#ifndef __CUDACC__
inline Counts counts_of(Epilogue epilogue) {
  return with_epilogue(epilogue, [](auto type) { return decltype(type)::kCounts; });
}
#endif

}  // namespace rnn_cuda
