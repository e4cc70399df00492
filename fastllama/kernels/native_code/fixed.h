// Rows of x in fixed point: 16 bits and a scale for 32 columns, finer than bf16 is against the largest of the 32.
//
// Legend: M rows of x, K columns; b a block of 32 columns.

#pragma once

#include "product.h"

// Whether the processor sums products of bytes; else it sums those of 16-bit integers.
#if defined(__AVX512VNNI__)
#define FASTLLAMA_BYTES
#endif

namespace {

constexpr int64_t kFixed = 32;        // columns of x that share a scale
constexpr float kMost = 32639;        // 127 x 256 + 127: the largest number of two signed bytes
constexpr float kLeast = 1e-34f;      // where all of a block's numbers are smaller, it counts as zero

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

// x in fixed point: number = integer x scale. Processors that sum products of bytes get each integer as two,
// 256 high + low, and others as it is, the first of each four beside the third and the second beside the fourth.
class Fixed {
 public:
  int64_t rows = 0;

  void shape(int64_t M, int64_t K) {
    rows = M, blocks_ = (K + kFixed - 1) / kFixed;
#if defined(FASTLLAMA_BYTES)
    high_.resize(M * blocks_ * kFixed);
    low_.resize(M * blocks_ * kFixed);
#else
    integers_.resize(M * blocks_ * kFixed);
#endif
    scale_.resize(M * blocks_);
    sum_.resize(M * blocks_);
  }
#if defined(FASTLLAMA_BYTES)
  const int8_t* high(int64_t m, int64_t b) const { return &high_[(m * blocks_ + b) * kFixed]; }
  const int8_t* low(int64_t m, int64_t b) const { return &low_[(m * blocks_ + b) * kFixed]; }
#else
  const int16_t* pairs(int64_t m, int64_t b) const { return &integers_[(m * blocks_ + b) * kFixed]; }
#endif
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
#if defined(FASTLLAMA_BYTES)
      const int32_t low = (int8_t)value;
      low_[at * kFixed + i] = (int8_t)low;
      high_[at * kFixed + i] = (int8_t)((value - low) >> 8);
#else
      constexpr int kPlace[4] = {0, 2, 1, 3};
      integers_[at * kFixed + i / 4 * 4 + kPlace[i % 4]] = (int16_t)value;
#endif
      total += value;
    }
    sum_[at] = total;
    scale_[at] = finite ? (some ? most / kMost : 0.f) : std::numeric_limits<float>::quiet_NaN();
  }

 private:
  int64_t blocks_ = 0;
#if defined(FASTLLAMA_BYTES)
  std::vector<int8_t> high_, low_;
#else
  std::vector<int16_t> integers_;
#endif
  std::vector<float> scale_;
  std::vector<int32_t> sum_;
};

}  // namespace
