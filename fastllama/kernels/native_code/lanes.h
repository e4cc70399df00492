// Attention of three to eight query rows of one kv head, one row in each lane: a pair of a key's numbers is broadcast as it
// lies in the cache, so that keys are not rearranged, and values are interleaved in registers.
//
// Legend: R query rows, D head dim, V = D / 16, U = D / 2 units; a unit is 32 bits, a pair of numbers of one row. Lane r
// of each vector of 8 is row r. The specification is torch.nn.functional.scaled_dot_product_attention in fp32.

#pragma once

#include "rows.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512BW__) && \
    defined(__AVX512DQ__)
#define FASTLLAMA_LANES

namespace {

constexpr int kLaneRows = 8;
constexpr int kUnderWay = 16;  // positions whose sums are under way: enough to hide how long a product takes

inline int unit_at(const void* from) {
  int unit;
  __builtin_memcpy(&unit, from, 4);
  return unit;
}

// Pairs of bf16, summed in fp32.
struct BrainPairs {
  using Sum = __m256;
  using Wide = __m512;
  static Sum add(Sum total, __m256i row, int key) {
    return _mm256_dpbf16_ps(total, (__m256bh)row, (__m256bh)_mm256_set1_epi32(key));
  }
  static Wide add(Wide total, __m512i value, int weight) {
    return _mm512_dpbf16_ps(total, (__m512bh)value, (__m512bh)_mm512_set1_epi32(weight));
  }
  // 32 values of one position.
  static __m512i values(const at::BFloat16* from) { return _mm512_loadu_si512(from); }
};

// Units [R, U] as [U, 8]; rows that are missing are zero.
template <int U>
inline void take_lanes(const void* units, int R, int32_t* lanes) {
  for (int u = 0; u < U; ++u)
    for (int r = 0; r < kLaneRows; ++r) lanes[u * kLaneRows + r] = r < R ? unit_at((const char*)units + (r * U + u) * 4) : 0;
}

// The products of `U` units of 8 rows and of `count` positions, `stride` bytes apart: calls emit(position, sums).
template <typename Kind, int U, typename Emit>
inline void score_lanes(const int32_t* query, const char* keys, int64_t stride, int count, Asking& asking,
                        const Emit& emit) {
  using Sum = typename Kind::Sum;
  int p = 0;
  for (; p + kUnderWay <= count; p += kUnderWay) {
    Sum totals[kUnderWay] = {};
    const char* from = keys + p * stride;
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u) {
      asking.ask();
      const __m256i row = _mm256_load_si256((const __m256i*)(query + u * kLaneRows));
#pragma GCC unroll 16
      for (int i = 0; i < kUnderWay; ++i) totals[i] = Kind::add(totals[i], row, unit_at(from + i * stride + 4 * u));
    }
#pragma GCC unroll 16
    for (int i = 0; i < kUnderWay; ++i) emit(p + i, totals[i]);
  }
  for (; p < count; p += 4) {  // the last key stands for those that are missing
    Sum totals[4] = {};
    const char* four[4];
    for (int i = 0; i < 4; ++i) four[i] = keys + std::min(p + i, count - 1) * stride;
    for (int u = 0; u < U; ++u) {
      const __m256i row = _mm256_load_si256((const __m256i*)(query + u * kLaneRows));
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) totals[i] = Kind::add(totals[i], row, unit_at(four[i] + 4 * u));
    }
    for (int i = 0; i < 4; ++i) emit(p + i, totals[i]);
  }
}

inline __m512 twice(__m256 eight) { return _mm512_insertf32x8(_mm512_castps256_ps512(eight), eight, 1); }

// What rows keep from block to block: maximum and sum of weights; `keep` is the factor for what was mixed before.
struct Running {
  __m256 maximum = _mm256_set1_ps(-std::numeric_limits<float>::max());
  f32x16 total = {};  // of even positions in the lower lanes and of odd ones in the upper
  alignas(32) float keep[kLaneRows];

  // Turns scores [kBlock, 8] into weights; row r sees the first visible[r] positions of the block.
  void weigh(float* scores, float scale, const int* visible) {
    const __m512 limits = _mm512_cvtepi32_ps(_mm512_broadcast_i32x8(_mm256_loadu_si256((const __m256i*)visible)));
    const bool whole = *std::min_element(visible, visible + kLaneRows) >= kBlock;
    f32x16 top = (f32x16)twice(maximum);
    const f32x16 before = top;
    // Positions 2 i in the lower and 2 i + 1 in the upper lanes.
    auto hidden = [&](int i) {
      const __m512 at = twice(_mm256_set1_ps(2.f * i)) + (__m512)_mm512_insertf32x8(__m512{}, _mm256_set1_ps(1.f), 1);
      return _mm512_cmp_ps_mask(at, limits, _CMP_GE_OQ);
    };
    for (int i = 0; i < kBlock / 2; ++i) {
      f32x16 x = Wide<float>::stored(scores + 16 * i) * scale;
      if (!whole) x = (f32x16)_mm512_mask_mov_ps((__m512)x, hidden(i), _mm512_set1_ps(-std::numeric_limits<float>::max()));
      __builtin_memcpy(scores + 16 * i, &x, 64);
      top = x > top ? x : top;
    }
    f32x16 factor = all(1.f);
    if (_mm512_cmp_ps_mask((__m512)top, (__m512)before, _CMP_GT_OQ)) {
      const f32x16 other = (f32x16)_mm512_shuffle_f32x4((__m512)top, (__m512)top, 0x4E);
      top = other > top ? other : top;
      factor = exp_of(before - top);
      total *= factor;
      maximum = _mm512_castps512_ps256((__m512)top);
    }
    _mm256_store_ps(keep, _mm512_castps512_ps256((__m512)factor));
#pragma GCC unroll 4
    for (int i = 0; i < kBlock / 2; ++i) {
      f32x16 weights = exp_of(Wide<float>::stored(scores + 16 * i) - top);
      if (!whole) weights = (f32x16)_mm512_mask_mov_ps((__m512)weights, hidden(i), _mm512_setzero_ps());
      total += weights;
      __builtin_memcpy(scores + 16 * i, &weights, 64);
    }
  }

  void leave(const float* mixed, int R, int D, const Partial& out) const {
    alignas(64) float sums[16], highest[kLaneRows];
    __builtin_memcpy(sums, &total, 64);
    _mm256_store_ps(highest, maximum);
    for (int r = 0; r < R; ++r) out.maximum[r] = highest[r], out.total[r] = sums[r] + sums[r + kLaneRows];
    std::copy(mixed, mixed + R * D, out.mixed);
  }
};

// How many of the positions from s on each lane sees; a lane without a row is as the last one.
inline void see(const int64_t* seen, int R, int64_t s, int count, int* visible) {
  for (int r = 0; r < kLaneRows; ++r) visible[r] = (int)std::clamp<int64_t>(seen[std::min(r, R - 1)] - s, 0, count);
}

// 8 numbers of a position and 8 of the next, as pairs.
inline void put_pairs(int32_t* to, __m256i sixteen) {
  const __m256i order = _mm256_setr_epi16(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
  _mm256_store_si256((__m256i*)to, _mm256_permutexvar_epi16(order, sixteen));
}

// Weights [kBlock, 8] rounded to bf16, as pairs [kBlock / 2, 8].
inline void pair_weights(const float* weights, int32_t* pairs) {
#pragma GCC unroll 4
  for (int i = 0; i < kBlock / 2; ++i) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_load_ps(weights + 16 * i));
    put_pairs(pairs + kLaneRows * i, (__m256i)rounded);
  }
}

// Adds to two vectors a row what `count` positions give: N rows' weights times 32 numbers of each value.
template <typename Kind, int N, typename T>
inline void mix_lanes(const int32_t* pairs, const T* values, int64_t stride, int count, Asking& asking,
                      typename Kind::Wide (*totals)[2]) {
  typename Kind::Wide sums[N][2];  // in registers: what `totals` points to might be what is read
  Asking later = asking;           // as here
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) sums[n][0] = totals[n][0], sums[n][1] = totals[n][1];
  const __m512i low = _mm512_load_si512(kPairing.low), high = _mm512_load_si512(kPairing.high);
  auto add = [&](int u, __m512i even, __m512i odd) __attribute__((always_inline)) {
    const __m512i first = _mm512_permutex2var_epi16(even, low, odd), second = _mm512_permutex2var_epi16(even, high, odd);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const int weight = pairs[u * kLaneRows + n];
      sums[n][0] = Kind::add(sums[n][0], first, weight);
      sums[n][1] = Kind::add(sums[n][1], second, weight);
    }
  };
  int u = 0;
  for (; 2 * u + 1 < count; ++u) {
    later.ask();
    add(u, Kind::values(values + 2 * u * stride), Kind::values(values + (2 * u + 1) * stride));
  }
  if (2 * u < count) add(u, Kind::values(values + 2 * u * stride), __m512i{});
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) totals[n][0] = sums[n][0], totals[n][1] = sums[n][1];
  asking = later;
}

// As `attend_rows` does, for N lanes: 4 or 8.
template <typename T, int V, int N, typename Keys, typename Values>
void attend_lanes(const float* units, float scale, const Keys& keys, const Values& values, int64_t begin, int64_t end,
                  const int64_t* seen, int R, const Partial& out) {
  constexpr int D = V * 16, U = D / 2, kCalls = kBlock / kUnderWay * U + kBlock / 2 * V / 2;
  alignas(64) int32_t query[U * kLaneRows], pairs[kBlock / 2 * kLaneRows];
  alignas(64) float scores[kBlock * kLaneRows], mixed[N * D] = {};
  take_lanes<U>(units, R, query);
  Running running;
  for (int64_t s = begin; s < end; s += kBlock) {
    const int count = (int)std::min<int64_t>(kBlock, end - s);
    int visible[kLaneRows];
    see(seen, R, s, count, visible);
    const int64_t later = std::clamp<int64_t>(end - s - kBlock, 0, kBlock);
    Asking asking(keys.ahead(s + kBlock, end), values.ahead(s + kBlock, end), later, kCalls);
    score_lanes<BrainPairs, U>(query, (const char*)keys.block(s, count), D * sizeof(T), count, asking,
                               [&](int p, __m256 sums) { _mm256_store_ps(scores + p * kLaneRows, sums); });
    running.weigh(scores, scale, visible);
    pair_weights(scores, pairs);
    const T* from = values.block(s, count);
    for (int d = 0; d < D; d += 32) {
      __m512 totals[N][2];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c)
          totals[n][c] = _mm512_mul_ps(_mm512_load_ps(mixed + n * D + d + 16 * c), _mm512_set1_ps(running.keep[n]));
      mix_lanes<BrainPairs, N>(pairs, from + d, D, count, asking, totals);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) _mm512_store_ps(mixed + n * D + d + 16 * c, totals[n][c]);
    }
  }
  running.leave(mixed, R, D, out);
}

}  // namespace

#endif
