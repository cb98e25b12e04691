// State space duality (arXiv 2405.21060, section 6) in chunks of small matrix products, forward and backward, in float32.
//
//     S_t = exp(dt_t A) S_(t-1) + dt_t B_t x_t^T,    y_t = S_t^T C_t + D x_t    for every head
//
// `packed` (rows, tokens, channels) has x of all heads, then B of all groups, then C; dt is (rows, tokens, heads), the rates A
// and the skips D are (heads). Heads of a group share B and C. With G_i the sum of log decays dt A up to token i of a chunk, of
// which L is the last one:
//
//     y = (decays * scores diag(dt) + D) x + e^G C S,    S' = e^(G_L) S + B^T (dt e^(G_L - G) x)
//
// where scores = C B^T and decays_ij = e^(G_i - G_j) for j <= i, else 0. A few heads go from chunk to chunk while their states
// are in the cache; plain torch writes and reads the states of all heads and chunks several times. The backward pass computes
// decays and scores again. Built and called by kernels/compiled.py for kernels/ssd.py.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "lanes.h"

namespace {

constexpr int64_t CHUNK = 32;  // tokens; the same number as CHUNK_TOKENS in kernels/ssd.py
constexpr int64_t MOST_HEADS = 4;  // of a task: they share scores, but more of them leave fewer tasks; as in kernels/ssd.py
static_assert(CHUNK % LANES == 0);
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE_ROWS = 8;  // by two vectors: the sums of a tile stay in registers
#else
constexpr int TILE_ROWS = 4;
#endif

struct Sizes {
    int64_t rows, tokens, heads, width, groups, d_state;
    int64_t channels() const { return heads * width + 2 * groups * d_state; }
    int64_t padded() const { return (width + LINE - 1) / LINE * LINE; }
    int64_t padded_state() const { return (d_state + LINE - 1) / LINE * LINE; }
    int64_t chunks() const { return (tokens + CHUNK - 1) / CHUNK; }
    int64_t group_heads() const { return heads / groups; }
    int64_t parts() const { return (group_heads() + MOST_HEADS - 1) / MOST_HEADS; }  // of the heads of a group
};

struct Inputs {
    const float *packed, *dt, *rates, *skips;
};

// The left matrix of a product, or its transpose: elements at + row * by_row + inner * by_inner.
struct Left {
    const float* at;
    int64_t by_row, by_inner;
};

enum Band { ALL, LOWER, UPPER };  // which elements of the left matrix are not 0

// What is added to a product: `factor` times a matrix of its size.
struct Addend {
    float factor;
    const float* at;
};

template <int R, int V>
void tile(Left a, int64_t first, int64_t last, const float* b, int64_t width, Addend addend, float* out) {
    Vec sum[R][V] = {};
    for (int64_t i = first; i < last; ++i) {
        Vec row[V];
        for (int v = 0; v < V; ++v) row[v] = load(b + i * width + v * LANES);
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) sum[r][v] += a.at[r * a.by_row + i * a.by_inner] * row[v];
    }
    // The addend comes last: it may be much larger than the terms of the product, which would be rounded one by one.
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) {
            int64_t at = r * width + v * LANES;
            store(out + at, addend.at ? sum[r][v] + addend.factor * load(addend.at + at) : sum[r][v]);
        }
}

// out <- a b + addend, for b (inner, width) and out (rows, width), where width fills whole vectors.
template <int V>
void multiply_columns(int64_t rows, int64_t inner, int64_t width, Left a, const float* b, float* out, Addend addend,
                      Band band) {
    for (int64_t r = 0; r < rows;) {
        int64_t n = rows - r < TILE_ROWS ? 1 : TILE_ROWS;
        int64_t first = band == UPPER ? r : 0, last = band == LOWER ? r + n : inner;
        Left from{a.at + r * a.by_row, a.by_row, a.by_inner};
        Addend to{addend.factor, addend.at ? addend.at + r * width : nullptr};
        if (n == 1)
            tile<1, V>(from, first, last, b, width, to, out + r * width);
        else
            tile<TILE_ROWS, V>(from, first, last, b, width, to, out + r * width);
        r += n;
    }
}

void multiply(int64_t rows, int64_t inner, int64_t width, Left a, const float* b, float* out, Addend addend = {},
              Band band = ALL) {
    for (int64_t column = 0; column < width;) {
        bool both = column + 2 * LANES <= width;
        Addend to{addend.factor, addend.at ? addend.at + column : nullptr};
        (both ? multiply_columns<2> : multiply_columns<1>)(rows, inner, width, a, b + column, out + column, to, band);
        column += both ? 2 * LANES : LANES;
    }
}

// (CHUNK, width) <- diag(factors) (CHUNK, width)
void scale_rows(const float* factors, int64_t width, float* matrix) {
    for (int64_t i = 0; i < CHUNK; ++i)
        for (int64_t p = i * width; p < (i + 1) * width; p += LANES) store(matrix + p, factors[i] * load(matrix + p));
}

// (rows, CHUNK) <- (rows, CHUNK) diag(factors)
void scale_columns(const float* factors, int64_t rows, float* matrix) {
    for (int64_t p = 0; p < rows * CHUNK; p += LANES) store(matrix + p, load(factors + p % CHUNK) * load(matrix + p));
}

// (rows, columns) -> (columns, rows).
void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) to[j * rows + i] = from[i * columns + j];
}

// For n that fills whole cache lines.
NOINLINE float dot(const float* a, const float* b, int64_t n) {
    constexpr int PARTS = LINE / LANES;
    Vec sums[PARTS] = {};
    for (int64_t i = 0; i < n; i += LINE)
        for (int part = 0; part < PARTS; ++part) sums[part] += load(a + i + part * LANES) * load(b + i + part * LANES);
    for (int part = 1; part < PARTS; ++part) sums[0] += sums[part];
    return horizontal_sum(sums[0]);
}

// The tokens of a chunk of a row.
struct Chunk {
    int64_t token, tokens;  // the first one, counted through all rows; how many
    Chunk(const Sizes& n, int64_t row, int64_t index)
        : token(row * n.tokens + index * CHUNK), tokens(std::min(CHUNK, n.tokens - index * CHUNK)) {}

    // Copies columns of these tokens to (CHUNK, padded), filled up with zeros.
    void read(const float* from, int64_t stride, int64_t width, int64_t padded, float* to) const {
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t i = 0; i < padded; i += LANES)
                store(to + t * padded + i, load(from + (token + t) * stride + i, width - i));
        std::fill(to + tokens * padded, to + CHUNK * padded, 0.0f);
    }
    void write(const float* from, int64_t padded, float* to, int64_t stride, int64_t width) const {
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t i = 0; i < padded; i += LANES)
                store(to + (token + t) * stride + i, width - i, load(from + t * padded + i));
    }
};

// B and C of a group and a chunk, (CHUNK, padded d_state), B transposed, and their products.
struct Maps {
    Buffer b, c, b_transposed, scores;

    explicit Maps(const Sizes& n)
        : b(CHUNK * n.padded_state()), c(b.size()), b_transposed(b.size()), scores(CHUNK * CHUNK) {}

    void read(const Sizes& n, const Inputs& in, int64_t group, const Chunk& chunk) {
        const float* from = in.packed + n.heads * n.width + group * n.d_state;
        int64_t padded = n.padded_state();
        chunk.read(from, n.channels(), n.d_state, padded, b.data());
        chunk.read(from + n.groups * n.d_state, n.channels(), n.d_state, padded, c.data());
        transpose(b.data(), CHUNK, padded, b_transposed.data());
        multiply(CHUNK, n.d_state, CHUNK, {c.data(), padded, 1}, b_transposed.data(), scores.data());
    }
};

// first, first + 1, ..
IVec counted_from(int64_t first) {
    IVec numbers{};
    for (int lane = 0; lane < LANES; ++lane) numbers[lane] = static_cast<int32_t>(first) + lane;
    return numbers;
}

// dt, G, e^G, e^(G_L - G), dt e^(G_L - G) and e^(G_L) of a head and a chunk. Tokens beyond the last one have dt = 0 and leave
// the state as it is. G is the sum of `total` and of `rest`, what float32 leaves out of it: after a token with a large step G
// is much larger than its differences.
struct Decays {
    alignas(64) float dt[CHUNK], total[CHUNK], rest[CHUNK], from_start[CHUNK], to_end[CHUNK], weight[CHUNK];
    float chunk_decay;

    void read(const Sizes& n, const Inputs& in, int64_t head, const Chunk& chunk) {
        double sums[CHUNK], sum = 0.0;
        for (int64_t t = 0; t < CHUNK; ++t) {
            dt[t] = t < chunk.tokens ? in.dt[(chunk.token + t) * n.heads + head] : 0.0f;
            sums[t] = sum += static_cast<double>(dt[t]) * in.rates[head];
        }
        for (int64_t t = 0; t < CHUNK; ++t) {
            total[t] = static_cast<float>(sums[t]);
            rest[t] = static_cast<float>(sums[t] - total[t]);
            to_end[t] = static_cast<float>(sum - sums[t]);
        }
        for (int64_t t = 0; t < CHUNK; t += LANES) {
            store(from_start + t, exp_negative(load(total + t)));
            store(to_end + t, exp_negative(load(to_end + t)));
            store(weight + t, load(dt + t) * load(to_end + t));
        }
        chunk_decay = from_start[CHUNK - 1];
    }

    // e^(G_i - G_j) for the tokens j from `first` on, a vector of them; 0 for those after i.
    Vec between(int64_t i, int64_t first) const {
        Vec difference = (total[i] - load(total + first)) + (rest[i] - load(rest + first));
        return counted_from(first) <= static_cast<int32_t>(i) ? exp_negative(difference) : Vec{};
    }
};

// Some heads of a group of a row: one task, so that the order of sums does not depend on the threads.
struct Task {
    int64_t row, group, part, first_head, last_head;
    Task(const Sizes& n, int64_t index)
        : row(index / (n.groups * n.parts())), group(index / n.parts() % n.groups), part(index % n.parts()),
          first_head(group * n.group_heads() + part * n.group_heads() / n.parts()),
          last_head(group * n.group_heads() + (part + 1) * n.group_heads() / n.parts()) {}
};

template <typename Work>
void for_each_task(const Sizes& n, const Work& work) {
    at::parallel_for(0, n.rows * n.groups * n.parts(), 1, [&](int64_t begin, int64_t end) {
        FlushDenormals scope;
        for (int64_t index = begin; index < end; ++index) work(Task(n, index));
    });
}

// states: (rows, heads, chunks + 1, d_state, padded), before every chunk and after the last. The first of each head is given.
void forward(const Sizes& n, const Inputs& in, float* states, float* out) {
    for_each_task(n, [&](const Task& task) {
        int64_t padded = n.padded(), size = n.d_state * padded, chunks = n.chunks();
        Maps maps(n);
        Decays d;
        Buffer x(CHUNK * padded), y(CHUNK * padded), mixing(CHUNK * CHUNK);  // whose upper part stays 0
        for (int64_t index = 0; index < chunks; ++index) {
            Chunk chunk(n, task.row, index);
            maps.read(n, in, task.group, chunk);
            for (int64_t head = task.first_head; head < task.last_head; ++head) {
                float* state = states + ((task.row * n.heads + head) * (chunks + 1) + index) * size;
                d.read(n, in, head, chunk);
                chunk.read(in.packed + head * n.width, n.channels(), n.width, padded, x.data());
                for (int64_t i = 0; i < CHUNK; ++i) {
                    for (int64_t j = 0; j <= i; j += LANES)
                        store(&mixing[i * CHUNK + j], d.between(i, j) * load(&maps.scores[i * CHUNK + j]) * load(d.dt + j));
                    mixing[i * CHUNK + i] += in.skips[head];
                }
                multiply(CHUNK, n.d_state, padded, {maps.c.data(), n.padded_state(), 1}, state, y.data());
                scale_rows(d.from_start, padded, y.data());
                multiply(CHUNK, CHUNK, padded, {mixing.data(), CHUNK, 1}, x.data(), y.data(), {1.0f, y.data()}, LOWER);
                chunk.write(y.data(), padded, out + head * n.width, n.heads * n.width, n.width);
                scale_rows(d.weight, padded, x.data());
                Left b{maps.b.data(), 1, n.padded_state()};
                multiply(n.d_state, CHUNK, padded, b, x.data(), state + size, {d.chunk_decay, state});
            }
        }
    });
}

struct Gradients {
    float* packed;  // of x only
    float* maps;    // (rows, tokens, parts, 2, groups, d_state): of B and C, by the heads of each part
    float *dt, *rates, *skips;  // those of rates and skips: (rows, heads)
    float* state;               // (rows, heads, d_state, padded): by the last state when it comes, by the first when it returns
};

// Gradients of B and C of a chunk, transposed, (d_state, CHUNK), and of their products, added up over the heads of a task.
struct MapGradients {
    Buffer b, c, scores;

    explicit MapGradients(const Sizes& n)
        : b(n.padded_state() * CHUNK), c(b.size()), scores(CHUNK * CHUNK), transposed(std::max(b.size(), scores.size())) {}

    void clear() {
        for (Buffer* part : {&b, &c, &scores}) std::fill(part->begin(), part->end(), 0.0f);
    }

    void write(const Sizes& n, const Maps& maps, const Task& task, const Chunk& chunk, float* to) {
        int64_t padded = n.padded_state(), stride = n.parts() * 2 * n.groups * n.d_state;
        to += (task.part * 2 * n.groups + task.group) * n.d_state;
        multiply(n.d_state, CHUNK, CHUNK, {maps.c.data(), 1, padded}, scores.data(), b.data(), {1.0f, b.data()});
        transpose(b.data(), padded, CHUNK, transposed.data());
        chunk.write(transposed.data(), padded, to, stride, n.d_state);
        transpose(scores.data(), CHUNK, CHUNK, transposed.data());
        multiply(n.d_state, CHUNK, CHUNK, {maps.b.data(), 1, padded}, transposed.data(), c.data(), {1.0f, c.data()});
        transpose(c.data(), padded, CHUNK, transposed.data());
        chunk.write(transposed.data(), padded, to + n.groups * n.d_state, stride, n.d_state);
    }

private:
    Buffer transposed;
};

// Gradients of log decays and of dt of a head and a chunk; `read` is by the log of e^G, of what tokens read from the state.
struct StepGradients {
    alignas(64) float log[CHUNK], dt[CHUNK], read[CHUNK];
};

// Writes the matrix of a chunk, decays * scores diag(dt), and takes its gradient back to scores, decays and dt.
//
// The decay from token j to token i has the log decays of the tokens t with j < t <= i. The rows i come from the last to the
// first: `later` has the gradients of the rows so far, of which token t = i takes those of the tokens before it. Differences of
// sums over rows and columns are the same, but what they leave of rounding would count as often as a large step of t.
void mixing_backward(const Decays& d, const float* scores, const float* dmixing, float* mixing, float* dscores,
                     StepGradients& to) {
    alignas(64) float later[CHUNK] = {};  // by dt_j, of the tokens after j
    for (int64_t i = CHUNK - 1; i >= 0; --i) {
        Vec moved{};
        for (int64_t j = 0; j <= i; j += LANES) {
            int64_t at = i * CHUNK + j;
            Vec decays = d.between(i, j), step = load(d.dt + j);
            Vec by_score = decays * load(dmixing + at), by_step = by_score * load(scores + at);
            store(mixing + at, decays * load(scores + at) * step);
            store(dscores + at, load(dscores + at) + by_score * step);
            if (i < j + LANES) to.dt[i] = by_step[i - j], by_step[i - j] = 0.0f;  // its own input, without a decay
            Vec by_later = load(later + j) + by_step;
            store(later + j, by_later);
            moved += counted_from(j) < static_cast<int32_t>(i) ? by_later * step : Vec{};
        }
        to.log[i] = horizontal_sum(moved);
    }
    for (int64_t j = 0; j < CHUNK; ++j) to.dt[j] += later[j];
}

void backward(const Sizes& n, const Inputs& in, const float* states, const float* dout, const Gradients& to) {
    for_each_task(n, [&](const Task& task) {
        int64_t padded = n.padded(), size = n.d_state * padded, chunks = n.chunks();
        Maps maps(n);
        MapGradients dmaps(n);
        Decays d;
        StepGradients dsteps;
        Buffer mixing(CHUNK * CHUNK), dmixing(CHUNK * CHUNK), dc_of_state(n.d_state * CHUNK), c_transposed(maps.c.size());
        Buffer x(CHUNK * padded), x_transposed(x.size()), dx(x.size()), dy(x.size()), dy_transposed(x.size());
        for (int64_t head = task.first_head; head < task.last_head; ++head)
            to.rates[task.row * n.heads + head] = to.skips[task.row * n.heads + head] = 0.0f;
        for (int64_t index = chunks - 1; index >= 0; --index) {
            Chunk chunk(n, task.row, index);
            maps.read(n, in, task.group, chunk);
            transpose(maps.c.data(), CHUNK, n.padded_state(), c_transposed.data());
            dmaps.clear();
            for (int64_t head = task.first_head; head < task.last_head; ++head) {
                int64_t of_row = task.row * n.heads + head;
                const float* state = states + (of_row * (chunks + 1) + index) * size;
                float* dstate = to.state + of_row * size;
                d.read(n, in, head, chunk);
                chunk.read(in.packed + head * n.width, n.channels(), n.width, padded, x.data());
                chunk.read(dout + head * n.width, n.heads * n.width, n.width, padded, dy.data());
                transpose(x.data(), CHUNK, padded, x_transposed.data());
                transpose(dy.data(), CHUNK, padded, dy_transposed.data());
                // Inside of the chunk.
                multiply(CHUNK, n.width, CHUNK, {dy.data(), padded, 1}, x_transposed.data(), dmixing.data());
                mixing_backward(d, maps.scores.data(), dmixing.data(), mixing.data(), dmaps.scores.data(), dsteps);
                float skip = 0.0f;
                for (int64_t i = 0; i < CHUNK; ++i) {
                    mixing[i * CHUNK + i] += in.skips[head];
                    skip += dmixing[i * CHUNK + i];
                }
                to.skips[of_row] += skip;
                // What the chunk adds to the state, and what decays of it.
                multiply(CHUNK, n.d_state, padded, {maps.b.data(), n.padded_state(), 1}, dstate, dx.data());
                float after = d.chunk_decay * dot(state, dstate, size);  // by the decays that token i takes part in
                for (int64_t i = 0; i < CHUNK; ++i) {
                    float along = dot(&x[i * padded], &dx[i * padded], padded);
                    dsteps.log[i] += after;
                    after += d.weight[i] * along;
                    dsteps.dt[i] += d.to_end[i] * along;
                }
                scale_rows(d.weight, padded, dx.data());
                multiply(CHUNK, CHUNK, padded, {mixing.data(), 1, CHUNK}, dy.data(), dx.data(), {1.0f, dx.data()}, UPPER);
                chunk.write(dx.data(), padded, to.packed + head * n.width, n.channels(), n.width);
                scale_columns(d.weight, n.width, x_transposed.data());
                float* db = dmaps.b.data();
                multiply(n.d_state, n.width, CHUNK, {dstate, padded, 1}, x_transposed.data(), db, {1.0f, db});
                // What tokens read from the state before the chunk.
                scale_columns(d.from_start, n.width, dy_transposed.data());
                multiply(n.d_state, n.width, CHUNK, {state, padded, 1}, dy_transposed.data(), dc_of_state.data());
                for (int64_t j = 0; j < CHUNK; j += LANES) {
                    Vec along{};
                    for (int64_t i = j; i < n.d_state * CHUNK; i += CHUNK) {
                        Vec of_c = load(&dc_of_state[i]);
                        along += of_c * load(&c_transposed[i]);
                        store(&dmaps.c[i], load(&dmaps.c[i]) + of_c);
                    }
                    store(dsteps.read + j, along);
                }
                scale_rows(d.from_start, padded, dy.data());
                Left c{maps.c.data(), 1, n.padded_state()};
                multiply(n.d_state, CHUNK, padded, c, dy.data(), dstate, {d.chunk_decay, dstate});
                // From the log decays to steps and rates.
                float rate = 0.0f, read = 0.0f;
                for (int64_t i = CHUNK - 1; i >= 0; --i) {
                    read += dsteps.read[i];
                    float log = dsteps.log[i] + read;
                    rate += log * d.dt[i];
                    if (i < chunk.tokens) to.dt[(chunk.token + i) * n.heads + head] = dsteps.dt[i] + log * in.rates[head];
                }
                to.rates[of_row] += rate;
            }
            dmaps.write(n, maps, task, chunk, to.maps);
        }
    });
}

}  // namespace

extern "C" {
int lmu_ssd_chunk() { return CHUNK; }
int lmu_ssd_most_heads() { return MOST_HEADS; }

int lmu_ssd_forward_float32(int64_t rows, int64_t tokens, int64_t heads, int64_t width, int64_t groups, int64_t d_state,
                            const float* packed, const float* dt, const float* rates, const float* skips, float* states,
                            float* out) {
    return error_code([&] {
        forward(Sizes{rows, tokens, heads, width, groups, d_state}, Inputs{packed, dt, rates, skips}, states, out);
    });
}

int lmu_ssd_backward_float32(int64_t rows, int64_t tokens, int64_t heads, int64_t width, int64_t groups, int64_t d_state,
                             const float* packed, const float* dt, const float* rates, const float* skips, const float* states,
                             const float* dout, float* dpacked, float* dmaps, float* ddt, float* drates, float* dskips,
                             float* dstate) {
    return error_code([&] {
        backward(Sizes{rows, tokens, heads, width, groups, d_state}, Inputs{packed, dt, rates, skips}, states, dout,
                 Gradients{dpacked, dmaps, ddt, drates, dskips, dstate});
    });
}
}
