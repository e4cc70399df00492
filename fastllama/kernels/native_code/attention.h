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

// Asks memory for numbers that the next block needs, a little at a time: so it never waits, and neither do we.
template <typename T>
inline void ask_for(const T* first, int count) {
  for (int64_t byte = 0; byte < count * (int64_t)sizeof(T); byte += kLine) __builtin_prefetch((const char*)first + byte);
}

// How scores are multiplied: in pairs where the head dim is whole steps of them.
template <typename T, int V>
using Pairs = std::conditional_t<V * 16 % Lane<T>::kStep == 0, Lane<T>, Wide<T>>;

// Scores of N query rows against `count` positions, 4 at a time; the last key stands for those that are missing.
template <typename T, int V, int N>
inline void score(const typename Pairs<T, V>::Stored* query, const T* keys, int count, bool ask, float* scores) {
  using L = Pairs<T, V>;
  constexpr int D = V * 16;
  for (int p = 0; p < count; p += 4) {
    f32x16 totals[4][4] = {};
    const T* four[4];
    for (int i = 0; i < 4; ++i) four[i] = keys + (int64_t)std::min(p + i, count - 1) * D;
    if (ask) ask_for(keys + (int64_t)(kBlock + p) * D, 4 * D);
#pragma GCC unroll 8
    for (int d = 0; d < D; d += L::kStep) {
      typename L::Register key[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) key[i] = L::weight(four[i] + d);
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r) {
        const auto row = L::stored(query + r * D + d);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) L::add(totals[r][i], key[i], row);
      }
    }
    alignas(64) float sums[16] = {};
    if constexpr (N == 4) {
      add_sums16(totals[0], sums, 4);
    } else {
      for (int r = 0; r < N; ++r) add_sums4(totals[r], sums + 4 * r);
    }
    for (int r = 0; r < N; ++r) __builtin_memcpy(scores + r * kBlock + p, sums + 4 * r, 16);
  }
}

// e^x for x <= 0, to 2 units in the last place: 2^n times a polynomial of the rest.
inline f32x16 exp_of(f32x16 x) {
#if defined(__AVX512F__)
  const __m512 scaled = _mm512_max_ps((__m512)(x * 1.44269504089f), _mm512_set1_ps(-127.f));
  const __m512 whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const f32x16 t = (f32x16)_mm512_sub_ps(scaled, whole);
  f32x16 y = all(1.5403530e-4f) * t + 1.3333558e-3f;
  y = y * t + 9.6181291e-3f;
  y = y * t + 5.5504109e-2f;
  y = y * t + 2.4022651e-1f;
  y = y * t + 6.9314718e-1f;
  y = y * t + 1.f;
  return (f32x16)_mm512_scalef_ps((__m512)y, whole);
#else
  for (int i = 0; i < 16; ++i) x[i] = std::exp(x[i]);
  return x;
#endif
}

// Turns a block of scores into weights against a running maximum and adds them to a running total; returns the factor
// for what was mixed under the earlier maximum.
inline float weigh(float* row, float scale, float& maximum, float& total) {
  f32x16 scores[kBlock / 16];
  float highest = maximum;
#pragma GCC unroll 4
  for (int i = 0; i < kBlock / 16; ++i) {
    scores[i] = Wide<float>::stored(row + 16 * i);
#if defined(__AVX512F__)
    highest = std::max(highest, _mm512_reduce_max_ps((__m512)(scores[i] * scale)));
#else
    for (int lane = 0; lane < 16; ++lane) highest = std::max(highest, scores[i][lane] * scale);
#endif
  }
  f32x16 sums = {};
#pragma GCC unroll 4
  for (int i = 0; i < kBlock / 16; ++i) {
    const f32x16 weights = exp_of(scores[i] * scale - highest);
    sums += weights;
    __builtin_memcpy(row + 16 * i, &weights, 64);
  }
  const float factor = std::exp(maximum - highest);
  total = total * factor + sum(sums);
  maximum = highest;
  return factor;
}

// Adds the values of `count` positions, weighted, to up to kRows rows of `mixed`.
template <typename T, int V, int N>
inline void mix(const float* weights, const T* values, int count, bool ask, const float* keep, float* mixed) {
  constexpr int kPart = V < 4 ? V : 4;  // vectors at a time: 4 rows of 4 fill half the registers
  for (int first = 0; first < V; first += kPart) {
    f32x16 total[N][kPart];
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kPart; ++v)
        total[r][v] = first + v < V ? Wide<T>::stored(mixed + (r * V + first + v) * 16) * all(keep[r]) : f32x16{};
    for (int p = 0; p < count; ++p) {
      if (ask) ask_for(values + ((int64_t)(kBlock + p) * V + first) * 16, kPart * 16);
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

#if defined(__AVX512BF16__)
// The same for pairs of positions in bf16: weights are rounded to it, sums are fp32. Within 8 numbers of a vector the
// interleaving keeps the order, so totals are kept as (numbers 0 to 3, numbers 4 to 7 of each 8) and put right at the end.
template <int V, int N>
inline void mix_pairs(const float* weights, const at::BFloat16* values, int count, bool ask, const float* keep,
                      float* mixed) {
  constexpr int D = V * 16;
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  const __m512i high = _mm512_setr_epi32(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  int pairs[N][kBlock / 2];
  for (int r = 0; r < N; ++r)
    for (int p = 0; p < kBlock; p += 32) {
      const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(weights + r * kBlock + p + 16),
                                                           _mm512_loadu_ps(weights + r * kBlock + p));
      _mm512_storeu_si512(pairs[r] + p / 2, rounded);
    }
  for (int d = 0; d < D; d += 32) {
    __m512 totals[N][2];
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r) {
      const __m512 a = _mm512_loadu_ps(mixed + r * D + d), b = _mm512_loadu_ps(mixed + r * D + d + 16);
      totals[r][0] = _mm512_mul_ps(_mm512_permutex2var_ps(a, low, b), _mm512_set1_ps(keep[r]));
      totals[r][1] = _mm512_mul_ps(_mm512_permutex2var_ps(a, high, b), _mm512_set1_ps(keep[r]));
    }
    for (int p = 0; p < count; p += 2) {
      if (ask) {
        ask_for(values + (int64_t)(kBlock + p) * D + d, 32);
        ask_for(values + (int64_t)(kBlock + p + 1) * D + d, 32);
      }
      const __m512i even = _mm512_loadu_si512(values + (int64_t)p * D + d);
      const __m512i odd = _mm512_loadu_si512(values + (int64_t)std::min(p + 1, count - 1) * D + d);
      const __m512bh left = (__m512bh)_mm512_unpacklo_epi16(even, odd), right = (__m512bh)_mm512_unpackhi_epi16(even, odd);
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r) {
        const __m512bh weight = (__m512bh)_mm512_set1_epi32(pairs[r][p / 2]);
        totals[r][0] = _mm512_dpbf16_ps(totals[r][0], left, weight);
        totals[r][1] = _mm512_dpbf16_ps(totals[r][1], right, weight);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r) {
      _mm512_storeu_ps(mixed + r * D + d, _mm512_permutex2var_ps(totals[r][0], first, totals[r][1]));
      _mm512_storeu_ps(mixed + r * D + d + 16, _mm512_permutex2var_ps(totals[r][0], second, totals[r][1]));
    }
  }
}
#endif

// One kv head over positions begin .. end - 1. `seen[r]` positions are visible to row r; scores are times `scale`.
template <typename T, int V>
void attend(const typename Pairs<T, V>::Stored* query, float scale, const T* keys, const T* values, int64_t begin,
            int64_t end, const int64_t* seen, int R, Partial out) {
  constexpr int D = V * 16;
  std::fill(out.maximum, out.maximum + R, -std::numeric_limits<float>::max());
  std::fill(out.total, out.total + R, 0.f);
  std::fill(out.mixed, out.mixed + (int64_t)R * D, 0.f);
  alignas(64) float scores[kRows * kBlock];
  for (int64_t s = begin; s < end; s += kBlock) {
    const int count = (int)std::min<int64_t>(kBlock, end - s);
    for (int r0 = 0; r0 < R; r0 += kRows) {
      const int rows = std::min(kRows, R - r0);
      auto each = [&](auto n) {
        constexpr int N = decltype(n)::value;
        score<T, V, N>(query + (int64_t)r0 * D, keys + s * D, count, r0 == 0, scores);
        float keep[N];
        for (int r = 0; r < N; ++r) {
          float* row = scores + r * kBlock;
          const int visible = (int)std::clamp<int64_t>(seen[r0 + r] - s, 0, count);
          keep[r] = 1;
          if (visible == 0) {
            std::fill(row, row + kBlock, 0.f);
            continue;
          }
          std::fill(row + visible, row + kBlock, -std::numeric_limits<float>::max());
          keep[r] = weigh(row, scale, out.maximum[r0 + r], out.total[r0 + r]);
        }
#if defined(__AVX512BF16__)
        if constexpr (std::is_same_v<T, at::BFloat16> && V % 2 == 0) {
          mix_pairs<V, N>(scores, values + s * D, count, r0 == 0, keep, out.mixed + r0 * D);
          return;
        }
#endif
        mix<T, V, N>(scores, values + s * D, count, r0 == 0, keep, out.mixed + r0 * D);
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
