// Attention of more than eight query rows in bf16 in the processor's matrix unit. Blocks of keys and values are paired as
// attend_rows has them, which is how the unit takes what it multiplies with; 16 query rows are multiplied at once.
//
// Legend: R query rows of one kv head, D head dim, V = D / 16. A step is 32 numbers of the query, or 32 positions.
// The specification is torch.nn.functional.scaled_dot_product_attention in fp32.

#pragma once

#include "matrix_unit.h"
#include "rows.h"

#if defined(FASTLLAMA_UNIT)

namespace {

// left [rows, 32 steps], rows `reach` bytes apart, times C columns of 16 of packed [16 steps, width] pairs; to out [rows,
// width], or added to it.
template <int C>
inline void multiply_pairs(const void* left, int64_t reach, const float* packed, int64_t width, int steps, bool adds,
                           float* out, Asking& asking) {
  const int64_t row = 4 * width;
  before_tiles();
  if (adds) {
    _tile_loadd(0, out, row);
    if constexpr (C > 1) _tile_loadd(1, out + 16, row);
    if constexpr (C > 2) _tile_loadd(2, out + 32, row);
    if constexpr (C > 3) _tile_loadd(3, out + 48, row);
  } else {
    _tile_zero(0);
    if constexpr (C > 1) _tile_zero(1);
    if constexpr (C > 2) _tile_zero(2);
    if constexpr (C > 3) _tile_zero(3);
  }
  for (int s = 0; s < steps; ++s, packed += kGroup * width) {
    _tile_loadd(4, (const char*)left + kTileRow * s, reach);
    _tile_loadd(5, packed, row);
    _tile_dpbf16ps(0, 4, 5);
    asking.ask();
    if constexpr (C > 1) {
      _tile_loadd(6, packed + 16, row);
      _tile_dpbf16ps(1, 4, 6);
      asking.ask();
    }
    if constexpr (C > 2) {
      _tile_loadd(7, packed + 32, row);
      _tile_dpbf16ps(2, 4, 7);
      asking.ask();
    }
    if constexpr (C > 3) {
      _tile_loadd(5, packed + 48, row);
      _tile_dpbf16ps(3, 4, 5);
      asking.ask();
    }
  }
  _tile_stored(0, out, row);
  if constexpr (C > 1) _tile_stored(1, out + 16, row);
  if constexpr (C > 2) _tile_stored(2, out + 32, row);
  if constexpr (C > 3) _tile_stored(3, out + 48, row);
}

// As `attend_rows` does. query: pairs [R, D / 2].
template <typename T, int V, typename Keys, typename Values>
void attend_rows_in_unit(const float* query, float scale, const Keys& keys, const Values& values, int64_t begin, int64_t end,
                         const int64_t* seen, int R, const Partial& out) {
  constexpr int D = V * 16, kCalls = kBlock / kGroup * (D / 32) + kBlock / 32 * V;
  alignas(64) thread_local float packed_keys[D / 2 * kBlock], packed_values[kBlock / 2 * D];
  alignas(64) float scores[kGroup * kBlock], pairs[kGroup * kBlock / 2];
  thread_local Tiles left_memory, mixed_memory;
  thread_local std::vector<f32v> totals;
  const int groups = (R + kGroup - 1) / kGroup;
  float* left = left_memory.of(groups * kGroup * D / 2);
  float* mixed = mixed_memory.of(groups * kGroup * D);
  std::copy(query, query + R * D / 2, left);
  std::fill(left + R * D / 2, left + groups * kGroup * D / 2, 0.f);
  std::fill(mixed, mixed + groups * kGroup * D, 0.f);
  clear(out, R, D);
  totals.assign(R, f32v{});
  const UnitInUse unit(summing(kGroup));
  for (int64_t s = begin; s < end; s += kBlock) {
    const int count = (int)std::min<int64_t>(kBlock, end - s);
    pack_keys<T, V>(keys.block(s, count), count, packed_keys);
    pack_values<T, V>(values.block(s, count), count, packed_values);
    std::fill(packed_values + (count + 1) / 2 * D, packed_values + kBlock / 2 * D, 0.f);
    const int64_t later = std::clamp<int64_t>(end - s - kBlock, 0, kBlock);
    Asking asking(keys.ahead(s + kBlock, end), values.ahead(s + kBlock, end), later, kCalls * groups);
    for (int r0 = 0; r0 < R; r0 += kGroup) {
      const int rows = std::min<int>(kGroup, R - r0);
      if (*std::max_element(seen + r0, seen + r0 + rows) <= s) continue;
      multiply_pairs<kBlock / kGroup>(left + r0 * D / 2, 2 * D, packed_keys, kBlock, D / 32, false, scores, asking);
      float* to = mixed + r0 * D;
      for (int r = 0; r < rows; ++r) {
        float* row = scores + r * kBlock;
        const int64_t visible = std::min<int64_t>(count, seen[r0 + r] - s);
        const float keep = weigh(row, scale, visible, out.maximum[r0 + r], totals[r0 + r]);
        for (int v = 0; v < (keep == 1.f ? 0 : V); ++v) store(to + r * D + 16 * v, load(to + r * D + 16 * v) * all(keep));
        for (int p = 0; p < kBlock; p += 32)
          _mm512_store_ps(pairs + (r * kBlock + p) / 2,
                          (__m512)_mm512_cvtne2ps_pbh(_mm512_load_ps(row + p + 16), _mm512_load_ps(row + p)));
      }
      for (int v = 0; v < V; v += 4)
        with_number<4>(V - v, [&](auto columns) {
          multiply_pairs<decltype(columns)::value>(pairs, 2 * kBlock, packed_values + 16 * v, D, kBlock / 32, true,
                                                   to + 16 * v, asking);
        });
    }
  }
  for (int r = 0; r < R; ++r) out.total[r] = sum(totals[r]);
  std::copy(mixed, mixed + R * D, out.mixed);
}

}  // namespace

#endif
