// A stack of its own for each CUDA thread, and the switch between two of them. x86-64, System V calling convention.
//
// The sanitizers are told of every switch: to ThreadSanitizer each fiber is a thread of its own, so that two CUDA
// threads that touch one word without a barrier between them are reported as a race. This file's users are compiled
// without instrumentation; LEDOM_EMULATION_TSAN and LEDOM_EMULATION_ASAN say what the rest of the program has.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#error "the emulation switches stacks in x86-64 assembly: write ledom_switch_stack for this processor"
#endif

namespace emulation {

struct Fiber {
    void* stack_pointer = nullptr;
    void* stack = nullptr;  // its lowest address
    size_t stack_bytes = 0;
    void* race_detector = nullptr;  // ThreadSanitizer's name for it
    void* fake_stack = nullptr;     // AddressSanitizer's
};

// `entry` runs at the first switch to the fiber; it must never return.
void prepare(Fiber* fiber, void* stack, size_t stack_bytes, void (*entry)());
void release(Fiber* fiber);

// The fiber that stands for the stack of the calling OS thread.
Fiber fiber_of_caller();

// Go on in `to`; returns when somebody switches back. A fiber that `ends` is never switched to again.
void switch_fiber(Fiber* from, Fiber* to, bool ends);

// The first thing that `entry` calls, with its own fiber: completes the switch that started it.
void arrive(Fiber* fiber);

// For ThreadSanitizer: what was done before `publish(at)` happened before all that follows `observe(at)`.
void publish(void* at);
void observe(void* at);

// While it lives, ThreadSanitizer overlooks what the running fiber does: the machinery's own memory passes from fiber to
// fiber, and memcpy is watched even where nothing is instrumented.
class Unwatched {
  public:
    Unwatched();
    ~Unwatched();
    Unwatched(const Unwatched&) = delete;
    Unwatched& operator=(const Unwatched&) = delete;
};

}  // namespace emulation
