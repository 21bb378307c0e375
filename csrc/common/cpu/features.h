// Which of the instruction sets that setup.py compiles for this processor has: every flag of `SOURCES` is asked for, as a
// processor, or a virtual machine, may have the foundation of AVX-512 alone.
#pragma once

#if defined(LEDOM_X86_PATHS)

namespace ledom {

inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

inline bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

}  // namespace ledom

#endif
