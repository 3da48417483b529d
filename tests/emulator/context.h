// Fibers: stacks of their own, and switching between them.
#pragma once

#include <cstddef>

namespace rnn_cuda::emulator {

// What a fiber needs for itself, taken from those kept for reuse, or made. A page below the stack
// faults when touched.
//
// ThreadSanitizer takes what uses one of these for one thread, all whose deeds are ordered. So that
// it finds races between blocks that run one after another, none is used twice in a launch, as long
// as there are not too many.
class Stack {
 public:
  static constexpr size_t kBytes = 64 * 1024;

  Stack();
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* bottom() const { return bottom_; }
  void* tsan_fiber() const { return tsan_fiber_; }

  // Those that the launch has used may be used again.
  static void end_launch();

 private:
  char* bottom_;
  void* tsan_fiber_;
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
};

}  // namespace rnn_cuda::emulator
