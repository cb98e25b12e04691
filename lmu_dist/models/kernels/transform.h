// Fourier transforms of sixteen channels at once, n points, a power of two from 16 on, by fours: what convolve.cpp is made of.
//
// Spectra stand in the order that decimation in frequency leaves, and are never sorted. Depth first, so that a block is done
// with while it is near; the last passes stay in registers, and end in what is done with a spectrum (`leaf`).

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
