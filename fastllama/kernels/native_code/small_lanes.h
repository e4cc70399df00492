// Three to eight query rows of one kv head over a small cache, one row in each lane: lanes.h with the integers of
// small_rows.h.
//
// Legend: R query rows, N lanes that are mixed, D head dim, V = D / 16, G groups of a row with a scale of their own.
// The specification is torch.nn.functional.scaled_dot_product_attention in fp32 of fastllama.kernels.stored.expand.

#pragma once

#include "lanes.h"
#include "small_rows.h"

#if defined(FASTLLAMA_LANES) && defined(FASTLLAMA_SMALL_ROWS)

namespace {

// Pairs of 16-bit integers, summed in 32 bits. In assembly: of the intrinsic, gcc 12 copies each sum before it adds to it.
struct ShortPairs {
  using Sum = __m256i;
  using Wide = __m512i;
  static Sum add(Sum total, __m256i row, int key) {
    asm("vpdpwssd %2, %1, %0" : "+v"(total) : "v"(row), "v"(_mm256_set1_epi32(key)));
    return total;
  }
  static Wide add(Wide total, __m512i value, int weight) {
    asm("vpdpwssd %2, %1, %0" : "+v"(total) : "v"(value), "v"(_mm512_set1_epi32(weight)));
    return total;
  }
  static __m512i values(const int8_t* from) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from)); }
};

// Scores [kBlock, 8] of a block of keys, whose quants are widened to 16 bits in `wide` [kBlock, D].
template <int V, int G>
inline void score_small_lanes(const int32_t* query, __m256 query_scale, const float (*sums)[kLaneRows],
                              const SmallBlock& keys, int count, int16_t* wide, Asking& asking, float* scores) {
  constexpr int D = V * 16, kEach = D / 2 / G;
  for (int i = 0; i < count * D; i += 32) _mm512_store_si512(wide + i, ShortPairs::values(keys.quants + i));
#pragma GCC unroll 1
  for (int g = 0; g < G; ++g) {
    const __m256 sum = _mm256_load_ps(sums[g]);
    score_lanes<ShortPairs, kEach>(
        query + g * kEach * kLaneRows, (const char*)(wide + 2 * g * kEach), D * sizeof(int16_t), count, asking,
        [&](int p, __m256i total) __attribute__((always_inline)) {
          float* at = scores + p * kLaneRows;
          __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(total), _mm256_mul_ps(query_scale, _mm256_set1_ps(keys.scale[g][p])));
          if (keys.has_least) y = _mm256_fmadd_ps(sum, _mm256_set1_ps(keys.least[g][p]), y);
          if (g > 0) y = _mm256_add_ps(y, _mm256_load_ps(at));
          _mm256_store_ps(at, y);
        });
  }
}

// A position's number in the lower lanes and the next one's in the upper.
inline __m512 both(const float* two) {
  return _mm512_mask_broadcastss_ps(_mm512_set1_ps(two[0]), 0xFF00, _mm_load_ss(two + 1));
}

// Weights [kBlock, 8] times the scales of a block's values, as pairs of integers near weight * scale * factor.
inline void pair_integers(const float* weights, const float* scales, __m256 factor, int32_t* pairs) {
  const __m512 factors = twice(factor);
#pragma GCC unroll 4
  for (int i = 0; i < kBlock / 2; ++i) {
    const __m512 x = _mm512_mul_ps(_mm512_mul_ps(_mm512_load_ps(weights + 16 * i), both(scales + 2 * i)), factors);
    put_pairs(pairs + kLaneRows * i, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x)));
  }
}

// Even and odd positions together: the larger of both, or their sum.
inline __m256 folded(f32x16 x, bool largest) {
  const __m256 low = _mm512_castps512_ps256((__m512)x), high = _mm512_extractf32x8_ps((__m512)x, 1);
  return largest ? _mm256_max_ps(low, high) : _mm256_add_ps(low, high);
}

// Each row's weights [kBlock, 8] times a number of each position.
inline __m256 weighted_sum(const float* weights, const float* numbers) {
  f32x16 total = {};
  for (int i = 0; i < kBlock / 2; ++i) {
    total += lanes(weights + 16 * i) * (f32x16)both(numbers + 2 * i);
  }
  return folded(total, false);
}

// As `attend_rows` does, for N lanes: 4 or 8. query: fp32 [R, D].
template <int V, int N>
void attend_small_lanes(const float* query, float scale, const Run& keys, const Run& values, int64_t begin, int64_t end,
                        const int64_t* seen, int R, const Partial& out) {
  constexpr int D = V * 16, U = D / 2, kCalls = kBlock / kUnderWay * U + kBlock / 2 * V / 2;
  alignas(64) int32_t units[U * kLaneRows], pairs[kBlock / 2 * kLaneRows];
  alignas(64) int16_t wide[kBlock * D];
  alignas(64) float scores[kBlock * kLaneRows], mixed[N * D] = {};
  alignas(64) float query_scales[kLaneRows] = {}, sums[kMostGroups][kLaneRows] = {};
  thread_local SmallQuery<V> asked;
  asked.template take<false>(query, R);
  take_lanes<U>(asked.units.data(), R, units);
  for (int r = 0; r < R; ++r) {
    query_scales[r] = asked.scale[r];
    for (int g = 0; g < kMostGroups; ++g) sums[g][r] = asked.sums[r * kMostGroups + g];
  }
  const __m256 query_scale = _mm256_load_ps(query_scales);
  SmallBlock &key = own_blocks()[0], &value = own_blocks()[1];
  Running running;
  for (int64_t s = begin; s < end; s += kBlock) {
    const int count = (int)std::min<int64_t>(kBlock, end - s);
    int visible[kLaneRows];
    see(seen, R, s, count, visible);
    const int64_t later = std::clamp<int64_t>(end - s - kBlock, 0, kBlock);
    Asking asking(keys.ahead(s + kBlock, end), values.ahead(s + kBlock, end), later, kCalls);
    read_block<V>(keys, s, count, key);
    for_groups<V>(keys.format, [&](auto groups) {
      score_small_lanes<V, decltype(groups)::value>(units, query_scale, sums, key, count, wide, asking, scores);
    });
    running.weigh(scores, scale, visible);
    read_block<V>(values, s, count, value);
    float bounds[kMostGroups];
    bound_scales<V>(value, values.format, bounds);
    f32x16 top = {};
    for (int i = 0; i < kBlock / 2; ++i) top = (f32x16)_mm512_max_ps((__m512)lanes(scores + 16 * i), (__m512)top);
    const __m256 tops = folded(top, true);
    for_groups<V>(values.format, [&](auto groups) {
      constexpr int kGroup = D / decltype(groups)::value;
      alignas(32) float unit[kLaneRows], least[kLaneRows] = {};
      for (int d = 0; d < D; d += 32) {
        const int g = d / kGroup;
        if (d % kGroup == 0) {
          const __m256 bound = _mm256_mul_ps(tops, _mm256_set1_ps(bounds[g]));
          const __mmask8 some = _mm256_cmp_ps_mask(bound, _mm256_set1_ps(kLeastBound), _CMP_GT_OQ);
          pair_integers(scores, value.scale[g], _mm256_maskz_div_ps(some, _mm256_set1_ps(kMostInteger), bound), pairs);
          _mm256_store_ps(unit, _mm256_div_ps(bound, _mm256_set1_ps(kMostInteger)));
          if (value.has_least) _mm256_store_ps(least, weighted_sum(scores, value.least[g]));
        }
        __m512i totals[N][2] = {};
        mix_lanes<ShortPairs, N>(pairs, value.quants + d, D, count, asking, totals);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
          for (int c = 0; c < 2; ++c) {
            float* at = mixed + n * D + d + 16 * c;
            const f32x16 block = (f32x16)_mm512_cvtepi32_ps(totals[n][c]) * all(unit[n]) + least[n];
            const f32x16 y = lanes(at) * all(running.keep[n]) + block;
            __builtin_memcpy(at, &y, 64);
          }
      }
    });
  }
  running.leave(mixed, R, D, out);
}

}  // namespace

#endif
