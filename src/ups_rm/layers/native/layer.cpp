// One layer of a decode step in one call: `FastDecoder._layer`, whose steps these are, without what lies between them.
#include "kernels.h"

namespace ups_rm {

namespace {
at::Tensor beside(const at::Tensor& x, const std::optional<at::Tensor>& low) {
  return low ? at::cat({x, times_packed(x, *low, std::nullopt, std::nullopt, std::nullopt)}, 1) : x;
}
}  // namespace

at::Tensor decode_layer(const at::Tensor& x, const LayerWeights& weights, const at::Tensor& cos, const at::Tensor& sin,
                        const std::vector<at::Tensor>& cache, const at::Tensor& cells, const at::Tensor& lengths,
                        int64_t position, const std::vector<at::Tensor>& kept) {
  TORCH_CHECK(cache.size() == 4 && (kept.empty() || kept.size() == 5), "4 tensors of the cache, 5 or none that are kept");
  const auto room = [&](size_t i) { return kept.empty() ? std::nullopt : std::optional<at::Tensor>(kept[i]); };
  const auto& w = weights;
  const at::Tensor first = beside(rms_norm(x, w.norm1, w.eps), w.qkv_low);
  const at::Tensor qkv = times_packed(first, w.qkv, w.qkv_bias, std::nullopt, room(0));
  const at::Tensor heads = qkv.view({x.size(0), -1, cos.size(-1)});
  const at::Tensor seen = attend(heads, cos, sin, cache[0], cache[1], cache[2], cache[3], cells, lengths, position);
  const at::Tensor attended = times_packed(beside(seen, w.out_low), w.out, w.out_bias, x, room(1));
  const at::Tensor second = beside(rms_norm(attended, w.norm2, w.eps), w.mlp_low);
  const auto [product, gate, up] = gated(second, w.gate, w.up, room(2), room(3));
  return times_packed(beside(product, w.down_low), w.down, std::nullopt, attended, room(4));
}

}  // namespace ups_rm
