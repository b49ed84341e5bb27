// What a warp computes together: shuffles, ldmatrix, mma; and the asynchronous copies of a thread.
#include "executor.h"

namespace host {
void shuffle(const char *operation, uint32_t mask, Shuffle &shuffle, Site site) {
    auto compute = [](uint32_t lanes, void *const *deposits) {
        for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
            auto *own = (Shuffle *)deposits[__builtin_ctz(rest)];
            auto *source = (const Shuffle *)deposits[own->source & 31];
            own->result = source != nullptr ? source->value : ~(uint64_t)0; // from no one: undefined
        }
    };
    collective(operation, mask, &shuffle, compute, site);
}

uint32_t ballot(const char *operation, uint32_t mask, bool predicate, Site site) {
    uint32_t result = predicate;
    auto compute = [](uint32_t lanes, void *const *deposits) {
        uint32_t votes = 0;
        for (unsigned l = 0; l < 32; l++)
            if (lanes >> l & 1 && *(const uint32_t *)deposits[l] != 0) votes |= 1u << l;
        for (unsigned l = 0; l < 32; l++)
            if (lanes >> l & 1) *(uint32_t *)deposits[l] = votes;
    };
    collective(operation, mask, &result, compute, site);
    return result;
}

int64_t reduce_add(uint32_t mask, int64_t value, Site site) {
    auto compute = [](uint32_t lanes, void *const *deposits) {
        int64_t sum = 0;
        for (unsigned l = 0; l < 32; l++)
            if (lanes >> l & 1) sum += *(const int64_t *)deposits[l];
        for (unsigned l = 0; l < 32; l++)
            if (lanes >> l & 1) *(int64_t *)deposits[l] = sum;
    };
    collective("__reduce_add_sync", mask, &value, compute, site);
    return value;
}

// ---- cp.async ----

static void perform(const Copy &copy) {
    memcpy(copy.to, copy.from, copy.valid_bytes);
    memset((char *)copy.to + copy.valid_bytes, 0, copy.bytes - copy.valid_bytes);
}

void cp_async(void *shared, const void *global, unsigned bytes, unsigned valid_bytes) {
    check_shared("cp_async", shared, bytes, bytes);
    if (valid_bytes > bytes) fail("cp_async: %u valid bytes of %u", valid_bytes, bytes);
    check_aligned(global, bytes);
    Copy copy{shared, global, bytes, valid_bytes};
    // Landing at once shows a buffer that is still being read.
    if (executor->order == Order::random && executor->random.next() & 1) return perform(copy);
    this_lane()->copies.items.push_back(copy);
}

void cp_async_commit() { this_lane()->copies.commit(); }
void cp_async_wait(unsigned groups) { this_lane()->copies.land(groups, perform); }

// ---- Matrices ----

static const uint32_t all_lanes = 0xffffffff;

static void whole_warp(const char *operation) {
    const Lane *lane = this_lane();
    unsigned threads = lane->owner->threads, first = (unsigned)(lane - lane->owner->lanes) & ~31u;
    if (threads - first < 32) fail("%s: the warp has only %u lanes", operation, threads - first);
}

struct LoadMatrix {
    const uint16_t *row;
    uint32_t *r;
    unsigned matrices;
};

void ldmatrix(const char *operation, uint32_t *r, unsigned matrices, const void *row, bool transposed, Site site) {
    whole_warp(operation);
    check_shared(operation, row, 16, 16);
    LoadMatrix load{(const uint16_t *)row, r, matrices};
    auto straight = [](uint32_t, void *const *deposits) {
        for (unsigned l = 0; l < 32; l++) {
            auto *own = (const LoadMatrix *)deposits[l];
            for (unsigned i = 0; i < own->matrices; i++) {
                const uint16_t *from = ((const LoadMatrix *)deposits[8 * i + l / 4])->row + 2 * (l % 4);
                own->r[i] = (uint32_t)from[1] << 16 | from[0];
            }
        }
    };
    auto across = [](uint32_t, void *const *deposits) {
        for (unsigned l = 0; l < 32; l++) {
            auto *own = (const LoadMatrix *)deposits[l];
            for (unsigned i = 0; i < own->matrices; i++) {
                void *const *rows = deposits + 8 * i + 2 * (l % 4);
                uint32_t low = ((const LoadMatrix *)rows[0])->row[l / 4],
                         high = ((const LoadMatrix *)rows[1])->row[l / 4];
                own->r[i] = high << 16 | low;
            }
        }
    };
    collective(operation, all_lanes, &load, transposed ? (Compute)across : (Compute)straight, site);
}

struct StoreMatrix {
    uint16_t *row;
    const uint32_t *r;
};

void stmatrix(const char *operation, void *row, const uint32_t *r, bool transposed, Site site) {
    whole_warp(operation);
    check_shared(operation, row, 16, 16);
    StoreMatrix store{(uint16_t *)row, r};
    static const auto element = [](void *const *deposits, unsigned i, unsigned l, bool across, unsigned half) {
        unsigned line = across ? 2 * (l % 4) + half : l / 4, at = across ? l / 4 : 2 * (l % 4) + half;
        ((const StoreMatrix *)deposits[8 * i + line])->row[at] =
            (uint16_t)(((const StoreMatrix *)deposits[l])->r[i] >> 16 * half);
    };
    auto straight = [](uint32_t, void *const *deposits) {
        for (unsigned n = 0; n < 256; n++) element(deposits, n / 64, n / 2 % 32, false, n % 2);
    };
    auto across = [](uint32_t, void *const *deposits) {
        for (unsigned n = 0; n < 256; n++) element(deposits, n / 64, n / 2 % 32, true, n % 2);
    };
    collective(operation, all_lanes, &store, transposed ? (Compute)across : (Compute)straight, site);
}

struct Mma {
    float *d;
    const uint32_t *a, *b;
};

// d [16, 8] += a [16, K] b [K, 8], k ascending. The products of bf16, f16 and tf32 are exact in f32, so plain sums round like
// fused multiply-adds.
template <int K>
static void multiply(void *const *deposits, const float (&a)[16][K], const float (&b)[K][8], const CoreType &type) {
    typedef float Row __attribute__((vector_size(32)));
    Eight eights[K];
    for (int k = 0; k < K && executor->sums_as_chip; k++) eights[k] = Eight(b[k], type);
    for (int i = 0; i < 16; i++) {
        // Row i is with lanes 4 (i % 8) to 4 (i % 8) + 3, in the lower or upper half of their registers.
        Row sum;
        float *at[4];
        for (int t = 0; t < 4; t++) {
            at[t] = ((const Mma *)deposits[i % 8 * 4 + t])->d + i / 8 * 2;
            sum[2 * t] = at[t][0];
            sum[2 * t + 1] = at[t][1];
        }
        for (int k = 0; k < K && !executor->sums_as_chip; k++) {
            Row row;
            memcpy(&row, b[k], sizeof row);
            sum += a[i][k] * row;
        }
        if (executor->sums_as_chip) add_products((float *)&sum, a[i], eights, K, type);
        for (int t = 0; t < 4; t++) {
            at[t][0] = sum[2 * t];
            at[t][1] = sum[2 * t + 1];
        }
    }
}

template <typename T> static void mma_k16(uint32_t, void *const *deposits) {
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; l++) {
        auto *own = (const Mma *)deposits[l];
        int g = l / 4, t = l % 4;
        for (int half = 0; half < 2; half++) {
            auto element = [&](uint32_t word) { return to_float(T{(uint16_t)(word >> 16 * half)}); };
            for (int i = 0; i < 4; i++) a[g + i % 2 * 8][2 * t + half + i / 2 * 8] = element(own->a[i]);
            for (int i = 0; i < 2; i++) b[2 * t + half + i * 8][g] = element(own->b[i]);
        }
    }
    multiply<16>(deposits, a, b, std::is_same_v<T, bf16> ? core_bf16 : core_f16);
}

static void mma_k8(uint32_t, void *const *deposits) {
    float a[16][8], b[8][8];
    auto element = [](uint32_t word) { return __uint_as_float(word & ~0x1fffu); };
    for (int l = 0; l < 32; l++) {
        auto *own = (const Mma *)deposits[l];
        int g = l / 4, t = l % 4;
        for (int i = 0; i < 4; i++) a[g + i % 2 * 8][t + i / 2 * 4] = element(own->a[i]);
        for (int i = 0; i < 2; i++) b[t + i * 4][g] = element(own->b[i]);
    }
    multiply<8>(deposits, a, b, core_tf32);
}

static void mma(const char *operation, float *d, const uint32_t *a, const uint32_t *b, Compute compute, Site site) {
    whole_warp(operation);
    Mma mma{d, a, b};
    collective(operation, all_lanes, &mma, compute, site);
}
void mma_bf16(float *d, const uint32_t *a, const uint32_t *b, Site site) {
    mma("mma_bf16", d, a, b, mma_k16<bf16>, site);
}
void mma_f16(float *d, const uint32_t *a, const uint32_t *b, Site site) {
    mma("mma_f16", d, a, b, mma_k16<f16>, site);
}
void mma_tf32(float *d, const uint32_t *a, const uint32_t *b, Site site) { mma("mma_tf32", d, a, b, mma_k8, site); }

struct MmaBytes {
    uint32_t *d;
    const uint32_t *a, *b, *c;
};

void mma_u8(uint32_t *d, const uint32_t *a, const uint32_t *b, const uint32_t *c, Site site) {
    whole_warp("mma_u8");
    auto compute = [](uint32_t, void *const *deposits) {
        uint32_t left[16][32], right[32][8];
        for (int l = 0; l < 32; l++) {
            auto *own = (const MmaBytes *)deposits[l];
            for (int byte = 0; byte < 4; byte++) {
                int g = l / 4, k = l % 4 * 4 + byte;
                for (int i = 0; i < 4; i++) left[g + i % 2 * 8][k + i / 2 * 16] = own->a[i] >> 8 * byte & 255;
                for (int i = 0; i < 2; i++) right[k + i * 16][g] = own->b[i] >> 8 * byte & 255;
            }
        }
        for (int l = 0; l < 32; l++) {
            auto *own = (const MmaBytes *)deposits[l];
            for (int i = 0; i < 4; i++) {
                uint32_t sum = own->c[i];
                for (int k = 0; k < 32; k++) sum += left[l / 4 + i / 2 * 8][k] * right[k][l % 4 * 2 + i % 2];
                own->d[i] = sum;
            }
        }
    };
    MmaBytes mma{d, a, b, c};
    collective("mma_u8", all_lanes, &mma, compute, site);
}
} // namespace host
