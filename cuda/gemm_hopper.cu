// Matrix products in bf16 arithmetic on sm_90a, by wgmma from tiles that TMA brings; the sums are gemm.cu's, in its order.
//
// wgmma's rows are columns of the result, so a decoded weight can be its A in registers. A block has a tile of ROWS x
// COLUMNS of the result: one warp's thread keeps a ring of stages full, two warpgroups have half of the columns each.
// What the blocks of a cluster share is its SHAPE:
// - PAIR: two with neighbouring columns; each brings half of the left operand's tile to both.
// - SQUARE: two by two, of rank 2 row + column; those with the same rows bring half of the left operand's tile to each
//   other, those with the same columns half of the right one's, which is of bf16.
// - SPLIT: four with the same tile, each one part of its sum, where there are too few tiles for all multiprocessors.
// The blocks of the first two go on to further tiles, whose first stages arrive while they still write results. The last
// squares are cut where they would leave most multiprocessors idle: all blocks of a cluster have the same one of its four
// tiles then, as with SPLIT.
#include "decode_quads.cuh"
#include "gemm.cuh"
#include "wgmma.cuh"

#define COLUMNS 128
#define CONSUMERS 256
#define THREADS (CONSUMERS + 128)
#define LINE 128        // bytes of a line of a swizzled tile: 64 elements
#define CHUNK_ROWS 16   // of the result, that a warpgroup stages at once
#define CHUNK (CHUNK_ROWS * COLUMNS / 2)
#define SPLIT_COLUMNS (COLUMNS + 4)
#define STEPS (TILE_K / 16)
#define PAIR_COPIES 4   // log2

enum cluster_shape { PAIR, SQUARE, SPLIT };

// ROWS_: of the result, in a tile. CODE_BITS_: 4 or 8 if one term's right operand is of such codes, else 0.
template <cluster_shape SHAPE_, int ROWS_, int CODE_BITS_, bool A_K_MAJOR_, bool B_K_MAJOR_> struct Kind {
    static constexpr cluster_shape SHAPE = SHAPE_;
    static constexpr int ROWS = ROWS_, CODE_BITS = CODE_BITS_, CLUSTER = SHAPE == PAIR ? 2 : 4;
    // Blocks that bring a block parts of its tiles, itself among them: those of rank own ^ 0, 1, ...
    static constexpr int SENDERS = SHAPE == PAIR ? 2 : SHAPE == SQUARE ? 3 : 1;
    static constexpr bool CODES = CODE_BITS_ != 0, A_K_MAJOR = A_K_MAJOR_, B_K_MAJOR = B_K_MAJOR_;
    static_assert(SHAPE != SPLIT || CLUSTER == PARTS, "a block has a part");
    static_assert(SHAPE != SQUARE || !CODES, "codes are not shared");
    static_assert(ROWS % (A_K_MAJOR ? 16 : 64) == 0, "a half begins where the pattern of swizzled lines does");
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
        return staged() + (K::SHAPE == SPLIT ? 0 : 2 * 2 * CHUNK * sizeof(float));
    }
    __device__ __forceinline__ unsigned char *tables() const {
        return scales() + (K::CODES && !K::B_K_MAJOR ? CONSUMERS / 32 * TILE_K * sizeof(float2) : 0);
    }

    __device__ __forceinline__ unsigned tile() const { return blockIdx.x / K::CLUSTER; }
    __device__ __forceinline__ unsigned tile_step() const { return gridDim.x / K::CLUSTER; }
    // Whether each block of the cluster has a part of the same sum; a cluster has at most one such tile, its last one.
    __device__ __forceinline__ bool is_cut(unsigned tile) const {
        return K::SHAPE == SPLIT || (K::SHAPE == SQUARE && tile >= p.whole);
    }
    __device__ __forceinline__ bool ends_cut() const {
        return is_cut(tile() + (p.tiles - 1 - tile()) / tile_step() * tile_step());
    }

    __device__ __forceinline__ Place place_of(unsigned tile) const {
        constexpr int DOWN = K::SHAPE == SQUARE ? 2 : 1, ACROSS = K::SHAPE == SPLIT ? 1 : 2;
        unsigned own = rank; // of the tiles of a cluster, the block's
        if (K::SHAPE == SQUARE && is_cut(tile)) own = (tile - p.whole) % 4, tile = p.whole + (tile - p.whole) / 4;
        Place place = Place::at(p.gemm, tile, DOWN * K::ROWS, ACROSS * COLUMNS);
        if (DOWN > 1) place.row += own / 2 * K::ROWS;
        if (ACROSS > 1) place.column += own % 2 * COLUMNS;
        return place;
    }
    // The tiles of the contraction that are this block's.
    __device__ __forceinline__ unsigned begin(const Parts &parts, bool cut) const { return cut ? parts.begin(rank) : 0; }
    __device__ __forceinline__ unsigned end(const Parts &parts, bool cut) const {
        return cut ? parts.begin(rank + 1) : parts.tiles;
    }

    // Brings a box to the blocks of the cluster whose rank is a bit of `blocks`, of a cut tile to this one alone.
    template <bool CUT>
    __device__ __forceinline__ void load(const Stage &stage, unsigned char *to, const tensor_map *map, int x, int y,
                                         unsigned blocks) const {
        if constexpr (CUT) tma_load_2d(to, map, &full[stage.slot], x, y);
        else tma_load_2d_multicast(to, map, &full[stage.slot], x, y, (uint16_t)blocks);
    }

    // Half of the left operand's tile, to the blocks with the same rows.
    template <bool CUT>
    __device__ __forceinline__ void load_a(const Stage &stage, const tensor_map *map, int row, int k, int half) const {
        unsigned char *to = a_tile(stage);
        unsigned blocks = 3 << (rank & ~1u);
        if constexpr (K::A_K_MAJOR) {
            load<CUT>(stage, to + half * (K::A_BYTES / 2), map, k, row + half * (K::ROWS / 2), blocks);
        } else {
#pragma unroll 1
            for (int i = 0; i < K::ROWS / 64; i++)
                load<CUT>(stage, to + i * 64 * LINE + half * 32 * LINE, map, row + 64 * i, k + 32 * half, blocks);
        }
    }

    // Half of the right operand's tile, to the blocks with the same columns.
    template <bool CUT>
    __device__ __forceinline__ void load_half_b(const Stage &stage, const tensor_map *map, int column, int k,
                                                int half) const {
        int own = column + 64 * half;
        load<CUT>(stage, b_tile(stage) + half * 64 * LINE, map, K::B_K_MAJOR ? k : own, K::B_K_MAJOR ? own : k,
                  5 << rank % 2);
    }

    // The right operand's tile, to this block.
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

    // Keeps the ring full for a tile.
    template <bool CUT> __device__ __forceinline__ void produce(Stage &stage, const Place &place) const {
        Parts parts(place.problem);
        unsigned first = begin(parts, CUT), end = this->end(parts, CUT);
        Cursor at = cursor_at(place.problem, first);
        for (unsigned i = first; i < end; i++) {
            const tensor_map *maps = p.tensor_maps[&place.problem - p.gemm.problems][at.term];
            bool codes = K::CODES && at.here().b.type == TYPE_QUANTIZED;
            mbarrier_wait(&empty[stage.slot], stage.parity ^ 1);
            mbarrier_arrive_expect(&full[stage.slot], K::A_BYTES + (codes ? K::CODE_BYTES : K::B_BYTES));
            int row = (int)place.row, column = (int)place.column, k = (int)at.k;
            if constexpr (K::SHAPE != SQUARE) load_b(stage, &maps[1], column, k, codes);
#pragma unroll 1 // as the thread has few registers
            for (int half = 0; half < (CUT ? 2 : 1); half++) {
                if constexpr (K::SHAPE == SQUARE) load_half_b<CUT>(stage, &maps[1], column, k, CUT ? half : rank / 2);
                load_a<CUT>(stage, &maps[0], row, k, CUT ? half : rank % 2);
            }
            at.advance();
            stage.advance();
        }
    }
    __device__ __forceinline__ void produce() const {
        Stage stage(p.stages);
        for (unsigned tile = this->tile(); tile < p.tiles; tile += tile_step()) {
            if (K::SHAPE != PAIR && is_cut(tile)) produce<true>(stage, place_of(tile));
            else if (K::SHAPE != SPLIT) produce<false>(stage, place_of(tile));
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

    // This warp no longer reads a stage: whoever brings parts of it may bring the next ones. Of a cut tile that is this block
    // alone, in the others' place too.
    __device__ __forceinline__ void release(unsigned slot, bool cut) const {
        if constexpr (K::SHAPE == SPLIT) {
            if (lane == 0) mbarrier_arrive(&block.empty[slot]);
        } else if (lane < K::SENDERS) {
            mbarrier_arrive_remote(&block.empty[slot], block.rank ^ (cut ? 0 : lane));
        }
    }

    // Adds the tiles [from, end) of the contraction, of which there are some, to nothing.
    __device__ __forceinline__ void add(Sum &sum, const Place &place, unsigned from, unsigned end, bool cut) {
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
                if (tile > from) release(stage.slot_before(), cut);
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
                if (tile > from) release(stage.slot_before(), cut);
            }
            stage.advance();
        }
        wgmma_wait<0>();
        release(stage.slot_before(), cut);
    }

    // ---- results ----

    __device__ __forceinline__ void finish(const gemm_problem &problem, uint64_t row, uint64_t column,
                                           float (&x)[PACK]) const {
        if (row >= problem.m || column >= problem.n) return;
        if (problem.out_type == TYPE_F32) finish_pack<float>(problem, row, column, x);
        else finish_pack<bf16>(problem, row, column, x);
    }

    // Writes the sums of CHUNK_ROWS rows from `first` on to shared memory, that of row `row` + 2 `two` (of each eight rows a lane
    // has two neighbours) and a column to at(row, two, column).
    template <class At>
    __device__ __forceinline__ void stage_rows(float *to, const Sum &sum, int first, const At &at) const {
#pragma unroll
        for (int i = 0; i < CHUNK_ROWS / 2; i++)
            to[at(i / 4 * 8 + i % 2, lane % 4, column(i / 2 % 2))] = sum[first / 2 + i];
    }

    __device__ __forceinline__ void write(const Place &place, const Sum &sum) const {
        // Rows of 64 columns, whose packs change places so that writes don't meet in a bank.
        auto staged_at = [](unsigned row, unsigned two, unsigned col) { return (row + 2 * two) * 64 + (col ^ two * PACK); };
        float *chunks = (float *)block.staged() + group * 2 * CHUNK;
        sync(); // the last tile's chunks are read
        // One copy of the code for all chunks, which would fill the cache of instructions; which sums they have is chosen.
#pragma unroll 1
        for (int first = 0; first < K::ROWS; first += CHUNK_ROWS) {
            // Two take turns: whoever writes one has passed the barrier behind which all have read it.
            float *staged = chunks + first / CHUNK_ROWS % 2 * CHUNK;
#pragma unroll
            for (int chunk = 0; chunk < K::ROWS; chunk += CHUNK_ROWS)
                if (chunk == first) stage_rows(staged, sum, chunk, staged_at);
            sync();
            static_assert(CHUNK == 128 * PACK, "a thread has a pack");
            unsigned row = thread() / (64 / PACK), col = thread() % (64 / PACK) * PACK;
            float x[PACK];
#pragma unroll
            for (int j = 0; j < PACK; j++) x[j] = staged[staged_at(row & ~6u, row / 2 % 4, col) + j];
            finish(place.problem, place.row + first + row, place.column + 64 * group + col, x);
        }
    }

    // Every block joins the parts of its share of the rows.
    __device__ __forceinline__ void join(const Place &place, const Sum &sum) const {
        barrier_sync(1, CONSUMERS); // the ring is read
        float *parts = (float *)block.ring; // [ROWS][SPLIT_COLUMNS]
#pragma unroll
        for (int first = 0; first < K::ROWS; first += CHUNK_ROWS)
            stage_rows(parts + first * SPLIT_COLUMNS + 64 * group, sum, first,
                       [](unsigned row, unsigned two, unsigned col) { return (row + 2 * two) * SPLIT_COLUMNS + col; });
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
            bool cut = block.is_cut(tile);
            Place place = block.place_of(tile);
            if (K::CODES && of_tables != &place.problem) {
                of_tables = &place.problem;
                barrier_sync(1, CONSUMERS); // the old ones are not read any more
                fill_tables((float2 *)block.tables(), map(), PAIR_COPIES, place.problem, threadIdx.x, CONSUMERS);
                barrier_sync(1, CONSUMERS);
            }
            Parts parts(place.problem);
            Sum sum = {};
            if (cut) {
                unsigned first = block.begin(parts, cut), end = block.end(parts, cut);
                if (first < end) add(sum, place, first, end, cut);
                join(place, sum);
            } else {
                Sum total = {};
                for (unsigned from = 0; from < parts.tiles; from = parts.end_of(from)) {
                    add(sum, place, from, parts.end_of(from), cut);
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
            mbarrier_init(&empty[i], CONSUMERS / 32 * K::SENDERS);
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
        if (block.ends_cut()) { // for join
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
#define GEMMS_BF16(name, shape, rows)                                                                                  \
    GEMM_HOPPER(name##bf16_##rows##_nt, shape, rows, 0, true, true)                                                    \
    GEMM_HOPPER(name##bf16_##rows##_nn, shape, rows, 0, true, false)
#define GEMM_BF16_TN(name, shape, rows) GEMM_HOPPER(name##bf16_##rows##_tn, shape, rows, 0, false, false)
#define GEMMS_CODES(name, shape, rows)                                                                                 \
    GEMM_HOPPER(name##codes4_##rows##_nt, shape, rows, 4, true, true)                                                  \
    GEMM_HOPPER(name##codes4_##rows##_nn, shape, rows, 4, true, false)                                                 \
    GEMM_HOPPER(name##codes8_##rows##_nt, shape, rows, 8, true, true)                                                  \
    GEMM_HOPPER(name##codes8_##rows##_nn, shape, rows, 8, true, false)
#define GEMMS_HOPPER(name, shape, rows)                                                                                \
    GEMMS_BF16(name, shape, rows) GEMM_BF16_TN(name, shape, rows) GEMMS_CODES(name, shape, rows)
#define GEMMS_SQUARE(rows) GEMMS_BF16(gemm_hopper_square_, SQUARE, rows)
GEMMS_HOPPER(gemm_hopper_, PAIR, 128)
GEMMS_HOPPER(gemm_hopper_, PAIR, 192)
GEMMS_HOPPER(gemm_hopper_split_, SPLIT, 128)
GEMMS_SQUARE(128) GEMM_BF16_TN(gemm_hopper_square_, SQUARE, 128)
GEMMS_SQUARE(192) GEMM_BF16_TN(gemm_hopper_square_, SQUARE, 192)
GEMMS_SQUARE(208)
