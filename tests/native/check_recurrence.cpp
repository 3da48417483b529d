// Checks run(const Recurrence&) against the contract of recurrence.h, word by word.
#include <cstring>

#include "cpu_checks.h"

template <class S>
void check_random_problem(S) {
  using namespace check;
  const Shape shape = draw_shape();
  const Epilogue epilogue = one_in(3) ? any_of(kOtherEpilogues) : any_of(kElmanEpilogues);
  Problem<S> p(shape, epilogue, Kernels::Cpu);
  const auto judge = [&] {
    p.judge();
    Array<S> again(p.output.count());
    rnn_cuda::Recurrence one_thread = p.r;
    one_thread.output = again.device();
    rnn_cuda::cpu::run(one_thread, 1);
    again.fetch();
    if (std::memcmp(again.host.data(), p.output.host.data(), again.host.size() * sizeof(S)) != 0)
      throw std::runtime_error("output depends on the number of threads");
  };
  run_and_judge(p, [&](int threads) { rnn_cuda::cpu::run(p.r, threads); }, judge);
}

int main(int argc, char** argv) {
  return check::main_loop(argc, argv, [](auto type) { check_random_problem(type); });
}
