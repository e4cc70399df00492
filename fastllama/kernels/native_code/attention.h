// Attention of the newest tokens to the cached ones, one kv head at a time.
//
// Legend: R query rows of one kv head (group x new tokens), D head dim, S cached positions, V = D / 16.
// The softmax is taken block by block with a running maximum (Milakov and Gimelshein 2018), in fp32.
// The specification is torch.nn.functional.scaled_dot_product_attention in fp32.

#pragma once

#include <cmath>
#include <limits>

#include "attend.h"

namespace {

constexpr int kRows = 4;    // query rows in a tile
constexpr int64_t kShares = 64;  // parts that one kv head's positions may be cut into

inline f32x16 all(float value) { return f32x16{} + value; }

inline bool any_above(f32x16 v, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
#else
  bool found = false;
  for (int lane = 0; lane < 16; ++lane) found |= v[lane] > bound;
  return found;
#endif
}

constexpr int kMostDims = 128;

// Calls work with V as a constant, for the head dims that are built.
template <typename Work>
void for_head_dim(int64_t D, const Work& work) {
  switch (D) {
    case 16: return work(std::integral_constant<int, 1>{});
    case 32: return work(std::integral_constant<int, 2>{});
    case 64: return work(std::integral_constant<int, 4>{});
    case 96: return work(std::integral_constant<int, 6>{});
    case 128: return work(std::integral_constant<int, 8>{});
    default: TORCH_CHECK(false, "head dim ", D, " is not one of 16, 32, 64, 96, 128");
  }
}

inline void clear(const Partial& out, int64_t R, int64_t D) {
  std::fill(out.maximum, out.maximum + R, -std::numeric_limits<float>::max());
  std::fill(out.mixed, out.mixed + R * D, 0.f);
}

// Blocks of a cache of type T, as they lie.
template <typename T, int V>
struct Plain {
  const T* numbers;  // [S, D]

  const T* block(int64_t s, int) const { return numbers + s * V * 16; }
  Ahead ahead(int64_t s, int64_t end) const {
    if (s >= end) return {};
    return {(const char*)block(s, 0), V * 16 * sizeof(T)};
  }
};

// How scores are multiplied: in pairs where the head dim is whole steps of them.
template <typename T, int V>
using Pairs = std::conditional_t<V * 16 % Lane<T>::kStep == 0, Lane<T>, Wide<T>>;

// Whether query rows of this head dim are rows of T, and not of fp32.
template <typename T>
bool in_pairs(int64_t D) {
  return Lane<T>::kStep == 32 && D % 32 == 0;
}

// Scores of N query rows against `count` positions, 4 at a time; the last key stands for those that are missing.
template <typename T, int V, int N>
inline void score(const typename Pairs<T, V>::Stored* query, const T* keys, int count, const Ahead& ahead, float* scores) {
  using L = Pairs<T, V>;
  constexpr int D = V * 16;
  for (int p = 0; p < count; p += 4) {
    f32x16 totals[N][4] = {};
    const T* four[4];
    for (int i = 0; i < 4; ++i) four[i] = keys + (int64_t)std::min(p + i, count - 1) * D;
    if (ahead.at) ahead.ask(p * ahead.each, (p + 4) * ahead.each);
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
    float sums[N][4] = {};
    for (int r = 0; r < N; ++r) {
      add_sums4(totals[r], sums[r]);
      __builtin_memcpy(scores + r * kBlock + p, sums[r], 16);
    }
  }
}

// e^x for x <= 0, to 2 units in the last place: 2^n times a polynomial of the rest. What is no number stays so.
inline f32x16 exp_of(f32x16 x) {
#if defined(__AVX512F__)
  const __m512 scaled = _mm512_max_ps(_mm512_set1_ps(-127.f), (__m512)(x * 1.44269504089f));
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

// Turns a block of scores, of which the first `visible` count, into weights against a running maximum, and adds them to
// the lanes of a running total; returns the factor for what was mixed under the earlier maximum.
inline float weigh(float* row, float scale, int64_t visible, float& maximum, f32x16& total) {
  if (visible <= 0) {
    std::fill(row, row + kBlock, 0.f);
    return 1;
  }
  if (visible < kBlock) std::fill(row + visible, row + kBlock, -std::numeric_limits<float>::max());
  f32x16 scores[kBlock / 16], top = all(maximum);
#pragma GCC unroll 4
  for (int i = 0; i < kBlock / 16; ++i) {
    scores[i] = Wide<float>::stored(row + 16 * i) * scale;
    top = scores[i] > top ? scores[i] : top;
  }
  float factor = 1;
  // Taking the maximum across a vector is slow, and after the first blocks it seldom moves.
  if (any_above(top, maximum)) {
    float highest = top[0];
    for (int lane = 1; lane < 16; ++lane) highest = std::max(highest, top[lane]);
    factor = std::exp(maximum - highest);
    total *= all(factor);
    maximum = highest;
  }
#pragma GCC unroll 4
  for (int i = 0; i < kBlock / 16; ++i) {
    const f32x16 weights = exp_of(scores[i] - maximum);
    total += weights;
    __builtin_memcpy(row + 16 * i, &weights, 64);
  }
  return factor;
}

// Adds the values of `count` positions, weighted, to up to kRows rows of `mixed`.
template <typename T, int V, int N>
inline void mix(const float* weights, const T* values, int count, const Ahead& ahead, const float* keep, float* mixed) {
  constexpr int kPart = V < 4 ? V : 4;  // vectors at a time: 4 rows of 4 fill half the registers
  for (int first = 0; first < V; first += kPart) {
    f32x16 total[N][kPart];
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kPart; ++v)
        total[r][v] = first + v < V ? Wide<T>::stored(mixed + (r * V + first + v) * 16) * all(keep[r]) : f32x16{};
    for (int p = 0; p < count; ++p) {
      if (ahead.at && first == 0) ahead.ask(p * ahead.each, (p + 1) * ahead.each);
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

// One or two query rows of a kv head over positions begin .. end - 1. `seen[r]` positions are visible to row r; scores
// are times `scale`.
template <typename T, int V, int R, typename Keys, typename Values>
void attend(const typename Pairs<T, V>::Stored* query, float scale, const Keys& keys, const Values& values, int64_t begin,
            int64_t end, const int64_t* seen, const Partial& out) {
  constexpr int D = V * 16;
  clear(out, R, D);
  alignas(64) float scores[R * kBlock];
  f32x16 totals[R] = {};
  for (int64_t s = begin; s < end; s += kBlock) {
    const int count = (int)std::min<int64_t>(kBlock, end - s);
    score<T, V, R>(query, keys.block(s, count), count, keys.ahead(s + kBlock, end), scores);
    float keep[R];
    for (int r = 0; r < R; ++r)
      keep[r] = weigh(scores + r * kBlock, scale, std::min<int64_t>(count, seen[r] - s), out.maximum[r], totals[r]);
    mix<T, V, R>(scores, values.block(s, count), count, values.ahead(s + kBlock, end), keep, out.mixed);
  }
  for (int r = 0; r < R; ++r) out.total[r] = sum(totals[r]);
}

// A row's shares joined, of which `first` is the first row and each next one `apart` rows later: calls emit(d, value).
template <typename Emit>
inline void join(const Partial& all, int64_t first, int64_t apart, int64_t shares, int64_t D, const Emit& emit) {
  float highest = -std::numeric_limits<float>::max(), total = 0;
  for (int64_t c = 0; c < shares; ++c) highest = std::max(highest, all.maximum[first + c * apart]);
  float weight[kShares];
  for (int64_t c = 0; c < shares; ++c) {
    weight[c] = std::exp(all.maximum[first + c * apart] - highest);
    total += weight[c] * all.total[first + c * apart];
  }
  for (int64_t d = 0; d < D; ++d) {
    float value = 0;
    for (int64_t c = 0; c < shares; ++c) value += weight[c] * all.mixed[(first + c * apart) * D + d];
    emit(d, value / total);
  }
}

}  // namespace
