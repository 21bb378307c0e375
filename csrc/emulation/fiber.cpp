#include "emulation/fiber.h"

#include <pthread.h>

#include <cstdint>

#if defined(LEDOM_EMULATION_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* at);
void __tsan_release(void* at);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif
#if defined(LEDOM_EMULATION_ASAN)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t bytes);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* bytes);
void __asan_unpoison_memory_region(const volatile void* at, size_t bytes);
}
#endif

// void ledom_switch_stack(void** save, void* to): the registers that a callee keeps go onto the old stack, then the
// stack pointer changes, then those of the new stack come back.
extern "C" void ledom_switch_stack(void** save, void* to);
asm(R"(
.text
.globl ledom_switch_stack
.hidden ledom_switch_stack
.type ledom_switch_stack, @function
ledom_switch_stack:
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
.size ledom_switch_stack, .-ledom_switch_stack
)");

namespace emulation {

namespace {
constexpr int kSavedRegisters = 6;
#if defined(LEDOM_EMULATION_TSAN)
constexpr unsigned kNoSynchronisation = 1;  // a switch orders nothing: only barriers do
#endif
}  // namespace

void prepare(Fiber* fiber, void* stack, size_t stack_bytes, void (*entry)()) {
    fiber->stack = stack;
    fiber->stack_bytes = stack_bytes;
    // At its first instruction a function finds a return address at an address that is 8 modulo 16.
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + stack_bytes) & ~uintptr_t{15});
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
    fiber->stack_pointer = top;
    fiber->fake_stack = nullptr;
#if defined(LEDOM_EMULATION_ASAN)
    __asan_unpoison_memory_region(stack, stack_bytes);  // what the fiber before it left
#endif
#if defined(LEDOM_EMULATION_TSAN)
    fiber->race_detector = __tsan_create_fiber(0);
#endif
}

void release(Fiber* fiber) {
#if defined(LEDOM_EMULATION_TSAN)
    __tsan_destroy_fiber(fiber->race_detector);
#endif
    *fiber = Fiber{};
}

Fiber fiber_of_caller() {
    Fiber fiber;
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &fiber.stack, &fiber.stack_bytes);
    pthread_attr_destroy(&attributes);
#if defined(LEDOM_EMULATION_TSAN)
    fiber.race_detector = __tsan_get_current_fiber();
#endif
    return fiber;
}

void switch_fiber(Fiber* from, Fiber* to, bool ends) {
#if defined(LEDOM_EMULATION_ASAN)
    __sanitizer_start_switch_fiber(ends ? nullptr : &from->fake_stack, to->stack, to->stack_bytes);
#endif
#if defined(LEDOM_EMULATION_TSAN)
    __tsan_switch_to_fiber(to->race_detector, kNoSynchronisation);
#endif
    (void)ends;
    ledom_switch_stack(&from->stack_pointer, to->stack_pointer);
    arrive(from);
}

void arrive(Fiber* fiber) {
#if defined(LEDOM_EMULATION_ASAN)
    __sanitizer_finish_switch_fiber(fiber->fake_stack, nullptr, nullptr);
#endif
    (void)fiber;
}

void publish(void* at) {
#if defined(LEDOM_EMULATION_TSAN)
    __tsan_release(at);
#endif
    (void)at;
}

void observe(void* at) {
#if defined(LEDOM_EMULATION_TSAN)
    __tsan_acquire(at);
#endif
    (void)at;
}

Unwatched::Unwatched() {
#if defined(LEDOM_EMULATION_TSAN)
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
}

Unwatched::~Unwatched() {
#if defined(LEDOM_EMULATION_TSAN)
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
}

}  // namespace emulation
