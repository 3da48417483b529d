// How the blocks of a team pass each other the states of a step. The one thing in which the
// residencies differ.
//
//   begin()                once the initial state lies in states(0)
//   wait(step)             returns when state `step` has arrived, from all of the team: its words
//   publish(c, w, word)    word w of sample c of the next state, if there is one; w is of this
//   block published()            called by all threads once they have published what they have to
//   end()                  before the block leaves
//
// wait() holds a barrier of the block in every step, after which whatever the block read or wrote
// in the step before is done. The kernel relies on it for its input buffers too.
#pragma once

#include "parameters.cuh"

namespace rnn_cuda {
namespace cuda {

// What an exchange has to know. All blocks of a team publish all of a state, padding included, so
// that its size never varies.
struct ExchangeSetup {
  uint32_t* shared_states;     // [2, Grid: 1][columns][shared_pitch]
  device::Mbarrier* barriers;  // [2]
  uint32_t* outbox;            // Cluster: [columns][outbox_pitch]
  int shared_pitch, outbox_pitch;
  int columns;
  int steps;
  int blocks;         // of the team
  int first_word;     // that this block publishes of a sample's state, a multiple of four
  int own_words;      // how many it publishes, a multiple of four
  int words;          // of one sample's state that are published, a multiple of four
  uint32_t* counter;  // Grid: blocks that have published, of all steps; starts at zero
  uint32_t* states;   // Grid: [2][columns][pitch] in device memory
  int pitch;          // Grid: words between samples there, a multiple of four
};

// That of a block. `Parameters` are those of a kernel over teams and batch tiles, named as in
// WalkParameters.
template <class Parameters>
__device__ __forceinline__ ExchangeSetup exchange_setup(const Parameters& p, int words_per_row_tile,
                                                        int tile, int rank, int steps,
                                                        const BlockMemory& memory) {
  const int64_t place = static_cast<int64_t>(blockIdx.y) * p.batch_tiles + tile;
  const int first_row_tile = rank * p.block_row_tiles;
  ExchangeSetup setup;
  setup.shared_states = memory.states;
  setup.barriers = memory.barriers;
  setup.outbox = memory.outbox;
  setup.shared_pitch = static_cast<int>(p.layout.state_pitch);
  setup.outbox_pitch = static_cast<int>(p.layout.outbox_pitch);
  setup.columns = p.columns;
  setup.steps = steps;
  setup.blocks = p.blocks;
  setup.first_word = first_row_tile * words_per_row_tile;
  setup.own_words = min(p.block_row_tiles, p.row_tiles - first_row_tile) * words_per_row_tile;
  setup.words = p.row_tiles * words_per_row_tile;
  setup.counter = p.counters + place * (Workspace::kCounterBytes / 4);
  setup.states = p.states + place * Workspace::kStateBuffers * p.columns * p.state_words;
  setup.pitch = p.state_words;
  return setup;
}

// A thread's way through vectors of 16 bytes, `per_column` of each of some columns: from number
// `first` in strides, without a division for each.
struct VectorCursor {
  int column, vector, per_column;

  __device__ __forceinline__ VectorCursor(int first, int per_column)
      : column(first / per_column), vector(first % per_column), per_column(per_column) {}

  __device__ __forceinline__ void advance(int stride) {
    vector += stride;
    while (vector >= per_column) {
      vector -= per_column;
      ++column;
    }
  }
};

// One block. Two buffers: the barrier of a step keeps its writers apart from the readers of the
// step before.
class InBlock {
 public:
  static constexpr bool kCluster = false;

  __device__ __forceinline__ explicit InBlock(const ExchangeSetup& setup)
      : states_(setup.shared_states),
        pitch_(setup.shared_pitch),
        size_(setup.columns * setup.shared_pitch) {}

  __device__ __forceinline__ uint32_t* states(int step) { return states_ + (step & 1) * size_; }
  __device__ __forceinline__ void begin() {}
  __device__ __forceinline__ const uint32_t* wait(int step) {
    next_ = states(step + 1);
    device::sync_block();
    return states(step);
  }
  __device__ __forceinline__ void publish(int column, int word, uint32_t value) {
    next_[column * pitch_ + word] = value;
  }
  __device__ __forceinline__ void published() {}
  __device__ __forceinline__ void end() {}

 private:
  uint32_t* states_;
  uint32_t* next_ = nullptr;
  int pitch_, size_;
};

// A cluster. Each block holds the whole state. What its warps publish they lay into the block's
// outbox; then all its threads send that to every block, 16 bytes at a time, and the barrier of
// each counts what arrives. No step waits for a barrier of the whole cluster.
//
// Two buffers suffice: who stores words of state s + 1 over state s - 1 has got all of state s, so
// every block has sent its part of that; and a block sends when all its warps have read what they
// need of the state before. That holds because every row tile is published in every step.
class InCluster {
 public:
  static constexpr bool kCluster = true;

  __device__ __forceinline__ explicit InCluster(const ExchangeSetup& setup)
      : states_(setup.shared_states),
        outbox_(setup.outbox),
        barriers_(setup.barriers),
        pitch_(setup.shared_pitch),
        outbox_pitch_(setup.outbox_pitch),
        columns_(setup.columns),
        first_word_(setup.first_word),
        own_words_(setup.own_words),
        blocks_(setup.blocks),
        steps_(setup.steps),
        bytes_(static_cast<uint32_t>(setup.columns * setup.words * 4)) {
    // Which of the outbox's vectors this thread sends, and to which blocks first and every how
    // many: all threads are to have about as many stores to make. A power of two divides them
    // evenly, since they are whole warps.
    const int threads = static_cast<int>(blockDim.x), vectors = columns_ * own_words_ / 4;
    senders_ = 1;
    while (2 * senders_ <= min(blocks_, threads / vectors)) senders_ *= 2;
    first_ = VectorCursor(static_cast<int>(threadIdx.x) % (threads / senders_), own_words_ / 4);
    first_rank_ = static_cast<int>(threadIdx.x) / (threads / senders_);
  }

  __device__ __forceinline__ uint32_t* states(int step) {
    return states_ + (step & 1) * columns_ * pitch_;
  }

  // barriers_[s & 1] counts the bytes of state s; the two that come first are announced here. Bytes
  // may come before they are announced: the announcement is the arrival without which no phase
  // ends.
  __device__ __forceinline__ void begin() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2; ++i) device::barrier_init(barriers_ + i, 1);
      if (steps_ > 1) device::barrier_expect(barriers_ + 1, bytes_);
      if (steps_ > 2) device::barrier_expect(barriers_, bytes_);
    }
    device::cluster_sync();  // every block runs and is ready before anything is stored into it
  }

  __device__ __forceinline__ const uint32_t* wait(int step) {
    step_ = step;
    if (step > 0) device::barrier_wait(barriers_ + (step & 1), ((step - 1) >> 1) & 1);
    device::sync_block();  // all threads have seen this phase end before the next one begins
    if (threadIdx.x == 0 && step > 0 && step + 2 < steps_)
      device::barrier_expect(barriers_ + (step & 1), bytes_);
    return states(step);
  }

  __device__ __forceinline__ void publish(int column, int word, uint32_t value) {
    outbox_[column * outbox_pitch_ + word - first_word_] = value;
  }

  __device__ __forceinline__ void published() {
    if (step_ + 1 == steps_) return;
    device::sync_block();  // the outbox is full, and nobody reads this state any more
    const int stride = static_cast<int>(blockDim.x) / senders_;
    uint32_t* const to = states(step_ + 1) + first_word_;
    device::Mbarrier* const barrier = barriers_ + ((step_ + 1) & 1);
    for (VectorCursor at = first_; at.column < columns_; at.advance(stride)) {
      const device::Word16 words =
          reinterpret_cast<const device::Word16*>(outbox_ + at.column * outbox_pitch_)[at.vector];
      device::Word16* const place =
          reinterpret_cast<device::Word16*>(to + at.column * pitch_) + at.vector;
      for (int rank = first_rank_; rank < blocks_; rank += senders_)
        device::store_async(place, words, barrier, rank);
    }
  }

  // By now every block has received all that was sent to it. But a block that still stores into
  // another one's memory must not find it gone.
  __device__ __forceinline__ void end() { device::cluster_sync(); }

 private:
  uint32_t* states_;
  uint32_t* outbox_;
  device::Mbarrier* barriers_;
  int pitch_, outbox_pitch_, columns_, first_word_, own_words_, blocks_, steps_;
  int senders_, first_rank_;
  VectorCursor first_{0, 1};
  uint32_t bytes_;
  int step_ = 0;
};

// Blocks of a cooperative launch, through L2. A counter says how many blocks have published; two
// buffers suffice for the same reason as in a cluster.
class InGrid {
 public:
  static constexpr bool kCluster = false;

  __device__ __forceinline__ explicit InGrid(const ExchangeSetup& setup)
      : staged_(setup.shared_states),
        states_(setup.states),
        counter_(setup.counter),
        staged_pitch_(setup.shared_pitch),
        pitch_(setup.pitch),
        words_(setup.words),
        columns_(setup.columns),
        blocks_(setup.blocks) {}

  __device__ __forceinline__ uint32_t* states(int) { return staged_; }
  __device__ __forceinline__ void begin() {}

  __device__ __forceinline__ const uint32_t* wait(int step) {
    next_ = states_ + ((step + 1) & 1) * columns_ * pitch_;
    if (step > 0) {
      if (threadIdx.x == 0) {
        const uint32_t enough = static_cast<uint32_t>(step) * static_cast<uint32_t>(blocks_);
        RNN_CUDA_SPIN_UNTIL(device::load_acquire(counter_) >= enough);
      }
      device::sync_block();
      stage(states_ + (step & 1) * columns_ * pitch_);
    }
    device::sync_block();
    return staged_;
  }

  __device__ __forceinline__ void publish(int column, int word, uint32_t value) {
    device::store_shared_by_gpu(next_ + column * pitch_ + word, value);
  }
  __device__ __forceinline__ void published() {
    device::sync_block();  // the block's stores, and its reads of staged_, are done
    if (threadIdx.x == 0) device::add_release(counter_, 1);
  }
  __device__ __forceinline__ void end() {}

 private:
  // What is published, no more: the other words of staged_ are zero, those in device memory are
  // not.
  __device__ __forceinline__ void stage(const uint32_t* from) {
    // Not several at once: their registers are for weights.
    for (int column = 0; column < columns_; ++column) {
#pragma unroll 1
      for (int vector = threadIdx.x; vector < words_ / 4; vector += blockDim.x)
        reinterpret_cast<device::Word16*>(staged_ + column * staged_pitch_)[vector] =
            device::load_shared_by_gpu(
                reinterpret_cast<const device::Word16*>(from + column * pitch_) + vector);
    }
  }

  uint32_t* staged_;
  uint32_t* states_;
  uint32_t* next_ = nullptr;
  uint32_t* counter_;
  int staged_pitch_, pitch_, words_, columns_, blocks_;
};

}  // namespace cuda
}  // namespace rnn_cuda
