// What Python calls: fastllama_native::linear_rows and the class Step.

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include "checks.h"
#include "step.h"

namespace {

template <typename T>
const T* data(const at::Tensor& tensor) {
  return tensor.const_data_ptr<T>();
}

at::Tensor linear_rows(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(input.dim() > 0 && weight.dim() == 2 && input.size(-1) == weight.size(1), "linear_rows: x has ",
              input.sizes(), " and the weight ", weight.sizes());
  TORCH_CHECK(input.scalar_type() == weight.scalar_type(), "linear_rows: x and the weight differ in dtype");
  auto sizes = input.sizes().vec();
  sizes.back() = weight.size(0);
  at::Tensor out = at::empty(sizes, input.options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  if (weight.size(1) == 0) return at::linear(input, weight, bias);
  const at::Tensor x = input.contiguous();
  typed(weight, [&](auto zero) {
    using T = decltype(zero);
    const Matrix<T> w = matrix<T>(weight, bias);
    const int64_t M = x.numel() / w.K;
    thread_local Operand<T> operand;
    const Operand<T>& shared = operand;
    operand.shape(M, w.K);
    for (int64_t m = 0; m < M; ++m) {
      const T* row = data<T>(x) + m * w.K;
      operand.blocks(m, [&](int64_t k, int64_t count, auto* to) { std::copy(row + k, row + k + count, to); });
    }
    T* y = out.mutable_data_ptr<T>();
    const int64_t chunks = (w.N + kChunk - 1) / kChunk;
    at::parallel_for(0, chunks, std::max<int64_t>(1, 16384 / (w.K * M * kChunk)), [&](int64_t begin, int64_t end) {
      multiply(shared, w, begin * kChunk, std::min(w.N, end * kChunk),
               [&](int64_t m, int64_t n, float value) { y[m * w.N + n] = T(value); });
    });
  });
  return out;
}

// Whether several rows in bf16 are multiplied in a matrix unit.
bool has_matrix_unit() {
#if defined(FASTLLAMA_UNIT)
  return has_unit();
#else
  return false;
#endif
}

using CachedLayers = std::vector<std::vector<at::Tensor>>;  // the parts of each layer's keys or values

// The tensors are held for as long as this lives: their addresses are what the step reads.
class Step : public torch::CustomClassHolder {
 public:
  // matrices, scales, biases, rows and columns: qkv, o, gate and up, down of each layer, the head, the embedding. One
  // without scales is in the model's dtype, the others are quants. norms: input and post of each layer, then the last.
  // keys and values: each layer's parts, in the two formats. mask: none where nobody else reads one. offset: none where
  // positions are places in the cache. sizes: heads, kv heads, head dim. numbers: attention scale, then each norm's
  // epsilon.
  Step(std::vector<at::Tensor> matrices, std::vector<std::optional<at::Tensor>> scales,
       std::vector<std::optional<at::Tensor>> biases, std::vector<int64_t> rows, std::vector<int64_t> columns,
       std::vector<at::Tensor> norms, CachedLayers keys, CachedLayers values, std::vector<std::string> formats,
       std::optional<at::Tensor> mask, at::Tensor valid_past_index, at::Tensor cos, at::Tensor sin,
       std::optional<at::Tensor> offset, std::vector<int64_t> sizes, std::vector<double> numbers)
      : matrices_(std::move(matrices)), scales_(std::move(scales)), biases_(std::move(biases)), norms_(std::move(norms)),
        keys_(std::move(keys)), values_(std::move(values)),
        others_{norms_.at(0), mask.value_or(cos), valid_past_index, cos, sin, offset.value_or(valid_past_index)} {
    const size_t L = keys_.size();
    const size_t W = 4 * L + 2;
    TORCH_CHECK(matrices_.size() == W && scales_.size() == W && biases_.size() == W && rows.size() == W &&
                    columns.size() == W && norms_.size() == 2 * L + 1 &&
                    numbers.size() == norms_.size() + 1 && sizes.size() == 3 && values_.size() == L && formats.size() == 2,
                "Step: the lists do not belong together");
    for (const auto& tensor : {others_[1], cos, sin})
      TORCH_CHECK(tensor.scalar_type() == others_[0].scalar_type() && tensor.is_contiguous(), "Step: a tensor's layout");
    TORCH_CHECK(L > 0 && !keys_[0].empty() && keys_[0][0].dim() == 4, "Step: keys are not [B, K, S, n]");
    const Sizes shape{sizes[0], sizes[1], sizes[2], keys_[0][0].size(0), keys_[0][0].size(2), (float)numbers[0]};
    TORCH_CHECK(!mask || mask->numel() == shape.batch * shape.positions, "Step: the mask is not of the cache's size");
    TORCH_CHECK(others_[5].scalar_type() == at::kLong && others_[5].is_contiguous() && others_[5].numel() == shape.batch,
                "Step: the offset is not int64 [B]");
    for (const auto* layers : {&keys_, &values_})
      for (const auto& parts : *layers)
        TORCH_CHECK(!parts.empty() && parts[0].dim() == 4 && parts[0].size(0) == shape.batch &&
                        parts[0].size(1) == shape.kv_heads && parts[0].size(2) == shape.positions,
                    "Step: a layer's cache is not of ", shape.batch, " rows, ", shape.kv_heads, " heads and ",
                    shape.positions, " positions");
    auto build = [&](auto zero, auto& decoder) {
      using T = decltype(zero);
      auto at = [&](size_t i) {
        Weight<T> weight;
        weight.N = rows[i], weight.K = columns[i];
        if (!scales_[i]) {
          weight.plain = matrix<T>(matrices_[i], biases_[i]);
          TORCH_CHECK(weight.plain.N == weight.N && weight.plain.K == weight.K, "Step: a matrix's shape");
          return weight;
        }
        if (biases_[i]) biases_[i] = biases_[i]->to(at::kFloat).contiguous();
        const int bits = scales_[i]->scalar_type() == at::kFloat ? 8 : 4;
        weight.small = small_matrix(matrices_[i], *scales_[i], biases_[i], bits, weight.N, weight.K);
        return weight;
      };
      decoder.sizes = shape;
      for (size_t l = 0; l < L; ++l)
        decoder.layers.push_back({at(4 * l), at(4 * l + 1), at(4 * l + 2), at(4 * l + 3), data<T>(norms_[2 * l]),
                                  data<T>(norms_[2 * l + 1]), (float)numbers[2 * l + 1], (float)numbers[2 * l + 2],
                                  side<T>(keys_[l], formats[0], shape.dim), side<T>(values_[l], formats[1], shape.dim)});
      decoder.head = at(4 * L);
      decoder.embedding = at(4 * L + 1);
      decoder.norm = data<T>(norms_[2 * L]);
      decoder.eps = (float)numbers[2 * L + 1];
      decoder.mask = mask ? others_[1].mutable_data_ptr<T>() : nullptr;
      decoder.valid_past_index = others_[2].mutable_data_ptr<int64_t>();
      decoder.offset = offset ? data<int64_t>(others_[5]) : nullptr;
      decoder.cos = data<T>(others_[3]);
      decoder.sin = data<T>(others_[4]);
    };
    typed(others_[0], [&](auto zero) { build(zero, std::get<Decoder<decltype(zero)>>(decoders_)); });
  }

  at::Tensor run(const at::Tensor& ids) {
    TORCH_CHECK(ids.dim() == 2 && ids.scalar_type() == at::kLong && ids.is_contiguous(), "Step: ids must be int64 [B, Q]");
    at::Tensor logits;
    typed(others_[0], [&](auto zero) {
      using T = decltype(zero);
      auto& decoder = std::get<Decoder<T>>(decoders_);
      TORCH_CHECK(ids.size(0) == decoder.sizes.batch, "Step: ids have ", ids.size(0), " rows and the cache ",
                  decoder.sizes.batch);
      const int64_t V = decoder.embedding.N, S = decoder.sizes.positions;
      for (int64_t b = 0; b < ids.size(0); ++b) {
        TORCH_CHECK(decoder.valid_past_index[b] + ids.size(1) <= S, "Step: row ", b, " of the cache is full");
        for (int64_t q = 0; q < ids.size(1); ++q) {
          const int64_t id = ids.const_data_ptr<int64_t>()[b * ids.size(1) + q];
          TORCH_CHECK_INDEX(id >= 0 && id < V, "Step: token ", id, " is not below the vocabulary's ", V);
        }
      }
      logits = at::empty({ids.size(0), ids.size(1), decoder.head.N}, others_[0].options());
      decoder.run(ids.const_data_ptr<int64_t>(), ids.size(1), logits.template mutable_data_ptr<T>());
    });
    return logits;
  }

 private:
  std::vector<at::Tensor> matrices_;
  std::vector<std::optional<at::Tensor>> scales_, biases_;
  std::vector<at::Tensor> norms_;
  CachedLayers keys_, values_;
  std::vector<at::Tensor> others_;
  std::tuple<Decoder<float>, Decoder<at::BFloat16>, Decoder<at::Half>> decoders_;
};

}  // namespace

TORCH_LIBRARY(fastllama_native, library) {
  library.def("linear_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  library.def("has_matrix_unit() -> bool", &has_matrix_unit);
  library.class_<Step>("Step")
      .def(torch::init<std::vector<at::Tensor>, std::vector<std::optional<at::Tensor>>,
                       std::vector<std::optional<at::Tensor>>, std::vector<int64_t>, std::vector<int64_t>,
                       std::vector<at::Tensor>, CachedLayers, CachedLayers, std::vector<std::string>,
                       std::optional<at::Tensor>,
                       at::Tensor, at::Tensor, at::Tensor, std::optional<at::Tensor>, std::vector<int64_t>,
                       std::vector<double>>())
      .def("run", &Step::run);
}
TORCH_LIBRARY_IMPL(fastllama_native, CPU, library) {
  library.impl("linear_rows", &linear_rows);
}
