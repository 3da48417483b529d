// What the checkers of the CPU kernels share: the shapes they draw, and their main loop.
#pragma once

#include <cstdio>
#include <future>

#include "problem.h"
#include "threads.h"

namespace check {

inline Shape draw_shape() {
  Shape shape;
  int64_t &T = shape.T, &B = shape.B, &I = shape.I, &H = shape.H;
  T = uniform(1, 14), B = uniform(1, 12), I = uniform(0, 20), H = uniform(1, 80);
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
  if (one_in(12)) T = 1, H = uniform(250, 300);            // a matrix used where it lies, in blocks
  // A matrix beyond a core's own cache, in panels that several tiles use block by block.
  if (one_in(40)) T = 3, B = uniform(4, 12), H = 730;
  shape.draw_rows(one_in(2));
  return shape;
}

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
      case 4: check(BFloat16()); break;
      case 5: check(Float16()); break;
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
template <class S, class Kernel, class Judge>
void run_and_judge(const Problem<S>& problem, const Kernel& kernel, const Judge& judge) {
  const int threads = one_in(4) ? 1 : static_cast<int>(uniform(2, 4));
  try {
    std::async(std::launch::async, kernel, threads).get();
    judge();
  } catch (const std::exception& error) {
    std::printf("%s\nin the problem %s %s threads=%d available=%d\n", error.what(),
                problem.shape.name().c_str(), problem.name().c_str(), threads, available_threads);
    std::exit(1);
  }
}

}  // namespace check
