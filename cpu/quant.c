// Quantizing blocks and dequantizing rows.
#include "quant.h"
#include "table.h"

// Smaller scales, such as a block of zeros has, count as this one when elements get codes.
#define LEAST_SCALE 1e-38f

// What is known of a block before its elements get codes.
struct block {
    float inverse; // of the scale
    float zero;
};

static vf load_elements(const void *x, int type, size_t left) {
    vf zeros = vf_zero();
    return left ? v_load_part(x, left, type) : zeros;
}

// Codes of sixteen scaled elements.
INLINE vi nearest_level(const struct quantizer *how, vf x) {
    vi rank = vi_set1(0);
    for (int i = 0; i < 15; i++)
        rank = vi_add(rank, vi_select(vf_lt(vf_set1(how->thresholds[i]), x), vi_set1(1), vi_set1(0)));
    return vf_round(vf_lookup16(how->ranks, rank));
}

INLINE vf clamped(vf x, float low, float high) { return vf_min(vf_max(x, vf_set1(low)), vf_set1(high)); }

INLINE vi nearest_whole(vf x, float zero, float low, float high) {
    return vf_round(clamped(vf_add(vi_to_vf(vf_round(x)), vf_set1(zero)), low, high));
}

// The nearest float of one sign bit, 7 - fraction bits of exponent and `fraction` of fraction, ties to even,
// saturating at `max`. `least` is the smallest normal number, `steps` its reciprocal times 2^fraction.
INLINE vi nearest_small_float(vf x, int fraction, int bias, float least, float steps, int max) {
    vi sign = vi_and(vi_srl(vf_as_vi(x), 24), vi_set1(0x80)), u = vf_as_vi(vf_abs(x));
    int drop = 23 - fraction;
    vi odd = vi_and(vi_srl(u, drop), vi_set1(1));
    vi normal = vi_srl(vi_add(u, vi_add(odd, vi_set1((1 << (drop - 1)) - 1))), drop);
    normal = vi_sub(normal, vi_set1((127 - bias) << fraction));
    vi small = vf_round(vf_mul(vf_abs(x), vf_set1(steps)));
    vi code = vi_select(vf_lt(vf_abs(x), vf_set1(least)), small, normal);
    return vi_or(sign, vi_select(vi_gt(code, vi_set1(max)), vi_set1(max), code));
}

INLINE vi encode(const struct quantized *q, const struct quantizer *how, vf x, struct block b) {
    x = vf_mul(x, vf_set1(b.inverse));
    switch (q->format) {
    case CODES_4BIT:
        return how->thresholds ? nearest_level(how, x) : nearest_whole(x, b.zero, 0.0f, 15.0f);
    case CODES_INT8: return vi_and(nearest_whole(x, 0.0f, -127.0f, 127.0f), vi_set1(0xff));
    case CODES_E4M3: return nearest_small_float(x, 3, 7, 0x1p-6f, 0x1p9f, 0x7e);
    default: return nearest_small_float(x, 2, 15, 0x1p-14f, 0x1p16f, 0x7b);
    }
}

static void encode_run(const struct quantized *q, const struct quantizer *how, const void *x, int type,
                       size_t element, size_t n, struct block b) {
    for (size_t i = 0; i < n; i += LANES) {
        int32_t code[LANES];
        vi_store(code, encode(q, how, load_elements(at(x, element + i, type), type, n - i), b));
        size_t count = n - i < LANES ? n - i : LANES;
        if (q->format == CODES_4BIT) {
            uint8_t *to = q->codes + (element + i) / 2;
            for (size_t j = 0; j < (count + 1) / 2; j++) to[j] = (uint8_t)(code[2 * j] << 4 | code[2 * j + 1]);
        } else {
            for (size_t j = 0; j < count; j++) q->codes[element + i + j] = (uint8_t)code[j];
        }
    }
}

// The rows and columns of a block; flat blocks are one long row.
struct extent {
    size_t element, rows, cols, stride;
};

static struct extent extent_of(const struct quantized *q, size_t block) {
    size_t total = q->rows * q->cols;
    if (q->block_rows == 0) {
        size_t first = block * q->block_cols, left = total - first;
        return (struct extent){first, 1, left < q->block_cols ? left : q->block_cols, 0};
    }
    size_t row = block / q->blocks_per_row * q->block_rows, col = block % q->blocks_per_row * q->block_cols;
    size_t rows = q->rows - row < q->block_rows ? q->rows - row : q->block_rows;
    size_t cols = q->cols - col < q->block_cols ? q->cols - col : q->block_cols;
    return (struct extent){row * q->cols + col, rows, cols, q->cols};
}

static float lane_min(vf x) { return -vf_max_lane(vf_neg(x)); }

static float whole(float x) {
    float t[LANES];
    vf_store(t, vi_to_vf(vf_round(vf_set1(x))));
    return t[0];
}

static int32_t quantize(const struct quantized *q, const struct quantizer *how, const void *x, int32_t type,
                        size_t first, size_t last) {
    for (size_t block = first; block < last; block++) {
        struct extent e = extent_of(q, block);
        vf low = vf_zero(), high = vf_zero(), bad = vf_zero();
        for (size_t r = 0; r < e.rows; r++)
            for (size_t c = 0; c < e.cols; c += LANES) {
                vf v = load_elements(at(x, e.element + r * e.stride + c, type), type, e.cols - c);
                low = vf_min(v, low);
                high = vf_max(v, high);
                bad = vf_add(bad, vf_mul(v, vf_zero())); // NaN if v is not finite
            }
        if (vf_sum(bad) != 0.0f) return 0;
        float most = vf_max_lane(high), least = lane_min(low);
        float absmax = fabsf(most > -least ? most : least);
        float scale = q->zeros ? (most - least) / how->max_level : absmax / how->max_level;
        struct block b = {1.0f / (scale > LEAST_SCALE ? scale : LEAST_SCALE), q->format == CODES_4BIT ? 8.0f : 0.0f};
        if (q->zeros) {
            b.zero = whole(-least * b.inverse);
            q->zeros[block] = (uint8_t)b.zero;
        }
        q->scales[block] = scale;
        for (size_t r = 0; r < e.rows; r++) encode_run(q, how, x, type, e.element + r * e.stride, e.cols, b);
    }
    return 1;
}

static void dequantize_row(const struct quantized *q, size_t row, void *out, int32_t out_type) {
    if (out_type == TYPE_F32) {
        decode_row(q, row, 0, q->cols, out);
        return;
    }
    for (size_t c = 0; c < q->cols; c += LANES)
        v_store_part(at_mut(out, c, out_type), decode_columns(q, row, c, q->cols - c), q->cols - c, out_type);
}

#if defined(LOWRANK_AVX512BF16)
#define TAKES_PANELS 1
#else
#define TAKES_PANELS 0
#endif

// Whether products with a scale may be computed in panels.
static int suits_panels(const struct quantized *q, float scale) {
    int small_float = q->format == CODES_E4M3 || q->format == CODES_E5M2;
    if (small_float && fabsf(scale) >= MOST_SMALL_FLOAT_SCALE) return 0;
    return scale == 0.0f || fabsf(scale) >= NORMAL_SCALE;
}

static int lay_out_constants(const struct quantized *to, const struct quantized *from, size_t row) {
    for (size_t col = 0; col < from->cols; col += from->block_cols) {
        size_t run, block = block_of(from, row, col, &run), at = panel_block(from, row, col);
        to->scales[at] = scale_of(from, block);
        if (!suits_panels(from, to->scales[at])) return 0;
        if (from->zeros) to->zeros[at] = from->zeros[block];
        if (has_minimums(from)) {
            to->minimums[at] = zero_of(from, block);
            if (to->minimums[at] != 0.0f && fabsf(to->minimums[at]) < NORMAL_SCALE) return 0;
        }
    }
    return 1;
}

static void lay_out_codes(const struct quantized *to, const struct quantized *from, size_t row) {
    if (from->format != CODES_4BIT) {
        const uint8_t *codes = from->codes + row * from->cols;
        for (size_t col = 0; col < from->cols; col++) to->codes[panel_code_byte(from, row, col)] = codes[col];
        return;
    }
    for (size_t col = 0; col < from->cols; col += PANEL_COLS) {
        const uint8_t *codes = from->codes + (row * from->cols + col) / 2;
        uint8_t *words = to->codes + panel_word(from, row, col);
        for (size_t p = 0; p < 4; p++) {
            uint32_t two = 0;
            for (size_t s = 0; s < 4; s++) {
                uint8_t pair = codes[4 * s + p];
                size_t bit = 4 * panel_nibble(s);
                two |= (uint32_t)(pair >> 4) << (16 + bit) | (uint32_t)(pair & 15) << bit;
            }
            memcpy(words + 4 * p, &two, sizeof two);
        }
    }
}

static int32_t lay_out_panels(const struct quantized *to, const struct quantized *from, size_t first, size_t last) {
    if (!TAKES_PANELS) return 0;
    for (size_t row = first * PANEL_ROWS; row < last * PANEL_ROWS; row++) {
        if (!lay_out_constants(to, from, row)) return 0;
        lay_out_codes(to, from, row);
    }
    return 1;
}

void TABLE_FN(quant)(struct kernel_table *table) {
    table->quantize = quantize;
    table->lay_out_panels = lay_out_panels;
    table->dequantize_row = dequantize_row;
}
