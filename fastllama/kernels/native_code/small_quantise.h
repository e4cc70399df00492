// A float weight in 8 or 4 bits a number, in the tiles of small.h: bit for bit as kernels/small_product.py does.
//
// Each quotient is rounded as one: the build's flags allow the compiler to multiply by an inverse, and `hidden` forbids it.

#pragma once

#include "small.h"

namespace {

inline f32v hidden(f32v x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(FASTLLAMA_AVX2)
  asm("" : "+x"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

inline float hidden(float x) {
  asm("" : "+x"(x));
  return x;
}

// Row n of a weight, widened and filled up with zeros. False where it holds NaN or infinities.
template <typename T>
inline bool widen(const T* from, int64_t K, std::vector<float>& to) {
  std::copy(from, from + K, to.begin());
  std::fill(to.begin() + K, to.end(), 0.f);
  return are_finite(to.data(), K);
}

// Bytes of kVector numbers x / scale + shift, rounded (to even, or down) and held within low .. high.
template <bool Down>
inline void bytes_of(const float* x, float scale, float shift, float low, float high, uint8_t* to) {
  f32v number = scale == 0 ? f32v{} : hidden(hidden(load(x)) / hidden(all(scale)));
  number = hidden(number + shift);
  for (int i = 0; i < kVector; ++i) {
    const float whole = Down ? std::floor(number[i]) : std::nearbyint(number[i]);
    to[i] = (uint8_t)(int)std::clamp(whole, low, high);
  }
}

// Lane `lane` of a tile: its row's K numbers, in `w` as they are to lie.
inline void quantise_row(const std::vector<float>& x, int bits, int64_t K, int64_t group, int64_t lane, uint8_t* quants,
                         float* scales8, at::Half* scales4, std::vector<uint8_t>& bytes) {
  const int64_t padded = (int64_t)x.size();
  if (bits == 8) {
    float most = 0;
    for (int64_t k = 0; k < K; ++k) most = std::max(most, std::fabs(x[k]));
    const float scale = scales8[lane] = hidden(hidden(most) / hidden(127.f));
    for (int64_t k = 0; k < padded; k += kVector) bytes_of<false>(&x[k], scale, 0, -127, 127, &bytes[k]);
    for (int64_t k = 0; k < padded; k += 4) {
      uint32_t four;
      __builtin_memcpy(&four, &bytes[k], 4);
      four ^= 0x80808080;  // + 128
      __builtin_memcpy(quants + (k / 4 * kLanes + lane) * 4, &four, 4);
    }
    return;
  }
  for (int64_t first = 0; first < K; first += group) {
    float furthest = x[first];
    for (int64_t k = first; k < first + group; ++k)
      if (std::fabs(x[k]) > std::fabs(furthest)) furthest = x[k];
    const at::Half half = scales4[first / group * kLanes + lane] = at::Half(furthest / -8);
    for (int64_t k = first; k < first + group; k += kVector) bytes_of<true>(&x[k], float(half), 8.5f, 0, 15, &bytes[k]);
  }
  for (int64_t k = 0; k < K; k += 8) {
    uint32_t low, high;
    __builtin_memcpy(&low, &bytes[k], 4);
    __builtin_memcpy(&high, &bytes[k + 4], 4);
    low |= high << 4;
    __builtin_memcpy(quants + (k / 8 * kLanes + lane) * 4, &low, 4);
  }
}

}  // namespace
