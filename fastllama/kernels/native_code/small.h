// y = x W^T + b for a W of 8 or 4 bits a number; for few rows of x, at the speed at which memory gives W.
//
// Legend: M rows of x, N rows of W, K columns of both. W lies in tiles of 16 rows: a line of memory holds, for each of
// the 16, the same 4 columns (8 bits) or 8 columns (4 bits), so no sum is ever taken across a vector.
// x is taken in fixed point: products and sums of a block of 32 columns are exact then. The specification is
// kernels/small_product.py.

#pragma once

#include <array>
#include <utility>

#include "fixed.h"

namespace {

constexpr int64_t kLanes = 16;                      // rows of W in a tile
constexpr int64_t kAtOnce = kVector == 16 ? 8 : 4;  // rows of x that a tile is unpacked for: their sums fit the registers
constexpr int kPieces = kLanes / kVector;           // vectors of a line
constexpr int kTiles = 4;                           // tiles that are read at once, each a stream, where that is faster
constexpr int64_t kTileAhead = 512;                 // bytes that each of them is asked for in advance

// Whether the matrix unit is for W in few bits: products of bytes, and of bf16.
#if defined(FASTLLAMA_UNIT) && defined(FASTLLAMA_BYTES) && defined(__AMX_INT8__)
#define FASTLLAMA_SMALL_UNIT
#endif

struct SmallMatrix {
  const uint8_t* quants = nullptr;
  const void* scales = nullptr;  // float [tiles, 16] for 8 bits, half [tiles, K / group, 16] for 4
  const float* bias = nullptr;
  int64_t N = 0, K = 0, group = 0, groups = 0;  // a group of columns shares a scale; of 8 bits it is all of them
  int bits = 0;

  int64_t blocks() const { return (K + kFixed - 1) / kFixed; }
  int64_t tiles() const { return (N + kLanes - 1) / kLanes; }
  int64_t tile_bytes() const { return blocks() * kFixed * kLanes * bits / 8; }
};

#if defined(FASTLLAMA_BYTES)

// The weights of 16 rows and 32 columns as unsigned bytes: four columns in each of 8 registers.
template <int Bits>
inline void unpack(const uint8_t* from, i32v* w) {
  if constexpr (Bits == 8) {
    __builtin_memcpy(w, from, 8 * sizeof *w);
  } else {
    const i32v nibble = i32v{} + 0x0F0F0F0F;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      i32v both;
      __builtin_memcpy(&both, from + 64 * i, 64);
      w[2 * i] = both & nibble;
      w[2 * i + 1] = (both >> 4) & nibble;
    }
  }
}

// Adds to each lane the products of its 4 unsigned bytes of w and the 4 signed bytes at x.
inline void add_fours(i32v& total, i32v w, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  total = (i32v)_mm512_dpbusd_epi32((__m512i)total, (__m512i)w, _mm512_set1_epi32(four));
}

// The products of 16 rows of W and M rows of x, the first of which is `row`, over block b: times the scales of x. For S tiles:
// part[t * M + m].
template <int Bits, int M, int S>
inline void add_block(const Fixed& x, int64_t row, int64_t b, const uint8_t* const* from, f32v (*part)[kPieces]) {
#pragma GCC unroll 4
  for (int t = 0; t < S; ++t) {
    i32v four[8];
    unpack<Bits>(from[t], four);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const int8_t *high = x.high(row + m, b), *low = x.low(row + m, b);
      i32v above = {}, below = i32v{} - (1 << (Bits - 1)) * x.sum(row + m, b);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) add_fours(above, four[i], high + 4 * i), add_fours(below, four[i], low + 4 * i);
      part[t * M + m][0] += floats(above * 256 + below) * x.scale(row + m, b);
    }
  }
}

#else

// Adds to each lane the products of its two 16-bit integers in w and the two at x.
inline void add_pair(i32v& total, i32v w, const int16_t* x) {
  int32_t pair;
  __builtin_memcpy(&pair, x, 4);
#if defined(__AVX512BW__)
  total += (i32v)_mm512_madd_epi16((__m512i)w, _mm512_set1_epi32(pair));
#elif defined(FASTLLAMA_AVX2)
  total += (i32v)_mm256_madd_epi16((__m256i)w, _mm256_set1_epi32(pair));
#else
  total += (w << 16 >> 16) * (int32_t)x[0] + (w >> 16) * (int32_t)x[1];
#endif
}

// As above, for processors that sum products of 16-bit integers, and for S tiles: part[t * M + m]. A lane's 4 bytes are
// columns 0 to 3 of 8 bits, or 0 to 3 in the low nibbles and 4 to 7 in the high ones; bytes 0 and 2 come apart as one pair,
// 1 and 3 as another.
template <int Bits, int M, int S>
inline void add_block(const Fixed& x, int64_t row, int64_t b, const uint8_t* const* from, f32v (*part)[kPieces]) {
  constexpr int kEach = 32 / Bits, kLines = kFixed / kEach;  // columns of a line, and lines
  i32v totals[S * M][kPieces];
#pragma GCC unroll 8
  for (int i = 0; i < S * M; ++i)
#pragma GCC unroll 2
    for (int h = 0; h < kPieces; ++h) totals[i][h] = i32v{} - (1 << (Bits - 1)) * x.sum(row + i % M, b);
#pragma GCC unroll 1  // unrolled, gcc puts off all sums until the products are done, and keeps those in memory
  for (int line = 0; line < kLines; ++line)
#pragma GCC unroll 4
    for (int t = 0; t < S; ++t)
#pragma GCC unroll 2
      for (int h = 0; h < kPieces; ++h) {
        i32v w;
        __builtin_memcpy(&w, from[t] + line * kLine + h * sizeof w, sizeof w);
        const i32v keep = i32v{} + (Bits == 8 ? 0x00FF00FF : 0x000F000F);
#pragma GCC unroll 4
        for (int pair = 0; pair < kEach / 2; ++pair) {
          // Of 4 bits they are columns 0 and 2, 4 and 6, 1 and 3, 5 and 7; x has the second of these pairs behind the third.
          const i32v two = (w >> (Bits == 8 ? 8 * pair : 4 * pair)) & keep;
          constexpr int kOrder[4] = {0, 2, 1, 3};
          const int at = Bits == 8 ? pair : kOrder[pair];
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) add_pair(totals[t * M + m][h], two, x.pairs(row + m, b) + line * kEach + 2 * at);
        }
      }
#pragma GCC unroll 8
  for (int i = 0; i < S * M; ++i)
#pragma GCC unroll 2
    for (int h = 0; h < kPieces; ++h) part[i][h] += floats(totals[i][h]) * x.scale(row + i % M, b);
}

#endif

// 16 scales of a tile's group, in vectors.
template <int Bits>
inline f32v scales_at(const SmallMatrix& w, int64_t tile, int64_t group, int part = 0) {
  if constexpr (Bits == 8) return load((const float*)w.scales + tile * kLanes + kVector * part);
  else return widened((const at::Half*)w.scales + (tile * w.groups + group) * kLanes + kVector * part);
}

// S tiles of W: y[t * M + m] = the 16 products of tile t with each of M rows of x, the first of which is `row`.
template <int Bits, int M, int S = 1>
void small_tile(const Fixed& x, int64_t row, const SmallMatrix& w, int64_t tile, f32v (*y)[kPieces]) {
  constexpr int64_t kBytes = kFixed * kLanes * Bits / 8;
  const uint8_t* from[S];
  for (int t = 0; t < S; ++t) from[t] = w.quants + (tile + t) * w.tile_bytes();
  const int64_t whole = w.blocks(), each = Bits == 8 ? whole : w.group / kFixed;
  f32v sums[S * M][kPieces] = {};
  for (int64_t first = 0, group = 0; first < whole; first += each, ++group) {
    f32v part[S * M][kPieces] = {};
    for (int64_t b = first; b < first + each; ++b) {
      if constexpr (S == 1 || kVector == 16)  // elsewhere the processor looks ahead of several streams by itself
#pragma GCC unroll 4
        for (int t = 0; t < S; ++t)
#pragma GCC unroll 8
          for (int64_t line = 0; line < kBytes; line += kLine)
            __builtin_prefetch(from[t] + line + (S == 1 ? kAhead : kTileAhead), 0, kNextCache);
      add_block<Bits, M, S>(x, row, b, from, part);
#pragma GCC unroll 4
      for (int t = 0; t < S; ++t) from[t] += kBytes;
    }
#pragma GCC unroll 8
    for (int i = 0; i < S * M; ++i)
#pragma GCC unroll 2
      for (int h = 0; h < kPieces; ++h) sums[i][h] += part[i][h] * scales_at<Bits>(w, tile + i / M, group, h);
  }
  for (int i = 0; i < S * M; ++i)
    for (int h = 0; h < kPieces; ++h) y[i][h] = sums[i][h];
}

template <int Bits, int... M>
constexpr auto small_tiles(std::integer_sequence<int, M...>) {
  return std::array{&small_tile<Bits, M + 1>...};
}

// Tiles begin .. end - 1 of W: calls emit(m, n, y).
template <typename Emit>
void multiply_small(const Fixed& x, const SmallMatrix& w, int64_t begin, int64_t end, const Emit& emit) {
  constexpr auto eight = small_tiles<8>(std::make_integer_sequence<int, kAtOnce>{});
  constexpr auto four = small_tiles<4>(std::make_integer_sequence<int, kAtOnce>{});
  const int64_t passes = (x.rows + kAtOnce - 1) / kAtOnce;
  f32v y[kAtOnce][kPieces];
  auto give = [&](int64_t m, int64_t tile, const f32v* products) {
    for (int64_t r = 0; r < std::min(kLanes, w.N - tile * kLanes); ++r) {
      const int64_t n = tile * kLanes + r;
      emit(m, n, products[r / kVector][r % kVector] + (w.bias ? w.bias[n] : 0.f));
    }
  };
  int64_t t = begin;
  auto several = [&](auto bits) {
    for (; t + kTiles <= end; t += kTiles) {
      f32v products[kTiles][kPieces];
      small_tile<decltype(bits)::value, 1, kTiles>(x, 0, w, t, products);
      for (int i = 0; i < kTiles; ++i) give(0, t + i, products[i]);
    }
  };
  // One row waits for memory: see `reads_in_streams`. In 4 bits it does not where sums are of 16-bit integers.
  if (x.rows == 1 && reads_in_streams()) {
    if (w.bits == 8) several(std::integral_constant<int, 8>{});
    else if constexpr (kVector == 16) several(std::integral_constant<int, 4>{});
  }
  for (; t < end; ++t) {
    for (int64_t p = 0; p < passes; ++p) {  // a tile stays in the cache while all rows pass
      const int64_t row = x.rows * p / passes, rows = x.rows * (p + 1) / passes - row;
      (w.bits == 8 ? eight : four)[rows - 1](x, row, w, t, y);
      for (int64_t m = 0; m < rows; ++m) give(row + m, t, y[m]);
    }
  }
}

}  // namespace
