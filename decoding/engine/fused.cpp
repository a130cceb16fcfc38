// One step of a Llama-shaped decoder (RMSNorm, rotary positions, grouped queries, gated MLP) on a CPU.
//
// All threads run the whole step together and meet at barriers; a step over a few tokens is bound by the time it takes
// to read the weights once, so nothing here touches memory that it does not need.
//
// Every number is computed by the same operations in the same order, whatever else is in the step: an output of a
// matrix product has its own accumulators over the columns in order, and a token attends to the keys it sees in order
// of their positions. So a token's logits are the same bits in any block, any batch and for any number of threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
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

constexpr int64_t AHEAD = 4;

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

extern "C" {

// A weight matrix [rows, columns] of so many bits; `bias` may be null.
//
// 32: floats, row after row. 8: integers, row after row, with a float of `scale` for every row. 4: blocks of 8 rows, the
// last one filled up with zeros, each in groups of 32 columns, of 160 bytes. The first 128 are, for every 8 columns, 4 bytes
// for each of the rows: column i in the low half of a byte, column i + 4 in the high one. Then come two half precision
// numbers for each of the rows, first all scales, then all minima: a weight is a multiple of the scale above the minimum.
struct Matrix {
    const void* weight;
    const float *scale, *bias;
    int64_t rows, columns, bits;
};

// The tensors of one layer. `query_norm` and `key_norm` may be null. `keys` and `values` are the cache,
// [slots, key heads, capacity, head size].
struct Layer {
    const float *input_norm, *attention_norm, *query_norm, *key_norm;
    Matrix query, key, value, output, gate, up, down;
    float *keys, *values;
};

struct Shape {
    int64_t hidden, heads, key_heads, head_size, intermediate, capacity, vocabulary;
    float epsilon, scale;
    const float *cosine, *sine;  // [capacity, head size / 2]
    const float* norm;
    Matrix head;
};

// What a step runs. Token t lies in `slot[t]` at `place[t]`, stands at `position[t]`, and sees the first `prefix[t]`
// entries of its slot and then `more[first[t]] ... more[first[t + 1] - 1]`. All of it may be overwritten.
//
// With `levels`, that many steps follow one another: every kept token, which sees nothing of `more`, is followed by the
// token that its logits favour, and those are the tokens of the next step.
struct Step {
    int64_t tokens, layers, kept, captures;
    float* hidden;  // [tokens, hidden]
    int32_t *slot, *place, *position, *prefix, *first, *more;
    int32_t* keep;  // [kept] tokens whose logits are wanted, in order
    float* logits;  // [kept, vocabulary]
    const int32_t* capture;  // [captures] layers whose output is wanted
    float* captured;         // [tokens, captures, hidden]
    int64_t threads, levels;
    const float* embedding;  // [vocabulary, hidden]
    int32_t* favoured;       // [levels, kept] tokens
    float* lead;             // [levels, kept] of their logits on the next best
};

}  // extern "C"

constexpr int64_t GROUP = 32, BLOCK = 8;  // columns, and rows, of a group of weights of four bits

// Tokens in the form in which a kind of matrix wants them: floats, or 16-bit integers with a factor for every token. For
// weights of four bits their high bytes and then their low ones, which are signed, and their sums in groups of columns.
struct Input {
    const float* real;
    const int16_t* whole;
    const float *factor, *sums;
    int64_t width;  // columns, and distance of one token to the next
};

// Keeps the compiler from loading a value again for every use.
template <typename V>
static inline V once(V v) {
#ifdef __AVX2__
    asm("" : "+x"(v));
#endif
    return v;
}

// What to ask of the memory while a tile is computed, so that reading and computing overlap: the weights that come
// `AHEAD` rows later, a share of them with each of the groups of tokens that go by.
struct Ahead {
    const char* at;
    int64_t stride;

    inline void ask() {
        __builtin_prefetch(at, 0, 3);
        if (stride > 64) __builtin_prefetch(at + 64, 0, 3);
        at += stride;
    }
};

// The sums of ROWS x TOKENS vectors.
template <int ROWS, int TOKENS>
static inline void add_up(const vec acc[ROWS][TOKENS], float out[TOKENS][ROWS]) {
    for (int t = 0; t < TOKENS; t++) {
        int r = 0;
        for (; r + 4 <= ROWS; r += 4) put(&out[t][r], sum4(acc[r][t], acc[r + 1][t], acc[r + 2][t], acc[r + 3][t]));
        for (; r < ROWS; r++) out[t][r] = sum(acc[r][t]);
    }
}

// ROWS x TOKENS outputs: every weight that is loaded is used for all the tokens, and the other way round.
template <int ROWS, int TOKENS>
static inline void tile(const Matrix& m, int64_t row, const Input& x, int64_t token, Ahead ahead,
                        float out[TOKENS][ROWS]) {
    const int64_t columns = m.columns;
    const float* w = static_cast<const float*>(m.weight) + row * columns;
    const float* v = x.real + token * x.width;
    vec acc[ROWS][TOKENS] = {};
    int64_t k = 0;
#pragma GCC unroll 4
    for (; k + LANES <= columns; k += LANES) {
        vec b[TOKENS];
        for (int t = 0; t < TOKENS; t++) b[t] = once(load(v + t * x.width + k));
        ahead.ask();
        for (int r = 0; r < ROWS; r++) {
            const vec a = once(load(w + r * columns + k));
            for (int t = 0; t < TOKENS; t++) acc[r][t] = fma(a, b[t], acc[r][t]);
        }
    }
    add_up<ROWS, TOKENS>(acc, out);
    for (; k < columns; k++)
        for (int r = 0; r < ROWS; r++)
            for (int t = 0; t < TOKENS; t++)
                out[t][r] = std::fma(w[r * columns + k], v[t * x.width + k], out[t][r]);
}

// The same for int8 weights. Sums of integers are exact below 2^31, where those of `FLUSH` columns stay; the lanes are then
// added up as floats.
template <int ROWS, int TOKENS>
static inline void tile8(const Matrix& m, int64_t row, const Input& x, int64_t token, Ahead ahead,
                         float out[TOKENS][ROWS]) {
    constexpr int64_t FLUSH = 2048;
    const int64_t columns = m.columns;
    const int8_t* w = static_cast<const int8_t*>(m.weight) + row * columns;
    const int16_t* v = x.whole + token * x.width;
    vec total[ROWS][TOKENS] = {};
    int64_t k = 0;
#ifdef __AVX2__
    while (k + 16 <= columns) {
        const int64_t end = columns < k + FLUSH ? columns : k + FLUSH;
        __m256i acc[ROWS][TOKENS];
        for (int r = 0; r < ROWS; r++)
            for (int t = 0; t < TOKENS; t++) acc[r][t] = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (; k + 16 <= end; k += 16) {
            __m256i b[TOKENS];
            ahead.ask();
            for (int t = 0; t < TOKENS; t++)
                b[t] = once(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + t * x.width + k)));
            for (int r = 0; r < ROWS; r++) {
                const __m256i a = _mm256_cvtepi8_epi16(
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + r * columns + k)));
                for (int t = 0; t < TOKENS; t++)
                    acc[r][t] = _mm256_add_epi32(acc[r][t], _mm256_madd_epi16(a, b[t]));
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int t = 0; t < TOKENS; t++) {
                const __m256 lanes = _mm256_cvtepi32_ps(acc[r][t]);
                vec added = {};
                std::memcpy(&added, &lanes, sizeof lanes);
                total[r][t] += added;
            }
    }
#endif
    add_up<ROWS, TOKENS>(total, out);
    for (; k < columns; k++)
        for (int r = 0; r < ROWS; r++)
            for (int t = 0; t < TOKENS; t++) out[t][r] += float(int32_t(w[r * columns + k]) * v[t * x.width + k]);
}

static inline float real(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float magnitude = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
    return half & 0x8000 ? -magnitude : magnitude;
}

// A block of rows of four bits and TOKENS tokens. The sum over a group is exact, too; and what the minimum adds to it is
// the group's sum of inputs, which is known.
template <int TOKENS>
static inline void tile4(const Matrix& m, int64_t block, const Input& x, int64_t token, float out[TOKENS][BLOCK]) {
    constexpr int64_t SIZE = BLOCK * GROUP / 2, STEP = SIZE + 4 * BLOCK;
    const int64_t groups = m.columns / GROUP;
    const uint8_t* w = static_cast<const uint8_t*>(m.weight) + block * groups * STEP;
    const int8_t* v[TOKENS];  // high bytes; the low ones are `width` behind
    const float* sums[TOKENS];
    for (int t = 0; t < TOKENS; t++) {
        v[t] = reinterpret_cast<const int8_t*>(x.whole + (token + t) * x.width);
        sums[t] = x.sums + (token + t) * groups;
    }
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
    const __m256i half = _mm256_set1_epi8(15), low = _mm256_set1_epi16(1), high = _mm256_set1_epi16(256);
    __m256 acc[TOKENS];
    for (int t = 0; t < TOKENS; t++) acc[t] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; g++, w += STEP) {
        for (int64_t ahead = 2048; ahead < 2048 + STEP; ahead += 64) __builtin_prefetch(w + ahead, 0, 3);
        __m256i h[TOKENS], l[TOKENS];  // of each row two sums of 16 bits: 16 products of at most 15 x 128 fit
        for (int t = 0; t < TOKENS; t++) h[t] = l[t] = _mm256_setzero_si256();
#pragma GCC unroll 1  // else there are not enough registers
        for (int64_t i = 0; i < 4; i++) {
            const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32 * i));
            const __m256i first = _mm256_and_si256(both, half);
            const __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), half);
            const auto both_of = [&](const int8_t* p) {
                const __m256i a = _mm256_set1_epi32(get<int32_t>(p)), b = _mm256_set1_epi32(get<int32_t>(p + 4));
                return _mm256_add_epi16(_mm256_maddubs_epi16(first, a), _mm256_maddubs_epi16(second, b));
            };
            for (int t = 0; t < TOKENS; t++) {
                const int8_t* at = v[t] + g * GROUP + 8 * i;
                h[t] = _mm256_add_epi16(h[t], both_of(at));
                l[t] = _mm256_add_epi16(l[t], both_of(at + x.width));
            }
        }
        const __m128i* numbers = reinterpret_cast<const __m128i*>(w + SIZE);
        const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128(numbers));
        const __m256 minimum = _mm256_cvtph_ps(_mm_loadu_si128(numbers + 1));
        for (int t = 0; t < TOKENS; t++) {
            const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(h[t], high), _mm256_madd_epi16(l[t], low));
            acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, acc[t]);
            acc[t] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(sums[t][g]), acc[t]);
        }
    }
    for (int t = 0; t < TOKENS; t++) _mm256_storeu_ps(out[t], acc[t]);
#else
    for (int t = 0; t < TOKENS; t++) std::fill_n(out[t], BLOCK, 0.0f);
    for (int64_t g = 0; g < groups; g++, w += STEP)
        for (int t = 0; t < TOKENS; t++)
            for (int64_t r = 0; r < BLOCK; r++) {
                int32_t sum = 0;
                for (int64_t k = 0; k < GROUP; k++) {
                    const int both = w[k / 8 * 4 * BLOCK + r * 4 + k % 4];
                    const int8_t* at = v[t] + g * GROUP + k;
                    sum += (k % 8 < 4 ? both & 15 : both >> 4) * (256 * at[0] + at[x.width]);
                }
                uint16_t scale, minimum;
                std::memcpy(&scale, w + SIZE + 2 * r, 2);
                std::memcpy(&minimum, w + SIZE + 2 * (BLOCK + r), 2);
                out[t][r] = std::fma(float(sum), real(scale), out[t][r]);
                out[t][r] = std::fma(real(minimum), sums[t][g], out[t][r]);
            }
#endif
}

// What is done to the sums of a row or of several: their scale, their token's factor, their bias.
template <typename T, typename Sink>
static inline void pass_on(const Matrix& m, int64_t row, const Input& x, int64_t token, const float* sums, Sink& sink) {
    T y = get<T>(sums);
    if (m.bits == 8) y *= get<T>(m.scale + row) * x.factor[token];
    if (m.bits == 4) y *= x.factor[token];
    if (m.bias) y += get<T>(m.bias + row);
    sink(token, row, y);
}

// The same for `count` rows, from `row` on.
template <typename Sink>
static inline void pass_on(const Matrix& m, int64_t row, int64_t count, const Input& x, int64_t token, const float* sums,
                           Sink& sink) {
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) pass_on<quad>(m, row + r, x, token, sums + r, sink);
    for (; r < count; r++) pass_on<float>(m, row + r, x, token, sums + r, sink);
}

template <int ROWS, int TOKENS, typename Sink>
static inline void produce(const Matrix& m, int64_t row, const Input& x, int64_t token, Ahead ahead, Sink& sink) {
    float out[TOKENS][ROWS];
    if (m.bits == 8)
        tile8<ROWS, TOKENS>(m, row, x, token, ahead, out);
    else
        tile<ROWS, TOKENS>(m, row, x, token, ahead, out);
    for (int t = 0; t < TOKENS; t++) pass_on(m, row, ROWS, x, token + t, out[t], sink);
}

template <int TOKENS, typename Sink>
static inline void produce4(const Matrix& m, int64_t row, int64_t stop, const Input& x, int64_t token, Sink& sink) {
    float out[TOKENS][BLOCK];
    tile4<TOKENS>(m, row / BLOCK, x, token, out);
    const int64_t count = std::min(stop, (row / BLOCK + 1) * BLOCK) - row;
    for (int t = 0; t < TOKENS; t++) pass_on(m, row, count, x, token + t, &out[t][row % BLOCK], sink);
}

template <int ROWS, int TOKENS, typename Sink>
static void produce_rows(const Matrix& m, int64_t row, const Input& x, int64_t token, int64_t end, Sink& sink) {
    const int64_t groups = (end - token + TOKENS - 1) / TOKENS;
    const int64_t line = m.columns * m.bits / 8, block = ROWS * line, steps = m.columns / (m.bits == 8 ? 16 : LANES);
    const int64_t later = std::min(row + std::max<int64_t>(AHEAD, ROWS), m.rows - ROWS);
    const char* next = static_cast<const char*>(m.weight) + later * line;
    for (int64_t g = 0; token < end; g++, token += TOKENS) {
        const Ahead ahead = {next + g * (block / groups), block / groups / std::max<int64_t>(steps, 1)};
        if (end - token >= TOKENS)
            produce<ROWS, TOKENS>(m, row, x, token, ahead, sink);
        else if (end - token == 2)
            produce<ROWS, 2>(m, row, x, token, ahead, sink);
        else
            produce<ROWS, 1>(m, row, x, token, ahead, sink);
    }
}

// The same for few tokens and float weights, row by row: one stream is read from memory faster than several side by side,
// and what comes next in it is asked for all the time.
template <int TOKENS, typename Sink>
static void stream_rows(const Matrix& m, int64_t& row, int64_t stop, const Input& x, int64_t token, Sink& sink) {
    const float* weight = static_cast<const float*>(m.weight) + row * m.columns;
    for (; row < stop; row++, weight += m.columns)
        produce<1, TOKENS>(m, row, x, token, {reinterpret_cast<const char*>(weight) + 1536, LANES * 4}, sink);
}

// Rows `row` ... `stop` - 1 of a product, for all tokens; `sink(token, row, value)` takes one
// output or those of several rows.
template <typename Sink>
static void multiply(const Matrix& m, int64_t row, int64_t stop, const Input& x, int64_t tokens, Sink sink) {
    constexpr int64_t TOGETHER = 48;  // tokens whose inputs stay in the cache while the weights go by
    for (int64_t token = 0; token < tokens; token += TOGETHER) {
        const int64_t end = tokens < token + TOGETHER ? tokens : token + TOGETHER;
        int64_t r = row;
        if (m.bits == 32) switch (end - token) {
                case 1: stream_rows<1>(m, r, stop, x, token, sink); break;
                case 2: stream_rows<2>(m, r, stop, x, token, sink); break;
                case 3: stream_rows<3>(m, r, stop, x, token, sink); break;
                case 4: stream_rows<4>(m, r, stop, x, token, sink); break;
                case 5: stream_rows<5>(m, r, stop, x, token, sink); break;
            }
        // As many outputs at once as there are registers for.
        for (; m.bits == 4 && r < stop; r = (r / BLOCK + 1) * BLOCK) {
            int64_t t = token;
            for (; t + 3 <= end; t += 3) produce4<3>(m, r, stop, x, t, sink);
            if (t + 2 == end) produce4<2>(m, r, stop, x, t, sink);
            if (t + 1 == end) produce4<1>(m, r, stop, x, t, sink);
        }
        if (m.bits == 8 && end - token == 1)
            for (; r + 8 <= stop; r += 8) produce_rows<8, 1>(m, r, x, token, end, sink);
        if (m.bits == 8)
            for (; r + 4 <= stop; r += 4) produce_rows<4, 2>(m, r, x, token, end, sink);
        else
            for (; r + 4 <= stop; r += 4) produce_rows<4, 3>(m, r, x, token, end, sink);
        for (; r < stop; r++) produce_rows<1, 3>(m, r, x, token, end, sink);
    }
}

static void rms_norm(const float* x, const float* weight, float* out, int64_t size, float epsilon) {
    vec squares = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    float total = sum(squares);
    for (int64_t j = i; j < size; j++) total = std::fma(x[j], x[j], total);
    const float factor = 1.0f / std::sqrt(total / float(size) + epsilon);
    for (int64_t j = 0; j < size; j++) out[j] = weight[j] * (x[j] * factor);
}

// The products of a vector with eight others, times `scale`.
static inline void dots(const float* x, const float* const others[8], int64_t size, float scale, float* out) {
    vec acc[8] = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        const vec part = load(x + i);
        for (int k = 0; k < 8; k++) acc[k] = fma(part, load(others[k] + i), acc[k]);
    }
    quad low = sum4(acc[0], acc[1], acc[2], acc[3]), high = sum4(acc[4], acc[5], acc[6], acc[7]);
    for (; i < size; i++)
        for (int k = 0; k < 4; k++) {
            low[k] = std::fma(x[i], others[k][i], low[k]);
            high[k] = std::fma(x[i], others[k + 4][i], high[k]);
        }
    put(out, low * scale);
    put(out + 4, high * scale);
}

// 16-bit integers and their common factor, exact enough not to show beside 8-bit weights; and, if they are wanted, their
// sums in groups, the integers then as bytes, see `Input`.
static void quantise(const float* x, int16_t* out, float* factor, float* sums, int64_t size) {
    constexpr float MOST = 127 * 256 + 127;  // the low byte has a sign, too
    const ivec magnitude = reinterpret_cast<ivec>(vec{}) + 0x7FFFFFFF;
    ivec largest_bits = {};  // of floats without their sign, which are ordered like integers
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        const ivec bits = reinterpret_cast<ivec>(load(x + i)) & magnitude;
        largest_bits = bits > largest_bits ? bits : largest_bits;
    }
    int32_t most = 0;
    for (int lane = 0; lane < LANES; lane++) most = std::max<int32_t>(most, largest_bits[lane]);
    for (int64_t j = i; j < size; j++) {
        int32_t bits;
        std::memcpy(&bits, x + j, sizeof bits);
        most = std::max(most, bits & 0x7FFFFFFF);
    }
    float largest;
    std::memcpy(&largest, &most, sizeof largest);
    const bool finite = most < 0x7F800000;
    *factor = finite ? largest / MOST : NAN;
    const float inverse = finite && largest > 0 ? MOST / largest : 0;
    const vec magic = all(12582912.0f);  // rounds to the nearest integer, in the low bits
    const auto rounded = [&](int64_t at) {
        return reinterpret_cast<ivec>(fma(load(x + at), all(inverse), magic)) - 0x4B400000;
    };
    if (!finite) {
        std::memset(out, 0, size * sizeof *out);
        std::fill_n(sums, sums ? size / GROUP : 0, 0.0f);
        return;
    }
    i = 0;
    if (!sums)
        for (; i + LANES <= size; i += LANES) {
            const svec narrow = __builtin_convertvector(rounded(i), svec);
            std::memcpy(out + i, &narrow, sizeof narrow);
        }
    else
        for (int8_t* high = reinterpret_cast<int8_t*>(out); i < size; i += GROUP) {
            ivec total = {};
            for (int64_t j = i; j < i + GROUP; j += LANES) {
                const ivec number = rounded(j), low = number << 24 >> 24;
                const bvec upper = __builtin_convertvector((number - low) >> 8, bvec);
                const bvec lower = __builtin_convertvector(low, bvec);
                std::memcpy(high + j, &upper, sizeof upper);
                std::memcpy(high + size + j, &lower, sizeof lower);
                total += number;
            }
            int32_t added = 0;
            for (int lane = 0; lane < LANES; lane++) added += total[lane];
            sums[i / GROUP] = float(added);
        }
    for (; i < size; i++) out[i] = int16_t(std::lrintf(x[i] * inverse));
}

namespace {

class Run {
  public:
    Run(const Shape& shape, const Layer* layers, const Step& step) : s(shape), layers(layers), step(step) {
        const int64_t n = step.tokens;
        queries_width = s.heads * s.head_size;
        keys_width = s.key_heads * s.head_size;
        normed.resize(n * s.hidden);
        queries.resize(n * queries_width);
        keys.resize(n * keys_width);
        values.resize(n * keys_width);
        attended.resize(n * queries_width);
        gates.resize(n * s.intermediate);
        gated.resize(n * s.intermediate);
        last.resize(step.kept * s.hidden);
        const int64_t widest = std::max(std::max(s.hidden, s.intermediate), queries_width);
        whole.resize(n * widest);
        factor.resize(n);
        sums.resize(n * (widest / GROUP));
        gather();
    }

    void start(int count) {
        threads = count;
        next = std::vector<std::atomic<int64_t>>((5 * step.layers + 1) * threads * std::max<int64_t>(1, step.levels));
    }

    void work(int thread) {
        int phase = 0;
        pass(thread, phase);
        for (int64_t level = 0; level < step.levels; level++) {
            barrier();
            for (int64_t i = thread; i < step.kept; i += threads) favour(i, level);
            barrier();
            if (level + 1 == step.levels) break;
            if (thread == 0) follow(level);
            barrier();
            pass(thread, phase);
        }
    }

  private:
    static constexpr int64_t TOGETHER = 4;

    const Shape& s;
    const Layer* layers;
    Step step;
    int threads = 1;
    int64_t queries_width, keys_width;
    buffer<float> normed, queries, keys, values, attended, gates, gated, last, factor, sums;
    buffer<int16_t> whole;
    std::vector<int64_t> together;  // the first tokens of groups of one sequence that attend together, and the end
    std::vector<std::atomic<int64_t>> next;  // the next part of every thread's range, for each phase

    void gather() {
        together.clear();
        for (int64_t t = 0; t < step.tokens; t++)
            if (!t || step.slot[t] != step.slot[t - 1] || t - together.back() == TOGETHER) together.push_back(t);
        together.push_back(step.tokens);
    }

    // The largest logit of a kept token, the first of several, and its lead.
    void favour(int64_t i, int64_t level) {
        const float* logits = step.logits + i * s.vocabulary;
        vec first = all(-INFINITY), second = first;
        int64_t j = 0;
        for (; j + LANES <= s.vocabulary; j += LANES) {
            const vec x = load(logits + j), lesser = x > first ? first : x;
            first = x > first ? x : first;
            second = lesser > second ? lesser : second;
        }
        float best = -INFINITY, other = -INFINITY;
        const auto take = [&](float x) {
            other = std::max(other, std::min(best, x));
            best = std::max(best, x);
        };
        for (int lane = 0; lane < LANES; lane++) take(first[lane]), take(second[lane]);
        for (; j < s.vocabulary; j++) take(logits[j]);
        const float* at = std::find(logits, logits + s.vocabulary, best);
        step.favoured[level * step.kept + i] = at == logits + s.vocabulary ? 0 : int32_t(at - logits);
        step.lead[level * step.kept + i] = best - other;
    }

    // Put what was favoured in the place of the step's tokens, one for each that was kept.
    void follow(int64_t level) {
        for (int64_t i = 0; i < step.kept; i++) {
            const int64_t t = step.keep[i];
            step.slot[i] = step.slot[t];
            step.place[i] = step.place[t] + 1;
            step.position[i] = step.position[t] + 1;
            step.prefix[i] = step.prefix[t] + 1;
            step.first[i + 1] = step.first[0];
            step.keep[i] = int32_t(i);
            const float* row = step.embedding + step.favoured[level * step.kept + i] * s.hidden;
            std::memcpy(step.hidden + i * s.hidden, row, s.hidden * sizeof(float));
        }
        step.tokens = step.kept;
        gather();
    }

    void pass(int thread, int& phase) {
        for (int64_t l = 0; l < step.layers; l++) {
            const Layer& layer = layers[l];
            norm_all(layer.input_norm, layer.query, thread);
            barrier();
            const Input x = input(normed.data(), s.hidden);
            project(layer, x, phase++, thread);
            barrier();
            rotate(layer, thread);
            barrier();
            attend(layer, phase++, thread);
            barrier();
            const Input a = prepared(layer.output, attended.data(), queries_width, thread);
            add(layer.output, a, phase++, thread);
            barrier();
            norm_all(layer.attention_norm, layer.gate, thread);
            barrier();
            gate(layer, x, phase++, thread);
            barrier();
            const Input g = prepared(layer.down, gated.data(), s.intermediate, thread);
            add(layer.down, g, phase++, thread);
            barrier();
            for (int64_t c = 0; c < step.captures; c++)
                if (step.capture[c] == l)
                    for (int64_t t = thread; t < step.tokens; t += threads)
                        std::memcpy(step.captured + (t * step.captures + c) * s.hidden, step.hidden + t * s.hidden,
                                    s.hidden * sizeof(float));
        }
        for (int64_t i = thread; i < step.kept; i += threads) {
            rms_norm(step.hidden + step.keep[i] * s.hidden, s.norm, &last[i * s.hidden], s.hidden, s.epsilon);
            integers(s.head, &last[i * s.hidden], i, s.hidden);
        }
        barrier();
        const Input x = input(last.data(), s.hidden);
        parts(phase++, thread, s.vocabulary, 64, [&](int64_t begin, int64_t end) {
            multiply(s.head, begin, end, x, step.kept,
                     [&](int64_t t, int64_t r, auto y) { put(step.logits + t * s.vocabulary + r, y); });
        });
    }

    static void barrier() {
#pragma omp barrier
    }

    // Every thread has a range of a phase's rows to itself, in parts; who is done early takes parts of the others', since
    // a core may be busy with something else.
    template <typename Work>
    void parts(int phase, int thread, int64_t count, int64_t size, Work work) {
        const int64_t share = (count + threads * size - 1) / (threads * size) * size;
        for (int i = 0; i < threads; i++) {
            const int owner = (thread + i) % threads;
            const int64_t end = std::min(count, (owner + 1) * share);
            for (;;) {
                const int64_t begin =
                    owner * share + next[phase * threads + owner].fetch_add(size, std::memory_order_relaxed);
                if (begin >= end) break;
                work(begin, std::min(end, begin + size));
            }
        }
    }

    Input input(const float* real, int64_t width) const {
        return {real, whole.data(), factor.data(), sums.data(), width};
    }

    // What `m` wants of the input of token t.
    void integers(const Matrix& m, const float* real, int64_t t, int64_t width) {
        if (m.bits < 32)
            quantise(real, &whole[t * width], &factor[t], m.bits == 4 ? &sums[t * (width / GROUP)] : nullptr, width);
    }

    void norm_all(const float* weight, const Matrix& reader, int thread) {
        for (int64_t t = thread; t < step.tokens; t += threads) {
            rms_norm(step.hidden + t * s.hidden, weight, &normed[t * s.hidden], s.hidden, s.epsilon);
            integers(reader, &normed[t * s.hidden], t, s.hidden);
        }
    }

    // The input of a product whose values have just been computed in parts by all threads.
    Input prepared(const Matrix& m, const float* real, int64_t width, int thread) {
        if (m.bits < 32) {
            for (int64_t t = thread; t < step.tokens; t += threads) integers(m, real + t * width, t, width);
            barrier();
        }
        return input(real, width);
    }

    void project(const Layer& layer, const Input& x, int phase, int thread) {
        parts(phase, thread, queries_width + 2 * keys_width, 32, [&](int64_t begin, int64_t end) {
            section(layer.query, begin, end, 0, x, queries.data());
            section(layer.key, begin, end, queries_width, x, keys.data());
            section(layer.value, begin, end, queries_width + keys_width, x, values.data());
        });
    }

    // The part of a product that falls into begin ... end - 1 when its rows are numbered from `offset`.
    void section(const Matrix& m, int64_t begin, int64_t end, int64_t offset, const Input& x, float* out) {
        const int64_t row = std::max<int64_t>(begin - offset, 0), stop = std::min(end - offset, m.rows);
        if (row < stop)
            multiply(m, row, stop, x, step.tokens, [&](int64_t t, int64_t r, auto y) { put(out + t * m.rows + r, y); });
    }

    void turn(float* head, const float* norm, int64_t position) {
        if (norm) rms_norm(head, norm, head, s.head_size, s.epsilon);
        const int64_t half = s.head_size / 2;
        const float *c = s.cosine + position * half, *n = s.sine + position * half;
        for (int64_t i = 0; i < half; i++) {
            const float a = head[i], b = head[i + half];
            head[i] = a * c[i] - b * n[i];
            head[i + half] = b * c[i] + a * n[i];
        }
    }

    // Give queries and keys their positions, and write keys and values to the cache.
    void rotate(const Layer& layer, int thread) {
        for (int64_t t = thread; t < step.tokens; t += threads) {
            for (int64_t h = 0; h < s.heads; h++)
                turn(&queries[t * queries_width + h * s.head_size], layer.query_norm, step.position[t]);
            for (int64_t h = 0; h < s.key_heads; h++) {
                float* key = &keys[t * keys_width + h * s.head_size];
                turn(key, layer.key_norm, step.position[t]);
                const int64_t at = ((step.slot[t] * s.key_heads + h) * s.capacity + step.place[t]) * s.head_size;
                std::memcpy(layer.keys + at, key, s.head_size * sizeof(float));
                std::memcpy(layer.values + at, &values[t * keys_width + h * s.head_size], s.head_size * sizeof(float));
            }
        }
    }

    void attend(const Layer& layer, int phase, int thread) {
        const int64_t groups = int64_t(together.size()) - 1;
        buffer<float> scores;
        parts(phase, thread, groups * s.heads, groups > 4 ? s.heads : 1, [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; item++)
                switch (s.head_size) {  // sizes that the compiler had better know
                    case 64: look<64>(layer, item, scores); break;
                    case 128: look<128>(layer, item, scores); break;
                    default: look<0>(layer, item, scores);
                }
        });
    }

    // Where the j-th of the entries that a token sees lies in its slot.
    int64_t entry(int64_t token, int64_t j) const {
        const int64_t prefix = step.prefix[token];
        return j < prefix ? j : step.more[step.first[token] + j - prefix];
    }

    // One head of a group of tokens. They go through the keys and values of their sequence side by side, a few of these
    // at a time, which so come from memory once.
    template <int SIZE>
    void look(const Layer& layer, int64_t item, buffer<float>& scores) {
        constexpr int64_t FEW = 64;
        const int64_t start = together[item / s.heads], stop = together[item / s.heads + 1], head = item % s.heads;
        const int64_t size = SIZE ? SIZE : s.head_size, first = step.slot[start] * s.key_heads + head / (s.heads / s.key_heads);
        const float *keys = layer.keys + first * s.capacity * size, *values = layer.values + first * s.capacity * size;
        int64_t seen[TOGETHER], most = 0;
        for (int64_t t = start; t < stop; t++) {
            seen[t - start] = step.prefix[t] + step.first[t + 1] - step.first[t];
            most = std::max(most, seen[t - start]);
        }
        const int64_t width = most + 2 * LANES;
        scores.resize((stop - start) * width);
        for (int64_t from = 0; from < most; from += FEW)
            for (int64_t t = start; t < stop; t++) {
                const float* query = &queries[t * queries_width + head * size];
                float* own = &scores[(t - start) * width];
                const int64_t end = std::min(from + FEW, seen[t - start]);
                for (int64_t j = from; j < end; j += 8) {
                    const float* eight[8];
                    const bool whole = j + 8 <= step.prefix[t];
                    for (int64_t i = 0; i < 8; i++)
                        eight[i] = keys + (whole ? j + i : entry(t, std::min(j + i, end - 1))) * size;
                    if (t == start && whole)  // the first one asks for what comes next
                        for (int64_t i = 0; i < 8 * size; i += 16) __builtin_prefetch(eight[7] + size + i, 0, 3);
                    dots(query, eight, size, s.scale, own + j);
                }
            }
        float factors[TOGETHER];
        for (int64_t t = start; t < stop; t++) {
            float* own = &scores[(t - start) * width];
            std::fill(own + seen[t - start], own + width, -INFINITY);
            factors[t - start] = 1.0f / exponentials(own, seen[t - start]);
            std::fill_n(&attended[t * queries_width + head * size], size, 0.0f);
        }
        for (int64_t from = 0; from < most; from += FEW)
            for (int64_t t = start; t < stop; t++) {
                const int64_t end = std::min(from + FEW, seen[t - start]);
                if (from < end)
                    weigh(values, size, t, from, end, &scores[(t - start) * width], &attended[t * queries_width + head * size]);
            }
        for (int64_t t = start; t < stop; t++)
            for (int64_t d = 0; d < size; d++) attended[t * queries_width + head * size + d] *= factors[t - start];
    }

    // In place of scores what e to their power is, after the largest is taken off; returns the sum. There are `LANES` more,
    // which are -infinity.
    static float exponentials(float* scores, int64_t count) {
        vec most = all(-INFINITY), totals = {};
        for (int64_t j = 0; j < count; j += LANES) most = load(scores + j) > most ? load(scores + j) : most;
        float largest = -INFINITY;
        for (int lane = 0; lane < LANES; lane++) largest = most[lane] > largest ? most[lane] : largest;
        for (int64_t j = 0; j < count; j += LANES) {
            const vec raised = load(scores + j) - largest;
            vec e = exponential(raised);
            e = raised < -87.0f ? vec{} : e;
            e = raised == raised ? e : raised;  // what is not a number stays so
            store(scores + j, e);
            totals += e;
        }
        return sum(totals);
    }

    // Add to `out` the values `from` ... `end` - 1 that a token sees, times their weights.
    inline void weigh(const float* values, int64_t size, int64_t token, int64_t from, int64_t end, const float* weight,
                      float* out) const {
        constexpr int WIDE = 8;
        const int64_t middle = std::max(from, std::min<int64_t>(end, step.prefix[token]));
        int64_t d = 0;
        for (; d + WIDE * LANES <= size; d += WIDE * LANES) {
            vec acc[WIDE];
            for (int i = 0; i < WIDE; i++) acc[i] = load(out + d + i * LANES);
            const auto take = [&](const float* v, float part) {
                for (int i = 0; i < WIDE; i++) acc[i] = fma(all(part), load(v + i * LANES), acc[i]);
            };
            for (int64_t j = from; j < middle; j++) take(values + j * size + d, weight[j]);
            for (int64_t j = middle; j < end; j++) take(values + entry(token, j) * size + d, weight[j]);
            for (int i = 0; i < WIDE; i++) store(out + d + i * LANES, acc[i]);
        }
        for (; d < size; d++)
            for (int64_t j = from; j < end; j++) out[d] = std::fma(weight[j], values[entry(token, j) * size + d], out[d]);
    }

    void add(const Matrix& m, const Input& x, int phase, int thread) {
        parts(phase, thread, m.rows, 32, [&](int64_t begin, int64_t end) {
            multiply(m, begin, end, x, step.tokens, [&](int64_t t, int64_t r, auto y) {
                float* at = step.hidden + t * s.hidden + r;
                put(at, get<decltype(y)>(at) + y);
            });
        });
    }

    void gate(const Layer& layer, const Input& x, int phase, int thread) {
        parts(phase, thread, s.intermediate, 32, [&](int64_t begin, int64_t end) {
            multiply(layer.gate, begin, end, x, step.tokens,
                     [&](int64_t t, int64_t r, auto y) { put(&gates[t * s.intermediate + r], y); });
            multiply(layer.up, begin, end, x, step.tokens,
                     [&](int64_t t, int64_t r, auto y) { put(&gated[t * s.intermediate + r], y); });
            for (int64_t t = 0; t < step.tokens; t++)
                for (int64_t i = begin; i < end; i += LANES) {
                    const int64_t count = std::min<int64_t>(LANES, end - i);
                    vec g = {};
                    std::memcpy(&g, &gates[t * s.intermediate + i], count * sizeof(float));
                    vec y = g / (1.0f + exponential(-g));
                    y = g == g ? y : g;
                    float* up = &gated[t * s.intermediate + i];
                    for (int64_t j = 0; j < count; j++) up[j] *= y[j];
                }
        });
    }
};

}  // namespace

extern "C" void run_step(const Shape* shape, const Layer* layers, const Step* step) {
    Run run(*shape, layers, *step);
#ifdef _OPENMP
#pragma omp parallel num_threads(step->threads)
    {
#pragma omp single
        run.start(omp_get_num_threads());
        run.work(omp_get_thread_num());
    }
#else
    run.start(1);
    run.work(0);
#endif
}
