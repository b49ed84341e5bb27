// Matrix products in bf16 arithmetic, by mma.sync.
//
// Operands are copied by cp.async into a ring of tiles. Quantized matrices are decoded from there, and floats of other
// types than bf16 converted, a run of 32 by the thread that copied it, into one of two tiles of bf16 while the other one is multiplied. The pair table gives
// both levels of a byte in f32 from one read of shared memory: an element is level * scale, rounded once, which rules out
// a table of products in bf16, and a shuffle or a read for each element would cap the rate below the memory's.
#include "gemm.cuh"

enum Mode {
    DENSE,   // bf16 whose lines are 16-byte aligned
    DECODED, // the same, or a b that is decoded: quantized in whole runs, f16 or f32 with aligned lines
    ANY,     // everything
};

template <int ROWS_, int COLUMNS_, int WARPS_ALONG_ROWS, int WARPS_ALONG_COLUMNS, int GROUPS_, int STAGES_> struct Shape {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_;
    static constexpr int WARP_ROWS = ROWS / WARPS_ALONG_ROWS, WARP_COLUMNS = COLUMNS / WARPS_ALONG_COLUMNS;
    // Groups of warps that compute parts of the sum side by side: PARTS or 1.
    static constexpr int GROUPS = GROUPS_, STAGES = STAGES_;
    static constexpr int GROUP_THREADS = 32 * WARPS_ALONG_ROWS * WARPS_ALONG_COLUMNS;
    static constexpr int THREADS = GROUPS * GROUP_THREADS;
    static constexpr int M_TILES = WARP_COLUMNS / 16, N_TILES = WARP_ROWS / 8;
    static constexpr int BLOCKS = ROWS * COLUMNS <= 64 * 64 ? 2 : 1; // on a multiprocessor, at least
    static constexpr int STAGED_COLUMNS = COLUMNS + 4; // so that fragments' columns lie in different banks
};

// One group of warps at work on the tiles [tile, end) of the contraction.
template <class S, int MODE, bool A_K_MAJOR, bool B_K_MAJOR> struct Group {
    using ATile = Tile<S::ROWS, A_K_MAJOR>;
    using BTile = Tile<S::COLUMNS, B_K_MAJOR>;
    static constexpr int SLOTS = MODE == ANY ? 2 : S::STAGES;

    const Place &place;
    const unsigned number, thread; // of the group, in it
    unsigned char *const a, *const b, *const codes;
    const unsigned codes_bytes; // of a tile
    const PairTable table;
    const float *const map;

    static __device__ __forceinline__ unsigned bytes(unsigned code_bits) {
        unsigned a_and_b = SLOTS * ATile::BYTES + (MODE == DECODED ? 2 : SLOTS) * BTile::BYTES;
        return a_and_b + (MODE == DECODED ? SLOTS * S::COLUMNS * TILE_K / 8 * code_bits : 0);
    }

    __device__ __forceinline__ Group(const Place &place, unsigned number, unsigned thread, unsigned char *memory,
                                     unsigned code_bits, PairTable table, const float *map)
        : place(place), number(number), thread(thread), a(memory), b(a + SLOTS * ATile::BYTES),
          codes(b + 2 * BTile::BYTES), codes_bytes(S::COLUMNS * TILE_K / 8 * code_bits), table(table), map(map) {}

    __device__ __forceinline__ void sync() const {
        if constexpr (S::GROUPS == 1) __syncthreads();
        else barrier_sync(1 + number, S::GROUP_THREADS);
    }

    static __device__ __forceinline__ bool is_decoded(const Cursor &at) {
        return MODE == DECODED && at.here().b.type != TYPE_BF16;
    }

    __device__ __forceinline__ void load_a(unsigned slot, const Cursor &at) const {
        const gemm_term &term = at.here();
        ATile::template load<S::GROUP_THREADS>(a + slot * ATile::BYTES, (const bf16 *)term.a.data, term.a.ld, place.row,
                                               place.problem.m, at.k, term.k, thread);
    }

    __device__ __forceinline__ void load_b(unsigned slot, const Cursor &at) const {
        const gemm_term &term = at.here();
        BTile::template load<S::GROUP_THREADS>(b + slot * BTile::BYTES, (const bf16 *)term.b.data, term.b.ld,
                                               place.column, place.problem.n, at.k, term.k, thread);
    }

    // ---- runs of codes ----

    static constexpr int RUNS = S::COLUMNS * TILE_K / RUN / S::GROUP_THREADS; // of a thread
    static constexpr int RUNS_PER_LINE = BTile::CHUNKS * 8 / RUN;
    static_assert(MODE != DECODED || (RUNS * RUN * S::GROUP_THREADS == S::COLUMNS * TILE_K && RUNS_PER_LINE > 0), "");

    struct Run {
        unsigned line, part; // in the tile
        uint64_t row, col;   // in the stored matrix
        bool inside;
    };

    __device__ __forceinline__ Run run_at(int i, const Cursor &at) const {
        unsigned index = thread + i * S::GROUP_THREADS;
        Run run{index / RUNS_PER_LINE, index % RUNS_PER_LINE, 0, 0, false};
        run.row = (B_K_MAJOR ? place.column : at.k) + run.line;
        run.col = (B_K_MAJOR ? at.k : place.column) + run.part * RUN;
        uint64_t rows = B_K_MAJOR ? place.problem.n : at.here().k, cols = B_K_MAJOR ? at.here().k : place.problem.n;
        run.inside = run.row < rows && run.col < cols;
        return run;
    }

    // Where a run lies, and the upper two bits of its codes of six.
    __device__ __forceinline__ unsigned char *codes_of(unsigned slot, int i, unsigned bytes) const {
        return codes + slot * codes_bytes + (thread + i * S::GROUP_THREADS) * bytes;
    }
    __device__ __forceinline__ unsigned char *high_of(unsigned slot, int i) const {
        return codes + slot * codes_bytes + S::COLUMNS * TILE_K / 2 + (thread + i * S::GROUP_THREADS) * (RUN / 4);
    }

    // Bytes of a run in memory; of six bits those of the lower four.
    static __device__ __forceinline__ unsigned run_bytes(const gemm_term &term) {
        int format = term.quantized.format;
        if (term.b.type == TYPE_QUANTIZED) return format == CODES_4BIT || format == CODES_6BIT ? RUN / 2 : RUN;
        return term.b.type == TYPE_F16 ? 2 * RUN : 4 * RUN;
    }

    __device__ __forceinline__ void load_codes(unsigned slot, const Cursor &at) const {
        const gemm_term &term = at.here();
        const quantized_matrix &q = term.quantized;
        const uint8_t *data = term.b.type == TYPE_QUANTIZED ? q.codes : (const uint8_t *)term.b.data;
        bool six_bits = term.b.type == TYPE_QUANTIZED && q.format == CODES_6BIT;
        unsigned bytes = run_bytes(term);
        uint64_t columns = B_K_MAJOR ? term.k : place.problem.n;
#pragma unroll
        for (int i = 0; i < RUNS; i++) {
            Run run = run_at(i, at);
            uint64_t element = run.row * term.b.ld + run.col;
            const uint8_t *from = data + element * bytes / RUN;
            uint64_t left = run.inside ? (columns - run.col) * bytes / RUN : 0;
            unsigned char *to = codes_of(slot, i, bytes);
            for (unsigned c = 0; c < bytes; c += 16) {
                unsigned valid = left <= c ? 0 : (unsigned)min(left - c, (uint64_t)16);
                cp_async16(to + c, valid ? from + c : data, valid);
            }
            if (six_bits)
                cp_async8(high_of(slot, i), run.inside ? data + q.rows * q.cols / 2 + element / 4 : data,
                          run.inside ? RUN / 4 : 0);
        }
    }

    // Starts reading the scales of this thread's runs.
    __device__ __forceinline__ void load_scales(BlockConstants (&scales)[RUNS], const Cursor &at) const {
        const quantized_matrix &q = at.here().quantized;
        bool quantized = at.here().b.type == TYPE_QUANTIZED;
#pragma unroll
        for (int i = 0; i < RUNS; i++) {
            Run run = run_at(i, at);
            scales[i] = BlockConstants{0.0f, 0.0f, 0};
            if (!run.inside || !quantized) continue;
            uint64_t block = block_of(q, run.row, run.col);
            scales[i] = load_constants(q, block);
            if (q.format == CODES_6BIT) scales[i].nested |= (uint32_t)q.nested[block + 1] << 8;
        }
    }

    __device__ __forceinline__ void decode(unsigned slot, unsigned to, const Cursor &at,
                                           const BlockConstants (&scales)[RUNS]) const {
        const gemm_term &term = at.here();
        const quantized_matrix &q = term.quantized;
        unsigned bytes = run_bytes(term);
        unsigned char *tile = b + to * BTile::BYTES;
#pragma unroll
        for (int i = 0; i < RUNS; i++) {
            Run run = run_at(i, at);
            auto store = [&](int j, const uint32_t (&x)[4]) {
                *(uint4 *)(tile + BTile::offset(run.line, run.part * (RUN / 8) + j)) = make_uint4(x[0], x[1], x[2], x[3]);
            };
            const unsigned char *codes = codes_of(slot, i, bytes);
            if (term.b.type == TYPE_F16) convert_run<f16>(codes, store);
            else if (term.b.type == TYPE_F32) convert_run<float>(codes, store);
            else {
                // Outside the constants are zeros.
                decode_run(codes, high_of(slot, i), q, table, map, scales[i], store);
            }
        }
    }

    // ---- any operand ----

    // Fills a k-major tile of one operand element by element, whatever it is.
    template <int ROWS>
    __device__ __forceinline__ void gather(unsigned char *tile, const gemm_operand &operand, const quantized_matrix &q,
                                           bool k_major, uint64_t first_row, uint64_t rows, const Cursor &at) const {
        constexpr int CHUNKS = TILE_K / 8;
        for (unsigned index = thread; index < ROWS * CHUNKS; index += S::GROUP_THREADS) {
            // Neighbouring threads read neighbouring memory.
            unsigned line = k_major ? index / CHUNKS : index % ROWS, chunk = k_major ? index % CHUNKS : index / ROWS;
            uint64_t row = first_row + line, k = at.k + chunk * 8, depth = at.here().k;
            float x[8];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                bool inside = row < rows && k + j < depth;
                x[j] = !inside ? 0.0f : stored_element(operand, q, k_major ? row : k + j, k_major ? k + j : row);
            }
            uint32_t pairs[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                pairs[j] = from_float<bf16>(x[2 * j]).bits | (uint32_t)from_float<bf16>(x[2 * j + 1]).bits << 16;
            *(uint4 *)(tile + Tile<ROWS, true>::offset(line, chunk)) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }

    __device__ __forceinline__ void gather_both(unsigned slot, const Cursor &at) const {
        const gemm_term &term = at.here();
        gather<S::ROWS>(a + slot * ATile::BYTES, term.a, term.quantized, !term.a.transposed, place.row, place.problem.m, at);
        gather<S::COLUMNS>(b + slot * BTile::BYTES, term.b, term.quantized, term.b.transposed, place.column,
                           place.problem.n, at);
    }

    // ---- the sum ----

    using Sum = float[S::M_TILES][S::N_TILES][4];

    template <class F> static __device__ __forceinline__ void each(F f) {
#pragma unroll
        for (int i = 0; i < S::M_TILES; i++)
#pragma unroll
            for (int j = 0; j < S::N_TILES; j++)
#pragma unroll
                for (int l = 0; l < 4; l++) f(i, j, l);
    }

    __device__ __forceinline__ void multiply(Sum &sum, unsigned a_slot, unsigned b_slot, unsigned row,
                                             unsigned column) const {
        const unsigned char *a_tile = a + a_slot * ATile::BYTES, *b_tile = b + b_slot * BTile::BYTES;
#pragma unroll
        for (int step = 0; step < TILE_K / 16; step++) {
            uint32_t x[S::N_TILES / 2][4], w[S::M_TILES][4];
#pragma unroll
            for (int j = 0; j < S::N_TILES / 2; j++) ATile::load_b(x[j], a_tile, row + 16 * j, step);
#pragma unroll
            for (int i = 0; i < S::M_TILES; i++) BTile::load_a(w[i], b_tile, column + 16 * i, step);
#pragma unroll
            for (int i = 0; i < S::M_TILES; i++)
#pragma unroll
                for (int j = 0; j < S::N_TILES; j++) mma_bf16(sum[i][j], w[i], &x[j / 2][j % 2 * 2]);
        }
    }

    // The part of the sum over tiles [from, end), after `after(tile)` which may take away what is there.
    template <class After>
    __device__ __forceinline__ void run(Sum &sum, unsigned from, unsigned end, unsigned row, unsigned column,
                                        After after) const {
        Cursor ahead = cursor_at(place.problem, from), next = ahead;
        BlockConstants scales[RUNS > 0 ? RUNS : 1];
        // Prepares the tile at `next`, whose number in this run is n; whether copies are under way that are needed soon.
        auto prepare = [&](unsigned n) {
            bool copying = false;
            if constexpr (MODE == ANY) gather_both(n % 2, next);
            if constexpr (MODE == DECODED) {
                if (is_decoded(next)) decode(n % SLOTS, n % 2, next, scales);
                else load_b(n % 2, next), copying = true;
            }
            next.advance();
            if constexpr (MODE == DECODED)
                if (from + n + 1 < end && is_decoded(next)) load_scales(scales, next);
            return copying;
        };
        auto start = [&](unsigned n) {
            if constexpr (MODE != ANY) {
                if (from + n < end) {
                    load_a(n % SLOTS, ahead);
                    if constexpr (MODE == DENSE) load_b(n % SLOTS, ahead);
                    else if (is_decoded(ahead)) load_codes(n % SLOTS, ahead);
                    ahead.advance();
                }
                cp_async_commit();
            }
        };
        if (from == end) return;
        bool copying = false;
        if constexpr (MODE == DECODED)
            if (is_decoded(next)) load_scales(scales, next);
        for (int n = 0; n < S::STAGES - 1; n++) start(n);
        if constexpr (MODE == DECODED) cp_async_wait<S::STAGES - 2>(); // codes are read by who copied them
        if constexpr (MODE != DENSE) copying = prepare(0);
        if (copying) cp_async_commit();
        for (unsigned tile = from; tile < end; tile++) {
            unsigned n = tile - from;
            if constexpr (MODE == DECODED) {
                if (copying) cp_async_wait<0>();
                else cp_async_wait<S::STAGES - 3>();
            }
            if constexpr (MODE == DENSE) cp_async_wait<S::STAGES - 2>();
            sync();
            copying = false;
            start(n + S::STAGES - 1);
            if constexpr (MODE != DENSE) {
                if (tile + 1 < end) copying = prepare(n + 1);
                if (copying) cp_async_commit();
            }
            unsigned a_slot = n % SLOTS;
            multiply(sum, a_slot, MODE == DENSE ? a_slot : n % 2, row, column);
            after(tile);
        }
    }
};

template <class S, int MODE, bool A_K_MAJOR, bool B_K_MAJOR> __device__ __forceinline__ void gemm(const gemm_params &p) {
    using G = Group<S, MODE, A_K_MAJOR, B_K_MAJOR>;
    DYNAMIC_SHARED(memory);
    Place place = Place::of(p, S::ROWS, S::COLUMNS);
    Parts parts(place.problem);
    unsigned number = threadIdx.x / S::GROUP_THREADS, thread = threadIdx.x % S::GROUP_THREADS;
    unsigned group_bytes = G::bytes(p.code_bits);
    unsigned char *tables = memory + S::GROUPS * group_bytes;
    float *map = (float *)(tables + PairTable::bytes(p.pair_copies));
    if constexpr (MODE == DECODED) load_tables((float2 *)tables, map, p, place.problem, S::THREADS);
    G group(place, number, thread, memory + number * group_bytes, p.code_bits,
            PairTable{(const float2 *)tables, p.pair_copies}, map);

    unsigned lane = lane_index(), warp = thread / 32;
    constexpr unsigned WARPS_ALONG_ROWS = S::ROWS / S::WARP_ROWS;
    unsigned row = warp % WARPS_ALONG_ROWS * S::WARP_ROWS, column = warp / WARPS_ALONG_ROWS * S::WARP_COLUMNS;
    typename G::Sum sum = {};
    if constexpr (S::GROUPS == PARTS) {
        group.run(sum, parts.begin(number), parts.begin(number + 1), row, column, [](unsigned) {});
    } else {
        typename G::Sum total = {};
        unsigned end = parts.end_of(0);
        group.run(sum, 0, parts.tiles, row, column, [&](unsigned tile) {
            if (tile + 1 != end) return;
            end = parts.end_of(end);
            G::each([&](int i, int j, int l) {
                total[i][j][l] = total[i][j][l] + sum[i][j][l];
                sum[i][j][l] = 0.0f;
            });
        });
        G::each([&](int i, int j, int l) { sum[i][j][l] = total[i][j][l]; });
    }

    // By way of shared memory, so that rows are written by packs.
    cp_async_wait<0>();
    __syncthreads();
    float *staged = (float *)memory + number * S::ROWS * S::STAGED_COLUMNS;
    G::each([&](int i, int j, int l) {
        unsigned r = row + 8 * j + lane % 4 * 2 + l % 2, c = column + 16 * i + lane / 4 + l / 2 * 8;
        staged[r * S::STAGED_COLUMNS + c] = sum[i][j][l];
    });
    __syncthreads();
    finish_tile<S::GROUPS, S::ROWS, S::COLUMNS, S::STAGED_COLUMNS, S::THREADS>(place, (const float *)memory);
}

// The same with a block for each part, for results of so few tiles that most multiprocessors would have none. Whichever
// block of a tile comes last joins the parts, in their order.
template <class S, bool B_K_MAJOR> __device__ __forceinline__ void gemm_parts(const gemm_params &p) {
    using G = Group<S, DENSE, true, B_K_MAJOR>;
    static_assert(S::GROUPS == 1, "");
    constexpr unsigned TILE = S::ROWS * S::COLUMNS;
    DYNAMIC_SHARED(memory);
    SHARED(uint32_t, before, 1);
    unsigned tile = blockIdx.x / PARTS, part = blockIdx.x % PARTS, lane = lane_index();
    Place place = Place::at(p, tile, S::ROWS, S::COLUMNS);
    Parts parts(place.problem);
    G group(place, 0, threadIdx.x, memory, 0, PairTable{nullptr, 0}, nullptr);
    unsigned column = warp_index() * S::WARP_COLUMNS;
    typename G::Sum sum = {};
    group.run(sum, parts.begin(part), parts.begin(part + 1), 0, column, [](unsigned) {});
    cp_async_wait<0>();

    float *all = p.parts + (uint64_t)tile * PARTS * TILE;
    G::each([&](int i, int j, int l) {
        unsigned r = 8 * j + lane % 4 * 2 + l % 2, c = column + 16 * i + lane / 4 + l / 2 * 8;
        all[part * TILE + r * S::COLUMNS + c] = sum[i][j][l];
    });
    __threadfence(); // each thread's part of the part, before it counts
    __syncthreads();
    if (threadIdx.x == 0) before[0] = atomicAdd(p.arrived + tile, 1u);
    __syncthreads();
    if (before[0] + 1 < PARTS) return;
    __threadfence();
    float *staged = (float *)memory;
    for (unsigned i = threadIdx.x; i < PARTS * TILE; i += S::THREADS) staged[i] = ((volatile float *)all)[i];
    if (threadIdx.x == 0) p.arrived[tile] = 0;
    __syncthreads();
    finish_tile<PARTS, S::ROWS, S::COLUMNS, S::COLUMNS, S::THREADS>(place, staged);
}

// Nobody else hides how long a block's copies take, so more of them are under way.
using ShapeOfPart = Shape<16, 32, 1, 2, 1, 8>;
KERNEL(gemm_parts_16x32_nt, gemm_params, ShapeOfPart::THREADS, 4) { gemm_parts<ShapeOfPart, true>(p); }
KERNEL(gemm_parts_16x32_nn, gemm_params, ShapeOfPart::THREADS, 4) { gemm_parts<ShapeOfPart, false>(p); }

using Shape16x32 = Shape<16, 32, 1, 2, 4, 4>;
using Shape64x64 = Shape<64, 64, 2, 2, 1, 4>;
using Shape128x128 = Shape<128, 128, 4, 2, 1, 3>;

// The layouts' letters are those of BLAS: n, as stored, or t, transposed; a is k-major if n, b if t.
#define GEMM(name, shape, mode, a_k_major, b_k_major)                                                                  \
    KERNEL(name, gemm_params, shape::THREADS, shape::BLOCKS) { gemm<shape, mode, a_k_major, b_k_major>(p); }
#define GEMMS(tile)                                                                                                    \
    GEMM(gemm_bf16_##tile##_nt, Shape##tile, DENSE, true, true)                                                        \
    GEMM(gemm_bf16_##tile##_nn, Shape##tile, DENSE, true, false)                                                       \
    GEMM(gemm_bf16_##tile##_tn, Shape##tile, DENSE, false, false)                                                      \
    GEMM(gemm_decoded_##tile##_nt, Shape##tile, DECODED, true, true)                                               \
    GEMM(gemm_decoded_##tile##_nn, Shape##tile, DECODED, true, false)
GEMMS(16x32)
GEMMS(64x64)
GEMMS(128x128)
GEMM(gemm_any_bf16, Shape64x64, ANY, true, true)
