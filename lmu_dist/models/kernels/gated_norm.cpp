// RMSNorm with an output gate, forward and backward: y = norm(x) w silu(gate), or norm(x silu(gate)) w if `gate_first` is set.
//
// x and its gradient are float32 (rows, groups, channels), gate, y and their gradients float32 or bfloat16 of the same shape; each
// group is divided by its root mean square. weight is (groups, channels), scale (rows, groups): 1 / root mean square, written by the
// forward pass. Built and called by kernels/compiled.py for mixers/gated_norm, which computes the same in
// plain torch.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "lanes.h"

namespace {

constexpr int64_t BLOCK = 64;  // rows of a task. The tasks, and so the order of all sums, do not depend on the threads

struct Sizes {
    int64_t rows, groups, channels, gate_first;
    int64_t padded() const { return (channels + LANES - 1) / LANES * LANES; }  // of a group
    int64_t blocks() const { return (rows + BLOCK - 1) / BLOCK; }
};

// Runs `work(block, first row, last row)` for every block of rows.
template <typename Work>
void for_each_block(const Sizes& n, const Work& work) {
    at::parallel_for(0, n.blocks(), 1, [&](int64_t begin, int64_t end) {
        FlushDenormals scope;
        for (int64_t block = begin; block < end; ++block) work(block, block * BLOCK, std::min((block + 1) * BLOCK, n.rows));
    });
}

// What is normalised at channel c: x, or x silu(gate).
template <typename T>
inline Vec normalised(const Sizes& n, const float* x, const T* gate, int64_t c) {
    Vec value = load(x + c, n.channels - c);
    if (!n.gate_first) return value;
    Vec z = load(gate + c, n.channels - c);
    return value * silu(z);
}

template <typename T>
void forward(const Sizes& n, const T* gate, const float* x, const float* weight, T* y, float* scale, float eps) {
    for_each_block(n, [&](int64_t, int64_t first, int64_t last) {
        Buffer values(n.padded());
        for (int64_t group = first * n.groups; group < last * n.groups; ++group) {
            int64_t at = group * n.channels, at_weight = group % n.groups * n.channels;
            Vec squares{};
            for (int64_t c = 0; c < n.channels; c += LANES) {
                Vec value = normalised(n, x + at, gate + at, c);
                store(&values[c], value);
                squares += value * value;
            }
            scale[group] = 1.0f / std::sqrt(horizontal_sum(squares) / static_cast<float>(n.channels) + eps);
            for (int64_t c = 0; c < n.channels; c += LANES) {
                Vec value = load(&values[c]) * scale[group] * load(weight + at_weight + c, n.channels - c);
                if (!n.gate_first) {
                    Vec z = load(gate + at + c, n.channels - c);
                    value *= silu(z);
                }
                store(y + at + c, n.channels - c, value);
            }
        }
    });
}

template <typename T>
void backward(const Sizes& n, const T* gate, const float* x, const float* weight, const float* scale, const T* dy, T* dgate,
              float* dx, float* dweight) {
    int64_t size = n.groups * n.padded();
    Buffer sums(n.blocks() * size, 0.0f);
    for_each_block(n, [&](int64_t block, int64_t first, int64_t last) {
        Buffer normed(n.padded()), dnormed(n.padded());
        for (int64_t group = first * n.groups; group < last * n.groups; ++group) {
            int64_t at = group * n.channels, at_weight = group % n.groups * n.channels;
            float* sum = &sums[block * size + group % n.groups * n.padded()];
            Vec along_channels{};
            for (int64_t c = 0; c < n.channels; c += LANES) {
                Vec value = normalised(n, x + at, gate + at, c) * scale[group], d = load(dy + at + c, n.channels - c);
                if (!n.gate_first) {
                    Vec z = load(gate + at + c, n.channels - c);
                    d *= silu(z);
                }
                store(sum + c, load(sum + c) + d * value);
                d *= load(weight + at_weight + c, n.channels - c);
                along_channels += d * value;
                store(&normed[c], value);
                store(&dnormed[c], d);
            }
            float along = horizontal_sum(along_channels) / static_cast<float>(n.channels);
            for (int64_t c = 0; c < n.channels; c += LANES) {
                Vec value = load(&normed[c]), z = load(gate + at + c, n.channels - c), dsilu;
                Sigmoid s(z);
                Vec d = (load(&dnormed[c]) - along * value) * scale[group];
                if (n.gate_first) {
                    dsilu = d * load(x + at + c, n.channels - c);
                    d *= z * s.value;
                } else {
                    dsilu = load(dy + at + c, n.channels - c) * value * load(weight + at_weight + c, n.channels - c);
                }
                store(dx + at + c, n.channels - c, d);
                store(dgate + at + c, n.channels - c, dsilu * silu_slope(z, s));
            }
        }
    });
    for (int64_t block = 1; block < n.blocks(); ++block)
        for (int64_t i = 0; i < size; ++i) sums[i] += sums[block * size + i];
    for (int64_t group = 0; group < n.groups; ++group)
        for (int64_t c = 0; c < n.channels; ++c)
            dweight[group * n.channels + c] = sums.empty() ? 0.0f : sums[group * n.padded() + c];
}

}  // namespace

#define ENTRIES(name, T)                                                                                                     \
    int lmu_gated_norm_forward_##name(int64_t rows, int64_t groups, int64_t channels, int64_t gate_first, const T* gate,     \
                                      const float* x, const float* weight, T* y, float* scale, float eps) {                  \
        return error_code([&] { forward(Sizes{rows, groups, channels, gate_first}, gate, x, weight, y, scale, eps); });      \
    }                                                                                                                        \
    int lmu_gated_norm_backward_##name(int64_t rows, int64_t groups, int64_t channels, int64_t gate_first, const T* gate,    \
                                       const float* x, const float* weight, const float* scale, const T* dy, T* dgate,       \
                                       float* dx, float* dweight) {                                                          \
        return error_code(                                                                                                   \
            [&] { backward(Sizes{rows, groups, channels, gate_first}, gate, x, weight, scale, dy, dgate, dx, dweight); });   \
    }

extern "C" {
ENTRIES(float32, float)
ENTRIES(bfloat16, uint16_t)
}
