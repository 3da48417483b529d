// Scratch memory of a call, kept by the calling thread for its next call: the system takes longer
// to hand out fresh pages than a short sequence takes to compute.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace rnn_cuda::cpu {

// How many bytes pieces of memory take together; `add` says where each one begins.
class ScratchLayout {
 public:
  template <class T>
  int64_t add(int64_t count) {
    const int64_t begin = bytes_;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return begin;
  }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kAlignment = 64;
  int64_t bytes_ = 0;
};

class Scratch {
 public:
  explicit Scratch(const ScratchLayout& layout) {
    if (layout.bytes() > kept_.size) {
      kept_ = Block();  // before the new one, so that both never exist at once
      kept_ = Block(layout.bytes());
    }
  }
  ~Scratch() {
    if (kept_.size > kMaxKeptBytes) kept_ = Block();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  char* data() const { return kept_.data.get(); }

 private:
  static constexpr int64_t kHugePage = 2 << 20;
  static constexpr int64_t kMaxKeptBytes = 64 << 20;

  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t{kHugePage}); }
  };
  struct Block {
    Block() = default;
    explicit Block(int64_t bytes)
        : size((bytes + kHugePage - 1) / kHugePage * kHugePage),
          data(static_cast<char*>(::operator new(size, std::align_val_t{kHugePage}))) {
#ifdef __linux__
      // Strips and panels are walked in large steps, which would miss the translation cache.
      madvise(data.get(), size, MADV_HUGEPAGE);
#endif
    }
    int64_t size = 0;
    std::unique_ptr<char, Free> data;
  };
  // One per thread, whichever file asks.
  static Block& kept() {
    static thread_local Block block;
    return block;
  }

  Block& kept_ = kept();
};

}  // namespace rnn_cuda::cpu
