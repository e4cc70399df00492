// y = x W^T + b for few rows of x, at the speed at which memory gives W.
//
// Legend: M rows of x, N rows of W, K columns of both. W is read once, as it lies; x is small and stays in the cache.
// Sums are kept in fp32. The specification is torch.nn.functional.linear in fp32.

#pragma once

#include <ATen/ATen.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

typedef float f32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));

constexpr int64_t kLine = 64;             // bytes that memory moves at once
constexpr int64_t kAhead = 8192;          // bytes that a single stream is asked for in advance
constexpr int64_t kNear = 32768;          // bytes of x that a block of columns may take: they stay in the first cache
// Where a line is put that is asked for: the second cache has many more requests under way at once than the first.
constexpr int kNextCache = 2;
constexpr int kTile = 4;                  // rows of W in a tile
constexpr int kWide = 6;                  // rows of x in a tile: 24 sums and 4 weights fit the 32 registers
constexpr int64_t kWhole = 32;            // columns of x that no block cuts
constexpr int64_t kChunk = 32;            // rows of W whose sums are kept while the blocks of columns pass

inline float sum(f32x16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < 16; ++i) total += v[i];
  return total;
#endif
}

// The sums of 4 vectors in out[0 .. 3], and of 16 in 4 rows of 4 that are `stride` apart: `out[i] += sum(v[i])`.
inline void add_sums4(const f32x16* v, float* out) {
#if defined(__AVX512F__)
  auto pair = [](f32x16 a, f32x16 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  };
  const __m512d ab = _mm512_castps_pd(pair(v[0], v[1])), cd = _mm512_castps_pd(pair(v[2], v[3]));
  const __m512 lanes = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  _mm_storeu_ps(out, _mm_add_ps(four, _mm_loadu_ps(out)));
#else
  for (int i = 0; i < 4; ++i) out[i] += sum(v[i]);
#endif
}

inline void add_sums16(const f32x16* v, float* out, int64_t stride) {
#if defined(__AVX512F__)
  __m512 rows[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    const f32x16* w = v + 4 * r;
    auto pair = [](f32x16 a, f32x16 b) {
      return _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    };
    const __m512d ab = _mm512_castps_pd(pair(w[0], w[1])), cd = _mm512_castps_pd(pair(w[2], w[3]));
    rows[r] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  }
  auto join = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  };
  const __m512 all = join(join(rows[0], rows[1]), join(rows[2], rows[3]));
  auto store = [&](float* to, __m128 four) { _mm_storeu_ps(to, _mm_add_ps(four, _mm_loadu_ps(to))); };
  store(out, _mm512_extractf32x4_ps(all, 0));
  store(out + stride, _mm512_extractf32x4_ps(all, 1));
  store(out + 2 * stride, _mm512_extractf32x4_ps(all, 2));
  store(out + 3 * stride, _mm512_extractf32x4_ps(all, 3));
#else
  for (int r = 0; r < 4; ++r) add_sums4(v + 4 * r, out + r * stride);
#endif
}

// How a type is loaded and multiplied: a Register holds one step of kStep numbers. Here it is widened as it is read.
template <typename T>
struct Wide {
  using Stored = float;
  using Register = f32x16;
  static constexpr int kStep = 16;
  static Register stored(const float* p) {
    Register v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static Register weight(const T* p) {
    if constexpr (std::is_same_v<T, float>) {
      return stored(p);
    } else if constexpr (std::is_same_v<T, at::BFloat16>) {
      u16x16 half;
      __builtin_memcpy(&half, p, sizeof half);
      u32x16 wide = __builtin_convertvector(half, u32x16) << 16;
      Register v;
      __builtin_memcpy(&v, &wide, sizeof v);
      return v;
    } else {
#if defined(__AVX512F__)
      return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
      Register v;
      for (int i = 0; i < 16; ++i) v[i] = float(p[i]);
      return v;
#endif
    }
  }
  static void add(f32x16& total, Register w, Register x) { total += w * x; }
};

template <typename T>
struct Lane : Wide<T> {};

#if defined(__AVX512BF16__)
template <>
struct Lane<at::BFloat16> {  // pairs of products, summed in fp32 by the processor
  using Stored = at::BFloat16;
  using Register = __m512bh;
  static constexpr int kStep = 32;
  static Register stored(const at::BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Register weight(const at::BFloat16* p) { return stored(p); }
  static void add(f32x16& total, Register w, Register x) {
    total = (f32x16)_mm512_dpbf16_ps((__m512)total, w, x);
  }
};
#endif

// One row of W and one of x, read as a single stream.
template <typename T>
inline float dot(const T* w, const typename Lane<T>::Stored* x, int64_t K) {
  using L = Lane<T>;
  f32x16 totals[4] = {};
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

// Adds the products of kTile rows of W and M rows of x, over one block of columns, to sums[m * kChunk + row].
// Between `from` and `to` it asks for the same columns of the next tile of W.
template <typename T, int M>
inline void tile(const T* w, int64_t K, const typename Lane<T>::Stored* x, int64_t stride, int64_t width, int64_t from,
                 int64_t to, float* sums) {
  using L = Lane<T>;
  f32x16 totals[M][kTile] = {};
  auto pass = [&](int64_t k, int64_t end, auto ask) __attribute__((always_inline)) {
    for (; k < end; k += L::kStep) {
      typename L::Register weights[kTile];
#pragma GCC unroll 8
      for (int r = 0; r < kTile; ++r) {
        if constexpr (decltype(ask)::value) __builtin_prefetch(w + (kTile + r) * K + k, 0, kNextCache);
        weights[r] = L::weight(w + r * K + k);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        auto row = L::stored(x + m * stride + k);
#if defined(__AVX512F__)
        asm("" : "+v"(row));  // one load for the tile: the compiler would fold a load into each product
#endif
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

template <typename T>
void tiles(const Operand<T>& x, const T* w, int64_t k, int64_t count, float* sums) {
  const int64_t passes = (x.rows + kWide - 1) / kWide, steps = count / Lane<T>::kStep;
  int64_t m = 0;
  for (int64_t p = 0; p < passes; ++p) {
    const int64_t rows = (x.rows - m + passes - p - 1) / (passes - p);
    // Each pass over the tile asks for its share of the next one, so that memory never waits.
    const int64_t from = p * steps / passes * Lane<T>::kStep, to = (p + 1) * steps / passes * Lane<T>::kStep;
    auto run = [&](auto n) {
      tile<T, decltype(n)::value>(w + k, x.columns, x.at(m, k), x.stride, count, from, to, sums + m * kChunk);
    };
    switch (rows) {
      case 1: run(std::integral_constant<int, 1>{}); break;
      case 2: run(std::integral_constant<int, 2>{}); break;
      case 3: run(std::integral_constant<int, 3>{}); break;
      case 4: run(std::integral_constant<int, 4>{}); break;
      case 5: run(std::integral_constant<int, 5>{}); break;
      default: run(std::integral_constant<int, 6>{}); break;
    }
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
    for (int64_t n = begin; n < end; ++n) emit(0, n, biased(dot<T>(w + n * matrix.K, x.at(0, 0), matrix.K), n));
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
