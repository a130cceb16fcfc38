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
typedef float loose_vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

constexpr int64_t AHEAD = 4;

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
    const quad low = __builtin_shuffle(p, q, (int4){0, 1, 4, 5}) + __builtin_shuffle(p, q, (int4){2, 3, 6, 7});
    const quad high = __builtin_shuffle(r, s, (int4){0, 1, 4, 5}) + __builtin_shuffle(r, s, (int4){2, 3, 6, 7});
    return __builtin_shuffle(low, high, (int4){0, 2, 4, 6}) + __builtin_shuffle(low, high, (int4){1, 3, 5, 7});
}

// One value or several, to and from memory that need not be aligned.
template <typename T>
static inline T get(const float* at) {
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

// A weight matrix [rows, columns], row after row: floats; or int8 with a float of `scale` for every row; or, where there
// is a `minimum`, four bits. Those come in groups of 32 columns: a byte holds column i of its group in its low half and
// column i + 16 in its high one, and stands for a multiple of the group's `scale` above its `minimum`, which are half
// precision numbers [rows, groups rounded up to 8]. `bias` may be null.
struct Matrix {
    const void* weight;
    const void* scale;
    const uint16_t* minimum;
    const float* bias;
    int64_t rows, columns;
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
// entries of its slot and then `more[first[t]] ... more[first[t + 1] - 1]`.
struct Step {
    int64_t tokens, layers, kept, captures;
    float* hidden;  // [tokens, hidden], overwritten
    const int32_t *slot, *place, *position, *prefix, *first, *more;
    const int32_t* keep;  // [kept] tokens whose logits are wanted
    float* logits;        // [kept, vocabulary]
    const int32_t* capture;  // [captures] layers whose output is wanted
    float* captured;         // [tokens, captures, hidden]
    int64_t threads;
};

}  // extern "C"

constexpr int64_t GROUP = 32;

// Numbers of one row in an array over groups.
static inline int64_t grouped(int64_t columns) { return (columns / GROUP + 7) / 8 * 8; }

// Tokens in the form in which a kind of matrix wants them: floats, or 16-bit integers with a factor for every token and
// their sum in every group of columns.
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

// The same for weights of four bits. The sum over a group is exact, too; and what the minimum adds to it is the group's
// sum of inputs, which is known.
template <int ROWS, int TOKENS>
static inline void tile4(const Matrix& m, int64_t row, const Input& x, int64_t token, Ahead ahead,
                         float out[TOKENS][ROWS]) {
    const int64_t bytes = m.columns / 2, groups = m.columns / GROUP, padded = grouped(m.columns);
    const uint8_t* w = static_cast<const uint8_t*>(m.weight) + row * bytes;
    const uint16_t* scale = static_cast<const uint16_t*>(m.scale) + row * padded;
    const uint16_t* minimum = m.minimum + row * padded;
    const int16_t* v = x.whole + token * x.width;
    const float* sums = x.sums + token * padded;
    vec total[ROWS][TOKENS] = {};
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
    __m256 acc[ROWS][TOKENS];
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOKENS; t++) acc[r][t] = _mm256_setzero_ps();
    const __m256i low = _mm256_set1_epi16(15);
    for (int64_t g = 0; g < groups; g += 8) {
        alignas(32) float scales[ROWS][8];
        for (int r = 0; r < ROWS; r++) {
            const __m128i *s = reinterpret_cast<const __m128i*>(scale + r * padded + g),
                          *least = reinterpret_cast<const __m128i*>(minimum + r * padded + g);
            _mm256_store_ps(scales[r], _mm256_cvtph_ps(_mm_loadu_si128(s)));
            const __m256 base = _mm256_cvtph_ps(_mm_loadu_si128(least));
            for (int t = 0; t < TOKENS; t++)
                acc[r][t] = _mm256_fmadd_ps(base, _mm256_loadu_ps(sums + t * padded + g), acc[r][t]);
        }
        const int64_t count = std::min<int64_t>(8, groups - g);
        for (int64_t i = 0; i < count; i++) {
            const int64_t k = (g + i) * GROUP;
            __m256i first[TOKENS], second[TOKENS];
            ahead.ask();
            for (int t = 0; t < TOKENS; t++) {
                const __m256i* at = reinterpret_cast<const __m256i*>(v + t * x.width + k);
                first[t] = once(_mm256_loadu_si256(at));
                second[t] = once(_mm256_loadu_si256(at + 1));
            }
            for (int r = 0; r < ROWS; r++) {
                const __m256i both = _mm256_cvtepu8_epi16(
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + r * bytes + k / 2)));
                const __m256i a = _mm256_and_si256(both, low), b = _mm256_srli_epi16(both, 4);
                const __m256 s = _mm256_broadcast_ss(&scales[r][i]);
                for (int t = 0; t < TOKENS; t++) {
                    const __m256i sum =
                        _mm256_add_epi32(_mm256_madd_epi16(a, first[t]), _mm256_madd_epi16(b, second[t]));
                    acc[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), s, acc[r][t]);
                }
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOKENS; t++) std::memcpy(&total[r][t], &acc[r][t], sizeof acc[r][t]);
#else
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOKENS; t++)
            for (int64_t g = 0; g < groups; g++) {
                int32_t s = 0;
                for (int64_t i = 0; i < GROUP / 2; i++) {
                    const uint8_t both = w[r * bytes + g * GROUP / 2 + i];
                    const int16_t* at = v + t * x.width + g * GROUP + i;
                    s += (both & 15) * at[0] + (both >> 4) * at[GROUP / 2];
                }
                const float base = std::fma(real(minimum[r * padded + g]), sums[t * padded + g], total[r][t][0]);
                total[r][t][0] = std::fma(real(scale[r * padded + g]), float(s), base);
            }
#endif
    add_up<ROWS, TOKENS>(total, out);
}

// What is done to the sums of a row or of several: their scale, their token's factor, their bias.
template <typename T, typename Sink>
static inline void pass_on(const Matrix& m, int64_t row, const Input& x, int64_t token, const float* sums, Sink& sink) {
    T y = get<T>(sums);
    if (m.minimum)
        y *= x.factor[token];
    else if (m.scale)
        y *= get<T>(static_cast<const float*>(m.scale) + row) * x.factor[token];
    if (m.bias) y += get<T>(m.bias + row);
    sink(token, row, y);
}

template <int ROWS, int TOKENS, typename Sink>
static inline void produce(const Matrix& m, int64_t row, const Input& x, int64_t token, Ahead ahead, Sink& sink) {
    float out[TOKENS][ROWS];
    if (m.minimum)
        tile4<ROWS, TOKENS>(m, row, x, token, ahead, out);
    else if (m.scale)
        tile8<ROWS, TOKENS>(m, row, x, token, ahead, out);
    else
        tile<ROWS, TOKENS>(m, row, x, token, ahead, out);
    for (int t = 0; t < TOKENS; t++) {
        int r = 0;
        for (; r + 4 <= ROWS; r += 4) pass_on<quad>(m, row + r, x, token + t, &out[t][r], sink);
        for (; r < ROWS; r++) pass_on<float>(m, row + r, x, token + t, &out[t][r], sink);
    }
}

template <int ROWS, int TOKENS, typename Sink>
static void produce_rows(const Matrix& m, int64_t row, const Input& x, int64_t token, int64_t end, Sink& sink) {
    const int64_t groups = (end - token + TOKENS - 1) / TOKENS;
    const int64_t line = m.minimum ? m.columns / 2 : m.scale ? m.columns : m.columns * int64_t(sizeof(float));
    const int64_t block = ROWS * line, steps = m.columns / (m.minimum ? GROUP : m.scale ? 16 : LANES);
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

// Rows `row` ... `stop` - 1 of a product, for all tokens; `sink(token, row, value)` takes one
// output or those of several rows.
template <typename Sink>
static void multiply(const Matrix& m, int64_t row, int64_t stop, const Input& x, int64_t tokens, Sink sink) {
    constexpr int64_t TOGETHER = 48;  // tokens whose inputs stay in the cache while the weights go by
    for (int64_t token = 0; token < tokens; token += TOGETHER) {
        const int64_t end = tokens < token + TOGETHER ? tokens : token + TOGETHER;
        int64_t r = row;
        // As many outputs at once as there are registers for.
        if (m.scale && end - token == 1)
            for (; r + 8 <= stop; r += 8) produce_rows<8, 1>(m, r, x, token, end, sink);
        if (m.scale)
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

static float dot(const float* a, const float* b, int64_t size) {
    vec acc = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) acc = fma(load(a + i), load(b + i), acc);
    float s = sum(acc);
    for (; i < size; i++) s = std::fma(a[i], b[i], s);
    return s;
}

// 16-bit integers and their common factor, exact enough not to show beside 8-bit weights; and, if they are wanted, their
// sums in groups.
static void quantise(const float* x, int16_t* out, float* factor, float* sums, int64_t size) {
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
    *factor = finite ? largest / 32767.0f : NAN;
    const float inverse = finite && largest > 0 ? 32767.0f / largest : 0;
    const vec magic = all(12582912.0f);  // rounds to the nearest integer, in the low bits
    i = finite ? 0 : size;
    if (!finite) std::memset(out, 0, size * sizeof *out);
    for (; i + LANES <= size; i += LANES) {
        const ivec rounded = reinterpret_cast<ivec>(fma(load(x + i), all(inverse), magic)) - 0x4B400000;
        const svec narrow = __builtin_convertvector(rounded, svec);
        std::memcpy(out + i, &narrow, sizeof narrow);
    }
    for (; i < size; i++) out[i] = int16_t(std::lrintf(x[i] * inverse));
    for (int64_t g = 0; sums && g < grouped(size); g++) {
        int32_t total = 0;
        for (int64_t j = g * GROUP; j < (g + 1) * GROUP && g < size / GROUP; j++) total += out[j];
        sums[g] = float(total);
    }
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
        gated.resize(n * s.intermediate);
        last.resize(step.kept * s.hidden);
        const int64_t widest = std::max(std::max(s.hidden, s.intermediate), queries_width);
        whole.resize(n * widest);
        factor.resize(n);
        sums.resize(n * (widest / GROUP + 8));
    }

    void start(int count) {
        threads = count;
        next = std::vector<std::atomic<int64_t>>((5 * step.layers + 1) * threads);
    }

    void work(int thread) {
        int phase = 0;
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

  private:
    const Shape& s;
    const Layer* layers;
    const Step& step;
    int threads = 1;
    int64_t queries_width, keys_width;
    std::vector<float> normed, queries, keys, values, attended, gated, last, factor, sums;
    std::vector<int16_t> whole;
    std::vector<std::atomic<int64_t>> next;  // the next part of every thread's range, for each phase

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
        if (m.scale)
            quantise(real, &whole[t * width], &factor[t], m.minimum ? &sums[t * grouped(width)] : nullptr, width);
    }

    void norm_all(const float* weight, const Matrix& reader, int thread) {
        for (int64_t t = thread; t < step.tokens; t += threads) {
            rms_norm(step.hidden + t * s.hidden, weight, &normed[t * s.hidden], s.hidden, s.epsilon);
            integers(reader, &normed[t * s.hidden], t, s.hidden);
        }
    }

    // The input of a product whose values have just been computed in parts by all threads.
    Input prepared(const Matrix& m, const float* real, int64_t width, int thread) {
        if (m.scale) {
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
        const int64_t fold = s.heads / s.key_heads;
        std::vector<float> scores;
        parts(phase, thread, step.tokens * s.heads, step.tokens > 16 ? s.heads : 1, [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; item++) {
                const int64_t t = item / s.heads, h = item % s.heads;
                const int64_t prefix = step.prefix[t];
                const int32_t* more = step.more + step.first[t];
                const int64_t seen = prefix + step.first[t + 1] - step.first[t];
                const int64_t base = (step.slot[t] * s.key_heads + h / fold) * s.capacity * s.head_size;
                const float* query = &queries[t * queries_width + h * s.head_size];
                scores.assign(seen + LANES, -INFINITY);
                float largest = -INFINITY;
                for (int64_t j = 0; j < seen; j++) {
                    const int64_t place = j < prefix ? j : more[j - prefix];
                    scores[j] = dot(query, layer.keys + base + place * s.head_size, s.head_size) * s.scale;
                    largest = scores[j] > largest ? scores[j] : largest;
                }
                vec totals = {};
                for (int64_t j = 0; j < seen; j += LANES) {
                    const vec raised = load(&scores[j]) - largest;
                    vec e = exponential(raised);
                    e = raised < -87.0f ? vec{} : e;
                    e = raised == raised ? e : raised;  // what is not a number stays so
                    store(&scores[j], e);
                    totals += e;
                }
                weigh(layer.values + base, more, prefix, seen, &scores[0], 1.0f / sum(totals),
                      &attended[t * queries_width + h * s.head_size]);
            }
        });
    }

    // The mean of the values that a token sees, weighted by its scores.
    void weigh(const float* all_values, const int32_t* more, int64_t prefix, int64_t seen, const float* weight,
               float factor, float* out) const {
        constexpr int WIDE = 8;
        int64_t d = 0;
        for (; d + WIDE * LANES <= s.head_size; d += WIDE * LANES) {
            vec acc[WIDE] = {};
            for (int64_t j = 0; j < seen; j++) {
                const float* v = all_values + (j < prefix ? j : more[j - prefix]) * s.head_size + d;
                for (int i = 0; i < WIDE; i++) acc[i] = fma(all(weight[j]), load(v + i * LANES), acc[i]);
            }
            for (int i = 0; i < WIDE; i++) store(out + d + i * LANES, acc[i] * factor);
        }
        for (; d < s.head_size; d++) {
            float acc = 0;
            for (int64_t j = 0; j < seen; j++)
                acc = std::fma(weight[j], all_values[(j < prefix ? j : more[j - prefix]) * s.head_size + d], acc);
            out[d] = acc * factor;
        }
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
            std::vector<float> gates(step.tokens * (end - begin));
            const int64_t width = end - begin;
            multiply(layer.gate, begin, end, x, step.tokens,
                     [&](int64_t t, int64_t r, auto y) { put(&gates[t * width + r - begin], y); });
            multiply(layer.up, begin, end, x, step.tokens,
                     [&](int64_t t, int64_t r, auto y) { put(&gated[t * s.intermediate + r], y); });
            for (int64_t t = 0; t < step.tokens; t++)
                for (int64_t i = 0; i < width; i += LANES) {
                    const int64_t count = std::min<int64_t>(LANES, width - i);
                    vec g = {};
                    std::memcpy(&g, &gates[t * width + i], count * sizeof(float));
                    vec y = g / (1.0f + exponential(-g));
                    y = g == g ? y : g;
                    float* up = &gated[t * s.intermediate + begin + i];
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
