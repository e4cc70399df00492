// Sums over the tiles of a W in few bits and of rows of x, in the processor's matrix unit: what the products of digits and
// those of bf16 share.
//
// Legend: a group is 16 rows of what W is multiplied with, a step what a tile of it holds of each row.

#pragma once

#include "small.h"

#if defined(FASTLLAMA_SMALL_UNIT)

namespace {

constexpr int64_t kTileBytes = 4 * kTileUnits;
// Of a tile's steps, that are read side by side: memory gives several streams faster than one.
constexpr int64_t kTileParts = 4;

// The step that comes as number i of `steps`: one of every part in turn, then what is left.
template <int64_t parts = kTileParts>
inline int64_t in_parts(int64_t i, int64_t steps) {
  const int64_t each = steps / parts;
  return i < parts * each ? i % parts * each + i / parts : i;
}

// Asks for what lies `ahead` bytes behind a tile.
inline void ask_behind(const uint8_t* tile, int64_t ahead) {
#pragma GCC unroll 16
  for (int64_t line = 0; line < kTileBytes; line += kLine) __builtin_prefetch(tile + ahead + line, 0, kNextCache);
}

struct TilePair {
  const void *w, *x;   // of x the first group's, and `next` bytes on the next one's
  int64_t apart = 0;  // bytes to the second tile of W
};

// The unit for products of `rows` rows and tiles of W. Tiles 0 to 3 are sums, 4 is of W, 5 and 7 are of x, and 6 is of W where
// rows are so few that two tiles of it are multiplied at once, else of x.
inline UnitInUse unit_for(int64_t rows) {
  const TileShape of_x{std::min(kGroup, rows), kTileRow}, of_w{kGroup, kTileRow};
  return UnitInUse({of_x, of_x, of_x, of_x, of_w, of_x, rows > kSummedGroups / 2 * kGroup ? of_x : of_w, of_x});
}

// sums [G groups, 16 rows, 16 rows of W]: integers where `bytes`, else fp32. at(i) tells the i-th pair of tiles.
template <int G, bool bytes, typename At>
inline void sum_tiles(int64_t steps, int64_t next, const At& at, void* sums) {
  static_assert(G <= kSummedGroups);
  before_tiles();
  _tile_zero(0);
  if constexpr (G > 1) _tile_zero(1);
  if constexpr (G > 2) _tile_zero(2);
  if constexpr (G > 3) _tile_zero(3);
  for (int64_t i = 0; i < steps; ++i) {
    const TilePair tiles = at(i);
    const char* x = (const char*)tiles.x;
    _tile_loadd(4, tiles.w, kTileRow);
    _tile_loadd(5, x, kTileRow);
    if constexpr (bytes) _tile_dpbsud(0, 5, 4);
    else _tile_dpbf16ps(0, 5, 4);
    if constexpr (G > 1) {
      _tile_loadd(7, x + next, kTileRow);
      if constexpr (bytes) _tile_dpbsud(1, 7, 4);
      else _tile_dpbf16ps(1, 7, 4);
    }
    if constexpr (G > 2) {
      _tile_loadd(6, x + 2 * next, kTileRow);
      if constexpr (bytes) _tile_dpbsud(2, 6, 4);
      else _tile_dpbf16ps(2, 6, 4);
    }
    if constexpr (G > 3) {
      _tile_loadd(5, x + 3 * next, kTileRow);
      if constexpr (bytes) _tile_dpbsud(3, 5, 4);
      else _tile_dpbf16ps(3, 5, 4);
    }
  }
  char* to = (char*)sums;
  _tile_stored(0, to, kTileRow);
  if constexpr (G > 1) _tile_stored(1, to + kTileBytes, kTileRow);
  if constexpr (G > 2) _tile_stored(2, to + 2 * kTileBytes, kTileRow);
  if constexpr (G > 3) _tile_stored(3, to + 3 * kTileBytes, kTileRow);
  before_tiles();  // nor does gcc know that they write it
}

// sums [2, G groups, 16 rows, 16 rows of W] of two tiles of W.
template <int G, typename At>
inline void sum_two_tiles(int64_t steps, int64_t next, const At& at, int32_t* sums) {
  static_assert(2 * G <= kSummedGroups);
  before_tiles();
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (G > 1) _tile_zero(2);
  if constexpr (G > 1) _tile_zero(3);
  for (int64_t i = 0; i < steps; ++i) {
    const TilePair tiles = at(i);
    _tile_loadd(5, tiles.x, kTileRow);
    _tile_loadd(4, tiles.w, kTileRow);
    _tile_dpbsud(0, 5, 4);
    _tile_loadd(6, (const char*)tiles.w + tiles.apart, kTileRow);
    _tile_dpbsud(1, 5, 6);
    if constexpr (G > 1) {
      _tile_loadd(7, (const char*)tiles.x + next, kTileRow);
      _tile_dpbsud(2, 7, 4);
      _tile_dpbsud(3, 7, 6);
    }
  }
  int32_t* second = sums + G * kTileUnits;
  _tile_stored(0, sums, kTileRow);
  _tile_stored(1, second, kTileRow);
  if constexpr (G > 1) _tile_stored(2, sums + kTileUnits, kTileRow);
  if constexpr (G > 1) _tile_stored(3, second + kTileUnits, kTileRow);
  before_tiles();
}

}  // namespace

#endif
