// One call of a kernel: how it is cut, its scratch memory, and the team that walks through time.
#pragma once

#include <algorithm>

#include "scratch.h"
#include "walker.h"

namespace rnn_cuda::cpu {

// Rows of a chunk: enough for efficient products over all of them, few enough to stay in the
// second-level cache beside the weights.
constexpr int64_t kRowsPerChunk = 256;
// Below this many inputs, x is cheaper as one more factor of each step's tiles.
constexpr int64_t kProjectedInputSize = 64;

// How a recurrence is cut, and where its pieces lie in the scratch memory of the call.
template <class T>
class Call {
 public:
  // Adds its pieces to `layout`; later pieces are the caller's own.
  Call(const Recurrence& r, const Schedule& schedule, const Plan& plan, bool keeps_states,
       ScratchLayout& layout)
      : r_(r),
        schedule_(schedule),
        plan_(plan),
        panels_(plan.panels<T>(r.hidden_size)),
        keeps_states_(keeps_states),
        steps_per_chunk_(std::clamp<int64_t>(kRowsPerChunk / plan.rows, 1, r.time_steps)),
        projects_input_(r.input_size >= kProjectedInputSize && r.addend.data == nullptr &&
                        r.first_addend == nullptr) {
    const int64_t padded = panels_.padded_columns();
    const int64_t rows = plan.rows * steps_per_chunk_;
    const int teams = plan.cut_hidden ? 1 : plan.threads;  // that have states of their own
    hidden_ = layout.add<T>(padded * r.hidden_size);
    input_ = layout.add<T>(padded * r.input_size);
    bias_ = layout.add<T>(padded);
    state_rows_ = keeps_states ? rows + plan.rows : 2 * plan.rows;
    states_size_ = Strips<T>::size_for(state_rows_, padded);
    states_ = layout.add<T>(states_size_ * teams);
    inputs_size_ = Strips<T>::size_for(rows, r.input_size);
    inputs_ = layout.add<T>(inputs_size_ * plan.threads);
    projected_size_ = projects_input_ ? rows * padded : 0;
    projected_ = layout.add<T>(projected_size_ * teams);
  }

  int64_t chunk_rows() const { return plan_.rows * steps_per_chunk_; }
  const Plan& plan() const { return plan_; }
  const Schedule& schedule() const { return schedule_; }
  const Panels<T>& panels() const { return panels_; }
  Share share(int thread) const {
    return plan_.share(r_.batch, panels_.count(), schedule_.packed(), thread);
  }

  // Packs this thread's part of what all threads read; to be followed by a wait.
  template <class Storage>
  void pack_weights(char* scratch, int thread) const {
    const int64_t first = panels_.count() * thread / plan_.threads;
    const int64_t end = panels_.count() * (thread + 1) / plan_.threads;
    pack<Storage>(r_.weight_hidden, r_.hidden_size, r_.hidden_size, panels_, first, end,
                  at(scratch, hidden_));
    pack<Storage>(r_.weight_input, r_.hidden_size, r_.input_size, panels_, first, end,
                  at(scratch, input_));
    const T* const bias = static_cast<const T*>(r_.bias);
    for (int64_t n = panels_.first_column(first); n < panels_.first_column(end); n += kLanes<T>)
      store<T>(at(scratch, bias_) + n,
               bias == nullptr ? Vec<T>{} : load_converted(bias + n, r_.hidden_size - n));
  }

  Team<T> team(char* scratch, SpinBarrier& barrier) const {
    return {r_,
            schedule_,
            plan_,
            panels_,
            steps_per_chunk_,
            keeps_states_,
            projects_input_,
            at(scratch, hidden_),
            at(scratch, input_),
            at(scratch, bias_),
            barrier};
  }

  WalkBuffers<T> buffers(char* scratch, int thread) const {
    const int team = plan_.cut_hidden ? 0 : thread;
    return {{at(scratch, states_) + states_size_ * team, Strips<T>::stride_for(state_rows_)},
            {at(scratch, inputs_) + inputs_size_ * thread, Strips<T>::stride_for(chunk_rows())},
            at(scratch, projected_) + projected_size_ * team};
  }

 private:
  static T* at(char* scratch, int64_t offset) { return reinterpret_cast<T*>(scratch + offset); }

  const Recurrence& r_;
  const Schedule& schedule_;
  const Plan plan_;
  const Panels<T> panels_;
  const bool keeps_states_;
  const int64_t steps_per_chunk_;
  const bool projects_input_;
  int64_t hidden_, input_, bias_;
  int64_t states_, inputs_, projected_;
  int64_t state_rows_, states_size_, inputs_size_, projected_size_;
};

}  // namespace rnn_cuda::cpu
