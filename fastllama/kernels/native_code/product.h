// y = x W^T + b for few rows of x, at the speed at which memory gives W.
//
// Legend: M rows of x, N rows of W, K columns of both. W is read once, as it lies; x is small and stays in the cache.
// Sums are kept in fp32. The specification is torch.nn.functional.linear in fp32.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "unit_product.h"

namespace {

constexpr int64_t kShortRow = 2048;       // bytes of a row of W that several streams would not pay for

// A tile of R rows of W and all of x, in passes of at most Most rows of x.
template <int R, int Most, typename T>
void tiles(const Operand<T>& x, const T* w, int64_t k, int64_t count, float* sums) {
  const int64_t passes = (x.rows + Most - 1) / Most, steps = count / Lane<T>::kStep;
  int64_t m = 0;
  for (int64_t p = 0; p < passes; ++p) {
    const int64_t rows = (x.rows - m + passes - p - 1) / (passes - p);
    // Each pass over the tile asks for its share of the next one, so that memory never waits; where x takes more passes,
    // for want of registers, the first asks for all: what is asked for late was measured to come late.
    const int64_t first = kVector == 16 ? p * steps / passes : 0;
    const int64_t last = kVector == 16 ? (p + 1) * steps / passes : p == 0 ? steps : 0;
    auto run = [&](auto n) {
      tile<T, decltype(n)::value, R>(w + k, x.columns, x.at(m, k), x.stride, count, first * Lane<T>::kStep,
                                     last * Lane<T>::kStep, sums + m * kChunk);
    };
    with_number<Most>(rows, run);
    m += rows;
  }
}

// R rows of W at a time: adds the products of `rows` rows of W, over one block of columns; returns how many it took.
template <int R, int Most, typename T>
int64_t tiles_of(const Operand<T>& x, const T* w, int64_t rows, int64_t k, int64_t count, float* sums) {
  int64_t r = 0;
  for (; r + R <= rows; r += R) tiles<R, Most>(x, w + r * x.columns, k, count, sums + r);
  return r;
}

// Rows begin .. end - 1 of W: calls emit(m, n, y).
template <typename T, typename Emit>
void multiply(const Operand<T>& x, const Matrix<T>& matrix, int64_t begin, int64_t end, const Emit& emit) {
  using L = Lane<T>;
  const T* w = matrix.weight;
  auto biased = [&](float total, int64_t n) { return matrix.bias ? total + float(matrix.bias[n]) : total; };
  if (x.rows == 1) {
    int64_t n = begin;
    if (reads_in_streams()) {
      auto together = [&](auto rows, const auto& work) {
        constexpr int R = decltype(rows)::value;
        float y[R];
        for (; n + R <= end; n += R) {
          work(w + n * matrix.K, x.at(0, 0), matrix.K, y);
          for (int r = 0; r < R; ++r) emit(0, n + r, biased(y[r], n + r));
        }
      };
      if (matrix.K * (int64_t)sizeof(T) > kShortRow) together(std::integral_constant<int, kStreams>{}, dots<T>);
      else together(std::integral_constant<int, 4>{}, four_dots<T>);
    }
    for (; n < end; ++n) emit(0, n, biased(dot<T>(w + n * matrix.K, x.at(0, 0), matrix.K), n));
    return;
  }
#if defined(FASTLLAMA_UNIT)
  if constexpr (std::is_same_v<T, at::BFloat16>)
    if (x.rows >= kUnitRows && has_unit()) return multiply_in_unit(x, matrix, begin, end, emit);
#endif
  std::vector<float> sums(x.rows * kChunk);
  for (int64_t n = begin; n < end; n += kChunk) {
    const int64_t rows = std::min(kChunk, end - n);
    std::fill(sums.begin(), sums.end(), 0.f);
    for (int64_t k = 0; k < matrix.K; k += x.width) {
      const int64_t count = std::min(x.width, matrix.K - k);
      const T* from = w + n * matrix.K;
      int64_t r = x.rows <= L::kWide || (sizeof(T) == 2 && x.rows > 6) || L::kTall == L::kWide
                      ? tiles_of<kTile, L::kWide>(x, from, rows, k, count, sums.data())
                      : tiles_of<kTile / 2, L::kTall>(x, from, rows, k, count, sums.data());
      for (; r < rows; ++r)
        for (int64_t m = 0; m < x.rows; ++m)
          sums[m * kChunk + r] += dot<T>(w + (n + r) * matrix.K + k, x.at(m, k), count);
    }
    for (int64_t m = 0; m < x.rows; ++m)
      for (int64_t r = 0; r < rows; ++r) emit(m, n + r, biased(sums[m * kChunk + r], n + r));
  }
}

}  // namespace
