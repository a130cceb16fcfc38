// Vectors of floats as wide as the processor's registers, and what is done to them.
//
// Every sum over lanes goes in one order, and multiplying and adding are fused wherever they are written so.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>
#if defined(__AVX2__) || defined(__FMA__)
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef int16_t svec __attribute__((vector_size(LANES * 2)));
typedef int8_t bvec __attribute__((vector_size(LANES)));
typedef float loose_vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

// Memory in which no vector crosses the border of a cache line for nothing.
template <typename T>
struct Aligned {
    using value_type = T;
    T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))); }
    void deallocate(T* at, size_t) { ::operator delete(at, std::align_val_t(64)); }
    bool operator==(const Aligned&) const { return true; }
    bool operator!=(const Aligned&) const { return false; }
};
template <typename T>
using buffer = std::vector<T, Aligned<T>>;

static inline vec load(const float* p) { return *reinterpret_cast<const loose_vec*>(p); }
static inline void store(float* p, vec v) { *reinterpret_cast<loose_vec*>(p) = v; }
static inline vec all(float x) { return x - vec{}; }

// a * b + c, rounded once. Written out, since a compiler left to itself fuses in one place and not in another.
static inline vec fma(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

typedef int32_t int4 __attribute__((vector_size(16)));
typedef float quad __attribute__((vector_size(16)));

#ifdef __clang__
#define SHUFFLE(p, q, ...) __builtin_shufflevector(p, q, __VA_ARGS__)
#else
#define SHUFFLE(p, q, ...) __builtin_shuffle(p, q, int4{__VA_ARGS__})
#endif

// Four lanes in which all the lanes of a vector are added up; pairs of these are added in one order everywhere.
static inline quad fold(vec v) {
    quad parts[LANES / 4];
    std::memcpy(parts, &v, sizeof v);
    quad s = parts[0] + parts[1];
    for (int i = 2; i < LANES / 4; i++) s += parts[i];
    return s;
}

static inline float sum(vec v) {
    const quad s = fold(v);
    return (s[0] + s[2]) + (s[1] + s[3]);
}

// The sums of four vectors; each as `sum` gives it.
static inline quad sum4(vec a, vec b, vec c, vec d) {
    const quad p = fold(a), q = fold(b), r = fold(c), s = fold(d);
    const quad low = SHUFFLE(p, q, 0, 1, 4, 5) + SHUFFLE(p, q, 2, 3, 6, 7);
    const quad high = SHUFFLE(r, s, 0, 1, 4, 5) + SHUFFLE(r, s, 2, 3, 6, 7);
    return SHUFFLE(low, high, 0, 2, 4, 6) + SHUFFLE(low, high, 1, 3, 5, 7);
}

// One value or several, to and from memory that need not be aligned.
template <typename T>
static inline T get(const void* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}
template <typename T>
static inline void put(float* at, T value) {
    std::memcpy(at, &value, sizeof value);
}

// e^x to about two units in the last place (Cephes' polynomial).
static inline vec exponential(vec x) {
    x = x < -87.0f ? all(-87.0f) : x;
    x = x > 88.0f ? all(88.0f) : x;
    const vec magic = all(12582912.0f);
    vec n = fma(x, all(1.44269504088896341f), magic);  // rounds to the nearest integer, in the low bits
    const ivec whole = reinterpret_cast<ivec>(n) - 0x4B400000;
    n -= magic;
    const vec r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), x));
    vec p = all(1.9875691500e-4f);
    for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = fma(p, r, all(c));
    p = fma(p, r * r, r) + 1.0f;
    return p * reinterpret_cast<vec>((whole + 127) << 23);
}
