// Several query rows of one kv head over a small cache: products of the quants with integers of 16 bits, which have a
// scale for each query, or for each block's weights. That is finer than the 8 or 11 bits of a half-precision model.
//
// Legend: R query rows, D head dim, V = D / 16, G groups of a row with a scale of their own, p position in a block. A unit
// is two 16-bit integers.
// The specification is torch.nn.functional.scaled_dot_product_attention in fp32 of fastllama.kernels.stored.expand.

#pragma once

#include "rows.h"
#include "small_few.h"

#if defined(FASTLLAMA_SMALL_ROWS)

namespace {

inline f32x16 lanes(const float* p) { return load(p); }

// Quants [count, D] as units [D / 2, kBlock]. Of each four numbers the first and third are one unit, the others the next.
template <int V>
inline void pack_small_keys(const int8_t* quants, int count, int32_t* packed) {
  constexpr int D = V * 16;
  for (int p = 0; p < count; p += 16) {
#pragma GCC unroll 2
    for (int d = 0; d < D; d += 64) {
      const int width = std::min(64, D - d);
      const __mmask64 mask = ~0ull >> (64 - width);
      f32x16 rows[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        rows[i] = (f32x16)_mm512_maskz_loadu_epi8(mask, quants + std::min(p + i, count - 1) * D + d);
      alignas(64) float columns[16 * 16];
      transpose(rows, columns, 16);
#pragma GCC unroll 16
      for (int u = 0; u < width / 4; ++u) {
        const __m512i four = _mm512_load_si512(columns + 16 * u);
        int32_t* to = packed + (d / 2 + 2 * u) * kBlock + p;
        _mm512_store_si512(to, _mm512_srai_epi16(_mm512_slli_epi16(four, 8), 8));
        _mm512_store_si512(to + kBlock, _mm512_srai_epi16(four, 8));
      }
    }
  }
}

// Quants [count, D] as units [count / 2, D]: a number of one position and the same number of the next.
template <int V>
inline void pack_small_values(const int8_t* quants, int count, int32_t* packed) {
  constexpr int D = V * 16;
  for (int p = 0; p < count; p += 2)
#pragma GCC unroll 8
    for (int d = 0; d < D; d += 16) {
      const int8_t* from = quants + p * D + d;
      const __m512i even = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
      const __m512i odd = p + 1 < count ? _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(from + D))) : __m512i{};
      _mm512_store_si512(packed + p / 2 * D + d, _mm512_mask_blend_epi16(0xAAAAAAAA, even, _mm512_slli_epi32(odd, 16)));
    }
}

// 16-bit integers near x * factor.
inline __m256i integers(f32x16 x, float factor) { return _mm512_cvtepi32_epi16(_mm512_cvtps_epi32((__m512)(x * all(factor)))); }

// Not inlined: the compiler then keeps the sums in registers.
template <int N, int C>
__attribute__((noinline)) void small_products(const int32_t* left, int reach, const int32_t* packed, int width, int units,
                                              Asking& asking, __m512i (*totals)[C]) {
  __m512i sums[N][C] = {};  // in registers: what `totals` points to might be what is read
  for (int u = 0; u < units; ++u) {
    asking.ask();
    // One load for the tile: the compiler would fold a load into each product.
    __m512i right[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      right[c] = _mm512_load_si512(packed + u * width + 16 * c);
      asm("" : "+v"(right[c]));
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const __m512i both = _mm512_set1_epi32(left[n * reach + u]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[n][c] = _mm512_dpwssd_epi32(sums[n][c], right[c], both);
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) totals[n][c] = sums[n][c];
}

// What a thread packs keys and values into.
inline int32_t* own_units() {
  alignas(64) static thread_local int32_t units[kMostDims * kBlock];
  return units;
}

// What several rows keep beside the block: their queries in integers, the scale of each, the sum of each group.
template <int V>
struct SmallQuery {
  static constexpr int kUnits = V * 8;
  std::vector<int32_t> units;
  std::vector<float> scale, sums;  // [R], [R, kMostGroups]

  // `swapped`: of numbers 4 u .. 4 u + 3 the middle two change places, see pack_small_keys.
  template <bool swapped = true>
  void take(const float* query, int R) {
    units.resize(R * kUnits), scale.resize(R), sums.assign(R * kMostGroups, 0.f);
    for (int r = 0; r < R; ++r) {
      const float* row = query + r * V * 16;
      f32x16 top = {};
      bool finite = true;
      for (int v = 0; v < V; ++v) {
        const f32x16 x = lanes(row + 16 * v);
        sums[r * kMostGroups + v / 2] += sum(x);
        top = (f32x16)_mm512_max_ps((__m512)top, _mm512_abs_ps((__m512)x));
        finite &= all_finite(x);
      }
      const float bound = highest(top);
      scale[r] = finite ? bound / kMostInteger : std::numeric_limits<float>::quiet_NaN();
      const float factor = finite && bound > kLeastBound ? kMostInteger / bound : 0.f;
      for (int v = 0; v < V; ++v) {
        __m512 x = (__m512)lanes(row + 16 * v);
        if (swapped) x = _mm512_permute_ps(x, 0xD8);
        _mm256_storeu_si256((__m256i*)(&units[r * kUnits + 8 * v]), integers((f32x16)x, factor));
      }
    }
  }
};

template <int V, int N, int G>
inline void score_small_rows(const SmallQuery<V>& query, int r0, const int32_t* packed, const SmallBlock& keys,
                             Asking& asking, float* scores) {
  constexpr int kUnits = V * 8, kEach = kUnits / G;
#pragma GCC unroll 1
  for (int g = 0; g < G; ++g) {
    __m512i totals[N][4];
    small_products<N, 4>(&query.units[r0 * kUnits + g * kEach], kUnits, packed + g * kEach * kBlock, kBlock, kEach, asking,
                         totals);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const f32x16 scale = lanes(keys.scale[g] + 16 * c);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        float* at = scores + n * kBlock + 16 * c;
        f32x16 y = (f32x16)_mm512_cvtepi32_ps(totals[n][c]) * scale * all(query.scale[r0 + n]);
        if (keys.has_least) y += lanes(keys.least[g] + 16 * c) * all(query.sums[(r0 + n) * kMostGroups + g]);
        if (g > 0) y += lanes(at);
        __builtin_memcpy(at, &y, 64);
      }
    }
  }
}

template <int V, int N, int G>
inline void mix_small_rows(const float* weights, const int32_t* packed, const SmallBlock& values, const float* bounds,
                           int units, const float* keep, Asking& asking, float* mixed) {
  constexpr int kEach = V / G, kPart = kEach == 6 ? 3 : std::min(kEach, 4);
  float top[N];
  for (int n = 0; n < N; ++n) {
    const float* w = weights + n * kBlock;
    top[n] = highest((f32x16)_mm512_max_ps(_mm512_max_ps((__m512)lanes(w), (__m512)lanes(w + 16)),
                                           _mm512_max_ps((__m512)lanes(w + 32), (__m512)lanes(w + 48))));
  }
#pragma GCC unroll 1
  for (int g = 0; g < G; ++g) {
    alignas(64) int32_t pairs[N][kBlock / 2];
    float scale[N], least[N] = {};
    for (int n = 0; n < N; ++n) {
      const float bound = top[n] * bounds[g], factor = bound > kLeastBound ? kMostInteger / bound : 0.f;
      scale[n] = bound / kMostInteger;
      f32x16 total = {};
#pragma GCC unroll 4
      for (int p = 0; p < kBlock; p += 16) {
        const f32x16 w = lanes(weights + n * kBlock + p);
        _mm256_store_si256((__m256i*)(pairs[n] + p / 2), integers(w * lanes(values.scale[g] + p), factor));
        if (values.has_least) total += w * lanes(values.least[g] + p);
      }
      if (values.has_least) least[n] = sum(total);
    }
#pragma GCC unroll 1
    for (int v = g * kEach; v < (g + 1) * kEach; v += kPart) {
      __m512i totals[N][kPart];
      small_products<N, kPart>(pairs[0], kBlock / 2, packed + 16 * v, V * 16, units, asking, totals);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
        for (int c = 0; c < kPart; ++c) {
          float* at = mixed + (n * V + v + c) * 16;
          const f32x16 y = lanes(at) * all(keep[n]) + (f32x16)_mm512_cvtepi32_ps(totals[n][c]) * all(scale[n]) + least[n];
          __builtin_memcpy(at, &y, 64);
        }
    }
  }
}

// As `attend_rows` does. query: fp32 [R, D].
template <int V>
void attend_small_rows(const float* query, float scale, const Run& keys, const Run& values, int64_t begin, int64_t end,
                       const int64_t* seen, int R, const Partial& out) {
  constexpr int D = V * 16;
  clear(out, R, D);
  SmallBlock &key = own_blocks()[0], &value = own_blocks()[1];
  int32_t *packed_keys = own_units(), *packed_values = packed_keys + D / 2 * kBlock;
  alignas(64) float scores[kRows * kBlock];
  thread_local std::vector<f32x16> totals;
  thread_local SmallQuery<V> asked;
  totals.assign(R, f32x16{});
  asked.take(query, R);
  const int calls = (R + kRows - 1) / kRows * (V * 8 + kBlock / 2 * (V + 3) / 4);
  for (int64_t s = begin; s < end; s += kBlock) {
    const int count = (int)std::min<int64_t>(kBlock, end - s);
    read_block<V>(keys, s, count, key);
    pack_small_keys<V>(key.quants, count, packed_keys);
    read_block<V>(values, s, count, value);
    pack_small_values<V>(value.quants, count, packed_values);
    float bounds[kMostGroups];
    bound_scales<V>(value, values.format, bounds);
    const int64_t later = std::clamp<int64_t>(end - s - kBlock, 0, kBlock);
    Asking asking(keys.ahead(s + kBlock, end), values.ahead(s + kBlock, end), later, calls);
    for (int r0 = 0; r0 < R; r0 += kRows) {
      const int rows = std::min(kRows, R - r0);
      if (*std::max_element(seen + r0, seen + r0 + rows) <= s) continue;
      auto each = [&](auto n) {
        constexpr int N = decltype(n)::value;
        for_groups<V>(keys.format, [&](auto groups) {
          score_small_rows<V, N, decltype(groups)::value>(asked, r0, packed_keys, key, asking, scores);
        });
        float keep[N];
        for (int r = 0; r < N; ++r) {
          const int64_t visible = std::min<int64_t>(count, seen[r0 + r] - s);
          keep[r] = weigh(scores + r * kBlock, scale, visible, out.maximum[r0 + r], totals[r0 + r]);
        }
        for_groups<V>(values.format, [&](auto groups) {
          mix_small_rows<V, N, decltype(groups)::value>(scores, packed_values, value, bounds, (count + 1) / 2, keep, asking,
                                                        out.mixed + (int64_t)r0 * D);
        });
      };
      with_number<kRows>(rows, each);
    }
  }
  for (int r = 0; r < R; ++r) out.total[r] = sum(totals[r]);
}

}  // namespace

#endif
