// Short causal convolution of every channel, followed by SiLU or not, forward and backward.
//
// z_t = sum_j w_j x_(t - W + 1 + j), y = silu(z) or z. x, y and their gradients are (rows, tokens, channels), float32 or
// bfloat16; weights (channels, W) and sums are float32. The backward pass computes z again. Rows of x are read in order, a few at
// a time, so that they come from memory once. Built and called by kernels/compiled.py for mixers/short_convolution, which
// computes the same in plain torch.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "lanes.h"

namespace {

constexpr int TILE = 4;        // tokens that are computed together, and share what is loaded
constexpr int64_t BLOCK = 32;  // tokens of a task. The tasks, and so the order of all sums, do not depend on the threads

struct Sizes {
    int64_t rows, tokens, channels, taps, silu;
    int64_t padded() const { return (channels + LANES - 1) / LANES * LANES; }
    int64_t blocks() const { return (tokens + BLOCK - 1) / BLOCK; }
};

// Weights by tap, (taps, padded channels), padded with zeros.
Buffer by_tap(const Sizes& n, const float* weight) {
    Buffer result(n.taps * n.padded(), 0.0f);
    for (int64_t c = 0; c < n.channels; ++c)
        for (int64_t j = 0; j < n.taps; ++j) result[j * n.padded() + c] = weight[c * n.taps + j];
    return result;
}

// z of TOKENS tokens from t on, for the channels from c on; x points to the first token of the row. Several tokens share what is
// loaded, but need all their inputs in the row. TAPS: the taps of the kernel if they are known to the compiler, else 0.
template <int TOKENS, int TAPS, typename T>
inline void convolve(const Sizes& n, const T* x, const float* taps, int64_t t, int64_t c, Vec* z) {
    const int64_t n_taps = TAPS ? TAPS : n.taps;
    for (int i = 0; i < TOKENS; ++i) z[i] = Vec{};
    for (int64_t j = TOKENS > 1 ? 0 : std::max<int64_t>(0, n_taps - 1 - t); j < n_taps; ++j) {
        Vec weight = load(taps + j * n.padded() + c);
        for (int i = 0; i < TOKENS; ++i) z[i] += weight * load(x + (t + i - n_taps + 1 + j) * n.channels + c, n.channels - c);
    }
}

// Calls `work.operator()<TOKENS>(t)` for the tokens from first to last: TILE of them at a time where `fits(t)`, else one.
template <typename Fits, typename Work>
void for_tokens(int64_t first, int64_t last, const Fits& fits, const Work& work) {
    for (int64_t t = first; t < last;) {
        if (t + TILE <= last && fits(t)) {
            work.template operator()<TILE>(t);
            t += TILE;
        } else {
            work.template operator()<1>(t++);
        }
    }
}

template <int TAPS, typename T>
void forward(const Sizes& n, const T* x, const float* weight, T* y) {
    Buffer taps = by_tap(n, weight);
    at::parallel_for(0, n.rows * n.blocks(), 1, [&](int64_t begin, int64_t end) {
        FlushDenormals scope;
        for (int64_t task = begin; task < end; ++task) {
            const T* row = x + task / n.blocks() * n.tokens * n.channels;
            T* out = y + task / n.blocks() * n.tokens * n.channels;
            int64_t first = task % n.blocks() * BLOCK, last = std::min(first + BLOCK, n.tokens);
            auto outputs = [&]<int TOKENS>(int64_t t) {
                for (int64_t c = 0; c < n.channels; c += LANES) {
                    Vec z[TOKENS];
                    convolve<TOKENS, TAPS>(n, row, taps.data(), t, c, z);
                    for (int i = 0; i < TOKENS; ++i)
                        store(out + (t + i) * n.channels + c, n.channels - c, n.silu ? silu(z[i]) : z[i]);
                }
            };
            for_tokens(first, last, [&](int64_t t) { return t >= n.taps - 1; }, outputs);
        }
    });
}

template <int TAPS, typename T>
void backward(const Sizes& n, const T* x, const float* weight, const T* dy, T* dx, float* dweight) {
    Buffer taps = by_tap(n, weight);
    const int64_t n_taps = TAPS ? TAPS : n.taps;
    int64_t tasks = n.rows * n.blocks(), size = n.taps * n.padded();
    Buffer sums(tasks * size, 0.0f);
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        FlushDenormals scope;
        Buffer dz((BLOCK + n.taps - 1) * n.padded());
        for (int64_t task = begin; task < end; ++task) {
            int64_t row = task / n.blocks() * n.tokens * n.channels;
            int64_t first = task % n.blocks() * BLOCK, last = std::min(first + BLOCK, n.tokens);
            int64_t reach = std::min(last + n.taps - 1, n.tokens);  // tokens of the next block that read this block's x
            float* sum = &sums[task * size];
            auto gradients_of_z = [&]<int TOKENS>(int64_t t) {
                for (int64_t c = 0; c < n.channels; c += LANES) {
                    Vec d[TOKENS], z[TOKENS];
                    for (int i = 0; i < TOKENS; ++i) d[i] = load(dy + row + (t + i) * n.channels + c, n.channels - c);
                    if (n.silu) {
                        convolve<TOKENS, TAPS>(n, x + row, taps.data(), t, c, z);
                        for (int i = 0; i < TOKENS; ++i) d[i] *= silu_slope(z[i], Sigmoid(z[i]));
                    }
                    for (int i = 0; i < TOKENS; ++i) store(&dz[(t + i - first) * n.padded() + c], d[i]);
                    for (int64_t j = TOKENS > 1 ? 0 : std::max<int64_t>(0, n_taps - 1 - t); t < last && j < n_taps; ++j) {
                        float* to = sum + j * n.padded() + c;
                        Vec total = load(to);
                        for (int i = 0; i < TOKENS; ++i)
                            total += d[i] * load(x + row + (t + i - n_taps + 1 + j) * n.channels + c, n.channels - c);
                        store(to, total);
                    }
                }
            };
            auto gradients_of_x = [&]<int TOKENS>(int64_t t) {
                for (int64_t c = 0; c < n.channels; c += LANES) {
                    Vec d[TOKENS] = {};
                    for (int64_t j = TOKENS > 1 ? 0 : std::max<int64_t>(0, t + n_taps - reach); j < n_taps; ++j) {
                        const float* from = &dz[(t + n_taps - 1 - j - first) * n.padded() + c];
                        Vec of_tap = load(&taps[j * n.padded() + c]);
                        for (int i = 0; i < TOKENS; ++i) d[i] += of_tap * load(from + i * n.padded());
                    }
                    for (int i = 0; i < TOKENS; ++i) store(dx + row + (t + i) * n.channels + c, n.channels - c, d[i]);
                }
            };
            auto has_inputs = [&](int64_t t) { return t >= n.taps - 1; };
            for_tokens(first, last, has_inputs, gradients_of_z);
            for_tokens(last, reach, has_inputs, gradients_of_z);
            for_tokens(first, last, [&](int64_t t) { return t + TILE + n.taps - 1 <= reach; }, gradients_of_x);
        }
    });
    for (int64_t task = 1; task < tasks; ++task)
        for (int64_t i = 0; i < size; ++i) sums[i] += sums[task * size + i];
    for (int64_t c = 0; c < n.channels; ++c)
        for (int64_t j = 0; j < n.taps; ++j) dweight[c * n.taps + j] = sums.empty() ? 0.0f : sums[j * n.padded() + c];
}

// Calls `work.operator()<TAPS>()`.
template <typename Work>
void for_taps(int64_t taps, const Work& work) {
    if (taps == 4)  // those of all models
        work.template operator()<4>();
    else
        work.template operator()<0>();
}

}  // namespace

#define ENTRIES(name, T)                                                                                                     \
    int lmu_short_convolution_forward_##name(int64_t rows, int64_t tokens, int64_t channels, int64_t taps, int64_t silu,     \
                                             const T* x, const float* weight, T* y) {                                        \
        Sizes n{rows, tokens, channels, taps, silu};                                                                         \
        return error_code([&] { for_taps(taps, [&]<int TAPS>() { forward<TAPS>(n, x, weight, y); }); });                     \
    }                                                                                                                        \
    int lmu_short_convolution_backward_##name(int64_t rows, int64_t tokens, int64_t channels, int64_t taps, int64_t silu,    \
                                              const T* x, const float* weight, const T* dy, T* dx, float* dweight) {         \
        Sizes n{rows, tokens, channels, taps, silu};                                                                         \
        return error_code([&] { for_taps(taps, [&]<int TAPS>() { backward<TAPS>(n, x, weight, dy, dx, dweight); }); });      \
    }

extern "C" {
ENTRIES(float32, float)
ENTRIES(bfloat16, uint16_t)
}
