// Cuts a block's dynamic shared memory into arrays. The host runs the same calls on a null base to
// learn how many bytes to ask for, so size and pointers cannot disagree.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define RNN_CUDA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RNN_CUDA_HOST_DEVICE inline
#endif

namespace rnn_cuda {

#ifdef RNN_CUDA_EMULATED
namespace emulator {
constexpr int64_t kRedZoneBytes = 32;
// The kernel may use [from, to) of its block's shared memory; so far it has carved `bytes`.
void allow_shared(char* from, char* to, int64_t bytes);
}  // namespace emulator
#endif

namespace device {

class Carver {
 public:
  // Null: for counting only.
  RNN_CUDA_HOST_DEVICE explicit Carver(char* base = nullptr) : base_(base) {}

  template <class T>
  RNN_CUDA_HOST_DEVICE T* take(int64_t count, int64_t alignment = 16) {
    bytes_ = round_up(bytes_, alignment) + count * static_cast<int64_t>(sizeof(T));
#ifdef RNN_CUDA_EMULATED
    // A gap after each array, where an overrun is noticed. bytes() stays what the card needs: the
    // emulator holds room in reserve for the gaps.
    const int64_t begin = round_up(end_ == 0 ? 0 : end_ + emulator::kRedZoneBytes, alignment);
    end_ = begin + count * static_cast<int64_t>(sizeof(T));
    if (base_ != nullptr) emulator::allow_shared(base_ + begin, base_ + end_, bytes_);
#else
    const int64_t begin = bytes_ - count * static_cast<int64_t>(sizeof(T));
#endif
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + begin);
  }

  RNN_CUDA_HOST_DEVICE int64_t bytes() const { return bytes_; }

 private:
  RNN_CUDA_HOST_DEVICE static int64_t round_up(int64_t n, int64_t to) {
    return (n + to - 1) / to * to;
  }

  char* base_;
  int64_t bytes_ = 0;
#ifdef RNN_CUDA_EMULATED
  int64_t end_ = 0;
#endif
};

}  // namespace device
}  // namespace rnn_cuda

#undef RNN_CUDA_HOST_DEVICE
