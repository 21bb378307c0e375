// The one mask: row i attends the keys lo(i) .. hi(i), both included, and neither end ever steps back.
//
//     lo(i) = max(first(i), i - left)        first(i), last(i): the ends of the document that token i is in
//     hi(i) = min(last(i),  i + right)       left, right: how far a row looks to either side
//
// All is run-time data. With S tokens, W the size of a window that counts the row itself:
//
//     causal             left = S      right = 0           causal window             left = W - 1   right = 0
//     reversed-causal    left = 0      right = S           reversed-causal window    left = 0       right = W - 1
//
//     row   causal        reversed      reversed,     reversed, documents
//           keys 01234    keys 01234    window 2      0-2 and 3-4
//      0         x....         xxxxx         xx...         xxx..
//      1         xx...         .xxxx         .xx..         .xx..
//      2         xxx..         ..xxx         ..xx.         ..x..
//      3         xxxx.         ...xx         ...xx         ...xx
//      4         xxxxx         ....x         ....x         ....x
//
// A token of no document (padding) has first(i) = last(i) + 1: it attends nothing and nothing attends it. The rows
// that attend key j are an interval of the same shape with left and right exchanged: the backward pass of dK and dV
// walks it with the same functions. Indices are within one sequence; nothing here knows heads or batches.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace ledom {

// lo .. hi, both included; empty where hi < lo.
struct Interval {
    int32_t lo;
    int32_t hi;
};

LEDOM_HD bool is_empty(Interval a) { return a.hi < a.lo; }

// The mask of one sequence. `first` and `last` are [seq], or both null: the sequence is one document.
// They must not step back from one token to the next, and 0 <= first <= last + 1 <= seq.
struct Mask {
    int32_t seq;
    int32_t left;   // 0 .. seq
    int32_t right;  // 0 .. seq
    const int32_t* first;
    const int32_t* last;
};

// The keys that row i attends.
LEDOM_HD Interval attended(const Mask& mask, int32_t i) {
    const int32_t first = mask.first ? mask.first[i] : 0;
    const int32_t last = mask.last ? mask.last[i] : mask.seq - 1;
    const int32_t lo = i - mask.left;
    const int32_t hi = i + mask.right;
    return {lo > first ? lo : first, hi < last ? hi : last};
}

// The mask of the transposed problem: attended(transposed(mask), j) are the rows that attend key j.
LEDOM_HD Mask transposed(const Mask& mask) { return {mask.seq, mask.right, mask.left, mask.first, mask.last}; }

// All keys that the rows begin .. end - 1 attend (begin < end; rows beyond the sequence do not count), and perhaps
// some more where rows among them are empty.
LEDOM_HD Interval attended_by_rows(const Mask& mask, int32_t begin, int32_t end) {
    const int32_t last_row = (end < mask.seq ? end : mask.seq) - 1;
    return {attended(mask, begin).lo, attended(mask, last_row).hi};
}

// The tiles of `size` keys, numbered from 0, that hold such keys.
LEDOM_HD Interval tiles_of(Interval keys, int32_t size) {
    if (is_empty(keys)) return {0, -1};
    return {keys.lo / size, keys.hi / size};
}

// Does every row of begin .. end - 1 attend every key of `keys`? Such a tile needs no mask. A tile or a block of rows
// that reaches beyond the sequence is never full.
LEDOM_HD bool is_full(const Mask& mask, int32_t begin, int32_t end, Interval keys) {
    if (end > mask.seq || keys.hi >= mask.seq) return false;
    return attended(mask, end - 1).lo <= keys.lo && attended(mask, begin).hi >= keys.hi;
}

// The position of token i for rotary embeddings: from the document's end, or from its beginning. 0 for padding.
LEDOM_HD int32_t position(const Mask& mask, int32_t i, bool from_end) {
    const int32_t first = mask.first ? mask.first[i] : 0;
    const int32_t last = mask.last ? mask.last[i] : mask.seq - 1;
    const int32_t at = from_end ? last - i : i - first;
    return at > 0 ? at : 0;
}

}  // namespace ledom
