// Attention of some query rows to one kv head, and what it is called with: built once for each dtype of a model, and once
// for caches of quants.
//
// Legend: R query rows of one kv head (group x new tokens), D head dim, S cached positions.

#pragma once

#include <algorithm>

#include "product.h"

// Whether quants of a cache are multiplied as they are.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define FASTLLAMA_SMALL_BLOCKS
#define FASTLLAMA_SMALL_ROWS  // three rows and more as well
#elif defined(FASTLLAMA_AVX2)
#define FASTLLAMA_SMALL_BLOCKS
#endif

namespace fastllama {

constexpr int kBlock = 64;  // positions whose scores are kept at once
constexpr int kParts = 4;   // that a cache format has, at most

// Asks memory for numbers that the next block needs, a little at a time: so it never waits, and neither do we.
template <typename T>
inline void ask_for(const T* first, int count) {
  for (int64_t byte = 0; byte < count * (int64_t)sizeof(T); byte += kLine) __builtin_prefetch((const char*)first + byte, 0, kNextCache);
}

// What the next block needs of memory: `each` bytes a position; none where `at` is null.
struct Ahead {
  const char* at = nullptr;
  int64_t each = 0;
  __attribute__((always_inline)) void ask(int64_t first, int64_t end) const {
    for (int64_t byte = first; byte < end; byte += kLine) __builtin_prefetch(at + byte, 0, kNextCache);
  }
};

enum class Format { f32, f16, bf16, int8, q8_0, q4_0, q4_1, q5_0, q5_1, iq4_nl };

// One row and head of a cache: position s of part i is at part[i] + s * each[i].
struct Run {
  Format format;
  Format model;  // the model's own type, in which int8 has its scales
  char* part[kParts];
  int64_t each[kParts];

  template <typename T>
  const T* at(int i, int64_t s) const {
    return (const T*)(part[i] + s * each[i]);
  }
  template <typename T>
  T* at(int i, int64_t s) {
    return (T*)(part[i] + s * each[i]);
  }
  // What is read from position s on is asked for: scales, which are few, now, and the rest by the caller.
  Ahead ahead(int64_t s, int64_t end) const {
    if (s >= end) return {};
    for (int i = 1; i < kParts; ++i)
      if (each[i]) ask_for(at<char>(i, s), (int)(std::min<int64_t>(kBlock, end - s) * each[i]));
    return {at<char>(0, s), each[0]};
  }
};

// What a task leaves: for each of its rows a maximum, a sum of weights and a weighted sum of values [D].
struct Partial {
  float* maximum;
  float* total;
  float* mixed;  // [R, D]
};

// R rows over positions begin to end, of which row r sees the first seen[r]. units: the rows [R, D] in T where T is
// multiplied in pairs, else in fp32.
template <typename T>
void attend_head(int64_t D, const float* units, float scale, const Run& keys, const Run& values, int64_t begin, int64_t end,
                 const int64_t* seen, int R, const Partial& out);

#if defined(FASTLLAMA_SMALL_BLOCKS)
// The same over keys and values that are both quants, which are multiplied as they are, for a model of any dtype. units:
// fp32 [R, D]. Of a model in fp32 R is 1 or 2.
void attend_small_head(int64_t D, const float* units, float scale, const Run& keys, const Run& values, int64_t begin,
                       int64_t end, const int64_t* seen, int R, const Partial& out);
#endif

}  // namespace fastllama

using namespace fastllama;
