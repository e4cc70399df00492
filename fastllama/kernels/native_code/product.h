// y = x W^T + b for few rows of x, at the speed at which memory gives W.
//
// Legend: M rows of x, N rows of W, K columns of both. W is read once, as it lies; x is small and stays in the cache.
// Sums are kept in fp32. The specification is torch.nn.functional.linear in fp32.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t kLine = 64;             // bytes that memory moves at once
constexpr int64_t kAhead = 8192;          // bytes that a single stream is asked for in advance
constexpr int64_t kNear = 32768;          // bytes of x that a block of columns may take: they stay in the first cache
// Where a line is put that is asked for: the second cache has many more requests under way at once than the first.
constexpr int kNextCache = 2;
constexpr int kTile = 4;                  // rows of W in a tile
constexpr int kStreams = 8;               // rows of W that one row of x is multiplied with at once, where that is faster
constexpr int64_t kWhole = 32;            // columns of x that no block cuts
constexpr int64_t kChunk = 32;            // rows of W whose sums are kept while the blocks of columns pass

// How a type is loaded and multiplied: a Register holds one step of kStep numbers. Here it is widened as it is read.
template <typename T>
struct Wide {
  using Stored = float;
  using Register = f32v;
  static constexpr int kStep = kVector;
  // Rows of x in a tile: with 4 weights, 24 sums fit AVX-512's 32 registers, and 12 the 16 that others have.
  static constexpr int kWide = kVector == 16 ? 6 : 3;
  static Register stored(const float* p) { return load(p); }
  static Register weight(const T* p) { return widened(p); }
  static void add(f32v& total, Register w, Register x) { total += w * x; }
  // One load for a tile: the compiler would fold a load into each product.
  static void keep([[maybe_unused]] Register& x) {
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#elif defined(FASTLLAMA_AVX2)
    asm("" : "+x"(x));
#endif
  }
};

template <typename T>
struct Lane : Wide<T> {};

// Whether the processor multiplies T in pairs.
template <typename T>
constexpr bool kInPairs = false;

#if defined(__AVX512BF16__)
template <>
constexpr bool kInPairs<at::BFloat16> = true;

template <>
struct Lane<at::BFloat16> {  // pairs of products, summed in fp32 by the processor
  using Stored = at::BFloat16;
  using Register = __m512bh;
  static constexpr int kStep = 32, kWide = 6;
  static Register stored(const at::BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Register weight(const at::BFloat16* p) { return stored(p); }
  static void add(f32v& total, Register w, Register x) {
    total = (f32v)_mm512_dpbf16_ps((__m512)total, w, x);
  }
  static void keep(Register& x) { asm("" : "+v"(x)); }
};
#elif defined(FASTLLAMA_AVX2)
template <>
struct Lane<at::BFloat16> {  // 16 at a time: to interleave them with zeros takes half of what widening 8 and 8 does
  using Stored = float;
  struct Register {
    __m256 outer, inner;  // numbers 0 .. 3 and 8 .. 11, and the others
  };
  static constexpr int kStep = 16, kWide = 2;
  static Register stored(const float* p) {
    auto fours = [&](int i) { return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + i)), _mm_loadu_ps(p + i + 8), 1); };
    return {fours(0), fours(4)};
  }
  static Register weight(const at::BFloat16* p) {
    const __m256i sixteen = _mm256_loadu_si256((const __m256i*)p), zero = _mm256_setzero_si256();
    return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, sixteen)), _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, sixteen))};
  }
  static void add(f32v& total, const Register& w, const Register& x) {
    total = (f32v)_mm256_fmadd_ps(w.inner, x.inner, _mm256_fmadd_ps(w.outer, x.outer, (__m256)total));
  }
  static void keep(Register& x) { asm("" : "+x"(x.outer), "+x"(x.inner)); }
};
#endif

// One row of W and one of x, read as a single stream.
template <typename T>
inline float dot(const T* w, const typename Lane<T>::Stored* x, int64_t K) {
  using L = Lane<T>;
  f32v totals[4] = {};
  int64_t k = 0;
  for (; k + 4 * L::kStep <= K; k += 4 * L::kStep) {
    for (int64_t byte = 0; byte < 4 * L::kStep * (int64_t)sizeof(T); byte += kLine)
      __builtin_prefetch((const char*)(w + k) + byte + kAhead, 0, kNextCache);
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u)
      L::add(totals[u], L::weight(w + k + u * L::kStep), L::stored(x + k + u * L::kStep));
  }
  for (; k + L::kStep <= K; k += L::kStep) L::add(totals[0], L::weight(w + k), L::stored(x + k));
  float total = sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
  for (; k < K; ++k) total += float(w[k]) * float(x[k]);
  return total;
}

// kStreams rows of W and one of x. AMD's processors without AVX-512 read 1.25 to 1.4 times as fast in eight streams, for
// which they look ahead by themselves, as in one that is asked for.
template <typename T>
inline void dots(const T* w, const typename Lane<T>::Stored* x, int64_t K, float* out) {
  using L = Lane<T>;
  f32v totals[kStreams] = {};
  int64_t k = 0;
  for (; k + L::kStep <= K; k += L::kStep) {
    const auto row = L::stored(x + k);
#pragma GCC unroll 8
    for (int r = 0; r < kStreams; ++r) L::add(totals[r], L::weight(w + r * K + k), row);
  }
  std::fill(out, out + kStreams, 0.f);
#pragma GCC unroll 2
  for (int r = 0; r < kStreams; r += 4) add_sums4(totals + r, out + r);
  for (; k < K; ++k)
    for (int r = 0; r < kStreams; ++r) out[r] += float(w[r * K + k]) * float(x[k]);
}

// Adds the products of kTile rows of W and M rows of x, over one block of columns, to sums[m * kChunk + row].
// Between `from` and `to` it asks for the same columns of the next tile of W.
template <typename T, int M>
inline void tile(const T* w, int64_t K, const typename Lane<T>::Stored* x, int64_t stride, int64_t width, int64_t from,
                 int64_t to, float* sums) {
  using L = Lane<T>;
  f32v totals[M][kTile] = {};
  constexpr int64_t kLineNumbers = kLine / sizeof(T);
  auto pass = [&](int64_t k, int64_t end, auto ask) __attribute__((always_inline)) {
    for (; k < end; k += L::kStep) {
      if constexpr (decltype(ask)::value)
        if (L::kStep >= kLineNumbers || k % kLineNumbers == 0)
#pragma GCC unroll 8
          for (int r = 0; r < kTile; ++r) __builtin_prefetch(w + (kTile + r) * K + k, 0, kNextCache);
      if constexpr (kVector < 16) {  // few registers: x stays in M of them, and a weight takes one at a time
        typename L::Register rows[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          rows[m] = L::stored(x + m * stride + k);
          L::keep(rows[m]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kTile; ++r) {
          const auto weight = L::weight(w + r * K + k);
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) L::add(totals[m][r], weight, rows[m]);
        }
        continue;
      }
      typename L::Register weights[kTile];
#pragma GCC unroll 8
      for (int r = 0; r < kTile; ++r) weights[r] = L::weight(w + r * K + k);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        auto row = L::stored(x + m * stride + k);
        L::keep(row);
#pragma GCC unroll 8
        for (int r = 0; r < kTile; ++r) L::add(totals[m][r], weights[r], row);
      }
    }
  };
  const int64_t whole = width / L::kStep * L::kStep;
  pass(0, from, std::false_type{});
  pass(from, to, std::true_type{});
  pass(to, whole, std::false_type{});
  constexpr int kFours = M / 4 * 4;
  if constexpr (kFours > 0) add_sums16(totals[0], sums, kChunk);
#pragma GCC unroll 8
  for (int m = kFours; m < M; ++m) add_sums4(totals[m], sums + m * kChunk);
  for (int64_t k = whole; k < width; ++k)
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < kTile; ++r) sums[m * kChunk + r] += float(w[r * K + k]) * float(x[m * stride + k]);
}

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

// Calls work with a number of 1 .. Most as a constant.
template <int Most, typename Work>
inline void with_number(int64_t number, const Work& work) {
  if constexpr (Most > 1)
    if (number < Most) return with_number<Most - 1>(number, work);
  work(std::integral_constant<int, Most>{});
}

template <typename T>
void tiles(const Operand<T>& x, const T* w, int64_t k, int64_t count, float* sums) {
  constexpr int kWide = Lane<T>::kWide;
  const int64_t passes = (x.rows + kWide - 1) / kWide, steps = count / Lane<T>::kStep;
  int64_t m = 0;
  for (int64_t p = 0; p < passes; ++p) {
    const int64_t rows = (x.rows - m + passes - p - 1) / (passes - p);
    // Each pass over the tile asks for its share of the next one, so that memory never waits.
    const int64_t from = p * steps / passes * Lane<T>::kStep, to = (p + 1) * steps / passes * Lane<T>::kStep;
    auto run = [&](auto n) {
      tile<T, decltype(n)::value>(w + k, x.columns, x.at(m, k), x.stride, count, from, to, sums + m * kChunk);
    };
    with_number<kWide>(rows, run);
    m += rows;
  }
}

template <typename T>
struct Matrix {  // W [N, K] and b [N], which may be null
  const T* weight;
  const T* bias;
  int64_t N, K;
};

// Rows begin .. end - 1 of W: calls emit(m, n, y).
template <typename T, typename Emit>
void multiply(const Operand<T>& x, const Matrix<T>& matrix, int64_t begin, int64_t end, const Emit& emit) {
  const T* w = matrix.weight;
  auto biased = [&](float total, int64_t n) { return matrix.bias ? total + float(matrix.bias[n]) : total; };
  if (x.rows == 1) {
    int64_t n = begin;
    if constexpr (kVector < 16) {
      float y[kStreams];
      for (; n + kStreams <= end; n += kStreams) {
        dots<T>(w + n * matrix.K, x.at(0, 0), matrix.K, y);
        for (int r = 0; r < kStreams; ++r) emit(0, n + r, biased(y[r], n + r));
      }
    }
    for (; n < end; ++n) emit(0, n, biased(dot<T>(w + n * matrix.K, x.at(0, 0), matrix.K), n));
    return;
  }
  std::vector<float> sums(x.rows * kChunk);
  for (int64_t n = begin; n < end; n += kChunk) {
    const int64_t rows = std::min(kChunk, end - n);
    std::fill(sums.begin(), sums.end(), 0.f);
    for (int64_t k = 0; k < matrix.K; k += x.width) {
      const int64_t count = std::min(x.width, matrix.K - k);
      int64_t r = 0;
      for (; r + kTile <= rows; r += kTile) tiles(x, w + (n + r) * matrix.K, k, count, sums.data() + r);
      for (; r < rows; ++r)
        for (int64_t m = 0; m < x.rows; ++m)
          sums[m * kChunk + r] += dot<T>(w + (n + r) * matrix.K + k, x.at(m, k), count);
    }
    for (int64_t m = 0; m < x.rows; ++m)
      for (int64_t r = 0; r < rows; ++r) emit(m, n + r, biased(sums[m * kChunk + r], n + r));
  }
}

}  // namespace
