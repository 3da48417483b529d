#include "output_pool.h"

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <cctype>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace rnn_cuda::cpu {
namespace {

constexpr size_t kPage = 4 << 10, kHugePage = 2 << 20;
// malloc keeps smaller blocks itself.
constexpr size_t kMinPooledBytes = 128 << 10;

size_t capacity_from_environment() {
  const char* const text = std::getenv("RNN_CUDA_CPU_POOL_MB");
  if (text == nullptr) return size_t{128} << 20;
  char* end = nullptr;
  const unsigned long long mebibytes = std::strtoull(text, &end, 10);
  TORCH_CHECK_VALUE(std::isdigit(static_cast<unsigned char>(text[0])) && *end == '\0' &&
                        mebibytes <= (1ull << 30),
                    "RNN_CUDA_CPU_POOL_MB: expected a whole number of mebibytes, got '", text, "'");
  return static_cast<size_t>(mebibytes) << 20;
}

class OutputPool final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kMinPooledBytes || capacity_ == 0)
      return c10::GetDefaultCPUAllocator()->allocate(bytes);
    void* const block = take(bytes);
    return {block, block, &OutputPool::release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }

  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  static OutputPool& instance() {
    // Never destroyed: tensors may outlive everything static.
    static OutputPool* const pool = create();
    return *pool;
  }

 private:
  // A process that is forked must not inherit a lock that another thread holds.
  static OutputPool* create() {
#ifdef __linux__
    const auto unlock = [] { instance().mutex_.unlock(); };
    pthread_atfork([] { instance().mutex_.lock(); }, unlock, unlock);
#endif
    return new OutputPool;
  }

  static std::align_val_t alignment(size_t size) {
    return std::align_val_t{size >= kHugePage ? kHugePage : kPage};
  }

  // The system may take its time over large blocks: it is asked without the lock.
  void* take(size_t bytes) {
    const size_t size = (bytes + kPage - 1) / kPage * kPage;
    if (void* const kept = take_kept(size)) return kept;
    // Not rounded up to whole huge pages: the last of them would be cleared for nothing.
    void* const block = ::operator new(size, alignment(size));
#ifdef __linux__
    if (size >= kHugePage) madvise(block, size, MADV_HUGEPAGE);
#endif
    const std::lock_guard<std::mutex> guard(mutex_);
    sizes_[block] = size;
    return block;
  }

  // The smallest kept block that fits, unless it is far too large; else null.
  void* take_kept(size_t size) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto kept = kept_.lower_bound(size);
    if (kept == kept_.end() || kept->first > size + size / 4) return nullptr;
    void* const block = kept->second;
    kept_bytes_ -= kept->first;
    kept_.erase(kept);
    return block;
  }

  static void release(void* block) {
    for (const auto& [size, unwanted] : instance().keep(block))
      ::operator delete(unwanted, alignment(size));
  }

  // Returns the blocks that made room: the largest are the cheapest to be without, byte for byte.
  std::vector<std::pair<size_t, void*>> keep(void* block) {
    std::vector<std::pair<size_t, void*>> unwanted;
    const std::lock_guard<std::mutex> guard(mutex_);
    const size_t size = sizes_.at(block);
    kept_.emplace(size, block);
    kept_bytes_ += size;
    while (kept_bytes_ > capacity_) {
      const auto largest = std::prev(kept_.end());
      unwanted.push_back(*largest);
      kept_bytes_ -= largest->first;
      sizes_.erase(largest->second);
      kept_.erase(largest);
    }
    return unwanted;
  }

  const size_t capacity_ = capacity_from_environment();
  std::mutex mutex_;
  std::multimap<size_t, void*> kept_;        // free blocks by size
  std::unordered_map<void*, size_t> sizes_;  // of all blocks, free or not
  size_t kept_bytes_ = 0;
};

}  // namespace

c10::Allocator* output_allocator() { return &OutputPool::instance(); }

}  // namespace rnn_cuda::cpu
