// Three to eight query rows of one kv head over a small cache where a vector holds eight numbers: eight.h with products of
// the quants and integers of 16 bits, which have a scale for each query, or for each block's weights. That is finer than
// the 8 or 11 bits of a half-precision model.
//
// Legend: R query rows, D head dim, V = D / 8, G groups of a row with a scale of their own, p position in a block. A unit is
// two 16-bit integers.
// The specification is torch.nn.functional.scaled_dot_product_attention in fp32 of fastllama.kernels.stored.expand.

#pragma once

#include "eight.h"
#include "small_blocks.h"

#if defined(FASTLLAMA_EIGHT)

namespace {

// Adds the products of two pairs of 16-bit integers. Sums stay in order, and in registers: the compiler would gather them.
inline __m256i plus_pairs(__m256i total, __m256i a, __m256i b) {
  total = _mm256_add_epi32(total, _mm256_madd_epi16(a, b));
  asm("" : "+x"(total));
  return total;
}

// One load for all that it is multiplied with: the compiler would fold a load into each product.
inline __m256i once(const void* from) {
  __m256i x = _mm256_load_si256((const __m256i*)from);
  asm("" : "+x"(x));
  return x;
}

inline __m256i twin(const void* unit) {
  int both;
  __builtin_memcpy(&both, unit, 4);
  return _mm256_set1_epi32(both);
}

// Queries in integers: units [D / 2, 8], each row's scale, and its sum over each group of 32.
template <int D>
struct EightQueries {
  alignas(32) int16_t units[D * kEight] = {};
  alignas(32) float scale[kEight] = {}, sums[kMostGroups][kEight] = {};

  EightQueries(const float* query, int R) {
    for (int r = 0; r < R; ++r) {
      const float* row = query + r * D;
      float bound = 0;
      bool finite = true;
      for (int d = 0; d < D; ++d) {
        bound = std::max(bound, std::fabs(row[d]));
        finite &= std::fabs(row[d]) <= std::numeric_limits<float>::max();
        sums[d / 32][r] += row[d];
      }
      scale[r] = finite ? bound / kMostInteger : std::numeric_limits<float>::quiet_NaN();
      const float factor = finite && bound > kLeastBound ? kMostInteger / bound : 0.f;
      for (int d = 0; d < D; ++d) units[(d / 2 * kEight + r) * 2 + d % 2] = finite ? (int16_t)std::lrint(row[d] * factor) : 0;
    }
  }
};

// Scores [kBlock, 8] of a block of keys, of which eight are widened at a time.
template <int D, int G>
inline void score_small_eight(const EightQueries<D>& query, const SmallBlock& keys, int count, Asking& asking, float* scores) {
  constexpr int kUnits = D / 2 / G;
  alignas(32) int16_t wide[kEight * D] = {};
  const f32v query_scale = load(query.scale);
  for (int p = 0; p < count; p += kEight) {
    const int numbers = std::min(kEight, count - p) * D;
    for (int i = 0; i < numbers; i += 16) {
      const __m128i sixteen = _mm_loadu_si128((const __m128i*)(keys.quants + p * D + i));
      _mm256_store_si256((__m256i*)(wide + i), _mm256_cvtepi8_epi16(sixteen));
    }
#pragma GCC unroll 1
    for (int g = 0; g < G; ++g) {
      const int16_t *units = query.units + g * kUnits * 2 * kEight, *from = wide + g * kUnits * 2;
      __m256i totals[kEight] = {};
      for (int u = 0; u < kUnits; u += 8) {
        asking.ask();
#pragma GCC unroll 2
        for (int e = u; e < u + 8; ++e) {
          const __m256i row = once(units + e * 2 * kEight);
#pragma GCC unroll 8
          for (int i = 0; i < kEight; ++i) totals[i] = plus_pairs(totals[i], row, twin(from + i * D + 2 * e));
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kEight; ++i) {
        float* at = scores + (p + i) * kEight;
        f32v y = floats((i32v)totals[i]) * (query_scale * keys.scale[g][p + i]);
        if (keys.has_least) y += load(query.sums[g]) * keys.least[g][p + i];
        if (g > 0) y += load(at);
        store(at, y);
      }
    }
  }
}

// Quants [count, D] as units [count / 2, D]: a number of one position and the same number of the next. Of each 16 the middle
// two fours change places.
template <int D>
inline void pair_values(const int8_t* quants, int count, int32_t* pairs) {
  for (int p = 0; p < count; p += 2)
#pragma GCC unroll 8
    for (int d = 0; d < D; d += 16) {
      const int8_t* from = quants + p * D + d;
      const __m256i even = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
      const __m256i odd = p + 1 < count ? _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(from + D))) : __m256i{};
      _mm256_store_si256((__m256i*)(pairs + p / 2 * D + d), _mm256_unpacklo_epi16(even, odd));
      _mm256_store_si256((__m256i*)(pairs + p / 2 * D + d + kVector), _mm256_unpackhi_epi16(even, odd));
    }
}

// Weights [kBlock, 8] times the scales of a block's values, as pairs of integers near weight * scale * factor.
inline void pair_weights(const float* weights, const float* scales, f32v factor, int32_t* pairs) {
  auto integers = [&](int p) { return _mm256_cvtps_epi32((__m256)(load(weights + kEight * p) * (factor * scales[p]))); };
#pragma GCC unroll 4
  for (int p = 0; p < kBlock; p += 2)
    _mm256_store_si256((__m256i*)(pairs + kEight * p / 2),
                       _mm256_blend_epi16(integers(p), _mm256_slli_epi32(integers(p + 1), 16), 0xAA));
}

// The sums of 16 numbers of each unit, times the weights of kMixedRows rows. Not inlined: the compiler then keeps them in
// registers.
template <int D>
__attribute__((noinline)) void sum_pairs(const int32_t* weights, const int32_t* pairs, int units, Asking& asking,
                                         __m256i (*totals)[2]) {
  __m256i sums[kMixedRows][2] = {};
  for (int u = 0; u < units; u += 4) {
    asking.ask();
    for (int at = u; at < std::min(u + 4, units); ++at) {
      const __m256i low = once(pairs + at * D), high = once(pairs + at * D + kVector);
#pragma GCC unroll 4
      for (int r = 0; r < kMixedRows; ++r) {
        const __m256i weight = twin(weights + at * kEight + r);
        sums[r][0] = plus_pairs(sums[r][0], low, weight), sums[r][1] = plus_pairs(sums[r][1], high, weight);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kMixedRows; ++r) totals[r][0] = sums[r][0], totals[r][1] = sums[r][1];
}

// Adds a block of values, as `pair_values` has it, to rows of `mixed` [8, D].
template <int D, int G>
inline void mix_small_eight(const float* weights, const int32_t* pairs, const SmallBlock& values, const float* bounds,
                            int count, const float* keep, int R, Asking& asking, float* mixed) {
  const int units = (count + 1) / 2;
  f32v top = {};
  for (int p = 0; p < kBlock; ++p) top = load(weights + kEight * p) > top ? load(weights + kEight * p) : top;
  for (int g = 0; g < G; ++g) {
    alignas(32) int32_t integers[kBlock / 2 * kEight];
    const f32v bound = top * bounds[g], unit = bound / kMostInteger;
    pair_weights(weights, values.scale[g], bound > kLeastBound ? kMostInteger / bound : f32v{}, integers);
    f32v least = {};
    if (values.has_least)
      for (int p = 0; p < kBlock; ++p) least += load(weights + kEight * p) * values.least[g][p];
    for (int r0 = 0; r0 < R; r0 += kMixedRows)
      for (int d = g * (D / G); d < (g + 1) * (D / G); d += 2 * kVector) {
        __m256i totals[kMixedRows][2];
        sum_pairs<D>(integers + r0, pairs + d, units, asking, totals);
#pragma GCC unroll 4
        for (int r = 0; r < kMixedRows; ++r) {
          const __m256i two[2] = {_mm256_permute2x128_si256(totals[r][0], totals[r][1], 0x20),
                                  _mm256_permute2x128_si256(totals[r][0], totals[r][1], 0x31)};
          for (int c = 0; c < 2; ++c) {
            float* at = mixed + (r0 + r) * D + d + kVector * c;
            store(at, load(at) * all(keep[r0 + r]) + floats((i32v)two[c]) * all(unit[r0 + r]) + least[r0 + r]);
          }
        }
      }
  }
}

// As `attend_rows` does. query: fp32 [R, D].
template <int V>
void attend_small_eight(const float* query, float scale, const Run& keys, const Run& values, int64_t begin, int64_t end,
                        const int64_t* seen, int R, const Partial& out) {
  constexpr int D = V * kVector;
  alignas(32) static thread_local int32_t pairs[kBlock / 2 * D];
  alignas(32) float scores[kBlock * kEight], mixed[kEight * D] = {};
  const EightQueries<D> queries(query, R);
  SmallBlock &key = own_blocks()[0], &value = own_blocks()[1];
  EightRows running;
  for (int64_t s = begin; s < end; s += kBlock) {
    const int count = (int)std::min<int64_t>(kBlock, end - s);
    running.see(seen, R, s, count);
    const int64_t later = std::clamp<int64_t>(end - s - kBlock, 0, kBlock);
    Asking asking(keys.ahead(s + kBlock, end), values.ahead(s + kBlock, end), later, asked(D / 2, R, D));
    read_block<V>(keys, s, count, key);
    for_groups<V>(keys.format, [&](auto groups) {
      score_small_eight<D, decltype(groups)::value>(queries, key, count, asking, scores);
    });
    running.weigh(scores, scale);
    read_block<V>(values, s, count, value);
    pair_values<D>(value.quants, count, pairs);
    float bounds[kMostGroups];
    bound_scales<V>(value, values.format, bounds);
    for_groups<V>(values.format, [&](auto groups) {
      mix_small_eight<D, decltype(groups)::value>(scores, pairs, value, bounds, count, running.keep, R, asking, mixed);
    });
  }
  running.leave(R, out);
  std::copy(mixed, mixed + R * D, out.mixed);
}

}  // namespace

#endif
