// Softmax cross-entropy of rows of logits, and its gradient.
#include "table.h"
#include "vmath.h"

static void cross_entropy(float *losses, void *dlogits, int32_t type, const float *logits, const int32_t *targets,
                          size_t rows, size_t vocabulary, float grad_scale) {
    for (size_t row = 0; row < rows; row++) {
        const float *x = logits + row * vocabulary;
        size_t whole = vocabulary / LANES * LANES, target = (size_t)targets[row];
        vf top = vf_set1(-INFINITY), sum = vf_zero();
        for (size_t j = 0; j < whole; j += LANES) top = vf_max(top, vf_load(x + j));
        float m = vf_max_lane(top);
        for (size_t j = whole; j < vocabulary; j++) m = x[j] > m ? x[j] : m;
        vf shift = vf_set1(m);
        for (size_t j = 0; j < whole; j += LANES) sum = vf_add(sum, v_exp(vf_sub(vf_load(x + j), shift)));
        if (whole < vocabulary) {
            int left = (int)(vocabulary - whole);
            float t[LANES];
            vf_store(t, v_exp(vf_sub(vf_load_n(x + whole, left), shift)));
            sum = vf_add(sum, vf_load_n(t, left));
        }
        float total = vf_sum(sum);
        losses[row] = (m + s_log(total)) - x[target];
        if (!dlogits) continue;
        vf factor = vf_set1(grad_scale / total);
        for (size_t j = 0; j < vocabulary; j += LANES) {
            size_t left = vocabulary - j;
            vf g = vf_mul(v_exp(vf_sub(v_load_part(x + j, left, TYPE_F32), shift)), factor);
            if (target - j < LANES) {
                float t[LANES];
                vf_store(t, g);
                t[target - j] -= grad_scale;
                g = vf_load(t);
            }
            v_store_part(at_mut(dlogits, row * vocabulary + j, type), g, left, type);
        }
    }
}

void TABLE_FN(cross_entropy)(struct kernel_table *table) { table->cross_entropy = cross_entropy; }
