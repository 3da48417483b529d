#include "context.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <vector>

#include "sanitizers.h"

#if defined(__x86_64__) && !defined(RNN_CUDA_EMULATOR_UCONTEXT)
#define RNN_CUDA_SWITCHES_ITSELF 1
#else
#define RNN_CUDA_SWITCHES_ITSELF 0
#include <ucontext.h>
#endif

#if RNN_CUDA_SWITCHES_ITSELF
// Saves what a function has to preserve on the stack, changes stacks, and restores it from there.
// The return is mostly predicted well: the lanes of a warp stop at the same places.
asm(R"(
.pushsection .text
.globl rnn_cuda_switch_stacks
.hidden rnn_cuda_switch_stacks
.type rnn_cuda_switch_stacks, @function
rnn_cuda_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size rnn_cuda_switch_stacks, . - rnn_cuda_switch_stacks
.popsection
)");
extern "C" void rnn_cuda_switch_stacks(void** from, void* to);
#endif

namespace rnn_cuda::emulator {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kLine = 64;
// A guard splits a mapping in two, and a process may not have many more than 60000 of these.
constexpr int kMostGuards = 16000;
// ThreadSanitizer knows some 8000 threads, and each costs time at every barrier.
constexpr size_t kMostUsedOnce = 256;

struct Kept {
  char* bottom;
  void* tsan_fiber;
};
std::vector<Kept> kept, used_in_this_launch;
int guards = 0;

Context* switched_from = nullptr;

char* map_stack() {
  void* const memory = mmap(nullptr, kPage + Stack::kBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  if (guards < kMostGuards && mprotect(memory, kPage, PROT_NONE) == 0) ++guards;
  return static_cast<char*>(memory) + kPage;
}

}  // namespace

Stack::Stack() {
  if (kept.empty()) {
    bottom_ = map_stack();
    tsan_fiber_ = under_thread_sanitizer() ? __tsan_create_fiber(0) : nullptr;
    return;
  }
  bottom_ = kept.back().bottom;
  tsan_fiber_ = kept.back().tsan_fiber;
  kept.pop_back();
  allow(bottom_, kBytes);  // a fiber that was given up left its frames marked
}

Stack::~Stack() {
  const bool once = under_thread_sanitizer() && used_in_this_launch.size() < kMostUsedOnce;
  (once ? used_in_this_launch : kept).push_back({bottom_, tsan_fiber_});
}

void Stack::end_launch() {
  kept.insert(kept.end(), used_in_this_launch.begin(), used_in_this_launch.end());
  used_in_this_launch.clear();
}

Context::~Context() {
#if !RNN_CUDA_SWITCHES_ITSELF
  delete static_cast<ucontext_t*>(stack_pointer_);
#endif
}

void Context::prepare(const Stack& stack, int number, void (*entry)()) {
  bottom_ = stack.bottom();
  size_ = Stack::kBytes;
  // All stacks begin at the same place of a page; their first lines must not share a cache set.
  const size_t used = Stack::kBytes - static_cast<size_t>(number) * 5 % 64 * kLine;
#if RNN_CUDA_SWITCHES_ITSELF
  auto* top = reinterpret_cast<uint64_t*>(stack.bottom() + used);
  *--top = 0;  // where entry() would return to: a function begins 8 off a multiple of 16
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = 0;
  stack_pointer_ = top;
#else
  auto* const state = new ucontext_t;
  getcontext(state);
  state->uc_stack.ss_sp = stack.bottom();
  state->uc_stack.ss_size = used;
  state->uc_link = nullptr;
  makecontext(state, entry, 0);
  stack_pointer_ = state;
#endif
  tsan_fiber_ = stack.tsan_fiber();
}

void Context::adopt() {
  if (under_thread_sanitizer()) tsan_fiber_ = __tsan_get_current_fiber();
#if !RNN_CUDA_SWITCHES_ITSELF
  stack_pointer_ = new ucontext_t;
#endif
}

void Context::entered(Context& self) {
  if (__sanitizer_finish_switch_fiber == nullptr) return;
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(self.fake_stack_, &bottom, &size);
  // The only way to learn where the adopted context's stack lies.
  if (switched_from->size_ == 0) switched_from->bottom_ = bottom, switched_from->size_ = size;
}

void Context::switch_between(Context& from, Context& to, bool finished) {
  switched_from = &from;
  if (__sanitizer_start_switch_fiber != nullptr)
    __sanitizer_start_switch_fiber(finished ? nullptr : &from.fake_stack_, to.bottom_, to.size_);
  constexpr unsigned kOrdersNothing = 1;
  if (under_thread_sanitizer()) __tsan_switch_to_fiber(to.tsan_fiber_, kOrdersNothing);
#if RNN_CUDA_SWITCHES_ITSELF
  rnn_cuda_switch_stacks(&from.stack_pointer_, to.stack_pointer_);
#else
  swapcontext(static_cast<ucontext_t*>(from.stack_pointer_),
              static_cast<ucontext_t*>(to.stack_pointer_));
#endif
  entered(from);
}

}  // namespace rnn_cuda::emulator
