// Vectors of floats of the machine's width, by the vector extensions that GCC and Clang share.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace raybsa {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kGroup = 4;  // floats a vector; vectors beside each other that a product keeps in registers
#elif defined(__AVX__)
constexpr int kWidth = 8, kGroup = 2;
#else
constexpr int kWidth = 4, kGroup = 4;
#endif
constexpr float kInf = std::numeric_limits<float>::infinity();

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t Ints __attribute__((vector_size(kWidth * 4)));

inline Vec load(const float* at) {
  Vec x;
  std::memcpy(&x, at, sizeof x);
  return x;
}

inline void store(float* at, Vec x) { std::memcpy(at, &x, sizeof x); }

inline Vec all(float x) { return Vec{} + x; }

// exp(x) for x up to about 0, to two units in the last place; 0 below -87, NaN for NaN. After Cephes' expf.
inline Vec exp_negative(Vec x) {
  const Vec whole = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, which its low bits then hold
  const Vec shifted = x * 1.44269504f + whole;
  const Vec n = shifted - whole;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec y = all(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const Ints power = ((Ints)shifted << 23) + (127 << 23);
  return x < -87.0f ? Vec{} : y * (Vec)power;
}

// Lanes of a and b in turn, beginning with lane `from` of each.
template <int from>
inline Vec in_turn(Vec a, Vec b) {
#if defined(__clang__)
  Vec out;
  for (int i = 0; i < kWidth; ++i) out[i] = i % 2 ? b[from + i / 2] : a[from + i / 2];
  return out;
#else
  Ints lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = from + i / 2 + i % 2 * kWidth;
  return __builtin_shuffle(a, b, lanes);
#endif
}

// Turns kWidth vectors into their transpose: each round deals the first and the second half out in turn.
inline void transpose(Vec* x) {
  Vec y[kWidth];
  for (int round = 1; round < kWidth; round *= 2) {
    for (int i = 0; i < kWidth / 2; ++i) {
      y[2 * i] = in_turn<0>(x[i], x[i + kWidth / 2]);
      y[2 * i + 1] = in_turn<kWidth / 2>(x[i], x[i + kWidth / 2]);
    }
    std::memcpy(x, y, sizeof y);
  }
}

}  // namespace raybsa
