// rows [n, inputs] times a weight [outputs, inputs] transposed, in float.
//
// Each output is one sum over the inputs in their order, whatever other rows there are and however the weight is kept.
// A packed weight is panels of WIDE outputs, and in a panel the weights of an input are next to each other.

#include <utility>

#include "vectors.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int COLUMNS = 4, BLOCK = 6;  // vectors of outputs and rows that share loads: as many as the registers hold
#else
constexpr int COLUMNS = 2, BLOCK = 6;
#endif
constexpr int64_t WIDE = COLUMNS * WIDTH;
constexpr int64_t NEAR = 192;   // rows that use a panel while it is in the cache
constexpr int64_t DEEP = 1024;  // inputs of a panel that stay in the cache
constexpr int64_t PAGE = 2 << 20;

// One of the steps that transpose a square: exchanges the lanes in which bit S is set.
template <int S, int... J>
inline void exchange(Vector& a, Vector& b, std::integer_sequence<int, J...>) {
  Vector low = __builtin_shufflevector(a, b, (J & S ? WIDTH + J - S : J)...);
  b = __builtin_shufflevector(a, b, (J & S ? WIDTH + J : J + S)...);
  a = low;
}

template <int S>
inline void transpose(Vector (&square)[WIDTH]) {
  for (int i = 0; i < WIDTH; i++)
    if (!(i & S)) exchange<S>(square[i], square[i + S], std::make_integer_sequence<int, WIDTH>());
  if constexpr (S > 1) transpose<S / 2>(square);
}

// Pack the panel that begins at `weight`, which has `outputs` rows.
void pack(const float* weight, float* panel, int64_t outputs, int64_t inputs) {
  for (int64_t k = 0; k < inputs; k += WIDTH)
    for (int64_t o = 0; o < WIDE; o += WIDTH) {
      const int64_t count = inputs - k < WIDTH ? inputs - k : WIDTH;
      Vector square[WIDTH] = {};
      for (int64_t i = 0; i < WIDTH && o + i < outputs; i++) {
        const float* from = weight + (o + i) * inputs + k;
        square[i] = count == WIDTH ? load(from) : load(from, count);
      }
      transpose<WIDTH / 2>(square);
      for (int64_t i = 0; i < count; i++) store(panel + (k + i) * WIDE + o, square[i]);
    }
}

// Ask for large pages where these numbers will be written.
void large_pages(float* at, int64_t count) {
#ifdef MADV_HUGEPAGE
  const uintptr_t begin = (uintptr_t(at) + PAGE - 1) / PAGE * PAGE, end = uintptr_t(at + count) / PAGE * PAGE;
  if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

struct Product {
  int64_t inputs, outputs, row;  // `row`: the distance of rows
};

// M rows times `count` inputs of a panel, added to what `out` has unless these are the first inputs.
template <int M>
void multiply(const Product& of, const float* rows, const float* panel, float* out, int64_t count, bool first,
              int64_t outputs) {
  Vector found[M][COLUMNS] = {};
  if (!first)
    for (int m = 0; m < M; m++)
      for (int c = 0; c < COLUMNS && c * WIDTH < outputs; c++) {
        const float* from = out + m * of.outputs + c * WIDTH;
        found[m][c] = (c + 1) * WIDTH <= outputs ? load(from) : load(from, outputs - c * WIDTH);
      }
  for (int64_t k = 0; k < count; k++) {
    Vector weights[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) weights[c] = held(load(panel + k * WIDE + c * WIDTH));
    for (int m = 0; m < M; m++) {
      const Vector number = held(Vector{} + rows[m * of.row + k]);
      for (int c = 0; c < COLUMNS; c++) found[m][c] += number * weights[c];
    }
  }
  for (int m = 0; m < M; m++)
    for (int c = 0; c < COLUMNS && c * WIDTH < outputs; c++) {
      float* to = out + m * of.outputs + c * WIDTH;
      if ((c + 1) * WIDTH <= outputs)
        store(to, found[m][c]);
      else
        store(to, found[m][c], outputs - c * WIDTH);
    }
}

// `count` rows times a panel.
void multiply(const Product& of, const float* rows, const float* panel, float* out, int64_t count, int64_t outputs) {
  for (int64_t k = 0; k < of.inputs; k += DEEP) {
    const int64_t deep = of.inputs - k < DEEP ? of.inputs - k : DEEP;
    for (int64_t m = 0; m < count; m += BLOCK) {
      const float *from = rows + m * of.row + k, *weights = panel + k * WIDE;
      float* to = out + m * of.outputs;
      switch (count - m) {
        case 1: multiply<1>(of, from, weights, to, deep, k == 0, outputs); break;
        case 2: multiply<2>(of, from, weights, to, deep, k == 0, outputs); break;
        case 3: multiply<3>(of, from, weights, to, deep, k == 0, outputs); break;
        case 4: multiply<4>(of, from, weights, to, deep, k == 0, outputs); break;
        case 5: multiply<5>(of, from, weights, to, deep, k == 0, outputs); break;
        default: multiply<BLOCK>(of, from, weights, to, deep, k == 0, outputs);
      }
    }
  }
}

}  // namespace

extern "C" {

int64_t pdctl_panel() { return WIDE; }

// `to`: room for whole panels.
void pdctl_pack(const float* weight, float* to, int64_t outputs, int64_t inputs) {
  // A weight is read from one end to the other in each step: a tenth faster with large pages.
  large_pages(to, (outputs + WIDE - 1) / WIDE * WIDE * inputs);
  for (int64_t o = 0; o < outputs; o += WIDE)
    pack(weight + o * inputs, to + o * inputs, outputs - o, inputs);
}

// `scratch`: room for a panel, if the weight is not packed; null if it is.
void pdctl_multiply(const float* rows, const float* weight, float* out, float* scratch, int64_t count, int64_t row,
                    int64_t inputs, int64_t outputs) {
  const Product of{inputs, outputs, row};
  // The C library may give it new pages in each step, which the kernel clears one by one: 28 of 235 ms for 33 MB.
  large_pages(out, count * outputs);
  for (int64_t r = 0; r < count; r += NEAR)
    for (int64_t o = 0; o < outputs; o += WIDE) {
      const float* panel = weight + o * inputs;
      if (scratch) pack(panel, scratch, outputs - o, inputs), panel = scratch;
      multiply(of, rows + r * row, panel, out + r * outputs + o, count - r < NEAR ? count - r : NEAR,
               outputs - o < WIDE ? outputs - o : WIDE);
    }
}
}
