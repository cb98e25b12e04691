// Pre-activations of a token's memory in, what implicit self-attention reads from it out; and the way back.
//
// For every token: rows Q, K, V (each R x D) = gelu(pre), A = softmax(Q K^T) by rows, out = (p A) V. A token's matrices live in
// one core's cache from beginning to end. Pre-activations are float32 or bfloat16, everything else float32. Built and called by
// kernels/compiled.py; the arithmetic without it is kernels/reader.attend.
//
// Layout: pre[(i * 3R + row) * stride + chunk * D + column] for token i of a chunk; out[((b * n + chunk) * C + i) * D + column].

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.h"

namespace {

// e^x for x <= 0, to two units in the last place; e^-87 below.
inline Vec exp_negative(Vec x) {
    const Vec floor_ = splat(-87.0f);
    x = x < floor_ ? floor_ : x;
    Vec shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: what is added rounds to a whole number
    IVec n = (IVec)shifted - 0x4B400000;
    Vec k = shifted - 12582912.0f;
    Vec r = x - k * 0.693359375f;
    r = r - k * -2.12194440e-4f;
    Vec y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return (Vec)((IVec)y + (n << 23));
}

// gelu(x) = x Phi(x), and its slope Phi(x) + x phi(x). Phi by Abramowitz & Stegun 7.1.26, to 8e-8; NaN stays NaN.
inline void gelu(Vec x, Vec& value, Vec& slope) {
    Vec size = x < 0.0f ? -x : x;
    Vec t = 1.0f / (1.0f + size * (0.3275911f * 0.70710678118654752f));
    Vec poly = splat(1.061405429f);
    poly = poly * t - 1.453152027f;
    poly = poly * t + 1.421413741f;
    poly = poly * t - 0.284496736f;
    poly = poly * t + 0.254829592f;
    Vec density = exp_negative(x * x * -0.5f);
    Vec tail = poly * t * density * 0.5f;  // Phi(-|x|)
    Vec phi = x < 0.0f ? tail : 1.0f - tail;
    value = x * phi;
    slope = phi + x * density * 0.39894228040143268f;
}

// What one core works in. Rows are padded with zeros to whole vectors; Q, K and V stand one after the other.
struct Workspace {
    int rows, width, vectors, stride, pitch;
    std::vector<float> qkv, slope, weights, folded, real, dweights, grad;

    Workspace(int rows, int width, bool backward)
        : rows(rows), width(width), vectors((width + LANES - 1) / LANES), stride(vectors * LANES), pitch((rows + LANES - 1) / LANES * LANES) {
        qkv.assign(3 * rows * stride, 0.0f);
        weights.assign(rows * pitch, 0.0f);
        folded.assign(pitch, 0.0f);
        real.assign(pitch, 0.0f);
        std::fill_n(real.begin(), rows, 1.0f);
        if (backward) {
            slope.assign(3 * rows * stride, 0.0f);
            dweights.assign(rows, 0.0f);
            grad.assign(stride, 0.0f);
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
    void activate(const T* pre, int64_t row_stride, bool backward) {
        for (int row = 0; row < 3 * rows; ++row)
            for (int v = 0; v < vectors; ++v) {
                Vec value, rise;
                gelu(load_row(pre + row * row_stride, v), value, rise);
                store(&qkv[row * stride + v * LANES], value);
                if (backward) store(&slope[row * stride + v * LANES], rise);
            }
    }

    // A = softmax(Q K^T), and p A.
    void attend(const float* p) {
        const float *q = &qkv[0], *k = &qkv[rows * stride];
        constexpr int TILE = 4;
        for (int r0 = 0; r0 < rows; r0 += TILE)
            for (int s0 = 0; s0 < rows; s0 += TILE) {
                Vec acc[TILE][TILE] = {};
                if (r0 + TILE <= rows && s0 + TILE <= rows) {
                    for (int v = 0; v < vectors; ++v) {
                        Vec a[TILE], b[TILE];
                        for (int i = 0; i < TILE; ++i) a[i] = load(q + (r0 + i) * stride + v * LANES);
                        for (int j = 0; j < TILE; ++j) b[j] = load(k + (s0 + j) * stride + v * LANES);
                        for (int i = 0; i < TILE; ++i)
                            for (int j = 0; j < TILE; ++j) acc[i][j] += a[i] * b[j];
                    }
                    for (int i = 0; i < TILE; ++i)
                        for (int j = 0; j < TILE; ++j) weights[(r0 + i) * pitch + s0 + j] = sum(acc[i][j]);
                } else {
                    for (int r = r0; r < rows && r < r0 + TILE; ++r)
                        for (int s = s0; s < rows && s < s0 + TILE; ++s) weights[r * pitch + s] = dot(q + r * stride, k + s * stride);
                }
            }
        std::fill(folded.begin(), folded.end(), 0.0f);
        for (int r = 0; r < rows; ++r) {
            float* row = &weights[r * pitch];
            Vec most = splat(-INFINITY), total = {};
            for (int s = rows; s < pitch; ++s) row[s] = row[0];  // what pads a row is never its maximum alone
            for (int v = 0; v < pitch; v += LANES) {
                Vec x = load(row + v);
                most = x > most ? x : most;
            }
            float top = most[0];
            for (int i = 1; i < LANES; ++i) top = most[i] > top ? most[i] : top;
            for (int v = 0; v < pitch; v += LANES) {
                Vec x = exp_negative(load(row + v) - top) * load(&real[v]);
                store(row + v, x);
                total += x;
            }
            Vec by = splat(1.0f / sum(total));
            for (int v = 0; v < pitch; v += LANES) {
                Vec x = load(row + v) * by;
                store(row + v, x);
                store(&folded[v], load(&folded[v]) + p[r] * x);
            }
        }
    }

    float dot(const float* a, const float* b) const {
        Vec acc = {};
        for (int v = 0; v < vectors; ++v) acc += load(a + v * LANES) * load(b + v * LANES);
        return sum(acc);
    }

    template <typename O>
    void write(O* out) const {
        const float* v_rows = &qkv[2 * rows * stride];
        for (int v = 0; v < vectors; ++v) {
            Vec acc = {};
            for (int s = 0; s < rows; ++s) acc += folded[s] * load(v_rows + s * stride + v * LANES);
            store_row(out, v, acc);
        }
    }

    // From d out to d pre, written over pre; p's gradient is added to dp.
    template <typename T, typename O>
    void back(const O* dout, const float* p, T* pre, int64_t row_stride, float* dp) {
        const float *q = &qkv[0], *k = &qkv[rows * stride], *values = &qkv[2 * rows * stride];
        for (int v = 0; v < vectors; ++v) store(&grad[v * LANES], load_row(dout, v));
        for (int s = 0; s < rows; ++s) dweights[s] = dot(values + s * stride, &grad[0]);
        for (int s = 0; s < rows; ++s)
            for (int v = 0; v < vectors; ++v) {
                int at = (2 * rows + s) * stride + v * LANES;
                store_row(pre + (2 * rows + s) * row_stride, v, folded[s] * load(&grad[v * LANES]) * load(&slope[at]));
            }
        for (int r = 0; r < rows; ++r) {  // weights become d scores
            float* row = &weights[r * pitch];
            float own = 0.0f;
            for (int s = 0; s < rows; ++s) own += row[s] * dweights[s];
            dp[r] += own;
            for (int s = 0; s < rows; ++s) row[s] *= p[r] * (dweights[s] - own);
        }
        constexpr int TILE = 8;
        for (int v = 0; v < vectors; ++v) {
            for (int r0 = 0; r0 < rows; r0 += TILE) {
                int n = rows - r0 < TILE ? rows - r0 : TILE;
                Vec dq[TILE] = {}, dk[TILE] = {};
                if (n == TILE) {
                    for (int s = 0; s < rows; ++s) {
                        Vec ks = load(k + s * stride + v * LANES), qs = load(q + s * stride + v * LANES);
                        for (int i = 0; i < TILE; ++i) {
                            dq[i] += weights[(r0 + i) * pitch + s] * ks;
                            dk[i] += weights[s * pitch + r0 + i] * qs;
                        }
                    }
                } else {
                    for (int s = 0; s < rows; ++s) {
                        Vec ks = load(k + s * stride + v * LANES), qs = load(q + s * stride + v * LANES);
                        for (int i = 0; i < n; ++i) {
                            dq[i] += weights[(r0 + i) * pitch + s] * ks;
                            dk[i] += weights[s * pitch + r0 + i] * qs;
                        }
                    }
                }
                for (int i = 0; i < n; ++i) {
                    int r = r0 + i, at = r * stride + v * LANES;
                    store_row(pre + r * row_stride, v, dq[i] * load(&slope[at]));
                    store_row(pre + (rows + r) * row_stride, v, dk[i] * load(&slope[rows * stride + at]));
                }
            }
        }
    }
};

struct Sizes {
    int64_t chunks, tokens, rows, width;  // of a block: chunks, tokens of each, R, D
};

template <typename T>
void forward(const Sizes& n, const T* pre, const float* p, T* out) {
    int64_t stride = n.chunks * n.width;
    at::parallel_for(0, n.chunks * n.tokens, 1, [&](int64_t begin, int64_t end) {
        NoDenormals scope;
        Workspace space(n.rows, n.width, false);
        for (int64_t token = begin; token < end; ++token) {
            int64_t i = token / n.chunks, chunk = token % n.chunks;
            space.activate(pre + i * 3 * n.rows * stride + chunk * n.width, stride, false);
            space.attend(p);
            space.write(out + (chunk * n.tokens + i) * n.width);
        }
    });
}

template <typename T>
void backward(const Sizes& n, T* pre, const float* p, const T* dout, float* dp) {
    int64_t stride = n.chunks * n.width;
    int workers = at::get_num_threads();
    std::vector<float> partial(static_cast<size_t>(workers) * n.rows, 0.0f);
    at::parallel_for(0, n.chunks * n.tokens, 1, [&](int64_t begin, int64_t end) {
        NoDenormals scope;
        Workspace space(n.rows, n.width, true);
        float* mine = &partial[at::get_thread_num() * n.rows];
        for (int64_t token = begin; token < end; ++token) {
            int64_t i = token / n.chunks, chunk = token % n.chunks;
            T* at = pre + i * 3 * n.rows * stride + chunk * n.width;
            space.activate(at, stride, true);
            space.attend(p);
            space.back(dout + (chunk * n.tokens + i) * n.width, p, at, stride, mine);
        }
    });
    for (int w = 0; w < workers; ++w)
        for (int r = 0; r < n.rows; ++r) dp[r] += partial[w * n.rows + r];
}

}  // namespace

// Numbers first, then addresses: kernels/compiled.call.
#define ENTRIES(NAME, T)                                                                                                     \
    int lmu_read_##NAME(int64_t n, int64_t c, int64_t r, int64_t d, const T* pre, const float* p, T* out) {                  \
        return told([&] { forward(Sizes{n, c, r, d}, pre, p, out); });                                                       \
    }                                                                                                                        \
    int lmu_read_back_##NAME(int64_t n, int64_t c, int64_t r, int64_t d, T* pre, const float* p, const T* dout, float* dp) { \
        return told([&] { backward(Sizes{n, c, r, d}, pre, p, dout, dp); });                                                 \
    }

extern "C" {
ENTRIES(float32, float)
ENTRIES(bfloat16, uint16_t)
}
