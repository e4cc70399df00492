// Tensors of Python, checked and seen as what the kernels take.

#pragma once

#include <ATen/ATen.h>

#include "product.h"
#include "small.h"

namespace {

// Calls work with a value of the tensor's C++ type.
template <typename Work>
void typed(const at::Tensor& tensor, const Work& work) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return work(float{});
    case at::kBFloat16: return work(at::BFloat16{});
    case at::kHalf: return work(at::Half{});
    default: TORCH_CHECK(false, "dtype ", tensor.scalar_type(), " is not supported");
  }
}

template <typename T>
Matrix<T> matrix(const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "the weight must be a contiguous matrix");
  TORCH_CHECK(!bias || (bias->scalar_type() == weight.scalar_type() && bias->is_contiguous() &&
                        bias->numel() == weight.size(0)),
              "the bias does not belong to the weight");
  return {weight.const_data_ptr<T>(), bias ? bias->const_data_ptr<T>() : nullptr, weight.size(0), weight.size(1)};
}

inline SmallMatrix small_matrix(const at::Tensor& quants, const at::Tensor& scales, const std::optional<at::Tensor>& bias,
                                int64_t bits, int64_t N, int64_t K) {
  SmallMatrix w;
  w.N = N, w.K = K, w.bits = (int)bits;
  TORCH_CHECK((bits == 8 || bits == 4) && quants.scalar_type() == at::kByte && quants.is_contiguous() &&
                  quants.dim() == 4 && quants.size(0) == w.tiles() && quants.numel() == w.tiles() * w.tile_bytes(),
              "small weight: quants ", quants.sizes(), " are not ", N, " x ", K, " numbers of ", bits, " bits");
  TORCH_CHECK(scales.scalar_type() == (bits == 8 ? at::kFloat : at::kHalf) && scales.is_contiguous() && scales.dim() == 3 &&
                  scales.size(0) == w.tiles() && scales.size(1) > 0 && scales.size(2) == kLanes && K % scales.size(1) == 0 &&
                  (bits == 8 ? scales.size(1) == 1 : K / scales.size(1) % kFixed == 0),
              "small weight: scales ", scales.sizes(), " do not belong to ", N, " x ", K, " numbers of ", bits, " bits");
  TORCH_CHECK(!bias || (bias->scalar_type() == at::kFloat && bias->is_contiguous() && bias->numel() == N),
              "small weight: the bias must be ", N, " numbers in fp32");
  w.quants = quants.const_data_ptr<uint8_t>();
  w.scales = scales.const_data_ptr();
  w.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  w.group = K / scales.size(1);
  return w;
}

}  // namespace
