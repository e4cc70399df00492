// Attention of the newest tokens to the cached ones, one kv head at a time.
//
// Legend: R query rows of one kv head (group x new tokens), D head dim, S cached positions, V = D / 16.
// The softmax is taken block by block with a running maximum (Milakov and Gimelshein 2018), in fp32.
// The specification is torch.nn.functional.scaled_dot_product_attention in fp32.

#pragma once

#include <cmath>
#include <limits>

#include "product.h"

namespace {

constexpr int kBlock = 64;  // positions whose scores are kept at once
constexpr int kRows = 4;    // query rows in a tile

inline f32x16 all(float value) { return f32x16{} + value; }

// What a task leaves: for each of its rows a maximum, a sum of weights and a weighted sum of values [D].
struct Partial {
  float* maximum;
  float* total;
  float* mixed;  // [R, D]
};

// Scores of up to kRows rows against `count` positions.
template <typename T, int V, int N>
inline void score(const float* query, const T* keys, int count, float* scores) {
  for (int p = 0; p < count; ++p) {
    f32x16 key[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) key[v] = Wide<T>::weight(keys + (int64_t)p * V * 16 + v * 16);
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r) {
      f32x16 total = key[0] * Wide<T>::stored(query + r * V * 16);
#pragma GCC unroll 16
      for (int v = 1; v < V; ++v) total += key[v] * Wide<T>::stored(query + r * V * 16 + v * 16);
      scores[r * kBlock + p] = sum(total);
    }
  }
}

// Adds the values of `count` positions, weighted, to up to kRows rows of `mixed`.
template <typename T, int V, int N>
inline void mix(const float* weights, const T* values, int count, const float* keep, float* mixed) {
  constexpr int kPart = V < 4 ? V : 4;  // vectors at a time: 4 rows of 4 fill half the registers
  for (int first = 0; first < V; first += kPart) {
    f32x16 total[N][kPart];
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kPart; ++v)
        total[r][v] = first + v < V ? Wide<T>::stored(mixed + (r * V + first + v) * 16) * all(keep[r]) : f32x16{};
    for (int p = 0; p < count; ++p) {
      f32x16 value[kPart];
#pragma GCC unroll 4
      for (int v = 0; v < kPart; ++v)
        value[v] = first + v < V ? Wide<T>::weight(values + ((int64_t)p * V + first + v) * 16) : f32x16{};
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kPart; ++v) total[r][v] += value[v] * all(weights[r * kBlock + p]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kPart; ++v)
        if (first + v < V) __builtin_memcpy(mixed + (r * V + first + v) * 16, &total[r][v], 64);
  }
}

// One kv head over positions begin .. end - 1. `seen[r]` positions are visible to row r; `query` [R, D] is scaled.
template <typename T, int V>
void attend(const float* query, const T* keys, const T* values, int64_t begin, int64_t end, const int64_t* seen, int R,
            Partial out) {
  constexpr int D = V * 16;
  std::fill(out.maximum, out.maximum + R, -std::numeric_limits<float>::max());
  std::fill(out.total, out.total + R, 0.f);
  std::fill(out.mixed, out.mixed + (int64_t)R * D, 0.f);
  alignas(64) float scores[kRows * kBlock];
  for (int64_t s = begin; s < end; s += kBlock) {
    const int count = (int)std::min<int64_t>(kBlock, end - s);
    for (int byte = 0; byte < count * D * (int)sizeof(T); byte += kLine) {
      __builtin_prefetch((const char*)(keys + (s + kBlock) * D) + byte);
      __builtin_prefetch((const char*)(values + (s + kBlock) * D) + byte);
    }
    for (int r0 = 0; r0 < R; r0 += kRows) {
      const int rows = std::min(kRows, R - r0);
      auto each = [&](auto n) {
        constexpr int N = decltype(n)::value;
        score<T, V, N>(query + r0 * D, keys + s * D, count, scores);
        float keep[N];
        for (int r = 0; r < N; ++r) {
          float* row = scores + r * kBlock;
          const int visible = (int)std::clamp<int64_t>(seen[r0 + r] - s, 0, count);
          float highest = out.maximum[r0 + r];
          for (int p = 0; p < visible; ++p) highest = std::max(highest, row[p]);
          float total = 0;
          for (int p = 0; p < visible; ++p) {
            row[p] = std::exp(row[p] - highest);
            total += row[p];
          }
          for (int p = visible; p < count; ++p) row[p] = 0;
          keep[r] = std::exp(out.maximum[r0 + r] - highest);
          out.total[r0 + r] = out.total[r0 + r] * keep[r] + total;
          out.maximum[r0 + r] = highest;
        }
        mix<T, V, N>(scores, values + s * D, count, keep, out.mixed + r0 * D);
      };
      switch (rows) {
        case 1: each(std::integral_constant<int, 1>{}); break;
        case 2: each(std::integral_constant<int, 2>{}); break;
        case 3: each(std::integral_constant<int, 3>{}); break;
        default: each(std::integral_constant<int, 4>{}); break;
      }
    }
  }
}

}  // namespace
