// Between grid.cpp and warp.cpp.
#pragma once

#include "emulation/cuda.h"

namespace emulation {

constexpr int kLanes = 32;

struct Lane {
    const void* in;
    void* out;
};

// Carries out an operation for the 32 lanes of a warp.
void compute(Collective operation, const Lane* lanes, Counts* counts);

}  // namespace emulation
