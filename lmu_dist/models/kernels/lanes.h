// Sixteen numbers at once: what convolve.cpp and reader.cpp are written in. Loads and stores are float32 or bfloat16.
// Needs g++: clang has no __builtin_shuffle.

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

// 1 in the first n lanes, 0 in what is left.
inline Vec below(int64_t n) {
    Vec ones{};
    for (int64_t i = 0; i < LANES && i < n; ++i) ones[i] = 1.0f;
    return ones;
}

inline float sum(Vec v) {
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

// The first n <= LANES only; zeros elsewhere.
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

// While it lives, numbers below 1.2e-38 count as 0. Tails of softmax and of gelu, and small gradients after them, are full of
// such numbers, and processors take up to a hundred times as long for each.
class NoDenormals {
#if defined(__SSE__)
    unsigned before = _mm_getcsr();

public:
    NoDenormals() { _mm_setcsr(before | 0x8040); }  // flush to zero, and denormals are zero
    ~NoDenormals() { _mm_setcsr(before); }
    NoDenormals(const NoDenormals&) = delete;
#endif
};

// What C can tell of an exception: 0, or 1 for no memory.
template <typename Work>
int told(const Work& work) {
    try {
        work();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
