// Implicit self-attention over the memory rows of every token, forward and backward.
//
// For every token: Q, K, V (each R x D) = gelu(pre), A = softmax(scale Q K^T) by rows, out = (p A) V. All matrices of a token
// stay in one core's cache; there Q is stored with the scale. Pre-activations and out are float32 or bfloat16, everything else is float32. Built and called by
// kernels/compiled.py; kernels/implicit_attention.attend computes the same in plain torch.
//
// Layout, for token i of a chunk, with N chunks of C tokens: pre[(i * 3R + row) * N * D + chunk * D + column] and
// out[(chunk * C + i) * D + column].

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.h"

namespace {

// gelu(x) = x Phi(x), and its derivative Phi(x) + x phi(x). Phi by Abramowitz & Stegun 7.1.26, to 8e-8; NaN stays NaN.
inline void gelu(Vec x, Vec& value, Vec& derivative) {
    Vec magnitude = x < 0.0f ? -x : x;
    Vec t = 1.0f / (1.0f + magnitude * (0.3275911f * 0.70710678118654752f));
    Vec poly = splat(1.061405429f);
    poly = poly * t - 1.453152027f;
    poly = poly * t + 1.421413741f;
    poly = poly * t - 0.284496736f;
    poly = poly * t + 0.254829592f;
    Vec density = exp_negative(x * x * -0.5f);
    Vec tail = poly * t * density * 0.5f;  // Phi(-|x|)
    Vec phi = x < 0.0f ? tail : 1.0f - tail;
    value = x * phi;
    derivative = phi + x * density * 0.39894228040143268f;
}

// Working space of one thread. Rows are padded with zeros to whole vectors. `qkv` stacks Q, K and V, `derivative` gelu's.
struct Workspace {
    int rows, width, vectors, padded_width, padded_rows;
    std::vector<float> qkv, derivative, weights, p_weights, column_mask, dweights, dout_row;

    Workspace(int rows, int width, bool backward)
        : rows(rows), width(width), vectors((width + LANES - 1) / LANES), padded_width(vectors * LANES),
          padded_rows((rows + LANES - 1) / LANES * LANES) {
        qkv.assign(3 * rows * padded_width, 0.0f);
        weights.assign(rows * padded_rows, 0.0f);
        p_weights.assign(padded_rows, 0.0f);
        column_mask.assign(padded_rows, 0.0f);
        std::fill_n(column_mask.begin(), rows, 1.0f);
        if (backward) {
            derivative.assign(3 * rows * padded_width, 0.0f);
            dweights.assign(rows, 0.0f);
            dout_row.assign(padded_width, 0.0f);
        }
    }

    template <typename T>
    Vec load_row(const T* from, int v) const {
        return load(from + v * LANES, width - v * LANES);
    }

    template <typename T>
    void store_row(T* to, int v, Vec x) const {
        store(to + v * LANES, width - v * LANES, x);
    }

    template <typename T>
    void activate(const T* pre, int64_t row_stride, float scale, bool backward) {
        for (int row = 0; row < 3 * rows; ++row) {
            float factor = row < rows ? scale : 1.0f;
            for (int v = 0; v < vectors; ++v) {
                Vec value, slope;
                gelu(load_row(pre + row * row_stride, v), value, slope);
                store(&qkv[row * padded_width + v * LANES], value * factor);
                if (backward) store(&derivative[row * padded_width + v * LANES], slope * factor);
            }
        }
    }

    // Computes A = softmax(Q K^T) and p A, where Q has the scale.
    void attend(const float* p) {
        const float *q = &qkv[0], *k = &qkv[rows * padded_width];
        constexpr int TILE = 4;
        for (int r0 = 0; r0 < rows; r0 += TILE)
            for (int s0 = 0; s0 < rows; s0 += TILE) {
                Vec acc[TILE][TILE] = {};
                if (r0 + TILE <= rows && s0 + TILE <= rows) {
                    for (int v = 0; v < vectors; ++v) {
                        Vec a[TILE], b[TILE];
                        for (int i = 0; i < TILE; ++i) a[i] = load(q + (r0 + i) * padded_width + v * LANES);
                        for (int j = 0; j < TILE; ++j) b[j] = load(k + (s0 + j) * padded_width + v * LANES);
                        for (int i = 0; i < TILE; ++i)
                            for (int j = 0; j < TILE; ++j) acc[i][j] += a[i] * b[j];
                    }
                    for (int i = 0; i < TILE; ++i)
                        for (int j = 0; j < TILE; ++j) weights[(r0 + i) * padded_rows + s0 + j] = horizontal_sum(acc[i][j]);
                } else {
                    for (int r = r0; r < rows && r < r0 + TILE; ++r)
                        for (int s = s0; s < rows && s < s0 + TILE; ++s)
                            weights[r * padded_rows + s] = dot(q + r * padded_width, k + s * padded_width);
                }
            }
        std::fill(p_weights.begin(), p_weights.end(), 0.0f);
        for (int r = 0; r < rows; ++r) {
            float* row = &weights[r * padded_rows];
            Vec lane_max = splat(-INFINITY), total = {};
            for (int s = rows; s < padded_rows; ++s) row[s] = row[0];  // so that the padding does not change the maximum
            for (int v = 0; v < padded_rows; v += LANES) {
                Vec x = load(row + v);
                lane_max = x > lane_max ? x : lane_max;
            }
            float row_max = lane_max[0];
            for (int i = 1; i < LANES; ++i) row_max = lane_max[i] > row_max ? lane_max[i] : row_max;
            for (int v = 0; v < padded_rows; v += LANES) {
                Vec x = exp_negative(load(row + v) - row_max) * load(&column_mask[v]);
                store(row + v, x);
                total += x;
            }
            Vec inverse_total = splat(1.0f / horizontal_sum(total));
            for (int v = 0; v < padded_rows; v += LANES) {
                Vec x = load(row + v) * inverse_total;
                store(row + v, x);
                store(&p_weights[v], load(&p_weights[v]) + p[r] * x);
            }
        }
    }

    float dot(const float* a, const float* b) const {
        Vec acc = {};
        for (int v = 0; v < vectors; ++v) acc += load(a + v * LANES) * load(b + v * LANES);
        return horizontal_sum(acc);
    }

    template <typename O>
    void write_output(O* out) const {
        const float* v_rows = &qkv[2 * rows * padded_width];
        for (int v = 0; v < vectors; ++v) {
            Vec acc = {};
            for (int s = 0; s < rows; ++s) acc += p_weights[s] * load(v_rows + s * padded_width + v * LANES);
            store_row(out, v, acc);
        }
    }

    // Overwrites pre with its gradient, given d out, and adds the gradient of p to dp.
    template <typename T, typename O>
    void backward(const O* dout, const float* p, T* pre, int64_t row_stride, float* dp) {
        const float *q = &qkv[0], *k = &qkv[rows * padded_width], *values = &qkv[2 * rows * padded_width];
        for (int v = 0; v < vectors; ++v) store(&dout_row[v * LANES], load_row(dout, v));
        for (int s = 0; s < rows; ++s) dweights[s] = dot(values + s * padded_width, &dout_row[0]);
        for (int s = 0; s < rows; ++s)
            for (int v = 0; v < vectors; ++v) {
                int at = (2 * rows + s) * padded_width + v * LANES;
                Vec dvalue = p_weights[s] * load(&dout_row[v * LANES]) * load(&derivative[at]);
                store_row(pre + (2 * rows + s) * row_stride, v, dvalue);
            }
        for (int r = 0; r < rows; ++r) {  // turns weights into d scores
            float* row = &weights[r * padded_rows];
            float row_dp = 0.0f;
            for (int s = 0; s < rows; ++s) row_dp += row[s] * dweights[s];
            dp[r] += row_dp;
            for (int s = 0; s < rows; ++s) row[s] *= p[r] * (dweights[s] - row_dp);
        }
        constexpr int TILE = 8;
        for (int v = 0; v < vectors; ++v) {
            for (int r0 = 0; r0 < rows; r0 += TILE) {
                int n = rows - r0 < TILE ? rows - r0 : TILE;
                Vec dq[TILE] = {}, dk[TILE] = {};
                if (n == TILE) {
                    for (int s = 0; s < rows; ++s) {
                        Vec ks = load(k + s * padded_width + v * LANES), qs = load(q + s * padded_width + v * LANES);
                        for (int i = 0; i < TILE; ++i) {
                            dq[i] += weights[(r0 + i) * padded_rows + s] * ks;
                            dk[i] += weights[s * padded_rows + r0 + i] * qs;
                        }
                    }
                } else {
                    for (int s = 0; s < rows; ++s) {
                        Vec ks = load(k + s * padded_width + v * LANES), qs = load(q + s * padded_width + v * LANES);
                        for (int i = 0; i < n; ++i) {
                            dq[i] += weights[(r0 + i) * padded_rows + s] * ks;
                            dk[i] += weights[s * padded_rows + r0 + i] * qs;
                        }
                    }
                }
                for (int i = 0; i < n; ++i) {
                    int r = r0 + i, at = r * padded_width + v * LANES;
                    store_row(pre + r * row_stride, v, dq[i] * load(&derivative[at]));
                    store_row(pre + (rows + r) * row_stride, v, dk[i] * load(&derivative[rows * padded_width + at]));
                }
            }
        }
    }
};

struct Sizes {
    int64_t chunks, tokens, rows, width;  // of a block: N, C, R, D
};

template <typename T>
void forward(const Sizes& n, const T* pre, const float* p, T* out, float scale) {
    int64_t row_stride = n.chunks * n.width;
    at::parallel_for(0, n.chunks * n.tokens, 1, [&](int64_t begin, int64_t end) {
        FlushDenormals scope;
        Workspace workspace(n.rows, n.width, false);
        for (int64_t token = begin; token < end; ++token) {
            int64_t i = token / n.chunks, chunk = token % n.chunks;
            workspace.activate(pre + i * 3 * n.rows * row_stride + chunk * n.width, row_stride, scale, false);
            workspace.attend(p);
            workspace.write_output(out + (chunk * n.tokens + i) * n.width);
        }
    });
}

template <typename T>
void backward(const Sizes& n, T* pre, const float* p, const T* dout, float* dp, float scale) {
    int64_t row_stride = n.chunks * n.width;
    int threads = at::get_num_threads();
    std::vector<float> thread_sums(static_cast<size_t>(threads) * n.rows, 0.0f);
    at::parallel_for(0, n.chunks * n.tokens, 1, [&](int64_t begin, int64_t end) {
        FlushDenormals scope;
        Workspace workspace(n.rows, n.width, true);
        float* thread_dp = &thread_sums[at::get_thread_num() * n.rows];
        for (int64_t token = begin; token < end; ++token) {
            int64_t i = token / n.chunks, chunk = token % n.chunks;
            T* token_pre = pre + i * 3 * n.rows * row_stride + chunk * n.width;
            workspace.activate(token_pre, row_stride, scale, true);
            workspace.attend(p);
            workspace.backward(dout + (chunk * n.tokens + i) * n.width, p, token_pre, row_stride, thread_dp);
        }
    });
    for (int w = 0; w < threads; ++w)
        for (int r = 0; r < n.rows; ++r) dp[r] += thread_sums[w * n.rows + r];
}

}  // namespace

// Sizes first, then addresses, then the scale: kernels/compiled.call.
#define ENTRIES(NAME, T)                                                                                                     \
    int lmu_attention_forward_##NAME(int64_t n, int64_t c, int64_t r, int64_t d, const T* pre, const float* p, T* out,       \
                                     float scale) {                                                                          \
        return error_code([&] { forward(Sizes{n, c, r, d}, pre, p, out, scale); });                                          \
    }                                                                                                                        \
    int lmu_attention_backward_##NAME(int64_t n, int64_t c, int64_t r, int64_t d, T* pre, const float* p, const T* dout,     \
                                      float* dp, float scale) {                                                              \
        return error_code([&] { backward(Sizes{n, c, r, d}, pre, p, dout, dp, scale); });                                    \
    }

extern "C" {
ENTRIES(float32, float)
ENTRIES(bfloat16, uint16_t)
}
