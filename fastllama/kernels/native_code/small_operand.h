// y = x W^T + b for a W in few bits: in vectors or in the matrix unit, by what W is and how many rows of x there are.
//
// Legend: M rows of x, N rows of W, K columns of both.

#pragma once

#include "small_digits.h"
#include "small_wide.h"

namespace {

// Rows of x in bf16 up to which three products of digits take less than one of bf16 and making W bf16 for it.
constexpr int64_t kMostInDigits = 16;

// x as the product with W takes it.
class SmallOperand {
 public:
  // For M rows of T.
  template <typename T>
  void shape(const SmallMatrix& w, int64_t M) {
    columns_ = w.K, way_ = Way::vectors;
#if defined(FASTLLAMA_SMALL_UNIT)
    constexpr bool kIsBf16 = std::is_same_v<T, at::BFloat16>;
    if (has_unit()) {
      if (w.bits == 8 && w.K <= kMostColumns && (M <= kMostInDigits || !kIsBf16)) way_ = Way::digits;
      else if (kIsBf16 && M > kAtOnce) way_ = Way::wide;
    }
    if (way_ == Way::digits) return digits_.shape(M, w.K);
    if (way_ == Way::wide) return rowed_.shape(M, w.K);
#endif
    fixed_.shape(M, w.K);
  }

  // Row m: from(k) tells where its columns from k on begin, for each k that is a multiple of 32.
  template <typename From>
  void put(int64_t m, const From& from) {
    auto widen = [&](int64_t k, float* to) {
      const auto* numbers = from(k);
      const int64_t count = std::min(kFixed, columns_ - k);
      for (int64_t i = 0; i < count; ++i) to[i] = float(numbers[i]);
      std::fill(to + count, to + kFixed, 0.f);
    };
#if defined(FASTLLAMA_SMALL_UNIT)
    if constexpr (std::is_same_v<std::remove_cvref_t<decltype(*from(0))>, at::BFloat16>)
      if (way_ == Way::wide) return rowed_.put(m, columns_, from);
    if (way_ == Way::digits) {
      thread_local std::vector<float> row;
      row.assign(digits_.steps * kDigitColumns, 0.f);
      for (int64_t k = 0; k < columns_; k += kFixed) widen(k, &row[k]);
      return digits_.put(m, row.data());
    }
#endif
    for (int64_t k = 0; k < columns_; k += kFixed) {
      float block[kFixed];
      widen(k, block);
      fixed_.put(m, k / kFixed, block);
    }
  }

  // Tiles begin .. end - 1 of W: calls emit(m, n, y).
  template <typename Emit>
  void multiply(const SmallMatrix& w, int64_t begin, int64_t end, const Emit& emit) const {
#if defined(FASTLLAMA_SMALL_UNIT)
    if (way_ == Way::digits) return multiply_digits(digits_, w, begin, end, emit);
    if (way_ == Way::wide && w.bits == 8) return multiply_wide<8>(rowed_, w, begin, end, emit);
    if (way_ == Way::wide) return multiply_wide<4>(rowed_, w, begin, end, emit);
#endif
    multiply_small(fixed_, w, begin, end, emit);
  }

 private:
  enum class Way { vectors, digits, wide };
  Way way_ = Way::vectors;
  int64_t columns_ = 0;
  Fixed fixed_;
#if defined(FASTLLAMA_SMALL_UNIT)
  Digits digits_;
  Rowed rowed_;
#endif
};

}  // namespace
