// Sums of products of rows of W and of x, for each type: one row with one, eight with one, and a tile of both.
//
// Legend: M rows of x, R rows of W, K columns of both.

#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace {

constexpr int64_t kLine = 64;             // bytes that memory moves at once
constexpr int64_t kAhead = 8192;          // bytes that a single stream is asked for in advance
// Where a line is put that is asked for: the second cache has many more requests under way at once than the first.
constexpr int kNextCache = 2, kNearCache = 3;
constexpr int kTile = 4;                  // rows of W in a tile
constexpr int kStreams = 8;               // rows of W that one row of x is multiplied with at once, where that is faster
constexpr int64_t kChunk = 32;            // rows of W whose sums are kept while the blocks of columns pass

// How a type is loaded and multiplied: a Register holds one step of kStep numbers. Here it is widened as it is read.
template <typename T>
struct Wide {
  using Stored = float;
  using Register = f32v;
  static constexpr int kStep = kVector;
  // Rows of x in a tile: with 4 of W, 24 sums fit AVX-512's 32 registers, and 12 the 16 that others have. Those take
  // more rows of x with 2 of W, since a pass over a tile costs more than what it reads.
  static constexpr int kWide = kVector == 16 ? 6 : 3, kTall = kVector == 16 ? kWide : 6;
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
  static constexpr int kStep = 32, kWide = 6, kTall = 6;
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
  static constexpr int kStep = 16, kWide = 3, kTall = 6;
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

// Whole steps of one row of W and one of x, read as a single stream.
template <typename T>
inline f32v lanes_of(const T* w, const typename Lane<T>::Stored* x, int64_t K) {
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
  return (totals[0] + totals[1]) + (totals[2] + totals[3]);
}

// The columns behind the last whole step.
template <typename T>
inline float rest_of(const T* w, const typename Lane<T>::Stored* x, int64_t K) {
  float total = 0;
  for (int64_t k = K / Lane<T>::kStep * Lane<T>::kStep; k < K; ++k) total += float(w[k]) * float(x[k]);
  return total;
}

template <typename T>
inline float dot(const T* w, const typename Lane<T>::Stored* x, int64_t K) {
  return sum(lanes_of(w, x, K)) + rest_of(w, x, K);
}

// Four rows of W one after the other, whose sums are taken together.
template <typename T>
inline void four_dots(const T* w, const typename Lane<T>::Stored* x, int64_t K, float* out) {
  f32v lanes[4];
  for (int r = 0; r < 4; ++r) lanes[r] = lanes_of(w + r * K, x, K), out[r] = rest_of(w + r * K, x, K);
  add_sums4(lanes, out);
}

inline bool is_intel() {
  static const bool answer = __builtin_cpu_is("intel");
  return answer;
}

// Whether several rows of W are read faster side by side than one after the other. Processors with AVX2 alone (AMD) read
// 1.25 to 1.4 times as fast so, for which they look ahead by themselves, and Intel's with AVX-512 1.2 to 1.4 times, where the
// next rows are asked for; AMD's with AVX-512 read a single stream as fast as memory gives. Everywhere 0.6 to 0.8 times where
// a row is so short that each stream ends before it has begun.
inline bool reads_in_streams() { return kVector < 16 || is_intel(); }

// The same of keys and values, where a stream is a part of a head's positions: Intel's alone, 1.4 times as fast.
inline bool reads_in_parts() { return kVector == 16 && is_intel(); }

// kStreams rows of W and one of x.
template <typename T>
inline void dots(const T* w, const typename Lane<T>::Stored* x, int64_t K, float* out) {
  using L = Lane<T>;
  f32v totals[kStreams] = {};
  int64_t k = 0;
  for (; k + L::kStep <= K; k += L::kStep) {
    if constexpr (kVector == 16)
#pragma GCC unroll 8
      for (int r = 0; r < kStreams; ++r) __builtin_prefetch(w + (kStreams + r) * K + k, 0, kNearCache);
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

// Adds the products of R rows of W and M rows of x, over one block of columns, to sums[m * kChunk + row].
// Between `from` and `to` it asks for the same columns of the next tile of W.
template <typename T, int M, int R>
inline void tile(const T* w, int64_t K, const typename Lane<T>::Stored* x, int64_t stride, int64_t width, int64_t from,
                 int64_t to, float* sums) {
  using L = Lane<T>;
  f32v totals[M][R] = {};
  constexpr int64_t kLineNumbers = kLine / sizeof(T);
  auto pass = [&](int64_t k, int64_t end, auto ask) __attribute__((always_inline)) {
    for (; k < end; k += L::kStep) {
      if constexpr (decltype(ask)::value)
        if (L::kStep >= kLineNumbers || k % kLineNumbers == 0)
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) __builtin_prefetch(w + (R + r) * K + k, 0, kNextCache);
      if constexpr (kVector < 16 && M < R) {  // few registers: x stays in M of them, and a weight takes one at a time
        typename L::Register rows[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          rows[m] = L::stored(x + m * stride + k);
          L::keep(rows[m]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const auto weight = L::weight(w + r * K + k);
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) L::add(totals[m][r], weight, rows[m]);
        }
        continue;
      }
      typename L::Register weights[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        weights[r] = L::weight(w + r * K + k);
        if constexpr (kVector < 16) L::keep(weights[r]);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        auto row = L::stored(x + m * stride + k);
        if constexpr (kVector == 16) L::keep(row);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) L::add(totals[m][r], weights[r], row);
      }
    }
  };
  const int64_t whole = width / L::kStep * L::kStep;
  pass(0, from, std::false_type{});
  pass(from, to, std::true_type{});
  pass(to, whole, std::false_type{});
  if constexpr (R == kTile) {
    constexpr int kFours = M / 4 * 4;
    if constexpr (kFours > 0) add_sums16(totals[0], sums, kChunk);
#pragma GCC unroll 8
    for (int m = kFours; m < M; ++m) add_sums4(totals[m], sums + m * kChunk);
  } else {
    static_assert(R == 2);
#pragma GCC unroll 8
    for (int m = 0; m < M; m += 2) {
      const f32v none = {};
      const f32v two[4] = {totals[m][0], totals[m][1], m + 1 < M ? totals[m + 1][0] : none, m + 1 < M ? totals[m + 1][1] : none};
      float found[4] = {};
      add_sums4(two, found);
      for (int i = 0; i < 2 && m + i < M; ++i)
        for (int r = 0; r < R; ++r) sums[(m + i) * kChunk + r] += found[2 * i + r];
    }
  }
  for (int64_t k = whole; k < width; ++k)
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < R; ++r) sums[m * kChunk + r] += float(w[r * K + k]) * float(x[m * stride + k]);
}

}  // namespace
