// Implicit self-attention over the memory rows of every token, forward and backward.
//
// For every token: Q, K, V (each R x D) = gelu(pre), A = softmax(scale Q K^T) by rows, out = (p A) V. All matrices of a token
// stay in one core's cache; there Q is stored with the scale. Pre-activations and out are float32 or bfloat16, everything else is
// float32. Built and called by kernels/compiled.py; kernels/implicit_attention.attend computes the same in plain torch.
//
// Layout, for token i of a chunk, with N chunks of C tokens: pre[(i * 3R + row) * N * D + chunk * D + column] and
// out[(chunk * C + i) * D + column].

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace {

// Phi(x) - 1/2 = x N(x^2) / D(x^2), and the slope of gelu, Phi(x) + x phi(x), less 1/2 = x S(x^2) / D(x^2), where |x| is cut at
// CUT: fitted together in float64 at 4,000 Chebyshev points, weighted until the errors were even, within 6e-8 of both. Beyond CUT
// Phi is 0 or 1 to 4e-9. One division serves both, and neither needs an exponential function.
constexpr float CUT = 5.8f;
constexpr float PHI[] = {3.989419937e-01f, 4.342675209e-02f, 5.692811217e-03f, 2.976145770e-04f, 1.290514319e-05f, 2.156934329e-07f, 5.351576959e-10f};
constexpr float SLOPE[] = {7.978842258e-01f, -4.612809420e-02f, 1.464152243e-02f, -2.165569313e-04f, 3.117506276e-05f, -1.839125190e-07f, 5.492889255e-09f, -2.678838054e-11f};
constexpr float DENOMINATOR[] = {1.000000000e+00f, 2.755177915e-01f, 3.519440070e-02f, 2.696866868e-03f, 1.336784771e-04f, 3.870860837e-06f, 3.140437599e-08f};

template <int N>
inline Vec polynomial(const float (&coefficients)[N], Vec u) {
    Vec y = splat(coefficients[N - 1]);
    for (int i = N - 2; i >= 0; --i) y = y * u + coefficients[i];
    return y;
}

// gelu(x) = x Phi(x), and its slope. NaN stays NaN. Both are 0 below -CUT: an error there would count a thousandfold at
// x = -1000, and again where keys and values are as large.
struct Gelu {
    Vec x, low, u, scale;

    explicit Gelu(Vec x) : x(x), low(x < -CUT ? splat(0.0f) : x) {
        Vec cut = low > CUT ? splat(CUT) : low;
        u = cut * cut;
        scale = cut * reciprocal(polynomial(DENOMINATOR, u));
    }
    Vec value() const { return low * (polynomial(PHI, u) * scale + 0.5f); }
    Vec slope() const { return x < -CUT ? splat(0.0f) : polynomial(SLOPE, u) * scale + 0.5f; }
};

// Calls work.template operator()<n>() for 1 <= n <= MOST, so that its loops over n vectors stay in registers.
template <int MOST, typename Work>
inline void with_constant(int n, const Work& work) {
    if constexpr (MOST > 1) {
        if (n < MOST) return with_constant<MOST - 1>(n, work);
    }
    work.template operator()<MOST>();
}

// Working space of one thread. Rows are padded with zeros to whole vectors, and matrices with rows of zeros. `values` holds the
// products of gelu's slope at V with d out, `slopes` gelu's slopes at Q and below at K.
struct Workspace {
    int rows, width, vectors, padded_width, padded_rows;
    Buffer q, k, slopes, values, weights, p_weights, column_mask, dweights, row;

    Workspace(int rows, int width, bool backward)
        : rows(rows), width(width), vectors((width + LANES - 1) / LANES), padded_width(vectors * LANES),
          padded_rows((rows + LINE - 1) / LINE * LINE) {
        q.assign(padded_rows * padded_width, 0.0f);
        k.assign(padded_rows * padded_width, 0.0f);
        weights.assign(padded_rows * padded_rows, 0.0f);
        p_weights.assign(padded_rows, 0.0f);
        column_mask.assign(padded_rows, 0.0f);
        std::fill_n(column_mask.begin(), rows, 1.0f);
        row.assign(padded_width, 0.0f);
        if (backward) {
            slopes.assign(2 * rows * padded_width, 0.0f);
            values.assign(rows * padded_width, 0.0f);
            dweights.assign(padded_rows, 0.0f);
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

    // Asks for the row of the next token while this token is computed: the rows of a token are far apart in memory, too many
    // streams for the processor to foresee.
    template <typename T>
    void prefetch_row(const T* from) const {
        for (int column = 0; column < width; column += 64 / sizeof(T)) __builtin_prefetch(from + column, 0, 2);
    }

    // Q, with the scale, and K; for a backward pass also their slopes.
    template <bool BACKWARD, typename T>
    void activate(const T* pre, const T* next, int64_t row_stride, float scale) {
        for (int r = 0; r < 2 * rows; ++r) {
            float factor = r < rows ? scale : 1.0f;
            float* to = r < rows ? &q[r * padded_width] : &k[(r - rows) * padded_width];
            prefetch_row(next + r * row_stride);
            for (int v = 0; v < vectors; ++v) {
                Gelu gelu(load_row(pre + r * row_stride, v));
                store(to + v * LANES, gelu.value() * factor);
                if (BACKWARD) store(&slopes[r * padded_width + v * LANES], gelu.slope() * factor);
            }
        }
    }

    // Q K^T, by tiles whose products are summed over lanes together.
    void scores() {
        constexpr int TILE = 4, HEIGHT = LANES == 16 ? 4 : 2, SUMS = HEIGHT * TILE;  // as many as there are registers for
        for (int r0 = 0; r0 < rows; r0 += HEIGHT)
            for (int s0 = 0; s0 < rows; s0 += TILE) {
                Vec sums[SUMS] = {};
                const float *q0 = &q[r0 * padded_width], *k0 = &k[s0 * padded_width];
                for (int v = 0; v < vectors; ++v) {
                    Vec b[TILE];
                    for (int j = 0; j < TILE; ++j) b[j] = load(k0 + j * padded_width + v * LANES);
                    for (int i = 0; i < HEIGHT; ++i) {
                        Vec a = load(q0 + i * padded_width + v * LANES);
                        for (int j = 0; j < TILE; ++j) sums[i * TILE + j] += a * b[j];
                    }
                }
                float found[SUMS];
                for (int i = 0; i < SUMS; i += LANES) store(found + i, horizontal_sums(sums + i));
                for (int i = 0; i < HEIGHT; ++i)
                    std::memcpy(&weights[(r0 + i) * padded_rows + s0], found + i * TILE, TILE * sizeof(float));
            }
    }

    // Computes A = softmax(Q K^T) and p A, where Q has the scale.
    void attend(const float* p) {
        scores();
        std::fill(p_weights.begin(), p_weights.end(), 0.0f);
        for (int r = 0; r < rows; ++r) {
            float* row = &weights[r * padded_rows];
            Vec lane_max = splat(-INFINITY), total = {};
            for (int s = rows; s < padded_rows; ++s) row[s] = row[0];  // so that the padding does not change the maximum
            for (int v = 0; v < padded_rows; v += LANES) {
                Vec x = load(row + v);
                lane_max = x > lane_max ? x : lane_max;
            }
            float row_max = horizontal_max(lane_max);
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

    // (p A) V: V is used once and stays in registers.
    template <typename T>
    void write_output(const T* pre, const T* next, int64_t row_stride, T* out) {
        std::fill(row.begin(), row.end(), 0.0f);
        for (int s = 0; s < rows; ++s) {
            prefetch_row(next + s * row_stride);
            for (int v = 0; v < vectors; ++v) {
                Vec value = Gelu(load_row(pre + s * row_stride, v)).value();
                store(&row[v * LANES], load(&row[v * LANES]) + p_weights[s] * value);
            }
        }
        for (int v = 0; v < vectors; ++v) store_row(out, v, load(&row[v * LANES]));
    }

    // d (p A) = V d out; keeps d out times the slopes of V.
    template <typename T>
    void activate_values(const T* pre, const T* next, int64_t row_stride, const T* dout) {
        for (int v = 0; v < vectors; ++v) store(&row[v * LANES], load_row(dout, v));
        for (int s = 0; s < rows; ++s) {
            Vec sum = {};
            prefetch_row(next + s * row_stride);
            for (int v = 0; v < vectors; ++v) {
                Gelu gelu(load_row(pre + s * row_stride, v));
                Vec d = load(&row[v * LANES]);
                sum += gelu.value() * d;
                store(&values[s * padded_width + v * LANES], gelu.slope() * d);
            }
            dweights[s] = horizontal_sum(sum);
        }
    }

    // Overwrites pre with its gradient and adds the gradient of p to dp, after `activate_values` and `attend`.
    template <typename T>
    void backward(const float* p, T* pre, int64_t row_stride, float* dp) {
        for (int s = 0; s < rows; ++s)
            for (int v = 0; v < vectors; ++v)
                store_row(pre + (2 * rows + s) * row_stride, v, p_weights[s] * load(&values[s * padded_width + v * LANES]));
        for (int r = 0; r < rows; ++r) {  // turns weights into d scores
            float* row = &weights[r * padded_rows];
            Vec sum = {};
            for (int s = 0; s < padded_rows; s += LANES) sum += load(row + s) * load(&dweights[s]);
            float row_dp = horizontal_sum(sum);
            dp[r] += row_dp;
            for (int s = 0; s < padded_rows; s += LANES) store(row + s, load(row + s) * (p[r] * (load(&dweights[s]) - row_dp)));
        }
        multiply(&weights[0], padded_rows, 1, &k[0], &slopes[0], pre, row_stride);
        multiply(&weights[0], 1, padded_rows, &q[0], &slopes[rows * padded_width], pre + rows * row_stride, row_stride);
    }

    // to = slope * (a @ b), where a has element (r, s) at a[r * stride_r + s * stride_s].
    template <typename T>
    void multiply(const float* a, int stride_r, int stride_s, const float* b, const float* slope, T* to, int64_t row_stride) {
        constexpr int HEIGHT = 4, VECTORS = LANES == 16 ? 4 : 2;  // sums that fit the registers, and few loads for each
        for (int v0 = 0; v0 < vectors; v0 += VECTORS)
            with_constant<VECTORS>(vectors - v0, [&]<int N>() {
                for (int r0 = 0; r0 < rows; r0 += HEIGHT)
                    with_constant<HEIGHT>(rows - r0, [&]<int M>() {
                        Vec sums[M][N] = {};
                        for (int s = 0; s < rows; ++s) {
                            Vec row[N];
                            for (int j = 0; j < N; ++j) row[j] = load(b + s * padded_width + (v0 + j) * LANES);
                            for (int i = 0; i < M; ++i) {
                                Vec factor = splat(a[(r0 + i) * stride_r + s * stride_s]);
                                for (int j = 0; j < N; ++j) sums[i][j] += factor * row[j];
                            }
                        }
                        for (int i = 0; i < M; ++i)
                            for (int j = 0; j < N; ++j) {
                                int r = r0 + i, v = v0 + j;
                                store_row(to + r * row_stride, v, sums[i][j] * load(slope + r * padded_width + v * LANES));
                            }
                    });
            });
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
            const T* token_pre = pre + i * 3 * n.rows * row_stride + chunk * n.width;
            const T* next = token_pre + (chunk + 1 < n.chunks ? n.width : 0);
            workspace.template activate<false>(token_pre, next, row_stride, scale);
            workspace.attend(p);
            int64_t first_value = 2 * n.rows * row_stride;
            workspace.write_output(token_pre + first_value, next + first_value, row_stride,
                                   out + (chunk * n.tokens + i) * n.width);
        }
    });
}

template <typename T>
void backward(const Sizes& n, T* pre, const float* p, const T* dout, float* dp, float scale) {
    int64_t row_stride = n.chunks * n.width;
    int threads = at::get_num_threads();
    Buffer thread_sums(static_cast<size_t>(threads) * n.rows, 0.0f);
    at::parallel_for(0, n.chunks * n.tokens, 1, [&](int64_t begin, int64_t end) {
        FlushDenormals scope;
        Workspace workspace(n.rows, n.width, true);
        float* thread_dp = &thread_sums[at::get_thread_num() * n.rows];
        for (int64_t token = begin; token < end; ++token) {
            int64_t i = token / n.chunks, chunk = token % n.chunks;
            T* token_pre = pre + i * 3 * n.rows * row_stride + chunk * n.width;
            const T* next = token_pre + (chunk + 1 < n.chunks ? n.width : 0);
            int64_t first_value = 2 * n.rows * row_stride;
            workspace.template activate<true>(token_pre, next, row_stride, scale);
            workspace.activate_values(token_pre + first_value, next + first_value, row_stride,
                                      dout + (chunk * n.tokens + i) * n.width);
            workspace.attend(p);
            workspace.backward(p, token_pre, row_stride, thread_dp);
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
