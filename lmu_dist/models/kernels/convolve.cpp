// Causal convolutions of every channel with every kernel, and the way back, by Fourier transforms of sixteen channels at once.
//
// Two kernels are one complex kernel, w = h1 + i h2: what it makes of a real input has the two convolutions for parts. A
// transform stays in one core's cache: rows are taken in segments of n / 2 tokens, each with the segment before it, which is
// as far back as kernels may reach.
// Legend: B rows, T tokens, D width, W the width in whole vectors, K kernels, P = (K + 1) / 2 pairs, n points, a power of two
// from 16 on. Layout: x (B, T, W); spectra (P, n) complex; y (K, B, T, W) float32 or bfloat16: vectors begin where cache lines
// do, and what is beyond D is 0. Built by kernels/compiled.py; called by models/transforms.

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "transform.h"

namespace {

// Element i is the sum of v[i]; n is 8 or 16.
template <int N>
inline Vec sums(const Vec* v) {
    const IVec even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    Vec level[N];
    for (int i = 0; i < N; ++i) level[i] = v[i];
    int n = N;
    for (int stage = 0; stage < 4; ++stage) {
        n = n > 1 ? n / 2 : 1;
        for (int i = 0; i < n; ++i) {
            Vec a = level[2 * i], b = N == 8 && stage == 3 ? a : level[2 * i + 1];
            level[i] = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
        }
    }
    return level[0];
}

struct Keep {
    Complex* to;
    template <int N>
    void take(int64_t at, const Complex* values) const {
        for (int i = 0; i < N; ++i) to[at + i] = values[i];
    }
};

struct Product {
    const Complex* x;
    const Scalar* w;
    template <int N>
    void give(int64_t at, Complex* values) const {
        for (int i = 0; i < N; ++i) values[i] = x[at + i] * w[at + i];
    }
};

struct Given {
    const Complex* from;
    template <int N>
    void give(int64_t at, Complex* values) const {
        for (int i = 0; i < N; ++i) values[i] = from[at + i];
    }
};

// z into gradients: of the input's spectrum, conj(w) z, and of the kernels', the sum over channels of conj(x) z. A bias has its
// sum, which is what stands at frequency 0.
struct Gradients {
    const Complex* x;
    const Scalar* w;
    Complex* dx;
    float *dw, *dbias;
    template <int N>
    void take(int64_t at, const Complex* z) const {
        Vec parts[2 * N];
        if (at == 0) {
            dbias[0] += sum(z[0].re);
            dbias[1] += sum(z[0].im);
        }
        for (int i = 0; i < N; ++i) {
            Complex by = x[at + i];
            dx[at + i] = dx[at + i] + z[i] * conj(w[at + i]);
            parts[2 * i] = z[i].re * by.re + z[i].im * by.im;
            parts[2 * i + 1] = z[i].im * by.re - z[i].re * by.im;
        }
        float* to = dw + 2 * at;
        store(to, 2 * N, load(to, 2 * N) + sums<2 * N>(parts));
    }
};

struct Sizes {
    int64_t rows, length, width, kernels, points;  // B, T, D, K, n

    int64_t segment() const { return points / 2; }
    int64_t groups() const { return (width + LANES - 1) / LANES; }
    int64_t pitch() const { return groups() * LANES; }  // W
    int64_t pairs() const { return (kernels + 1) / 2; }
};

// The spectrum of a segment of sixteen channels, and of the one before it, whose tokens come last: they are the past.
void spectrum(const Transform& transform, const Sizes& s, const float* x, int64_t begin, Complex* a, Complex* to) {
    for (int64_t t = 0; t < s.segment(); ++t) {
        int64_t now = begin + t, past = now - s.segment();
        a[t] = {now < s.length ? load(x + now * s.pitch()) : Vec{}, Vec{}};
        a[t + s.segment()] = {past >= 0 ? load(x + past * s.pitch()) : Vec{}, Vec{}};
    }
    transform.forward(a, s.points, 0, Keep{to});
}

template <typename T>
void convolve(const Sizes& s, const float* x, const Scalar* spectra, const float* bias, T* y) {
    const Transform transform(s.points);
    const int64_t pitch = s.pitch(), stride = s.rows * s.length * pitch;
    const Vec by = splat(1.0f / float(s.points));
    at::parallel_for(0, s.rows * s.groups(), 1, [&](int64_t begin, int64_t end) {
        NoDenormals scope;
        std::vector<Complex> of_x(s.points), a(s.points);
        for (int64_t item = begin; item < end; ++item) {
            int64_t first = item % s.groups() * LANES, row = item / s.groups() * s.length * pitch + first;
            const Vec inside = below(s.width - first);
            for (int64_t start = 0; start < s.length; start += s.segment()) {
                int64_t here = row + start * pitch, length = std::min(s.segment(), s.length - start);
                spectrum(transform, s, x + row, start, a.data(), of_x.data());
                for (int64_t pair = 0; pair < s.pairs(); ++pair) {
                    T *y1 = y + 2 * pair * stride + here, *y2 = y1 + stride;
                    bool both = 2 * pair + 1 < s.kernels;
                    Vec b1 = inside * bias[2 * pair], b2 = inside * (both ? bias[2 * pair + 1] : 0.0f);
                    auto output = [&](int64_t t, Complex value) {
                        store(y1 + t * pitch, value.re * by + b1);
                        if (both) store(y2 + t * pitch, value.im * by + b2);
                    };
                    transform.back_to(a.data(), length, Product{of_x.data(), spectra + pair * s.points}, output);
                }
            }
        }
    });
}

template <typename T>
void convolve_back(const Sizes& s, const float* x, const Scalar* spectra, const T* dy, float* dx, float* dspectra, float* dbias) {
    const Transform transform(s.points);
    const int64_t pitch = s.pitch(), stride = s.rows * s.length * pitch, size = 2 * s.pairs() * (s.points + 1);
    const Vec by = splat(1.0f / float(s.points));
    std::vector<std::vector<float>> partial(at::get_num_threads());
    at::parallel_for(0, s.rows * s.groups(), 1, [&](int64_t begin, int64_t end) {
        NoDenormals scope;
        std::vector<float>& mine = partial[at::get_thread_num()];  // of spectra, then of biases
        mine.assign(size, 0.0f);
        std::vector<Complex> of_x(s.points), of_dx(s.points), a(s.points);
        for (int64_t item = begin; item < end; ++item) {
            int64_t first = item % s.groups() * LANES, row = item / s.groups() * s.length * pitch + first;
            for (int64_t start = 0; start < s.length; start += s.segment()) {
                int64_t here = row + start * pitch, length = std::min(s.segment(), s.length - start);
                spectrum(transform, s, x + row, start, a.data(), of_x.data());
                std::fill(of_dx.begin(), of_dx.end(), Complex{});
                for (int64_t pair = 0; pair < s.pairs(); ++pair) {
                    const T *d1 = dy + 2 * pair * stride + here, *d2 = d1 + stride;
                    bool both = 2 * pair + 1 < s.kernels;
                    Gradients gradients{of_x.data(), spectra + pair * s.points, of_dx.data(),
                                        mine.data() + 2 * pair * s.points, mine.data() + 2 * (s.pairs() * s.points + pair)};
                    auto input = [&](int64_t t) {
                        return Complex{load(d1 + t * pitch), both ? load(d2 + t * pitch) : Vec{}};
                    };
                    transform.forward_of(a.data(), length, input, gradients);
                }
                transform.back(a.data(), s.points, 0, Given{of_dx.data()});
                for (int64_t t = 0; t < length; ++t) store(dx + here + t * pitch, a[t].re * by);
                for (int64_t t = 0; start && t < s.segment(); ++t) {
                    float* past = dx + here + (t - s.segment()) * pitch;
                    store(past, load(past) + a[t + s.segment()].re * by);
                }
            }
        }
    });
    const int64_t before = size - 2 * s.pairs();
    for (const std::vector<float>& of_thread : partial) {
        if (of_thread.empty()) continue;
        for (int64_t i = 0; i < before; ++i) dspectra[i] += of_thread[i];
        for (int64_t k = 0; k < s.kernels; ++k) dbias[k] += of_thread[before + k];
    }
}

}  // namespace

// Numbers first, then addresses: kernels/compiled.call.
#define ENTRIES(NAME, T)                                                                                                     \
    int lmu_convolve_##NAME(int64_t b, int64_t t, int64_t d, int64_t k, int64_t n, const float* x, const Scalar* spectra,    \
                            const float* bias, T* y) {                                                                       \
        return told([&] { convolve(Sizes{b, t, d, k, n}, x, spectra, bias, y); });                                           \
    }                                                                                                                        \
    int lmu_convolve_back_##NAME(int64_t b, int64_t t, int64_t d, int64_t k, int64_t n, const float* x,                      \
                                 const Scalar* spectra, const T* dy, float* dx, float* dspectra, float* dbias) {             \
        return told([&] { convolve_back(Sizes{b, t, d, k, n}, x, spectra, dy, dx, dspectra, dbias); });                      \
    }

extern "C" {
int lmu_lanes() { return LANES; }
ENTRIES(float32, float)
ENTRIES(bfloat16, uint16_t)
}
