// Products of few rows with a quantized matrix of four-bit codes, W [n, k] transposed: what generating tokens and small
// batches consist of. The bits are those of gemm.cu, of which this is the case in which reading the codes takes the time:
// they go from memory to registers, are decoded there, and are mma's A without passing through shared memory.
//
// A warp has 16 columns of the result, all of a block's rows and a quarter of the contraction. The left operand's tiles are
// the warp's own.
#include "gemm.cuh"

#define COLUMNS 32
#define WARPS_ALONG_COLUMNS (COLUMNS / 16)
#define THREADS (32 * WARPS_ALONG_COLUMNS * PARTS)
#define STAGED_COLUMNS (COLUMNS + 4)
#define STEPS (TILE_K / 16)
#define AHEAD 4 // tiles that are under way

// What a warp computes.
template <int N_TILES> struct Gemv {
    static constexpr int ROWS = 8 * N_TILES;
    using XTile = Tile<ROWS, true>;
    static constexpr int X_BYTES = AHEAD * XTile::BYTES;
    using Sum = float[N_TILES][4];

    const Place &place;
    const PairTable table;
    const float *const map;
    const unsigned column; // of the problem, the warp's first
    unsigned char *const x;
    const unsigned g, t, rows; // rows that are there
    const Exchange exchange;

    __device__ __forceinline__ Gemv(const Place &place, PairTable table, const float *map, unsigned column,
                                    unsigned char *x)
        : place(place), table(table), map(map), column(column), x(x), g(lane_index() / 4), t(lane_index() % 4),
          rows((unsigned)min(place.problem.m - place.row, (uint64_t)ROWS)) {
        // Rows that are not there stay zero.
        for (unsigned i = lane_index(); i < X_BYTES / 16; i += 32) ((uint4 *)x)[i] = make_uint4(0, 0, 0, 0);
        __syncwarp();
    }

    // Starts copying a tile of the rows of `a`.
    __device__ __forceinline__ void load_x(unsigned slot, const gemm_term &term, uint64_t k) const {
        for (unsigned i = lane_index(); i < rows * XTile::CHUNKS; i += 32) {
            unsigned row = i / XTile::CHUNKS, chunk = i % XTile::CHUNKS;
            uint64_t at = k + chunk * 8;
            const bf16 *from = (const bf16 *)term.a.data;
            unsigned bytes = at >= term.k ? 0 : (unsigned)min((term.k - at) * 2, (uint64_t)16);
            cp_async16(x + slot * XTile::BYTES + XTile::offset(row, chunk),
                       bytes ? from + (place.row + row) * term.a.ld + at : from, bytes);
        }
    }

    // mma's B of two steps, 2 `pair` and the next.
    __device__ __forceinline__ void read_x(uint32_t (&b)[2][N_TILES][2], unsigned slot, int pair) const {
        const unsigned char *tile = x + slot * XTile::BYTES;
        uint32_t r[4];
        if constexpr (N_TILES == 1) {
            ldmatrix_x4(r, tile + XTile::offset(lane_index() % 8, 4 * pair + lane_index() / 8));
            b[0][0][0] = r[0], b[0][0][1] = r[1], b[1][0][0] = r[2], b[1][0][1] = r[3];
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < N_TILES; j += 2) {
                    XTile::load_b(r, tile, 8 * j, 2 * pair + i);
                    b[i][j][0] = r[0], b[i][j][1] = r[1], b[i][j + 1][0] = r[2], b[i][j + 1][1] = r[3];
                }
        }
    }

    __device__ __forceinline__ uint2 load_codes(const quantized_matrix &q, unsigned row, uint64_t k) const {
        uint64_t at = k + 16 * t;
        if (row >= place.problem.n || at >= q.cols) return make_uint2(0, 0);
        return *(const uint2 *)(q.codes + ((uint64_t)row * q.cols + at) / 2);
    }

    __device__ __forceinline__ void multiply_quantized(Sum &sum, const quantized_matrix &q, const uint2 (&codes)[2],
                                                       const BlockConstants &constants, unsigned slot) const {
        uint32_t b[2][N_TILES][2];
        const QuadCodes decoder(q, exchange, codes, constants, map);
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            if (step % 2 == 0) read_x(b, slot, step / 2);
            uint32_t w[4];
            decoder.decode(w, table, step);
#pragma unroll
            for (int j = 0; j < N_TILES; j++) mma_bf16(sum[j], w, b[step % 2][j]);
        }
    }

    // Tiles [from, end) of a term with a quantized b.
    __device__ __forceinline__ void add_quantized(Sum &sum, const gemm_term &term, unsigned from, unsigned end) const {
        const quantized_matrix &q = term.quantized;
        uint2 codes[AHEAD][2];
        BlockConstants scale[2];
        auto start = [&](uint2 (&to)[2], unsigned slot, unsigned tile) {
            uint64_t k = (uint64_t)tile * TILE_K;
#pragma unroll
            for (int r = 0; r < 2; r++) to[r] = tile < end ? load_codes(q, column + g + 8 * r, k) : make_uint2(0, 0);
            if (tile < end) load_x(slot, term, k);
            cp_async_commit();
        };
#pragma unroll
        for (int i = 0; i < AHEAD; i++) start(codes[i], i, from + i);
        scale[0] = QuadScales::load(q, column + g, place.problem.n, (uint64_t)from * TILE_K);
        for (unsigned first = from; first < end; first += AHEAD) {
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                unsigned tile = first + i;
                if (tile >= end) break;
                if (tile + 1 < end)
                    scale[(i + 1) % 2] =
                        QuadScales::load(q, column + g, place.problem.n, (uint64_t)(tile + 1) * TILE_K);
                cp_async_wait<AHEAD - 1>();
                __syncwarp();
                multiply_quantized(sum, q, codes[i], scale[i % 2], i);
                __syncwarp();
                start(codes[i], i, tile + AHEAD);
            }
        }
        cp_async_wait<0>();
        __syncwarp();
    }

    // The same with a b of bf16: the low-rank part.
    __device__ __forceinline__ void add_dense(Sum &sum, const gemm_term &term, unsigned from, unsigned end) const {
        for (unsigned tile = from; tile < end; tile++) {
            uint64_t k = (uint64_t)tile * TILE_K;
            load_x(0, term, k);
            cp_async_commit();
            cp_async_wait<0>();
            __syncwarp();
            uint32_t b[2][N_TILES][2];
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                if (step % 2 == 0) read_x(b, 0, step / 2);
                uint32_t w[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    uint64_t row = column + g + i % 2 * 8, at = k + 16 * step + i / 2 * 8 + 2 * t;
                    bool inside = row < place.problem.n && at < term.k; // lines are a multiple of eight
                    w[i] = inside ? *(const uint32_t *)((const bf16 *)term.b.data + row * term.b.ld + at) : 0;
                }
#pragma unroll
                for (int j = 0; j < N_TILES; j++) mma_bf16(sum[j], w, b[step % 2][j]);
            }
            __syncwarp();
        }
    }
};

template <int N_TILES> __device__ __forceinline__ void gemv(const gemm_params &p) {
    using G = Gemv<N_TILES>;
    DYNAMIC_SHARED(memory);
    Place place = Place::of(p, G::ROWS, COLUMNS);
    const gemm_problem &problem = place.problem;
    unsigned warp = warp_index(), part = warp % PARTS, column = warp / PARTS * 16;
    unsigned char *tables = memory + THREADS / 32 * G::X_BYTES;
    float *map = (float *)(tables + PairTable::bytes(p.pair_copies));
    load_tables((float2 *)tables, map, p, problem, THREADS);
    G gemv(place, PairTable{(const float2 *)tables, p.pair_copies}, map, (unsigned)place.column + column,
           memory + warp * G::X_BYTES);
    Parts parts(problem);
    unsigned begin = parts.begin(part), end = parts.begin(part + 1), first = 0;
    typename G::Sum sum = {};
    for (unsigned i = 0; i < problem.n_terms; i++) {
        const gemm_term &term = problem.terms[i];
        unsigned last = first + tiles_of(term), from = max(begin, first), to = min(end, last);
        if (from < to) {
            if (term.b.type == TYPE_QUANTIZED) gemv.add_quantized(sum, term, from - first, to - first);
            else gemv.add_dense(sum, term, from - first, to - first);
        }
        first = last;
    }
    __syncthreads();
    float *staged = (float *)memory;
#pragma unroll
    for (int j = 0; j < N_TILES; j++)
#pragma unroll
        for (int l = 0; l < 4; l++) {
            unsigned row = 8 * j + gemv.t * 2 + l % 2, c = column + gemv.g + l / 2 * 8;
            staged[(part * G::ROWS + row) * STAGED_COLUMNS + c] = sum[j][l];
        }
    __syncthreads();
    finish_tile<PARTS, G::ROWS, COLUMNS, STAGED_COLUMNS, THREADS>(place, staged);
}

KERNEL(gemv_8x32, gemm_params, THREADS, 2) { gemv<1>(p); }
KERNEL(gemv_16x32, gemm_params, THREADS, 2) { gemv<2>(p); }
KERNEL(gemv_32x32, gemm_params, THREADS, 2) { gemv<4>(p); }
