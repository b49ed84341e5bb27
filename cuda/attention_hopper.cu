// Causal attention with grouped heads, forward, in bf16 on sm_90a: the sums of attention.cu in its order, by wgmma from
// tiles that TMA brings. Heads of 64 or 128, every row of a head at a multiple of 16 bytes.
//
// A block has 128 queries of a head: one thread keeps rings of keys and values full, two warpgroups have 64 queries each
// and go through the tiles on their own, so that one multiplies while the other takes exponentials. Tiles are pieces of 64
// rows x 64 columns in lines of 128 bytes, swizzled. Rows behind a sequence's end are those of its neighbours: queries
// are not stored, keys are hidden, and what values have that is not finite is taken out as elsewhere.
#include "attention_forward.cuh"
#include "attention_hopper.cuh"

#define STAGES ATTENTION_HOPPER_STAGES

template <int D> struct Rings {
    static constexpr unsigned TILE = tile_bytes<D>;
    unsigned char *q, *k, *v; // tiles [GROUPS], [STAGES], [STAGES]
    uint64_t *q_full, *k_full, *k_empty, *v_full, *v_empty;

    // A tile to stage `count` modulo STAGES, when its last one is no longer read.
    __device__ __forceinline__ static void load_stage(unsigned char *ring, const tensor_map &map, uint64_t *full,
                                                      uint64_t *empty, unsigned count, int column, int row) {
        unsigned slot = count % STAGES;
        mbarrier_wait(&empty[slot], count / STAGES % 2 ^ 1);
        mbarrier_arrive_expect(&full[slot], TILE);
        load_tile<D>(ring + slot * TILE, map, &full[slot], column, row);
    }
};

// What a block computes.
struct Range {
    int first_row, last_row, past, first_tile, last_tile;
};

template <int D>
__device__ __forceinline__ void produce(const attention_hopper_params &p, const Rings<D> &rings, const Range &range,
                                        const attention_sequence &s, int head, int kv_head) {
    mbarrier_arrive_expect(rings.q_full, GROUPS * Rings<D>::TILE);
    for (int group = 0; group < GROUPS; group++)
        load_tile<D>(rings.q + group * Rings<D>::TILE, p.q, rings.q_full, head * D,
                     (int)s.q_start + range.first_row + group * TILE_ROWS);
    for (int tile = range.first_tile; tile <= range.last_tile; tile++) {
        unsigned count = tile - range.first_tile;
        int row = (int)s.k_start + tile * TILE_ROWS;
        rings.load_stage(rings.k, p.k, rings.k_full, rings.k_empty, count, kv_head * D, row);
        rings.load_stage(rings.v, p.v, rings.v_full, rings.v_empty, count, kv_head * D, row);
    }
}

template <int D>
__device__ __forceinline__ void consume(const attention_params &p, const Rings<D> &rings, const Range &range,
                                        const attention_sequence &s, int head, int kv_head, uint32_t *bad) {
    unsigned group = threadIdx.x / 128, lane = lane_index();
    int warp_row = range.first_row + (int)(warp_index() * 16 + lane / 4);
    float o[1][D / 8][4] = {};
    Softmax rows[2] = {{-INFINITY, 0.0f}, {-INFINITY, 0.0f}};
    auto position = [&](int, int half) { return warp_row + range.past + 8 * half; };
    auto release = [&](uint64_t *empty) {
        __syncwarp();
        if (lane == 0) mbarrier_arrive(empty);
    };
    Scans<2> scans{bad, 0};
    mbarrier_wait(rings.q_full, 0);
    for (int tile = range.first_tile; tile <= range.last_tile; tile++) {
        unsigned count = tile - range.first_tile, slot = count % STAGES, parity = count / STAGES % 2;
        int first_key = tile * TILE_ROWS;
        bool hidden = first_key + TILE_ROWS - 1 > range.first_row + range.past || first_key <= range.last_row + range.past - p.window;
        float x[1][TILE_ROWS / 8][4], alpha[1][2], beta[1][2];
        mbarrier_wait(&rings.k_full[slot], parity);
        start_rows<D>(accumulators(x), rings.q + group * Rings<D>::TILE, rings.k + slot * Rings<D>::TILE);
        wgmma_wait<0>();
        release(&rings.k_empty[slot]);
        scores<bf16, 1, TILE_ROWS>(x, p, first_key, position, hidden);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float top, sum = exponentials<bf16, TILE_ROWS>(x[0], half, top);
            rows[half].fold<bf16>(top, sum, alpha[0][half], beta[0][half]);
        }
        Left<bf16, 1, TILE_ROWS> left;
        left.set(x, nullptr);
        unsigned char *values = rings.v + slot * Rings<D>::TILE;
        mbarrier_wait(&rings.v_full[slot], parity);
        uint32_t *bad_here = scans.here();
        if (hidden) {
            find_not_finite_in_pieces<D>(values, bad_here, true);
            fence_proxy_async();
            scans.end();
        }
        float product[1][D / 8][4];
        start_product<D>(accumulators(product), left, values, false);
        wgmma_wait<0>();
        release(&rings.v_empty[slot]);
        rescale(o, alpha);
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) o[0][n][e] = fmaf(product[0][n][e], beta[0][e / 2], o[0][n][e]);
        if (hidden && (bad_here[0] | bad_here[1]) != 0) {
            auto sees = [&](int m, int half, int key) {
                return is_visible(first_key + key, position(m, half), p.window);
            };
            add_not_finite<bf16>(o, left, beta, bad_here, key_rows<bf16>(p.v, p, s, kv_head, first_key), 0, D, sees);
        }
    }
    size_t ld = (size_t)p.n_heads * D;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = warp_row + 8 * half;
        if (row > range.last_row) continue;
        float share = 1.0f / rows[half].sum;
        bf16 *out = (bf16 *)p.out + (s.q_start + row) * ld + (size_t)head * D;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            // A tile that a row doesn't see may make -0 +0; so + 0.
            float pair[2] = {o[0][n][2 * half] + 0.0f, o[0][n][2 * half + 1] + 0.0f};
            store_pair(out, 8 * n + lane % 4 * 2, D, true, pair[0] * share, pair[1] * share);
        }
        if (lane % 4 == 0) p.lse[(s.q_start + row) * (size_t)p.n_heads + head] = log_sum<bf16>(rows[half]);
    }
}

// Grid: tiles of queries, the last of a sequence first as it has most keys; heads; sequences.
template <int D> __device__ __forceinline__ void attention_hopper(const attention_hopper_params &params) {
    const attention_params &p = params.attention;
    DYNAMIC_SHARED(memory);
    SHARED(uint64_t, barriers, 1 + 4 * STAGES);
    SHARED(uint32_t, bad, 6);
    attention_sequence s = p.sequences[blockIdx.z];
    constexpr int ROWS = GROUPS * TILE_ROWS;
    int n_tiles = ((int)s.q_len + ROWS - 1) / ROWS, head = blockIdx.y, kv_head = head / (p.n_heads / p.n_kv_heads);
    if ((int)blockIdx.x >= n_tiles) return;
    Range range;
    range.first_row = (n_tiles - 1 - (int)blockIdx.x) * ROWS, range.past = s.k_len - s.q_len;
    range.last_row = min(range.first_row + ROWS, (int)s.q_len) - 1;
    range.first_tile = max(0, range.first_row + range.past - p.window + 1) / TILE_ROWS;
    range.last_tile = (range.last_row + range.past) / TILE_ROWS;
    uint64_t *k_full = barriers + 1;
    unsigned char *k = memory + GROUPS * Rings<D>::TILE;
    Rings<D> rings{memory, k, k + STAGES * Rings<D>::TILE, barriers, k_full, k_full + STAGES, k_full + 2 * STAGES, k_full + 3 * STAGES};
    if (threadIdx.x == 0) {
        mbarrier_init(rings.q_full, 1);
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(&rings.k_full[i], 1);
            mbarrier_init(&rings.v_full[i], 1);
            mbarrier_init(&rings.k_empty[i], CONSUMERS / 32);
            mbarrier_init(&rings.v_empty[i], CONSUMERS / 32);
        }
        fence_mbarrier_init();
    }
    if (threadIdx.x < 6) bad[threadIdx.x] = 0;
    __syncthreads();
    if (threadIdx.x >= CONSUMERS) {
        fewer_registers<40>();
        if (threadIdx.x == CONSUMERS) produce<D>(params, rings, range, s, head, kv_head);
    } else {
        more_registers<232>();
        consume<D>(p, rings, range, s, head, kv_head, bad);
    }
}

#define KERNELS(D)                                                                                                     \
    KERNEL(attention_hopper_##D, attention_hopper_params, THREADS, 1) {                                                \
        if constexpr (HOPPER_CHIP) attention_hopper<D>(p);                                                             \
    }
KERNELS(64)
KERNELS(128)
