// Attention of three to eight query rows in bf16 in the processor's matrix unit: keys and values are multiplied as they lie.
//
// Legend: R query rows of one kv head, D head dim, V = D / 16. A strip is 16 positions; a block has four.
// Scores are a strip of keys times the query in pairs: [16 positions, 8 rows]. What is mixed is weights [8 rows, 16
// positions] times a strip of values, of which the unit takes two neighbours for a pair: weights beside zeros give the even
// numbers, or the odd ones.
// The specification is torch.nn.functional.scaled_dot_product_attention in fp32.

#pragma once

#include "lanes.h"
#include "matrix_unit.h"
#include "stored.h"

#if defined(FASTLLAMA_UNIT)

namespace {

constexpr int kLaneTile = kLaneRows * kGroup;  // units: pairs of the query, scores of a strip, weights, or what is mixed

// Tile 0 is scores, 1 the query, 2 keys or values, 3 weights, 4 to 7 what is mixed.
constexpr std::array<TileShape, 8> attending() {
  const TileShape tall{kGroup, 4 * kLaneRows}, wide{kLaneRows, kTileRow};
  return {tall, tall, TileShape{kStrip, kTileRow}, wide, wide, wide, wide, wide};
}

// What is needed next is asked for while a block is worked on: a line of each strip in turn, at every step. Asked for at
// once, lines would queue, and what is near would wait behind them.
struct Spread {
  Strips<char> keys, values;
  int64_t line = 0;

  void ask(int rounds) {
#pragma GCC unroll 4
    for (int i = 0; i < rounds; ++i, line += kLine) {
#pragma GCC unroll 4
      for (int strip = 0; strip < kStrips; ++strip) {
        __builtin_prefetch(keys.at[strip] + line, 0, kNearCache);
        __builtin_prefetch(values.at[strip] + line, 0, kNearCache);
      }
      asm volatile("" : :);  // or the compiler would bring all steps' lines together
    }
  }
};

// Scores [64, 8] of a block. A quarter of what is needed next is asked for.
template <int D, typename T>
inline void score_strips(const float* query, const Strips<T>& keys, Spread& spread, float* scores) {
  before_tiles();
#pragma GCC unroll 4
  for (int strip = 0; strip < kStrips; ++strip) {
    _tile_zero(0);
#pragma GCC unroll 4
    for (int d = 0; d < D; d += kStepColumns) {
      _tile_loadd(1, query + d / kStepColumns * kLaneTile, 4 * kLaneRows);
      _tile_loadd(2, keys.at[strip] + d, 2 * D);
      _tile_dpbf16ps(0, 2, 1);
      spread.ask(1);
    }
    _tile_stored(0, scores + strip * kLaneTile, 4 * kLaneRows);
  }
}

// Rows of eight 64-bit numbers become columns.
inline void turn_eight(__m512i* rows) {
  __m512i a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm512_unpacklo_epi64(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi64(rows[i], rows[i + 1]);
  }
  // a[2 j + c] holds, in each quarter q, number 2 q + c of rows 2 j and 2 j + 1.
#pragma GCC unroll 2
  for (int c = 0; c < 2; ++c) {
    b[c] = _mm512_shuffle_i64x2(a[c], a[2 + c], 0x44), b[2 + c] = _mm512_shuffle_i64x2(a[c], a[2 + c], 0xEE);
    b[4 + c] = _mm512_shuffle_i64x2(a[4 + c], a[6 + c], 0x44), b[6 + c] = _mm512_shuffle_i64x2(a[4 + c], a[6 + c], 0xEE);
    rows[c] = _mm512_shuffle_i64x2(b[c], b[4 + c], 0x88), rows[2 + c] = _mm512_shuffle_i64x2(b[c], b[4 + c], 0xDD);
    rows[4 + c] = _mm512_shuffle_i64x2(b[2 + c], b[6 + c], 0x88);
    rows[6 + c] = _mm512_shuffle_i64x2(b[2 + c], b[6 + c], 0xDD);
  }
}

// Where the 16-bit numbers of two positions of one strip and of the same two of the next, of eight rows each, go to: rows
// first, then positions, then strips.
alignas(64) constexpr std::array<uint16_t, 32> kByRow = [] {
  std::array<uint16_t, 32> order{};
  for (int i = 0; i < 32; ++i) order[i] = (i % 2 * 2 + i / 2 % 2) * 8 + i / 4;
  return order;
}();

// What rows keep from block to block: `Running` for scores that are times `scale` only here.
struct Weighing {
  f32x16 maximum = all(-std::numeric_limits<float>::max());  // twice
  f32x16 total = {};  // of even positions in the lower lanes and of odd ones in the upper
  alignas(64) float keep[16];

  // Turns scores [64, 8], of which row r sees the first visible[r], into weights: of each strip two tiles, as lower and as
  // upper numbers of pairs. Returns whether what was mixed before is to be times `keep`. Half of what is needed next is
  // asked for.
  template <int D>
  bool weigh(float* scores, float scale, const int* visible, Spread& spread, int32_t* weights) {
    constexpr int kRounds = D / 8;  // for each half of the block
    if (*std::min_element(visible, visible + kLaneRows) < kBlock) hide(scores, visible);
    const bool moved = rise(scores, scale);
    const __m512i order = _mm512_load_si512(kByRow.data()), low = _mm512_set1_epi32(0xFFFF);
#pragma GCC unroll 1
    for (int half = 0; half < 2; ++half) {
      __m512i rows[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const float* from = scores + half * 2 * kLaneTile + 16 * i;
        const f32x16 one = exp_of(load(from) * scale - maximum);
        const f32x16 other = exp_of(load(from + kLaneTile) * scale - maximum);
        total += one + other;
        rows[i] = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)other, (__m512)one));
        spread.ask((i + 1) * kRounds / 8 - i * kRounds / 8);
      }
      turn_eight(rows);
      int32_t* to = weights + half * 4 * kLaneTile;
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) {
        _mm512_store_si512(to + 16 * r, _mm512_and_si512(rows[r], low));
        _mm512_store_si512(to + kLaneTile + 16 * r, _mm512_slli_epi32(rows[r], 16));
        _mm512_store_si512(to + 2 * kLaneTile + 16 * r, _mm512_srli_epi32(rows[r], 16));
        _mm512_store_si512(to + 3 * kLaneTile + 16 * r, _mm512_andnot_si512(low, rows[r]));
      }
    }
    return moved;
  }

 private:
  static void hide(float* scores, const int* visible) {
    for (int p = 0; p < kBlock; ++p)
      for (int r = 0; r < kLaneRows; ++r)
        if (p >= visible[r]) scores[p * kLaneRows + r] = -std::numeric_limits<float>::infinity();
  }

  // Raises the maximum to the highest score, and tells whether any row's is higher now.
  bool rise(const float* scores, float scale) {
    f32x16 top[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) top[j] = load(scores + 16 * j);
#pragma GCC unroll 8
    for (int i = 4; i < kBlock / 2; i += 4)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) top[j] = higher(load(scores + 16 * (i + j)), top[j]);
    const f32x16 before = maximum, highest = higher(higher(top[0], top[1]), higher(top[2], top[3])) * scale;
    if (!_mm512_cmp_ps_mask((__m512)highest, (__m512)before, _CMP_GT_OQ)) return false;
    maximum = higher(highest, before);
    maximum = higher(maximum, (f32x16)_mm512_shuffle_f32x4((__m512)maximum, (__m512)maximum, 0x4E));
    const f32x16 factor = exp_of(before - maximum);
    total *= factor;
    store(keep, factor);
    return true;
  }

  // Of what is no number, the other one.
  static f32x16 higher(f32x16 one, f32x16 other) { return (f32x16)_mm512_max_ps((__m512)one, (__m512)other); }
};

// Adds a block's values, weighted, to mixed: tiles [D / 32, 2: even and odd numbers][8, 16]. A quarter of what is needed
// next is asked for.
template <int D, typename T>
inline void mix_strips(const int32_t* weights, const Strips<T>& values, Spread& spread, float* mixed) {
#pragma GCC unroll 2
  for (int d = 0; d < D; d += 64) {
    const bool both = d + 32 < D;
    float* to = mixed + d / 16 * kLaneTile;
    before_tiles();
    _tile_loadd(4, to, kTileRow);
    _tile_loadd(5, to + kLaneTile, kTileRow);
    if (both) _tile_loadd(6, to + 2 * kLaneTile, kTileRow);
    if (both) _tile_loadd(7, to + 3 * kLaneTile, kTileRow);
#pragma GCC unroll 4
    for (int strip = 0; strip < kStrips; ++strip) {
      const T* from = values.at[strip] + d;
      const int32_t *lower = weights + 2 * strip * kLaneTile, *upper = lower + kLaneTile;
      _tile_loadd(2, from, 2 * D);
      _tile_loadd(3, lower, kTileRow);
      _tile_dpbf16ps(4, 3, 2);
      _tile_loadd(3, upper, kTileRow);
      _tile_dpbf16ps(5, 3, 2);
      spread.ask(1);
      if (!both) continue;
      _tile_loadd(2, from + 32, 2 * D);
      _tile_dpbf16ps(7, 3, 2);
      _tile_loadd(3, lower, kTileRow);
      _tile_dpbf16ps(6, 3, 2);
      spread.ask(1);
    }
    _tile_stored(4, to, kTileRow);
    _tile_stored(5, to + kLaneTile, kTileRow);
    if (both) _tile_stored(6, to + 2 * kLaneTile, kTileRow);
    if (both) _tile_stored(7, to + 3 * kLaneTile, kTileRow);
  }
}

// Strips of which none is cut: what is not a whole block is copied, with zeros for what is missing.
template <int D, typename Source, typename T>
inline Strips<T> whole_strips(const Source& source, const Order& order, int64_t block, T* copy) {
  const int count = order.count(block);
  if (count == kBlock) return strips_of<T, D>(source, order, block);
  const T* from = source.block(order.first(block), count);
  std::fill(std::copy(from, from + count * D, copy), copy + kBlock * D, T(0.f));
  Strips<T> strips;
  for (int i = 0; i < kStrips; ++i) strips.at[i] = copy + i * kStrip * D;
  return strips;
}

// Where memory is to be asked for a block; the last one stands for those behind it.
template <typename Source>
inline Strips<char> ahead_of(const Source& source, const Order& order, int64_t block) {
  const Next next(source, order, std::min(block, order.blocks() - 1));
  Strips<char> strips;
  std::copy(next.at, next.at + kStrips, strips.at);
  return strips;
}

// As `attend_rows` does. The scores of the next block are on their way while one is weighed and mixed.
template <typename T, int V, typename Keys, typename Values>
void attend_lanes_in_unit(const float* units, float scale, const Keys& keys, const Values& values, int64_t begin, int64_t end,
                          const int64_t* seen, int R, const Partial& out) {
  constexpr int D = V * 16;
  alignas(64) float query[D / 2 * kLaneRows], scores[2][kBlock * kLaneRows], mixed[kLaneRows * D] = {};
  alignas(64) int32_t weights[2 * kStrips * kLaneTile];
  alignas(64) T copies[2][kBlock * D];
  const Order order(Keys::kLies && Values::kLies, begin, end, seen, R);
  const int64_t blocks = order.blocks();
  take_lanes<D / 2>(units, R, (int32_t*)query);
  const UnitInUse unit(attending());
  Weighing state;
  for (int64_t b = -1; b < blocks; ++b) {
    Spread spread{ahead_of(keys, order, b + 2), ahead_of(values, order, b + 1)};
    if (b + 1 < blocks) score_strips<D>(query, whole_strips<D>(keys, order, b + 1, copies[0]), spread, scores[(b + 1) % 2]);
    if (b < 0) continue;
    int visible[kLaneRows];
    for (int r = 0; r < kLaneRows; ++r) visible[r] = (int)std::max<int64_t>(0, order.visible(b, seen[std::min(r, R - 1)]));
    if (state.template weigh<D>(scores[b % 2], scale, visible, spread, weights))
      for (int i = 0; i < kLaneRows * V; ++i) {
        float* row = mixed + 16 * i;
        store(row, load(row) * all(state.keep[i % kLaneRows]));
      }
    mix_strips<D>(weights, whole_strips<D>(values, order, b, copies[1]), spread, mixed);
  }
  alignas(64) float sums[16], highest[16];
  store(sums, state.total);
  store(highest, state.maximum);
  for (int r = 0; r < R; ++r) {
    out.maximum[r] = highest[r], out.total[r] = sums[r] + sums[r + kLaneRows];
    for (int d = 0; d < D; ++d) out.mixed[r * D + d] = mixed[(d / 32 * 2 + d % 2) * kLaneTile + r * 16 + d % 32 / 2];
  }
}

}  // namespace

#endif
