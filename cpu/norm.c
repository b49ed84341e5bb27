// RMSNorm, LayerNorm and sums over rows.
#include "simd.h"
#include "table.h"

// x as the activations' type holds it.
INLINE vf rounded(vf x, int type) {
    if (type == TYPE_F32) return x;
    uint16_t t[LANES];
    vf_store_bf16(t, x);
    return vf_load_bf16(t);
}

static void rms_norm(void *y, float *rstd, const void *x, const void *weight, int32_t weight_type, size_t rows,
                     size_t cols, float eps, int32_t type) {
    for (size_t i = 0; i < rows; i++) {
        const void *xi = at(x, i * cols, type);
        vf squares = vf_zero();
        for (size_t j = 0; j < cols; j += LANES) {
            vf v = v_load_part(at(xi, j, type), cols - j, type);
            squares = vf_fma(v, v, squares);
        }
        float r = 1.0f / sqrtf(vf_sum(squares) / (float)cols + eps);
        rstd[i] = r;
        for (size_t j = 0; j < cols; j += LANES) {
            vf n = rounded(vf_mul(v_load_part(at(xi, j, type), cols - j, type), vf_set1(r)), type);
            vf w = v_load_part(at(weight, j, weight_type), cols - j, weight_type);
            v_store_part(at_mut(y, i * cols + j, type), vf_mul(n, w), cols - j, type);
        }
    }
}

static void layer_norm(void *y, float *stats, const void *x, const void *weight, const void *bias,
                       int32_t weight_type, size_t rows, size_t cols, float eps, int32_t type) {
    for (size_t i = 0; i < rows; i++) {
        const void *xi = at(x, i * cols, type);
        vf sum = vf_zero(), squares = vf_zero();
        for (size_t j = 0; j < cols; j += LANES) sum = vf_add(sum, v_load_part(at(xi, j, type), cols - j, type));
        float mean = vf_sum(sum) / (float)cols;
        for (size_t j = 0; j < cols; j += LANES) {
            vf v = vf_sub(v_load_part(at(xi, j, type), cols - j, type), vf_set1(mean));
            if (cols - j < LANES) {
                float t[LANES];
                vf_store(t, v);
                v = vf_load_n(t, (int)(cols - j));
            }
            squares = vf_fma(v, v, squares);
        }
        float r = 1.0f / sqrtf(vf_sum(squares) / (float)cols + eps);
        stats[2 * i] = mean;
        stats[2 * i + 1] = r;
        for (size_t j = 0; j < cols; j += LANES) {
            size_t left = cols - j;
            vf n = vf_mul(vf_sub(v_load_part(at(xi, j, type), left, type), vf_set1(mean)), vf_set1(r));
            vf v = vf_mul(n, v_load_part(at(weight, j, weight_type), left, weight_type));
            if (bias) v = vf_add(v, v_load_part(at(bias, j, weight_type), left, weight_type));
            v_store_part(at_mut(y, i * cols + j, type), v, left, type);
        }
    }
}

// dx = rstd (g - mean(g) - n mean(g n)) with g = weight dy and n the normalized row; RMSNorm has no mean(g).
INLINE void norm_dx(void *dx, const void *dy, const void *x, float mean, float rstd, int center,
                    const void *weight, int weight_type, size_t cols, int accumulate, int type) {
    vf sum = vf_zero(), dot = vf_zero(), r = vf_set1(rstd), mu = vf_set1(mean);
    for (size_t j = 0; j < cols; j += LANES) {
        size_t left = cols - j;
        vf g = vf_mul(v_load_part(at(weight, j, weight_type), left, weight_type), v_load_part(at(dy, j, type), left, type));
        vf n = vf_mul(vf_sub(v_load_part(at(x, j, type), left, type), mu), r);
        sum = vf_add(sum, g);
        dot = vf_fma(g, n, dot);
    }
    vf mean_g = vf_set1(center ? vf_sum(sum) / (float)cols : 0.0f), mean_gn = vf_set1(vf_sum(dot) / (float)cols);
    for (size_t j = 0; j < cols; j += LANES) {
        size_t left = cols - j;
        vf g = vf_mul(v_load_part(at(weight, j, weight_type), left, weight_type), v_load_part(at(dy, j, type), left, type));
        vf n = vf_mul(vf_sub(v_load_part(at(x, j, type), left, type), mu), r);
        vf v = vf_mul(vf_fma(vf_neg(n), mean_gn, vf_sub(g, mean_g)), r);
        void *to = at_mut(dx, j, type);
        if (accumulate) v = vf_add(v_load_part(to, left, type), v);
        v_store_part(to, v, left, type);
    }
}

static void rms_norm_dx(void *dx, const void *dy, const void *x, const float *rstd, const void *weight,
                        int32_t weight_type, size_t rows, size_t cols, int32_t accumulate, int32_t type) {
    for (size_t i = 0; i < rows; i++) {
        size_t o = i * cols;
        norm_dx(at_mut(dx, o, type), at(dy, o, type), at(x, o, type), 0.0f, rstd[i], 0, weight, weight_type, cols,
                accumulate, type);
    }
}

static void layer_norm_dx(void *dx, const void *dy, const void *x, const float *stats, const void *weight,
                          int32_t weight_type, size_t rows, size_t cols, int32_t accumulate, int32_t type) {
    for (size_t i = 0; i < rows; i++) {
        size_t o = i * cols;
        norm_dx(at_mut(dx, o, type), at(dy, o, type), at(x, o, type), stats[2 * i], stats[2 * i + 1], 1, weight,
                weight_type, cols, accumulate, type);
    }
}

static void rms_norm_dweight(float *dweight, const void *dy, const void *x, const float *rstd, size_t rows,
                             size_t cols, size_t first, size_t last, int32_t type) {
    for (size_t j = first; j < last; j += LANES) {
        size_t left = last - j;
        vf sum = v_load_part(dweight + j, left, TYPE_F32);
        for (size_t i = 0; i < rows; i++) {
            vf n = rounded(vf_mul(v_load_part(at(x, i * cols + j, type), left, type), vf_set1(rstd[i])), type);
            sum = vf_fma(v_load_part(at(dy, i * cols + j, type), left, type), n, sum);
        }
        v_store_part(dweight + j, sum, left, TYPE_F32);
    }
}

static void layer_norm_dweight(float *dweight, const void *dy, const void *x, const float *stats, size_t rows,
                               size_t cols, size_t first, size_t last, int32_t type) {
    for (size_t j = first; j < last; j += LANES) {
        size_t left = last - j;
        vf sum = v_load_part(dweight + j, left, TYPE_F32);
        for (size_t i = 0; i < rows; i++) {
            vf centered = vf_sub(v_load_part(at(x, i * cols + j, type), left, type), vf_set1(stats[2 * i]));
            sum = vf_fma(v_load_part(at(dy, i * cols + j, type), left, type), vf_mul(centered, vf_set1(stats[2 * i + 1])), sum);
        }
        v_store_part(dweight + j, sum, left, TYPE_F32);
    }
}

static void column_sums(float *out, const void *x, size_t rows, size_t cols, size_t first, size_t last,
                        int32_t type) {
    for (size_t j = first; j < last; j += LANES) {
        size_t left = last - j;
        vf sum = v_load_part(out + j, left, TYPE_F32);
        for (size_t i = 0; i < rows; i++) sum = vf_add(sum, v_load_part(at(x, i * cols + j, type), left, type));
        v_store_part(out + j, sum, left, TYPE_F32);
    }
}

static void column_products(float *out, const void *a, const void *b, size_t rows, size_t cols, size_t first,
                            size_t last, int32_t type) {
    for (size_t j = first; j < last; j += LANES) {
        size_t left = last - j;
        vf sum = v_load_part(out + j, left, TYPE_F32);
        for (size_t i = 0; i < rows; i++) {
            vf x = v_load_part(at(a, i * cols + j, type), left, type);
            sum = vf_fma(x, v_load_part(at(b, i * cols + j, type), left, type), sum);
        }
        v_store_part(out + j, sum, left, TYPE_F32);
    }
}

static void scale_columns(void *out, const void *x, const float *factors, const float *bias, size_t rows, size_t cols,
                          int32_t type) {
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols; j += LANES) {
            size_t left = cols - j;
            vf v = v_load_part(at(x, i * cols + j, type), left, type), factor = v_load_part(factors + j, left, TYPE_F32);
            v = bias ? vf_fma(v, factor, v_load_part(bias + j, left, TYPE_F32)) : vf_mul(v, factor);
            v_store_part(at_mut(out, i * cols + j, type), v, left, type);
        }
}

static void rsqrt(float *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i += LANES) {
        vf root = vf_sqrt(v_load_part(x + i, n - i, TYPE_F32));
        v_store_part(out + i, vf_div(vf_set1(1.0f), root), n - i, TYPE_F32);
    }
}

static float sum_squares(const float *x, size_t n) {
    vf sum = vf_zero();
    for (size_t i = 0; i < n; i += LANES) {
        vf v = v_load_part(x + i, n - i, TYPE_F32);
        sum = vf_fma(v, v, sum);
    }
    return vf_sum(sum);
}

void TABLE_FN(norm)(struct kernel_table *table) {
    table->rms_norm = rms_norm;
    table->rms_norm_dx = rms_norm_dx;
    table->rms_norm_dweight = rms_norm_dweight;
    table->layer_norm = layer_norm;
    table->layer_norm_dx = layer_norm_dx;
    table->layer_norm_dweight = layer_norm_dweight;
    table->column_products = column_products;
    table->scale_columns = scale_columns;
    table->rsqrt = rsqrt;
    table->column_sums = column_sums;
    table->sum_squares = sum_squares;
}
