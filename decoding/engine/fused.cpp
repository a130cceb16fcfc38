// One step of a Llama-shaped decoder (RMSNorm, rotary positions, grouped queries, gated MLP) on a CPU.
//
// All threads run the whole step together and meet at barriers; a step over a few tokens is bound by the time it takes
// to read the weights once, so nothing here touches memory that it does not need.
//
// Every number is computed by the same operations in the same order, whatever else is in the step: an output of a
// matrix product has its own accumulators over the columns in order, and a token attends to the keys it sees in order
// of their positions. So a token's logits are the same bits in any block, any batch and for any number of threads.

#include "fused_products.h"

#include <atomic>
#ifdef _OPENMP
#include <omp.h>
#endif

extern "C" {

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

    // Every thread has a range of a phase's rows to itself, in parts; who is done early takes parts of the others',
    // since a core may be busy with something else.
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
        const int64_t size = SIZE ? SIZE : s.head_size, key_head = head / (s.heads / s.key_heads);
        const int64_t cached = (step.slot[start] * s.key_heads + key_head) * s.capacity * size;
        const float *keys = layer.keys + cached, *values = layer.values + cached;
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
                float* out = &attended[t * queries_width + head * size];
                if (from < end) weigh(values, size, t, from, end, &scores[(t - start) * width], out);
            }
        for (int64_t t = start; t < stop; t++)
            for (int64_t d = 0; d < size; d++) attended[t * queries_width + head * size + d] *= factors[t - start];
    }

    // In place of scores what e to their power is, after the largest is taken off; returns the sum. There are `LANES`
    // more, which are -infinity.
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
        int64_t d = 0;
        weigh_by<8>(values, size, token, from, end, weight, out, d);
        weigh_by<4>(values, size, token, from, end, weight, out, d);
        weigh_by<1>(values, size, token, from, end, weight, out, d);
        for (; d < size; d++)
            for (int64_t j = from; j < end; j++)
                out[d] = std::fma(weight[j], values[entry(token, j) * size + d], out[d]);
    }

    // The same for as many of their components, from `d` on, as make up pieces of WIDE vectors.
    template <int WIDE>
    inline void weigh_by(const float* values, int64_t size, int64_t token, int64_t from, int64_t end,
                         const float* weight, float* out, int64_t& d) const {
        const int64_t middle = std::max(from, std::min<int64_t>(end, step.prefix[token]));
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
