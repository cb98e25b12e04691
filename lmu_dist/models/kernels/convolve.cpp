// Causal convolutions of every channel with every kernel, and the way back, by Fourier transforms of sixteen channels at once.
//
// Two kernels are one complex kernel, w = h1 + i h2: what it makes of a real input has the two convolutions for parts. Spectra
// stand in the order that decimation in frequency leaves, and are never sorted. A transform stays in one core's cache: rows are
// taken in segments of n / 2 tokens, each with the segment before it, which is as far back as kernels may reach.
// Legend: B rows, T tokens, D width, W the width in whole vectors, K kernels, P = (K + 1) / 2 pairs, n points, a power of two
// from 16 on. Layout: x (B, T, W); spectra (P, n) complex; y (K, B, T, W) float32 or bfloat16: vectors begin where cache lines
// do, and what is beyond D is 0. Built by kernels/compiled.py; called by models/transforms.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "lanes.h"

namespace {

struct Complex {
    Vec re, im;
};

inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
inline Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
inline Complex times_i(Complex a) { return {-a.im, a.re}; }

struct Scalar {
    float re, im;
};

inline Complex operator*(Complex a, Scalar b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
inline Scalar conj(Scalar a) { return {a.re, -a.im}; }

// e^(-2 pi i j / n)
std::vector<Scalar> roots(int64_t n) {
    std::vector<Scalar> w(n);
    for (int64_t j = 0; j < n; ++j) {
        double angle = -2.0 * M_PI * double(j) / double(n);
        w[j] = {float(std::cos(angle)), float(std::sin(angle))};
    }
    return w;
}

// Transforms of n points in place. `leaf` meets every two points that are done (or are to be begun with), in memory's order.
struct Transform {
    int64_t n;
    std::vector<Scalar> w;

    explicit Transform(int64_t n) : n(n), w(roots(n)) {}

    // Forward, time to spectrum, below the first pass.
    template <typename Leaf>
    void forward(Complex* a, int64_t size, int64_t at, const Leaf& leaf) const {
        if (size == 8) return forward8(a, at, leaf);
        if (size == 4) return forward4(a, at, leaf);
        int64_t quarter = size / 4, step = n / size;
        for (int64_t j = 0; j < quarter; ++j) {
            Complex x0 = a[j], x1 = a[j + quarter], x2 = a[j + 2 * quarter], x3 = a[j + 3 * quarter];
            Complex even = x0 + x2, odd = x1 + x3, less = x0 - x2, turned = times_i(x1 - x3);
            a[j] = even + odd;
            a[j + quarter] = (less - turned) * w[j * step];
            a[j + 2 * quarter] = (even - odd) * w[2 * j * step];
            a[j + 3 * quarter] = (less + turned) * w[3 * j * step];
        }
        for (int64_t k = 0; k < 4; ++k) forward(a + k * quarter, quarter, at + k * quarter, leaf);
    }

    template <typename Leaf>
    void forward4(Complex* a, int64_t at, const Leaf& leaf) const {
        Complex even = a[0] + a[2], odd = a[1] + a[3], less = a[0] - a[2], turned = times_i(a[1] - a[3]);
        Complex out[4] = {even + odd, less - turned, even - odd, less + turned};
        leaf.template take<4>(at, out);
    }

    template <typename Leaf>
    void forward8(Complex* a, int64_t at, const Leaf& leaf) const {
        Complex out[8];
        for (int j = 0; j < 2; ++j) {
            Complex x0 = a[j], x1 = a[j + 2], x2 = a[j + 4], x3 = a[j + 6];
            Complex even = x0 + x2, odd = x1 + x3, less = x0 - x2, turned = times_i(x1 - x3);
            out[j] = even + odd;
            out[j + 2] = (less - turned) * w[j * (n / 8)];
            out[j + 4] = (even - odd) * w[2 * j * (n / 8)];
            out[j + 6] = (less + turned) * w[3 * j * (n / 8)];
        }
        for (int k = 0; k < 8; k += 2) {
            Complex first = out[k], second = out[k + 1];
            out[k] = first + second;
            out[k + 1] = first - second;
        }
        leaf.template take<8>(at, out);
    }

    // Back, spectrum to time, up to the last pass; not divided by n.
    template <typename Leaf>
    void back(Complex* a, int64_t size, int64_t at, const Leaf& leaf) const {
        if (size == 8) return back8(a, at, leaf);
        if (size == 4) return back4(a, at, leaf);
        int64_t quarter = size / 4, step = n / size;
        for (int64_t k = 0; k < 4; ++k) back(a + k * quarter, quarter, at + k * quarter, leaf);
        for (int64_t j = 0; j < quarter; ++j) {
            Complex y0 = a[j], y1 = a[j + quarter] * conj(w[j * step]);
            Complex y2 = a[j + 2 * quarter] * conj(w[2 * j * step]), y3 = a[j + 3 * quarter] * conj(w[3 * j * step]);
            Complex even = y0 + y2, odd = y1 + y3, less = y0 - y2, turned = times_i(y1 - y3);
            a[j] = even + odd;
            a[j + quarter] = less + turned;
            a[j + 2 * quarter] = even - odd;
            a[j + 3 * quarter] = less - turned;
        }
    }

    template <typename Leaf>
    void back4(Complex* a, int64_t at, const Leaf& leaf) const {
        Complex y[4];
        leaf.template give<4>(at, y);
        Complex even = y[0] + y[2], odd = y[1] + y[3], less = y[0] - y[2], turned = times_i(y[1] - y[3]);
        a[0] = even + odd;
        a[1] = less + turned;
        a[2] = even - odd;
        a[3] = less - turned;
    }

    template <typename Leaf>
    void back8(Complex* a, int64_t at, const Leaf& leaf) const {
        Complex y[8];
        leaf.template give<8>(at, y);
        for (int k = 0; k < 8; k += 2) {
            Complex first = y[k], second = y[k + 1];
            y[k] = first + second;
            y[k + 1] = first - second;
        }
        for (int j = 0; j < 2; ++j) {
            Complex y0 = y[j], y1 = y[j + 2] * conj(w[j * (n / 8)]);
            Complex y2 = y[j + 4] * conj(w[2 * j * (n / 8)]), y3 = y[j + 6] * conj(w[3 * j * (n / 8)]);
            Complex even = y0 + y2, odd = y1 + y3, less = y0 - y2, turned = times_i(y1 - y3);
            a[j] = even + odd;
            a[j + 2] = less + turned;
            a[j + 4] = even - odd;
            a[j + 6] = less - turned;
        }
    }

    // A whole transform of what `input(t)` gives for t < length <= n / 2, zeros after it.
    template <typename Input, typename Leaf>
    void forward_of(Complex* a, int64_t length, const Input& input, const Leaf& leaf) const {
        int64_t quarter = n / 4;
        for (int64_t j = 0; j < quarter; ++j) {
            Complex x0 = j < length ? input(j) : Complex{}, x1 = j + quarter < length ? input(j + quarter) : Complex{};
            Complex turned = times_i(x1);
            a[j] = x0 + x1;
            a[j + quarter] = (x0 - turned) * w[j];
            a[j + 2 * quarter] = (x0 - x1) * w[2 * j];
            a[j + 3 * quarter] = (x0 + turned) * w[3 * j];
        }
        for (int64_t k = 0; k < 4; ++k) forward(a + k * quarter, quarter, k * quarter, leaf);
    }

    // The other way; `output(t, value)` hears of t < length <= n / 2.
    template <typename Leaf, typename Output>
    void back_to(Complex* a, int64_t length, const Leaf& leaf, const Output& output) const {
        int64_t quarter = n / 4;
        for (int64_t k = 0; k < 4; ++k) back(a + k * quarter, quarter, k * quarter, leaf);
        for (int64_t j = 0; j < quarter && j < length; ++j) {
            Complex y0 = a[j], y1 = a[j + quarter] * conj(w[j]);
            Complex y2 = a[j + 2 * quarter] * conj(w[2 * j]), y3 = a[j + 3 * quarter] * conj(w[3 * j]);
            output(j, y0 + y1 + y2 + y3);
            if (j + quarter < length) output(j + quarter, y0 - y2 + times_i(y1 - y3));
        }
    }
};

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
