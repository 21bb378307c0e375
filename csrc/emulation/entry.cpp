// The C face of the emulation, for tests that load it with ctypes beside the C interface of the kernels.
#include <string>

#include "emulation/cuda.h"

extern "C" {

// order: 0 first woken, 1 last woken, 2 random; completion: 0 eager, 1 lazy, 2 random. The synchronisation at
// `removed_line` of `removed_file` (a file's name without folders) does nothing; null for none.
void ledom_emulation_configure(int order, int completion, uint64_t seed, int workers, const char* removed_file,
                               int removed_line) {
    emulation::Options options;
    options.order = static_cast<emulation::Order>(order);
    options.completion = static_cast<emulation::Completion>(completion);
    options.seed = seed;
    options.workers = workers;
    static std::string kept;  // the caller's text need not outlive this call
    kept = removed_file == nullptr ? "" : removed_file;
    options.removed_file = removed_file == nullptr ? nullptr : kept.c_str();
    options.removed_line = removed_file == nullptr ? 0 : removed_line;
    emulation::configure(options);
}

// The error is of the latest launch, the others are of all launches since `configure`.
const char* ledom_emulation_error() { return emulation::last_error(); }

const char* ledom_emulation_synchronisations() { return emulation::synchronisations_so_far(); }

void ledom_emulation_counts(emulation::Counts* counts) { *counts = emulation::counts_so_far(); }
}
