// Products of few rows with a quantized matrix of four-bit codes, W [n, k] transposed: what generating tokens and small
// batches consist of. The bits are those of gemm.cu, of which this is the case in which reading the codes takes the time:
// they go from memory to registers, are decoded there, and are mma's A without passing through shared memory.
//
// A warp has 16 columns of the result, all of a block's rows and a quarter of the contraction. Two warps have the same
// quarter, and its tiles of the left operand. What binds is shared memory, so tiles are decoded in two ways: most by the
// table of pairs, one of four or of two by permutations of bytes, which take more instructions and no shared memory.
#include "decode_quads.cuh"
#include "gemm.cuh"

#define COLUMNS 32
#define WARPS_ALONG_COLUMNS (COLUMNS / 16)
#define THREADS (32 * WARPS_ALONG_COLUMNS * PARTS)
#define STAGED_COLUMNS (COLUMNS + 4)
#define STEPS (TILE_K / 16)
#define UNITS 2         // that are under way, of two tiles each
#define AHEAD (2 * UNITS)
static_assert(AHEAD == QUAD_TILES, "a quad has the scales of as many");

// The left operand's tiles of a part, which two warps share, and mma's B from them. Rows that are not there are anything,
// as nobody reads their results.
template <int N_TILES> struct Left {
    static constexpr int ROWS = 8 * N_TILES;
    using XTile = Tile<ROWS, true>;
    static constexpr int BYTES = AHEAD * XTile::BYTES;
    using Pair = uint32_t[2][N_TILES][2]; // of two steps

    const Place &place;
    unsigned char *const tiles;
    const unsigned rows, part, warp; // that are there; of the two warps

    __device__ __forceinline__ Left(const Place &place, unsigned char *tiles, unsigned part, unsigned warp)
        : place(place), tiles(tiles), rows((unsigned)min(place.problem.m - place.row, (uint64_t)ROWS)), part(part),
          warp(warp) {}

    // Both warps: what they have copied is there, or they have read it.
    __device__ __forceinline__ void sync() const { barrier_sync(1 + part, 32 * WARPS_ALONG_COLUMNS); }

    // What a lane copies of a row: two elements, or a chunk.
    static constexpr bool BY_WORDS = N_TILES == 1;
    static constexpr int ELEMENTS = BY_WORDS ? 2 : 8, LANES = TILE_K / ELEMENTS;

    // Up to eight rows lie as their lanes read them: row g's words of both halves of the steps 2 j and 2 j + 1 that are lane
    // t's, its j-th chunk. Rows of odd number have their chunks swapped, so that eight lanes read different banks.
    static __device__ __forceinline__ unsigned chunk_of(unsigned row, unsigned t, unsigned j) {
        return row * TILE_K * 2 + ((2 * t + j) ^ (row & 1)) * 16;
    }

    // Where a lane's first copy is in a tile.
    static __device__ __forceinline__ unsigned own_place() {
        unsigned lane = lane_index() % LANES, word = lane / 8 % 2 * 2 + lane / 4 % 2;
        if constexpr (BY_WORDS) return chunk_of(0, lane % 4, lane / 16) + word * 4;
        else return XTile::offset(lane_index() / LANES, lane);
    }

    // A term's left operand, of which this lane copies tile after tile.
    struct Source {
        const bf16 *from; // of the first row that is this lane's
        unsigned ld;
        int left;    // k that are left from there on
        unsigned at; // own_place()

        __device__ __forceinline__ void advance(int tiles) {
            from += tiles * TILE_K;
            left -= tiles * TILE_K;
        }
    };

    __device__ __forceinline__ Source source(const gemm_term &term, unsigned tile, unsigned end) const {
        unsigned lane = lane_index() % LANES, row = lane_index() / LANES, k = tile * TILE_K + lane * ELEMENTS;
        Source source{(const bf16 *)term.a.data + (place.row + row) * term.a.ld + k, (unsigned)term.a.ld,
                      (int)min((unsigned)term.k, end * TILE_K) - (int)k, own_place()};
        if (BY_WORDS) keep(source.at);
        return source;
    }

    // Starts copying the tile of the rows, zeros behind the end. Lines are a multiple of eight.
    __device__ __forceinline__ void load(unsigned slot, const Source &source) const {
        unsigned char *tile = tiles + slot * XTile::BYTES;
        constexpr unsigned ROWS_AT_ONCE = 32 / LANES;
        unsigned row = lane_index() / LANES, at = BY_WORDS ? source.at : own_place();
        unsigned bytes = source.left > 0 ? 2 * ELEMENTS : 0;
        const bf16 *from = source.from;
        auto copy = [&] {
            if constexpr (BY_WORDS) cp_async4(tile + at, from, bytes);
            else cp_async16(tile + at, from, bytes);
            row += ROWS_AT_ONCE;
            from += ROWS_AT_ONCE * (uint64_t)source.ld;
            at = (at ^ (BY_WORDS ? 16 : 64)) + ROWS_AT_ONCE * TILE_K * 2; // the next row is spread otherwise
        };
        if constexpr (BY_WORDS) copy(); // a single row has no loop
#pragma unroll 1
        while (row < rows) copy();
    }

    // mma's B of the steps 2 j and 2 j + 1.
    __device__ __forceinline__ void read(Pair &b, unsigned slot, int j) const {
        const unsigned char *tile = tiles + slot * XTile::BYTES;
        if constexpr (N_TILES == 1) {
            // Rows that are not there take no access, and keep their zeros.
            unsigned row = lane_index() / 4;
            if (row < rows) {
                uint4 words = *(const uint4 *)(tile + chunk_of(row, lane_index() % 4, j));
                b[0][0][0] = words.x, b[0][0][1] = words.y, b[1][0][0] = words.z, b[1][0][1] = words.w;
            }
        } else {
            uint32_t r[4];
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int n = 0; n < N_TILES; n += 2) {
                    XTile::load_b(r, tile, 8 * n, 2 * j + i);
                    b[i][n][0] = r[0], b[i][n][1] = r[1], b[i][n + 1][0] = r[2], b[i][n + 1][1] = r[3];
                }
        }
    }
};

// What a warp computes.
template <int N_TILES> struct Gemv {
    using L = Left<N_TILES>;
    using Sum = float[N_TILES][4];

    const Place &place;
    const L left;
    const PairTable table;
    const float *const map;
    const unsigned column; // of the problem, the warp's first
    const unsigned g, t;

    __device__ __forceinline__ Gemv(const Place &place, PairTable table, const float *map, unsigned column,
                                    const L &left)
        : place(place), left(left), table(table), map(map), column(column), g(lane_index() / 4),
          t(lane_index() % 4) {}

    // Adds a tile's products; decode(a, i) gives mma's A of the steps 2 i and 2 i + 1.
    template <class Decode>
    __device__ __forceinline__ void multiply(Sum &sum, typename L::Pair &b, unsigned slot, Decode decode) const {
#pragma unroll
        for (int i = 0; i < STEPS / 2; i++) {
            uint32_t a[2][4];
            left.read(b, slot, i);
            decode(a, i);
#pragma unroll
            for (int e = 0; e < 2; e++)
#pragma unroll
                for (int j = 0; j < N_TILES; j++) mma_bf16(sum[j], a[e], b[e][j]);
        }
    }

    // Tiles [from, end) of a term with a quantized b.
    template <class Scales>
    __device__ __forceinline__ void add_quantized(Sum &sum, const gemm_term &term, unsigned from, unsigned end) const {
        // One tile of so many is decoded without shared memory, of which more rows need more.
        constexpr bool MAY_PERMUTE = __is_same(Scales, PlainTileScales);
        constexpr int PERMUTED = N_TILES == 1 ? AHEAD : 2;
        const quantized_matrix &q = term.quantized;
        const PairMover pairs(table);
        const CodeMover selectors;
        Scales scales(q, map, column + g, place.problem.n, from, end);
        // Each of the two warps copies a tile of a unit.
        typename L::Source source = left.source(term, from + left.warp, end);
        typename L::Pair b = {};
        const uint8_t *next[2];
        // In which this lane has codes.
        unsigned tiles = q.cols > RUN * t ? min(end, (unsigned)(q.cols - RUN * t + TILE_K - 1) / TILE_K) : 0;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            uint64_t row = min(column + g + 8 * r, place.problem.n - 1);
            next[r] = q.codes + (row * q.cols + from * TILE_K) / 2 + 16 * t;
        }
        uint4 codes[UNITS][2] = {};
        auto start = [&](int unit, unsigned tile) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                if (tile < tiles) codes[unit][r] = load128_once(next[r]);
                next[r] += TILE_K;
            }
            left.load(2 * unit + left.warp, source);
            source.advance(2);
            cp_async_commit();
        };
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) start(unit, from + 2 * unit);
        // Behind the end the left operand's tiles are zeros, which leave the sums as they are.
        for (unsigned first = from; first < end; first += AHEAD) {
            scales.turn(first);
#pragma unroll
            for (int unit = 0; unit < UNITS; unit++) {
                cp_async_wait<UNITS - 1>();
                left.sync();
#pragma unroll
                for (int tile = 0; tile < 2; tile++) {
                    const LaneScales scale = scales.of(first, 2 * unit + tile);
                    if constexpr (MAY_PERMUTE)
                        if ((2 * unit + tile) % PERMUTED == PERMUTED - 1) {
                            const PermutedTile permuted(selectors, codes[unit], q.levels, scale, tile);
                            multiply(sum, b, 2 * unit + tile,
                                     [&](uint32_t (&a)[2][4], int i) { permuted.decode(a, i); });
                            continue;
                        }
                    multiply(sum, b, 2 * unit + tile,
                             [&](uint32_t (&a)[2][4], int i) { pairs.decode(a, codes[unit], scale, tile, i); });
                }
                left.sync();
                start(unit, first + 2 * unit + AHEAD);
            }
        }
        cp_async_wait<0>();
        left.sync();
    }

    // The same with a b of bf16: the low-rank part.
    __device__ __forceinline__ void add_dense(Sum &sum, const gemm_term &term, unsigned from, unsigned end) const {
        typename L::Source source = left.source(term, from, end);
        typename L::Pair b = {};
        for (unsigned tile = from; tile < end; tile++) {
            if (left.warp == 0) left.load(0, source);
            source.advance(1);
            cp_async_commit();
            cp_async_wait<0>();
            left.sync();
            multiply(sum, b, 0, [&](uint32_t (&a)[2][4], int pair) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    uint64_t row = column + g + i % 2 * 8;
                    unsigned at = tile * TILE_K + 32 * pair + i / 4 * 16 + i / 2 % 2 * 8 + 2 * t;
                    bool inside = row < place.problem.n && at < term.k; // lines are a multiple of eight
                    a[i / 4][i % 4] =
                        inside ? *(const uint32_t *)((const bf16 *)term.b.data + row * term.b.ld + at) : 0;
                }
            });
            left.sync();
        }
    }
};

template <int N_TILES> __device__ __forceinline__ void gemv(const gemm_params &p) {
    using L = Left<N_TILES>;
    DYNAMIC_SHARED(memory);
    Place place = Place::of(p, L::ROWS, COLUMNS);
    const gemm_problem &problem = place.problem;
    // From one lane, so that the compiler knows that all have the same.
    unsigned warp = __shfl_sync(0xffffffffu, warp_index(), 0), part = warp % PARTS, column = warp / PARTS * 16;
    unsigned char *tables = memory + PARTS * L::BYTES;
    float *map = (float *)(tables + PairTable::bytes(p.pair_copies));
    load_tables((float2 *)tables, map, p, problem, THREADS);
    Gemv<N_TILES> gemv(place, PairTable{(const float2 *)tables, p.pair_copies}, map, (unsigned)place.column + column,
                       L(place, memory + part * L::BYTES, part, warp / PARTS));
    Parts parts(problem);
    typename Gemv<N_TILES>::Sum sum = {};
    for (unsigned i = 0; i < problem.n_terms; i++) {
        keep(parts.tiles); // what follows is computed again for each term, and takes no registers meanwhile
        unsigned first = 0;
        for (unsigned j = 0; j < i; j++) first += tiles_of(problem.terms[j]);
        const gemm_term &term = problem.terms[i];
        unsigned from = max(parts.begin(part), first), end = min(parts.begin(part + 1), first + tiles_of(term));
        if (from >= end) continue;
        if (term.b.type != TYPE_QUANTIZED) gemv.add_dense(sum, term, from - first, end - first);
        else if (PlainTileScales::serve(term.quantized))
            gemv.template add_quantized<PlainTileScales>(sum, term, from - first, end - first);
        else gemv.template add_quantized<TileScales>(sum, term, from - first, end - first);
    }
    __syncthreads();
    float *staged = (float *)memory + warp_index() % PARTS * L::ROWS * STAGED_COLUMNS + warp_index() / PARTS * 16;
#pragma unroll
    for (int j = 0; j < N_TILES; j++)
#pragma unroll
        for (int l = 0; l < 4; l++)
            staged[(8 * j + lane_index() % 4 * 2 + l % 2) * STAGED_COLUMNS + lane_index() / 4 + l / 2 * 8] = sum[j][l];
    __syncthreads();
    // The same of the place.
    unsigned block = blockIdx.x;
    keep(block);
    finish_tile<PARTS, L::ROWS, COLUMNS, STAGED_COLUMNS, THREADS>(Place::at(p, block, L::ROWS, COLUMNS),
                                                                 (const float *)memory);
}

KERNEL(gemv_8x32, gemm_params, THREADS, 2) { gemv<1>(p); }
KERNEL(gemv_16x32, gemm_params, THREADS, 2) { gemv<2>(p); }
KERNEL(gemv_32x32, gemm_params, THREADS, 1) { gemv<4>(p); }
