// Attention over a paged KV pool, on one CPU core.
//
// Every row of queries is computed in the same order of operations, whatever other rows are in the batch and however
// many rows of its sequence a step has: a token computed as part of a prompt gets the same bits as one that was decoded.
// Keys are visited in tiles that begin at multiples of TILE, with a running softmax (Milakov and Gimelshein, 2018).

#include "vectors.h"

namespace {

#ifdef __AVX512F__
constexpr int COLUMNS = 4, KEYS = 4;  // as many as the registers hold
#else
constexpr int COLUMNS = 2, KEYS = 2;
#endif
constexpr int TILE = 64;   // keys
constexpr int ROWS = 64;   // rows of queries that share the loads of a tile
constexpr int BLOCK = 4;   // rows that share loads into registers
constexpr int NEAR = 16;   // rows of queries that stay in the first cache beside a few keys
constexpr int MOST = 256;  // of a head's numbers
constexpr int STRIP = COLUMNS * WIDTH;
static_assert(BLOCK * KEYS == WIDTH);

struct Work {
  alignas(64) float queries[ROWS * MOST];  // rows of `size` numbers
  alignas(64) float scores[ROWS * TILE];
  alignas(64) float sums[ROWS * MOST];  // rows of `value_size` numbers
  alignas(64) float keys[TILE * MOST], values[TILE * STRIP];
  float highest[ROWS], total[ROWS];
  int64_t first[ROWS], last[ROWS];  // the keys that a row sees: first <= key <= last
};

// The sums of BLOCK x KEYS vectors, in one vector: those of the first row, then those of the next.
#ifdef __AVX512F__
inline Vector sums(const Vector (&of)[BLOCK][KEYS]) {
  Vector rows[BLOCK];
  for (int i = 0; i < BLOCK; i++) {
    const Vector* v = of[i];
    Vector a = __builtin_shufflevector(v[0], v[1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
               __builtin_shufflevector(v[0], v[1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    Vector b = __builtin_shufflevector(v[2], v[3], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
               __builtin_shufflevector(v[2], v[3], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    rows[i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
              __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  Vector halves[2];
  for (int i = 0; i < 2; i++) {
    Vector a = rows[2 * i], b = rows[2 * i + 1];
    halves[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  Vector a = halves[0], b = halves[1];
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
#else
inline Vector sums(const Vector (&of)[BLOCK][KEYS]) {
  Vector rows[BLOCK], pairs[2];
  for (int i = 0; i < BLOCK; i++)
    rows[i] = __builtin_shufflevector(of[i][0], of[i][1], 0, 8, 1, 9, 4, 12, 5, 13) +
              __builtin_shufflevector(of[i][0], of[i][1], 2, 10, 3, 11, 6, 14, 7, 15);
  for (int i = 0; i < 2; i++) {
    Vector a = rows[2 * i], b = rows[2 * i + 1];
    pairs[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return __builtin_shufflevector(pairs[0], pairs[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(pairs[0], pairs[1], 4, 5, 6, 7, 12, 13, 14, 15);
}
#endif

// TILE keys and their values. `from` and `to`: those that any row sees.
template <class Number>
struct alignas(64) Tile {
  const Number *keys[TILE], *values[TILE];
  int from, to;
};

// scores[m][t] = queries[m] . keys[t] for `rows` rows, a multiple of BLOCK. FETCH: the values are fetched meanwhile.
template <bool FETCH, class Number>
void multiply(Work& work, int rows, int size, const Tile<Number>& tile) {
  for (int near = 0; near < rows; near += NEAR)
    for (int t = tile.from; t < tile.to; t += KEYS)
      for (int m = near; m < rows && m < near + NEAR; m += BLOCK) {
        Vector found[BLOCK][KEYS] = {};
        const float* query = work.queries + m * size;
        for (int d = 0; d < size; d += WIDTH) {
          Vector key[KEYS];
          for (int j = 0; j < KEYS; j++) {
            key[j] = held(load(tile.keys[t + j] + d));
            if (FETCH) __builtin_prefetch(tile.values[t + j] + d);
          }
          for (int i = 0; i < BLOCK; i++) {
            Vector number = held(load(query + i * size + d));
            for (int j = 0; j < KEYS; j++) found[i][j] += number * key[j];
          }
        }
        const Vector products = sums(found);
        for (int i = 0; i < BLOCK; i++)
          std::memcpy(work.scores + (m + i) * TILE + t, (const float*)&products + i * KEYS, KEYS * sizeof(float));
      }
}

// The tile with its keys as floats, which many rows read.
template <class Number>
Tile<float> widened(Work& work, const Tile<Number>& tile, int size) {
  Tile<float> found;
  found.from = tile.from, found.to = tile.to;
  for (int t = tile.from; t < tile.to; t++) {
    float* to = work.keys + t * size;
    found.keys[t] = to;
    for (int d = 0; d < size; d += WIDTH) store(to + d, load(tile.keys[t] + d));
  }
  return found;
}

// sums[m][d ...] += scores[m] . values for N vectors of columns; `values(t)`: where those of key t are.
template <int N, class Values>
void accumulate(Work& work, int rows, int size, int d, int from, int to, Values values) {
  for (int m = 0; m < rows; m += BLOCK) {
    Vector found[BLOCK][N];
    float* sum = work.sums + m * size + d;
    for (int i = 0; i < BLOCK; i++)
      for (int c = 0; c < N; c++) found[i][c] = load(sum + i * size + c * WIDTH);
    for (int t = from; t < to; t++)
      for (int c = 0; c < N; c++) {
        Vector value = held(load(values(t) + c * WIDTH));
        for (int i = 0; i < BLOCK; i++) found[i][c] += work.scores[(m + i) * TILE + t] * value;
      }
    for (int i = 0; i < BLOCK; i++)
      for (int c = 0; c < N; c++) store(sum + i * size + c * WIDTH, found[i][c]);
  }
}

template <int N, class Number>
void accumulate(Work& work, int rows, int size, int d, const Tile<Number>& tile) {
  if (rows <= 2 * BLOCK)
    return accumulate<N>(work, rows, size, d, tile.from, tile.to, [&](int t) { return tile.values[t] + d; });
  // Many rows read them: next to each other the numbers stay in the first cache.
  for (int t = tile.from; t < tile.to; t++)
    for (int c = 0; c < N; c++) store(work.values + t * STRIP + c * WIDTH, load(tile.values[t] + d + c * WIDTH));
  accumulate<N>(work, rows, size, d, tile.from, tile.to, [&](int t) { return work.values + t * STRIP; });
}

// sums[m] += scores[m] . values for `rows` rows, a multiple of BLOCK.
template <class Number>
void accumulate(Work& work, int rows, int size, const Tile<Number>& tile) {
  int d = 0;
  for (; d + STRIP <= size; d += STRIP) accumulate<COLUMNS>(work, rows, size, d, tile);
  for (; d < size; d += WIDTH) accumulate<1>(work, rows, size, d, tile);
}

// tanh, for softcaps: an error of 1e-7 is nothing beside a logit's.
inline Vector hyperbolic(Vector x) {
  Vector power = exponential(x < 0.0f ? 2.0f * x : -2.0f * x);
  Vector found = (1.0f - power) / (1.0f + power);
  return x < 0.0f ? -found : found;
}

// Turn a row's scores of the tile that begins at key `begin` into weights, and rescale what it has so far.
void weigh(Work& work, int m, int64_t begin, int value_size, float scale, float softcap) {
  constexpr int PARTS = TILE / WIDTH;
  float* row = work.scores + m * TILE;
  const int first = work.first[m] < begin ? 0 : work.first[m] - begin < TILE ? work.first[m] - begin : TILE;
  const int last = work.last[m] < begin ? -1 : work.last[m] - begin < TILE ? work.last[m] - begin : TILE;
  Integers key;
  for (int t = 0; t < WIDTH; t++) key[t] = t;
  Vector scores[PARTS], most = Vector{} + NOTHING;
  for (int p = 0; p < PARTS; p++, key += WIDTH) {
    Vector score = load(row + p * WIDTH) * scale;
    if (softcap > 0) score = softcap * hyperbolic(score / softcap);
    scores[p] = (key < first) | (key > last) ? Vector{} + NOTHING : score;
    most = scores[p] > most ? scores[p] : most;
  }
  float highest = work.highest[m];
  for (int t = 0; t < WIDTH; t++) highest = most[t] > highest ? most[t] : highest;
  if (highest == NOTHING) {
    std::memset(row, 0, TILE * sizeof(float));
    return;
  }
  Vector total = {};
  for (int p = 0; p < PARTS; p++) {
    Vector weights = exponential(scores[p] - highest);
    store(row + p * WIDTH, weights);
    total += weights;
  }
  if (highest != work.highest[m]) {
    float factor = work.highest[m] == NOTHING ? 0.0f : exponential(Vector{} + (work.highest[m] - highest))[0];
    work.total[m] *= factor;
    for (int d = 0; d < value_size; d += WIDTH) {
      float* at = work.sums + m * value_size + d;
      store(at, load(at) * factor);
    }
    work.highest[m] = highest;
  }
  work.total[m] += sum(total);
}

struct Layer {
  int64_t query_row, query_head, slot, head, value_slot, value_head;  // strides, in numbers
  int32_t block_size, heads, kv_heads, size, value_size, window;      // window 0: all keys
  float scale, softcap;                                               // softcap 0: none
};

// Point at the keys and values of a tile. What no row sees may be anything, even NaN, which no weight removes: the
// nearest seen key stands there instead.
template <class Number>
void find(Tile<Number>& tile, const Layer& layer, const Number* keys, const Number* values, const int32_t* blocks,
          int64_t begin, int64_t oldest, int64_t newest) {
  int64_t block = -1, start = 0, end = 0;
  for (int t = tile.from; t < tile.to; t++) {
    const int64_t key = begin + t < oldest ? oldest : begin + t > newest ? newest : begin + t;
    if (key >= end) block = key / layer.block_size, start = block * layer.block_size, end = start + layer.block_size;
    const int64_t slot = int64_t(blocks[block]) * layer.block_size + key - start;
    tile.keys[t] = keys + slot * layer.slot;
    tile.values[t] = values + slot * layer.value_slot;
  }
}

template <class Number>
void attend(const Layer& layer, const Number* query, const Number* keys, const Number* values, Number* out,
            const float* sinks, int32_t sequences, const int32_t* starts, const int32_t* lengths,
            const int32_t* table, int64_t width) {
  thread_local Work work;
  const int groups = layer.heads / layer.kv_heads;
  for (int s = 0; s < sequences; s++) {
    const int64_t start = starts[s], count = starts[s + 1] - start, before = lengths[s] - count;
    const int32_t* blocks = table + s * width;
    for (int h = 0; h < layer.kv_heads; h++)
      for (int64_t at = 0; at < count * groups; at += ROWS) {
        const int rows = count * groups - at < ROWS ? count * groups - at : ROWS;
        const int padded = (rows + BLOCK - 1) / BLOCK * BLOCK;
        std::memset(work.sums, 0, sizeof(float) * padded * layer.value_size);
        for (int m = 0; m < padded; m++) {
          const int64_t token = (at + m) / groups;
          const int head = h * groups + (at + m) % groups;
          float* to = work.queries + m * layer.size;
          work.highest[m] = NOTHING, work.total[m] = 0;
          work.last[m] = before + token;
          work.first[m] = layer.window ? work.last[m] + 1 - layer.window : 0;
          if (m >= rows) {
            std::memset(to, 0, sizeof(float) * layer.size);
            work.first[m] = 1, work.last[m] = 0;
            continue;
          }
          if (sinks) work.highest[m] = sinks[head], work.total[m] = 1;
          const Number* from = query + (start + token) * layer.query_row + head * layer.query_head;
          for (int d = 0; d < layer.size; d += WIDTH) store(to + d, load(from + d));
        }
        const int64_t oldest = work.first[0] > 0 ? work.first[0] : 0, newest = work.last[rows - 1];
        for (int64_t begin = oldest / TILE * TILE; begin <= newest; begin += TILE) {
          Tile<Number> tile;
          tile.from = begin < oldest ? (oldest - begin) / KEYS * KEYS : 0;
          tile.to = newest - begin < TILE ? (newest - begin + KEYS) / KEYS * KEYS : TILE;
          find(tile, layer, keys + h * layer.head, values + h * layer.value_head, blocks, begin, oldest, newest);
          if (padded <= 2 * BLOCK)
            multiply<true>(work, padded, layer.size, tile);
          else if (sizeof(Number) == sizeof(float))
            multiply<false>(work, padded, layer.size, tile);
          else
            multiply<false>(work, padded, layer.size, widened(work, tile, layer.size));
          for (int m = 0; m < padded; m++) weigh(work, m, begin, layer.value_size, layer.scale, layer.softcap);
          accumulate(work, padded, layer.value_size, tile);
        }
        for (int m = 0; m < rows; m++) {
          const int64_t token = (at + m) / groups;
          const int head = h * groups + (at + m) % groups;
          Number* to = out + ((start + token) * layer.heads + head) * layer.value_size;
          for (int d = 0; d < layer.value_size; d += WIDTH)
            store(to + d, load(work.sums + m * layer.value_size + d) / work.total[m]);
        }
      }
  }
}

}  // namespace

extern "C" {

int32_t pdctl_width() { return WIDTH; }

void pdctl_attend_float(const Layer* layer, const float* query, const float* keys, const float* values, float* out,
                        const float* sinks, int32_t sequences, const int32_t* starts, const int32_t* lengths,
                        const int32_t* table, int64_t width) {
  attend(*layer, query, keys, values, out, sinks, sequences, starts, lengths, table, width);
}

void pdctl_attend_bfloat16(const Layer* layer, const uint16_t* query, const uint16_t* keys, const uint16_t* values,
                           uint16_t* out, const float* sinks, int32_t sequences, const int32_t* starts,
                           const int32_t* lengths, const int32_t* table, int64_t width) {
  attend(*layer, query, keys, values, out, sinks, sequences, starts, lengths, table, width);
}
}
