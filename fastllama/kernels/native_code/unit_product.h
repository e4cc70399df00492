// y = x W^T + b for rows of x in bf16, in the processor's matrix unit.
//
// Legend: M rows of x, N rows of W, K columns of both.

#pragma once

#include "matrix_unit.h"
#include "operand.h"

#if defined(FASTLLAMA_UNIT)

namespace {

constexpr int64_t kUnitRows = 4;  // of x, from which on the unit is faster than vectors

// Rows begin .. end - 1 of W: calls emit(m, n, y). Each thread pairs x for itself: that takes less than waiting for one
// another.
template <typename Emit>
void multiply_in_unit(const Operand<at::BFloat16>& x, const Matrix<at::BFloat16>& w, int64_t begin, int64_t end,
                      const Emit& emit) {
  thread_local Paired paired;
  thread_local Tiles memory;
  paired.shape(x.rows, x.columns);
  const int64_t groups = paired.groups();
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t s = 0, k = 0; s < paired.steps; ++s, k += kStepColumns)
      paired.put(g, s, x.columns - k, [&](int64_t m) { return x.at(m, k); });
  const UnitInUse unit(summing(paired.width));
  for (int64_t n = begin; n < end; n += kStrip) {
    const bool is_whole = n + kStrip <= end && w.K % kStepColumns == 0;
    const Strip strip = is_whole ? Strip{(const char*)(w.weight + n * w.K), w.K * 2, kTileRow}
                                 : padded(w.weight, end, w.K, n, memory);
    for (int64_t g = 0; g < groups; g += kSummedGroups) {
      alignas(64) float sums[kSummedGroups * kTileUnits];
      with_number<kSummedGroups>(groups - g, [&](auto count) {
        sum_groups<decltype(count)::value>(strip, paired, g, sums);
      });
      const int64_t rows = std::min(kStrip, end - n);
      for (int64_t of = g; of < std::min(groups, g + kSummedGroups); ++of) {
        alignas(64) float turned[kTileUnits];  // [16 rows of x, 16 of W]
        f32v each[kStrip];
        const float* from = sums + (of - g) * kTileUnits;
        for (int64_t r = 0; r < kStrip; ++r, from += paired.width)
          each[r] = (f32v)_mm512_maskz_loadu_ps(paired.width == kGroup ? 0xFFFF : 0xFF, from);
        transpose(each, turned, kStrip);
        for (int64_t i = 0, m = of * kGroup; i < std::min(kGroup, x.rows - m); ++i)
          for (int64_t r = 0; r < rows; ++r)
            emit(m + i, n + r, turned[i * kStrip + r] + (w.bias ? float(w.bias[n + r]) : 0.f));
      }
    }
  }
}

}  // namespace

#endif
