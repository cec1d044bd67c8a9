// Vectors of float as wide as the CPU's registers, over arrays of float or bfloat16.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace {

#ifdef __AVX512F__
constexpr int WIDTH = 16;
#else
constexpr int WIDTH = 8;
#endif

typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

const float NOTHING = -std::numeric_limits<float>::infinity();

inline Vector load(const float* from) {
  Vector found;
  std::memcpy(&found, from, sizeof found);
  return found;
}

// The value in a register: else compilers load it again for each of its uses.
inline Vector held(Vector value) {
#ifdef __AVX512F__
  asm("" : "+v"(value));
#elif defined(__AVX__)
  asm("" : "+x"(value));
#endif
  return value;
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

// The first `count` numbers of a vector; the others are 0.
template <class Number>
inline Vector load(const Number* from, int64_t count) {
  Number numbers[WIDTH] = {};
  std::memcpy(numbers, from, count * sizeof(Number));
  return load(numbers);
}

template <class Number>
inline void store(Number* to, Vector value, int64_t count) {
  Number numbers[WIDTH];
  store(numbers, value);
  std::memcpy(to, numbers, count * sizeof(Number));
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

}  // namespace
