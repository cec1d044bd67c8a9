// What models compute row by row between matrix products: norms, gates, rotations; KV to its slots; the largest logit.
//
// A row is computed in one order of operations, whatever other rows there are.

#include <cmath>

#include "vectors.h"

namespace {

// Call `work(at, count)` for each vector of `size` numbers. A whole one has a constant count, which makes it fast.
template <class Work>
inline void each(int64_t size, Work work) {
  int64_t at = 0;
  for (; at + WIDTH <= size; at += WIDTH) work(at, std::integral_constant<int64_t, WIDTH>());
  if (at < size) work(at, size - at);
}

template <class Number, class Count>
inline Vector part(const Number* from, Count count) {
  if constexpr (std::is_same_v<Count, int64_t>) return load(from, count);
  else return load(from);
}

template <class Number, class Count>
inline void put(Number* to, Vector value, Count count) {
  if constexpr (std::is_same_v<Count, int64_t>) store(to, value, count);
  else store(to, value);
}

inline Vector rounded(const float*, Vector value) { return value; }

inline Vector rounded(const uint16_t*, Vector value) {
  uint16_t numbers[WIDTH];
  store(numbers, value);
  return load(numbers);
}

// Rows of `size` numbers: `outer` times `inner` of them, at these strides.
struct Rows {
  int64_t outer, inner, size;
  int64_t from_outer, from_inner, to_outer, to_inner;
};

// x / sqrt(mean(x^2) + epsilon) * weight. `early`: the quotient is rounded to a Number before it is multiplied.
template <class Number>
void normalize(const Rows& rows, const Number* from, Number* to, const float* weight, float epsilon, int32_t early) {
  for (int64_t o = 0; o < rows.outer; o++)
    for (int64_t i = 0; i < rows.inner; i++) {
      const Number* x = from + o * rows.from_outer + i * rows.from_inner;
      Number* out = to + o * rows.to_outer + i * rows.to_inner;
      Vector squares[4] = {};
      each(rows.size, [&](int64_t at, auto count) {
        Vector value = part(x + at, count);
        squares[at / WIDTH % 4] += value * value;
      });
      float square = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
      const float factor = 1.0f / std::sqrt(square / rows.size + epsilon);
      each(rows.size, [&](int64_t at, auto count) {
        Vector value = part(x + at, count) * factor;
        if (early) value = rounded(x, value);
        put(out + at, value * part(weight + at, count), count);
      });
    }
}

// 1 / (1 + exp(-x))
inline Vector sigmoid(Vector x) {
  Vector power = exponential(x < 0.0f ? x : -x);
  return (x < 0.0f ? power : Vector{} + 1.0f) / (1.0f + power);
}

struct Silu {
  static Vector of(Vector x) { return x * sigmoid(x); }
};

struct Gelu {  // with tanh: 0.5 (1 + tanh(y)) is sigmoid(2y)
  static Vector of(Vector x) { return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x)); }
};

struct Relu {
  static Vector of(Vector x) { return x < 0.0f ? Vector{} : x; }
};

// Activation(gate) * up. `from_inner`: the distance from a row's gates to its other numbers.
template <class Activation, class Number>
void gate(const Rows& rows, const Number* gates, const Number* up, Number* to) {
  for (int64_t o = 0; o < rows.outer; o++) {
    const Number *x = gates + o * rows.from_outer, *y = up + o * rows.from_inner;
    Number* out = to + o * rows.to_outer;
    each(rows.size, [&](int64_t at, auto count) {
      put(out + at, Activation::of(part(x + at, count)) * part(y + at, count), count);
    });
  }
}

template <class Number>
void gate(const Rows& rows, const Number* gates, const Number* up, Number* to, int32_t kind) {
  switch (kind) {
    case 0: return gate<Silu>(rows, gates, up, to);
    case 1: return gate<Gelu>(rows, gates, up, to);
    case 2: return gate<Relu>(rows, gates, up, to);
  }
}

// x * cos + (-second half of x, first half of x) * sin. Inner rows share a row of cos and sin.
template <class Number>
void rotate(const Rows& rows, const Number* from, Number* to, const Number* cosines, const Number* sines,
            int64_t angle_row) {
  const int64_t half = rows.size / 2;
  for (int64_t o = 0; o < rows.outer; o++)
    for (int64_t i = 0; i < rows.inner; i++) {
      const Number* x = from + o * rows.from_outer + i * rows.from_inner;
      Number* out = to + o * rows.to_outer + i * rows.to_inner;
      const Number *cos = cosines + o * angle_row, *sin = sines + o * angle_row;
      each(half, [&](int64_t at, auto count) {
        Vector a = part(x + at, count), b = part(x + half + at, count);
        put(out + at, a * part(cos + at, count) - b * part(sin + at, count), count);
        put(out + half + at, b * part(cos + half + at, count) + a * part(sin + half + at, count), count);
      });
    }
}

// Copy outer row o to slot slots[o] of `count`. Returns the number of rows copied: fewer than all before a bad slot.
template <class Number>
int64_t place(const Rows& rows, const Number* from, Number* to, const int64_t* slots, int64_t count) {
  for (int64_t o = 0; o < rows.outer; o++) {
    if (slots[o] < 0 || slots[o] >= count) return o;
    for (int64_t i = 0; i < rows.inner; i++)
      std::memcpy(to + slots[o] * rows.to_outer + i * rows.to_inner,
                  from + o * rows.from_outer + i * rows.from_inner, rows.size * sizeof(Number));
  }
  return rows.outer;
}

// The index of each row's largest number, the first of several; -1 where a number is NaN.
template <class Number>
void largest(const Rows& rows, const Number* from, int64_t* found) {
  for (int64_t o = 0; o < rows.outer; o++) {
    const Number* x = from + o * rows.from_outer;
    // Blocks first: which one has it. Their maximum needs no indices.
    constexpr int64_t BLOCK = 64 * WIDTH;
    float most = NOTHING;
    int64_t block = 0;
    Integers wrong = {};
    for (int64_t begin = 0; begin < rows.size; begin += BLOCK) {
      const int64_t size = rows.size - begin < BLOCK ? rows.size - begin : BLOCK;
      Vector best[4] = {Vector{} + NOTHING, Vector{} + NOTHING, Vector{} + NOTHING, Vector{} + NOTHING};
      int64_t at = 0;
      for (; at + 4 * WIDTH <= size; at += 4 * WIDTH)
        for (int k = 0; k < 4; k++) {
          Vector value = load(x + begin + at + k * WIDTH);
          best[k] = value > best[k] ? value : best[k];
          wrong |= value != value;
        }
      float highest = NOTHING;
      for (; at < size; at++) {
        Vector value = Vector{} + load(x + begin + at, 1)[0];
        highest = value[0] > highest ? value[0] : highest;
        wrong |= value != value;
      }
      for (int k = 0; k < 4; k++)
        for (int t = 0; t < WIDTH; t++) highest = best[k][t] > highest ? best[k][t] : highest;
      if (highest > most) most = highest, block = begin;
    }
    int64_t at = block;
    while (at < rows.size - 1 && load(x + at, 1)[0] != most) at++;
    for (int t = 0; t < WIDTH; t++)
      if (wrong[t]) at = -1;
    found[o] = at;
  }
}

}  // namespace

#define ROWS                                                                                                \
  int64_t outer, int64_t inner, int64_t size, int64_t from_outer, int64_t from_inner, int64_t to_outer, \
      int64_t to_inner
#define GIVEN {outer, inner, size, from_outer, from_inner, to_outer, to_inner}

#define KERNELS(name, Number)                                                                                     \
  void pdctl_normalize_##name(const Number* from, Number* to, ROWS, const float* weight, float epsilon,           \
                              int32_t early) {                                                                    \
    normalize(GIVEN, from, to, weight, epsilon, early);                                                           \
  }                                                                                                               \
  void pdctl_gate_##name(const Number* from, Number* to, ROWS, const Number* up, int32_t kind) {                  \
    gate(GIVEN, from, up, to, kind);                                                                              \
  }                                                                                                               \
  void pdctl_rotate_##name(const Number* from, Number* to, ROWS, const Number* cosines, const Number* sines,      \
                           int64_t angle_row) {                                                                   \
    rotate(GIVEN, from, to, cosines, sines, angle_row);                                                           \
  }                                                                                                               \
  int64_t pdctl_place_##name(const Number* from, Number* to, ROWS, const int64_t* slots, int64_t count) {           \
    return place(GIVEN, from, to, slots, count);                                                                  \
  }                                                                                                               \
  void pdctl_largest_##name(const Number* from, int64_t* to, ROWS) { largest(GIVEN, from, to); }

extern "C" {
KERNELS(float, float)
KERNELS(bfloat16, uint16_t)
}
