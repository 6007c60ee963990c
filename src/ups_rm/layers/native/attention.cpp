// Attention of one token per row, of a rollout whose groups share their prompt's keys and values, in torch group_cache.py;
// and the softmax of all others, in torch elementwise.py.
#include <ATen/Parallel.h>

#include <vector>

#include "kernels.h"
#include "numbers.h"

namespace ups_rm {
namespace {

// Keys (D, capacity), a position a column, and values (capacity, D) of the prompt or of the row's own reply.
template <typename scalar>
struct Part {
  const scalar *keys, *values;
  int64_t count, capacity;
};

constexpr int64_t BLOCK = 32;  // positions whose scores are summed up in registers; divides every capacity
constexpr int64_t PARTS = BLOCK / WIDE;

// Query heads of one key head that go through its keys together, and through its values where the head size is known
// here: each is then read once for all.
constexpr int64_t HEADS = WIDE == 16 ? 3 : 1;  // as their sums find room in registers

// Products of queries (G, D) with the keys of a part, to the end of its last block, into scores (G, most). D is even.
template <int64_t G, typename scalar>
void dot_keys(const float* queries, const Part<scalar>& part, int64_t size, float scale, float* scores, int64_t most) {
  for (int64_t j = 0; j < part.count; j += BLOCK) {
    floats even[G][PARTS] = {}, odd[G][PARTS] = {};
    for (int64_t d = 0; d < size; d += 2)
      for (int64_t i = 0; i < PARTS; i++) {
        const scalar* key = part.keys + d * part.capacity + j + i * WIDE;
        const floats first = load(key), second = load(key + part.capacity);
        for (int64_t g = 0; g < G; g++) {
          even[g][i] += queries[g * size + d] * first;
          odd[g][i] += queries[g * size + d + 1] * second;
        }
      }
    for (int64_t g = 0; g < G; g++)
      for (int64_t i = 0; i < PARTS; i++) save(scores + g * most + j + i * WIDE, (even[g][i] + odd[g][i]) * scale);
  }
}

// Values of a part, weighted with weights (G, most) and added to sums (G, D). `fixed`: D where the compiler may know it.
template <int64_t G, int64_t fixed, typename scalar>
void add_values(const float* weights, int64_t most, const Part<scalar>& part, int64_t size, float* sums) {
  if constexpr (fixed > 0) {
    constexpr int64_t count = fixed / WIDE;
    floats local[G][count];
    for (int64_t g = 0; g < G; g++)
      for (int64_t i = 0; i < count; i++) local[g][i] = load(sums + g * fixed + i * WIDE);
    for (int64_t j = 0; j < part.count; j++)
      for (int64_t i = 0; i < count; i++) {
        const floats value = load(part.values + j * fixed + i * WIDE);
        for (int64_t g = 0; g < G; g++) local[g][i] += weights[g * most + j] * value;
      }
    for (int64_t g = 0; g < G; g++)
      for (int64_t i = 0; i < count; i++) save(sums + g * fixed + i * WIDE, local[g][i]);
  } else {
    for (int64_t g = 0; g < G; g++)
      for (int64_t j = 0; j < part.count; j++)
        for (int64_t i = 0; i < size; i++) sums[g * size + i] += weights[g * most + j] * widen(part.values[j * size + i]);
  }
}

// In place over the first `count` numbers; `row` reaches to the end of the last WIDE.
void softmax(float* row, int64_t count) {
  const int64_t end = (count + WIDE - 1) / WIDE * WIDE;
  std::fill(row + count, row + end, -std::numeric_limits<float>::infinity());
  const float greatest = greatest_of(row, count);
  floats totals = {};
  for (int64_t j = 0; j < end; j += WIDE) {
    const floats power = exp_of_negative(load(row + j) - greatest);
    totals += power;
    save(row + j, power);
  }
  const float total = sum_of(totals);
  for (int64_t j = 0; j < end; j += WIDE) save(row + j, load(row + j) / total);
}

// What G queries (G, D) see in the prompt and in the row's own reply, into out (G, D).
template <int64_t G, int64_t fixed, typename scalar>
void see(const float* queries, const Part<scalar>& prompt, const Part<scalar>& reply, int64_t size, int64_t most,
         float* scores, float* sums, scalar* out) {
  const float scale = 1.0f / std::sqrt(float(size));
  dot_keys<G>(queries, prompt, size, scale, scores, most);
  dot_keys<G>(queries, reply, size, scale, scores + prompt.count, most);
  for (int64_t g = 0; g < G; g++) softmax(scores + g * most, prompt.count + reply.count);
  std::fill_n(sums, G * size, 0.0f);
  add_values<G, fixed>(scores, most, prompt, size, sums);
  add_values<G, fixed>(scores + prompt.count, most, reply, size, sums);
  for (int64_t i = 0; i < G * size; i++) out[i] = narrow<scalar>(sums[i]);
}

struct Sizes {
  int64_t rows, columns, heads, kv_heads, size, width, capacity, reply_length, reply_capacity, position;
};

template <typename scalar, int64_t fixed>
void attend_rows(const scalar* qkv, const scalar* cos, const scalar* sin, const scalar* prompt_keys,
                 const scalar* prompt_values, scalar* keys, scalar* values, const int64_t* cells,
                 const int64_t* lengths, scalar* out, const Sizes s) {
  const int64_t g = s.heads / s.kv_heads, all = s.heads + 2 * s.kv_heads;
  at::parallel_for(0, s.rows, 1, [&](int64_t begin, int64_t end) {
    const int64_t most = s.capacity + s.reply_capacity + WIDE;
    std::vector<float> queries(g * s.size), scores(HEADS * most), key(s.size), sums(HEADS * s.size);
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
        for (int64_t h = 0; h < g; h++) rotate(mine + (k * g + h) * s.size, c, d, &queries[h * s.size], s.size);
        for (int64_t h = 0; h < g;) {
          const bool several = g - h >= HEADS;
          const auto look = several ? see<HEADS, fixed, scalar> : see<1, fixed, scalar>;
          look(&queries[h * s.size], before, reply, s.size, most, scores.data(), sums.data(),
               out + (row * s.heads + k * g + h) * s.size);
          h += several ? HEADS : 1;
        }
      }
    }
  });
}

}  // namespace

at::Tensor masked_softmax(const at::Tensor& scores, const at::Tensor& mask, double scale) {
  const auto type = scores.scalar_type();
  check(scores, type, "scores");
  check(mask, type, "mask");
  const int64_t keys = scores.size(3), queries = mask.size(2), per_batch = scores.size(1) * scores.size(2);
  TORCH_CHECK(mask.size(0) == scores.size(0) && mask.size(1) == 1 && mask.size(3) == keys && queries > 0 &&
                  scores.size(2) % queries == 0,
              "sizes do not fit");
  at::Tensor out = at::empty_like(scores);
  dispatch(type, [&](auto zero) {
    using scalar = decltype(zero);
    const scalar *from = in<scalar>(scores), *hidden = in<scalar>(mask);
    scalar* into = to<scalar>(out);
    at::parallel_for(0, scores.size(0) * per_batch, 64, [&](int64_t begin, int64_t end) {
      std::vector<float> row(keys + WIDE);
      for (int64_t i = begin; i < end; i++) {
        const scalar *mine = from + i * keys, *hides = hidden + (i / per_batch * queries + i % queries) * keys;
        int64_t j = 0;
        for (; j + WIDE <= keys; j += WIDE) save(&row[j], load(mine + j) * float(scale) + load(hides + j));
        for (; j < keys; j++) row[j] = widen(mine[j]) * float(scale) + widen(hides[j]);
        softmax(row.data(), keys);
        for (j = 0; j + WIDE <= keys; j += WIDE) save(into + i * keys + j, load(&row[j]));
        for (; j < keys; j++) into[i * keys + j] = narrow<scalar>(row[j]);
      }
    });
  });
  return out;
}

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

}  // namespace ups_rm
