// Small matrix products whose sums stay in registers: one operand is read number by number where it lies, the other as
// rows of vectors.

#pragma once

#include "vectors.h"

namespace raybsa {

constexpr int kRows = 6;  // rows of sums in registers

struct Left {  // a[m][n] = at[m * row + n * step]
  const float* at;
  int64_t row, step;
};

struct Right {  // b[n][lane] = at[n * row + lane]
  const float* at;
  int64_t row;
};

struct Sums {  // out[m][lane] = at[m * row + lane]
  float* at;
  int64_t row;
};

enum class To { kSet, kAdd, kScaleAndAdd };  // what becomes of the sums that were there

// out = a @ b, added or not, for M rows and G vectors of lanes; `factor` is a number for each lane.
template <To to, int M, int G>
inline void product(Left a, Right b, int depth, Sums out, const float* factor) {
  Vec sum[M][G];
  for (int m = 0; m < M; ++m)
    for (int g = 0; g < G; ++g) {
      sum[m][g] = to == To::kSet ? Vec{} : load(out.at + m * out.row + g * kWidth);
      if (to == To::kScaleAndAdd) sum[m][g] *= load(factor + g * kWidth);
    }
  for (int n = 0; n < depth; ++n) {
    Vec right[G];
    for (int g = 0; g < G; ++g) right[g] = load(b.at + n * b.row + g * kWidth);
    for (int m = 0; m < M; ++m) {
      const Vec left = all(a.at[m * a.row + n * a.step]);
      for (int g = 0; g < G; ++g) sum[m][g] += left * right[g];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int g = 0; g < G; ++g) store(out.at + m * out.row + g * kWidth, sum[m][g]);
}

template <To to, int G, int M>
inline void last_rows(Left a, Right b, int rows, int depth, Sums out, const float* factor) {
  if constexpr (M > 0) {
    if (rows == M) return product<to, M, G>(a, b, depth, out, factor);
    last_rows<to, G, M - 1>(a, b, rows, depth, out, factor);
  }
}

template <To to, int G>
void columns(Left a, Right b, int rows, int depth, Sums out, const float* factor) {
  for (; rows >= kRows; rows -= kRows) {
    product<to, kRows, G>(a, b, depth, out, factor);
    a.at += kRows * a.row;
    out.at += kRows * out.row;
  }
  last_rows<to, G, kRows - 1>(a, b, rows, depth, out, factor);
}

// The same for any number of rows and of lanes, the lanes a multiple of kWidth.
template <To to>
void matrix(Left a, Right b, int rows, int lanes, int depth, Sums out, const float* factor = nullptr) {
  int at = 0;
  const auto advance = [&](int by) {
    at += by, b.at += by, out.at += by, factor += factor ? by : 0;
  };
  for (; at + kGroup * kWidth <= lanes; advance(kGroup * kWidth)) columns<to, kGroup>(a, b, rows, depth, out, factor);
  for (; at < lanes; advance(kWidth)) columns<to, 1>(a, b, rows, depth, out, factor);
}

}  // namespace raybsa
