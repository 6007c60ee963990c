// What the files of this folder call of each other.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>
#include <vector>

namespace ups_rm {

// x (b, H), weight (H,) -> (b, H)
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

// qkv (b, S + 2 K, D) not rotated, cos and sin (b, D), prompt_keys (P, K, D, T'), prompt_values (P, K, T, D), keys
// (P, K, m, D, R') and values (P, K, m, R, D), both written at `position`; cells (b,), lengths (P,) -> (b, S * D).
// T' and R' are T and R or more, whole blocks.
at::Tensor attend(const at::Tensor& qkv, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& prompt_keys,
                  const at::Tensor& prompt_values, const at::Tensor& keys, const at::Tensor& values,
                  const at::Tensor& cells, const at::Tensor& lengths, int64_t position);

// scores (B, K, G * L, M), mask (B, 1, L, M) -> softmax(scale * scores + mask) over the last dimension, the mask the same
// for each of K * G heads.
at::Tensor masked_softmax(const at::Tensor& scores, const at::Tensor& mask, double scale);

// This CPU has the products below, which raise otherwise.
bool multiplies();

// weight (N, K) -> its transposed in panels (N / 32, K / 2, 32, 2). N is a multiple of 32, K even.
at::Tensor pack(const at::Tensor& weight);

// x (M, K) and panels of a weight -> x W^T + bias (N,) + residual (M, N), rounded once; into `out`, where it is given,
// which may be the residual but not x.
at::Tensor times_packed(const at::Tensor& x, const at::Tensor& panels, const std::optional<at::Tensor>& bias,
                        const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& out);

// x (M, K) and panels of two weights -> silu(x G^T) * (x U^T), with both factors of it, rounded as if each were a step.
std::tuple<at::Tensor, at::Tensor, at::Tensor> gated(const at::Tensor& x, const at::Tensor& gate_panels,
                                                     const at::Tensor& up_panels,
                                                     const std::optional<at::Tensor>& gate,
                                                     const std::optional<at::Tensor>& up);

// Of a layer without norms of queries and keys: weights of its products in panels. With LoRA, `..._low` makes more columns
// of a product's input, which its weight reads beside it.
struct LayerWeights {
  at::Tensor norm1, qkv, out, norm2, gate, up, down;
  std::optional<at::Tensor> qkv_bias, out_bias;
  double eps;
  std::optional<at::Tensor> qkv_low, out_low, mlp_low, down_low;
};

// x (b, H), cos and sin (b, 1, D), `cache`: what `attend` takes from prompt_keys to values -> (b, H). `kept`: none, or room
// for queries, keys and values side by side, for the sum after attention, gate, up and the layer's output, (b, ...) each.
at::Tensor decode_layer(const at::Tensor& x, const LayerWeights& weights, const at::Tensor& cos, const at::Tensor& sin,
                        const std::vector<at::Tensor>& cache, const at::Tensor& cells, const at::Tensor& lengths,
                        int64_t position, const std::vector<at::Tensor>& kept);

}  // namespace ups_rm
