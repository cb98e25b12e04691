// The gated delta rule (arXiv 2412.06464, eq. 10) token by token, forward and backward, in float32.
//
//     D = a_t S,    u = beta_t (v_t - D^T k_t),    S' = D + k_t u^T,    o_t = S'^T q_t,    a_t = exp(g_t)
//
// S is the memory (keys K, values V) of a head. q and k are divided by their 2-norms, and q by sqrt(K). `packed` (rows, tokens,
// channels) has the queries of all heads, then their keys, then their values; g and beta are (rows, tokens, heads). The columns of
// S do not meet: a block of them at a time, a few vectors wide, stays in the cache for a whole chunk of tokens. What the
// backward pass needs of a chunk it computes again from the memory before the chunk, which the forward pass keeps. Built and
// called by kernels/compiled.py for mixers/gated_delta_rule, which computes the same in matrix products of plain torch.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "lanes.h"

namespace {

constexpr int64_t CHUNK = 32;  // tokens; the same number as CHUNK_TOKENS in kernels/gated_delta_rule.py
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MOST_VECTORS = 4;  // of a block of columns
#else
constexpr int MOST_VECTORS = 2;  // with four, 16 registers do not hold what a sweep of the backward pass adds up
#endif
constexpr float NORM_EPS = 1e-6f;

struct Sizes {
    int64_t rows, tokens, heads, keys, values;
    int64_t channels() const { return heads * (2 * keys + values); }
    int64_t padded_keys() const { return (keys + LANES - 1) / LANES * LANES; }
    int64_t chunks() const { return (tokens + CHUNK - 1) / CHUNK; }
    // Of blocks of N vectors.
    template <int N>
    int64_t blocks() const {
        return (values + N * LANES - 1) / (N * LANES);
    }
    template <int N>
    int64_t block_size() const {  // of the memory
        return padded_keys() * N * LANES;
    }
};

struct Inputs {
    const float *packed, *g, *beta;
};

// Columns of a block of N vectors.
template <int N>
struct Columns {
    Vec v[N] = {};

    static Columns of(const float* from) {
        Columns c;
        for (int i = 0; i < N; ++i) c.v[i] = load(from + i * LANES);
        return c;
    }
    static Columns of(const float* from, int64_t n) {
        Columns c;
        for (int i = 0; i < N; ++i) c.v[i] = load(from + i * LANES, n - i * LANES);
        return c;
    }
    void store_to(float* to) const {
        for (int i = 0; i < N; ++i) store(to + i * LANES, v[i]);
    }
    void store_to(float* to, int64_t n) const {
        for (int i = 0; i < N; ++i) store(to + i * LANES, n - i * LANES, v[i]);
    }
    void add(const Columns& a, const Columns& b) {
        for (int i = 0; i < N; ++i) v[i] += a.v[i] * b.v[i];
    }
    void add(float a, const Columns& b) {
        for (int i = 0; i < N; ++i) v[i] += a * b.v[i];
    }
    Columns plus(const Columns& b) const {
        Columns c;
        for (int i = 0; i < N; ++i) c.v[i] = v[i] + b.v[i];
        return c;
    }
    Columns times(float a) const {
        Columns c;
        for (int i = 0; i < N; ++i) c.v[i] = a * v[i];
        return c;
    }
    // One vector whose lanes add up to the sum of all numbers.
    Vec folded() const {
        Vec sum = v[0];
        for (int i = 1; i < N; ++i) sum += v[i];
        return sum;
    }
};

// A running sum of columns, in several parts so that an addition need not wait for the one before.
template <int N>
struct Sum {
    static constexpr int PARTS = 4 / N;
    Columns<N> parts[PARTS];

    Columns<N> total() const {
        Columns<N> sum = parts[0];
        for (int i = 1; i < PARTS; ++i) sum = sum.plus(parts[i]);
        return sum;
    }
};

// Asks for q, k and v of a head and a token, if there is such a token: a few cache lines each, far from those of the tokens
// before and after, so that the processor does not foresee them.
void prefetch_inputs(const Sizes& n, const Inputs& in, int64_t row, int64_t head, int64_t t) {
    if (t < 0 || t >= n.tokens) return;
    const float* token = in.packed + (row * n.tokens + t) * n.channels();
    prefetch(token + head * n.keys, n.keys);
    prefetch(token + (n.heads + head) * n.keys, n.keys);
    prefetch(token + 2 * n.heads * n.keys + head * n.values, n.values);
}

// Inputs of a chunk of a head: unit vectors, (tokens, padded keys), and scalars.
struct Chunk {
    int64_t first, tokens, padded;
    Buffer q, k;
    float q_scale[CHUNK], k_scale[CHUNK], decay[CHUNK], beta[CHUNK], qk[CHUNK];

    explicit Chunk(const Sizes& n) : padded(n.padded_keys()), q(CHUNK * padded), k(CHUNK * padded) {}

    // `next`: the chunk after this one.
    NOINLINE void read(const Sizes& n, const Inputs& in, int64_t row, int64_t head, int64_t chunk, int64_t next) {
        first = chunk * CHUNK, tokens = std::min(CHUNK, n.tokens - first);
        for (int64_t t = 0; t < tokens; ++t) {
            int64_t token = row * n.tokens + first + t;
            const float* from = in.packed + token * n.channels() + head * n.keys;
            q_scale[t] = unit(n, from, &q[t * padded], 1.0f / std::sqrt(static_cast<float>(n.keys)));
            k_scale[t] = unit(n, from + n.heads * n.keys, &k[t * padded], 1.0f);
            decay[t] = std::exp(in.g[token * n.heads + head]);
            beta[t] = in.beta[token * n.heads + head];
            qk[t] = dot(&q[t * padded], &k[t * padded]);
            prefetch_inputs(n, in, row, head, next * CHUNK + t);  // now and then: a processor fetches few lines at a time
        }
    }

    float dot(const float* a, const float* b) const {
        Vec sum{};
        for (int64_t i = 0; i < padded; i += LANES) sum += load(a + i) * load(b + i);
        return horizontal_sum(sum);
    }

private:
    // Writes a vector, divided by its 2-norm, times `scale`; returns by what it was multiplied.
    float unit(const Sizes& n, const float* from, float* to, float scale) const {
        std::copy(from, from + n.keys, to);
        scale /= std::sqrt(dot(to, to) + NORM_EPS);
        for (int64_t i = 0; i < n.keys; i += LANES) store(to + i, n.keys - i, load(to + i) * scale);  // not the zeros beyond
        return scale;
    }
};

// What the backward pass needs of the tokens of a chunk and a block: D, u, and v - D^T k.
template <int N>
struct Kept {
    Buffer decayed, update, error;
    explicit Kept(const Sizes& n) : decayed(CHUNK * n.block_size<N>()), update(CHUNK * N * LANES), error(CHUNK * N * LANES) {}
};

// What is read from a memory: D^T k and D^T q, row by row.
template <int N, bool WITH_QUERY>
struct Lookup {
    Sum<N> by_key, by_query;

    void add(float k, float q, const Columns<N>& s, int part) {
        by_key.parts[part].add(k, s);
        if constexpr (WITH_QUERY) by_query.parts[part].add(q, s);
    }
};

// Takes the memory of a block through a chunk. `values` and `out` point to the first token's columns. One sweep over the memory
// writes the update of a token and the decay of the next one, and reads what that one needs. KEEPS: whether the backward pass calls
// this. Then D of every token goes to `kept`, and there are no outputs; else the memory is changed in place.
template <int N, bool KEEPS>
NOINLINE void advance(const Sizes& n, const Chunk& c, const float* values, int64_t n_columns, float* memory, float* out,
                      Kept<N>* kept) {
    constexpr int WIDTH = N * LANES, PARTS = Sum<N>::PARTS;
    Lookup<N, !KEEPS> found;
    float* decayed = memory;
    if constexpr (KEEPS) decayed = kept->decayed.data();
    for (int64_t i = 0; i < c.padded; i += PARTS)
        for (int j = 0; j < PARTS; ++j) {
            auto s = Columns<N>::of(memory + (i + j) * WIDTH).times(c.decay[0]);
            s.store_to(decayed + (i + j) * WIDTH);
            found.add(c.k[i + j], c.q[i + j], s, j);
        }
    for (int64_t t = 0; t < c.tokens; ++t) {
        auto value = Columns<N>::of(values + t * n.channels(), n_columns);
        value.add(-1.0f, found.by_key.total());
        Columns<N> update = value.times(c.beta[t]);
        if constexpr (KEEPS) {
            update.store_to(&kept->update[t * WIDTH]);
            value.store_to(&kept->error[t * WIDTH]);
        } else {
            Columns<N> o = found.by_query.total();
            o.add(c.qk[t], update);
            o.store_to(out + t * n.heads * n.values, n_columns);
        }
        bool is_last = t == c.tokens - 1;
        if (KEEPS && is_last) break;
        int64_t next = is_last ? t : t + 1;
        const float decay = is_last ? 1.0f : c.decay[next];
        const float *k = &c.k[t * c.padded], *next_k = &c.k[next * c.padded], *next_q = &c.q[next * c.padded];
        float* after = KEEPS ? decayed + n.block_size<N>() : decayed;
        found = {};
        for (int64_t i = 0; i < c.padded; i += PARTS)
            for (int j = 0; j < PARTS; ++j) {
                auto s = Columns<N>::of(decayed + (i + j) * WIDTH);
                s.add(k[i + j], update);
                s = s.times(decay);
                s.store_to(after + (i + j) * WIDTH);
                found.add(next_k[i + j], next_q[i + j], s, j);
            }
        decayed = after;
    }
}

// Copies a block of a memory (keys, values) into a padded one, or back.
template <int N>
void read_block(const Sizes& n, const float* from, int64_t first, float* to) {
    for (int64_t i = 0; i < n.keys; ++i)
        Columns<N>::of(from + i * n.values + first, n.values - first).store_to(to + i * N * LANES);
}

template <int N>
void write_block(const Sizes& n, const float* from, int64_t first, float* to) {
    for (int64_t i = 0; i < n.keys; ++i)
        Columns<N>::of(from + i * N * LANES).store_to(to + i * n.values + first, n.values - first);
}

// Runs `work(row, head)` for every head of every row. A head is one task, so the order of sums does not depend on the threads.
template <typename Work>
void for_each_head(const Sizes& n, const Work& work) {
    at::parallel_for(0, n.rows * n.heads, 1, [&](int64_t begin, int64_t end) {
        FlushDenormals scope;
        for (int64_t task = begin; task < end; ++task) work(task / n.heads, task % n.heads);
    });
}

// states: (rows, heads, chunks + 1, keys, values), before every chunk and after the last. The first of each head is given.
template <int N>
void forward(const Sizes& n, const Inputs& in, float* states, float* out) {
    for_each_head(n, [&](int64_t row, int64_t head) {
        Chunk c(n);
        int64_t size = n.keys * n.values;
        Buffer memory(n.blocks<N>() * n.block_size<N>());
        float* of_head = states + (row * n.heads + head) * (n.chunks() + 1) * size;
        for (int64_t b = 0; b < n.blocks<N>(); ++b) read_block<N>(n, of_head, b * N * LANES, &memory[b * n.block_size<N>()]);
        for (int64_t chunk = 0; chunk < n.chunks(); ++chunk) {
            c.read(n, in, row, head, chunk, chunk + 1);
            int64_t token = row * n.tokens + c.first;
            for (int64_t b = 0; b < n.blocks<N>(); ++b) {
                float* of_block = &memory[b * n.block_size<N>()];
                int64_t first = b * N * LANES, column = head * n.values + first;
                advance<N, false>(n, c, in.packed + token * n.channels() + 2 * n.heads * n.keys + column, n.values - first,
                                  of_block, out + token * n.heads * n.values + column, nullptr);
                write_block<N>(n, of_block, first, of_head + (chunk + 1) * size);
            }
        }
    });
}

struct Gradients {
    float *packed, *g, *beta;
};

// Gradients of a chunk's unit vectors, (tokens, padded keys), and scalars, summed over the blocks.
struct ChunkGradients {
    Buffer q, k;
    float g[CHUNK], beta[CHUNK];
    explicit ChunkGradients(const Sizes& n) : q(CHUNK * n.padded_keys()), k(CHUNK * n.padded_keys()) {}

    void clear() {
        std::fill(q.begin(), q.end(), 0.0f), std::fill(k.begin(), k.end(), 0.0f);
        std::fill(g, g + CHUNK, 0.0f), std::fill(beta, beta + CHUNK, 0.0f);
    }
};

// Takes the gradient of a block of the memory back through a chunk. One sweep ends a token and adds the gradient by the output of
// the token before.
template <int N>
NOINLINE void go_back(const Sizes& n, const Chunk& c, const Kept<N>& kept, int64_t n_columns, const float* dout, float* dmemory,
                      float* dvalues, ChunkGradients& d) {
    constexpr int WIDTH = N * LANES, PARTS = Sum<N>::PARTS;
    auto dout_of = [&](int64_t t) { return Columns<N>::of(dout + t * n.heads * n.values, n_columns); };
    // Adds the gradient by a token's output to a row, and the row's term of the gradient of the token's update to `sum`.
    auto add_output_gradient = [](Columns<N>& ds, float q, float k, const Columns<N>& dout_now, Sum<N>& sum, int64_t row) {
        ds.add(q, dout_now);
        sum.parts[row % PARTS].add(k, ds);
    };
    int64_t last = c.tokens - 1;
    Columns<N> dout_now = dout_of(last);
    Sum<N> sum;
    for (int64_t i = 0; i < c.padded; ++i) {
        auto ds = Columns<N>::of(dmemory + i * WIDTH);
        add_output_gradient(ds, c.q[last * c.padded + i], c.k[last * c.padded + i], dout_now, sum, i);
        ds.store_to(dmemory + i * WIDTH);
    }
    for (int64_t t = last; t >= 0; --t) {
        const float *k = &c.k[t * c.padded], *decayed = &kept.decayed[t * n.block_size<N>()];
        auto update = Columns<N>::of(&kept.update[t * WIDTH]);
        Columns<N> dupdate = sum.total(), along_error, along_out;
        along_error.add(dupdate, Columns<N>::of(&kept.error[t * WIDTH]));
        along_out.add(update, dout_now);
        Columns<N> dvalue = dupdate.times(c.beta[t]), minus_dvalue = dvalue.times(-1.0f);
        dvalue.store_to(dvalues + t * n.channels(), n_columns);
        d.beta[t] += horizontal_sum(along_error.folded());
        float of_update = horizontal_sum(along_out.folded());
        // At the first token there is none before: nothing is added to the gradient of the memory before the chunk.
        Columns<N> dout_before = t ? dout_of(t - 1) : Columns<N>{};
        const float *k_before = t ? k - c.padded : k, *q_before = &c.q[t ? (t - 1) * c.padded : 0];
        Vec along_decay{};
        sum = {};
        for (int64_t first = 0; first < c.padded; first += LANES) {
            Vec of_q[LANES], of_k[LANES];
            for (int j = 0; j < LANES; ++j) {
                int64_t i = first + j;
                auto s = Columns<N>::of(decayed + i * WIDTH), ds = Columns<N>::of(dmemory + i * WIDTH);
                Columns<N> dq, dk, of_decay;
                dq.add(s, dout_now);
                dk.add(ds, update);
                dk.add(s, minus_dvalue);
                ds.add(k[i], minus_dvalue);
                of_decay.add(ds, s);
                along_decay += of_decay.folded();
                ds = ds.times(c.decay[t]);
                add_output_gradient(ds, q_before[i], k_before[i], dout_before, sum, j);
                ds.store_to(dmemory + i * WIDTH);
                of_q[j] = dq.folded(), of_k[j] = dk.folded();
            }
            float *dq = &d.q[t * c.padded + first], *dk = &d.k[t * c.padded + first];
            store(dq, load(dq) + horizontal_sums(of_q) + of_update * load(k + first));
            store(dk, load(dk) + horizontal_sums(of_k));
        }
        d.g[t] += horizontal_sum(along_decay);
        dout_now = dout_before;
    }
}

// Gradient of a vector x by that of u = scale x / |x|, where scale^2 = 1 / share: (du - share u (u . du)) scale / |x|.
void unit_backward(const Sizes& n, const Chunk& c, const float* u, float* du, float by, float share, float* dx) {
    float along = share * c.dot(u, du);
    for (int64_t i = 0; i < c.padded; i += LANES)
        store(dx + i, n.keys - i, (load(du + i) - along * load(u + i)) * by);
}

template <int N>
void backward(const Sizes& n, const Inputs& in, const float* states, const float* dout, const float* dend, const Gradients& to,
              float* dinitial) {
    for_each_head(n, [&](int64_t row, int64_t head) {
        Chunk c(n);
        Kept<N> kept(n);
        ChunkGradients d(n);
        int64_t task = row * n.heads + head, size = n.keys * n.values;
        const float* of_head = states + task * (n.chunks() + 1) * size;
        Buffer memory(n.block_size<N>()), dmemory(n.blocks<N>() * n.block_size<N>());
        for (int64_t b = 0; b < n.blocks<N>(); ++b)
            read_block<N>(n, dend + task * size, b * N * LANES, &dmemory[b * n.block_size<N>()]);
        for (int64_t chunk = n.chunks() - 1; chunk >= 0; --chunk) {
            c.read(n, in, row, head, chunk, chunk - 1);
            d.clear();
            int64_t token = row * n.tokens + c.first;
            for (int64_t t = token - CHUNK; chunk > 0 && t < token; ++t)
                prefetch(dout + (t * n.heads + head) * n.values, n.values);
            float* of_chunk = to.packed + token * n.channels();
            for (int64_t b = 0; b < n.blocks<N>(); ++b) {
                int64_t first = b * N * LANES, column = head * n.values + first, value = 2 * n.heads * n.keys + column;
                read_block<N>(n, of_head + chunk * size, first, memory.data());
                advance<N, true>(n, c, in.packed + token * n.channels() + value, n.values - first, memory.data(), nullptr, &kept);
                go_back<N>(n, c, kept, n.values - first, dout + token * n.heads * n.values + column,
                           &dmemory[b * n.block_size<N>()], of_chunk + value, d);
            }
            for (int64_t t = 0; t < c.tokens; ++t) {
                float* dx = of_chunk + t * n.channels() + head * n.keys;
                int64_t at = t * c.padded;
                unit_backward(n, c, &c.q[at], &d.q[at], c.q_scale[t], static_cast<float>(n.keys), dx);
                unit_backward(n, c, &c.k[at], &d.k[at], c.k_scale[t], 1.0f, dx + n.heads * n.keys);
                to.g[(token + t) * n.heads + head] = d.g[t];
                to.beta[(token + t) * n.heads + head] = d.beta[t];
            }
        }
        for (int64_t b = 0; b < n.blocks<N>(); ++b)
            write_block<N>(n, &dmemory[b * n.block_size<N>()], b * N * LANES, dinitial + task * size);
    });
}

// Calls `work.operator()<N>()` for the number of vectors of a block, fewer if the values fill fewer.
template <typename Work>
void for_width(int64_t values, const Work& work) {
    if (values > 2 * LANES)
        work.template operator()<MOST_VECTORS>();
    else if (values > LANES)
        work.template operator()<2>();
    else
        work.template operator()<1>();
}

}  // namespace

extern "C" {
int lmu_gated_delta_rule_chunk() { return CHUNK; }

int lmu_gated_delta_rule_forward_float32(int64_t rows, int64_t tokens, int64_t heads, int64_t keys, int64_t values,
                                         const float* packed, const float* g, const float* beta, float* states, float* out) {
    Sizes n{rows, tokens, heads, keys, values};
    return error_code([&] { for_width(values, [&]<int N>() { forward<N>(n, Inputs{packed, g, beta}, states, out); }); });
}

int lmu_gated_delta_rule_backward_float32(int64_t rows, int64_t tokens, int64_t heads, int64_t keys, int64_t values,
                                          const float* packed, const float* g, const float* beta, const float* states,
                                          const float* dout, const float* dend, float* dpacked, float* dg, float* dbeta,
                                          float* dinitial) {
    Sizes n{rows, tokens, heads, keys, values};
    Gradients to{dpacked, dg, dbeta};
    return error_code([&] {
        for_width(values, [&]<int N>() { backward<N>(n, Inputs{packed, g, beta}, states, dout, dend, to, dinitial); });
    });
}
}
