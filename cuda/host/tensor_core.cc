// Sums as tensor cores make them.
//
// NVIDIA documents neither their order nor their rounding. Measured bit by bit by others (P. Xie et al., MMA-Sim, arXiv
// 2511.10909, and its code; F. Khattak and M. Mikaitis, arXiv 2512.07004), mma and wgmma of bf16 alike: some terms at once,
// what is there among them, are cut at one place behind the point of the one with the largest exponent (that of a product
// being the sum of its factors'), added exactly, and the sum is cut to f32.
#include <algorithm>

#include "executor.h"

namespace host {
typedef int32_t Ints __attribute__((vector_size(32)));

constexpr int32_t not_finite = 1 << 20, zero = -1000; // as exponents

// Of a factor |fraction| < 2048, of f32 24 bits.
struct Parts {
    int32_t exponent, fraction, sign; // 0 or -1

    Parts(float x, int least, int fraction_bits) {
        int32_t bits;
        memcpy(&bits, &x, 4);
        sign = bits >> 31;
        bits &= 0x7fffffff;
        int32_t raw = bits >> 23;
        exponent = std::max(raw, 1) - 127;
        fraction = ((bits & 0x7fffff) | (raw == 0 ? 0 : 0x800000)) >> (23 - fraction_bits);
        if (exponent < least) fraction >>= least - exponent, exponent = least; // exact
        if (bits == 0) exponent = zero;
        if (raw == 255) exponent = not_finite;
    }
};

Eight::Eight(const float *values, const CoreType &type) {
    for (int i = 0; i < 8; i++) {
        Parts parts(values[i], type.least, type.fraction);
        x[i] = values[i];
        exponent[i] = parts.exponent;
        fraction[i] = parts.fraction;
        sign[i] = parts.sign;
    }
}

// The terms of one rounding.
static void add_at_once(float *sums, const float *a, const Eight *b, int terms, int bits, const CoreType &type) {
    Ints largest, total = {};
    int32_t exponents[16], fractions[16], signs[16];
    int64_t cut[8];
    for (int k = 0; k < terms; k++) {
        Parts parts(a[k], type.least, type.fraction);
        exponents[k] = parts.exponent, fractions[k] = parts.fraction, signs[k] = parts.sign;
    }
    for (int i = 0; i < 8; i++) largest[i] = Parts(sums[i], -126, 23).exponent;
    for (int k = 0; k < terms; k++) {
        Ints exponent = *(const Ints *)b[k].exponent + exponents[k];
        largest = exponent > largest ? exponent : largest;
    }
    // What is not finite is added as it comes, and so are zeros alone.
    float plain[8] = {};
    bool is_plain[8], any = false;
    for (int i = 0; i < 8; i++) any |= is_plain[i] = largest[i] > 500 || largest[i] < -500;
    for (int i = 0; i < 8 && any; i++) {
        if (!is_plain[i]) continue;
        plain[i] = sums[i];
        for (int k = 0; k < terms; k++) plain[i] += a[k] * b[k].x[i];
        largest[i] = 500; // of which nothing is left
    }
    for (int k = 0; k < terms; k++) {
        Ints down = largest - (*(const Ints *)b[k].exponent + exponents[k]), sign = *(const Ints *)b[k].sign ^ signs[k];
        down = (down > 31) | (down < 0) ? Ints{} + 31 : down;
        Ints term = (*(const Ints *)b[k].fraction * fractions[k] << (bits - 2 * type.fraction)) >> down;
        total += (term ^ sign) - sign;
    }
    for (int i = 0; i < 8; i++) {
        Parts parts(sums[i], -126, 23);
        int32_t own = parts.fraction << (bits - 23) >> std::clamp(largest[i] - parts.exponent, 0, 31);
        cut[i] = (int64_t)total[i] + ((own ^ parts.sign) - parts.sign);
    }
    for (int i = 0; i < 8; i++) {
        uint64_t unit = (uint64_t)(1023 + largest[i] - bits) << 52;
        double sum;
        memcpy(&sum, &unit, 8);
        sum *= (double)cut[i];
        float nearest = (float)sum;
        int32_t word;
        memcpy(&word, &nearest, 4);
        word -= __builtin_fabs((double)nearest) > __builtin_fabs(sum);
        memcpy(&sums[i], &word, 4);
        if (is_plain[i]) sums[i] = plain[i];
    }
}

void add_products(float *sums, const float *a, const Eight *b, int terms, const CoreType &type) {
    bool hopper = executor->capability >= 90;
    int at_once = std::min(terms, (hopper ? 32 : 16) / type.bytes), bits = hopper ? 25 : 24;
    for (int k = 0; k < terms; k += at_once) add_at_once(sums, a + k, b + k, at_once, bits, type);
}
} // namespace host
