// The recurrence on a CPU: all time steps in one call, the state in cache between them.
//
// The batch is cut over threads, which then never wait for each other. Only where there are too
// few samples for that, or where M is too large for one core's cache, the hidden dimension is cut
// instead, with a barrier per step.
#include "../recurrence.h"

#include <stdexcept>

#include "call.h"

namespace rnn_cuda::cpu {
namespace {

template <class Storage>
void run_typed(const Recurrence& r, int threads) {
  using T = typename ComputeOf<Storage>::type;
  const Schedule schedule(r);
  for (bool is_rerun = false;;) {
    const Division division = Division::make<T>(r, schedule.total_rows(), r.input_size, threads);
    ScratchLayout layout;
    const Call<Storage> call(r, schedule, division, /*keeps_states=*/false, layout, is_rerun);
    const Scratch memory(layout);
    char* const scratch = memory.data();
    SpinBarrier barrier;
    threads = run_team(division.threads, [&](int thread) {
      call.pack_weights(scratch, thread);
      barrier.wait(division.threads);
      const Team<Storage> team = call.team(scratch, barrier);
      Walker<Storage>(team, call.share(thread), call.buffers(scratch, thread))
          .run([](int64_t, int64_t) {});
    });
    if (threads == division.threads) {
      if (!call.needs_rerun()) return;
      is_rerun = true;
    }
  }
}

}  // namespace

void run(const Recurrence& r, int threads) {
  if (r.time_steps == 0 || r.batch == 0 || r.hidden_size == 0) return;
  if (counts_of(r.epilogue).apart > 0 && (r.addend.data != nullptr || r.first_addend != nullptr))
    throw std::invalid_argument("rnn_cuda: an addend cannot stay apart from the sums");
  switch (r.dtype) {
    case ScalarType::Float32: return run_typed<float>(r, threads);
    case ScalarType::Float64: return run_typed<double>(r, threads);
    case ScalarType::BFloat16: return run_typed<c10::BFloat16>(r, threads);
    case ScalarType::Float16: return run_typed<c10::Half>(r, threads);
  }
  throw std::invalid_argument("rnn_cuda: unknown scalar type");
}

}  // namespace rnn_cuda::cpu
