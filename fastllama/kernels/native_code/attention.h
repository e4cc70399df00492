// Attention of the newest tokens to the cached ones, one kv head at a time.
//
// Legend: R query rows of one kv head (group x new tokens), D head dim, S cached positions, V = D / kVector.
// The softmax is taken block by block with a running maximum (Milakov and Gimelshein 2018), in fp32.
// The specification is torch.nn.functional.scaled_dot_product_attention in fp32.

#pragma once

#include <cmath>
#include <limits>

#include "strips.h"

namespace {

constexpr int kRows = 4;    // query rows in a tile
constexpr int64_t kShares = 64;  // parts that one kv head's positions may be cut into

constexpr int kMostDims = 128;

// Calls work with V as a constant, for the head dims that are built.
template <typename Work>
void for_head_dim(int64_t D, const Work& work) {
  switch (D) {
    case 16: return work(std::integral_constant<int, 16 / kVector>{});
    case 32: return work(std::integral_constant<int, 32 / kVector>{});
    case 64: return work(std::integral_constant<int, 64 / kVector>{});
    case 96: return work(std::integral_constant<int, 96 / kVector>{});
    case 128: return work(std::integral_constant<int, 128 / kVector>{});
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
  static constexpr bool kLies = true;
  const T* numbers;  // [S, D]

  const T* block(int64_t s, int) const { return numbers + s * V * kVector; }
  Ahead ahead(int64_t s, int64_t end) const {
    if (s >= end) return {};
    return {(const char*)block(s, 0), V * kVector * sizeof(T)};
  }
};

// How scores are multiplied: in pairs where the head dim is whole steps of them.
template <typename T, int V>
using Pairs = std::conditional_t<kInPairs<T> && V * kVector % 32 == 0, Lane<T>, Wide<T>>;

// Whether query rows of this head dim are rows of T, and not of fp32.
template <typename T>
bool in_pairs(int64_t D) {
  return kInPairs<T> && D % 32 == 0;
}

// Scores of N query rows against `count` positions, 4 at a time; the last key stands for those that are missing.
template <typename T, int V, int N>
inline void score(const typename Pairs<T, V>::Stored* query, const Strips<T>& keys, int count, const Next& next, float* scores) {
  using L = Pairs<T, V>;
  constexpr int D = V * kVector;
  for (int p = 0; p < count; p += 4) {
    f32v totals[N][4] = {};
    const int strip = p / kStripPositions, first = strip * kStripPositions;
    const T* four[4];
    for (int i = 0; i < 4; ++i) four[i] = keys.at[strip] + (int64_t)(std::min(p + i, count - 1) - first) * D;
    next.ask(p, p + 4);
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

// Turns a block of scores, of which the first `visible` count, into weights against a running maximum, and adds them to
// the lanes of a running total; returns the factor for what was mixed under the earlier maximum.
inline float weigh(float* row, float scale, int64_t visible, float& maximum, f32v& total) {
  if (visible <= 0) {
    std::fill(row, row + kBlock, 0.f);
    return 1;
  }
  if (visible < kBlock) std::fill(row + visible, row + kBlock, -std::numeric_limits<float>::max());
  f32v scores[kBlock / kVector], top = all(maximum);
#pragma GCC unroll 4
  for (int i = 0; i < kBlock / kVector; ++i) {
    scores[i] = Wide<float>::stored(row + kVector * i) * scale;
    top = scores[i] > top ? scores[i] : top;
  }
  float factor = 1;
  // Taking the maximum across a vector is slow, and after the first blocks it seldom moves.
  if (any_above(top, maximum)) {
    float highest = top[0];
    for (int lane = 1; lane < kVector; ++lane) highest = std::max(highest, top[lane]);
    factor = std::exp(maximum - highest);
    total *= all(factor);
    maximum = highest;
  }
#pragma GCC unroll 4
  for (int i = 0; i < kBlock / kVector; ++i) {
    const f32v weights = exp_of(scores[i] - maximum);
    total += weights;
    store(row + kVector * i, weights);
  }
  return factor;
}

// Adds the values of `count` positions, weighted, to up to kRows rows of `mixed`.
template <typename T, int V, int N>
inline void mix(const float* weights, const Strips<T>& values, int count, const Next& next, const float* keep, float* mixed) {
  constexpr int kPart = V < 4 ? V : 4;  // vectors at a time: 4 rows of 4 fill half the registers
  for (int first = 0; first < V; first += kPart) {
    f32v total[N][kPart];
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kPart; ++v)
        total[r][v] = first + v < V ? Wide<T>::stored(mixed + (r * V + first + v) * kVector) * all(keep[r]) : f32v{};
    for (int p = 0; p < count;) {
      const T* from = values.at[p / kStripPositions] + first * kVector;
      for (const int end = std::min(count, p + kStripPositions); p < end; ++p, from += V * kVector) {
        if (first == 0) next.ask(p, p + 1);
        f32v value[kPart];
#pragma GCC unroll 4
        for (int v = 0; v < kPart; ++v) value[v] = first + v < V ? Wide<T>::weight(from + v * kVector) : f32v{};
#pragma GCC unroll 4
        for (int r = 0; r < N; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < kPart; ++v) total[r][v] += value[v] * all(weights[r * kBlock + p]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kPart; ++v)
        if (first + v < V) store(mixed + (r * V + first + v) * kVector, total[r][v]);
  }
}

// One or two query rows of a kv head over positions begin .. end - 1. `seen[r]` positions are visible to row r; scores
// are times `scale`.
template <typename T, int V, int R, typename Keys, typename Values>
void attend(const typename Pairs<T, V>::Stored* query, float scale, const Keys& keys, const Values& values, int64_t begin,
            int64_t end, const int64_t* seen, const Partial& out) {
  constexpr int D = V * kVector;
  clear(out, R, D);
  alignas(64) float scores[R * kBlock];
  f32v totals[R] = {};
  const Order order(Keys::kLies && Values::kLies && reads_in_parts(), begin, end, seen, R);
  for (int64_t b = 0; b < order.blocks(); ++b) {
    const int count = order.count(b);
    score<T, V, R>(query, strips_of<T, D>(keys, order, b), count, Next(keys, order, b + 1), scores);
    float keep[R];
    for (int r = 0; r < R; ++r)
      keep[r] = weigh(scores + r * kBlock, scale, order.visible(b, seen[r]), out.maximum[r], totals[r]);
    mix<T, V, R>(scores, strips_of<T, D>(values, order, b), count, Next(values, order, b + 1), keep, out.mixed);
  }
  for (int r = 0; r < R; ++r) out.total[r] = sum(totals[r]);
}

// A row's shares joined, of which `first` is the first row and each next one `apart` rows later: calls emit(d, values) for each
// vector.
template <typename Emit>
inline void join(const Partial& all, int64_t first, int64_t apart, int64_t shares, int64_t D, const Emit& emit) {
  float highest = -std::numeric_limits<float>::max(), total = 0;
  for (int64_t c = 0; c < shares; ++c) highest = std::max(highest, all.maximum[first + c * apart]);
  float weight[kShares];
  for (int64_t c = 0; c < shares; ++c) {
    weight[c] = std::exp(all.maximum[first + c * apart] - highest);
    total += weight[c] * all.total[first + c * apart];
  }
  for (int64_t d = 0; d < D; d += kVector) {
    f32v values = {};
    for (int64_t c = 0; c < shares; ++c) values += weight[c] * load(all.mixed + (first + c * apart) * D + d);
    emit(d, values / total);
  }
}

}  // namespace
