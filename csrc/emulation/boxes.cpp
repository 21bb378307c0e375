// Barriers in shared memory, named barriers, copies of boxes and the registers of warpgroups (sm90a.h): PTX ISA 9.0,
// sections 9.7.13.15 (mbarrier), 9.7.13.1 (bar), 9.7.9.27 (cp.async.bulk.tensor) and 9.7.19.5 (setmaxnreg). Compiled
// without instrumentation.
#include "emulation/sm90a.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "emulation/fiber.h"
#include "emulation/grid.h"

namespace emulation {

namespace {

constexpr int kBarrierBytes = 8, kMaxBarriers = 64, kMaxCopies = 256, kNamedBarriers = 16, kMaxThreads = 1024;
constexpr int kAllRegisters = 65536, kWarpgroup = 128, kRegisterStep = 8;

struct Barrier {
    uint32_t address;
    int count;
    int missing;
    int64_t bytes;  // expected and not here yet
    uint32_t phase;
    bool is_published;
    char turns[2];  // addresses for the race detector
    FixedList<unsigned, kMaxThreads> waiting;
};

struct NamedBarrier {
    int threads;  // 0: nobody has come
    int came;
    char turns[2];
    int turn;
    FixedList<unsigned, kMaxThreads> waiting;
};

struct Store {
    Site site;
    BoxCopy copy;
    unsigned thread;
    bool is_committed;
};

struct Load {
    Site site;
    BoxCopy copy;
};

struct Boxes {
    FixedList<Barrier, kMaxBarriers> barriers;
    NamedBarrier named[kNamedBarriers];
    FixedList<Load, kMaxCopies> loads;
    FixedList<Store, kMaxCopies> stores;
    std::vector<uint16_t> writers;   // of each word by ordinary stores that were not fenced yet: thread + 1
    uint32_t first_written[kMaxThreads], last_written[kMaxThreads];  // words of each thread among them
    std::vector<bool> is_overwritten;  // each word by ordinary stores, since a copy brought it
    int registers[kMaxThreads / kWarpgroup];
    bool has_changed_registers;
    unsigned num_threads;
};

thread_local std::unique_ptr<Boxes> boxes;

bool overlap(uint32_t begin, uint32_t end, uint32_t other, uint32_t bytes) {
    return begin < other + bytes && other < end;
}

uint32_t bytes_of(const BoxCopy& copy) { return static_cast<uint32_t>(copy.map.box[0] * copy.map.box[1]) * 2; }

Barrier* find_barrier(uint32_t address) {
    for (int i = 0; i < boxes->barriers.size(); ++i) {
        if (boxes->barriers[i].address == address) return &boxes->barriers[i];
    }
    return nullptr;
}

Barrier& barrier_at(const Site& site, uint32_t address) {
    Barrier* found = find_barrier(address);
    if (found == nullptr) fail("%s: there is no barrier at %u", words(site).c_str(), address);
    return *found;
}

void end_phase_if_complete(const Site& site, Barrier* barrier) {
    if (barrier->missing < 0) {
        fail("%s: the barrier at %u gets more than its %d arrivals in one phase", words(site).c_str(), barrier->address,
             barrier->count);
    }
    if (barrier->missing != 0 || barrier->bytes != 0) return;
    ++barrier->phase;
    barrier->missing = barrier->count;
    for (int i = 0; i < barrier->waiting.size(); ++i) wake(barrier->waiting[i]);
    barrier->waiting.clear();
}

// Is something under way that reads or writes begin .. end - 1, so that nobody else may write there?
void check_writing(const Site& site, uint32_t begin, uint32_t end) {
    if (is_read_by_products(begin, end)) {
        fail("%s writes shared memory that a product under way reads", words(site).c_str());
    }
    for (int i = 0; i < boxes->stores.size(); ++i) {
        const Store& store = boxes->stores[i];
        if (overlap(begin, end, store.copy.shared, bytes_of(store.copy))) {
            fail("%s writes shared memory that %s still reads", words(site).c_str(), words(store.site).c_str());
        }
    }
    for (int i = 0; i < boxes->loads.size(); ++i) {
        const Load& load = boxes->loads[i];
        if (overlap(begin, end, load.copy.shared, bytes_of(load.copy))) {
            fail("%s writes shared memory that %s is about to fill", words(site).c_str(), words(load.site).c_str());
        }
    }
    for (int i = 0; i < boxes->barriers.size(); ++i) {
        if (overlap(begin, end, boxes->barriers[i].address, kBarrierBytes)) {
            fail("%s overwrites the barrier at %u", words(site).c_str(), boxes->barriers[i].address);
        }
    }
}

void check_fenced(const Site& site, uint32_t begin, uint32_t end) {
    for (uint32_t word = begin / 4; word < (end + 3) / 4; ++word) {
        if (boxes->writers[word] != 0) {
            fail("%s: shared address %u was written by an ordinary store of thread %d without a fence after it",
                 words(site).c_str(), word * 4, boxes->writers[word] - 1);
        }
    }
}

// A box in shared memory as the swizzle of 128 bytes asks for it.
void check_box(const Site& site, const BoxCopy& copy) {
    if (copy.map.box[0] * 2 != static_cast<int>(kRowBytes)) fail("%s: a row is not 128 bytes", words(site).c_str());
    if (copy.map.box[1] < 1 || copy.map.box[1] > 256) fail("%s: a box has 1 .. 256 rows", words(site).c_str());
    if (copy.shared % 128 != 0 || copy.shared + bytes_of(copy) > shared_bytes()) {
        fail("%s: a box of %u bytes at %u is misaligned or outside", words(site).c_str(), bytes_of(copy), copy.shared);
    }
    if (copy.at[2] < 0 || copy.at[2] >= copy.map.sizes[2] || copy.at[3] < 0 || copy.at[3] >= copy.map.sizes[3]) {
        fail("%s: there is no head %d of sequence %d", words(site).c_str(), copy.at[2], copy.at[3]);
    }
}

void finish_load(int number) {
    const Load load = boxes->loads[number];
    boxes->loads.remove(number);
    load.copy.carry_out(load.copy);
    Barrier* barrier = find_barrier(load.copy.barrier);
    barrier->bytes -= bytes_of(load.copy);
    end_phase_if_complete(load.site, barrier);
}

void finish_store(int number) {
    const Store store = boxes->stores[number];
    boxes->stores.remove(number);
    check_fenced(store.site, store.copy.shared, store.copy.shared + bytes_of(store.copy));
    store.copy.carry_out(store.copy);
}

bool is_at_once() {
    return completion() == Completion::kEager || (completion() == Completion::kRandom && draw(2) == 0);
}

}  // namespace

void begin_boxes(unsigned num_threads) {
    if (boxes == nullptr) boxes.reset(new Boxes);
    boxes->barriers.clear();
    for (NamedBarrier& barrier : boxes->named) {
        barrier.threads = barrier.came = barrier.turn = 0;
        barrier.waiting.clear();
    }
    boxes->loads.clear();
    boxes->stores.clear();
    std::fill_n(boxes->first_written, kMaxThreads, UINT32_MAX);
    std::fill_n(boxes->last_written, kMaxThreads, 0);
    boxes->writers.assign(shared_bytes() / 4 + 1, 0);
    boxes->is_overwritten.assign(shared_bytes() / 4 + 1, false);
    boxes->num_threads = num_threads;
    boxes->has_changed_registers = false;
    const int most = kAllRegisters / static_cast<int>(num_threads) / kRegisterStep * kRegisterStep;
    for (int& registers : boxes->registers) registers = most > 255 ? 255 : most;
}

void check_boxes_of_thread() {
    for (int i = 0; i < boxes->stores.size(); ++i) {
        if (boxes->stores[i].thread == current_thread()) {
            fail("the thread ends while %s reads shared memory", words(boxes->stores[i].site).c_str());
        }
    }
}

void check_boxes_of_block() {
    if (boxes->loads.size() != 0) {
        fail("the block ends while %s is under way", words(boxes->loads[0].site).c_str());
    }
    for (int i = 0; i < kNamedBarriers; ++i) {
        if (boxes->named[i].came != 0) {
            fail("the block ends while %d threads have come to barrier %d", boxes->named[i].came, i);
        }
    }
    if (!boxes->has_changed_registers) return;
    int all = 0;
    for (unsigned i = 0; i < boxes->num_threads; i += kWarpgroup) all += boxes->registers[i / kWarpgroup] * kWarpgroup;
    if (all > kAllRegisters) fail("the warpgroups take %d registers of %d", all, kAllRegisters);
    if (all + kRegisterStep * kWarpgroup < kAllRegisters) {
        fail("%d registers of %d are nobody's", kAllRegisters - all, kAllRegisters);
    }
}

bool finish_one_copy() {
    const Unwatched unwatched;
    const int loads = boxes->loads.size(), all = loads + boxes->stores.size();
    if (all == 0) return false;
    const int number = static_cast<int>(draw(static_cast<uint64_t>(all)));
    if (number < loads) {
        finish_load(number);
    } else {
        finish_store(number - loads);
    }
    return true;
}

void init_barrier(const Site& site, uint32_t address, int count) {
    const Unwatched unwatched;
    if (address % kBarrierBytes != 0 || address + kBarrierBytes > shared_bytes()) {
        fail("%s: a barrier at %u is misaligned or outside", words(site).c_str(), address);
    }
    if (count < 1 || find_barrier(address) != nullptr) {
        fail("%s: %d arrivals, at a place of %s", words(site).c_str(), count, count < 1 ? "none" : "another barrier");
    }
    Barrier& barrier = boxes->barriers.add();
    barrier.address = address;
    barrier.count = barrier.missing = count;
    barrier.bytes = 0;
    barrier.phase = 0;
    barrier.is_published = false;
    barrier.waiting.clear();
}

void publish_barriers(const Site&) {
    for (int i = 0; i < boxes->barriers.size(); ++i) boxes->barriers[i].is_published = true;
}

void arrive(const Site& site, uint32_t address, uint32_t expected_bytes) {
    Barrier& barrier = barrier_at(site, address);
    publish(&barrier.turns[barrier.phase % 2]);
    barrier.bytes += expected_bytes;
    --barrier.missing;
    end_phase_if_complete(site, &barrier);
}

void wait_for_phase(const Site& site, uint32_t address, uint32_t parity) {
    Barrier& barrier = barrier_at(site, address);
    while (barrier.phase % 2 == parity % 2) {
        barrier.waiting.add() = current_thread();
        suspend(site);
    }
    observe(&barrier.turns[parity % 2]);
}

void start_load(const Site& site, const BoxCopy& copy) {
    const Unwatched unwatched;
    check_box(site, copy);
    const Barrier& barrier = barrier_at(site, copy.barrier);
    if (!barrier.is_published) fail("%s: the copies do not know the barrier yet", words(site).c_str());
    check_writing(site, copy.shared, copy.shared + bytes_of(copy));
    check_fenced(site, copy.shared, copy.shared + bytes_of(copy));
    ++counts_of_block()->copies;
    memset(shared_memory() + copy.shared, 0xff, bytes_of(copy));
    const auto words_of_block = boxes->is_overwritten.begin();
    std::fill(words_of_block + copy.shared / 4, words_of_block + (copy.shared + bytes_of(copy)) / 4, false);
    Load& load = boxes->loads.add();
    load.site = site;
    load.copy = copy;
    if (is_at_once()) finish_load(boxes->loads.size() - 1);
}

void start_store(const Site& site, const BoxCopy& copy) {
    const Unwatched unwatched;
    check_box(site, copy);
    check_reading(site, copy.shared, copy.shared + bytes_of(copy));
    ++counts_of_block()->copies;
    Store& store = boxes->stores.add();
    store.site = site;
    store.copy = copy;
    store.thread = current_thread();
    store.is_committed = false;
    if (is_at_once()) finish_store(boxes->stores.size() - 1);
}

void end_store_group() {
    for (int i = 0; i < boxes->stores.size(); ++i) {
        if (boxes->stores[i].thread == current_thread()) boxes->stores[i].is_committed = true;
    }
}

void wait_for_stores() {
    const Unwatched unwatched;
    for (int i = boxes->stores.size(); i-- > 0;) {
        if (boxes->stores[i].thread == current_thread() && boxes->stores[i].is_committed) finish_store(i);
    }
}

void fence_stores() {
    const unsigned thread = current_thread();
    for (uint32_t word = boxes->first_written[thread]; word <= boxes->last_written[thread]; ++word) {
        if (boxes->writers[word] == thread + 1) boxes->writers[word] = 0;
    }
    boxes->first_written[thread] = UINT32_MAX;
    boxes->last_written[thread] = 0;
}

void note_store(const Site& site, uint32_t address, int bytes) {
    if (boxes->barriers.size() == 0) return;  // not a kernel for sm_90a
    check_writing(site, address, address + static_cast<uint32_t>(bytes));
    if (address + static_cast<uint32_t>(bytes) <= shared_bytes()) {
        const unsigned thread = current_thread();
        boxes->writers[address / 4] = static_cast<uint16_t>(thread + 1);
        boxes->first_written[thread] = std::min(boxes->first_written[thread], address / 4);
        boxes->last_written[thread] = std::max(boxes->last_written[thread], address / 4);
        boxes->is_overwritten[address / 4] = true;
    }
}

void check_reading(const Site& site, uint32_t begin, uint32_t end) {
    for (int i = 0; i < boxes->loads.size(); ++i) {
        if (overlap(begin, end, boxes->loads[i].copy.shared, bytes_of(boxes->loads[i].copy))) {
            fail("%s reads what %s has not brought yet", words(site).c_str(), words(boxes->loads[i].site).c_str());
        }
    }
    check_fenced(site, begin, end);
}

void check_multiplying(const Site& site, uint32_t begin, uint32_t end) {
    check_reading(site, begin, end);
    for (uint32_t word = begin / 4; word < (end + 3) / 4; ++word) {
        if (boxes->is_overwritten[word]) {
            fail("%s: a thread that did not wait for the product has overwritten shared address %u",
                 words(site).c_str(), word * 4);
        }
    }
}

void come_to_barrier(const Site& site, int number, int threads, bool waits) {
    if (number < 1 || number >= kNamedBarriers || threads % kLanes != 0) {
        fail("%s: barrier %d of %d threads", words(site).c_str(), number, threads);
    }
    NamedBarrier& barrier = boxes->named[number];
    if (barrier.came != 0 && barrier.threads != threads) {
        fail("%s: barrier %d is of %d threads, others said %d", words(site).c_str(), number, threads, barrier.threads);
    }
    barrier.threads = threads;
    char* turn = &barrier.turns[barrier.turn];
    publish(turn);
    if (++barrier.came < threads) {
        if (!waits) return;
        barrier.waiting.add() = current_thread();
        suspend(site);
    } else {
        if (!waits && barrier.waiting.size() == 0) {
            fail("%s: all came to barrier %d and nobody waits", words(site).c_str(), number);
        }
        barrier.came = 0;
        barrier.turn ^= 1;
        ++counts_of_block()->block_barriers;
        for (int i = 0; i < barrier.waiting.size(); ++i) wake(barrier.waiting[i]);
        barrier.waiting.clear();
    }
    if (waits) observe(turn);
}

void set_registers(const Site& site, int count, bool takes) {
    int& registers = boxes->registers[current_thread() / kWarpgroup];
    if (count % kRegisterStep != 0 || count < 24 || count > 256) {
        fail("%s: %d is not a number of registers", words(site).c_str(), count);
    }
    const bool is_first = current_thread() % kWarpgroup == 0;
    if (is_first && (takes ? count < registers : count > registers)) {
        fail("%s: from %d to %d registers", words(site).c_str(), registers, count);
    }
    boxes->has_changed_registers = true;
    if (is_first) registers = count;
}

}  // namespace emulation
