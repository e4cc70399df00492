// One head's D numbers of a new token as a cache stores them: bit for bit as fastllama/kernels/stored.py does.
//
// Each operation is rounded by itself: the compiler must not join a product with a sum, nor turn a quotient into a
// product, both of which the build's flags allow. `exact` hides a number from it.

#pragma once

#include "stored.h"

namespace {

inline float exact(float x) {
  asm("" : "+x"(x));
  return x;
}

inline float quotient(float x, float by) { return exact(exact(x) / exact(by)); }
inline float inverse(float d) { return d == 0 ? 0 : quotient(1, d); }

inline bool is_finite(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return (bits & 0x7f800000) != 0x7f800000;
}

// -0 becomes 0; the bits are hidden too, since the compiler may take the two for one.
inline float positive_zero(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  asm("" : "+r"(bits));
  if ((bits & 0x7fffffff) == 0) bits = 0;
  asm("" : "+r"(bits));
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// What is no number becomes 0.
inline float whole(float x) { return is_finite(x) ? x : 0; }

// The number furthest from zero, of several the first; the first that is not a number where there is one.
inline float furthest(const float* x, int count) {
  float found = x[0];
  for (int i = 0; i < count; ++i) {
    if (x[i] != x[i]) return x[i];
    if (std::fabs(x[i]) > std::fabs(found)) found = x[i];
  }
  return found;
}

inline float half_away(float x) {
  const float size = std::fabs(x), down = std::floor(size);
  return std::copysign(down + std::floor(2 * (size - down)), x);
}

// 32 numbers of a block of format F: quants as they are packed, and the block's scales.
template <Format F>
inline void quantise_block(const float* x, Run& run, int64_t s, int b) {
  uint8_t numbers[32];
  float d, low = 0;
  if constexpr (F == Format::q8_0) {
    d = quotient(std::fabs(furthest(x, 32)), 127);
    const float id = inverse(d);
    int8_t* to = run.at<int8_t>(0, s) + 32 * b;
    for (int i = 0; i < 32; ++i) to[i] = (int8_t)whole(half_away(exact(x[i] * id)));
  } else if constexpr (F == Format::q4_0 || F == Format::q5_0) {
    constexpr int kHalf = offset_of(F);
    d = quotient(furthest(x, 32), -kHalf);
    const float id = inverse(d);
    for (int i = 0; i < 32; ++i)
      numbers[i] = (uint8_t)std::clamp(whole(std::trunc(exact(exact(x[i] * id) + (kHalf + 0.5f)))), 0.f, 2.f * kHalf - 1);
  } else if constexpr (has_least(F)) {
    constexpr int kLevels = F == Format::q4_1 ? 15 : 31;
    low = x[0];
    float high = x[0];
    for (int i = 0; i < 32; ++i) {
      if (x[i] != x[i]) {
        low = high = x[i];
        break;
      }
      low = std::min(low, x[i]), high = std::max(high, x[i]);
    }
    low = positive_zero(low);
    d = positive_zero(quotient(exact(high - low), kLevels));
    const float id = inverse(d);
    for (int i = 0; i < 32; ++i)
      numbers[i] = (uint8_t)std::clamp(whole(std::trunc(exact(exact(exact(x[i] - low) * id) + 0.5f))), 0.f, float(kLevels));
  } else {
    d = quotient(furthest(x, 32), kCodebook[0]);
    const float id = inverse(d);
    for (int i = 0; i < 32; ++i) {
      const float y = exact(x[i] * id);
      int index = 0;
      for (int c = 0; c < 15; ++c) index += 2 * y >= kCodebook[c] + kCodebook[c + 1];
      numbers[i] = is_finite(y) ? index : 0;
    }
  }
  if constexpr (F != Format::q8_0) {
    uint8_t* to = run.at<uint8_t>(0, s) + 16 * b;
    for (int j = 0; j < 16; ++j) to[j] = (numbers[j] & 15) | numbers[j + 16] << 4;
  }
  if constexpr (has_fifth(F)) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= uint32_t(numbers[i] >> 4) << i;
    __builtin_memcpy(run.at<char>(1, s) + 4 * b, &bits, 4);
  }
  run.at<at::Half>(scale_part(F), s)[b] = at::Half(d);
  if constexpr (has_least(F)) run.at<at::Half>(scale_part(F) + 1, s)[b] = at::Half(low);
}

// Stores a token's numbers [D], which T holds exactly, at position s.
template <typename T>
void quantise(const float* x, int D, Run run, int64_t s) {
  for_format(run.format, [&](auto format) {
    constexpr Format F = decltype(format)::value;
    if constexpr (F == Format::f32) {
      std::copy(x, x + D, run.at<float>(0, s));
    } else if constexpr (F == Format::f16) {
      for (int d = 0; d < D; ++d) run.at<at::Half>(0, s)[d] = at::Half(x[d]);
    } else if constexpr (F == Format::bf16) {
      for (int d = 0; d < D; ++d) run.at<at::BFloat16>(0, s)[d] = at::BFloat16(x[d]);
    } else if constexpr (F == Format::int8) {
      float scale = quotient(std::fabs(furthest(x, D)), 127);
      if (scale < 1e-5f) scale = 1e-5f;
      *run.at<T>(1, s) = T(scale);
      const float by = float(T(scale));
      int8_t* to = run.at<int8_t>(0, s);
      for (int d = 0; d < D; ++d) to[d] = (int8_t)std::clamp(whole(std::nearbyint(quotient(x[d], by))), -127.f, 127.f);
    } else {
      for (int b = 0; b < D / 32; ++b) quantise_block<F>(x + 32 * b, run, s, b);
    }
  });
}

}  // namespace
