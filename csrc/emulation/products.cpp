// Products of a warpgroup (sm90a.h): PTX ISA 9.0, section 9.7.15, the fragments of its figures for m64nNk16 and the
// matrix descriptor with the 128-byte swizzle. Each warp is its own: what one warp has waited for says nothing of the
// others. Compiled without instrumentation.
#include <memory>

#include "emulation/fiber.h"
#include "emulation/grid.h"
#include "emulation/sm90a.h"

namespace emulation {

namespace {

constexpr int kMaxWarps = 32, kMaxProducts = 128, kMaxResults = 4, kMaxColumns = 256, kDepth = 16, kRows = 16;
constexpr int kWarpgroupWarps = 4, kMaxLogged = 1 << 16;

struct Product {
    ProductIn in[kLanes];
    int group;  // which commit it belongs to
    bool is_done;
};

// Accumulators under way, by the address of the first lane's.
struct Result {
    float* c[kLanes];
    int columns;
    int pending;
    float sums[kRows][kMaxColumns];
};

struct WarpProducts {
    FixedList<Product, kMaxProducts> products;
    FixedList<Result, kMaxResults> results;
    int groups;  // commits so far
    bool has_begun;
    int started;
};

// What the first of the four warps multiplies, for the others to be compared with.
struct Logged {
    uint64_t a, b;
    int columns;
    bool adds;
};

struct State {
    WarpProducts warps[kMaxWarps];
    FixedList<Logged, kMaxLogged> logs[kMaxWarps / kWarpgroupWarps];
    unsigned num_warps;
};

thread_local std::unique_ptr<State> state;

WarpProducts& mine() { return state->warps[current_thread() / kLanes]; }

float float_of_bf16(uint32_t bits) {
    const uint32_t wide = bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

// A matrix descriptor, in bytes.
struct Operand {
    uint32_t address, panel_bytes, eight_rows_bytes;

    Operand(const Site& site, uint64_t bits)
        : address(static_cast<uint32_t>(bits & 0x3fff) * 16),
          panel_bytes(static_cast<uint32_t>(bits >> 16 & 0x3fff) * 16),
          eight_rows_bytes(static_cast<uint32_t>(bits >> 32 & 0x3fff) * 16) {
        if (bits >> 62 != 1) fail("%s: only the 128-byte swizzle is emulated", words(site).c_str());
        if ((bits >> 49 & 7) != 0) fail("%s: tiles begin at multiples of 1024", words(site).c_str());
    }
    // Row r of 16 columns (they begin within a row of 128 bytes).
    uint32_t along_columns(int row, int column) const {
        return address + static_cast<uint32_t>(row / 8) * eight_rows_bytes +
               static_cast<uint32_t>(row % 8) * kRowBytes + static_cast<uint32_t>(column) * 2;
    }
    // Row r of 16 rows, with columns in panels of 64.
    uint32_t along_rows(int row, int column) const {
        return address + static_cast<uint32_t>(row / 8) * eight_rows_bytes +
               static_cast<uint32_t>(row % 8) * kRowBytes + static_cast<uint32_t>(column / 64) * panel_bytes +
               static_cast<uint32_t>(column % 64) * 2;
    }
};

float element(const Site& site, uint32_t address) {
    const uint32_t swizzled = address ^ (address / kRowBytes % 8) * 16;
    if (swizzled + 2 > shared_bytes()) fail("%s reads shared address %u", words(site).c_str(), swizzled);
    uint16_t bits;
    memcpy(&bits, shared_memory() + swizzled, 2);
    return float_of_bf16(bits);
}

// Calls visit(begin, end) for what a product reads of shared memory, in whole rows of 128 bytes.
template <typename Visit>
void visit_operands(const ProductIn& in, const Visit& visit) {
    const Operand b(in.site, in.b_operand);
    const auto rows_from = [&](uint32_t address, int rows) {
        const uint32_t begin = address / kRowBytes * kRowBytes;
        visit(begin, begin + static_cast<uint32_t>(rows) * kRowBytes);
    };
    if (in.a == nullptr) {
        rows_from(Operand(in.site, in.a_operand).address, kRows * kWarpgroupWarps);
        rows_from(b.address, in.columns);
    } else {
        for (int column = 0; column < in.columns; column += 64) rows_from(b.along_rows(0, column), kDepth);
    }
}

Result* find_result(WarpProducts* warp, const float* c) {
    for (int i = 0; i < warp->results.size(); ++i) {
        if (warp->results[i].c[0] == c) return &warp->results[i];
    }
    return nullptr;
}

// Where number i of lane l of the accumulators lies.
int row_of(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
int column_of(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

void carry_out(WarpProducts* warp, unsigned number_of_warp, Product* product) {
    const ProductIn& in = product->in[0];
    Result* result = find_result(warp, in.c);
    float a[kRows][kDepth];
    static thread_local float b[kDepth][kMaxColumns];
    const int first_row = static_cast<int>(number_of_warp % kWarpgroupWarps) * kRows;
    for (int lane = 0; lane < kLanes && in.a != nullptr; ++lane) {
        for (int i = 0; i < 8; ++i) {  // as c lies, in two blocks of 8 columns
            const uint32_t pair = product->in[lane].a[i / 2];
            a[row_of(lane, i)][column_of(lane, i)] = float_of_bf16(pair >> (16 * (i % 2)) & 0xffff);
        }
    }
    if (in.a == nullptr) {
        const Operand operand(in.site, in.a_operand);
        for (int row = 0; row < kRows; ++row) {
            for (int k = 0; k < kDepth; ++k) a[row][k] = element(in.site, operand.along_columns(first_row + row, k));
        }
    }
    const Operand operand(in.site, in.b_operand);
    for (int k = 0; k < kDepth; ++k) {
        for (int n = 0; n < in.columns; ++n) {
            b[k][n] = element(in.site, in.a == nullptr ? operand.along_columns(n, k) : operand.along_rows(k, n));
        }
    }
    for (int row = 0; row < kRows; ++row) {
        float* sums = result->sums[row];
        for (int n = 0; n < in.columns && !in.adds; ++n) sums[n] = 0.0f;
        for (int k = 0; k < kDepth; ++k) {
            for (int n = 0; n < in.columns; ++n) sums[n] += a[row][k] * b[k][n];
        }
    }
    product->is_done = true;
    --result->pending;
}

Result& open_result(WarpProducts* warp, const Lane* lanes, const ProductIn& first) {
    Result& result = warp->results.add();
    result.columns = first.columns;
    result.pending = 0;
    uint32_t poison = 0xffffffffu;
    for (int lane = 0; lane < kLanes; ++lane) {
        float* c = static_cast<const ProductIn*>(lanes[lane].in)->c;
        result.c[lane] = c;
        for (int i = 0; i < first.columns / 2; ++i) {
            result.sums[row_of(lane, i)][column_of(lane, i)] = c[i];
            memcpy(&c[i], &poison, 4);
        }
    }
    return result;
}

void compare_with_other_warps(const ProductIn& in, WarpProducts* warp) {
    auto& log = state->logs[current_thread() / kLanes / kWarpgroupWarps];
    const int number = warp->started++;
    if (number == log.size()) log.add() = {in.a_operand, in.b_operand, in.columns, in.adds};
    const Logged& first = log[number];
    if (first.a != in.a_operand || first.b != in.b_operand || first.columns != in.columns || first.adds != in.adds) {
        fail("%s: the warps of a warpgroup multiply different things", words(in.site).c_str());
    }
}

}  // namespace

void begin_products_of_block(unsigned num_threads) {
    if (state == nullptr) state.reset(new State);
    state->num_warps = num_threads / kLanes;
    for (WarpProducts& warp : state->warps) {
        warp.products.clear();
        warp.results.clear();
        warp.groups = warp.started = 0;
        warp.has_begun = false;
    }
    for (auto& log : state->logs) log.clear();
}

void check_products_of_block() {
    for (unsigned i = 0; i < state->num_warps; ++i) {
        const WarpProducts& first = state->warps[i / kWarpgroupWarps * kWarpgroupWarps];
        WarpProducts& warp = state->warps[i];
        if (warp.products.size() != 0) {
            fail("the block ends while %s is under way", words(warp.products[0].in[0].site).c_str());
        }
        if (warp.started != first.started) {
            fail("warp %u started %d products, the first of its warpgroup %d", i, warp.started, first.started);
        }
    }
}

bool is_read_by_products(uint32_t begin, uint32_t end) {
    bool is_read = false;
    for (unsigned i = 0; i < state->num_warps; ++i) {
        WarpProducts& warp = state->warps[i];
        for (int n = 0; n < warp.products.size(); ++n) {
            visit_operands(warp.products[n].in[0], [&](uint32_t from, uint32_t to) {
                is_read = is_read || (from < end && begin < to);
            });
        }
    }
    return is_read;
}

void begin_products(const Lane*) { mine().has_begun = true; }

void start_product(const Lane* lanes) {
    const Unwatched unwatched;
    WarpProducts& warp = mine();
    const ProductIn& first = *static_cast<const ProductIn*>(lanes[0].in);
    for (int i = 1; i < kLanes; ++i) {
        const ProductIn& in = *static_cast<const ProductIn*>(lanes[i].in);
        if (in.a_operand != first.a_operand || in.b_operand != first.b_operand || in.adds != first.adds) {
            fail("%s: the lanes of a warp multiply different things", words(first.site).c_str());
        }
    }
    compare_with_other_warps(first, &warp);
    Result* result = find_result(&warp, first.c);
    if (result == nullptr) {
        if (!warp.has_begun) fail("%s: no begin_products since the registers changed", words(first.site).c_str());
        result = &open_result(&warp, lanes, first);
    }
    visit_operands(first, [&](uint32_t begin, uint32_t end) { check_multiplying(first.site, begin, end); });
    Product& product = warp.products.add();
    for (int i = 0; i < kLanes; ++i) product.in[i] = *static_cast<const ProductIn*>(lanes[i].in);
    product.group = warp.groups;
    product.is_done = false;
    ++result->pending;
    const bool is_at_once =
        completion() == Completion::kEager || (completion() == Completion::kRandom && draw(2) == 0);
    // In order: what is before it in the same sums is done before.
    for (int i = 0; i < warp.products.size() && is_at_once; ++i) {
        if (!warp.products[i].is_done && warp.products[i].in[0].c == first.c) {
            carry_out(&warp, current_thread() / kLanes, &warp.products[i]);
        }
    }
}

void commit_products(const Lane*) { ++mine().groups; }

void wait_for_products(const Lane* lanes) {
    const Unwatched unwatched;
    WarpProducts& warp = mine();
    const int keep = static_cast<const WaitIn*>(lanes[0].in)->keep;
    warp.has_begun = false;
    for (int i = 0; i < warp.products.size();) {
        Product& product = warp.products[i];
        if (product.group >= warp.groups - keep) {
            ++i;
            continue;
        }
        if (!product.is_done) carry_out(&warp, current_thread() / kLanes, &product);
        warp.products.remove(i);
    }
    for (int r = warp.results.size(); r-- > 0;) {
        Result& result = warp.results[r];
        bool is_used = false;
        for (int i = 0; i < warp.products.size(); ++i) is_used |= warp.products[i].in[0].c == result.c[0];
        if (is_used) continue;
        for (int lane = 0; lane < kLanes; ++lane) {
            for (int i = 0; i < result.columns / 2; ++i) {
                result.c[lane][i] = result.sums[row_of(lane, i)][column_of(lane, i)];
            }
        }
        warp.results.remove(r);
    }
}

}  // namespace emulation
