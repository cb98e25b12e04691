// Short causal convolution of every channel, followed by SiLU or not, forward and backward.
//
// z_t = sum_j w_j x_(t - W + 1 + j), y = silu(z) or z. x, y and their gradients are (rows, tokens, channels), float32 or
// bfloat16; weights (channels, W) and sums are float32. The backward pass computes z again. Rows of x are read in order, a few at
// a time, so that they come from memory once. Built and called by kernels/compiled.py for mixers/short_convolution, which
// computes the same in plain torch.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lanes.h"

namespace {

constexpr int64_t BLOCK = 32;  // tokens of a task. The tasks, and so the order of all sums, do not depend on the threads

struct Sizes {
    int64_t rows, tokens, channels, taps, silu;
    int64_t padded() const { return (channels + LANES - 1) / LANES * LANES; }
    int64_t blocks() const { return (tokens + BLOCK - 1) / BLOCK; }
};

// Weights by tap, (taps, padded channels), padded with zeros.
std::vector<float> by_tap(const Sizes& n, const float* weight) {
    std::vector<float> result(n.taps * n.padded(), 0.0f);
    for (int64_t c = 0; c < n.channels; ++c)
        for (int64_t j = 0; j < n.taps; ++j) result[j * n.padded() + c] = weight[c * n.taps + j];
    return result;
}

inline Vec sigmoid(Vec z) {
    Vec e = exp_negative(z < 0.0f ? z : -z);
    Vec s = 1.0f / (1.0f + e);
    return z < 0.0f ? e * s : s;
}

// z of token t for the channels from c on; x points to the first token of the row.
template <typename T>
inline Vec convolve(const Sizes& n, const T* x, const float* taps, int64_t t, int64_t c) {
    Vec z{};
    for (int64_t j = std::max<int64_t>(0, n.taps - 1 - t); j < n.taps; ++j)
        z += load(taps + j * n.padded() + c) * load(x + (t - n.taps + 1 + j) * n.channels + c, n.channels - c);
    return z;
}

template <typename T>
void forward(const Sizes& n, const T* x, const float* weight, T* y) {
    std::vector<float> taps = by_tap(n, weight);
    at::parallel_for(0, n.rows * n.blocks(), 1, [&](int64_t begin, int64_t end) {
        FlushDenormals scope;
        for (int64_t task = begin; task < end; ++task) {
            const T* row = x + task / n.blocks() * n.tokens * n.channels;
            T* out = y + task / n.blocks() * n.tokens * n.channels;
            int64_t first = task % n.blocks() * BLOCK, last = std::min(first + BLOCK, n.tokens);
            for (int64_t t = first; t < last; ++t)
                for (int64_t c = 0; c < n.channels; c += LANES) {
                    Vec z = convolve(n, row, taps.data(), t, c);
                    store(out + t * n.channels + c, n.channels - c, n.silu ? z * sigmoid(z) : z);
                }
        }
    });
}

template <typename T>
void backward(const Sizes& n, const T* x, const float* weight, const T* dy, T* dx, float* dweight) {
    std::vector<float> taps = by_tap(n, weight);
    int64_t tasks = n.rows * n.blocks(), size = n.taps * n.padded();
    std::vector<float> sums(tasks * size, 0.0f);
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        FlushDenormals scope;
        std::vector<float> dz((BLOCK + n.taps - 1) * n.padded());
        for (int64_t task = begin; task < end; ++task) {
            int64_t row = task / n.blocks() * n.tokens * n.channels;
            int64_t first = task % n.blocks() * BLOCK, last = std::min(first + BLOCK, n.tokens);
            int64_t reach = std::min(last + n.taps - 1, n.tokens);  // tokens of the next block that read this block's x
            float* sum = &sums[task * size];
            for (int64_t t = first; t < reach; ++t)
                for (int64_t c = 0; c < n.channels; c += LANES) {
                    Vec d = load(dy + row + t * n.channels + c, n.channels - c);
                    if (n.silu) {
                        Vec z = convolve(n, x + row, taps.data(), t, c), s = sigmoid(z);
                        d *= s * (1.0f + z * (1.0f - s));
                    }
                    store(&dz[(t - first) * n.padded() + c], d);
                    for (int64_t j = std::max<int64_t>(0, n.taps - 1 - t); t < last && j < n.taps; ++j) {
                        const T* from = x + row + (t - n.taps + 1 + j) * n.channels + c;
                        float* to = sum + j * n.padded() + c;
                        store(to, load(to) + d * load(from, n.channels - c));
                    }
                }
            for (int64_t t = first; t < last; ++t)
                for (int64_t c = 0; c < n.channels; c += LANES) {
                    Vec d{};
                    for (int64_t j = std::max<int64_t>(0, t + n.taps - reach); j < n.taps; ++j)
                        d += load(&taps[j * n.padded() + c]) * load(&dz[(t + n.taps - 1 - j - first) * n.padded() + c]);
                    store(dx + row + t * n.channels + c, n.channels - c, d);
                }
        }
    });
    for (int64_t task = 1; task < tasks; ++task)
        for (int64_t i = 0; i < size; ++i) sums[i] += sums[task * size + i];
    for (int64_t c = 0; c < n.channels; ++c)
        for (int64_t j = 0; j < n.taps; ++j) dweight[c * n.taps + j] = sums.empty() ? 0.0f : sums[j * n.padded() + c];
}

}  // namespace

#define ENTRIES(name, T)                                                                                                     \
    int lmu_short_convolution_forward_##name(int64_t rows, int64_t tokens, int64_t channels, int64_t taps, int64_t silu,     \
                                             const T* x, const float* weight, T* y) {                                        \
        return error_code([&] { forward(Sizes{rows, tokens, channels, taps, silu}, x, weight, y); });                        \
    }                                                                                                                        \
    int lmu_short_convolution_backward_##name(int64_t rows, int64_t tokens, int64_t channels, int64_t taps, int64_t silu,    \
                                              const T* x, const float* weight, const T* dy, T* dx, float* dweight) {         \
        return error_code([&] { backward(Sizes{rows, tokens, channels, taps, silu}, x, weight, dy, dx, dweight); });         \
    }

extern "C" {
ENTRIES(float32, float)
ENTRIES(bfloat16, uint16_t)
}
