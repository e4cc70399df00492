// Vectors of fp32 numbers as wide as the processor has them, and what each kind of processor does in a way of its own.
//
// Legend: kVector numbers of 32 bits in a vector: 16 with AVX-512, else 8, which AVX2 has. Without either, the compiler
// makes of them what it can.

#pragma once

// Of torch's headers each file takes what it needs: all of ATen takes longer to read than many a kernel to compile.
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define FASTLLAMA_AVX2
#endif

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace at {
using namespace c10;
}

namespace {

#if defined(__AVX512F__)
constexpr int kVector = 16;
#else
constexpr int kVector = 8;
#endif

typedef float f32v __attribute__((vector_size(4 * kVector)));
typedef int32_t i32v __attribute__((vector_size(4 * kVector)));
typedef uint32_t u32v __attribute__((vector_size(4 * kVector)));
typedef uint16_t u16v __attribute__((vector_size(2 * kVector)));
#if defined(__AVX512F__)
typedef f32v f32x16;
#endif

inline f32v load(const float* p) {
  f32v v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, f32v v) { __builtin_memcpy(p, &v, sizeof v); }

inline f32v all(float value) { return f32v{} + value; }

inline f32v floats(i32v v) { return __builtin_convertvector(v, f32v); }

// kVector numbers of T as fp32.
template <typename T>
inline f32v widened(const T* p) {
  if constexpr (std::is_same_v<T, float>) {
    return load(p);
  } else if constexpr (std::is_same_v<T, at::BFloat16>) {
#if defined(FASTLLAMA_AVX2)  // the compiler would widen four numbers and four
    return (f32v)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    u16v half;
    __builtin_memcpy(&half, p, sizeof half);
    const u32v wide = __builtin_convertvector(half, u32v) << 16;
    f32v v;
    __builtin_memcpy(&v, &wide, sizeof v);
    return v;
#endif
  } else {
#if defined(__AVX512F__)
    return (f32v)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(FASTLLAMA_AVX2)
    return (f32v)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    f32v v;
    for (int i = 0; i < kVector; ++i) v[i] = float(p[i]);
    return v;
#endif
  }
}

// kVector bytes as numbers.
inline i32v widened(const uint8_t* bytes) {
#if defined(__AVX512F__)
  return (i32v)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
#elif defined(FASTLLAMA_AVX2)
  return (i32v)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes));
#else
  i32v numbers;
  for (int i = 0; i < kVector; ++i) numbers[i] = bytes[i];
  return numbers;
#endif
}

inline float sum(f32v v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(FASTLLAMA_AVX2)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float total = 0;
  for (int i = 0; i < kVector; ++i) total += v[i];
  return total;
#endif
}

// The sums of 4 vectors in out[0 .. 3], and of 16 in 4 rows of 4 that are `stride` apart: `out[i] += sum(v[i])`.
inline void add_sums4(const f32v* v, float* out) {
#if defined(__AVX512F__)
  auto pair = [](f32v a, f32v b) {
    return _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  };
  const __m512d ab = _mm512_castps_pd(pair(v[0], v[1])), cd = _mm512_castps_pd(pair(v[2], v[3]));
  const __m512 lanes = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  _mm_storeu_ps(out, _mm_add_ps(four, _mm_loadu_ps(out)));
#elif defined(FASTLLAMA_AVX2)
  const __m256 ab = _mm256_hadd_ps((__m256)v[0], (__m256)v[1]), cd = _mm256_hadd_ps((__m256)v[2], (__m256)v[3]);
  const __m256 lanes = _mm256_hadd_ps(ab, cd);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  _mm_storeu_ps(out, _mm_add_ps(four, _mm_loadu_ps(out)));
#else
  for (int i = 0; i < 4; ++i) out[i] += sum(v[i]);
#endif
}

inline void add_sums16(const f32v* v, float* out, int64_t stride) {
#if defined(__AVX512F__)
  __m512 rows[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    const f32v* w = v + 4 * r;
    auto pair = [](f32v a, f32v b) {
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

inline bool any_above(f32v v, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
#elif defined(FASTLLAMA_AVX2)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(bound), _CMP_GT_OQ)) != 0;
#else
  bool found = false;
  for (int lane = 0; lane < kVector; ++lane) found |= v[lane] > bound;
  return found;
#endif
}

// 2^t for -0.5 <= t <= 0.5, to 2 units in the last place.
inline f32v power_of_two(f32v t) {
  f32v y = all(1.5403530e-4f) * t + 1.3333558e-3f;
  y = y * t + 9.6181291e-3f;
  y = y * t + 5.5504109e-2f;
  y = y * t + 2.4022651e-1f;
  y = y * t + 6.9314718e-1f;
  return y * t + 1.f;
}

// e^x for x <= 0, to 2 units in the last place: 2^n times a polynomial of the rest. What is no number stays so.
inline f32v exp_of(f32v x) {
#if defined(__AVX512F__)
  const __m512 scaled = _mm512_max_ps(_mm512_set1_ps(-127.f), (__m512)(x * 1.44269504089f));
  const __m512 whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (f32v)_mm512_scalef_ps((__m512)power_of_two((f32v)_mm512_sub_ps(scaled, whole)), whole);
#elif defined(FASTLLAMA_AVX2)
  // The power is made of an exponent's bits; that of -127 has none, and is 0.
  const __m256 scaled = _mm256_max_ps(_mm256_set1_ps(-127.f), (__m256)(x * 1.44269504089f));
  const __m256 whole = _mm256_round_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
  return power_of_two((f32v)_mm256_sub_ps(scaled, whole)) * (f32v)_mm256_castsi256_ps(power);
#else
  for (int i = 0; i < kVector; ++i) x[i] = std::exp(x[i]);
  return x;
#endif
}

// rows[i] of kVector units each become columns: to[u * stride + i].
inline void transpose(const f32v* rows, float* to, int64_t stride) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
  }
  auto low = [](__m512 x, __m512 y) { return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))); };
  auto high = [](__m512 x, __m512 y) { return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))); };
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    b[i] = low(a[i], a[i + 2]), b[i + 1] = high(a[i], a[i + 2]);
    b[i + 2] = low(a[i + 1], a[i + 3]), b[i + 3] = high(a[i + 1], a[i + 3]);
  }
  // b[4 j + c] now holds, in each quarter q, unit 4 q + c of rows 4 j .. 4 j + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88), odd = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xDD);
    const __m512 even2 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
    const __m512 odd2 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xDD);
    _mm512_storeu_ps(to + c * stride, _mm512_shuffle_f32x4(even, even2, 0x88));
    _mm512_storeu_ps(to + (4 + c) * stride, _mm512_shuffle_f32x4(odd, odd2, 0x88));
    _mm512_storeu_ps(to + (8 + c) * stride, _mm512_shuffle_f32x4(even, even2, 0xDD));
    _mm512_storeu_ps(to + (12 + c) * stride, _mm512_shuffle_f32x4(odd, odd2, 0xDD));
  }
#elif defined(FASTLLAMA_AVX2)
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      b[i + 2 * c] = _mm256_shuffle_ps(a[i + c], a[i + 2 + c], 0x44);
      b[i + 2 * c + 1] = _mm256_shuffle_ps(a[i + c], a[i + 2 + c], 0xEE);
    }
  // b[4 j + c] now holds, in each half q, unit 4 q + c of rows 4 j .. 4 j + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(to + c * stride, _mm256_permute2f128_ps(b[c], b[4 + c], 0x20));
    _mm256_storeu_ps(to + (4 + c) * stride, _mm256_permute2f128_ps(b[c], b[4 + c], 0x31));
  }
#else
  for (int u = 0; u < kVector; ++u)
    for (int i = 0; i < kVector; ++i) to[u * stride + i] = rows[i][u];
#endif
}

}  // namespace
