// Attention over a paged KV pool, on one CPU core.
//
// Every row of queries is computed in the same order of operations, whatever other rows are in the batch and however
// many rows of its sequence a step has: a token computed as part of a prompt gets the same bits as one that was decoded.
// Keys are visited in tiles that begin at multiples of TILE, with a running softmax (Milakov and Gimelshein, 2018).

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

#ifdef __AVX512F__
constexpr int WIDTH = 16, COLUMNS = 4, KEYS = 4;  // as many as the registers hold
#else
constexpr int WIDTH = 8, COLUMNS = 2, KEYS = 2;
#endif
constexpr int TILE = 64;   // keys
constexpr int ROWS = 64;   // rows of queries that share the loads of a tile
constexpr int BLOCK = 4;   // rows that share loads into registers
constexpr int MOST = 256;  // of a head's numbers

typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

const float NOTHING = -std::numeric_limits<float>::infinity();

inline Vector load(const float* from) {
  Vector found;
  std::memcpy(&found, from, sizeof found);
  return found;
}

inline Vector load(const uint16_t* from) {  // bfloat16: the upper half of a float
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  Integers wide = __builtin_convertvector(halves, Integers) << 16;
  Vector found;
  std::memcpy(&found, &wide, sizeof found);
  return found;
}

inline void store(float* to, Vector value) { std::memcpy(to, &value, sizeof value); }

inline void store(uint16_t* to, Vector value) {  // rounded to the nearest, ties to even
  Integers bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Halves halves = __builtin_convertvector(bits, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));

inline float sum(Vector value) {
#ifdef __AVX512F__
  Eight eight = __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7) +
                __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  Eight eight = value;
#endif
  Four four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  four += __builtin_shufflevector(four, four, 2, 3, 0, 1);
  four += __builtin_shufflevector(four, four, 1, 0, 3, 2);
  return four[0];
}

// exp for arguments of at most 0, after Cephes' expf; 0 below -87.
inline Vector exponential(Vector x) {
  Vector floored = x < -87.0f ? Vector{} - 87.0f : x;
  Vector n = floored * 1.44269504088896341f;
  Integers whole = __builtin_convertvector(n - 0.5f, Integers);  // toward zero: n is at most 0
  n = __builtin_convertvector(whole, Vector);
  Vector r = floored - n * 0.693359375f + n * 2.12194440e-4f;
  Vector y = Vector{} + 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  Integers scale = (whole + 127) << 23;
  Vector power;
  std::memcpy(&power, &scale, sizeof power);
  return x < -87.0f ? Vector{} : y * power;
}

struct Work {
  alignas(64) float queries[ROWS * MOST];
  alignas(64) float scores[ROWS * TILE];
  alignas(64) float sums[ROWS * MOST];
  float highest[ROWS], total[ROWS];
  int64_t first[ROWS], last[ROWS];  // the keys that a row sees: first <= key <= last
};

// scores[m][t] = queries[m] . keys[t] for `rows` rows, a multiple of BLOCK.
template <class Number>
void multiply(Work& work, int rows, int size, const Number* const* keys) {
  for (int t = 0; t < TILE; t += KEYS)
    for (int m = 0; m < rows; m += BLOCK) {
      Vector found[BLOCK][KEYS] = {};
      for (int d = 0; d < size; d += WIDTH) {
        Vector key[KEYS];
        for (int j = 0; j < KEYS; j++) key[j] = load(keys[t + j] + d);
        for (int i = 0; i < BLOCK; i++) {
          Vector query = load(work.queries + (m + i) * MOST + d);
          for (int j = 0; j < KEYS; j++) found[i][j] += query * key[j];
        }
      }
      for (int i = 0; i < BLOCK; i++)
        for (int j = 0; j < KEYS; j++) work.scores[(m + i) * TILE + t + j] = sum(found[i][j]);
    }
}

// sums[m] += scores[m] . values for `rows` rows, a multiple of BLOCK.
template <class Number>
void accumulate(Work& work, int rows, int size, const Number* const* values) {
  for (int m = 0; m < rows; m += BLOCK)
    for (int d = 0; d < size; d += COLUMNS * WIDTH) {
      int columns = (size - d) / WIDTH < COLUMNS ? (size - d) / WIDTH : COLUMNS;
      Vector found[BLOCK][COLUMNS] = {};
      for (int i = 0; i < BLOCK; i++)
        for (int c = 0; c < columns; c++) found[i][c] = load(work.sums + (m + i) * MOST + d + c * WIDTH);
      if (columns == COLUMNS) {
        for (int t = 0; t < TILE; t++)
          for (int c = 0; c < COLUMNS; c++) {
            Vector value = load(values[t] + d + c * WIDTH);
            for (int i = 0; i < BLOCK; i++) found[i][c] += work.scores[(m + i) * TILE + t] * value;
          }
      } else {
        for (int t = 0; t < TILE; t++)
          for (int c = 0; c < columns; c++) {
            Vector value = load(values[t] + d + c * WIDTH);
            for (int i = 0; i < BLOCK; i++) found[i][c] += work.scores[(m + i) * TILE + t] * value;
          }
      }
      for (int i = 0; i < BLOCK; i++)
        for (int c = 0; c < columns; c++) store(work.sums + (m + i) * MOST + d + c * WIDTH, found[i][c]);
    }
}

// Turn a row's scores of the tile that begins at key `begin` into weights, and rescale what it has so far.
void weigh(Work& work, int m, int64_t begin, int value_size, float scale, float softcap) {
  float* row = work.scores + m * TILE;
  float highest = work.highest[m];
  for (int t = 0; t < TILE; t++) {
    float score = row[t] * scale;
    if (softcap > 0) score = softcap * std::tanh(score / softcap);
    int64_t key = begin + t;
    row[t] = key < work.first[m] || key > work.last[m] ? NOTHING : score;
    highest = row[t] > highest ? row[t] : highest;
  }
  if (highest == NOTHING) {
    std::memset(row, 0, TILE * sizeof(float));
    return;
  }
  Vector total = {};
  for (int t = 0; t < TILE; t += WIDTH) {
    Vector weights = exponential(load(row + t) - highest);
    store(row + t, weights);
    total += weights;
  }
  if (highest != work.highest[m]) {
    float factor = work.highest[m] == NOTHING ? 0.0f : exponential(Vector{} + (work.highest[m] - highest))[0];
    work.total[m] *= factor;
    for (int d = 0; d < value_size; d += WIDTH) {
      float* at = work.sums + m * MOST + d;
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
        std::memset(work.sums, 0, sizeof(float) * padded * MOST);
        for (int m = 0; m < padded; m++) {
          const int64_t token = (at + m) / groups;
          const int head = h * groups + (at + m) % groups;
          float* to = work.queries + m * MOST;
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
          const Number *key_of[TILE], *value_of[TILE];
          for (int t = 0; t < TILE; t++) {
            // What no row sees may be anything, even NaN, which no weight removes: another key stands there instead.
            int64_t key = begin + t < oldest ? oldest : begin + t > newest ? newest : begin + t;
            int64_t slot = int64_t(blocks[key / layer.block_size]) * layer.block_size + key % layer.block_size;
            key_of[t] = keys + slot * layer.slot + h * layer.head;
            value_of[t] = values + slot * layer.value_slot + h * layer.value_head;
          }
          multiply(work, padded, layer.size, key_of);
          for (int m = 0; m < padded; m++) weigh(work, m, begin, layer.value_size, layer.scale, layer.softcap);
          accumulate(work, padded, layer.value_size, value_of);
        }
        for (int m = 0; m < rows; m++) {
          const int64_t token = (at + m) / groups;
          const int head = h * groups + (at + m) % groups;
          Number* to = out + ((start + token) * layer.heads + head) * layer.value_size;
          for (int d = 0; d < layer.value_size; d += WIDTH)
            store(to + d, load(work.sums + m * MOST + d) / work.total[m]);
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
