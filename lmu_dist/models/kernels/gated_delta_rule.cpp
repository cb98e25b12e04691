// The gated delta rule (arXiv 2412.06464, eq. 10) token by token, forward and backward, in float32.
//
//     D = a_t S,    u = beta_t (v_t - D^T k_t),    S' = D + k_t u^T,    o_t = S'^T q_t,    a_t = exp(g_t)
//
// S is the memory (keys K, values V) of a head. q and k are divided by their 2-norms, and q by sqrt(K). `packed` (rows, tokens,
// channels) has the queries of all heads, then their keys, then their values; g and beta are (rows, tokens, heads). The columns of
// S do not meet: LINE of them at a time stay in the first cache, or in registers, for a whole chunk of tokens. What the backward
// pass needs of a chunk it computes again from the memory before the chunk, which the forward pass keeps. Built and called by
// kernels/compiled.py for mixers/gated_delta_rule, which computes the same in matrix products of plain torch.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "lanes.h"

namespace {

constexpr int64_t CHUNK = 16;            // tokens; the same number as CHUNK_TOKENS in kernels/gated_delta_rule.py
constexpr int N_VECTORS = LINE / LANES;  // of a block of columns
constexpr float NORM_EPS = 1e-6f;

struct Sizes {
    int64_t rows, tokens, heads, keys, values;
    int64_t channels() const { return heads * (2 * keys + values); }
    int64_t padded_keys() const { return (keys + LANES - 1) / LANES * LANES; }
    int64_t blocks() const { return (values + LINE - 1) / LINE; }
    int64_t chunks() const { return (tokens + CHUNK - 1) / CHUNK; }
    int64_t block_size() const { return padded_keys() * LINE; }  // of the memory
};

struct Inputs {
    const float *packed, *g, *beta;
};

// Columns of a block.
struct Columns {
    Vec v[N_VECTORS] = {};

    static Columns of(const float* from) {
        Columns c;
        for (int i = 0; i < N_VECTORS; ++i) c.v[i] = load(from + i * LANES);
        return c;
    }
    static Columns of(const float* from, int64_t n) {
        Columns c;
        for (int i = 0; i < N_VECTORS; ++i) c.v[i] = load(from + i * LANES, n - i * LANES);
        return c;
    }
    void store_to(float* to) const {
        for (int i = 0; i < N_VECTORS; ++i) store(to + i * LANES, v[i]);
    }
    void store_to(float* to, int64_t n) const {
        for (int i = 0; i < N_VECTORS; ++i) store(to + i * LANES, n - i * LANES, v[i]);
    }
    void add(const Columns& a, const Columns& b) {
        for (int i = 0; i < N_VECTORS; ++i) v[i] += a.v[i] * b.v[i];
    }
    void add(float a, const Columns& b) {
        for (int i = 0; i < N_VECTORS; ++i) v[i] += a * b.v[i];
    }
    Columns times(float a) const {
        Columns c;
        for (int i = 0; i < N_VECTORS; ++i) c.v[i] = a * v[i];
        return c;
    }
    // One vector whose lanes add up to the sum of all numbers.
    Vec folded() const {
        Vec sum = v[0];
        for (int i = 1; i < N_VECTORS; ++i) sum += v[i];
        return sum;
    }
};

// What a chunk of a head reads: unit vectors, (tokens, padded keys), and scalars.
struct Chunk {
    int64_t first, tokens, padded;
    std::vector<float> q, k;
    float q_scale[CHUNK], k_scale[CHUNK], decay[CHUNK], beta[CHUNK], qk[CHUNK];

    explicit Chunk(const Sizes& n) : padded(n.padded_keys()), q(CHUNK * padded), k(CHUNK * padded) {}

    void read(const Sizes& n, const Inputs& in, int64_t row, int64_t head, int64_t chunk) {
        first = chunk * CHUNK, tokens = std::min(CHUNK, n.tokens - first);
        for (int64_t t = 0; t < tokens; ++t) {
            int64_t token = row * n.tokens + first + t;
            const float* from = in.packed + token * n.channels() + head * n.keys;
            q_scale[t] = unit(n, from, &q[t * padded], 1.0f / std::sqrt(static_cast<float>(n.keys)));
            k_scale[t] = unit(n, from + n.heads * n.keys, &k[t * padded], 1.0f);
            decay[t] = std::exp(in.g[token * n.heads + head]);
            beta[t] = in.beta[token * n.heads + head];
            qk[t] = dot(&q[t * padded], &k[t * padded]);
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
        for (int64_t i = 0; i < padded; i += LANES) store(to + i, load(to + i) * scale);
        return scale;
    }
};

// What the backward pass needs of the tokens of a chunk and a block: D, u, and v - D^T k.
struct Kept {
    std::vector<float> decayed, update, error;
    explicit Kept(const Sizes& n) : decayed(CHUNK * n.block_size()), update(CHUNK * LINE), error(CHUNK * LINE) {}
};

// Takes the memory of a block through a chunk. `values` and `out` point to the first token's columns; `out` or `kept` may be null.
void advance(const Sizes& n, const Chunk& c, const float* values, int64_t n_columns, float* memory, float* out, Kept* kept) {
    for (int64_t t = 0; t < c.tokens; ++t) {
        const float *q = &c.q[t * c.padded], *k = &c.k[t * c.padded];
        Columns found[4], read[4];  // four sums each, so that additions need not wait for each other
        for (int64_t i = 0; i < c.padded; i += 4)
            for (int j = 0; j < 4; ++j) {
                Columns s = Columns::of(memory + (i + j) * LINE);
                found[j].add(k[i + j], s);
                read[j].add(q[i + j], s);
            }
        Columns value = Columns::of(values + t * n.channels(), n_columns), update, o;
        for (int i = 0; i < N_VECTORS; ++i) {
            value.v[i] -= c.decay[t] * ((found[0].v[i] + found[1].v[i]) + (found[2].v[i] + found[3].v[i]));
            update.v[i] = c.beta[t] * value.v[i];
            o.v[i] = c.decay[t] * ((read[0].v[i] + read[1].v[i]) + (read[2].v[i] + read[3].v[i])) + c.qk[t] * update.v[i];
        }
        if (out) o.store_to(out + t * n.heads * n.values, n_columns);
        float* decayed = kept ? &kept->decayed[t * n.block_size()] : nullptr;
        for (int64_t i = 0; i < c.padded; ++i) {
            Columns s = Columns::of(memory + i * LINE).times(c.decay[t]);
            if (kept) s.store_to(decayed + i * LINE);
            s.add(k[i], update);
            s.store_to(memory + i * LINE);
        }
        if (kept) {
            update.store_to(&kept->update[t * LINE]);
            value.store_to(&kept->error[t * LINE]);
        }
    }
}

// Copies a block of a memory (keys, values) into a padded one, or back.
void read_block(const Sizes& n, const float* from, int64_t block, float* to) {
    for (int64_t i = 0; i < n.keys; ++i)
        Columns::of(from + i * n.values + block * LINE, n.values - block * LINE).store_to(to + i * LINE);
}

void write_block(const Sizes& n, const float* from, int64_t block, float* to) {
    for (int64_t i = 0; i < n.keys; ++i)
        Columns::of(from + i * LINE).store_to(to + i * n.values + block * LINE, n.values - block * LINE);
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
void forward(const Sizes& n, const Inputs& in, float* states, float* out) {
    for_each_head(n, [&](int64_t row, int64_t head) {
        Chunk c(n);
        std::vector<float> memory(n.blocks() * n.block_size());
        float* of_head = states + (row * n.heads + head) * (n.chunks() + 1) * n.keys * n.values;
        for (int64_t b = 0; b < n.blocks(); ++b) read_block(n, of_head, b, &memory[b * n.block_size()]);
        for (int64_t chunk = 0; chunk < n.chunks(); ++chunk) {
            c.read(n, in, row, head, chunk);
            int64_t token = row * n.tokens + c.first;
            for (int64_t b = 0; b < n.blocks(); ++b) {
                float* of_block = &memory[b * n.block_size()];
                int64_t column = head * n.values + b * LINE;
                advance(n, c, in.packed + token * n.channels() + 2 * n.heads * n.keys + column, n.values - b * LINE, of_block,
                        out + token * n.heads * n.values + column, nullptr);
                write_block(n, of_block, b, of_head + (chunk + 1) * n.keys * n.values);
            }
        }
    });
}

struct Gradients {
    float *packed, *g, *beta;
};

// Gradients of a chunk's unit vectors, (tokens, padded keys), and scalars, summed over the blocks.
struct ChunkGradients {
    std::vector<float> q, k;
    float g[CHUNK], beta[CHUNK];
    explicit ChunkGradients(const Sizes& n) : q(CHUNK * n.padded_keys()), k(CHUNK * n.padded_keys()) {}

    void clear() {
        std::fill(q.begin(), q.end(), 0.0f), std::fill(k.begin(), k.end(), 0.0f);
        std::fill(g, g + CHUNK, 0.0f), std::fill(beta, beta + CHUNK, 0.0f);
    }
};

// Takes the gradient of a block of the memory back through a chunk.
void go_back(const Sizes& n, const Chunk& c, const Kept& kept, int64_t n_columns, const float* dout, float* dmemory,
             float* dvalues, ChunkGradients& d) {
    for (int64_t t = c.tokens - 1; t >= 0; --t) {
        const float *q = &c.q[t * c.padded], *k = &c.k[t * c.padded], *decayed = &kept.decayed[t * n.block_size()];
        Columns dread = Columns::of(dout + t * n.heads * n.values, n_columns), update = Columns::of(&kept.update[t * LINE]);
        Columns dupdate[2], along_error, along_out;
        for (int64_t i = 0; i < c.padded; ++i) {
            Columns ds = Columns::of(dmemory + i * LINE);
            ds.add(q[i], dread);
            ds.store_to(dmemory + i * LINE);
            dupdate[i % 2].add(k[i], ds);
        }
        for (int i = 0; i < N_VECTORS; ++i) dupdate[0].v[i] += dupdate[1].v[i];
        along_error.add(dupdate[0], Columns::of(&kept.error[t * LINE]));
        along_out.add(update, dread);
        Columns dvalue = dupdate[0].times(c.beta[t]), minus = dvalue.times(-1.0f), along_decay;
        dvalue.store_to(dvalues + t * n.channels(), n_columns);
        d.beta[t] += horizontal_sum(along_error.folded());
        float of_update = horizontal_sum(along_out.folded());
        for (int64_t first = 0; first < c.padded; first += LANES) {
            Vec of_q[LANES], of_k[LANES];
            for (int j = 0; j < LANES; ++j) {
                int64_t i = first + j;
                Columns s = Columns::of(decayed + i * LINE), ds = Columns::of(dmemory + i * LINE), dq, dk;
                dq.add(s, dread);
                dk.add(ds, update);
                dk.add(s, minus);
                ds.add(k[i], minus);
                along_decay.add(ds, s);
                ds.times(c.decay[t]).store_to(dmemory + i * LINE);
                of_q[j] = dq.folded(), of_k[j] = dk.folded();
            }
            float *dq = &d.q[t * c.padded + first], *dk = &d.k[t * c.padded + first];
            store(dq, load(dq) + horizontal_sums(of_q) + of_update * load(k + first));
            store(dk, load(dk) + horizontal_sums(of_k));
        }
        d.g[t] += horizontal_sum(along_decay.folded());
    }
}

// Gradient of a vector x by that of u = scale x / |x|, where scale^2 = 1 / share: (du - share u (u . du)) scale / |x|.
void unit_backward(const Sizes& n, const Chunk& c, const float* u, float* du, float by, float share, float* dx) {
    float along = share * c.dot(u, du);
    for (int64_t i = 0; i < c.padded; i += LANES)
        store(dx + i, n.keys - i, (load(du + i) - along * load(u + i)) * by);
}

void backward(const Sizes& n, const Inputs& in, const float* states, const float* dout, const float* dend, Gradients to,
              float* dinitial) {
    for_each_head(n, [&](int64_t row, int64_t head) {
        Chunk c(n);
        Kept kept(n);
        ChunkGradients d(n);
        int64_t task = row * n.heads + head, size = n.keys * n.values;
        const float* of_head = states + task * (n.chunks() + 1) * size;
        std::vector<float> memory(n.block_size()), dmemory(n.blocks() * n.block_size());
        for (int64_t b = 0; b < n.blocks(); ++b) read_block(n, dend + task * size, b, &dmemory[b * n.block_size()]);
        for (int64_t chunk = n.chunks() - 1; chunk >= 0; --chunk) {
            c.read(n, in, row, head, chunk);
            d.clear();
            int64_t token = row * n.tokens + c.first;
            float* of_chunk = to.packed + token * n.channels();
            for (int64_t b = 0; b < n.blocks(); ++b) {
                int64_t column = head * n.values + b * LINE, value = 2 * n.heads * n.keys + column, n_columns = n.values - b * LINE;
                read_block(n, of_head + chunk * size, b, memory.data());
                advance(n, c, in.packed + token * n.channels() + value, n_columns, memory.data(), nullptr, &kept);
                go_back(n, c, kept, n_columns, dout + token * n.heads * n.values + column, &dmemory[b * n.block_size()],
                        of_chunk + value, d);
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
        for (int64_t b = 0; b < n.blocks(); ++b) write_block(n, &dmemory[b * n.block_size()], b, dinitial + task * size);
    });
}

}  // namespace

extern "C" {
int lmu_gated_delta_rule_chunk() { return CHUNK; }

int lmu_gated_delta_rule_forward_float32(int64_t rows, int64_t tokens, int64_t heads, int64_t keys, int64_t values,
                                         const float* packed, const float* g, const float* beta, float* states, float* out) {
    return error_code([&] { forward(Sizes{rows, tokens, heads, keys, values}, Inputs{packed, g, beta}, states, out); });
}

int lmu_gated_delta_rule_backward_float32(int64_t rows, int64_t tokens, int64_t heads, int64_t keys, int64_t values,
                                          const float* packed, const float* g, const float* beta, const float* states,
                                          const float* dout, const float* dend, float* dpacked, float* dg, float* dbeta,
                                          float* dinitial) {
    return error_code([&] {
        backward(Sizes{rows, tokens, heads, keys, values}, Inputs{packed, g, beta}, states, dout, dend,
                 Gradients{dpacked, dg, dbeta}, dinitial);
    });
}
}
