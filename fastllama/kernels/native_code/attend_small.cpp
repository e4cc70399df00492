// attend_small_head: a file of its own, since what it is built for is no dtype but the head dims.

#include "small_eight.h"
#include "small_lanes.h"

#if defined(FASTLLAMA_SMALL_BLOCKS)

namespace {

template <int V>
void attend_small_group(const float* query, float scale, const Run& keys, const Run& values, int64_t begin, int64_t end,
                        const int64_t* seen, int R, const Partial& out) {
  if (R == 1) return attend_small<V, 1>(query, scale, keys, values, begin, end, seen, out);
  if (R == 2) return attend_small<V, 2>(query, scale, keys, values, begin, end, seen, out);
#if defined(FASTLLAMA_EIGHT)
  attend_small_eight<V>(query, scale, keys, values, begin, end, seen, R, out);
#else
#if defined(FASTLLAMA_LANES)
  // Intel's multiply rows of a whole vector 1.2 times as fast.
  if constexpr (V % 2 == 0) if (!is_intel()) {
    if (R <= kLaneRows / 2)
      return attend_small_lanes<V, kLaneRows / 2>(query, scale, keys, values, begin, end, seen, R, out);
    if (R <= kLaneRows) return attend_small_lanes<V, kLaneRows>(query, scale, keys, values, begin, end, seen, R, out);
  }
#endif
  attend_small_rows<V>(query, scale, keys, values, begin, end, seen, R, out);
#endif
}

}  // namespace

void fastllama::attend_small_head(int64_t D, const float* units, float scale, const Run& keys, const Run& values,
                                  int64_t begin, int64_t end, const int64_t* seen, int R, const Partial& out) {
  for_head_dim(D, [&](auto v) { attend_small_group<decltype(v)::value>(units, scale, keys, values, begin, end, seen, R, out); });
}

#endif
