// Attention of several query rows of one kv head: each block of keys and values is rearranged once for all of them, so
// that no sum has to be taken across a vector.
//
// Legend: R query rows, D head dim, S cached positions, V = D / kVector. A unit is 32 bits: one fp32 number, or two in bf16.
// The specification is torch.nn.functional.scaled_dot_product_attention in fp32.

#pragma once

#include "attention.h"

namespace {

// Vectors of each row's sums that are taken at once: of 4 rows, 16 vectors of sums fit AVX-512's registers, else 8.
constexpr int kAcross = kVector == 16 ? 4 : 2;

// Numbers a unit holds: pairs where the processor multiplies them and the head dim is whole vectors of them.
template <typename T, int V>
constexpr int kNumbers = kInPairs<T> && V * kVector % 32 == 0 ? 2 : 1;

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
inline void add_unit(f32v& total, const float* packed, const float* unit) {
#if defined(__AVX512BF16__)
  if constexpr (Numbers == 2) {
    int pair;
    __builtin_memcpy(&pair, unit, 4);
    total = (f32v)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_loadu_ps(packed), (__m512bh)_mm512_set1_epi32(pair));
    return;
  }
#endif
  total += load(packed) * all(*unit);
}

// Keys [count, D] as units [D / numbers, kBlock]; positions that are missing are zero.
template <typename T, int V>
inline void pack_keys(const T* keys, int count, float* packed) {
  constexpr int D = V * kVector, kUnits = D / kNumbers<T, V>;
  for (int p = 0; p < kBlock; p += kVector) {
    if (p >= count) break;
    for (int u = 0; u < kUnits; u += kVector) {
      f32v rows[kVector];
#pragma GCC unroll 16
      for (int i = 0; i < kVector; ++i) {
        const T* from = keys + (int64_t)(p + i) * D + u * kNumbers<T, V>;
        if (p + i >= count) rows[i] = f32v{};
        else if constexpr (kNumbers<T, V> == 2) __builtin_memcpy(&rows[i], from, sizeof rows[i]);
        else rows[i] = widened(from);
      }
      transpose(rows, packed + u * kBlock + p, kBlock);
    }
  }
}

// Values [count, D] as units [count / numbers, D].
template <typename T, int V>
inline const float* pack_values(const T* values, int count, float* packed) {
  constexpr int D = V * kVector;
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
      for (int d = 0; d < D; d += kVector) store(to + d, widened(from + d));
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

// out[n * stride + kVector c ...] (+)= sum over units u of left[n * reach + u] and packed[u * width + kVector c ...].
template <int Numbers, int N, int C>
inline void products(const float* left, int reach, const float* packed, int width, int units, const float* keep, float* out,
                     int stride, Asking& asking) {
  f32v totals[N][C];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      totals[n][c] = keep ? load(out + n * stride + kVector * c) * all(keep[n]) : f32v{};
  for (int u = 0; u < units; ++u) {
    asking.ask();
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) add_unit<Numbers>(totals[n][c], packed + u * width + kVector * c, left + n * reach + u);
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(out + n * stride + kVector * c, totals[n][c]);
}

// One kv head over positions begin .. end - 1, as `attend` does. query: units [R, D / numbers].
template <typename T, int V, typename Keys, typename Values>
void attend_rows(const float* query, float scale, const Keys& keys, const Values& values, int64_t begin, int64_t end,
                 const int64_t* seen, int R, const Partial& out) {
  constexpr int D = V * kVector, kUnits = D / kNumbers<T, V>, kPart = V == 6 ? 3 : std::min(V, kAcross);
  constexpr int kScores = kBlock / kVector;
  clear(out, R, D);
  alignas(64) thread_local float packed_keys[D * kBlock], packed_values[D * kBlock];
  alignas(64) float scores[kRows * kBlock];
  thread_local std::vector<f32v> totals;
  totals.assign(R, f32v{});
  const int calls = (R + kRows - 1) / kRows * (kUnits * (kScores / kAcross) + kBlock / kNumbers<T, V> * (V / kPart));
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
        for (int c = 0; c < kScores; c += kAcross)
          products<kNumbers<T, V>, N, kAcross>(query + (int64_t)r0 * kUnits, kUnits, packed_keys + kVector * c, kBlock,
                                                kUnits, nullptr, scores + kVector * c, kBlock, asking);
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
          products<kNumbers<T, V>, N, kPart>(weights, kBlock / kNumbers<T, V>, mixable + kVector * v, D,
                                             (count + kNumbers<T, V> - 1) / kNumbers<T, V>, keep,
                                             out.mixed + (int64_t)r0 * D + kVector * v, D, asking);
      };
      with_number<kRows>(rows, each);
    }
  }
  for (int r = 0; r < R; ++r) out.total[r] = sum(totals[r]);
}

}  // namespace
