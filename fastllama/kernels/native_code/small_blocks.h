// A block of a small cache as bytes: quants [64, D] in eight bits whatever the format, and scales for whole vectors of
// positions. A number is quant x scale + least.
//
// Legend: D head dim, V = D / 16, G groups of a row that have a scale of their own (int8: one), p position in the block.

#pragma once

#include "stored.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define FASTLLAMA_SMALL_BLOCKS

namespace {

constexpr int kMostGroups = kMostDims / 32;

struct SmallBlock {
  const int8_t* quants;  // [count, D]
  alignas(64) float scale[kMostGroups][kBlock];
  alignas(64) float least[kMostGroups][kBlock];
  bool has_least;
  alignas(64) int8_t own[kBlock * kMostDims];
};

template <Format F>
inline __m128i table() {
  if constexpr (F == Format::iq4_nl) return _mm_load_si128((const __m128i*)kCodebook);
  const __m128i line = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm_sub_epi8(line, _mm_set1_epi8(offset_of(F)));
}

template <Format F, int V>
inline void to_bytes(const Run& run, int64_t first, int count, int8_t* to) {
  const __m256i values = _mm256_broadcastsi128_si256(table<F>()), low = _mm256_set1_epi8(15);
  for (int p = 0; p < count; ++p) {
    const uint8_t* from = run.at<uint8_t>(0, first + p);
#pragma GCC unroll 4
    for (int b = 0; b < V / 2; ++b) {
      const __m128i packed = _mm_loadu_si128((const __m128i*)(from + 16 * b));
      const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(packed), _mm_srli_epi16(packed, 4), 1);
      __m256i y = _mm256_shuffle_epi8(values, _mm256_and_si256(both, low));
      if constexpr (has_fifth(F)) {
        uint32_t fifth;
        __builtin_memcpy(&fifth, run.at<char>(1, first + p) + 4 * b, 4);
        y = _mm256_mask_add_epi8(y, fifth, y, _mm256_set1_epi8(16));
      }
      _mm256_storeu_si256((__m256i*)(to + (p * V + 2 * b) * 16), y);
    }
  }
}

// Scales [count, G] in `Kind` as fp32 [G, kBlock]; those that are missing are zero.
template <typename Kind, int G>
inline void to_lanes(const Kind* from, int count, float (*to)[kBlock]) {
  alignas(64) float row[kBlock * G];
  float* line = G == 1 ? to[0] : row;
  int i = 0;
  for (; i + 16 <= count * G; i += 16) {
    const f32x16 x = Wide<Kind>::weight(from + i);
    __builtin_memcpy(line + i, &x, 64);
  }
  for (; i < count * G; ++i) line[i] = float(from[i]);
  std::fill(line + count * G, line + kBlock * G, 0.f);
  if constexpr (G > 1)
    for (int g = 0; g < G; ++g)
      for (int p = 0; p < kBlock; ++p) to[g][p] = row[p * G + g];
}

template <typename T, int V>
void read_block(const Run& run, int64_t s, int count, SmallBlock& block) {
  for_format(run.format, [&](auto format) {
    constexpr Format F = decltype(format)::value;
    block.has_least = has_least(F);
    if constexpr (is_byte(F)) {
      block.quants = run.at<int8_t>(0, s);
    } else if constexpr (!is_float(F)) {
      to_bytes<F, V>(run, s, count, block.own);
      block.quants = block.own;
    }
    if constexpr (F == Format::int8) {
      to_lanes<T, 1>(run.at<T>(1, s), count, block.scale);
    } else if constexpr (!is_float(F) && V % 2 == 0) {
      to_lanes<at::Half, V / 2>(run.at<at::Half>(scale_part(F), s), count, block.scale);
      if constexpr (has_least(F)) to_lanes<at::Half, V / 2>(run.at<at::Half>(scale_part(F) + 1, s), count, block.least);
    }
  });
}

// Calls work with the number of groups as a constant.
template <int V, typename Work>
inline void for_groups(Format format, const Work& work) {
  if (V == 1 || format == Format::int8) return work(std::integral_constant<int, 1>{});
  if constexpr (V > 1) work(std::integral_constant<int, V / 2>{});
}

inline f32x16 widened(const int8_t* from) {
  return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
}

}  // namespace

#endif
