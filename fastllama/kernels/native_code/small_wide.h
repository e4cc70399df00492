// y = x W^T + b for a W in few bits and many rows of x in bf16, in the processor's matrix unit: W becomes bf16 a few steps
// at a time, in the nearest cache. Numbers of 8 bits are bf16 as they are, and their scale comes to the sums; those of 4
// bits are scaled and rounded to bf16, as small_expand.h has them.
//
// Legend: M rows of x, N rows of W, K columns of both. A step is 32 columns, a group 16 rows of x.

#pragma once

#include "small_sums.h"

#if defined(FASTLLAMA_SMALL_UNIT)

namespace {

static_assert(kStepColumns == kFixed && kStrip == kLanes);

// x in tiles [groups, steps] of 16 rows and 32 columns, row by row. Columns that are missing are zero.
class Rowed {
 public:
  int64_t rows = 0, steps = 0;

  void shape(int64_t M, int64_t K) {
    rows = M, steps = (K + kStepColumns - 1) / kStepColumns;
    first_ = tiles_.of(groups() * steps * kTileUnits);
  }
  int64_t groups() const { return (rows + kGroup - 1) / kGroup; }
  const float* at(int64_t group, int64_t step) const { return first_ + (group * steps + step) * kTileUnits; }

  // Row m: from(k) tells where its columns from k on begin.
  template <typename From>
  void put(int64_t m, int64_t K, const From& from) {
    float* to = first_ + m / kGroup * steps * kTileUnits + m % kGroup * (kTileRow / 4);
    for (int64_t k = 0; k < K; k += kStepColumns, to += kTileUnits) {
      const int64_t bytes = std::min(kStepColumns, K - k) * sizeof(at::BFloat16);
      if (bytes < kTileRow) std::memset(to, 0, kTileRow);
      std::memcpy(to, from(k), bytes);
    }
  }

 private:
  Tiles tiles_;
  float* first_ = nullptr;
};

// A step of 16 rows of W as the unit takes it: of each pair of columns the 16 rows side by side.
template <int Bits>
inline void expand_step(const uint8_t* from, [[maybe_unused]] f32v scale, float* to) {
  // Two columns side by side, of numbers whose lower halves are of no account.
  auto put = [&](int64_t row, __m512i first, __m512i second) {
    _mm512_store_si512(to + row * kStrip, _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(first, 16), second));
  };
  if constexpr (Bits == 8) {
    const __m512i byte = _mm512_set1_epi32(0xFF), power = _mm512_castps_si512(_mm512_set1_ps(1 << 23));
    const __m512 zero = _mm512_set1_ps((1 << 23) + 128);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512i four = _mm512_loadu_si512(from + kLine * i);
      auto number = [&](int j) {  // as the last digits of 2^23 and something
        const __m512i large = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(four, 8 * j), byte), power);
        return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(large), zero));
      };
      put(2 * i, number(0), number(1));
      put(2 * i + 1, number(2), number(3));
    }
  } else {
    const __m512 numbers = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    const __m512i half = _mm512_set1_epi32(0x8000);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i eight = _mm512_loadu_si512(from + kLine * i);
      // Of a row's 4 bytes the low nibbles are columns 0 to 3 and the high ones 4 to 7; what is above a nibble is not read.
      auto number = [&](int j) {
        const __m512i nibble = _mm512_srli_epi32(eight, 8 * (j % 4) + 4 * (j / 4));
        const __m512 scaled = _mm512_mul_ps(_mm512_permutexvar_ps(nibble, numbers), (__m512)scale);
        return _mm512_add_epi32(_mm512_castps_si512(scaled), half);
      };
#pragma GCC unroll 4
      for (int j = 0; j < 8; j += 2) put(4 * i + j / 2, number(j), number(j + 1));
    }
  }
}

// Tiles begin .. end - 1 of W: calls emit(m, n, y).
template <int Bits, typename Emit>
void multiply_wide(const Rowed& x, const SmallMatrix& w, int64_t begin, int64_t end, const Emit& emit) {
  constexpr int64_t kBytes = kFixed * kLanes * Bits / 8;
  thread_local Tiles memory;
  alignas(64) float sums[kSummedGroups * kTileUnits];
  // A tile that more rows pass than are summed at once is kept as bf16; else what was multiplied makes room.
  const int64_t groups = x.groups(), kept = groups > kSummedGroups ? x.steps : 2 * kTileParts;
  const int64_t place = groups > kSummedGroups ? -1 : 2 * kTileParts - 1;  // of a step: its bits that tell
  float* wide = memory.of(kept * kTileUnits);
  const uint32_t each = w.group / kFixed;  // steps with a scale; of 32 bits: a division of 64 takes longer than a product
  const UnitInUse unit = unit_for(x.rows);
  for (int64_t t = begin; t < end; ++t) {
    const uint8_t* from = w.quants + t * w.tile_bytes();
    const f32v scale = Bits == 8 ? scales_at<Bits>(w, t, 0) : all(1.f);
    auto expand = [&](int64_t s, float* to) {
#pragma GCC unroll 8
      for (int64_t line = 0; line < kBytes; line += kLine)
        __builtin_prefetch(from + s * kBytes + line + w.tile_bytes(), 0, kNextCache);
      expand_step<Bits>(from + s * kBytes, scales_at<Bits>(w, t, Bits == 8 ? 0 : (uint32_t)s / each), to);
    };
    for (int64_t g = 0; g < groups; g += kSummedGroups) {
      auto expand_some = [&](int64_t i) {
        for (int64_t j = i; j < std::min(i + kTileParts, x.steps); ++j)
          expand(in_parts(j, x.steps), wide + (j & place) * kTileUnits);
        before_tiles();
      };
      if (g == 0) expand_some(0);
      auto at = [&](int64_t i) {
        // One turn ahead: a tile that was just written would be waited for.
        if (g == 0 && i % kTileParts == 0) expand_some(i + kTileParts);
        return TilePair{wide + (i & place) * kTileUnits, x.at(g, in_parts(i, x.steps))};
      };
      with_number<kSummedGroups>(groups - g, [&](auto several) {
        sum_tiles<decltype(several)::value, false>(x.steps, x.steps * kTileBytes, at, sums);
      });
      const int64_t n = t * kLanes, count = std::min(kLanes, w.N - n), last = std::min(x.rows, (g + kSummedGroups) * kGroup);
      for (int64_t m = g * kGroup; m < last; ++m) {
        alignas(64) float y[kLanes];
        store(y, load(sums + (m - g * kGroup) * kLanes) * scale);
        for (int64_t r = 0; r < count; ++r) emit(m, n + r, y[r] + (w.bias ? w.bias[n + r] : 0.f));
      }
    }
  }
}

}  // namespace

#endif
