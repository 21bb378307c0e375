// Between grid.cpp and warp.cpp.
#pragma once

#include <string>

#include "emulation/cuda.h"

namespace emulation {

constexpr int kLanes = 32;

struct Lane {
    const void* in;
    void* out;
};

// The thread that runs, and what it can do with others: wait until somebody wakes it, wake one.
unsigned current_thread();
void suspend(const Site& site);
void wake(unsigned thread);
uint64_t draw(uint64_t below);
Completion completion();
Counts* counts_of_block();
std::string words(const Site& site);

// The state of a block in boxes.cpp and products.cpp: `begin` before its threads start, `check` when a thread and when
// the last one ends; `finish_one` carries out a copy that is under way, if there is one, while no thread can run (or at
// random before).
void begin_boxes(unsigned num_threads);
void check_boxes_of_thread();
void check_boxes_of_block();
bool finish_one_copy();
void begin_products_of_block(unsigned num_threads);
void check_products_of_block();

// For products.cpp: is what it reads here, as copies brought it? (Operands that threads store are not emulated.)
void check_multiplying(const Site& site, uint32_t begin, uint32_t end);
// For boxes.cpp: does a product under way read these addresses?
bool is_read_by_products(uint32_t begin, uint32_t end);

// For the 32 lanes of the running thread's warp.
void begin_products(const Lane* lanes);
void start_product(const Lane* lanes);
void commit_products(const Lane* lanes);
void wait_for_products(const Lane* lanes);

// Memory that never moves: what passes from one fiber to another must not be allocated in one of them (grid.cpp).
template <typename T, int kCapacity>
class FixedList {
  public:
    int size() const { return size_; }
    T& operator[](int i) { return items_[i]; }
    T& add() {
        if (size_ == kCapacity) fail("the emulation holds at most %d of these", kCapacity);
        return items_[size_++];
    }
    void remove(int at) {
        for (int i = at + 1; i < size_; ++i) items_[i - 1] = items_[i];
        --size_;
    }
    void clear() { size_ = 0; }

  private:
    T items_[kCapacity];
    int size_ = 0;
};

// Carries out an operation for the 32 lanes of a warp.
void compute(Collective operation, const Lane* lanes, Counts* counts);

}  // namespace emulation
