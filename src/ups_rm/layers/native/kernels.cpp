// What torch makes of many small operators: a draw from the vocabulary, RMSNorm, rotary embedding, the gated SiLU and the
// loss over the vocabulary, the last four with their gradients; and the module that Python sees, with what stands in
// attention.cpp, products.cpp and layer.cpp.
//
// Loops that a compiler vectorises for whatever CPU it is told (-march=native); all sums are fp32. What they compute is
// written down in torch in sampling.py, elementwise.py and selected_logprobs.py, which are the reference in the tests and
// serve wherever this folder cannot be built. Rows are independent; only the gradient of RMSNorm's weight,
// a sum over rows, is added up in an order that depends on the number of threads.
#include "kernels.h"

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <tuple>
#include <vector>

#include "numbers.h"

namespace ups_rm {

template <typename scalar>
void rms_norm_rows(const scalar* x, const scalar* weight, scalar* out, int64_t rows, int64_t size, float eps) {
  at::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const scalar* from = x + row * size;
      scalar* to = out + row * size;
      float sum = 0;
      floats sums = {};
      int64_t i = 0;
      for (; i + WIDE <= size; i += WIDE) sums += load(from + i) * load(from + i);
      for (; i < size; i++) sum += widen(from[i]) * widen(from[i]);
      sum += sum_of(sums);
      const float inverse = 1.0f / std::sqrt(sum / size + eps);
      for (i = 0; i + WIDE <= size; i += WIDE) save(to + i, load(from + i) * inverse * load(weight + i));
      for (; i < size; i++) to[i] = narrow<scalar>(widen(from[i]) * inverse * widen(weight[i]));
    }
  });
}

// d_x = s (g w - z mean(g w z)), z = x s, s = 1 / sqrt(mean(x^2) + eps); d_weight = sum over rows of g z.
template <typename scalar>
void rms_norm_backward_rows(const scalar* grad, const scalar* x, const scalar* weight, scalar* d_x, float* d_weight,
                            int64_t rows, int64_t size, float eps) {
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    float* mine = d_weight + at::get_thread_num() * size;
    for (int64_t row = begin; row < end; row++) {
      const scalar *g = grad + row * size, *from = x + row * size;
      scalar* to = d_x + row * size;
      float squares = 0, inner = 0;
      floats wide_squares = {}, wide_inner = {};
      int64_t i = 0;
      for (; i + WIDE <= size; i += WIDE) {
        const floats value = load(from + i);
        wide_squares += value * value;
        wide_inner += load(g + i) * load(weight + i) * value;
      }
      for (; i < size; i++) {
        squares += widen(from[i]) * widen(from[i]);
        inner += widen(g[i]) * widen(weight[i]) * widen(from[i]);
      }
      const float s = 1.0f / std::sqrt((squares + sum_of(wide_squares)) / size + eps);
      const float shift = (inner + sum_of(wide_inner)) * s * s * s / size;
      for (i = 0; i + WIDE <= size; i += WIDE) {
        const floats value = load(from + i), slope = load(g + i);
        save(to + i, s * slope * load(weight + i) - value * shift);
        save(mine + i, load(mine + i) + slope * value * s);
      }
      for (; i < size; i++) {
        const float value = widen(from[i]), slope = widen(g[i]);
        to[i] = narrow<scalar>(s * slope * widen(weight[i]) - value * shift);
        mine[i] += slope * value * s;
      }
    }
  });
}

// silu(gate) * up, and with a gradient: (d_gate, d_up), and the product again.
template <typename scalar>
void silu_mul_all(const scalar* gate, const scalar* up, scalar* out, int64_t count) {
  at::parallel_for(0, count / WIDE, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * WIDE; i < end * WIDE; i += WIDE) {
      const floats x = load(gate + i);
      save(out + i, x * sigmoid(x) * load(up + i));
    }
  });
  for (int64_t i = count / WIDE * WIDE; i < count; i++) {
    const float x = widen(gate[i]);
    out[i] = narrow<scalar>(x / (1.0f + std::exp(-x)) * widen(up[i]));
  }
}
template <typename scalar>
void silu_mul_backward_all(const scalar* grad, const scalar* gate, const scalar* up, scalar* d_gate, scalar* d_up,
                           scalar* product, int64_t count) {
  at::parallel_for(0, count / WIDE, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * WIDE; i < end * WIDE; i += WIDE) {
      const floats x = load(gate + i), u = load(up + i), g = load(grad + i), s = sigmoid(x);
      save(d_up + i, g * x * s);
      save(d_gate + i, g * u * s * (1.0f + x * (1.0f - s)));
      save(product + i, x * s * u);
    }
  });
  for (int64_t i = count / WIDE * WIDE; i < count; i++) {
    const float x = widen(gate[i]), g = widen(grad[i]), s = 1.0f / (1.0f + std::exp(-x));
    d_up[i] = narrow<scalar>(g * x * s);
    d_gate[i] = narrow<scalar>(g * widen(up[i]) * s * (1.0f + x * (1.0f - s)));
    product[i] = narrow<scalar>(x * s * widen(up[i]));
  }
}

// One token per row by inversion of the CDF, sums of CHUNK tokens searched first; see sampling.py.
constexpr int64_t CHUNK = 256;
template <typename scalar>
void draw_rows(const scalar* logits, const float* uniform, int64_t* tokens, float* logprobs, float* norms, int64_t rows,
               int64_t size, float inverse_temperature) {
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    const int64_t chunks = (size + CHUNK - 1) / CHUNK;
    std::vector<float> sums(chunks), wide(CHUNK);
    for (int64_t row = begin; row < end; row++) {
      const scalar* from = logits + row * size;
      const float greatest = greatest_of(from, size);
      // the weights of a chunk into `wide`; their sum
      const auto weigh = [&](int64_t chunk) {
        const int64_t first = chunk * CHUNK, count = std::min(CHUNK, size - first);
        for (int64_t j = 0; j < count; j++) wide[j] = (widen(from[first + j]) - greatest) * inverse_temperature;
        for (int64_t j = count; j < CHUNK; j++) wide[j] = -std::numeric_limits<float>::infinity();
        floats sum = {};
        for (int64_t j = 0; j < CHUNK; j += WIDE) {
          const floats power = exp_of_negative(load(wide.data() + j));
          save(wide.data() + j, power);
          sum += power;
        }
        return sum_of(sum);
      };
      float total = 0;
      for (int64_t chunk = 0; chunk < chunks; chunk++) total += sums[chunk] = weigh(chunk);
      const float target = uniform[row] * total;
      float before = 0;
      int64_t chunk = 0, last = 0;
      for (int64_t j = 0; j < chunks; j++)
        if (sums[j] > 0) last = j;
      for (; chunk < last && before + sums[chunk] <= target; chunk++) before += sums[chunk];
      weigh(chunk);
      int64_t token = 0;
      last = 0;
      for (int64_t j = 0; j < CHUNK; j++)
        if (wide[j] > 0) last = j;
      for (; token < last && before + wide[token] <= target; token++) before += wide[token];
      tokens[row] = chunk * CHUNK + token;
      logprobs[row] = (widen(from[tokens[row]]) - greatest) * inverse_temperature - std::log(total);
      norms[row] = greatest * inverse_temperature + std::log(total);
    }
  });
}

// Of each row the log-probability of its target and the norm log sum exp(x / temperature); see selected_logprobs.py.
template <typename scalar>
void selected_logprobs_rows(const scalar* logits, const int64_t* targets, float* logprobs, float* norms, int64_t rows,
                            int64_t size, float inverse_temperature) {
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const scalar* from = logits + row * size;
      const float greatest = greatest_of(from, size);
      floats totals = {};
      float total = 0;
      int64_t i = 0;
      for (; i + WIDE <= size; i += WIDE)
        totals += exp_of_negative((load(from + i) - greatest) * inverse_temperature);
      for (; i < size; i++) total += std::exp((widen(from[i]) - greatest) * inverse_temperature);
      norms[row] = greatest * inverse_temperature + std::log(total + sum_of(totals));
      logprobs[row] = widen(from[targets[row]]) * inverse_temperature - norms[row];
    }
  });
}

// Logits of tokens first, first + 1, ... become the gradient of slope * logprob(target): slope * (onehot - softmax).
// In place; a target that is not among these tokens has no 1 here.
template <typename scalar>
void logits_to_gradient_rows(scalar* logits, const int64_t* targets, const float* norms, const float* slopes,
                             int64_t rows, int64_t size, float inverse_temperature, int64_t first) {
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      scalar* mine = logits + row * size;
      const int64_t at = targets[row] - first;
      const bool inside = at >= 0 && at < size;
      const float norm = norms[row], slope = slopes[row], target = inside ? widen(mine[at]) : 0.0f;
      int64_t i = 0;
      for (; i + WIDE <= size; i += WIDE) {
        const floats below = load(mine + i) * inverse_temperature - norm;
        save(mine + i, -slope * exp_of_negative(below < 0 ? below : floats{}));
      }
      for (; i < size; i++) mine[i] = narrow<scalar>(-slope * std::exp(widen(mine[i]) * inverse_temperature - norm));
      if (inside) mine[at] = narrow<scalar>(slope * (1.0f - std::exp(target * inverse_temperature - norm)));
    }
  });
}

void check_targets(const at::Tensor& targets, const at::Tensor& logits) {
  check(targets, at::kLong, "targets");
  TORCH_CHECK(targets.numel() == logits.size(0), "one target per row of logits");
  TORCH_CHECK(targets.numel() == 0 || (targets.min().item<int64_t>() >= 0 &&
                                       targets.max().item<int64_t>() < logits.size(1)),
              "a target is not in the vocabulary");
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check(x, x.scalar_type(), "x");
  check(weight, x.scalar_type(), "weight");
  TORCH_CHECK(weight.numel() == x.size(-1), "weight has another size than x's rows");
  at::Tensor out = at::empty_like(x);
  const int64_t size = x.size(-1), rows = x.numel() / size;
  dispatch(x.scalar_type(), [&](auto zero) {
    using scalar = decltype(zero);
    rms_norm_rows(in<scalar>(x), in<scalar>(weight), to<scalar>(out), rows, size, eps);
  });
  return out;
}

// Gradients of rms_norm: (d_x as x, d_weight (H,) fp32).
std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                     const at::Tensor& weight, double eps) {
  for (const auto& tensor : {grad, x, weight}) check(tensor, x.scalar_type(), "a tensor");
  TORCH_CHECK(weight.numel() == x.size(-1) && grad.numel() == x.numel(), "sizes do not fit");
  at::Tensor d_x = at::empty_like(x);
  const int64_t size = x.size(-1), rows = x.numel() / size;
  at::Tensor partial = at::zeros({at::get_num_threads(), size}, x.options().dtype(at::kFloat));
  dispatch(x.scalar_type(), [&](auto zero) {
    using scalar = decltype(zero);
    rms_norm_backward_rows(in<scalar>(grad), in<scalar>(x), in<scalar>(weight), to<scalar>(d_x),
                           partial.data_ptr<float>(), rows, size, eps);
  });
  return {d_x, partial.sum(0)};
}

// gate and up of one shape -> silu(gate) * up
at::Tensor silu_mul(const at::Tensor& gate, const at::Tensor& up) {
  for (const auto& tensor : {gate, up}) check(tensor, gate.scalar_type(), "a tensor");
  TORCH_CHECK(gate.numel() == up.numel(), "sizes do not fit");
  at::Tensor out = at::empty_like(gate);
  dispatch(gate.scalar_type(), [&](auto zero) {
    using scalar = decltype(zero);
    silu_mul_all(in<scalar>(gate), in<scalar>(up), to<scalar>(out), gate.numel());
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> silu_mul_backward(const at::Tensor& grad, const at::Tensor& gate,
                                                                 const at::Tensor& up) {
  for (const auto& tensor : {grad, gate, up}) check(tensor, gate.scalar_type(), "a tensor");
  TORCH_CHECK(gate.numel() == up.numel() && gate.numel() == grad.numel(), "sizes do not fit");
  at::Tensor d_gate = at::empty_like(gate), d_up = at::empty_like(up), product = at::empty_like(gate);
  dispatch(gate.scalar_type(), [&](auto zero) {
    using scalar = decltype(zero);
    silu_mul_backward_all(in<scalar>(grad), in<scalar>(gate), in<scalar>(up), to<scalar>(d_gate), to<scalar>(d_up),
                          to<scalar>(product), gate.numel());
  });
  return {d_gate, d_up, product};
}

// x (N, heads, D), cos and sin (N, D) in x's dtype or fp32 -> x rotated; with `sign` -1 rotated back, the gradient.
at::Tensor rotate_heads(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, double sign) {
  check(x, x.scalar_type(), "x");
  for (const auto& tensor : {cos, sin}) check(tensor, cos.scalar_type(), "cos and sin");
  const int64_t rows = x.size(0), heads = x.size(1), size = x.size(2);
  TORCH_CHECK(cos.numel() == rows * size && sin.numel() == rows * size && size % 2 == 0, "sizes do not fit");
  TORCH_CHECK(cos.scalar_type() == x.scalar_type() || cos.scalar_type() == at::kFloat, "cos and sin are not x's or fp32");
  at::Tensor out = at::empty_like(x);
  dispatch(x.scalar_type(), [&](auto zero) {
    using scalar = decltype(zero);
    const scalar* from = in<scalar>(x);
    scalar* into = to<scalar>(out);
    const auto turn = [&](const auto* c, const auto* d) {
      at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++)
          for (int64_t h = row * heads; h < (row + 1) * heads; h++)
            rotate(from + h * size, c + row * size, d + row * size, into + h * size, size, float(sign));
      });
    };
    if (cos.scalar_type() == x.scalar_type()) turn(in<scalar>(cos), in<scalar>(sin));
    else turn(in<float>(cos), in<float>(sin));
  });
  return out;
}

// logits (N, V), targets (N,) -> (logprobs (N,), norms (N,)), fp32
std::tuple<at::Tensor, at::Tensor> selected_logprobs(const at::Tensor& logits, const at::Tensor& targets,
                                                     double temperature) {
  check(logits, logits.scalar_type(), "logits");
  check_targets(targets, logits);
  at::Tensor logprobs = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
  at::Tensor norms = at::empty_like(logprobs);
  dispatch(logits.scalar_type(), [&](auto zero) {
    selected_logprobs_rows(in<decltype(zero)>(logits), targets.const_data_ptr<int64_t>(), logprobs.data_ptr<float>(),
                           norms.data_ptr<float>(), logits.size(0), logits.size(1), float(1 / temperature));
  });
  return {logprobs, norms};
}

// logits (N, C) of the tokens first to first + C - 1, changed in place; targets, norms and slopes (N,)
void logits_to_gradient(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& norms,
                        const at::Tensor& slopes, double temperature, int64_t first) {
  check(logits, logits.scalar_type(), "logits");
  check(targets, at::kLong, "targets");
  TORCH_CHECK(targets.numel() == logits.size(0), "sizes do not fit");
  for (const auto& tensor : {norms, slopes}) {
    check(tensor, at::kFloat, "norms and slopes");
    TORCH_CHECK(tensor.numel() == logits.size(0), "sizes do not fit");
  }
  dispatch(logits.scalar_type(), [&](auto zero) {
    logits_to_gradient_rows(to<decltype(zero)>(logits), targets.const_data_ptr<int64_t>(),
                            norms.const_data_ptr<float>(), slopes.const_data_ptr<float>(), logits.size(0),
                            logits.size(1), float(1 / temperature), first);
  });
}

// logits (b, V), uniform (b,) fp32 -> (token (b,), log-probability and norm (b,) fp32) at that temperature
std::tuple<at::Tensor, at::Tensor, at::Tensor> draw(const at::Tensor& logits, const at::Tensor& uniform,
                                                    double temperature) {
  check(logits, logits.scalar_type(), "logits");
  check(uniform, at::kFloat, "uniform");
  TORCH_CHECK(uniform.numel() == logits.size(0), "sizes do not fit");
  at::Tensor tokens = at::empty({logits.size(0)}, logits.options().dtype(at::kLong));
  at::Tensor logprobs = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
  at::Tensor norms = at::empty_like(logprobs);
  dispatch(logits.scalar_type(), [&](auto zero) {
    draw_rows(in<decltype(zero)>(logits), uniform.const_data_ptr<float>(), tokens.data_ptr<int64_t>(),
              logprobs.data_ptr<float>(), norms.data_ptr<float>(), logits.size(0), logits.size(1),
              float(1 / temperature));
  });
  return {tokens, logprobs, norms};
}

}  // namespace ups_rm

// Python's other threads go on meanwhile: those that write, score and answer requests.
template <typename Function>
void define(pybind11::module_& module, const char* name, Function function) {
  module.def(name, function, pybind11::call_guard<pybind11::gil_scoped_release>());
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  define(module, "rms_norm", &ups_rm::rms_norm);
  define(module, "rms_norm_backward", &ups_rm::rms_norm_backward);
  define(module, "silu_mul", &ups_rm::silu_mul);
  define(module, "silu_mul_backward", &ups_rm::silu_mul_backward);
  define(module, "rotate", &ups_rm::rotate_heads);
  define(module, "draw", &ups_rm::draw);
  define(module, "selected_logprobs", &ups_rm::selected_logprobs);
  define(module, "logits_to_gradient", &ups_rm::logits_to_gradient);
  define(module, "attend", &ups_rm::attend);
  define(module, "masked_softmax", &ups_rm::masked_softmax);
  define(module, "multiplies", &ups_rm::multiplies);
  define(module, "pack", &ups_rm::pack);
  define(module, "times_packed", &ups_rm::times_packed);
  define(module, "gated", &ups_rm::gated);
  define(module, "decode_layer", &ups_rm::decode_layer);
  // module_local: a second build in one process brings its own
  pybind11::class_<ups_rm::LayerWeights>(module, "LayerWeights", pybind11::module_local())
      .def(pybind11::init<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                          std::optional<at::Tensor>, std::optional<at::Tensor>, double, std::optional<at::Tensor>,
                          std::optional<at::Tensor>, std::optional<at::Tensor>, std::optional<at::Tensor>>());
}
