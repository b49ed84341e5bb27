// Matrix products in bf16 arithmetic on sm_90a, by wgmma from tiles that TMA brings; the sums are gemm.cu's, in its order.
//
// wgmma's rows are columns of the result, so a decoded weight can be its A in registers. A block has a tile of ROWS x
// COLUMNS of the result: one warp's thread keeps a ring of stages full, two warpgroups have half of the columns each.
// Either the two blocks of a cluster have neighbouring columns, and each brings half of the left operand's tile to
// both; then a block goes on to further tiles, whose first stages arrive while it still writes results. Or, where there
// are too few tiles for all multiprocessors, the four blocks of a cluster have the same tile, each one part of its sum.
#include "decode_quads.cuh"
#include "gemm.cuh"
#include "wgmma.cuh"

#define COLUMNS 128
#define CONSUMERS 256
#define THREADS (CONSUMERS + 128)
#define LINE 128        // bytes of a line of a swizzled tile: 64 elements
#define CHUNK_ROWS 32   // of the result, that a warpgroup stages at once
#define STAGED_COLUMNS (COLUMNS / 2 + 4)
#define SPLIT_COLUMNS (COLUMNS + 4)
#define STEPS (TILE_K / 16)
#define PAIR_COPIES 4   // log2

// ROWS_: of the result, in a tile. CODE_BITS_: 4 or 8 if one term's right operand is of such codes, else 0. SPLIT_: the blocks
// of a cluster have parts of a sum.
template <int ROWS_, int CODE_BITS_, bool A_K_MAJOR_, bool B_K_MAJOR_, bool SPLIT_> struct Kind {
    static constexpr int ROWS = ROWS_, CODE_BITS = CODE_BITS_, CLUSTER = SPLIT_ ? PARTS : 2;
    static constexpr bool CODES = CODE_BITS_ != 0, A_K_MAJOR = A_K_MAJOR_, B_K_MAJOR = B_K_MAJOR_, SPLIT = SPLIT_;
    static constexpr unsigned A_BYTES = ROWS * LINE, B_BYTES = COLUMNS * LINE, STAGE_BYTES = A_BYTES + B_BYTES;
    static constexpr unsigned CODE_BYTES = COLUMNS * TILE_K * CODE_BITS / 8;
    static constexpr unsigned PAIRS = CODE_BITS == 4 ? 256 * sizeof(float2) << PAIR_COPIES : 0;
};

template <class K> struct Block {
    const gemm_hopper_params &p;
    unsigned char *const ring; // [stages][A, B]
    uint64_t *const full, *const empty;
    const unsigned rank; // in the cluster

    __device__ __forceinline__ unsigned char *a_tile(const Stage &stage) const { return ring + stage.slot * K::STAGE_BYTES; }
    __device__ __forceinline__ unsigned char *b_tile(const Stage &stage) const { return a_tile(stage) + K::A_BYTES; }
    // Behind the ring: results on their way, scales of lines where rows are contracted, the tables for decoding.
    __device__ __forceinline__ unsigned char *staged() const { return ring + p.stages * K::STAGE_BYTES; }
    __device__ __forceinline__ unsigned char *scales() const {
        return staged() + (K::SPLIT ? 0 : 2 * CHUNK_ROWS * STAGED_COLUMNS * sizeof(float));
    }
    __device__ __forceinline__ unsigned char *tables() const {
        return scales() + (K::CODES && !K::B_K_MAJOR ? CONSUMERS / 32 * TILE_K * sizeof(float2) : 0);
    }

    __device__ __forceinline__ unsigned tile() const { return blockIdx.x / K::CLUSTER; }
    __device__ __forceinline__ unsigned tile_step() const { return gridDim.x / K::CLUSTER; }

    __device__ __forceinline__ Place place_of(unsigned tile) const {
        Place place = Place::at(p.gemm, tile, K::ROWS, K::SPLIT ? COLUMNS : 2 * COLUMNS);
        if (!K::SPLIT) place.column += rank * COLUMNS;
        return place;
    }
    // The tiles of the contraction that are this block's.
    __device__ __forceinline__ unsigned begin(const Parts &parts) const { return K::SPLIT ? parts.begin(rank) : 0; }
    __device__ __forceinline__ unsigned end(const Parts &parts) const {
        return K::SPLIT ? parts.begin(rank + 1) : parts.tiles;
    }

    __device__ __forceinline__ void load(void *to, const tensor_map *map, uint64_t *barrier, int x, int y) const {
        if constexpr (K::SPLIT) tma_load_2d(to, map, barrier, x, y);
        else tma_load_2d_multicast(to, map, barrier, x, y, 3);
    }

    // Half of the left operand's tile.
    __device__ __forceinline__ void load_a(const Stage &stage, const tensor_map *map, int row, int k, int half) const {
        unsigned char *to = a_tile(stage);
        uint64_t *barrier = &full[stage.slot];
        if constexpr (K::A_K_MAJOR) {
            load(to + half * (K::A_BYTES / 2), map, barrier, k, row + half * (K::ROWS / 2));
        } else {
#pragma unroll
            for (int i = 0; i < K::ROWS / 64; i++)
                load(to + i * 64 * LINE + half * 32 * LINE, map, barrier, row + 64 * i, k + 32 * half);
        }
    }

    __device__ __forceinline__ void load_b(const Stage &stage, const tensor_map *map, int column, int k, bool codes) const {
        unsigned char *to = b_tile(stage);
        uint64_t *barrier = &full[stage.slot];
        if (codes) {
            if constexpr (K::B_K_MAJOR) tma_load_2d(to, map, barrier, k * K::CODE_BITS / 8, column);
            else tma_load_2d(to, map, barrier, column * K::CODE_BITS / 8, k);
        } else if constexpr (K::B_K_MAJOR) {
            tma_load_2d(to, map, barrier, k, column);
        } else {
#pragma unroll
            for (int i = 0; i < COLUMNS / 64; i++) tma_load_2d(to + i * 64 * LINE, map, barrier, column + 64 * i, k);
        }
    }

    // Keeps the ring full.
    __device__ __forceinline__ void produce() const {
        Stage stage(p.stages);
        for (unsigned tile = this->tile(); tile < p.tiles; tile += tile_step()) {
            Place place = place_of(tile);
            Parts parts(place.problem);
            Cursor at = cursor_at(place.problem, begin(parts));
            for (unsigned i = begin(parts); i < end(parts); i++) {
                const tensor_map *maps = p.tensor_maps[&place.problem - p.gemm.problems][at.term];
                bool codes = K::CODES && at.here().b.type == TYPE_QUANTIZED;
                mbarrier_wait(&empty[stage.slot], stage.parity ^ 1);
                mbarrier_arrive_expect(&full[stage.slot], K::A_BYTES + (codes ? K::CODE_BYTES : K::B_BYTES));
                load_b(stage, &maps[1], (int)place.column, (int)at.k, codes);
                if constexpr (K::SPLIT) load_a(stage, &maps[0], (int)place.row, (int)at.k, 0);
                load_a(stage, &maps[0], (int)place.row, (int)at.k, K::SPLIT ? 1 : rank);
                at.advance();
                stage.advance();
            }
        }
    }
};

// A warpgroup that multiplies: 64 columns of a tile.
template <class K> struct Consumer {
    static constexpr int SUMS = K::ROWS / 2; // of a thread
    using Sum = float[SUMS];
    using Fragments = uint32_t[STEPS][4];

    const Block<K> &block;
    const unsigned group, warp, lane; // of the block, in the group, in the warp
    const PairTable table;
    Stage stage;

    __device__ __forceinline__ Consumer(const Block<K> &block)
        : block(block), group(threadIdx.x / 128), warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32),
          table{(const float2 *)block.tables(), PAIR_COPIES}, stage(block.p.stages) {}

    __device__ __forceinline__ unsigned thread() const { return warp * 32 + lane; }
    __device__ __forceinline__ void sync() const { barrier_sync(2 + group, 128); }
    __device__ __forceinline__ float *map() const { return (float *)(block.tables() + K::PAIRS); }

    // The column in the group's 64 of wgmma's row 16 warp + lane / 4, or of the row 8 further. Where the rows of codes are
    // contracted, a lane reads neighbouring columns, so there these are its two rows'.
    __device__ __forceinline__ unsigned column(int upper) const {
        if (!K::CODES || K::B_K_MAJOR) return 16 * warp + lane / 4 + 8 * upper;
        if (K::CODE_BITS == 8) return 16 * warp + 2 * (lane / 4) + upper;
        return 32 * (warp / 2) + 4 * (lane / 4) + 2 * (warp % 2) + upper;
    }

    // ---- codes ----

    // Of the next tile; where rows are contracted those of the lines `lane` and `lane` + 32.
    using Constants = BlockConstants[K::B_K_MAJOR ? 1 : 2];

    __device__ __forceinline__ void load_constants_of(Constants &constants, const Place &place, const Cursor &at) const {
        const quantized_matrix &q = at.here().quantized;
        if constexpr (K::B_K_MAJOR) {
            constants[0] =
                QuadScales<false>::load(q, place.column + 64 * group + column(0), place.problem.n, at.k);
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint64_t row = at.k + lane + 32 * i, col = place.column + 64 * group + 32 * (warp / 2);
                bool inside = row < at.here().k && col < place.problem.n;
                constants[i] = BlockConstants{0.0f, 0.0f, ~0u};
                if (inside) constants[i] = load_constants<false>(q, block_of(q, row, col));
            }
        }
    }

    // W is [n, k].
    __device__ __forceinline__ void decode_columns(Fragments &fragments, const quantized_matrix &q,
                                                   const Constants &constants) const {
        const unsigned char *codes = block.b_tile(stage);
        unsigned first = 64 * group + column(0), t = lane % 4;
        if constexpr (K::CODE_BITS == 4) {
            uint2 bytes[2];
#pragma unroll
            for (int r = 0; r < 2; r++) bytes[r] = *(const uint2 *)(codes + (first + 8 * r) * (TILE_K / 2) + 8 * t);
            const QuadCodes own(q, Exchange(), bytes, constants[0], map());
#pragma unroll
            for (int step = 0; step < STEPS; step++) own.decode(fragments[step], table, step);
        } else {
            const QuadScales<false> scales(q, constants[0], map());
#pragma unroll
            for (int step = 0; step < STEPS; step++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    // Rows of 64 bytes, swizzled by TMA.
                    unsigned row = first + i % 2 * 8, chunk = step ^ (row / 2 & 3);
                    uint32_t two = *(const uint16_t *)(codes + row * TILE_K + chunk * 16 + i / 2 * 8 + 2 * t);
                    float scale = scales.scale[i % 2][step / 2];
                    fragments[step][i] = pack_bf16(level_of_byte(two & 255, q.format) * scale,
                                                   level_of_byte(two >> 8, q.format) * scale);
                }
        }
    }

    // W is [k, n].
    __device__ __forceinline__ void decode_rows(Fragments &fragments, const quantized_matrix &q,
                                                const Constants &constants) const {
        const unsigned char *codes = block.b_tile(stage);
        constexpr unsigned BYTES = COLUMNS * K::CODE_BITS / 8, CHUNKS = BYTES / 16; // of a line
        float2 *scales = (float2 *)block.scales() + (group * 4 + warp) * TILE_K;    // and zero points, of lines
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float scale = constants[i].nested == ~0u ? 0.0f : scale_of(q, constants[i], map());
            scales[lane + 32 * i] = make_float2(scale, constants[i].zero);
        }
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // Swizzled by TMA. Of 16 bytes the warp has all, or, of four bits, every second one.
            unsigned line = lane + 32 * half, chunk = (4 * group + warp) * CHUNKS / 8;
            uint32_t r[4];
            ldmatrix_x4_trans(r, codes + line * BYTES + (chunk ^ (line * CHUNKS / 8 & (CHUNKS - 1))) * 16);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                // Both columns of the lines 8 i + 2 t and the next.
                const float4 two = *(const float4 *)&scales[32 * half + 8 * i + 2 * (lane % 4)];
                float2 even, odd;
                if constexpr (K::CODE_BITS == 4) {
                    even = table(r[i] >> 8 * (warp % 2) & 255), odd = table(r[i] >> (16 + 8 * (warp % 2)) & 255);
                    if (q.zeros) {
                        even = make_float2(even.x - two.y, even.y - two.y);
                        odd = make_float2(odd.x - two.w, odd.y - two.w);
                    }
                } else {
                    even = make_float2(level_of_byte(r[i] & 255, q.format), level_of_byte(r[i] >> 8 & 255, q.format));
                    odd = make_float2(level_of_byte(r[i] >> 16 & 255, q.format), level_of_byte(r[i] >> 24, q.format));
                }
                uint32_t(&a)[4] = fragments[2 * half + i / 2];
                a[i % 2 * 2] = pack_bf16(even.x * two.x, odd.x * two.z);
                a[i % 2 * 2 + 1] = pack_bf16(even.y * two.x, odd.y * two.z);
            }
        }
    }

    __device__ __forceinline__ void decode(Fragments &fragments, const quantized_matrix &q,
                                           const Constants &constants) const {
        if constexpr (K::B_K_MAJOR) decode_columns(fragments, q, constants);
        else decode_rows(fragments, q, constants);
    }

    // The same of a tile of bf16, so that its columns have the order of the codes' ones.
    __device__ __forceinline__ void gather(Fragments &fragments) const {
        const unsigned char *tile = block.b_tile(stage) + group * 64 * LINE;
        unsigned first = column(0);
        auto both_columns = [&](unsigned line) {
            return *(const uint32_t *)(tile + line * LINE + (first / 8 ^ line % 8) * 16 + first % 8 * 2);
        };
#pragma unroll
        for (int i = 0; i < 2 * STEPS; i++) {
            unsigned line = 8 * i + 2 * (lane % 4);
            uint32_t even = both_columns(line), odd = both_columns(line + 1);
            fragments[i / 2][i % 2 * 2] = prmt(even, odd, 0x5410);
            fragments[i / 2][i % 2 * 2 + 1] = prmt(even, odd, 0x7632);
        }
    }

    // ---- the sum ----

    // This warp no longer reads a stage.
    __device__ __forceinline__ void release(unsigned slot) const {
        if constexpr (K::SPLIT) {
            if (lane == 0) mbarrier_arrive(&block.empty[slot]);
        } else if (lane < K::CLUSTER) {
            mbarrier_arrive_remote(&block.empty[slot], lane);
        }
    }

    // Adds the tiles [from, end) of the contraction, of which there are some, to nothing.
    __device__ __forceinline__ void add(Sum &sum, const Place &place, unsigned from, unsigned end) {
        Cursor at = cursor_at(place.problem, from);
        Constants constants = {};
        Fragments fragments;
        auto is_codes = [&] { return K::CODES && at.here().b.type == TYPE_QUANTIZED; };
        if (is_codes()) load_constants_of(constants, place, at);
        for (unsigned tile = from; tile < end; tile++) {
            mbarrier_wait(&block.full[stage.slot], stage.parity);
            bool codes = is_codes();
            if constexpr (K::CODES) {
                // Fragments are still read by what is under way.
                wgmma_wait<0>();
                if (tile > from) release(stage.slot_before());
                if (codes) decode(fragments, at.here().quantized, constants);
                else if constexpr (!K::B_K_MAJOR) gather(fragments);
            }
            uint64_t a = wgmma_descriptor(block.a_tile(stage), 64 * LINE, 8 * LINE, WGMMA_SWIZZLE_128);
            constexpr unsigned A_STEP = K::A_K_MAJOR ? 32 : 16 * LINE, B_STEP = K::B_K_MAJOR ? 32 : 16 * LINE;
            if (codes || (K::CODES && !K::B_K_MAJOR)) {
                wgmma_fence();
#pragma unroll
                for (int step = 0; step < STEPS; step++)
                    wgmma_bf16<K::ROWS, !K::A_K_MAJOR>(sum, fragments[step], wgmma_advance(a, step * A_STEP),
                                                       tile > from || step > 0);
                wgmma_commit();
            } else {
                const unsigned char *own = block.b_tile(stage) + group * 64 * LINE;
                uint64_t b = wgmma_descriptor(own, 64 * LINE, 8 * LINE, WGMMA_SWIZZLE_128);
                wgmma_fence();
#pragma unroll
                for (int step = 0; step < STEPS; step++)
                    wgmma_bf16<K::ROWS, !K::B_K_MAJOR, !K::A_K_MAJOR>(
                        sum, wgmma_advance(b, step * B_STEP), wgmma_advance(a, step * A_STEP), tile > from || step > 0);
                wgmma_commit();
            }
            at.advance();
            if constexpr (K::CODES) {
                if (tile + 1 < end && is_codes()) load_constants_of(constants, place, at);
            } else {
                wgmma_wait<1>();
                if (tile > from) release(stage.slot_before());
            }
            stage.advance();
        }
        wgmma_wait<0>();
        release(stage.slot_before());
    }

    // ---- results ----

    __device__ __forceinline__ void finish(const gemm_problem &problem, uint64_t row, uint64_t column,
                                           float (&x)[PACK]) const {
        if (row >= problem.m || column >= problem.n) return;
        if (problem.out_type == TYPE_F32) finish_pack<float>(problem, row, column, x);
        else finish_pack<bf16>(problem, row, column, x);
    }

    // Writes the sums to a tile in shared memory, rows of `stride` elements, of CHUNK_ROWS rows from `first` on.
    __device__ __forceinline__ void stage_rows(float *to, unsigned stride, const Sum &sum, int first) const {
#pragma unroll
        for (int i = 0; i < CHUNK_ROWS / 2; i++) {
            unsigned row = i / 4 * 8 + lane % 4 * 2 + i % 2;
            to[row * stride + column(i / 2 % 2)] = sum[first / 2 + i];
        }
    }

    __device__ __forceinline__ void write(const Place &place, const Sum &sum) const {
        float *staged = (float *)block.staged() + group * CHUNK_ROWS * STAGED_COLUMNS;
        // One copy of the code for all chunks, which would fill the cache of instructions; which sums they have is chosen.
#pragma unroll 1
        for (int first = 0; first < K::ROWS; first += CHUNK_ROWS) {
            sync();
#pragma unroll
            for (int chunk = 0; chunk < K::ROWS; chunk += CHUNK_ROWS)
                if (chunk == first) stage_rows(staged, STAGED_COLUMNS, sum, chunk);
            sync();
            for (unsigned i = thread(); i < CHUNK_ROWS * 64 / PACK; i += 128) {
                unsigned row = i / (64 / PACK), col = i % (64 / PACK) * PACK;
                float x[PACK];
#pragma unroll
                for (int j = 0; j < PACK; j++) x[j] = staged[row * STAGED_COLUMNS + col + j];
                finish(place.problem, place.row + first + row, place.column + 64 * group + col, x);
            }
        }
    }

    // Every block joins the parts of its share of the rows.
    __device__ __forceinline__ void join(const Place &place, const Sum &sum) const {
        barrier_sync(1, CONSUMERS); // the ring is read
        float *parts = (float *)block.ring; // [ROWS][SPLIT_COLUMNS]
#pragma unroll
        for (int first = 0; first < K::ROWS; first += CHUNK_ROWS)
            stage_rows(parts + first * SPLIT_COLUMNS + 64 * group, SPLIT_COLUMNS, sum, first);
        cluster_arrive();
        cluster_wait();
        constexpr unsigned SHARE = K::ROWS / PARTS, PACKS = COLUMNS / PACK;
        for (unsigned i = group * 128 + thread(); i < SHARE * PACKS; i += CONSUMERS) {
            unsigned row = block.rank * SHARE + i / PACKS, col = i % PACKS * PACK;
            float x[PACK] = {};
#pragma unroll
            for (int part = 0; part < PARTS; part++)
#pragma unroll
                for (int j = 0; j < PACK; j += 4) {
                    float4 v = load_remote((const float4 *)(parts + row * SPLIT_COLUMNS + col + j), part);
                    x[j] = x[j] + v.x, x[j + 1] = x[j + 1] + v.y, x[j + 2] = x[j + 2] + v.z, x[j + 3] = x[j + 3] + v.w;
                }
            finish(place.problem, place.row + row, place.column + col, x);
        }
    }

    __device__ __forceinline__ void consume() {
        const gemm_problem *of_tables = nullptr;
        for (unsigned tile = block.tile(); tile < block.p.tiles; tile += block.tile_step()) {
            Place place = block.place_of(tile);
            if (K::CODES && of_tables != &place.problem) {
                of_tables = &place.problem;
                barrier_sync(1, CONSUMERS); // the old ones are not read any more
                fill_tables((float2 *)block.tables(), map(), PAIR_COPIES, place.problem, threadIdx.x, CONSUMERS);
                barrier_sync(1, CONSUMERS);
            }
            Parts parts(place.problem);
            Sum sum = {};
            if constexpr (K::SPLIT) {
                if (block.begin(parts) < block.end(parts)) add(sum, place, block.begin(parts), block.end(parts));
                join(place, sum);
            } else {
                Sum total = {};
                for (unsigned from = 0; from < parts.tiles; from = parts.end_of(from)) {
                    add(sum, place, from, parts.end_of(from));
#pragma unroll
                    for (int i = 0; i < SUMS; i++) total[i] = total[i] + sum[i];
                }
                write(place, total);
            }
        }
    }
};

template <class K> __device__ __forceinline__ void gemm_hopper(const gemm_hopper_params &p) {
    DYNAMIC_SHARED(memory);
    SHARED(uint64_t, full, GEMM_HOPPER_MAX_STAGES);
    SHARED(uint64_t, empty, GEMM_HOPPER_MAX_STAGES);
    Block<K> block{p, memory, full, empty, cluster_rank()};
    if (threadIdx.x == 0) {
        for (unsigned i = 0; i < p.stages; i++) {
            mbarrier_init(&full[i], 1);
            mbarrier_init(&empty[i], CONSUMERS / 32 * (K::SPLIT ? 1 : K::CLUSTER));
        }
        fence_mbarrier_init();
    }
    // No block reaches into another one before that is there, nor after it has left.
    cluster_arrive();
    cluster_wait();
    if (threadIdx.x >= CONSUMERS) {
        fewer_registers<40>();
        if (threadIdx.x == CONSUMERS) block.produce();
        __syncwarp();
        if (K::SPLIT) {
            cluster_arrive();
            cluster_wait();
        }
    } else {
        more_registers<232>();
        Consumer<K>(block).consume();
        __syncwarp();
    }
    cluster_arrive();
    cluster_wait();
}

#define GEMM_HOPPER(name, ...)                                                                                         \
    KERNEL(name, gemm_hopper_params, THREADS, 1) {                                                                     \
        if constexpr (HOPPER_CHIP) gemm_hopper<Kind<__VA_ARGS__>>(p);                                                  \
    }
#define GEMMS_HOPPER(name, rows, split)                                                                                \
    GEMM_HOPPER(name##bf16_##rows##_nt, rows, 0, true, true, split)                                                    \
    GEMM_HOPPER(name##bf16_##rows##_nn, rows, 0, true, false, split)                                                   \
    GEMM_HOPPER(name##bf16_##rows##_tn, rows, 0, false, false, split)                                                  \
    GEMM_HOPPER(name##codes4_##rows##_nt, rows, 4, true, true, split)                                                  \
    GEMM_HOPPER(name##codes4_##rows##_nn, rows, 4, true, false, split)                                                 \
    GEMM_HOPPER(name##codes8_##rows##_nt, rows, 8, true, true, split)                                                  \
    GEMM_HOPPER(name##codes8_##rows##_nn, rows, 8, true, false, split)
GEMMS_HOPPER(gemm_hopper_, 128, false)
GEMMS_HOPPER(gemm_hopper_, 192, false)
GEMMS_HOPPER(gemm_hopper_split_, 128, true)
