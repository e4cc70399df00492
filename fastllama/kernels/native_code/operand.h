// What a product takes: x in blocks of columns, and W as it lies; and numbers of rows as constants.
//
// Legend: M rows of x, N rows of W, K columns of both.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "tile.h"

namespace {

constexpr int64_t kNear = 32768;          // bytes of x that a block of columns may take: they stay in the first cache
constexpr int64_t kWhole = 32;            // columns of x that no block cuts

// x, cut into blocks of columns that fit the first cache; rows are a line apart, or they would share cache sets.
// One row is one block, as it lies.
template <typename T>
class Operand {
 public:
  using Stored = typename Lane<T>::Stored;
  int64_t rows = 0, columns = 0, width = 0, stride = 0;

  void shape(int64_t M, int64_t K) {
    rows = M, columns = K;
    const int64_t step = kWhole, steps = (K + step - 1) / step;
    const int64_t blocks = M == 1 ? 1 : std::max<int64_t>(1, (M * K * (int64_t)sizeof(Stored) + kNear - 1) / kNear);
    width = (steps + blocks - 1) / blocks * step;
    stride = width + step;
    memory_.resize(((K + width - 1) / width * M * stride + kLine) * sizeof(Stored));
    first_ = (Stored*)(((uintptr_t)memory_.data() + kLine - 1) & ~(uintptr_t)(kLine - 1));
  }
  Stored* at(int64_t m, int64_t k) const { return first_ + (k / width * rows + m) * stride + k % width; }
  // Rounded to T, as the model's own tensors are.
  void put(int64_t m, int64_t k, float value) { *at(m, k) = Stored(T(value)); }
  // Calls work(k, count, where) for each block of row m.
  template <typename Work>
  void blocks(int64_t m, const Work& work) const {
    for (int64_t k = 0; k < columns; k += width) work(k, std::min(width, columns - k), at(m, k));
  }

 private:
  std::vector<char> memory_;
  Stored* first_ = nullptr;
};

template <typename T>
struct Matrix {  // W [N, K] and b [N], which may be null
  const T* weight;
  const T* bias;
  int64_t N, K;
};

// Calls work with a number of 1 .. Most as a constant.
template <int Most, typename Work>
inline void with_number(int64_t number, const Work& work) {
  if constexpr (Most > 1)
    if (number < Most) return with_number<Most - 1>(number, work);
  work(std::integral_constant<int, Most>{});
}

}  // namespace
