// Vectors of sixteen float32 numbers, with loads and stores of float32 or bfloat16.
// Used by convolve.cpp, implicit_attention.cpp and short_convolution.cpp. Needs g++: clang has no __builtin_shuffle.

#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

constexpr int LANES = 16;
typedef float Vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t IVec __attribute__((vector_size(LANES * sizeof(int32_t))));

inline Vec splat(float x) { return Vec{} + x; }

// 1 in the first n lanes, 0 in the others.
inline Vec first_lanes(int64_t n) {
    Vec ones{};
    for (int64_t i = 0; i < LANES && i < n; ++i) ones[i] = 1.0f;
    return ones;
}

inline float horizontal_sum(Vec v) {
    typedef float Half __attribute__((vector_size(LANES * 2)));
    typedef float Quarter __attribute__((vector_size(LANES)));
    Half lo, hi;
    std::memcpy(&lo, &v, sizeof lo);
    std::memcpy(&hi, reinterpret_cast<char*>(&v) + sizeof lo, sizeof hi);
    lo += hi;
    Quarter a, b;
    std::memcpy(&a, &lo, sizeof a);
    std::memcpy(&b, reinterpret_cast<char*>(&lo) + sizeof a, sizeof b);
    a += b;
    return (a[0] + a[1]) + (a[2] + a[3]);
}

inline Vec load(const float* from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

inline Vec load(const uint16_t* from) {
    typedef uint16_t Short __attribute__((vector_size(LANES * 2)));
    Short s;
    std::memcpy(&s, from, sizeof s);
    return (Vec)(__builtin_convertvector(s, IVec) << 16);
}

inline void store(uint16_t* to, Vec v) {
    typedef uint32_t UVec __attribute__((vector_size(LANES * 4)));
    typedef uint16_t Short __attribute__((vector_size(LANES * 2)));
    UVec bits = (UVec)v;
    UVec rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    UVec quiet = (bits >> 16) | 0x40;
    Short s = __builtin_convertvector((UVec)(v == v ? (IVec)rounded : (IVec)quiet), Short);
    std::memcpy(to, &s, sizeof s);
}

// Loads or stores the first n <= LANES elements only; the other lanes of a loaded vector are 0.
template <typename T>
inline Vec load(const T* from, int64_t n) {
    if (n >= LANES) return load(from);
    T padded[LANES] = {};
    std::memcpy(padded, from, n * sizeof(T));
    return load(padded);
}

template <typename T>
inline void store(T* to, int64_t n, Vec v) {
    if (n >= LANES) return store(to, v);
    T padded[LANES];
    store(padded, v);
    std::memcpy(to, padded, n * sizeof(T));
}

// e^x for x <= 0, with an error of at most two units in the last place; e^-87 for x < -87.
inline Vec exp_negative(Vec x) {
    const Vec floor_ = splat(-87.0f);
    x = x < floor_ ? floor_ : x;
    Vec shifted = x * 1.44269504088896341f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
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

// Flushes denormals, numbers below 1.2e-38, to 0 while in scope. The tails of softmax and gelu, and the gradients computed from
// them, are full of denormals, and a processor takes up to a hundred times as long for each.
class FlushDenormals {
#if defined(__SSE__)
    unsigned saved_mxcsr = _mm_getcsr();

public:
    FlushDenormals() { _mm_setcsr(saved_mxcsr | 0x8040); }  // flush results to zero, treat denormal operands as zero
    ~FlushDenormals() { _mm_setcsr(saved_mxcsr); }
    FlushDenormals(const FlushDenormals&) = delete;
#endif
};

// Runs `work` and returns an error code, since C has no exceptions: 0, or 1 if memory could not be allocated.
template <typename Work>
int error_code(const Work& work) {
    try {
        work();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
