// Causal convolution of every channel with every kernel, forward and backward, by Fourier transforms of LANES channels at once.
//
// Two kernels are one complex kernel, w = h1 + i h2: its convolution with a real input has the two convolutions as real and
// imaginary part. A transform stays in one core's cache. A row is processed in segments of n / 2 tokens, each transformed with
// the segment before it, since kernels are at most n / 2 tokens long.
// Legend: B rows, T tokens, D width, W the width in whole cache lines, K kernels, P = (K + 1) / 2 pairs, n points, a power of two
// from 16 on. Layout: x (B, T, W); spectra (P, n) complex; y (K, B, T, W) float32 or bfloat16: vectors begin at cache
// lines, and channels beyond D are 0. Built by kernels/compiled.py; called by mixers/lmu/fourier.py.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "transform.h"

namespace {

// Sink that stores a spectrum.
struct StoreSpectrum {
    Complex* spectrum;
    template <int N>
    void write(int64_t at, const Complex* values) const {
        for (int i = 0; i < N; ++i) spectrum[at + i] = values[i];
    }
};

// Asks for the rows of two convolutions in memory, bit by bit while a transform computes: a row has one line of each token, far
// from the next, which the processor does not foresee, and all of them at once would come more slowly than they are used.
template <typename T>
struct Prefetch {
    const T *first, *second;
    int64_t stride, length;

    // The share of N points of the transform from `at` on; half of the points are tokens.
    template <int N>
    void advance(int64_t at) const {
        for (int64_t t = at / 2; t < (at + N) / 2 && t < length; ++t) {
            __builtin_prefetch(first + t * stride, 0, 2);
            __builtin_prefetch(second + t * stride, 0, 2);
        }
    }
};

// Source: the product of the spectra of input and kernels.
template <typename T>
struct SpectrumProduct {
    const Complex* x;
    const Scalar* w;
    Prefetch<T> output;
    template <int N>
    void read(int64_t at, Complex* values) const {
        output.template advance<N>(at);
        for (int i = 0; i < N; ++i) values[i] = x[at + i] * w[at + i];
    }
};

// Source that loads a spectrum.
struct LoadSpectrum {
    const Complex* spectrum;
    template <int N>
    void read(int64_t at, Complex* values) const {
        for (int i = 0; i < N; ++i) values[i] = spectrum[at + i];
    }
};

// Sink that gets the spectrum z of the output's gradient and accumulates gradients: conj(w) z for the spectrum of the input,
// and the sum over channels of conj(x) z for the spectra of the kernels. The gradient of a bias is the sum over tokens and
// channels; z at frequency 0 is the sum over tokens.
template <typename T>
struct AccumulateGradients {
    const Complex* x;
    const Scalar* w;
    Complex* dx;
    float *dw, *dbias;
    Prefetch<T> next;
    template <int N>
    void write(int64_t at, const Complex* z) const {
        next.template advance<N>(at);
        Vec parts[2 * N < LANES ? LANES : 2 * N] = {};
        if (at == 0) {
            dbias[0] += horizontal_sum(z[0].re);
            dbias[1] += horizontal_sum(z[0].im);
        }
        for (int i = 0; i < N; ++i) {
            Complex xi = x[at + i];
            dx[at + i] = dx[at + i] + z[i] * conj(w[at + i]);
            parts[2 * i] = z[i].re * xi.re + z[i].im * xi.im;
            parts[2 * i + 1] = z[i].im * xi.re - z[i].re * xi.im;
        }
        for (int i = 0; i < 2 * N; i += LANES) {
            float* total = dw + 2 * at + i;
            store(total, 2 * N - i, load(total, 2 * N - i) + horizontal_sums(parts + i));
        }
    }
};

struct Sizes {
    int64_t rows, length, width, kernels, points;  // B, T, D, K, n

    int64_t segment() const { return points / 2; }
    int64_t padded_width() const { return (width + LINE - 1) / LINE * LINE; }  // W
    int64_t groups() const { return padded_width() / LANES; }
    int64_t pairs() const { return (kernels + 1) / 2; }
};

// Spectrum of a segment of LANES channels together with the segment before it, whose tokens take the second half of the
// points: in a circular convolution they are the past. `a` is working space.
void segment_spectrum(const FourierTransform& transform, const Sizes& s, const float* x, int64_t begin, Complex* a,
                      Complex* spectrum) {
    for (int64_t t = 0; t < s.segment(); ++t) {
        int64_t current = begin + t, previous = current - s.segment();
        a[t] = {current < s.length ? load(x + current * s.padded_width()) : Vec{}, Vec{}};
        a[t + s.segment()] = {previous >= 0 ? load(x + previous * s.padded_width()) : Vec{}, Vec{}};
    }
    transform.forward(a, s.points, 0, StoreSpectrum{spectrum});
}

// Asks for huge pages for memory that is not yet in use, where Linux gives them on request: each row that is read at a time lies in
// pages of its own, more than the processor remembers the places of. Fresh memory also comes faster.
void advise_huge_pages([[maybe_unused]] void* begin, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 1 << 21;
    uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + PAGE - 1) / PAGE * PAGE;
    uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) / PAGE * PAGE;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: may fail
#endif
}

template <typename T>
void convolve_forward(const Sizes& s, const float* x, const Scalar* spectra, const float* bias, T* y) {
    const FourierTransform transform(s.points);
    const int64_t padded_width = s.padded_width(), stride = s.rows * s.length * padded_width;
    const Vec inverse_n = splat(1.0f / float(s.points));
    advise_huge_pages(y, s.kernels * stride * sizeof(T));
    at::parallel_for(0, s.rows * s.groups(), 1, [&](int64_t begin, int64_t end) {
        FlushDenormals scope;
        std::vector<Complex> x_spectrum(s.points), a(s.points);
        for (int64_t item = begin; item < end; ++item) {
            int64_t channel = item % s.groups() * LANES, row_offset = item / s.groups() * s.length * padded_width + channel;
            const Vec channel_mask = first_lanes(s.width - channel);
            for (int64_t start = 0; start < s.length; start += s.segment()) {
                int64_t offset = row_offset + start * padded_width, length = std::min(s.segment(), s.length - start);
                segment_spectrum(transform, s, x + row_offset, start, a.data(), x_spectrum.data());
                for (int64_t pair = 0; pair < s.pairs(); ++pair) {
                    T *y1 = y + 2 * pair * stride + offset, *y2 = y1 + stride;
                    bool has_second = 2 * pair + 1 < s.kernels;
                    Vec b1 = channel_mask * bias[2 * pair], b2 = channel_mask * (has_second ? bias[2 * pair + 1] : 0.0f);
                    auto output = [&](int64_t t, Complex value) {
                        store(y1 + t * padded_width, value.re * inverse_n + b1);
                        if (has_second) store(y2 + t * padded_width, value.im * inverse_n + b2);
                    };
                    SpectrumProduct<T> source{x_spectrum.data(), spectra + pair * s.points,
                                              {y1, has_second ? y2 : y1, padded_width, length}};
                    transform.inverse_truncated(a.data(), length, source, output);
                }
            }
        }
    });
}

template <typename T>
void convolve_backward(const Sizes& s, const float* x, const Scalar* spectra, const T* dy, float* dx, float* dspectra,
                       float* dbias) {
    const FourierTransform transform(s.points);
    const int64_t padded_width = s.padded_width(), stride = s.rows * s.length * padded_width;
    const int64_t size = 2 * s.pairs() * (s.points + 1);
    const Vec inverse_n = splat(1.0f / float(s.points));
    std::vector<Buffer> thread_sums(at::get_num_threads());
    at::parallel_for(0, s.rows * s.groups(), 1, [&](int64_t begin, int64_t end) {
        FlushDenormals scope;
        Buffer& sums = thread_sums[at::get_thread_num()];  // gradients of spectra, then of biases
        sums.assign(size, 0.0f);
        std::vector<Complex> x_spectrum(s.points), dx_spectrum(s.points), a(s.points);
        for (int64_t item = begin; item < end; ++item) {
            int64_t channel = item % s.groups() * LANES, row_offset = item / s.groups() * s.length * padded_width + channel;
            for (int64_t start = 0; start < s.length; start += s.segment()) {
                int64_t offset = row_offset + start * padded_width, length = std::min(s.segment(), s.length - start);
                segment_spectrum(transform, s, x + row_offset, start, a.data(), x_spectrum.data());
                std::fill(dx_spectrum.begin(), dx_spectrum.end(), Complex{});
                for (int64_t pair = 0; pair < s.pairs(); ++pair) {
                    const T *d1 = dy + 2 * pair * stride + offset, *d2 = d1 + stride;
                    bool has_second = 2 * pair + 1 < s.kernels;
                    int64_t to_next = 2 * pair + 2 < s.kernels ? 2 * stride : 0, to_second = 2 * pair + 3 < s.kernels ? stride : 0;
                    AccumulateGradients<T> sink{x_spectrum.data(),
                                                spectra + pair * s.points,
                                                dx_spectrum.data(),
                                                sums.data() + 2 * pair * s.points,
                                                sums.data() + 2 * (s.pairs() * s.points + pair),
                                                {d1 + to_next, d1 + to_next + to_second, padded_width, length}};
                    auto input = [&](int64_t t) {
                        return Complex{load(d1 + t * padded_width), has_second ? load(d2 + t * padded_width) : Vec{}};
                    };
                    transform.forward_padded(a.data(), length, input, sink);
                }
                transform.inverse(a.data(), s.points, 0, LoadSpectrum{dx_spectrum.data()});
                for (int64_t t = 0; t < length; ++t) store(dx + offset + t * padded_width, a[t].re * inverse_n);
                for (int64_t t = 0; start && t < s.segment(); ++t) {
                    float* previous = dx + offset + (t - s.segment()) * padded_width;
                    store(previous, load(previous) + a[t + s.segment()].re * inverse_n);
                }
            }
        }
    });
    const int64_t first_bias = size - 2 * s.pairs();
    for (const Buffer& sums : thread_sums) {
        if (sums.empty()) continue;
        for (int64_t i = 0; i < first_bias; ++i) dspectra[i] += sums[i];
        for (int64_t k = 0; k < s.kernels; ++k) dbias[k] += sums[first_bias + k];
    }
}

}  // namespace

// Sizes first, then addresses: kernels/compiled.call.
#define ENTRIES(NAME, T)                                                                                                     \
    int lmu_convolve_forward_##NAME(int64_t b, int64_t t, int64_t d, int64_t k, int64_t n, const float* x,                   \
                                    const Scalar* spectra, const float* bias, T* y) {                                        \
        return error_code([&] { convolve_forward(Sizes{b, t, d, k, n}, x, spectra, bias, y); });                             \
    }                                                                                                                        \
    int lmu_convolve_backward_##NAME(int64_t b, int64_t t, int64_t d, int64_t k, int64_t n, const float* x,                  \
                                     const Scalar* spectra, const T* dy, float* dx, float* dspectra, float* dbias) {         \
        return error_code([&] { convolve_backward(Sizes{b, t, d, k, n}, x, spectra, dy, dx, dspectra, dbias); });            \
    }

extern "C" {
int lmu_lanes() { return LANES; }
int lmu_line() { return LINE; }
ENTRIES(float32, float)
ENTRIES(bfloat16, uint16_t)
}
