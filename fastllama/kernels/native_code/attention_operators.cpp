// What Python calls to store keys and values as a cache keeps them, and to attend to them: `attend_prompt` where they
// are in the model's own type and every token sees those before it, `attend_stored` in every other case.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "checks.h"
#include "prompt.h"
#include "quantise.h"

namespace {

at::Tensor attend_prompt(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, int64_t past,
                         double scale) {
  const int64_t B = query.size(0), Q = query.size(1), N = query.size(2), D = query.size(3), K = keys.size(1);
  TORCH_CHECK(keys.dim() == 4 && keys.sizes() == values.sizes() && keys.size(0) >= B && keys.size(3) == D && N % K == 0 &&
                  past >= 0 && keys.size(2) >= past + Q,
              "attend_prompt: queries ", query.sizes(), " after ", past, " do not fit keys ", keys.sizes());
  for (const auto& tensor : {query, keys, values})
    TORCH_CHECK(tensor.scalar_type() == query.scalar_type() && tensor.stride(3) == 1, "attend_prompt: a tensor's layout");
  TORCH_CHECK(keys.stride(2) == D && values.stride(2) == D, "attend_prompt: positions must lie one after the other");
  at::Tensor out = at::empty({B, Q, N * D}, query.options().memory_format(at::MemoryFormat::Contiguous));
  typed(query, [&](auto zero) {
    using T = decltype(zero);
    const Strided<const T> asking{query.const_data_ptr<T>(), query.stride(0), query.stride(1), query.stride(2)};
    const Strided<T> result{out.mutable_data_ptr<T>(), Q * N * D, N * D, D};
    const Side key = side<T>({keys}, kFormats[(int)kFormatOf<T>], D);
    const Side value = side<T>({values}, kFormats[(int)kFormatOf<T>], D);
    attend_chunk<T>(
        asking, key, value, [&](int64_t, int64_t q) { return past + q + 1; }, result, B, Q, N, K, D, (float)scale);
  });
  return out;
}

// Integers [B, Q], each from least to most, wherever they come from.
at::Tensor checked(const at::Tensor& x, int64_t B, int64_t Q, int64_t least, int64_t most, const char* name) {
  TORCH_CHECK(x.dim() == 2 && x.size(0) == B && x.size(1) == Q && x.scalar_type() == at::kLong, name, " must be int64 [", B,
              ", ", Q, "]");
  const at::Tensor numbers = x.contiguous();
  const int64_t* first = numbers.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < B * Q; ++i)
    TORCH_CHECK_INDEX(first[i] >= least && first[i] <= most, name, " has ", first[i], ", not from ", least, " to ", most);
  return numbers;
}

at::Tensor attend_stored(const at::Tensor& query, at::TensorList keys, c10::string_view key_format, at::TensorList values,
                         c10::string_view value_format, const at::Tensor& seen, double scale) {
  TORCH_CHECK(query.dim() == 4 && query.stride(3) == 1 && !keys.empty() && !values.empty() && keys[0].dim() == 4 &&
                  values[0].dim() == 4,
              "attend_stored: a tensor's layout");
  const int64_t B = query.size(0), Q = query.size(1), N = query.size(2), D = query.size(3);
  const int64_t K = keys[0].size(1), S = keys[0].size(2);
  TORCH_CHECK(keys[0].sizes().slice(0, 3) == values[0].sizes().slice(0, 3) && keys[0].size(0) >= B && K > 0 && N % K == 0,
              "attend_stored: queries ", query.sizes(), " do not fit keys ", keys[0].sizes(), " and values ", values[0].sizes());
  const at::Tensor counts = checked(seen, B, Q, 1, S, "attend_stored: seen");
  at::Tensor out = at::empty({B, Q, N * D}, query.options().memory_format(at::MemoryFormat::Contiguous));
  typed(query, [&](auto zero) {
    using T = decltype(zero);
    const Side key = side<T>(keys.vec(), std::string(key_format), D);
    const Side value = side<T>(values.vec(), std::string(value_format), D);
    const Strided<const T> asking{query.const_data_ptr<T>(), query.stride(0), query.stride(1), query.stride(2)};
    const Strided<T> result{out.mutable_data_ptr<T>(), Q * N * D, N * D, D};
    const int64_t* visible = counts.const_data_ptr<int64_t>();
    attend_chunk<T>(
        asking, key, value, [&](int64_t b, int64_t q) { return visible[b * Q + q]; }, result, B, Q, N, K, D, (float)scale);
  });
  return out;
}

void store_tokens(const at::Tensor& fresh, at::TensorList parts, c10::string_view format, const at::Tensor& index) {
  TORCH_CHECK(fresh.dim() == 4 && fresh.stride(3) == 1 && !parts.empty() && parts[0].dim() == 4, "store: a tensor's layout");
  const int64_t B = fresh.size(0), Q = fresh.size(1), K = fresh.size(2), D = fresh.size(3);
  TORCH_CHECK(parts[0].size(0) >= B && parts[0].size(1) == K, "store: new tokens ", fresh.sizes(), " do not fit the cache's ",
              parts[0].sizes());
  const at::Tensor where = checked(index, B, Q, 0, parts[0].size(2) - 1, "store: index");
  typed(fresh, [&](auto zero) {
    using T = decltype(zero);
    const Side to = side<T>(parts.vec(), std::string(format), D);
    const T* from = fresh.const_data_ptr<T>();
    const int64_t* positions = where.const_data_ptr<int64_t>();
    at::parallel_for(0, B * Q * K, std::max<int64_t>(1, 16384 / D), [&](int64_t begin, int64_t end) {
      std::vector<float> row(D);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / (Q * K), q = task / K % Q, k = task % K;
        const T* x = from + b * fresh.stride(0) + q * fresh.stride(1) + k * fresh.stride(2);
        std::copy(x, x + D, row.begin());
        quantise<T>(row.data(), (int)D, to.at(b, k), positions[b * Q + q]);
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastllama_native, library) {
  library.def("attend_prompt(Tensor query, Tensor keys, Tensor values, int past, float scale) -> Tensor");
  library.def(
      "attend_stored(Tensor query, Tensor[] keys, str key_format, Tensor[] values, str value_format, Tensor seen, "
      "float scale) -> Tensor");
  library.def("store(Tensor new, Tensor(a!)[] parts, str format, Tensor index) -> ()");
  library.impl("attend_prompt", c10::DispatchKey::CPU, &attend_prompt);
  library.impl("attend_stored", c10::DispatchKey::CPU, &attend_stored);
  library.impl("store", c10::DispatchKey::CPU, &store_tokens);
}
