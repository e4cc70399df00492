// One or two query rows of a kv head over a small cache, in fp32: products are taken of the quants, and scales are applied
// to what they give.
//
// Legend: R query rows, D head dim, V = D / kVector, G groups of a row with a scale of their own, p position in a block.
// The specification is torch.nn.functional.scaled_dot_product_attention in fp32 of fastllama.kernels.stored.expand.

#pragma once

#include "small_blocks.h"

#if defined(FASTLLAMA_SMALL_BLOCKS)

namespace {

template <int V, int R, int G>
inline void score_small(const f32v (*query)[V], const float (*sums)[kMostGroups], const SmallBlock& keys, int count,
                        const Ahead& ahead, float* scores) {
  constexpr int kEach = V / G;
  for (int p = 0; p < count; p += 4) {
    f32v totals[R][4] = {};
    if (ahead.at) ahead.ask(p * ahead.each, (p + 4) * ahead.each);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int at = std::min(p + i, count - 1);
      const int8_t* key = keys.quants + at * V * kVector;
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        f32v part[R] = {};
#pragma GCC unroll 8
        for (int v = g * kEach; v < (g + 1) * kEach; ++v) {
          const f32v numbers = widened(key + kVector * v);
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) part[r] += numbers * query[r][v];
        }
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) totals[r][i] += G == 1 ? part[r] : part[r] * all(keys.scale[g][at]);
      }
    }
    for (int r = 0; r < R; ++r) {
      float four[4] = {};
      add_sums4(totals[r], four);
      __builtin_memcpy(scores + r * kBlock + p, four, 16);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < count; p += kVector) {
      f32v y = load(scores + r * kBlock + p);
      if (G == 1) y *= load(keys.scale[0] + p);
      if (keys.has_least)
        for (int g = 0; g < G; ++g) y += load(keys.least[g] + p) * all(sums[r][g]);
      store(scores + r * kBlock + p, y);
    }
}

template <int V, int R, int G>
inline void mix_small(const float* weights, const SmallBlock& values, int count, const Ahead& ahead, const float* keep,
                      float* mixed) {
  constexpr int kPart = V < 4 ? V : V == 6 ? 3 : 4;
  alignas(64) float scaled[R][G][kBlock];
  float least[R][G] = {};
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) {
      f32v total = {};
      for (int p = 0; p < kBlock; p += kVector) {
        const f32v w = load(weights + r * kBlock + p), y = w * load(values.scale[g] + p);
        store(scaled[r][g] + p, y);
        if (values.has_least) total += w * load(values.least[g] + p);
      }
      if (values.has_least) least[r][g] = sum(total);
    }
  for (int first = 0; first < V; first += kPart) {
    f32v total[R][kPart];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kPart; ++v)
        total[r][v] = load(mixed + (r * V + first + v) * kVector) * all(keep[r]) + least[r][(first + v) * G / V];
    for (int p = 0; p < count; ++p) {
      if (ahead.at && first == 0) ahead.ask(p * ahead.each, (p + 1) * ahead.each);
#pragma GCC unroll 4
      for (int v = 0; v < kPart; ++v) {
        const f32v value = widened(values.quants + (p * V + first + v) * kVector);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) total[r][v] += value * all(scaled[r][(first + v) * G / V][p]);
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kPart; ++v) store(mixed + (r * V + first + v) * kVector, total[r][v]);
  }
}

// As `attend` does. query: fp32 [R, D].
template <int V, int R>
void attend_small(const float* query, float scale, const Run& keys, const Run& values, int64_t begin, int64_t end,
                  const int64_t* seen, const Partial& out) {
  clear(out, R, V * kVector);
  SmallBlock &key = own_blocks()[0], &value = own_blocks()[1];
  alignas(64) float scores[R * kBlock] = {};
  f32v totals[R] = {}, row[R][V];
  float sums[R][kMostGroups] = {};
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) row[r][v] = load(query + (r * V + v) * kVector), sums[r][v / kOfBlock] += sum(row[r][v]);
  for (int64_t s = begin; s < end; s += kBlock) {
    const int count = (int)std::min<int64_t>(kBlock, end - s);
    read_block<V>(keys, s, count, key);
    for_groups<V>(keys.format, [&](auto groups) {
      score_small<V, R, decltype(groups)::value>(row, sums, key, count, keys.ahead(s + kBlock, end), scores);
    });
    float keep[R];
    for (int r = 0; r < R; ++r)
      keep[r] = weigh(scores + r * kBlock, scale, std::min<int64_t>(count, seen[r] - s), out.maximum[r], totals[r]);
    read_block<V>(values, s, count, value);
    for_groups<V>(values.format, [&](auto groups) {
      mix_small<V, R, decltype(groups)::value>(scores, value, count, values.ahead(s + kBlock, end), keep, out.mixed);
    });
  }
  for (int r = 0; r < R; ++r) out.total[r] = sum(totals[r]);
}

}  // namespace

#endif
