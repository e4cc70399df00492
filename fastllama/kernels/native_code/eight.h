// Attention of three to eight query rows of one kv head where a vector holds eight numbers: one row in each lane, so that
// no sum is taken across a vector, and keys are multiplied as they lie.
//
// Legend: R query rows, D head dim, V = D / 8, p position in a block. Lane r of each vector is row r.
// The specification is torch.nn.functional.scaled_dot_product_attention in fp32.

#pragma once

#include "rows.h"

#if defined(FASTLLAMA_AVX2)
#define FASTLLAMA_EIGHT

namespace {

constexpr int kEight = 8;     // query rows, and positions whose sums are under way
constexpr int kMixedRows = 4;  // whose sums of two vectors are kept in registers

// What rows keep from block to block: maximum and sum of weights; `keep` is the factor for what was mixed before.
struct EightRows {
  f32v maximum = all(-std::numeric_limits<float>::max()), total = {};
  alignas(32) float keep[kEight];
  i32v visible = {};  // positions of the block that each row sees
  bool whole = false;

  void see(const int64_t* seen, int R, int64_t s, int count) {
    whole = true;
    for (int r = 0; r < kEight; ++r) {  // a lane without a row is as the last one
      visible[r] = (int)std::clamp<int64_t>(seen[std::min(r, R - 1)] - s, 0, count);
      whole &= visible[r] >= kBlock;
    }
  }

  // Turns scores [kBlock, 8] into weights.
  void weigh(float* scores, float scale) {
    const f32v least = all(-std::numeric_limits<float>::max());
    f32v top = maximum, factor = all(1.f);
#pragma GCC unroll 4
    for (int p = 0; p < kBlock; ++p) {
      f32v x = load(scores + kEight * p) * scale;
      if (!whole) x = visible > p ? x : least;
      store(scores + kEight * p, x);
      top = x > top ? x : top;
    }
    if (_mm256_movemask_ps(_mm256_cmp_ps((__m256)top, (__m256)maximum, _CMP_GT_OQ))) {
      factor = exp_of(maximum - top);
      total *= factor;
      maximum = top;
    }
    store(keep, factor);
#pragma GCC unroll 4
    for (int p = 0; p < kBlock; ++p) {
      f32v weights = exp_of(load(scores + kEight * p) - maximum);
      if (!whole) weights = visible > p ? weights : f32v{};
      total += weights;
      store(scores + kEight * p, weights);
    }
  }

  void leave(int R, const Partial& out) const {
    for (int r = 0; r < R; ++r) out.maximum[r] = maximum[r], out.total[r] = total[r];
  }
};

// Scores [kBlock, 8] of query [D, 8] against a block of keys [count, D], of which eight are widened at a time: more would not
// stay in the first cache.
template <typename T, int D>
inline void score_eight(const float* query, const T* keys, int count, Asking& asking, float* scores) {
  alignas(32) float wide[kEight * D] = {};
  for (int p = 0; p < count; p += kEight) {
    const float* eight = wide;
    const int numbers = std::min(kEight, count - p) * D;
    if constexpr (std::is_same_v<T, float>)
      if (numbers == kEight * D) eight = keys + p * D;
    if (eight == wide)
      for (int i = 0; i < numbers; i += kVector) store(wide + i, widened(keys + p * D + i));
    f32v totals[kEight] = {};
    for (int d = 0; d < D; d += 8) {
      asking.ask();
#pragma GCC unroll 2
      for (int e = d; e < d + 8; ++e) {
        const f32v row = load(query + kEight * e);
#pragma GCC unroll 8
        for (int i = 0; i < kEight; ++i) totals[i] += row * all(eight[i * D + e]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kEight; ++i) store(scores + (p + i) * kEight, totals[i]);
  }
}

// 16 numbers in two vectors. Of bf16 the first has 0 .. 3 and 8 .. 11: to interleave with zeros is faster than to widen.
template <typename T>
inline void take_two(const T* from, f32v& first, f32v& second) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    const __m256i sixteen = _mm256_loadu_si256((const __m256i*)from), zero = _mm256_setzero_si256();
    first = (f32v)_mm256_unpacklo_epi16(zero, sixteen), second = (f32v)_mm256_unpackhi_epi16(zero, sixteen);
  } else {
    first = widened(from), second = widened(from + kVector);
  }
  Wide<float>::keep(first), Wide<float>::keep(second);  // or the compiler would fold a load into each product
}

// Sums of 16 values, as `take_two` has them, in order.
template <typename T>
inline void put_two(const float* from, float* to) {
  __m256 first = _mm256_loadu_ps(from), second = _mm256_loadu_ps(from + kVector);
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    const __m256 low = _mm256_permute2f128_ps(first, second, 0x20);
    second = _mm256_permute2f128_ps(first, second, 0x31), first = low;
  }
  _mm256_storeu_ps(to, first), _mm256_storeu_ps(to + kVector, second);
}

// Adds 16 numbers of each value, weighted, to kMixedRows rows of `mixed` [8, D]. Not inlined: the compiler then keeps the sums
// in registers.
template <typename T, int D>
__attribute__((noinline)) void mix_rows(const float* weights, const T* values, int count, const float* keep, Asking& asking,
                                        float* mixed) {
  f32v totals[kMixedRows][2];
#pragma GCC unroll 4
  for (int r = 0; r < kMixedRows; ++r)
    for (int c = 0; c < 2; ++c) totals[r][c] = load(mixed + r * D + kVector * c) * all(keep[r]);
  for (int p = 0; p < count; p += 8) {
    asking.ask();
    for (int at = p; at < std::min(p + 8, count); ++at) {
      f32v first, second;
      take_two(values + at * D, first, second);
#pragma GCC unroll 4
      for (int r = 0; r < kMixedRows; ++r) {
        const f32v weight = all(weights[at * kEight + r]);
        totals[r][0] += first * weight, totals[r][1] += second * weight;
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kMixedRows; ++r)
    for (int c = 0; c < 2; ++c) store(mixed + r * D + kVector * c, totals[r][c]);
}

// Adds a block of values [count, D], weighted, to rows of `mixed` [8, D].
template <typename T, int D>
inline void mix_eight(const float* weights, const T* values, int count, const float* keep, int R, Asking& asking, float* mixed) {
  for (int r = 0; r < R; r += kMixedRows)
    for (int d = 0; d < D; d += 2 * kVector)
      mix_rows<T, D>(weights + r, values + d, count, keep + r, asking, mixed + r * D + d);
}

// Times that a block asks memory for what the next one needs.
inline int64_t asked(int64_t scored, int R, int D) {
  return kBlock / kEight * scored / 8 + (R + kMixedRows - 1) / kMixedRows * (D / (2 * kVector)) * (kBlock / 8);
}

// As `attend_rows` does. query: fp32 [R, D].
template <typename T, int V, typename Keys, typename Values>
void attend_eight(const float* query, float scale, const Keys& keys, const Values& values, int64_t begin, int64_t end,
                  const int64_t* seen, int R, const Partial& out) {
  constexpr int D = V * kVector;
  alignas(32) float turned[D * kEight] = {}, scores[kBlock * kEight], mixed[kEight * D] = {};
  for (int r = 0; r < R; ++r)
    for (int d = 0; d < D; ++d) turned[d * kEight + r] = query[r * D + d];
  EightRows running;
  for (int64_t s = begin; s < end; s += kBlock) {
    const int count = (int)std::min<int64_t>(kBlock, end - s);
    running.see(seen, R, s, count);
    const int64_t later = std::clamp<int64_t>(end - s - kBlock, 0, kBlock);
    Asking asking(keys.ahead(s + kBlock, end), values.ahead(s + kBlock, end), later, asked(D, R, D));
    score_eight<T, D>(turned, keys.block(s, count), count, asking, scores);
    running.weigh(scores, scale);
    mix_eight<T, D>(scores, values.block(s, count), count, running.keep, R, asking, mixed);
  }
  running.leave(R, out);
  for (int i = 0; i < R * D; i += 2 * kVector) put_two<T>(mixed + i, out.mixed + i);
}

}  // namespace

#endif
