// Vectors of fp32 rounded to another type.
//
// Legend: kVector numbers of 32 bits in a vector.

#pragma once

#include <limits>

#include "vectors.h"

namespace {

// Numbers that are no NaN, rounded to T. A processor's own instruction for bf16 would flush the smallest ones to zero.
template <typename T>
inline void put_rounded(f32v x, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    store(to, x);
  } else if constexpr (std::is_same_v<T, at::BFloat16>) {
    u32v bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#if defined(__AVX512F__)
    const __m256i half = _mm512_cvtepi32_epi16((__m512i)bits);
#else
    const u16v half = __builtin_convertvector(bits, u16v);
#endif
    __builtin_memcpy(to, &half, sizeof half);
  } else {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(FASTLLAMA_AVX2)
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kVector; ++i) to[i] = T(x[i]);
#endif
  }
}

// Numbers as they are once rounded to T, of which bf16 takes no NaN.
template <typename T>
inline f32v rounded(f32v x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, at::BFloat16>) {
    u32v bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
    __builtin_memcpy(&x, &bits, sizeof bits);
    return x;
  } else {
    T half[kVector];
    put_rounded(x, half);
    return widened(half);
  }
}

// The same where there may be NaN. A NaN's lower bits are a number's: rounded up, they would make it zero.
template <typename T>
inline f32v rounded_if_number(f32v x) {
  return rounded<T>(x == x ? x : all(std::numeric_limits<float>::quiet_NaN()));
}

// Any numbers rounded to T, and kept as `Stored`: T, or fp32.
template <typename T, typename Stored>
inline void put_rounded_if_number(f32v x, Stored* to) {
  x = x == x ? x : all(std::numeric_limits<float>::quiet_NaN());
  if constexpr (std::is_same_v<T, Stored>) put_rounded(x, to);
  else store(to, rounded<T>(x));
}

}  // namespace
