// Scratch memory of the CPU kernels.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace {

// Memory that the kernels write to; aligned to a line of the cache. Null where there is no more.
class Memory {
  public:
    explicit Memory(size_t floats) {
        const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
        at_ = static_cast<float*>(aligned_alloc(64, bytes));
    }
    ~Memory() { free(at_); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    float* get() const { return at_; }

  private:
    float* at_;
};

}  // namespace
