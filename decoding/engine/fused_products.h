// Products of a weight matrix, in 32, 8 or 4 bits, with a few tokens.
//
// An output has its own accumulators over the columns in order, so it is the same bits however many tokens and rows are
// computed beside it.

#pragma once

#include <algorithm>

#include "fused_vectors.h"

// A weight matrix [rows, columns] of so many bits; `bias` may be null.
//
// 32: floats, row after row. 8: integers, row after row, with a float of `scale` for every row. 4: blocks of 8 rows,
// the last one filled up with zeros, each in groups of 32 columns, of 160 bytes. The first 128 are, for every 8
// columns, 4 bytes for each of the rows: column i in the low half of a byte, column i + 4 in the high one. Then come
// two half precision numbers for each of the rows, first all scales, then all minima: a weight is a multiple of the
// scale above the minimum.
struct Matrix {
    const void* weight;
    const float *scale, *bias;
    int64_t rows, columns, bits;
};

constexpr int64_t AHEAD = 4;              // rows between what is computed and what is asked of the memory
constexpr int64_t GROUP = 32, BLOCK = 8;  // columns, and rows, of a group of weights of four bits

// Tokens in the form in which a kind of matrix wants them: floats, or 16-bit integers with a factor for every token.
// For weights of four bits their high bytes and then their low ones, which are signed, and their sums in groups of
// columns.
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

// The same for int8 weights. Sums of integers are exact below 2^31, where those of `FLUSH` columns stay; the lanes are
// then added up as floats.
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

// A block of rows of four bits and TOKENS tokens. The sum over a group is exact, too; and what the minimum adds to it
// is the group's sum of inputs, which is known.
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
static inline void pass_on(const Matrix& m, int64_t row, int64_t count, const Input& x, int64_t token,
                           const float* sums, Sink& sink) {
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

// The same for few tokens and float weights, row by row: one stream is read from memory faster than several side by
// side, and what comes next in it is asked for all the time.
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

// 16-bit integers and their common factor, exact enough not to show beside 8-bit weights; and, if they are wanted,
// their sums in groups, the integers then as bytes, see `Input`.
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
