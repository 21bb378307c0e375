// Stands in for the emulation's grid: notes what a launcher would start, and starts nothing. Compiled together with
// the product's `.cu` files, whose kernels keep the names that they have in the PTX. How many bytes of parameters each
// kernel takes is what the PTX says.
#include <dlfcn.h>

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "emulation/cuda.h"

namespace {

struct Launch {
    std::string kernel;
    unsigned grid[3], threads, shared_bytes;
    std::string params;
};

std::vector<Launch> launches;
std::map<std::string, size_t> sizes_of_params;

}  // namespace

namespace emulation {

// `argument` begins with the kernel and the address of its parameters (launch.h).
bool run_grid(Index3 grid, unsigned threads, unsigned shared_bytes, void (*)(const void*), const void* argument) {
    const void* const* call = static_cast<const void* const*>(argument);
    Dl_info symbol;
    if (dladdr(call[0], &symbol) == 0 || symbol.dli_sname == nullptr) return false;
    const auto size = sizes_of_params.find(symbol.dli_sname);
    if (size == sizes_of_params.end()) return false;
    launches.push_back({symbol.dli_sname,
                        {grid.x, grid.y, grid.z},
                        threads,
                        shared_bytes,
                        std::string(static_cast<const char*>(call[1]), size->second)});
    return true;
}

}  // namespace emulation

extern "C" {

void recorded_expect(const char* kernel, unsigned bytes) { sizes_of_params[kernel] = bytes; }
void recorded_clear() { launches.clear(); }
int recorded_count() { return static_cast<int>(launches.size()); }
const char* recorded_kernel(int i) { return launches[i].kernel.c_str(); }

// Grid, threads, bytes of shared memory, bytes of the parameters.
void recorded_sizes(int i, unsigned* sizes) {
    const Launch& launch = launches[i];
    memcpy(sizes, launch.grid, sizeof(launch.grid));
    sizes[3] = launch.threads;
    sizes[4] = launch.shared_bytes;
    sizes[5] = static_cast<unsigned>(launch.params.size());
}

const char* recorded_params(int i) { return launches[i].params.data(); }
}
