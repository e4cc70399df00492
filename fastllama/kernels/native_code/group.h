// Which code attends: by the number of query rows of a kv head, and by what its keys and values are stored as.
//
// Legend: R query rows of one kv head (group x new tokens), D head dim, V = D / kVector.

#pragma once

#include "eight.h"
#include "stored.h"
#include "unit_lanes.h"
#include "unit_rows.h"

namespace {

// As the number of rows makes it fastest. `units` of one or two rows are as `attend` has them.
template <typename T, int V, typename Keys, typename Values>
void attend_group(const float* units, float scale, const Keys& keys, const Values& values, int64_t begin, int64_t end,
                  const int64_t* seen, int R, const Partial& out) {
  const auto* query = (const typename Pairs<T, V>::Stored*)units;
  if (R == 1) return attend<T, V, 1>(query, scale, keys, values, begin, end, seen, out);
  if (R == 2) return attend<T, V, 2>(query, scale, keys, values, begin, end, seen, out);
#if defined(FASTLLAMA_UNIT)
  if constexpr (kNumbers<T, V> == 2)
    if (has_unit()) {
      if (R > kLaneRows) return attend_rows_in_unit<T, V>(units, scale, keys, values, begin, end, seen, R, out);
      return attend_lanes_in_unit<T, V>(units, scale, keys, values, begin, end, seen, R, out);
    }
#endif
#if defined(FASTLLAMA_LANES)
  if constexpr (kNumbers<T, V> == 2) {
    if (R <= kLaneRows / 2) return attend_lanes<T, V, kLaneRows / 2>(units, scale, keys, values, begin, end, seen, R, out);
    if (R <= kLaneRows) return attend_lanes<T, V, kLaneRows>(units, scale, keys, values, begin, end, seen, R, out);
  }
#elif defined(FASTLLAMA_EIGHT)
  if (R <= kEight) return attend_eight<T, V>(units, scale, keys, values, begin, end, seen, R, out);
#endif
  attend_rows<T, V>(units, scale, keys, values, begin, end, seen, R, out);
}

#if defined(FASTLLAMA_SMALL_BLOCKS)

// Query rows, at most, that are multiplied with quants: by a model in fp32, and by one in half precision. From there on it
// takes less to expand them.
template <typename T, int V, typename Model>
int most_small_rows() {
  if constexpr (std::is_same_v<Model, float>) return 2;
#if defined(FASTLLAMA_EIGHT)
  return kEight;
#elif defined(FASTLLAMA_UNIT)
  if constexpr (kNumbers<T, V> == 2)
    if (has_unit()) return 16;
#endif
  return std::numeric_limits<int>::max();
}

// Where both sides of a model in Model are small. `units` as rows of T where T is multiplied in pairs, else fp32.
template <typename T, int V, typename Model>
void attend_group(const float* units, float scale, const Expanded<Model, V>& keys, const Expanded<Model, V>& values,
                  int64_t begin, int64_t end, const int64_t* seen, int R, const Partial& out) {
  const bool small = !is_float(keys.run.format) && !is_float(values.run.format);
  if (!small || R > most_small_rows<T, V, Model>())
    return attend_group<T, V, Expanded<Model, V>, Expanded<Model, V>>(units, scale, keys, values, begin, end, seen, R, out);
  thread_local std::vector<float> wide;
  const float* query = units;
  if constexpr (kNumbers<T, V> == 2) {
    wide.resize((int64_t)R * V * kVector);
    for (int64_t i = 0; i < (int64_t)wide.size(); i += kVector) store(&wide[i], Wide<T>::weight((const T*)units + i));
    query = wide.data();
  }
  attend_small_head(V * kVector, query, scale, keys.run, values.run, begin, end, seen, R, out);
}

#endif

}  // namespace
