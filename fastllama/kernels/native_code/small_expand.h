// A W in few bits as the numbers that are meant: number times scale in fp32, rounded to T once.
//
// The specification is kernels/small_product.py: dequantise.

#pragma once

#include "rows.h"
#include "small.h"

namespace {

// Row n of W as K numbers.
template <typename T>
inline void expand_row(const SmallMatrix& w, int64_t n, T* to) {
  const int64_t tile = n / kLanes, lane = n % kLanes, columns = 32 / w.bits;
  const uint8_t* from = w.quants + tile * w.tile_bytes() + lane * 4;
  for (int64_t k = 0; k < w.K; k += columns, from += kLine) {
    const int64_t count = std::min(columns, w.K - k);
    float numbers[8], shared;
    if (w.bits == 8) {
      for (int j = 0; j < 4; ++j) numbers[j] = (float)((int)from[j] - 128);
      shared = ((const float*)w.scales)[tile * kLanes + lane];
    } else {
      for (int j = 0; j < 4; ++j) numbers[j] = (float)((from[j] & 15) - 8), numbers[4 + j] = (float)((from[j] >> 4) - 8);
      shared = float(((const at::Half*)w.scales)[(tile * (w.K / w.group) + k / w.group) * kLanes + lane]);
    }
    for (int64_t j = 0; j < count; ++j) to[k + j] = T(numbers[j] * shared);
  }
}

// 16 finite numbers rounded to T; a processor's own instruction for bf16 would flush the smallest ones to zero.
template <typename T>
inline void put_rounded(f32x16 x, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    __builtin_memcpy(to, &x, sizeof x);
  } else if constexpr (std::is_same_v<T, at::BFloat16>) {
    u32x16 bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#if defined(__AVX512F__)
    const __m256i half = _mm512_cvtepi32_epi16((__m512i)bits);
#else
    const u16x16 half = __builtin_convertvector(bits, u16x16);
#endif
    __builtin_memcpy(to, &half, sizeof half);
  } else {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < 16; ++i) to[i] = T(x[i]);
#endif
  }
}

// 16 unsigned bytes as numbers.
inline i32x16 wide(const uint8_t* bytes) {
#if defined(__AVX512F__)
  return (i32x16)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
#else
  i32x16 numbers;
  for (int i = 0; i < 16; ++i) numbers[i] = bytes[i];
  return numbers;
#endif
}

// The first `rows` rows of a tile as numbers [rows, K]. Row by row, each line of the tile would be read 16 times: 16 lines
// are turned into 16 rows of 64 bytes instead.
template <int Bits, typename T>
void expand_tile(const SmallMatrix& w, int64_t tile, int64_t rows, T* to) {
  constexpr int64_t kColumns = 512 / Bits;  // of 16 lines
  const uint8_t* from = w.quants + tile * w.tile_bytes();
  const int64_t last = w.blocks() * kFixed;
  for (int64_t k = 0; k < last; k += kColumns) {
    const int64_t columns = std::min(kColumns, last - k), lines = columns * Bits / 32;
    f32x16 line[16] = {};
    for (int64_t i = 0; i < lines; ++i, from += kLine) __builtin_memcpy(&line[i], from, kLine);
    alignas(64) float turned[16 * 16], shared[kColumns / kFixed][kLanes];
    transpose16(line, turned, 16);
    for (int64_t b = 0; b < columns / kFixed; ++b) {
      const f32x16 scales = scales_at<Bits>(w, tile, Bits == 8 ? 0 : (k + b * kFixed) / w.group);
      __builtin_memcpy(shared[b], &scales, sizeof scales);
    }
    for (int64_t r = 0; r < rows; ++r) {
      alignas(64) uint8_t bytes[kColumns];
      i32x16 row;
      __builtin_memcpy(&row, turned + r * 16, sizeof row);
      if constexpr (Bits == 8) {
        __builtin_memcpy(bytes, &row, sizeof row);
      } else {
        const i32x16 nibble = i32x16{} + 0x0F0F0F0F, low = row & nibble, high = (row >> 4) & nibble;
        const i32x16 first = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
        const i32x16 both[2] = {__builtin_shuffle(low, high, first), __builtin_shuffle(low, high, first + 8)};
        __builtin_memcpy(bytes, both, sizeof both);
      }
      T* at = to + r * w.K + k;
      for (int64_t c = 0; c < columns; c += 16, at += 16) {
        const f32x16 value = floats(wide(bytes + c) - (1 << (Bits - 1))) * shared[c / kFixed][r];
        if (k + c + 16 <= w.K) {
          put_rounded(value, at);
        } else if (k + c < w.K) {
          T rounded[16];
          put_rounded(value, rounded);
          __builtin_memcpy(at, rounded, (w.K - k - c) * sizeof(T));
        }
      }
    }
  }
}

}  // namespace
