// Fibers: stacks of their own, and switching between them.
#pragma once

#include <cstddef>

namespace rnn_cuda::emulator {

// Takes a stack from those kept for reuse, or makes one. A page below it faults when touched.
class Stack {
 public:
  static constexpr size_t kBytes = 256 * 1024;

  Stack();
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* bottom() const { return bottom_; }

 private:
  char* bottom_;
};

// Where the execution of a fiber, or of the thread that starts the first one, has stopped.
class Context {
 public:
  Context() = default;
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // The next switch to this context calls `entry`, which must not return. Stacks whose numbers
  // differ start at different cache lines.
  void prepare(const Stack& stack, int number, void (*entry)());

  // Makes this the context of the caller, which must run on its OS thread's own stack.
  void adopt();

  // To be called first thing in `entry`.
  static void entered(Context& self);

  // Goes on in `to`; returns when somebody switches back. `finished`: nobody will.
  static void switch_between(Context& from, Context& to, bool finished = false);

 private:
  void* stack_pointer_ = nullptr;  // or a ucontext_t
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  void* fake_stack_ = nullptr;  // of AddressSanitizer
  void* tsan_fiber_ = nullptr;
  bool owns_tsan_fiber_ = false;
};

}  // namespace rnn_cuda::emulator
