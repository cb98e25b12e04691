// Radix-4 Fourier transforms of LANES channels at once, n points, a power of two from 16 on. Used by convolve.cpp.
//
// Spectra stay in the order in which decimation in frequency leaves them and are never sorted. The recursion is depth first, so
// that a block is finished while it is in the cache. The passes next to the spectrum run in registers: they give the spectrum
// to a `sink`, or take it from a `source`.

#pragma once

#include <cmath>
#include <vector>

#include "lanes.h"

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
inline std::vector<Scalar> roots(int64_t n) {
    std::vector<Scalar> w(n);
    for (int64_t j = 0; j < n; ++j) {
        double angle = -2.0 * M_PI * double(j) / double(n);
        w[j] = {float(std::cos(angle)), float(std::sin(angle))};
    }
    return w;
}

// Transforms of n points in place. `sink.write<N>` gets N points of a spectrum at a time and `source.read<N>` supplies them, in
// the order of memory.
struct FourierTransform {
    int64_t n;
    std::vector<Scalar> w;

    explicit FourierTransform(int64_t n) : n(n), w(roots(n)) {}

    // Forward transform of a block of `size` points that begins at point `at`: time to spectrum.
    template <typename Sink>
    void forward(Complex* a, int64_t size, int64_t at, const Sink& sink) const {
        if (size == 8) return forward8(a, at, sink);
        if (size == 4) return forward4(a, at, sink);
        int64_t quarter = size / 4, step = n / size;
        for (int64_t j = 0; j < quarter; ++j) {
            Complex x0 = a[j], x1 = a[j + quarter], x2 = a[j + 2 * quarter], x3 = a[j + 3 * quarter];
            Complex sum02 = x0 + x2, sum13 = x1 + x3, diff02 = x0 - x2, rotated13 = times_i(x1 - x3);
            a[j] = sum02 + sum13;
            a[j + quarter] = (diff02 - rotated13) * w[j * step];
            a[j + 2 * quarter] = (sum02 - sum13) * w[2 * j * step];
            a[j + 3 * quarter] = (diff02 + rotated13) * w[3 * j * step];
        }
        for (int64_t k = 0; k < 4; ++k) forward(a + k * quarter, quarter, at + k * quarter, sink);
    }

    template <typename Sink>
    void forward4(Complex* a, int64_t at, const Sink& sink) const {
        Complex sum02 = a[0] + a[2], sum13 = a[1] + a[3], diff02 = a[0] - a[2], rotated13 = times_i(a[1] - a[3]);
        Complex out[4] = {sum02 + sum13, diff02 - rotated13, sum02 - sum13, diff02 + rotated13};
        sink.template write<4>(at, out);
    }

    template <typename Sink>
    void forward8(Complex* a, int64_t at, const Sink& sink) const {
        Complex out[8];
        for (int j = 0; j < 2; ++j) {
            Complex x0 = a[j], x1 = a[j + 2], x2 = a[j + 4], x3 = a[j + 6];
            Complex sum02 = x0 + x2, sum13 = x1 + x3, diff02 = x0 - x2, rotated13 = times_i(x1 - x3);
            out[j] = sum02 + sum13;
            out[j + 2] = (diff02 - rotated13) * w[j * (n / 8)];
            out[j + 4] = (sum02 - sum13) * w[2 * j * (n / 8)];
            out[j + 6] = (diff02 + rotated13) * w[3 * j * (n / 8)];
        }
        for (int k = 0; k < 8; k += 2) {
            Complex first = out[k], second = out[k + 1];
            out[k] = first + second;
            out[k + 1] = first - second;
        }
        sink.template write<8>(at, out);
    }

    // Inverse transform of such a block: spectrum to time, not divided by n.
    template <typename Source>
    void inverse(Complex* a, int64_t size, int64_t at, const Source& source) const {
        if (size == 8) return inverse8(a, at, source);
        if (size == 4) return inverse4(a, at, source);
        int64_t quarter = size / 4, step = n / size;
        for (int64_t k = 0; k < 4; ++k) inverse(a + k * quarter, quarter, at + k * quarter, source);
        for (int64_t j = 0; j < quarter; ++j) {
            Complex y0 = a[j], y1 = a[j + quarter] * conj(w[j * step]);
            Complex y2 = a[j + 2 * quarter] * conj(w[2 * j * step]), y3 = a[j + 3 * quarter] * conj(w[3 * j * step]);
            Complex sum02 = y0 + y2, sum13 = y1 + y3, diff02 = y0 - y2, rotated13 = times_i(y1 - y3);
            a[j] = sum02 + sum13;
            a[j + quarter] = diff02 + rotated13;
            a[j + 2 * quarter] = sum02 - sum13;
            a[j + 3 * quarter] = diff02 - rotated13;
        }
    }

    template <typename Source>
    void inverse4(Complex* a, int64_t at, const Source& source) const {
        Complex y[4];
        source.template read<4>(at, y);
        Complex sum02 = y[0] + y[2], sum13 = y[1] + y[3], diff02 = y[0] - y[2], rotated13 = times_i(y[1] - y[3]);
        a[0] = sum02 + sum13;
        a[1] = diff02 + rotated13;
        a[2] = sum02 - sum13;
        a[3] = diff02 - rotated13;
    }

    template <typename Source>
    void inverse8(Complex* a, int64_t at, const Source& source) const {
        Complex y[8];
        source.template read<8>(at, y);
        for (int k = 0; k < 8; k += 2) {
            Complex first = y[k], second = y[k + 1];
            y[k] = first + second;
            y[k + 1] = first - second;
        }
        for (int j = 0; j < 2; ++j) {
            Complex y0 = y[j], y1 = y[j + 2] * conj(w[j * (n / 8)]);
            Complex y2 = y[j + 4] * conj(w[2 * j * (n / 8)]), y3 = y[j + 6] * conj(w[3 * j * (n / 8)]);
            Complex sum02 = y0 + y2, sum13 = y1 + y3, diff02 = y0 - y2, rotated13 = times_i(y1 - y3);
            a[j] = sum02 + sum13;
            a[j + 2] = diff02 + rotated13;
            a[j + 4] = sum02 - sum13;
            a[j + 6] = diff02 - rotated13;
        }
    }

    // Forward transform of all n points: `input(t)` for t < length <= n / 2, then zeros.
    template <typename Input, typename Sink>
    void forward_padded(Complex* a, int64_t length, const Input& input, const Sink& sink) const {
        int64_t quarter = n / 4;
        for (int64_t j = 0; j < quarter; ++j) {
            Complex x0 = j < length ? input(j) : Complex{}, x1 = j + quarter < length ? input(j + quarter) : Complex{};
            Complex rotated1 = times_i(x1);
            a[j] = x0 + x1;
            a[j + quarter] = (x0 - rotated1) * w[j];
            a[j + 2 * quarter] = (x0 - x1) * w[2 * j];
            a[j + 3 * quarter] = (x0 + rotated1) * w[3 * j];
        }
        for (int64_t k = 0; k < 4; ++k) forward(a + k * quarter, quarter, k * quarter, sink);
    }

    // Inverse transform of all n points, of which `output(t, value)` gets those with t < length <= n / 2.
    template <typename Source, typename Output>
    void inverse_truncated(Complex* a, int64_t length, const Source& source, const Output& output) const {
        int64_t quarter = n / 4;
        for (int64_t k = 0; k < 4; ++k) inverse(a + k * quarter, quarter, k * quarter, source);
        for (int64_t j = 0; j < quarter && j < length; ++j) {
            Complex y0 = a[j], y1 = a[j + quarter] * conj(w[j]);
            Complex y2 = a[j + 2 * quarter] * conj(w[2 * j]), y3 = a[j + 3 * quarter] * conj(w[3 * j]);
            output(j, y0 + y1 + y2 + y3);
            if (j + quarter < length) output(j + quarter, y0 - y2 + times_i(y1 - y3));
        }
    }
};
