// power_of_two and exponential of vector.h, for the instruction set that this file is compiled for: NaN of every payload
// stays NaN, what is below their range is 0, and the rest is the C library's. tests/numerics/test_vectors.py builds it.
#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "reversed_attention/cpu/vector.h"

namespace {

float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

int faults = 0;

void check(const char* name, float x, float found, double exact, float least) {
    const bool is_right = std::isnan(x) ? std::isnan(found)
                          : x < least   ? found == 0.0f
                                        : fabs(found - exact) <= 4e-7 * exact;
    if (is_right) return;
    ++faults;
    printf("%s(%a) is %a, not %a\n", name, x, found, exact);
}

void check_all(float x) {
    const Floats two = power_of_two(splat(0.0f) + x), e = exponential(splat(0.0f) + x);
    for (int lane = 0; lane < kLanes; lane += kLanes - 1) {
        check("power_of_two", x, two[lane], exp2(static_cast<double>(x)), -126.0f);
        check("exponential", x, e[lane], exp(static_cast<double>(x)), -87.0f);
    }
}

}  // namespace

int main() {
    for (uint32_t payload = 1; payload < 0x800000u; payload = payload < 0x400u ? payload + 1 : payload * 2 + 1) {
        for (const uint32_t sign : {0u, 0x80000000u}) {
            check_all(float_of(sign | 0x7f800000u | payload));
            check_all(float_of(sign | 0x7fc00000u | payload));
        }
    }
    for (float x = -130.0f; x <= 88.0f; x += 0.0625f) check_all(x);
    for (const float x : {-INFINITY, -1e30f, -3e38f, -0.0f}) check_all(x);
    printf("%d lanes, %d faults\n", kLanes, faults);
    return faults == 0 ? 0 : 1;
}
