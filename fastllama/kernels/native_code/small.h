// y = x W^T + b for a W of 8 or 4 bits a number; for few rows of x, at the speed at which memory gives W.
//
// Legend: M rows of x, N rows of W, K columns of both. W lies in tiles of 16 rows: a line of memory holds, for each of
// the 16, the same 4 columns (8 bits) or 8 columns (4 bits), so no sum is ever taken across a vector.
// x is taken in fixed point, 16 bits and a scale for 32 columns: finer than bf16 is against the largest of the 32. Products
// and sums of a block are exact then. The specification is kernels/small_product.py.

#pragma once

#include <array>
#include <utility>

#include "product.h"

namespace {

constexpr int64_t kFixed = 32;        // columns of x that share a scale
constexpr float kMost = 32639;        // 127 x 256 + 127: the largest number of two signed bytes
constexpr float kLeast = 1e-34f;      // where all of a block's numbers are smaller, it counts as zero
constexpr int64_t kLanes = 16;        // rows of W in a tile
constexpr int64_t kAtOnce = 8;        // rows of x that a tile is unpacked for

typedef int32_t i32x16 __attribute__((vector_size(64)));

struct SmallMatrix {
  const uint8_t* quants = nullptr;
  const void* scales = nullptr;  // float [tiles, 16] for 8 bits, half [tiles, K / group, 16] for 4
  const float* bias = nullptr;
  int64_t N = 0, K = 0, group = 0;
  int bits = 0;

  int64_t blocks() const { return (K + kFixed - 1) / kFixed; }
  int64_t tiles() const { return (N + kLanes - 1) / kLanes; }
  int64_t tile_bytes() const { return blocks() * kFixed * kLanes * bits / 8; }
};

// Whether every number is one; by their bits, which no flag of the build lets the compiler assume anything about.
inline bool are_finite(const float* x, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, x + i, 4);
    most = std::max(most, bits & 0x7fffffffu);
  }
  return most < 0x7f800000u;
}

// x in fixed point: number = (256 high + low) scale.
class Fixed {
 public:
  int64_t rows = 0;

  void shape(int64_t M, int64_t K) {
    rows = M, blocks_ = (K + kFixed - 1) / kFixed;
    high_.resize(M * blocks_ * kFixed);
    low_.resize(M * blocks_ * kFixed);
    scale_.resize(M * blocks_);
    sum_.resize(M * blocks_);
  }
  const int8_t* high(int64_t m, int64_t b) const { return &high_[(m * blocks_ + b) * kFixed]; }
  const int8_t* low(int64_t m, int64_t b) const { return &low_[(m * blocks_ + b) * kFixed]; }
  float scale(int64_t m, int64_t b) const { return scale_[m * blocks_ + b]; }
  int32_t sum(int64_t m, int64_t b) const { return sum_[m * blocks_ + b]; }

  // Block b of row m from 32 numbers. What is not finite makes the block, and all that is computed from it, NaN.
  void put(int64_t m, int64_t b, const float* x) {
    const int64_t at = m * blocks_ + b;
    float most = 0;
    for (int i = 0; i < kFixed; ++i) most = std::max(most, std::fabs(x[i]));
    const bool finite = are_finite(x, kFixed), some = finite && most >= kLeast;
    const float inverse = some ? kMost / most : 0.f;
    int32_t total = 0;
    for (int i = 0; i < kFixed; ++i) {
      const int32_t value = some ? (int32_t)std::nearbyint(x[i] * inverse) : 0;
      const int32_t low = (int8_t)value;
      low_[at * kFixed + i] = (int8_t)low;
      high_[at * kFixed + i] = (int8_t)((value - low) >> 8);
      total += value;
    }
    sum_[at] = total;
    scale_[at] = finite ? (some ? most / kMost : 0.f) : std::numeric_limits<float>::quiet_NaN();
  }

 private:
  int64_t blocks_ = 0;
  std::vector<int8_t> high_, low_;
  std::vector<float> scale_;
  std::vector<int32_t> sum_;
};

// A row of K numbers of any kind, in blocks that are filled up with zeros.
template <typename T>
inline void take_row(Fixed& to, int64_t m, const T* x, int64_t K) {
  float block[kFixed];
  for (int64_t k = 0; k < K; k += kFixed) {
    const int64_t count = std::min(kFixed, K - k);
    for (int64_t i = 0; i < count; ++i) block[i] = float(x[k + i]);
    std::fill(block + count, block + kFixed, 0.f);
    to.put(m, k / kFixed, block);
  }
}

// All rows of x as another product's operand holds them.
template <typename T>
inline void take_rows(Fixed& to, const Operand<T>& x) {
  static_assert(kWhole % kFixed == 0);
  to.shape(x.rows, x.columns);
  for (int64_t m = 0; m < x.rows; ++m)
    for (int64_t k = 0; k < x.columns; k += kFixed) {
      const auto* from = x.at(m, k);
      float block[kFixed] = {};
      for (int64_t i = 0; i < std::min(kFixed, x.columns - k); ++i) block[i] = float(from[i]);
      to.put(m, k / kFixed, block);
    }
}

// The weights of 16 rows and 32 columns as unsigned bytes: four columns in each of 8 registers.
template <int Bits>
inline void unpack(const uint8_t* from, i32x16* w) {
  if constexpr (Bits == 8) {
    __builtin_memcpy(w, from, 8 * sizeof *w);
  } else {
    const i32x16 nibble = i32x16{} + 0x0F0F0F0F;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      i32x16 both;
      __builtin_memcpy(&both, from + 64 * i, 64);
      w[2 * i] = both & nibble;
      w[2 * i + 1] = (both >> 4) & nibble;
    }
  }
}

// Adds to each lane the products of its 4 unsigned bytes of w and the 4 signed bytes at x.
inline void add_fours(i32x16& total, i32x16 w, const int8_t* x) {
#if defined(__AVX512VNNI__)
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  total = (i32x16)_mm512_dpbusd_epi32((__m512i)total, (__m512i)w, _mm512_set1_epi32(four));
#else
  for (int j = 0; j < 4; ++j) total += ((w >> (8 * j)) & 0xFF) * (int32_t)x[j];
#endif
}

inline f32x16 floats(i32x16 v) { return __builtin_convertvector(v, f32x16); }

// The 16 scales of a tile's group.
template <int Bits>
inline f32x16 scales_at(const SmallMatrix& w, int64_t tile, int64_t group) {
  if constexpr (Bits == 8) return Wide<float>::stored((const float*)w.scales + tile * kLanes);
  else return Wide<at::Half>::weight((const at::Half*)w.scales + (tile * (w.K / w.group) + group) * kLanes);
}

// One tile of W: y[m] = its 16 products with each of M rows of x, the first of which is `row`.
template <int Bits, int M>
void small_tile(const Fixed& x, int64_t row, const SmallMatrix& w, int64_t tile, f32x16* y) {
  constexpr int64_t kBytes = kFixed * kLanes * Bits / 8;
  const uint8_t* from = w.quants + tile * w.tile_bytes();
  const int64_t whole = w.blocks(), each = Bits == 8 ? whole : w.group / kFixed;
  f32x16 sums[M] = {};
  for (int64_t first = 0; first < whole; first += each) {
    f32x16 part[M] = {};
    for (int64_t b = first; b < first + each; ++b, from += kBytes) {
#pragma GCC unroll 8
      for (int64_t line = 0; line < kBytes; line += kLine) __builtin_prefetch(from + line + kAhead, 0, kNextCache);
      i32x16 four[8];
      unpack<Bits>(from, four);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const int8_t *high = x.high(row + m, b), *low = x.low(row + m, b);
        i32x16 above = {}, below = i32x16{} - (1 << (Bits - 1)) * x.sum(row + m, b);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) add_fours(above, four[i], high + 4 * i), add_fours(below, four[i], low + 4 * i);
        part[m] += floats(above * 256 + below) * x.scale(row + m, b);
      }
    }
    const f32x16 shared = scales_at<Bits>(w, tile, first / each);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[m] += part[m] * shared;
  }
  for (int m = 0; m < M; ++m) y[m] = sums[m];
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
  f32x16 y[kAtOnce];
  for (int64_t t = begin; t < end; ++t) {
    const int64_t last = std::min(kLanes, w.N - t * kLanes);
    for (int64_t p = 0; p < passes; ++p) {  // a tile stays in the cache while all rows pass
      const int64_t row = x.rows * p / passes, rows = x.rows * (p + 1) / passes - row;
      (w.bits == 8 ? eight : four)[rows - 1](x, row, w, t, y);
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t r = 0; r < last; ++r) {
          const int64_t n = t * kLanes + r;
          emit(row + m, n, y[m][r] + (w.bias ? w.bias[n] : 0.f));
        }
    }
  }
}

}  // namespace
