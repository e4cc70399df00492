// What Python calls for small weights: fastllama_native::linear_small, expand_small and quantise_small.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <string>

#include "checks.h"
#include "small_expand.h"
#include "small_operand.h"
#include "small_quantise.h"

namespace {

constexpr int64_t kShared = 128;  // rows of x that are kept as the product takes them while all of W passes

at::Tensor linear_small(const at::Tensor& input, const at::Tensor& quants, const at::Tensor& scales,
                        const std::optional<at::Tensor>& bias, int64_t bits, int64_t out_features) {
  const int64_t K = input.size(-1), M = K ? input.numel() / K : 0;
  std::optional<at::Tensor> wide;
  if (bias) wide = bias->to(at::kFloat).contiguous();
  const SmallMatrix w = small_matrix(quants, scales, wide, bits, out_features, K);
  auto sizes = input.sizes().vec();
  sizes.back() = w.N;
  at::Tensor out = at::empty(sizes, input.options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  const at::Tensor x = input.contiguous();
  typed(x, [&](auto zero) {
    using T = decltype(zero);
    thread_local SmallOperand operand;
    SmallOperand& shared = operand;  // each thread has one of its own
    for (int64_t row = 0; row < M; row += kShared) {
      const int64_t rows = std::min(kShared, M - row);
      const T* from = x.const_data_ptr<T>() + row * K;
      T* y = out.mutable_data_ptr<T>() + row * w.N;
      shared.shape<T>(w, rows);
      at::parallel_for(0, rows, std::max<int64_t>(1, 65536 / K), [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m) shared.put(m, [&](int64_t k) { return from + m * K + k; });
      });
      at::parallel_for(0, w.tiles(), std::max<int64_t>(1, 16384 / (K * rows * kLanes)), [&](int64_t begin, int64_t end) {
        shared.multiply(w, begin, end, [&](int64_t m, int64_t n, float value) { y[m * w.N + n] = T(value); });
      });
    }
  });
  return out;
}

// Writes rows first, first + 1, ... to `out` [count, K]; first is a tile's.
void expand_small(const at::Tensor& quants, const at::Tensor& scales, int64_t bits, int64_t first, const at::Tensor& out) {
  TORCH_CHECK(out.dim() == 2 && out.is_contiguous(), "expand_small: out must be a contiguous matrix");
  const SmallMatrix w = small_matrix(quants, scales, std::nullopt, bits, quants.size(0) * kLanes, out.size(1));
  const int64_t count = out.size(0);
  TORCH_CHECK_INDEX(first >= 0 && first % kLanes == 0 && first + count <= w.N, "expand_small: ", count, " rows from ", first,
                    " on are not among ", w.N, ", or begin within a tile");
  typed(out, [&](auto zero) {
    using T = decltype(zero);
    T* to = out.mutable_data_ptr<T>();
    at::parallel_for(0, (count + kLanes - 1) / kLanes, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t rows = std::min(kLanes, count - t * kLanes), tile = first / kLanes + t;
        (w.bits == 8 ? expand_tile<8, T> : expand_tile<4, T>)(w, tile, rows, to + t * kLanes * w.K);
      }
    });
  });
}

// Writes a float weight to quants and scales; false where it holds NaN or infinities.
bool quantise_small(const at::Tensor& weight, int64_t bits, const at::Tensor& quants, const at::Tensor& scales) {
  TORCH_CHECK(weight.dim() == 2 && weight.stride(1) == 1, "quantise_small: a weight's layout");
  const SmallMatrix w = small_matrix(quants, scales, std::nullopt, bits, weight.size(0), weight.size(1));
  uint8_t* to = quants.mutable_data_ptr<uint8_t>();
  char* shared = (char*)scales.mutable_data_ptr();
  const int64_t each = scales.size(1) * kLanes, padded = w.blocks() * kFixed;
  std::atomic<bool> finite = true;
  typed(weight, [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, w.tiles(), 1, [&](int64_t begin, int64_t end) {
      std::vector<float> x(padded);
      std::vector<uint8_t> bytes(padded);
      for (int64_t n = begin * kLanes; n < end * kLanes; ++n) {
        const int64_t tile = n / kLanes;
        if (n >= w.N) std::fill(x.begin(), x.end(), 0.f);
        else if (!widen(weight.const_data_ptr<T>() + n * weight.stride(0), w.K, x)) finite = false;
        quantise_row(x, w.bits, w.K, w.group, n % kLanes, to + tile * w.tile_bytes(), (float*)shared + tile * each,
                     (at::Half*)shared + tile * each, bytes);
      }
    });
  });
  return finite;
}

// Of which integers the processor sums products in one instruction, on which linear_small lives.
std::string sums_products_of() {
#if defined(FASTLLAMA_BYTES)
  return "bytes";
#elif defined(__AVX512BW__) || defined(FASTLLAMA_AVX2)
  return "shorts";
#else
  return "none";
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastllama_native, library) {
  library.def("sums_products_of() -> str", &sums_products_of);
  library.def("linear_small(Tensor x, Tensor quants, Tensor scales, Tensor? bias, int bits, int out_features) -> Tensor");
  library.def("expand_small(Tensor quants, Tensor scales, int bits, int first, Tensor(a!) out) -> ()");
  library.def("quantise_small(Tensor weight, int bits, Tensor(a!) quants, Tensor(b!) scales) -> bool");
}
TORCH_LIBRARY_IMPL(fastllama_native, CPU, library) {
  library.impl("linear_small", &linear_small);
  library.impl("expand_small", &expand_small);
  library.impl("quantise_small", &quantise_small);
}
