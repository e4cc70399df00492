// A block of a small cache as bytes: quants [64, D] in eight bits whatever the format, and scales for whole vectors of
// positions. A number is quant x scale + least.
//
// Legend: D head dim, V = D / kVector, G groups of a row that have a scale of their own (int8: one), p position in the block.

#pragma once

#include "stored.h"

#if defined(FASTLLAMA_SMALL_BLOCKS)

namespace {

constexpr int kMostGroups = kMostDims / 32;

struct SmallBlock {
  const int8_t* quants;  // [count, D]
  alignas(64) float scale[kMostGroups][kBlock];
  alignas(64) float least[kMostGroups][kBlock];
  bool has_least;
  alignas(64) int8_t own[kBlock * kMostDims];
};

// What a thread works in, one for keys and one for values.
inline SmallBlock* own_blocks() {
  alignas(64) static thread_local SmallBlock blocks[2];
  return blocks;
}

template <Format F>
inline __m128i table() {
  if constexpr (F == Format::iq4_nl) return _mm_load_si128((const __m128i*)kCodebook);
  const __m128i line = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm_sub_epi8(line, _mm_set1_epi8(offset_of(F)));
}

// 16 more where a bit of `fifth` is set.
inline __m256i plus_fifth(__m256i quants, uint32_t fifth) {
#if defined(__AVX512F__)
  return _mm256_mask_add_epi8(quants, fifth, quants, _mm256_set1_epi8(16));
#else
  const __m256i bytes = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
  const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int)fifth), bytes), bit);
  return _mm256_add_epi8(quants, _mm256_and_si256(_mm256_cmpeq_epi8(spread, bit), _mm256_set1_epi8(16)));
#endif
}

template <Format F, int V>
inline void to_bytes(const Run& run, int64_t first, int count, int8_t* to) {
  constexpr int kBlocks = V / kOfBlock;
  const __m256i values = _mm256_broadcastsi128_si256(table<F>()), low = _mm256_set1_epi8(15);
  for (int p = 0; p < count; ++p) {
    const uint8_t* from = run.at<uint8_t>(0, first + p);
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      const __m128i packed = _mm_loadu_si128((const __m128i*)(from + 16 * b));
      const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(packed), _mm_srli_epi16(packed, 4), 1);
      __m256i y = _mm256_shuffle_epi8(values, _mm256_and_si256(both, low));
      if constexpr (has_fifth(F)) {
        uint32_t fifth;
        __builtin_memcpy(&fifth, run.at<char>(1, first + p) + 4 * b, 4);
        y = plus_fifth(y, fifth);
      }
      _mm256_storeu_si256((__m256i*)(to + (p * kBlocks + b) * 32), y);
    }
  }
}

// Of the numbers of two vectors those in even places, and those in odd ones.
struct Halves {
  f32v part[2];
  f32v operator[](int i) const { return part[i]; }
};
inline Halves every_other(f32v a, f32v b) {
#if defined(__AVX512F__)
  const i32v even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
#else
  const i32v even = {0, 2, 4, 6, 8, 10, 12, 14};
#endif
  return {__builtin_shuffle(a, b, even), __builtin_shuffle(a, b, even + 1)};
}

// Scales [count, G] in `Kind` as fp32 [G, kBlock]; those that are missing are zero.
template <typename Kind, int G>
inline void to_lanes(const Kind* from, int count, float (*to)[kBlock]) {
  alignas(64) float row[kBlock * G];
  float* line = G == 1 ? to[0] : row;
  int i = 0;
  for (; i + kVector <= count * G; i += kVector) store(line + i, widened(from + i));
  for (; i < count * G; ++i) line[i] = float(from[i]);
  std::fill(line + count * G, line + kBlock * G, 0.f);
  if constexpr (G == 2 || G == 4) {
    for (int p = 0; p < kBlock; p += kVector) {
      f32v x[G];
#pragma GCC unroll 4
      for (int i = 0; i < G; ++i) x[i] = load(row + p * G + kVector * i);
      const auto first = every_other(x[0], x[1]);
      if constexpr (G == 2) {
        store(to[0] + p, first[0]), store(to[1] + p, first[1]);
      } else {
        const auto second = every_other(x[2], x[3]);
        const auto even = every_other(first[0], second[0]), odd = every_other(first[1], second[1]);
        store(to[0] + p, even[0]), store(to[2] + p, even[1]);
        store(to[1] + p, odd[0]), store(to[3] + p, odd[1]);
      }
    }
  } else if constexpr (G > 1) {
    for (int g = 0; g < G; ++g)
      for (int p = 0; p < kBlock; ++p) to[g][p] = row[p * G + g];
  }
}

template <int V>
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
      if (run.model == Format::f32) to_lanes<float, 1>(run.at<float>(1, s), count, block.scale);
      else if (run.model == Format::f16) to_lanes<at::Half, 1>(run.at<at::Half>(1, s), count, block.scale);
      else to_lanes<at::BFloat16, 1>(run.at<at::BFloat16>(1, s), count, block.scale);
    } else if constexpr (!is_float(F) && V % kOfBlock == 0) {
      to_lanes<at::Half, V / kOfBlock>(run.at<at::Half>(scale_part(F), s), count, block.scale);
      if constexpr (has_least(F)) to_lanes<at::Half, V / kOfBlock>(run.at<at::Half>(scale_part(F) + 1, s), count, block.least);
    }
  });
}

// Calls work with the number of groups as a constant.
template <int V, typename Work>
inline void for_groups(Format format, const Work& work) {
  if (V < kOfBlock || format == Format::int8) return work(std::integral_constant<int, 1>{});
  if constexpr (V >= kOfBlock) work(std::integral_constant<int, V / kOfBlock>{});
}

inline f32v widened(const int8_t* from) {
#if defined(__AVX512F__)
  return (f32v)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#else
  return (f32v)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#endif
}

// What is multiplied with quants may be integers of 16 bits.
constexpr float kMostInteger = 32767;
constexpr float kLeastBound = 1e-30f;  // below it there is nothing to scale

inline bool all_finite(f32v x) {
#if defined(__AVX512F__)
  return _mm512_fpclass_ps_mask((__m512)x, 0x99) == 0;
#else
  const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.f), (__m256)x);
  return _mm256_movemask_ps(_mm256_cmp_ps(size, _mm256_set1_ps(std::numeric_limits<float>::max()), _CMP_LE_OQ)) == 0xFF;
#endif
}

inline float highest(f32v x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float most = x[0];
  for (int i = 1; i < kVector; ++i) most = std::max(most, x[i]);
  return most;
#endif
}

// The largest scale of each group, not a number where one is not finite.
template <int V>
inline void bound_scales(const SmallBlock& block, Format format, float* bounds) {
  for (int g = 0; g < (format == Format::int8 ? 1 : V / kOfBlock); ++g) {
    f32v top = {};
    bool finite = true;
    for (int p = 0; p < kBlock; p += kVector) {
      const f32v x = load(block.scale[g] + p);
      finite &= all_finite(x);
      top = x > top ? x : -x > top ? -x : top;
    }
    bounds[g] = finite ? highest(top) : std::numeric_limits<float>::quiet_NaN();
  }
}

}  // namespace

#endif
