// What torch makes of many small operators: attention of one token per row, a draw from the vocabulary, RMSNorm, rotary
// embedding, the gated SiLU and the loss over the vocabulary, the last four with their gradients.
//
// Loops that a compiler vectorises for whatever CPU it is told (-march=native); all sums are fp32. What they compute is
// written down in torch in sampling.py, group_cache.py, elementwise.py and selected_logprobs.py, which are the reference
// in the tests and serve wherever this file cannot be built. Rows are independent; only the gradient of RMSNorm's weight,
// a sum over rows, is added up in an order that depends on the number of threads.
#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// bf16 is handled as its 16 bits: compilers vectorise plain integers
using bits16 = uint16_t;

inline float widen(float value) { return value; }
inline float widen(bits16 value) { return std::bit_cast<float>(uint32_t(value) << 16); }
template <typename scalar>
scalar narrow(float value);
template <>
inline float narrow<float>(float value) { return value; }
template <>
inline bits16 narrow<bits16>(float value) {  // to nearest, ties to even; NaN does not occur in a live row
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return bits16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// As many numbers at once as a register holds, by the vector types of GCC and Clang. Longer vectors than the CPU's would
// do, but GCC 12 takes them through memory piece by piece: 3 to 11 times slower, kernel by kernel.
#if defined(__AVX512F__)
constexpr int64_t WIDE = 16;
#elif defined(__AVX2__)
constexpr int64_t WIDE = 8;
#else
constexpr int64_t WIDE = 4;  // NEON, SSE
#endif
typedef float floats __attribute__((vector_size(WIDE * sizeof(float))));
typedef int32_t ints __attribute__((vector_size(WIDE * sizeof(int32_t))));
typedef uint32_t words __attribute__((vector_size(WIDE * sizeof(uint32_t))));
typedef bits16 halves __attribute__((vector_size(WIDE * sizeof(bits16))));

inline floats load(const float* from) {
  floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline floats load(const bits16* from) {
#ifdef __AVX512F__  // what the lines below should become and with GCC 12 do not
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return std::bit_cast<floats>(_mm512_slli_epi32(wide, 16));
#else
  halves value;
  std::memcpy(&value, from, sizeof value);
  return std::bit_cast<floats>(__builtin_convertvector(value, words) << 16);
#endif
}
inline void save(float* to, floats value) { std::memcpy(to, &value, sizeof value); }

// e^x for x <= 0, within 2e-7 of it (relative); 0 below -87. Cephes' expf: x = n log 2 + r, a polynomial in r.
inline floats exp_of_negative(floats x) {
  const floats inside = x < -87.0f ? floats{} - 87.0f : x;
  const ints n = __builtin_convertvector(inside * 1.44269504f - 0.5f, ints);  // truncated: to nearest, since x <= 0
  const floats whole = __builtin_convertvector(n, floats), r = inside - whole * 0.693359375f + whole * 2.12194440e-4f;
  floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const floats power = std::bit_cast<floats>((n + 127) << 23);
  return x < -87.0f ? floats{} : p * power;
}

inline float sum_of(floats value) {
  float sum = 0;
  for (int64_t i = 0; i < WIDE; i++) sum += value[i];
  return sum;
}

template <typename scalar>
float greatest_of(const scalar* from, int64_t size) {
  floats highest = floats{} - std::numeric_limits<float>::infinity();
  float greatest = -std::numeric_limits<float>::infinity();
  int64_t i = 0;
  for (; i + WIDE <= size; i += WIDE) {
    const floats value = load(from + i);
    highest = value > highest ? value : highest;
  }
  for (int64_t j = 0; j < WIDE; j++) greatest = std::max(greatest, highest[j]);
  for (; i < size; i++) greatest = std::max(greatest, widen(from[i]));
  return greatest;
}

inline floats sigmoid(floats x) {
  const floats power = exp_of_negative(x < 0 ? x : -x), inverse = 1.0f / (1.0f + power);
  return x < 0 ? power * inverse : inverse;
}

inline void save(bits16* to, floats value) {
  for (int64_t i = 0; i < WIDE; i++) to[i] = narrow<bits16>(value[i]);
}

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
      for (int64_t i = 0; i < size; i++) to[i] = narrow<scalar>(widen(from[i]) * inverse * widen(weight[i]));
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
      for (i = 0; i < size; i++) {
        const float value = widen(from[i]), slope = widen(g[i]);
        to[i] = narrow<scalar>(s * slope * widen(weight[i]) - value * shift);
        mine[i] += slope * value * s;
      }
    }
  });
}

// silu(gate) * up, and with a gradient: (d_gate, d_up).
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
                           int64_t count) {
  at::parallel_for(0, count / WIDE, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * WIDE; i < end * WIDE; i += WIDE) {
      const floats x = load(gate + i), g = load(grad + i), s = sigmoid(x);
      save(d_up + i, g * x * s);
      save(d_gate + i, g * load(up + i) * s * (1.0f + x * (1.0f - s)));
    }
  });
  for (int64_t i = count / WIDE * WIDE; i < count; i++) {
    const float x = widen(gate[i]), g = widen(grad[i]), s = 1.0f / (1.0f + std::exp(-x));
    d_up[i] = narrow<scalar>(g * x * s);
    d_gate[i] = narrow<scalar>(g * widen(up[i]) * s * (1.0f + x * (1.0f - s)));
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

// Rotary embedding as Llama applies it, halves of the head; `sign` -1 turns the other way.
template <typename scalar, typename angle, typename result>
void rotate(const scalar* x, const angle* cos, const angle* sin, result* out, int64_t size, float sign = 1.0f) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = widen(x[i]), b = widen(x[half + i]);
    out[i] = narrow<result>(a * widen(cos[i]) - b * (sign * widen(sin[i])));
    out[half + i] = narrow<result>(b * widen(cos[half + i]) + a * (sign * widen(sin[half + i])));
  }
}

// Keys (D, capacity), a position a column, and values (capacity, D) of the prompt or of the row's own reply.
template <typename scalar>
struct Part {
  const scalar *keys, *values;
  int64_t count, capacity;
};

constexpr int64_t BLOCK = 32;  // positions whose scores are summed up in registers; divides every capacity
constexpr int64_t PARTS = BLOCK / WIDE;

// Products of one query with the keys of a part, to the end of the last block. The head size is even.
template <typename scalar>
void dot_keys(const float* query, const Part<scalar>& part, int64_t size, float scale, float* scores) {
  for (int64_t j = 0; j < part.count; j += BLOCK) {
    floats even[PARTS] = {}, odd[PARTS] = {};
    for (int64_t d = 0; d < size; d += 2) {
      const scalar *first = part.keys + d * part.capacity + j, *second = first + part.capacity;
      for (int64_t i = 0; i < PARTS; i++) even[i] += query[d] * load(first + i * WIDE);
      for (int64_t i = 0; i < PARTS; i++) odd[i] += query[d + 1] * load(second + i * WIDE);
    }
    for (int64_t i = 0; i < PARTS; i++) save(scores + j + i * WIDE, (even[i] + odd[i]) * scale);
  }
}

// Values of a part, weighted and added to `sums` (D,). `fixed`: the head size where the compiler may know it, else 0.
template <typename scalar, int64_t fixed>
void add_values(const float* weights, const Part<scalar>& part, int64_t size, float* sums) {
  if constexpr (fixed > 0) {
    floats local[fixed / WIDE];
    for (int64_t i = 0; i < fixed / WIDE; i++) local[i] = load(sums + i * WIDE);
    for (int64_t j = 0; j < part.count; j++)
      for (int64_t i = 0; i < fixed / WIDE; i++) local[i] += weights[j] * load(part.values + j * fixed + i * WIDE);
    for (int64_t i = 0; i < fixed / WIDE; i++) save(sums + i * WIDE, local[i]);
  } else {
    for (int64_t j = 0; j < part.count; j++)
      for (int64_t i = 0; i < size; i++) sums[i] += weights[j] * widen(part.values[j * size + i]);
  }
}

// In place over the first `count` numbers; `row` reaches to the end of the last WIDE.
void softmax(float* row, int64_t count) {
  const int64_t end = (count + WIDE - 1) / WIDE * WIDE;
  std::fill(row + count, row + end, -std::numeric_limits<float>::infinity());
  float greatest = row[0];
  for (int64_t j = 1; j < count; j++) greatest = std::max(greatest, row[j]);
  floats totals = {};
  for (int64_t j = 0; j < end; j += WIDE) {
    const floats power = exp_of_negative(load(row + j) - greatest);
    totals += power;
    save(row + j, power);
  }
  const float total = sum_of(totals);
  for (int64_t j = 0; j < end; j += WIDE) save(row + j, load(row + j) / total);
}

struct Sizes {
  int64_t rows, columns, heads, kv_heads, size, width, capacity, reply_length, reply_capacity, position;
};

template <typename scalar, int64_t fixed>
void attend_rows(const scalar* qkv, const scalar* cos, const scalar* sin, const scalar* prompt_keys,
                 const scalar* prompt_values, scalar* keys, scalar* values, const int64_t* cells,
                 const int64_t* lengths, scalar* out, const Sizes s) {
  const int64_t g = s.heads / s.kv_heads, all = s.heads + 2 * s.kv_heads;
  const float scale = 1.0f / std::sqrt(float(s.size));
  at::parallel_for(0, s.rows, 1, [&](int64_t begin, int64_t end) {
    const int64_t most = s.capacity + s.reply_capacity + WIDE;
    std::vector<float> query(s.size), scores(most), key(s.size), sums(s.size);
    for (int64_t row = begin; row < end; row++) {
      const int64_t group = cells[row] / s.columns, column = cells[row] % s.columns;
      const scalar *mine = qkv + row * all * s.size, *c = cos + row * s.size, *d = sin + row * s.size;
      for (int64_t k = 0; k < s.kv_heads; k++) {
        const int64_t prompt = group * s.kv_heads + k, own = prompt * s.columns + column;
        scalar *own_keys = keys + own * s.size * s.reply_capacity, *own_values = values + own * s.reply_length * s.size;
        rotate(mine + (s.heads + k) * s.size, c, d, key.data(), s.size);
        for (int64_t i = 0; i < s.size; i++) own_keys[i * s.reply_capacity + s.position] = narrow<scalar>(key[i]);
        std::copy_n(mine + (s.heads + s.kv_heads + k) * s.size, s.size, own_values + s.position * s.size);
        const Part<scalar> before{prompt_keys + prompt * s.size * s.capacity, prompt_values + prompt * s.width * s.size,
                                  lengths[group], s.capacity};
        const Part<scalar> reply{own_keys, own_values, s.position + 1, s.reply_capacity};
        const int64_t seen = before.count + reply.count;
        for (int64_t h = k * g; h < (k + 1) * g; h++) {
          rotate(mine + h * s.size, c, d, query.data(), s.size);
          dot_keys(query.data(), before, s.size, scale, scores.data());
          dot_keys(query.data(), reply, s.size, scale, scores.data() + before.count);
          softmax(scores.data(), seen);
          std::fill(sums.begin(), sums.end(), 0.0f);
          add_values<scalar, fixed>(scores.data(), before, s.size, sums.data());
          add_values<scalar, fixed>(scores.data() + before.count, reply, s.size, sums.data());
          for (int64_t i = 0; i < s.size; i++) out[(row * s.heads + h) * s.size + i] = narrow<scalar>(sums[i]);
        }
      }
    }
  });
}

void check(const at::Tensor& tensor, at::ScalarType type, const char* name) {
  TORCH_CHECK(tensor.device().is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type, name,
              " must be a contiguous CPU tensor of ", type);
}

void check_targets(const at::Tensor& targets, const at::Tensor& logits) {
  check(targets, at::kLong, "targets");
  TORCH_CHECK(targets.numel() == logits.size(0), "one target per row of logits");
  TORCH_CHECK(targets.numel() == 0 || (targets.min().item<int64_t>() >= 0 &&
                                       targets.max().item<int64_t>() < logits.size(1)),
              "a target is not in the vocabulary");
}

template <typename scalar>
const scalar* in(const at::Tensor& tensor) { return static_cast<const scalar*>(tensor.const_data_ptr()); }
template <typename scalar>
scalar* to(const at::Tensor& tensor) { return static_cast<scalar*>(tensor.data_ptr()); }

// `run` with a zero of the type that the kernels know the dtype as.
template <typename Run>
void dispatch(at::ScalarType type, const Run& run) {
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "fp32 or bf16 expected, not ", type);
  if (type == at::kFloat) run(float());
  else run(bits16());
}

}  // namespace

// x (b, H), weight (H,) -> (b, H)
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

// qkv (b, S + 2 K, D) not rotated, cos and sin (b, D), prompt_keys (P, K, D, T'), prompt_values (P, K, T, D), keys
// (P, K, m, D, R') and values (P, K, m, R, D), both written at `position`; cells (b,), lengths (P,) -> (b, S * D).
// T' and R' are T and R or more, whole blocks.
at::Tensor attend(const at::Tensor& qkv, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& prompt_keys,
                  const at::Tensor& prompt_values, const at::Tensor& keys, const at::Tensor& values,
                  const at::Tensor& cells, const at::Tensor& lengths, int64_t position) {
  const auto type = qkv.scalar_type();
  for (const auto& tensor : {qkv, cos, sin, prompt_keys, prompt_values, keys, values}) check(tensor, type, "a tensor");
  check(cells, at::kLong, "cells");
  check(lengths, at::kLong, "lengths");
  const int64_t kv_heads = keys.size(1), heads = qkv.size(1) - 2 * kv_heads;
  const Sizes sizes{qkv.size(0), keys.size(2), heads, kv_heads, qkv.size(2), prompt_values.size(2),
                    prompt_keys.size(3), values.size(3), keys.size(4), position};
  TORCH_CHECK(sizes.capacity % BLOCK == 0 && sizes.reply_capacity % BLOCK == 0, "capacities are not whole blocks");
  TORCH_CHECK(position < sizes.reply_length && heads % kv_heads == 0 && cells.numel() == sizes.rows &&
                  cos.numel() == sizes.rows * sizes.size && lengths.numel() == keys.size(0),
              "sizes do not fit");
  at::Tensor out = at::empty({sizes.rows, heads * sizes.size}, qkv.options());
  dispatch(type, [&](auto zero) {
    using scalar = decltype(zero);
    const auto rows = sizes.size == 64    ? attend_rows<scalar, 64>
                      : sizes.size == 128 ? attend_rows<scalar, 128>
                                          : attend_rows<scalar, 0>;
    rows(in<scalar>(qkv), in<scalar>(cos), in<scalar>(sin), in<scalar>(prompt_keys), in<scalar>(prompt_values),
         to<scalar>(keys), to<scalar>(values), cells.const_data_ptr<int64_t>(), lengths.const_data_ptr<int64_t>(),
         to<scalar>(out), sizes);
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

std::tuple<at::Tensor, at::Tensor> silu_mul_backward(const at::Tensor& grad, const at::Tensor& gate,
                                                     const at::Tensor& up) {
  for (const auto& tensor : {grad, gate, up}) check(tensor, gate.scalar_type(), "a tensor");
  TORCH_CHECK(gate.numel() == up.numel() && gate.numel() == grad.numel(), "sizes do not fit");
  at::Tensor d_gate = at::empty_like(gate), d_up = at::empty_like(up);
  dispatch(gate.scalar_type(), [&](auto zero) {
    using scalar = decltype(zero);
    silu_mul_backward_all(in<scalar>(grad), in<scalar>(gate), in<scalar>(up), to<scalar>(d_gate), to<scalar>(d_up),
                          gate.numel());
  });
  return {d_gate, d_up};
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

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("rms_norm", &rms_norm);
  module.def("rms_norm_backward", &rms_norm_backward);
  module.def("silu_mul", &silu_mul);
  module.def("silu_mul_backward", &silu_mul_backward);
  module.def("rotate", &rotate_heads);
  module.def("draw", &draw);
  module.def("selected_logprobs", &selected_logprobs);
  module.def("logits_to_gradient", &logits_to_gradient);
  module.def("attend", &attend);
}
