// Keys or values as a cache stores them: in the model's own type, in another, or quantised.
//
// Legend: B rows, K kv heads, S positions, D head dim; v = 0 .. D/16 - 1 a vector of 16 numbers.
// Parts, their order and every rule are those of fastllama/kernels/stored.py, which is the specification.

#pragma once

#include <string>

#include "attention.h"

namespace {

constexpr const char* kFormats[] = {"f32", "f16", "bf16", "int8", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl"};

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

// Refuses parts that do not belong to the format, the head dim or the model's type.
template <typename T>
Side side(const std::vector<at::Tensor>& parts, const std::string& name, int64_t D) {
  const auto* found = std::find(std::begin(kFormats), std::end(kFormats), name);
  TORCH_CHECK(found != std::end(kFormats), "cache format '", name, "' is not known");
  Side side;
  side.format = Format(found - std::begin(kFormats)), side.model = kFormatOf<T>;
  const Format f = side.format;
  const auto half = at::kHalf;
  std::vector<std::pair<int64_t, at::ScalarType>> expected;
  if (is_float(f)) {
    expected = {{D, f == Format::f32 ? at::kFloat : f == Format::f16 ? half : at::kBFloat16}};
  } else if (f == Format::int8) {
    expected = {{D, at::kChar}, {1, c10::CppTypeToScalarType<T>::value}};
  } else {
    TORCH_CHECK(D % 32 == 0, "head dim ", D, " is not a multiple of 32, which the cache format ", name, " needs");
    if (f == Format::q8_0) expected = {{D, at::kChar}};
    else expected = {{D / 2, at::kByte}};
    if (has_fifth(f)) expected.push_back({D / 8, at::kByte});
    for (int i = 0; i <= has_least(f); ++i) expected.push_back({D / 32, half});
  }
  TORCH_CHECK(parts.size() == expected.size(), "the cache format ", name, " has ", expected.size(), " parts, not ", parts.size());
  for (size_t i = 0; i < parts.size(); ++i) {
    const at::Tensor& x = parts[i];
    const auto [n, type] = expected[i];
    TORCH_CHECK(x.dim() == 4 && x.size(3) == n && x.scalar_type() == type && x.sizes().slice(0, 3) == parts[0].sizes().slice(0, 3),
                "part ", i, " of the cache format ", name, " is ", x.sizes(), " in ", x.scalar_type());
    TORCH_CHECK(x.size(2) <= 1 || (x.stride(2) == n && (n == 1 || x.stride(3) == 1)), "part ", i, " of the cache format ", name,
                ": positions must lie one after the other");
    side.data[i] = (char*)x.data_ptr();
    side.row[i] = x.stride(0) * x.element_size(), side.head[i] = x.stride(1) * x.element_size();
    side.each[i] = n * x.element_size();
  }
  return side;
}

// 16 numbers of a position before they are scaled.
template <Format F>
inline f32x16 quants(const Run& run, int64_t s, int v) {
  if constexpr (is_byte(F)) {
    const int8_t* from = run.at<int8_t>(0, s) + 16 * v;
#if defined(__AVX512F__)
    return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#else
    f32x16 y;
    for (int i = 0; i < 16; ++i) y[i] = from[i];
    return y;
#endif
  } else {
    const uint8_t* from = run.at<uint8_t>(0, s) + 16 * (v / 2);
    uint16_t fifth = 0;
    if constexpr (has_fifth(F)) __builtin_memcpy(&fifth, run.at<char>(1, s) + 2 * v, 2);
#if defined(__AVX512F__)
    __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
    if (v % 2) index = _mm512_srli_epi32(index, 4);
    if constexpr (F == Format::iq4_nl) {
      const __m512 values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128((const __m128i*)kCodebook)));
      return (f32x16)_mm512_permutexvar_ps(index, values);  // by the low four bits
    } else {
      const __m512 line = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512 values = (__m512)((f32x16)line - float(offset_of(F)));
      const __m512 y = _mm512_permutexvar_ps(index, values);
      if constexpr (has_fifth(F)) return (f32x16)_mm512_mask_add_ps(y, fifth, y, _mm512_set1_ps(16.f));
      else return (f32x16)y;
    }
#else
    f32x16 y;
    for (int i = 0; i < 16; ++i) {
      const int number = from[i] >> (v % 2 * 4) & 15;
      y[i] = F == Format::iq4_nl ? kCodebook[number] : number + 16 * (fifth >> i & 1) - offset_of(F);
    }
    return y;
#endif
  }
}

template <typename T, Format F>
inline float scale(const Run& run, int64_t s, int v) {
  if constexpr (F == Format::int8) return float(*run.at<T>(1, s));
  else return float(run.at<at::Half>(scale_part(F), s)[v / 2]);
}

template <Format F>
inline float least(const Run& run, int64_t s, int v) {
  return float(run.at<at::Half>(scale_part(F) + 1, s)[v / 2]);
}

template <typename T>
inline void put16(T* to, f32x16 x) {
  if constexpr (std::is_same_v<T, float>) {
    __builtin_memcpy(to, &x, 64);
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<T, at::Half>) {
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
#if defined(__AVX512BF16__)
  } else if constexpr (std::is_same_v<T, at::BFloat16>) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
    __builtin_memcpy(to, &rounded, 32);
#endif
  } else {
    for (int i = 0; i < 16; ++i) to[i] = T(x[i]);
  }
}

// Positions first .. first + count - 1 as numbers [count, D].
template <typename T, int V>
void expand(const Run& run, int64_t first, int count, T* to) {
  for_format(run.format, [&](auto format) {
    constexpr Format F = decltype(format)::value;
    for (int64_t s = first; s < first + count; ++s, to += 16 * V) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        f32x16 x;
        if constexpr (F == Format::f32) x = Wide<float>::weight(run.at<float>(0, s) + 16 * v);
        else if constexpr (F == Format::f16) x = Wide<at::Half>::weight(run.at<at::Half>(0, s) + 16 * v);
        else if constexpr (F == Format::bf16) x = Wide<at::BFloat16>::weight(run.at<at::BFloat16>(0, s) + 16 * v);
        else x = quants<F>(run, s, v) * scale<T, F>(run, s, v);
        if constexpr (has_least(F)) x += least<F>(run, s, v);
        put16(to + 16 * v, x);
      }
    }
  });
}

// Blocks of a cache that is not in the model's own type: each is expanded when it is read.
template <typename T, int V>
struct Expanded {
  Run run;
  T* scratch;  // [kBlock, D]

  const T* block(int64_t s, int count) const {
    if (run.format == kFormatOf<T>) return run.at<T>(0, s);
    expand<T, V>(run, s, count, scratch);
    return scratch;
  }
  Ahead ahead(int64_t s, int64_t end) const { return run.ahead(s, end); }
};

// What a thread expands a block of keys and one of values into.
template <typename T>
T* own_scratch() {
  alignas(64) static thread_local T scratch[2 * kBlock * kMostDims];
  return scratch;
}

// Calls work with where the blocks of keys and of values come from: straight from the cache where it is of type T.
template <typename T, int V, typename Work>
void with_blocks(const Run& keys, const Run& values, const Work& work) {
  if (keys.format == kFormatOf<T> && values.format == kFormatOf<T>)
    return work(Plain<T, V>{keys.at<T>(0, 0)}, Plain<T, V>{values.at<T>(0, 0)});
  T* scratch = own_scratch<T>();
  work(Expanded<T, V>{keys, scratch}, Expanded<T, V>{values, scratch + kBlock * kMostDims});
}

}  // namespace
