// Vectors of float32 numbers as wide as the processor's registers, with loads and stores of float32 or bfloat16.
//
// Used by the C++ kernels, which are compiled once for each instruction set (kernels/compiled.py) by g++ or clang. A vector wider
// than a register would be split: g++ then compares and shuffles number by number.

#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__SSE__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else  // SSE, NEON
#define LANES 4
#endif
#define NOINLINE __attribute__((noinline))  // for inner loops: they get all registers then
constexpr int LINE = 16;  // float32 numbers of a cache line; rows of channels are padded to whole lines
typedef float Vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t IVec __attribute__((vector_size(LANES * sizeof(int32_t))));

// Allocates at the start of a cache line: a vector that crosses the end of one takes two loads or stores.
template <typename T>
struct LineAllocator {
    using value_type = T;
    static constexpr std::align_val_t ALIGNMENT{LINE * sizeof(float)};
    LineAllocator() = default;
    template <typename U>
    LineAllocator(const LineAllocator<U>&) {}
    T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), ALIGNMENT)); }
    void deallocate(T* p, std::size_t) { ::operator delete(p, ALIGNMENT); }
    bool operator==(const LineAllocator&) const { return true; }
};
using Buffer = std::vector<float, LineAllocator<float>>;

inline Vec splat(float x) { return Vec{} + x; }

// 1 in the first n lanes, 0 in the others.
inline Vec first_lanes(int64_t n) {
    Vec ones{};
    for (int64_t i = 0; i < LANES && i < n; ++i) ones[i] = 1.0f;
    return ones;
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IVec{__VA_ARGS__})
#endif

// Sums of neighbours, of a and then of b. The neighbours are numbers, and their sums stay within a block of four numbers (each
// such shuffle is one instruction); or the neighbours are blocks of four.
inline Vec add_neighbours(Vec a, Vec b) {
#if LANES == 16
    return SHUFFLE(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           SHUFFLE(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
#elif LANES == 8
    return SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
#else
    return SHUFFLE(a, b, 0, 2, 4, 6) + SHUFFLE(a, b, 1, 3, 5, 7);
#endif
}

inline Vec add_neighbouring_blocks([[maybe_unused]] Vec a, [[maybe_unused]] Vec b) {
#if LANES == 16
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#elif LANES == 8
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
#else
    return a;  // never called: a vector is one block
#endif
}

// Vector whose element i is the sum of v[i], for LANES vectors.
template <int N = LANES>
inline Vec horizontal_sums(const Vec* v) {
    if constexpr (N == 1) {
        return v[0];
    } else {
        Vec halves[N / 2];
        for (int i = 0; i < N / 2; ++i)
            halves[i] = N > LANES / 4 ? add_neighbours(v[2 * i], v[2 * i + 1]) : add_neighbouring_blocks(v[2 * i], v[2 * i + 1]);
        return horizontal_sums<N / 2>(halves);
    }
}

template <int N>
struct Floats {
    typedef float Vector __attribute__((vector_size(N * sizeof(float))));
};

// All numbers of a vector, combined by halves: `combine` takes two vectors.
template <int N = LANES, typename Combine>
inline float reduce(typename Floats<N>::Vector v, const Combine& combine) {
    if constexpr (N == 1) {
        return v[0];
    } else {
        typename Floats<N / 2>::Vector low, high;
        std::memcpy(&low, &v, sizeof low);
        std::memcpy(&high, reinterpret_cast<char*>(&v) + sizeof low, sizeof high);
        return reduce<N / 2>(combine(low, high), combine);
    }
}

inline float horizontal_sum(Vec v) {
    return reduce(v, [](auto a, auto b) { return a + b; });
}

inline float horizontal_max(Vec v) {
    return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}

// 1 / x, with an error of a few units in the last place, for x neither near 0 nor beyond 1e37: an estimate and Newton's step (two
// where the estimate has 8 bits), since a division takes as long as ten multiplications.
inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
    Vec y = (Vec)_mm512_rcp14_ps((__m512)x);
#elif defined(__AVX__)
    Vec y = (Vec)_mm256_rcp_ps((__m256)x);
#elif defined(__SSE__)
    Vec y = (Vec)_mm_rcp_ps((__m128)x);
#elif defined(__aarch64__)
    Vec y = (Vec)vrecpeq_f32((float32x4_t)x);
    y = y * (2.0f - x * y);
#else
    return 1.0f / x;
#endif
#if defined(__SSE__) || defined(__aarch64__)
    return y * (2.0f - x * y);
#endif
}

inline Vec load(const float* from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

// Asks for n numbers to be brought into the second-level cache.
inline void prefetch(const float* from, int64_t n) {
    for (int64_t i = 0; i < n; i += LINE) __builtin_prefetch(from + i, 0, 2);
    asm volatile("");  // g++ 12 drops calls of a function that does nothing but this
}

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
    if (n <= 0) return Vec{};
    if (n >= LANES) return load(from);
    T padded[LANES] = {};
    std::memcpy(padded, from, n * sizeof(T));
    return load(padded);
}

template <typename T>
inline void store(T* to, int64_t n, Vec v) {
    if (n <= 0) return;
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

// sigmoid(z), and 1 - sigmoid(z) without cancellation: what rounding leaves of it would count z-fold in a slope.
struct Sigmoid {
    Vec value, complement;

    explicit Sigmoid(Vec z) {
        Vec e = exp_negative(z < 0.0f ? z : -z);
        Vec larger = reciprocal(1.0f + e), smaller = e * larger;
        value = z < 0.0f ? smaller : larger;
        complement = z < 0.0f ? larger : smaller;
    }
};

// z sigmoid(z), and its slope.
inline Vec silu(Vec z) { return z * Sigmoid(z).value; }
inline Vec silu_slope(Vec z, Sigmoid s) { return s.value * (1.0f + z * s.complement); }

// Flushes denormals, numbers below 1.2e-38, to 0 while in scope. The tails of softmax and gelu, and the gradients computed from
// them, are full of denormals, and a processor takes up to a hundred times as long for each.
class FlushDenormals {
    static constexpr uint64_t FLAGS =
#if defined(__SSE__)
        0x8040;  // flush results to zero, treat denormal operands as zero
    static uint64_t control() { return _mm_getcsr(); }
    static void set_control(uint64_t value) { _mm_setcsr(static_cast<unsigned>(value)); }
#elif defined(__aarch64__)
        1 << 24;
    static uint64_t control() {
        uint64_t value;
        asm volatile("mrs %0, fpcr" : "=r"(value));
        return value;
    }
    static void set_control(uint64_t value) { asm volatile("msr fpcr, %0" ::"r"(value)); }
#else
        0;
    static uint64_t control() { return 0; }
    static void set_control(uint64_t) {}
#endif
    uint64_t saved = control();

public:
    FlushDenormals() { set_control(saved | FLAGS); }
    ~FlushDenormals() { set_control(saved); }
    FlushDenormals(const FlushDenormals&) = delete;
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
