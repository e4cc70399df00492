// What Python calls for small weights: fastllama_native::linear_small and expand_small.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "checks.h"
#include "small.h"

namespace {

at::Tensor linear_small(const at::Tensor& input, const at::Tensor& quants, const at::Tensor& scales,
                        const std::optional<at::Tensor>& bias, int64_t bits, int64_t out_features) {
  const int64_t K = input.size(-1), M = K ? input.numel() / K : 0;
  std::optional<at::Tensor> wide;
  if (bias) wide = bias->to(at::kFloat).contiguous();
  const SmallMatrix w = small_matrix(quants, scales, wide, bits, out_features, K);
  TORCH_CHECK(M <= kFewRows, "linear_small: ", M, " rows are more than the ", kFewRows, " it is for");
  auto sizes = input.sizes().vec();
  sizes.back() = w.N;
  at::Tensor out = at::empty(sizes, input.options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  const at::Tensor x = input.contiguous();
  typed(x, [&](auto zero) {
    using T = decltype(zero);
    thread_local Fixed fixed;
    const Fixed& shared = fixed;
    fixed.shape(M, K);
    for (int64_t m = 0; m < M; ++m) take_row(fixed, m, x.const_data_ptr<T>() + m * K, K);
    T* y = out.mutable_data_ptr<T>();
    at::parallel_for(0, w.tiles(), std::max<int64_t>(1, 16384 / (K * M * kLanes)), [&](int64_t begin, int64_t end) {
      multiply_small(shared, w, begin, end, [&](int64_t m, int64_t n, float value) { y[m * w.N + n] = T(value); });
    });
  });
  return out;
}

at::Tensor expand_small(const at::Tensor& quants, const at::Tensor& scales, int64_t bits, int64_t in_features,
                        const at::Tensor& rows, at::ScalarType dtype) {
  const SmallMatrix w = small_matrix(quants, scales, std::nullopt, bits, quants.size(0) * kLanes, in_features);
  TORCH_CHECK(rows.scalar_type() == at::kLong && rows.is_contiguous(), "expand_small: rows must be int64");
  auto sizes = rows.sizes().vec();
  sizes.push_back(w.K);
  at::Tensor out = at::empty(sizes, scales.options().dtype(dtype));
  const int64_t* wanted = rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows.numel(); ++i)
    TORCH_CHECK_INDEX(wanted[i] >= 0 && wanted[i] < w.N, "expand_small: row ", wanted[i], " is not below ", w.N);
  typed(out, [&](auto zero) {
    using T = decltype(zero);
    T* to = out.mutable_data_ptr<T>();
    at::parallel_for(0, rows.numel(), std::max<int64_t>(1, 16384 / std::max<int64_t>(1, w.K)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) expand_row(w, wanted[i], to + i * w.K);
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastllama_native, library) {
  library.def("linear_small(Tensor x, Tensor quants, Tensor scales, Tensor? bias, int bits, int out_features) -> Tensor");
  library.def("expand_small(Tensor quants, Tensor scales, int bits, int in_features, Tensor rows, ScalarType dtype) -> Tensor");
}
TORCH_LIBRARY_IMPL(fastllama_native, CPU, library) {
  library.impl("linear_small", &linear_small);
  library.impl("expand_small", &expand_small);
}
