// Runs a grid: the order of threads, barriers, pending copies, and errors that say who waits where. Compiled without
// instrumentation (fiber.h says why).
#include "emulation/grid.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "emulation/fiber.h"

namespace emulation {

namespace {

constexpr size_t kStackBytes = 256 * 1024, kGuardBytes = 4096;

struct Thread {
    Fiber fiber;
    Index3 index = {0, 0, 0};
    bool is_done = false;
    Site waits_at = {"", "", 0};
    std::deque<std::vector<Copy>> groups;  // the last one is still open
};

struct Warp {
    Site site = {"", "", 0};
    Collective operation = Collective::kBarrier;
    int arrived = 0;
    Lane lanes[kLanes];
    char turns[2];  // addresses for the race detector, in turn: nobody can be two barriers ahead
    int turn = 0;
};

// The threads that can run, in the order in which they were woken. It never allocates: memory that passes from one
// fiber to another would look like a race.
class Ready {
  public:
    explicit Ready(size_t capacity) : places_(capacity) {}
    size_t size() const { return size_; }
    void add(Thread* thread) { at(size_++) = thread; }
    Thread* take_first() {
        Thread* taken = at(0);
        first_ = (first_ + 1) % places_.size();
        --size_;
        return taken;
    }
    Thread* take_last() { return at(--size_); }
    void make_last(size_t i) { std::swap(at(i), at(size_ - 1)); }

  private:
    Thread*& at(size_t i) { return places_[(first_ + i) % places_.size()]; }
    std::vector<Thread*> places_;
    size_t first_ = 0, size_ = 0;
};

constexpr size_t kMaxSites = 256;

struct Block {
    explicit Block(unsigned num_threads) : threads(num_threads), warps(num_threads / kLanes), ready(num_threads) {
        reached.reserve(kMaxSites);
    }

    Index3 index = {0, 0, 0};
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Ready ready;
    Site barrier_site = {"", "", 0};
    unsigned at_barrier = 0;
    char turns[2];
    int turn = 0;
    char begin_and_end;
    unsigned running = 0;
    uint64_t random = 1;
    char* shared = nullptr;
    Fiber worker;
    Counts counts = {};
    std::vector<Site> reached;

    uint64_t draw(uint64_t below) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        return (random >> 16) % below;
    }
};

struct Grid {
    Index3 size;
    Index3 block_size;
    unsigned shared_bytes;
    void (*body)(const void*);
    const void* argument;
};

Options options;
Grid grid;
std::atomic<bool> has_failed{false};
std::mutex results;  // guards the three below
std::string error;
Counts counts;
std::vector<Site> reached;
thread_local Block* block = nullptr;
thread_local Thread* current = nullptr;

const char* base_name(const char* path) {
    const char* slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

bool is_same(const Site& a, const Site& b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

void add_site(std::vector<Site>* sites, const Site& site) {
    for (const Site& known : *sites) {
        if (is_same(known, site)) return;
    }
    if (sites->size() < kMaxSites) sites->push_back(site);
}

Thread* next_thread() {
    if (options.completion == Completion::kRandom && block->draw(8) == 0) finish_one_copy();
    while (block->ready.size() == 0 && finish_one_copy()) {
    }
    if (block->ready.size() == 0) return nullptr;
    if (options.order == Order::kFirst) return block->ready.take_first();
    if (options.order == Order::kRandom) block->ready.make_last(block->draw(block->ready.size()));
    return block->ready.take_last();
}

[[noreturn]] void fail_with_deadlock() {
    std::vector<std::pair<Site, std::vector<int>>> places;
    int ended = 0;
    for (size_t i = 0; i < block->threads.size(); ++i) {
        const Thread& thread = block->threads[i];
        if (thread.is_done) {
            ++ended;
            continue;
        }
        size_t at = 0;
        while (at < places.size() && !is_same(places[at].first, thread.waits_at)) ++at;
        if (at == places.size()) places.push_back({thread.waits_at, {}});
        places[at].second.push_back(static_cast<int>(i));
    }
    std::string text = "deadlock:";
    for (const auto& [site, waiting] : places) {
        text += " " + std::to_string(waiting.size()) + " threads (the first is " + std::to_string(waiting[0]) +
                ") wait in " + words(site) + ";";
    }
    fail("%s %d threads have ended", text.c_str(), ended);
}

void go_on_in(Thread* next, bool ends) {
    Thread* me = current;
    current = next;
    switch_fiber(&me->fiber, &next->fiber, ends);
}

// Lets others run until somebody puts this thread among the ready ones.
void wait_at(const Site& site) {
    current->waits_at = site;
    Thread* next = next_thread();
    if (next == nullptr) fail_with_deadlock();
    if (next != current) go_on_in(next, false);
}

void run_thread() {
    arrive(&current->fiber);
    observe(&block->begin_and_end);
    grid.body(grid.argument);
    size_t pending = 0;
    for (const auto& group : current->groups) pending += group.size();
    if (pending != 0) fail("the thread ends while %zu of its copies are under way", pending);
    check_boxes_of_thread();
    if (block->running == 1) {
        check_boxes_of_block();
        check_products_of_block();
    }
    publish(&block->begin_and_end);
    current->is_done = true;
    --block->running;
    Thread* next = next_thread();
    if (next == nullptr && block->running != 0) fail_with_deadlock();
    if (next == nullptr) {
        switch_fiber(&current->fiber, &block->worker, true);
    } else {
        go_on_in(next, true);
    }
    abort();  // an ended thread was switched to
}

void begin_block(uint64_t number, char* stacks) {
    const unsigned num_threads = static_cast<unsigned>(block->threads.size());
    const uint64_t column = number % grid.size.x, row = number / grid.size.x % grid.size.y;
    block->index = {static_cast<unsigned>(column), static_cast<unsigned>(row),
                    static_cast<unsigned>(number / grid.size.x / grid.size.y)};
    block->random = (options.seed + number) * 0x9E3779B97F4A7C15ull | 1;
    block->running = num_threads;
    memset(block->shared, 0xff, grid.shared_bytes);
    begin_boxes(num_threads);
    begin_products_of_block(num_threads);
    publish(&block->begin_and_end);
    for (unsigned i = 0; i < num_threads; ++i) {
        Thread& thread = block->threads[i];
        thread.index = {i, 0, 0};
        thread.is_done = false;
        thread.groups.assign(1, {});
        char* stack = stacks + i * (kStackBytes + kGuardBytes) + kGuardBytes;
        prepare(&thread.fiber, stack, kStackBytes, &run_thread);
        block->ready.add(&thread);
    }
}

// One OS thread's share of the grid.
void run_blocks(std::atomic<uint64_t>* next_block) {
    const unsigned num_threads = grid.block_size.x;
    const std::unique_ptr<Block> mine(new Block(num_threads));
    block = mine.get();
    block->shared = static_cast<char*>(aligned_alloc(1024, (grid.shared_bytes + 1023) / 1024 * 1024));
    block->worker = fiber_of_caller();
    const size_t bytes = num_threads * (kStackBytes + kGuardBytes);
    char* stacks = static_cast<char*>(
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks == MAP_FAILED || block->shared == nullptr) abort();
    for (unsigned i = 0; i < num_threads; ++i)
        mprotect(stacks + i * (kStackBytes + kGuardBytes), kGuardBytes, PROT_NONE);
    const uint64_t total = uint64_t{grid.size.x} * grid.size.y * grid.size.z;
    for (uint64_t number; !has_failed && (number = (*next_block)++) < total;) {
        begin_block(number, stacks);
        current = next_thread();
        switch_fiber(&block->worker, &current->fiber, false);
        observe(&block->begin_and_end);
        for (Thread& thread : block->threads) release(&thread.fiber);
    }
    munmap(stacks, bytes);
    free(block->shared);
    const std::lock_guard<std::mutex> lock(results);
    counts.matrix_loads += mine->counts.matrix_loads;
    counts.bank_conflicts += mine->counts.bank_conflicts;
    counts.products += mine->counts.products;
    counts.copies += mine->counts.copies;
    counts.block_barriers += mine->counts.block_barriers;
    for (const Site& site : mine->reached) add_site(&reached, site);
    block = nullptr;
}

}  // namespace

unsigned current_thread() { return current->index.x; }
void suspend(const Site& site) { wait_at(site); }
void wake(unsigned thread) { block->ready.add(&block->threads[thread]); }
uint64_t draw(uint64_t below) { return block->draw(below); }
Completion completion() { return options.completion; }
Counts* counts_of_block() { return &block->counts; }

std::string words(const Site& site) {
    return std::string(site.what) + " at " + base_name(site.file) + ":" + std::to_string(site.line);
}

void configure(const Options& wanted) {
    options = wanted;
    counts = {};
    reached.clear();
}

const char* last_error() { return error.c_str(); }

Counts counts_so_far() { return counts; }

const char* synchronisations_so_far() {
    static std::string text;
    text.clear();
    for (const Site& site : reached) text += words(site) + "\n";
    return text.c_str();
}

bool run_grid(Index3 size, unsigned threads, unsigned shared_bytes, void (*body)(const void*), const void* argument) {
    grid = {size, {threads, 1, 1}, shared_bytes, body, argument};
    has_failed = false;
    error.clear();
    if (threads == 0 || threads % kLanes != 0) {
        error = "blocks must be whole warps, not " + std::to_string(threads) + " threads";
        return false;
    }
    std::atomic<uint64_t> next_block{0};
    std::vector<std::thread> workers;
    for (int i = 1; i < options.workers; ++i) workers.emplace_back(run_blocks, &next_block);
    run_blocks(&next_block);
    for (std::thread& worker : workers) worker.join();
    return !has_failed;
}

void fail(const char* format, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    {
        const std::lock_guard<std::mutex> lock(results);
        if (!has_failed) {
            const Index3 at = block->index;
            error = std::string(text) + " [block " + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " +
                    std::to_string(at.z) + ", thread " + std::to_string(current->index.x) + "]";
        }
        has_failed = true;
    }
    publish(&block->begin_and_end);
    switch_fiber(&current->fiber, &block->worker, true);
    abort();
}

const Index3& thread_index() { return current->index; }
const Index3& block_index() { return block->index; }
const Index3& block_size() { return grid.block_size; }
const Index3& grid_size() { return grid.size; }
char* shared_memory() { return block->shared; }
unsigned shared_bytes() { return grid.shared_bytes; }

bool is_removed(const Site& site) {
    add_site(&block->reached, site);
    if (site.line != options.removed_line) return false;
    return strcmp(base_name(site.file), options.removed_file) == 0;
}

void wait_for_block(const Site& site) {
    if (is_removed(site)) return;
    if (block->at_barrier != 0 && !is_same(block->barrier_site, site)) {
        fail("divergent barrier: this thread comes to %s, %u others wait in %s", words(site).c_str(), block->at_barrier,
             words(block->barrier_site).c_str());
    }
    block->barrier_site = site;
    char* turn = &block->turns[block->turn];
    publish(turn);
    if (++block->at_barrier < block->threads.size()) {
        wait_at(site);
    } else {
        ++block->counts.block_barriers;
        block->at_barrier = 0;
        block->turn ^= 1;
        for (Thread& thread : block->threads) {
            if (&thread != current) block->ready.add(&thread);
        }
    }
    observe(turn);
}

void wait_for_warp(const Site& site, Collective operation, const void* in, void* out) {
    const bool is_barrier = operation == Collective::kBarrier;
    if (is_barrier && is_removed(site)) return;
    const unsigned thread = current->index.x;
    Warp& warp = block->warps[thread / kLanes];
    if (warp.arrived != 0 && (warp.operation != operation || !is_same(warp.site, site))) {
        fail("divergent warp: this thread comes to %s, %d of its warp wait in %s", words(site).c_str(), warp.arrived,
             words(warp.site).c_str());
    }
    warp.site = site;
    warp.operation = operation;
    warp.lanes[thread % kLanes] = {in, out};
    char* turn = &warp.turns[warp.turn];
    if (is_barrier) publish(turn);
    if (++warp.arrived < kLanes) {
        wait_at(site);
    } else {
        compute(operation, warp.lanes, &block->counts);
        warp.arrived = 0;
        if (is_barrier) warp.turn ^= 1;
        for (unsigned i = thread / kLanes * kLanes; i < thread / kLanes * kLanes + kLanes; ++i) {
            if (i != thread) block->ready.add(&block->threads[i]);
        }
    }
    if (is_barrier) observe(turn);
}

bool begin_copy(const Copy& copy) {
    ++block->counts.copies;
    if (options.completion == Completion::kEager) return true;
    if (options.completion == Completion::kRandom && block->draw(2) == 0) return true;
    current->groups.back().push_back(copy);
    return false;
}

void end_group() { current->groups.emplace_back(); }

bool next_due_copy(int keep, Copy* copy) {
    auto& groups = current->groups;
    while (groups.size() > static_cast<size_t>(keep) + 1) {
        if (!groups.front().empty()) {
            *copy = groups.front().back();
            groups.front().pop_back();
            return true;
        }
        groups.pop_front();
    }
    return false;
}

}  // namespace emulation
