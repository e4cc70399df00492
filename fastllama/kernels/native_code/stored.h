// Keys or values as a cache stores them: in the model's own type, in another, or quantised.
//
// Legend: B rows, K kv heads, S positions, D head dim; v = 0 .. D / kVector - 1 a vector of kVector numbers.
// Parts, their order and every rule are those of fastllama/kernels/stored.py, which is the specification.

#pragma once

#include <array>

#include "attention.h"
#include "rounding.h"

namespace {

constexpr bool has_least(Format f) { return f == Format::q4_1 || f == Format::q5_1; }
constexpr bool has_fifth(Format f) { return f == Format::q5_0 || f == Format::q5_1; }
constexpr bool is_byte(Format f) { return f == Format::int8 || f == Format::q8_0; }
constexpr bool is_float(Format f) { return f <= Format::bf16; }
constexpr int scale_part(Format f) { return has_fifth(f) ? 2 : 1; }
// What is subtracted from a stored number before it is scaled.
constexpr int offset_of(Format f) { return f == Format::q4_0 ? 8 : f == Format::q5_0 ? 16 : 0; }

alignas(16) constexpr int8_t kCodebook[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

template <typename T>
constexpr Format kFormatOf = std::is_same_v<T, float> ? Format::f32 : std::is_same_v<T, at::Half> ? Format::f16 : Format::bf16;

// Calls work with the format as a constant.
template <typename Work>
void for_format(Format format, const Work& work) {
#define FASTLLAMA_CASE(name) \
  case Format::name: return work(std::integral_constant<Format, Format::name>{})
  switch (format) {
    FASTLLAMA_CASE(f32);
    FASTLLAMA_CASE(f16);
    FASTLLAMA_CASE(bf16);
    FASTLLAMA_CASE(int8);
    FASTLLAMA_CASE(q8_0);
    FASTLLAMA_CASE(q4_0);
    FASTLLAMA_CASE(q4_1);
    FASTLLAMA_CASE(q5_0);
    FASTLLAMA_CASE(q5_1);
    FASTLLAMA_CASE(iq4_nl);
  }
#undef FASTLLAMA_CASE
}

// The keys or the values of one layer.
struct Side {
  Format format = Format::f32, model = Format::f32;
  char* data[kParts] = {};
  int64_t row[kParts] = {}, head[kParts] = {}, each[kParts] = {};  // bytes from one to the next

  Run at(int64_t b, int64_t k) const {
    Run run{format, model, {}, {}};
    for (int i = 0; i < kParts; ++i) run.part[i] = data[i] + b * row[i] + k * head[i], run.each[i] = each[i];
    return run;
  }
};

// Vectors of a block of 32 numbers; those of its first half have the low nibbles.
constexpr int kOfBlock = 32 / kVector;

// What each nibble stands for.
template <Format F>
alignas(16) constexpr std::array<int8_t, 16> kNibbles = [] {
  std::array<int8_t, 16> numbers{};
  for (int i = 0; i < 16; ++i) numbers[i] = F == Format::iq4_nl ? kCodebook[i] : (int8_t)(i - offset_of(F));
  return numbers;
}();

// kVector numbers of a position before they are scaled.
template <Format F>
inline f32v quants(const Run& run, int64_t s, int v) {
  if constexpr (is_byte(F)) {
    const int8_t* from = run.at<int8_t>(0, s) + kVector * v;
#if defined(__AVX512F__)
    return (f32v)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(FASTLLAMA_AVX2)
    return (f32v)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    f32v y;
    for (int i = 0; i < kVector; ++i) y[i] = from[i];
    return y;
#endif
  } else {
    const bool is_high = v % kOfBlock >= kOfBlock / 2;
    const uint8_t* from = run.at<uint8_t>(0, s) + 16 * (v / kOfBlock) + kVector * (v % (kOfBlock / 2));
    std::conditional_t<kVector == 16, uint16_t, uint8_t> fifth = 0;
    if constexpr (has_fifth(F)) __builtin_memcpy(&fifth, run.at<char>(1, s) + kVector / 8 * v, kVector / 8);
#if defined(__AVX512F__)
    __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
    if (is_high) index = _mm512_srli_epi32(index, 4);
    if constexpr (F == Format::iq4_nl) {
      const __m512 values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128((const __m128i*)kCodebook)));
      return (f32v)_mm512_permutexvar_ps(index, values);  // by the low four bits
    } else {
      const __m512 line = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512 values = (__m512)((f32v)line - float(offset_of(F)));
      const __m512 y = _mm512_permutexvar_ps(index, values);
      if constexpr (has_fifth(F)) return (f32v)_mm512_mask_add_ps(y, fifth, y, _mm512_set1_ps(16.f));
      else return (f32v)y;
    }
#elif defined(FASTLLAMA_AVX2)
    __m128i index = _mm_loadl_epi64((const __m128i*)from);
    if (is_high) index = _mm_srli_epi16(index, 4);
    const __m128i numbers = _mm_load_si128((const __m128i*)kNibbles<F>.data());
    __m256i y = _mm256_cvtepi8_epi32(_mm_shuffle_epi8(numbers, _mm_and_si128(index, _mm_set1_epi8(15))));
    if constexpr (has_fifth(F)) {
      const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
      const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(fifth), bits), bits);
      y = _mm256_add_epi32(y, _mm256_and_si256(set, _mm256_set1_epi32(16)));
    }
    return (f32v)_mm256_cvtepi32_ps(y);
#else
    f32v y;
    for (int i = 0; i < kVector; ++i) y[i] = kNibbles<F>[from[i] >> (is_high ? 4 : 0) & 15] + 16 * (fifth >> i & 1);
    return y;
#endif
  }
}

template <typename T, Format F>
inline float scale(const Run& run, int64_t s, int v) {
  if constexpr (F == Format::int8) return float(*run.at<T>(1, s));
  else return float(run.at<at::Half>(scale_part(F), s)[v / kOfBlock]);
}

template <Format F>
inline float least(const Run& run, int64_t s, int v) {
  return float(run.at<at::Half>(scale_part(F) + 1, s)[v / kOfBlock]);
}

// What is no number stays so.
template <typename T>
inline void put(f32v x, T* to) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
    __builtin_memcpy(to, &rounded, 32);
    return;
  }
#else
  // A NaN whose upper bits are all set would be carried into another number.
  if constexpr (std::is_same_v<T, at::BFloat16>) x = x == x ? x : all(std::numeric_limits<float>::quiet_NaN());
#endif
  put_rounded(x, to);
}

#if defined(__AVX512BF16__)
// 32 quants, which have one scale, of each position in turn.
template <typename T, Format F, int V>
inline void expand_pairs(const Run& run, int64_t first, int count, at::BFloat16* to) {
  for (int64_t s = first; s < first + count; ++s)
#pragma GCC unroll 4
    for (int v = 0; v < V; v += 2, to += 32) {
      const f32v by = all(scale<T, F>(run, s, v));
      f32v low = quants<F>(run, s, v) * by, high = quants<F>(run, s, v + 1) * by;
      if constexpr (has_least(F)) low += least<F>(run, s, v), high += least<F>(run, s, v);
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      __builtin_memcpy(to, &both, sizeof both);
    }
}
#endif

// Positions first .. first + count - 1 of a model in T as numbers [count, D].
template <typename T, int V, typename To>
void expand(const Run& run, int64_t first, int count, To* to) {
  for_format(run.format, [&](auto format) {
    constexpr Format F = decltype(format)::value;
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<To, at::BFloat16> && !is_float(F) && V % 2 == 0) return expand_pairs<T, F, V>(run, first, count, to);
#endif
    for (int64_t s = first; s < first + count; ++s, to += kVector * V) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        f32v x;
        if constexpr (F == Format::f32) x = widened(run.at<float>(0, s) + kVector * v);
        else if constexpr (F == Format::f16) x = widened(run.at<at::Half>(0, s) + kVector * v);
        else if constexpr (F == Format::bf16) x = widened(run.at<at::BFloat16>(0, s) + kVector * v);
        else x = quants<F>(run, s, v) * scale<T, F>(run, s, v);
        if constexpr (has_least(F)) x += least<F>(run, s, v);
        put(x, to + kVector * v);
      }
    }
  });
}

// What a block of a model in T is expanded to. AVX-512's code multiplies T; elsewhere T would be widened again, and what it
// rounds would be lost.
template <typename T>
using Scratch = std::conditional_t<kVector == 16, T, float>;

// Blocks of a cache that is not in the model's own type: each is expanded when it is read.
template <typename T, int V>
struct Expanded {
  static constexpr bool kLies = false;
  using To = Scratch<T>;
  Run run;
  To* scratch;  // [kBlock, D]

  const To* block(int64_t s, int count) const {
    if (run.format == kFormatOf<To>) return run.at<To>(0, s);
    expand<T, V>(run, s, count, scratch);
    return scratch;
  }
  Ahead ahead(int64_t s, int64_t end) const { return run.ahead(s, end); }
};

// What a thread expands a block into: of keys first and then, when they have been read, of values, so that both stay near.
template <typename T>
T* own_scratch() {
  alignas(64) static thread_local T scratch[kBlock * kMostDims];
  return scratch;
}

// Calls work with a number of the type that blocks of keys and of values have, and where they come from: straight from the
// cache where it is of type T.
template <typename T, int V, typename Work>
void with_blocks(const Run& keys, const Run& values, const Work& work) {
  if (keys.format == kFormatOf<T> && values.format == kFormatOf<T>)
    return work(T{}, Plain<T, V>{keys.at<T>(0, 0)}, Plain<T, V>{values.at<T>(0, 0)});
  auto* scratch = own_scratch<Scratch<T>>();
  work(Scratch<T>{}, Expanded<T, V>{keys, scratch}, Expanded<T, V>{values, scratch});
}

}  // namespace
