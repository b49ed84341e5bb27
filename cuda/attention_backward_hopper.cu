// Gradients of causal attention in bf16 on sm_90a: the sums of attention_backward.cu in its order, by wgmma from tiles
// that TMA brings, as in attention_hopper.cu. Heads of 64 or 128.
//
// A block has 128 rows: two warpgroups with 64 of them each go through the tiles on their own, so that one multiplies
// while the other takes exponentials; each has its own products under way meanwhile, too. Keys and values (or, of
// queries, q and dout, which are in registers then) stay, pairs of tiles of the others stream by. What rows behind a
// sequence's end are counts for nothing.
#include "attention_backward.cuh"
#include "attention_hopper.cuh"

#define STAGES ATTENTION_BACKWARD_HOPPER_STAGES

// A block's shared memory.
template <int D> struct Memory {
    static constexpr unsigned TILE = tile_bytes<D>, STAGE = 2 * TILE;
    unsigned char *resident; // two tensors of tiles [GROUPS]
    unsigned char *ring;     // [STAGES] of a tile of the first tensor and of the second
    float *scalars;          // [STAGES][2][TILE_ROWS]: of queries that stream by lse, times log_base, and delta
    uint64_t *resident_full, *full, *empty;

    __device__ __forceinline__ unsigned char *own(int tensor, unsigned group) const {
        return resident + (tensor * GROUPS + group) * TILE;
    }
};

template <bool OF_KEYS> using Block = BackwardBlock<OF_KEYS, GROUPS * TILE_ROWS, TILE_ROWS>;

// A warp.
template <int D, bool OF_KEYS>
__device__ __forceinline__ void produce(const attention_backward_hopper_params &params, const Memory<D> &memory,
                                        const Block<OF_KEYS> &block) {
    const attention_backward_params &p = params.attention;
    const attention_sequence &s = block.s;
    unsigned lane = lane_index();
    auto load_pair = [&](bool keys, unsigned char *first, unsigned char *second, uint64_t *barrier, int head, int row) {
        row += keys ? s.k_start : s.q_start;
        load_tile<D>(first, keys ? params.k : params.q, barrier, head * D, row);
        load_tile<D>(second, keys ? params.v : params.dout, barrier, head * D, row);
    };
    if (lane == 0) {
        mbarrier_arrive_expect(memory.resident_full, 2 * GROUPS * Memory<D>::TILE);
        for (int group = 0; group < GROUPS; group++)
            load_pair(OF_KEYS, memory.own(0, group), memory.own(1, group), memory.resident_full,
                      OF_KEYS ? block.kv_head : block.first_head, block.first_row + group * TILE_ROWS);
    }
    auto at = block.first_step();
    Stage stage(STAGES);
    for (int step = 0; step < block.steps; step++, stage.advance(), block.advance(at)) {
        float lse[2], delta[2];
        for (int i = 0; OF_KEYS && i < 2; i++) {
            int query = min(at.first + (int)lane + 32 * i, (int)s.q_len - 1);
            size_t of_query = (s.q_start + query) * (size_t)p.n_heads + at.head;
            lse[i] = p.lse[of_query], delta[i] = p.delta[of_query];
        }
        uint64_t *full = &memory.full[stage.slot];
        mbarrier_wait(&memory.empty[stage.slot], stage.parity ^ 1);
        if (lane == 0) {
            unsigned char *pair = memory.ring + stage.slot * Memory<D>::STAGE;
            mbarrier_arrive_expect(full, Memory<D>::STAGE);
            load_pair(!OF_KEYS, pair, pair + Memory<D>::TILE, full, OF_KEYS ? at.head : block.kv_head, at.first);
        }
        if (!OF_KEYS) continue;
        float *scalars = memory.scalars + stage.slot * 2 * TILE_ROWS + lane;
        for (int i = 0; i < 2; i++) {
            scalars[32 * i] = lse[i] * log_base<bf16>();
            scalars[TILE_ROWS + 32 * i] = delta[i];
        }
        mbarrier_arrive(full);
    }
}

// A warpgroup's rows of a resident tensor: keys and values leave no registers for themselves beside two gradients.
template <int D, bool OF_KEYS> struct Own {
    const unsigned char *tile;
    __device__ __forceinline__ Own(const unsigned char *tile_) : tile(tile_) {}
    __device__ __forceinline__ void start(float (&s)[1][TILE_ROWS / 8][4], const unsigned char *streamed) const {
        start_rows<D>(accumulators(s), tile, streamed);
    }
};
template <int D> struct Own<D, false> {
    uint32_t rows[D / 16][4];
    __device__ __forceinline__ Own(const unsigned char *tile) { load_rows<D>(rows, tile); }
    __device__ __forceinline__ void start(float (&s)[1][TILE_ROWS / 8][4], const unsigned char *streamed) const {
        start_rows<D>(accumulators(s), rows, streamed);
    }
};

// A thread's two rows: of the sequence, as keys are counted, and, of queries, lse times log_base and delta.
template <bool OF_KEYS> struct OwnRows {
    int row[2], place[2];
    float lse[2] = {}, delta[2] = {};

    __device__ __forceinline__ OwnRows(const attention_backward_params &p, const Block<OF_KEYS> &block) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            row[half] = block.first_row + (int)(warp_index() * 16 + lane_index() / 4) + 8 * half;
            int inside = OF_KEYS ? row[half] : min(row[half], block.last_row);
            place[half] = OF_KEYS ? inside : inside + block.past;
            if (OF_KEYS) continue;
            size_t of_row = (block.s.q_start + inside) * (size_t)p.n_heads + block.first_head;
            lse[half] = p.lse[of_row] * log_base<bf16>(), delta[half] = p.delta[of_row];
        }
    }
};

// Where a row of one of so many heads begins.
template <int D> __device__ __forceinline__ size_t row_start(uint32_t heads, uint32_t row, int head) {
    return (row * (size_t)heads + head) * D;
}

template <int D, bool OF_KEYS>
__device__ __forceinline__ void consume(const attention_backward_params &p, const Memory<D> &memory,
                                        const Block<OF_KEYS> &block, uint32_t *bad) {
    constexpr int N = TILE_ROWS, NT = D / 8;
    constexpr float ONE[1][2] = {{1.0f, 1.0f}};
    const attention_sequence &s = block.s;
    unsigned group = threadIdx.x / 128, lane = lane_index();
    OwnRows<OF_KEYS> rows(p, block);
    bool capped = p.softcap > 0.0f;
    Scans<4> scans{bad, 0}; // two words of the first tensor, two of the other
    mbarrier_wait(memory.resident_full, 0);
    Own<D, OF_KEYS> first_own(memory.own(0, group)), second_own(memory.own(1, group));
    // dk or dq, and dv.
    float first_gradient[1][NT][4] = {}, second_gradient[1][OF_KEYS ? NT : 2][4] = {};
    auto at = block.first_step();
    Stage stage(STAGES);
    for (int step = 0; step < block.steps; step++, stage.advance(), block.advance(at)) {
        unsigned char *x1 = memory.ring + stage.slot * Memory<D>::STAGE, *x2 = x1 + Memory<D>::TILE;
        int first = block.place_of(at);
        bool hidden = block.hides(first), any_bad = false;
        uint32_t *bad_here = scans.here();
        auto find = [&](bool clear) {
            find_not_finite_in_pieces<D>(x1, bad_here, clear);
            if (OF_KEYS) find_not_finite_in_pieces<D>(x2, bad_here + 2, clear);
        };
        mbarrier_wait(&memory.full[stage.slot], stage.parity);
        if (hidden) {
            find(false);
            scans.end();
            any_bad = (bad_here[0] | bad_here[1] | bad_here[2] | bad_here[3]) != 0;
        }
        float x[1][N / 8][4], dx[1][N / 8][4];
        first_own.start(x, x1);
        second_own.start(dx, x2);
        wgmma_wait<1>();
        const float *of_columns = memory.scalars + stage.slot * 2 * N + lane % 4 * 2;
        auto lse = [&](int n, int e) { return OF_KEYS ? of_columns[8 * n + e % 2] : rows.lse[e / 2]; };
        auto delta = [&](int n, int e) { return OF_KEYS ? of_columns[N + 8 * n + e % 2] : rows.delta[e / 2]; };
        if (capped) {
            wgmma_wait<0>();
            capped_gradients<bf16, N>(x, dx, p, lse, delta);
        } else probabilities<bf16, N>(x, p, lse);
        if (hidden) hide<N>(x, block, rows.place, first);
        if (any_bad) {
            wgmma_wait<0>();
            barrier_sync(1, CONSUMERS); // all have their products
            find(true);
            fence_proxy_async();
            barrier_sync(1, CONSUMERS);
        }
        Left<bf16, 1, N> left, second_left;
        if constexpr (OF_KEYS) {
            second_left.set(x, nullptr);
            start_product<D>(accumulators(second_gradient), second_left, x2, true);
        }
        wgmma_wait<OF_KEYS ? 1 : 0>();
        if (!capped) score_gradients<N>(x, dx, p, delta);
        if (hidden) hide<N>(dx, block, rows.place, first);
        left.set(dx, nullptr);
        start_product<D>(accumulators(first_gradient), left, x1, true);
        wgmma_wait<0>();
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&memory.empty[stage.slot]);
        if (any_bad) {
            auto sees = [&](int, int half, int other) { return block.sees(rows.place[half], first + other); };
            auto streamed = [&](const void *queries, const void *keys) {
                size_t start = OF_KEYS ? row_start<D>(p.n_heads, s.q_start + at.first, at.head)
                                       : row_start<D>(p.n_kv_heads, s.k_start + at.first, block.kv_head);
                const bf16 *base = (const bf16 *)(OF_KEYS ? queries : keys) + start;
                return Rows<bf16>{base, (size_t)(OF_KEYS ? p.n_heads : p.n_kv_heads) * D, N};
            };
            if constexpr (OF_KEYS)
                add_not_finite<bf16>(second_gradient, second_left, ONE, bad_here + 2, streamed(p.dout, p.v), 0, D,
                                     sees);
            add_not_finite<bf16>(first_gradient, left, ONE, bad_here, streamed(p.q, p.k), 0, D, sees);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = rows.row[half];
        if (row > block.last_row) continue;
        size_t start = OF_KEYS ? row_start<D>(p.n_kv_heads, s.k_start + row, block.kv_head)
                               : row_start<D>(p.n_heads, s.q_start + row, block.first_head);
        store_gradient((bf16 *)(OF_KEYS ? p.dk : p.dq) + start, first_gradient[0], half, 0, D, true);
        if constexpr (OF_KEYS) store_gradient((bf16 *)p.dv + start, second_gradient[0], half, 0, D, true);
    }
}

// Grid: tiles of rows of each head, those with most work of all heads first; sequences.
template <int D, bool OF_KEYS>
__device__ __forceinline__ void attention_backward_hopper(const attention_backward_hopper_params &params) {
    const attention_backward_params &p = params.attention;
    DYNAMIC_SHARED(tiles);
    SHARED(uint64_t, barriers, 1 + 2 * STAGES);
    SHARED(float, scalars, OF_KEYS ? 2 * TILE_ROWS * STAGES : 1);
    SHARED(uint32_t, bad, 3 * 4);
    unsigned heads = OF_KEYS ? p.n_kv_heads : p.n_heads;
    Block<OF_KEYS> block(p, blockIdx.x / heads, blockIdx.x % heads);
    if (!block.exists) return;
    unsigned char *ring = tiles + 2 * GROUPS * Memory<D>::TILE;
    Memory<D> memory{tiles, ring, scalars, barriers, barriers + 1, barriers + 1 + STAGES};
    if (threadIdx.x == 0) {
        mbarrier_init(memory.resident_full, 1);
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(&memory.full[i], OF_KEYS ? 1 + 32 : 1);
            mbarrier_init(&memory.empty[i], CONSUMERS / 32);
        }
        fence_mbarrier_init();
    }
    if (threadIdx.x < 3 * 4) bad[threadIdx.x] = 0;
    __syncthreads();
    if (threadIdx.x >= CONSUMERS) {
        fewer_registers<24>();
        if (threadIdx.x < CONSUMERS + 32) produce<D>(params, memory, block);
    } else {
        more_registers<240>();
        consume<D>(p, memory, block, bad);
    }
}

#define KERNELS(D)                                                                                                     \
    KERNEL(attention_backward_keys_hopper_##D, attention_backward_hopper_params, THREADS, 1) {                         \
        if constexpr (HOPPER_CHIP) attention_backward_hopper<D, true>(p);                                              \
    }                                                                                                                  \
    KERNEL(attention_backward_queries_hopper_##D, attention_backward_hopper_params, THREADS, 1) {                      \
        if constexpr (HOPPER_CHIP) attention_backward_hopper<D, false>(p);                                             \
    }
KERNELS(64)
KERNELS(128)
