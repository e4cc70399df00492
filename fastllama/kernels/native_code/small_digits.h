// y = x W^T + b for a W of 8 bits, in the processor's matrix unit: sums of products of bytes, which are exact.
//
// Legend: M rows of x, N rows of W, K columns of both. A step is 64 columns, a group 16 rows of digits.
// Each row of x is three of digits, number = (65536 first + 256 second + third) x scale, so as fine as fp32 is against the
// row's largest number. A tile of W is a step of 16 rows as it lies.

#pragma once

#include "small_sums.h"

#if defined(FASTLLAMA_SMALL_UNIT)

namespace {

constexpr int64_t kDigits = 3;
constexpr int64_t kDigitColumns = 64;
constexpr int64_t kDigitRows = kSummedGroups * kGroup / kDigits;  // rows of x that are summed while a tile of W passes
constexpr int64_t kMostColumns = 65536;                          // of which a sum fits 32 bits
constexpr float kMostOfDigits = 8355584;                         // 127 x 65536 + 127 x 256: no digit is above 127
constexpr float kLeastOfRow = 1e-31f;                            // where all of a row is smaller, it counts as zero

class Digits {
 public:
  int64_t rows = 0, steps = 0;

  void shape(int64_t M, int64_t K) {
    rows = M, steps = (K + kDigitColumns - 1) / kDigitColumns;
    const int64_t last = (M - 1) % kDigitRows + 1;
    first_ = (int8_t*)tiles_.of(((M - 1) / kDigitRows * kSummedGroups + groups_of(last)) * steps * kTileUnits);
    scale_.resize(M);
    sums_.resize(M * kDigits);
  }
  static int64_t groups_of(int64_t rows) { return (rows * kDigits + kGroup - 1) / kGroup; }
  const int8_t* at(int64_t group, int64_t step) const { return first_ + (group * steps + step) * kTileBytes; }
  float scale(int64_t m) const { return scale_[m]; }
  int32_t sum(int64_t m, int64_t digit) const { return sums_[m * kDigits + digit]; }

  // Row m from K numbers and zeros to a whole step. What is not finite makes the row, and all that is computed from it, NaN.
  void put(int64_t m, const float* x) {
    __m512i top = {};
    for (int64_t k = 0; k < steps * kDigitColumns; k += kVector)
      top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_loadu_si512(x + k), _mm512_set1_epi32(0x7fffffff)));
    const uint32_t bits = _mm512_reduce_max_epu32(top);
    float most;
    __builtin_memcpy(&most, &bits, 4);
    const bool finite = bits < 0x7f800000u, some = finite && most >= kLeastOfRow;
    const __m512 factor = _mm512_set1_ps(some ? kMostOfDigits / most : 0.f);
    int8_t* to[kDigits];
    for (int64_t d = 0; d < kDigits; ++d) {
      const int64_t row = m % kDigitRows * kDigits + d, group = m / kDigitRows * kSummedGroups + row / kGroup;
      to[d] = const_cast<int8_t*>(at(group, 0)) + row % kGroup * kDigitColumns;
    }
    __m512i totals[kDigits] = {};
    for (int64_t k = 0; k < steps * kDigitColumns; k += kVector) {
      const int64_t place = k / kDigitColumns * kTileBytes + k % kDigitColumns;
      __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), factor));
      if (!some) value = __m512i{};
#pragma GCC unroll 3
      for (int d = kDigits - 1; d >= 0; --d) {
        const __m512i digit = _mm512_srai_epi32(_mm512_slli_epi32(value, 24), 24);
        _mm_store_si128((__m128i*)(to[d] + place), _mm512_cvtepi32_epi8(digit));
        totals[d] = _mm512_add_epi32(totals[d], digit);
        value = _mm512_srai_epi32(_mm512_sub_epi32(value, digit), 8);
      }
    }
    for (int64_t d = 0; d < kDigits; ++d) sums_[m * kDigits + d] = _mm512_reduce_add_epi32(totals[d]);
    scale_[m] = finite ? (some ? most / kMostOfDigits : 0.f) : std::numeric_limits<float>::quiet_NaN();
  }

 private:
  Tiles tiles_;
  int8_t* first_ = nullptr;
  std::vector<float> scale_;
  std::vector<int32_t> sums_;
};

// Tiles begin .. end - 1 of W, of 8 bits: calls emit(m, n, y). Few rows of x pass two tiles at a time, each in two parts: so
// memory gives 1.04 to 1.12 times as much as by one tile in four.
template <typename Emit>
void multiply_digits(const Digits& x, const SmallMatrix& w, int64_t begin, int64_t end, const Emit& emit) {
  alignas(64) int32_t sums[kSummedGroups * kTileUnits];
  alignas(64) uint8_t last[2][kTileBytes] = {};
  const int64_t half = w.blocks() % 2 * kFixed * kLanes;  // bytes of a last step that is not whole
  const int64_t bytes = w.tile_bytes(), next = x.steps * kTileBytes;
  // Products of rows m0 .. m0 + count - 1 and of tile t.
  auto give = [&](int64_t t, int64_t m0, int64_t count, const int32_t* sums) {
    const f32v scale = scales_at<8>(w, t, 0);
    const int64_t n = t * kLanes, numbers = std::min(kLanes, w.N - n);
    for (int64_t m = m0; m < m0 + count; ++m) {
      auto total = [&](int64_t d) {
        i32v digits;
        __builtin_memcpy(&digits, sums + ((m - m0) * kDigits + d) * kLanes, sizeof digits);
        return floats(digits - 128 * x.sum(m, d));
      };
      alignas(64) float y[kLanes];
      store(y, (total(0) * 65536.f + (total(1) * 256.f + total(2))) * (scale * x.scale(m)));
      for (int64_t r = 0; r < numbers; ++r) emit(m, n + r, y[r] + (w.bias ? w.bias[n + r] : 0.f));
    }
  };
  auto fill_up = [&](const uint8_t* from, uint8_t* to) {
    if (half) std::memcpy(to, from + bytes - half, half);
  };
  const UnitInUse unit = unit_for(x.rows * kDigits);
  int64_t t = begin;
  const int64_t groups = Digits::groups_of(x.rows);
  for (; groups <= kSummedGroups / 2 && t + 2 <= end; t += 2) {
    const uint8_t* from = w.quants + t * bytes;
    for (int i = 0; i < 2; ++i) fill_up(from + i * bytes, last[i]);
    auto at = [&](int64_t i) {
      const int64_t s = in_parts<2>(i, x.steps);
      const uint8_t* tile = from + s * kTileBytes;
      ask_behind(tile, 2 * bytes);
      ask_behind(tile, 3 * bytes);
      const bool is_half = half && s + 1 == x.steps;
      return TilePair{is_half ? last[0] : tile, x.at(0, s), is_half ? kTileBytes : bytes};
    };
    with_number<kSummedGroups / 2>(groups, [&](auto several) {
      sum_two_tiles<decltype(several)::value>(x.steps, next, at, sums);
    });
    for (int i = 0; i < 2; ++i) give(t + i, 0, x.rows, sums + i * groups * kTileUnits);
  }
  for (; t < end; ++t) {
    const uint8_t* from = w.quants + t * bytes;
    fill_up(from, last[0]);
    for (int64_t m0 = 0; m0 < x.rows; m0 += kDigitRows) {
      const int64_t count = std::min(kDigitRows, x.rows - m0), group = m0 / kDigitRows * kSummedGroups;
      auto at = [&](int64_t i) {
        const int64_t s = in_parts(i, x.steps);
        const uint8_t* tile = from + s * kTileBytes;
        if (m0 == 0) ask_behind(tile, bytes);
        return TilePair{half && s + 1 == x.steps ? last[0] : tile, x.at(group, s)};
      };
      with_number<kSummedGroups>(Digits::groups_of(count), [&](auto several) {
        sum_tiles<decltype(several)::value, true>(x.steps, next, at, sums);
      });
      give(t, m0, count, sums);
    }
  }
}

}  // namespace

#endif
