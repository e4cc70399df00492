// Attention of several query rows of one kv head: each block of keys and values is rearranged once for all of them, so
// that no sum has to be taken across a vector.
//
// Legend: R query rows, D head dim, S cached positions, V = D / 16. A unit is 32 bits: one fp32 number, or two in bf16.
// The specification is torch.nn.functional.scaled_dot_product_attention in fp32.

#pragma once

#include "attention.h"

namespace {

// Numbers a unit holds: pairs where the processor multiplies them and the head dim is whole vectors of them.
template <typename T, int V>
constexpr int kNumbers = V * 16 % Lane<T>::kStep == 0 ? Lane<T>::kStep / 16 : 1;

// Where the numbers of two rows of 32 come from when they are paired: each of one row and the same of the other.
struct Pairing {
  uint16_t low[32], high[32];
};
alignas(64) constexpr Pairing kPairing = [] {
  Pairing order{};
  for (int i = 0; i < 32; ++i) order.low[i] = i / 2 + 32 * (i % 2), order.high[i] = 16 + order.low[i];
  return order;
}();

template <int Numbers>
inline void add_unit(f32x16& total, const float* packed, const float* unit) {
#if defined(__AVX512BF16__)
  if constexpr (Numbers == 2) {
    int pair;
    __builtin_memcpy(&pair, unit, 4);
    total = (f32x16)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_loadu_ps(packed), (__m512bh)_mm512_set1_epi32(pair));
    return;
  }
#endif
  total += Wide<float>::stored(packed) * all(*unit);
}

// rows[i] of 16 units each become columns: to[u * stride + i].
inline void transpose16(const f32x16* rows, float* to, int64_t stride) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
  }
  auto low = [](__m512 x, __m512 y) { return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))); };
  auto high = [](__m512 x, __m512 y) { return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))); };
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    b[i] = low(a[i], a[i + 2]), b[i + 1] = high(a[i], a[i + 2]);
    b[i + 2] = low(a[i + 1], a[i + 3]), b[i + 3] = high(a[i + 1], a[i + 3]);
  }
  // b[4 j + c] now holds, in each quarter q, unit 4 q + c of rows 4 j .. 4 j + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88), odd = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xDD);
    const __m512 even2 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
    const __m512 odd2 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xDD);
    _mm512_storeu_ps(to + c * stride, _mm512_shuffle_f32x4(even, even2, 0x88));
    _mm512_storeu_ps(to + (4 + c) * stride, _mm512_shuffle_f32x4(odd, odd2, 0x88));
    _mm512_storeu_ps(to + (8 + c) * stride, _mm512_shuffle_f32x4(even, even2, 0xDD));
    _mm512_storeu_ps(to + (12 + c) * stride, _mm512_shuffle_f32x4(odd, odd2, 0xDD));
  }
#else
  for (int u = 0; u < 16; ++u)
    for (int i = 0; i < 16; ++i) to[u * stride + i] = rows[i][u];
#endif
}

// Keys [count, D] as units [D / numbers, kBlock]; positions that are missing are zero.
template <typename T, int V>
inline void pack_keys(const T* keys, int count, float* packed) {
  constexpr int D = V * 16, kUnits = D / kNumbers<T, V>;
  for (int p = 0; p < kBlock; p += 16) {
    if (p >= count) break;
    for (int u = 0; u < kUnits; u += 16) {
      f32x16 rows[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const T* from = keys + (int64_t)(p + i) * D + u * kNumbers<T, V>;
        if (p + i >= count) rows[i] = f32x16{};
        else if constexpr (kNumbers<T, V> == 2) __builtin_memcpy(&rows[i], from, 64);
        else rows[i] = Wide<T>::weight(from);
      }
      transpose16(rows, packed + u * kBlock + p, kBlock);
    }
  }
}

// Values [count, D] as units [count / numbers, D].
template <typename T, int V>
inline const float* pack_values(const T* values, int count, float* packed) {
  constexpr int D = V * 16;
  if constexpr (std::is_same_v<T, float>) {
    return values;
  } else {
    for (int p = 0; p < count; p += kNumbers<T, V>) {
      const T* from = values + (int64_t)p * D;
      float* to = packed + p / kNumbers<T, V> * D;
#if defined(__AVX512BF16__)
      if constexpr (kNumbers<T, V> == 2) {
        const __m512i low = _mm512_load_si512(kPairing.low), high = _mm512_load_si512(kPairing.high);
        for (int d = 0; d < D; d += 32) {
          const __m512i even = _mm512_loadu_si512(from + d);
          const __m512i odd = p + 1 < count ? _mm512_loadu_si512(from + D + d) : _mm512_setzero_si512();
          _mm512_storeu_si512(to + d, _mm512_permutex2var_epi16(even, low, odd));
          _mm512_storeu_si512(to + d + 16, _mm512_permutex2var_epi16(even, high, odd));
        }
        continue;
      }
#endif
      for (int d = 0; d < D; d += 16) {
        const f32x16 wide = Wide<T>::weight(from + d);
        __builtin_memcpy(to + d, &wide, 64);
      }
    }
    return packed;
  }
}

// What the next block needs is asked of memory a few lines at a time, between the products: asked for at once, it would
// fill the queue of misses and everything would wait.
struct Asking {
  const char* next[2] = {};  // keys and values
  const char* end[2] = {};
  int64_t each = 0;          // lines at a time

  Asking(const Ahead& keys, const Ahead& values, int64_t count, int64_t calls)
      : next{keys.at, values.at}, end{keys.at + count * keys.each, values.at + count * values.each} {
    each = (count * std::max(keys.each, values.each) / kLine + calls - 1) / calls;
  }
  void ask() {
    for (int64_t i = 0; i < each; ++i)
      for (int x = 0; x < 2; ++x)
        if (next[x] < end[x]) __builtin_prefetch(next[x], 0, kNextCache), next[x] += kLine;
  }
};

// out[n * stride + 16 c ...] (+)= sum over units u of left[n * reach + u] and packed[u * width + 16 c ...].
template <int Numbers, int N, int C>
inline void products(const float* left, int reach, const float* packed, int width, int units, const float* keep, float* out,
                     int stride, Asking& asking) {
  f32x16 totals[N][C];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      totals[n][c] = keep ? Wide<float>::stored(out + n * stride + 16 * c) * all(keep[n]) : f32x16{};
  for (int u = 0; u < units; ++u) {
    asking.ask();
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) add_unit<Numbers>(totals[n][c], packed + u * width + 16 * c, left + n * reach + u);
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) __builtin_memcpy(out + n * stride + 16 * c, &totals[n][c], 64);
}

// One kv head over positions begin .. end - 1, as `attend` does. query: units [R, D / numbers].
template <typename T, int V, typename Keys, typename Values>
void attend_rows(const float* query, float scale, const Keys& keys, const Values& values, int64_t begin, int64_t end,
                 const int64_t* seen, int R, const Partial& out) {
  constexpr int D = V * 16, kUnits = D / kNumbers<T, V>, kPart = V == 6 ? 3 : std::min(V, 4);
  clear(out, R, D);
  alignas(64) thread_local float packed_keys[D * kBlock], packed_values[D * kBlock];
  alignas(64) float scores[kRows * kBlock];
  thread_local std::vector<f32x16> totals;
  totals.assign(R, f32x16{});
  const int calls = (R + kRows - 1) / kRows * (kUnits + kBlock / kNumbers<T, V> * (V / kPart));
  for (int64_t s = begin; s < end; s += kBlock) {
    const int count = (int)std::min<int64_t>(kBlock, end - s);
    pack_keys<T, V>(keys.block(s, count), count, packed_keys);
    const float* mixable = pack_values<T, V>(values.block(s, count), count, packed_values);
    const int64_t later = std::clamp<int64_t>(end - s - kBlock, 0, kBlock);
    Asking asking(keys.ahead(s + kBlock, end), values.ahead(s + kBlock, end), later, calls);
    for (int r0 = 0; r0 < R; r0 += kRows) {
      const int rows = std::min(kRows, R - r0);
      if (*std::max_element(seen + r0, seen + r0 + rows) <= s) continue;
      auto each = [&](auto n) {
        constexpr int N = decltype(n)::value;
        products<kNumbers<T, V>, N, kBlock / 16>(query + (int64_t)r0 * kUnits, kUnits, packed_keys, kBlock, kUnits, nullptr,
                                                 scores, kBlock, asking);
        float keep[N];
        for (int r = 0; r < N; ++r) {
          const int64_t visible = std::min<int64_t>(count, seen[r0 + r] - s);
          keep[r] = weigh(scores + r * kBlock, scale, visible, out.maximum[r0 + r], totals[r0 + r]);
        }
        const float* weights = scores;
#if defined(__AVX512BF16__)
        alignas(64) float pairs[N * kBlock / 2];
        if constexpr (kNumbers<T, V> == 2) {
          for (int p = 0; p < N * kBlock; p += 32)
            _mm512_storeu_ps(pairs + p / 2, (__m512)_mm512_cvtne2ps_pbh(_mm512_load_ps(scores + p + 16), _mm512_load_ps(scores + p)));
          weights = pairs;
        }
#endif
        for (int v = 0; v < V; v += kPart)
          products<kNumbers<T, V>, N, kPart>(weights, kBlock / kNumbers<T, V>, mixable + 16 * v, D,
                                             (count + kNumbers<T, V> - 1) / kNumbers<T, V>, keep,
                                             out.mixed + (int64_t)r0 * D + 16 * v, D, asking);
      };
      switch (rows) {
        case 1: each(std::integral_constant<int, 1>{}); break;
        case 2: each(std::integral_constant<int, 2>{}); break;
        case 3: each(std::integral_constant<int, 3>{}); break;
        default: each(std::integral_constant<int, 4>{}); break;
      }
    }
  }
  for (int r = 0; r < R; ++r) out.total[r] = sum(totals[r]);
}

}  // namespace
