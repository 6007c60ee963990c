// Numbers in fp32 and bf16, one at a time and as many as a register holds, their rotation, and tensors of either.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace ups_rm {

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
inline void save(bits16* to, floats value) {
#ifdef __AVX512F__
  const __m512i bits = std::bit_cast<__m512i>(value);
  const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16)));
#else
  for (int64_t i = 0; i < WIDE; i++) to[i] = narrow<bits16>(value[i]);
#endif
}

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

inline void check(const at::Tensor& tensor, at::ScalarType type, const char* name) {
  TORCH_CHECK(tensor.device().is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type, name,
              " must be a contiguous CPU tensor of ", type);
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

// Rotary embedding as Llama applies it, halves of the head; `sign` -1 turns the other way.
template <typename scalar, typename angle, typename result>
void rotate(const scalar* x, const angle* cos, const angle* sin, result* out, int64_t size, float sign = 1.0f) {
  const int64_t half = size / 2;
  int64_t i = 0;
  for (; i + WIDE <= half; i += WIDE) {
    const floats a = load(x + i), b = load(x + half + i);
    save(out + i, a * load(cos + i) - b * (sign * load(sin + i)));
    save(out + half + i, b * load(cos + half + i) + a * (sign * load(sin + half + i)));
  }
  for (; i < half; i++) {
    const float a = widen(x[i]), b = widen(x[half + i]);
    out[i] = narrow<result>(a * widen(cos[i]) - b * (sign * widen(sin[i])));
    out[half + i] = narrow<result>(b * widen(cos[half + i]) + a * (sign * widen(sin[half + i])));
  }
}

}  // namespace ups_rm
