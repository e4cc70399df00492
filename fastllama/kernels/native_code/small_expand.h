// A W in few bits as the numbers that are meant: number times scale in fp32, rounded to T once.
//
// The specification is kernels/small_product.py: dequantise.

#pragma once

#include "rounding.h"
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
      shared = float(((const at::Half*)w.scales)[(tile * w.groups + k / w.group) * kLanes + lane]);
    }
    for (int64_t j = 0; j < count; ++j) to[k + j] = T(numbers[j] * shared);
  }
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
    alignas(64) float turned[16 * 16], shared[kColumns / kFixed][kLanes];
    for (int part = 0; part < kPieces; ++part) {
      for (int64_t i = 0; i < 16; i += kVector) {
        f32v line[kVector] = {};
        for (int64_t j = i; j < std::min(i + kVector, lines); ++j)
          line[j - i] = load((const float*)(from + j * kLine) + kVector * part);
        transpose(line, turned + kVector * part * 16 + i, 16);
      }
      for (int64_t b = 0; b < columns / kFixed; ++b)
        store(shared[b] + kVector * part, scales_at<Bits>(w, tile, Bits == 8 ? 0 : (k + b * kFixed) / w.group, part));
    }
    from += lines * kLine;
    for (int64_t r = 0; r < rows; ++r) {
      alignas(64) uint8_t bytes[kColumns];
      if constexpr (Bits == 8) {
        __builtin_memcpy(bytes, turned + r * 16, sizeof bytes);
      } else {
        for (int64_t i = 0; i < 16; i += kVector) {
          i32v row;
          __builtin_memcpy(&row, turned + r * 16 + i, sizeof row);
          const i32v nibble = i32v{} + 0x0F0F0F0F, low = row & nibble, high = (row >> 4) & nibble;
#if defined(__AVX512F__)
          const i32v first = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
#else
          const i32v first = {0, 8, 1, 9, 2, 10, 3, 11};
#endif
          const i32v both[2] = {__builtin_shuffle(low, high, first), __builtin_shuffle(low, high, first + kVector / 2)};
          __builtin_memcpy(bytes + 8 * i, both, sizeof both);
        }
      }
      T* at = to + r * w.K + k;
      for (int64_t c = 0; c < columns; c += kVector, at += kVector) {
        const f32v value = floats(widened(bytes + c) - (1 << (Bits - 1))) * shared[c / kFixed][r];
        if (k + c + kVector <= w.K) {
          put_rounded(value, at);
        } else if (k + c < w.K) {
          T rounded[kVector];
          put_rounded(value, rounded);
          __builtin_memcpy(at, rounded, (w.K - k - c) * sizeof(T));
        }
      }
    }
  }
}

}  // namespace
