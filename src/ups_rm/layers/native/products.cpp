// Matrix products in bf16 with sums in fp32, for CPUs that multiply pairs of bf16 numbers (AVX512_BF16) and have no AMX.
//
// oneDNN, which torch asks, waits for a part of the weight to come from memory, then computes with it, which is a third
// of the time when few rows meet a large weight, as in decoding. Here the next part is fetched while this one is in use.
// What comes out are the sums in fp32, rounded once; torch's own products serve on every other CPU.
//
// The weight, transposed, lies in panels: 32 of its columns, in them its rows two by two, in them the columns' pairs.
#include <ATen/Parallel.h>

#include <vector>

#include "kernels.h"
#include "numbers.h"

namespace ups_rm {

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(__AMX_BF16__)

namespace {

constexpr int64_t PANEL = 32;         // columns: two registers of sums
constexpr int64_t ROWS = 14;          // of the left side at once: 28 registers of sums, 2 of the panel, 1 of the row
constexpr int64_t PART = 2048;        // rows of a panel at once at most: with the next ones a quarter of a core's 1 MiB
constexpr int64_t AT_ONCE = 1 << 20;  // numbers of the left side that all panels meet, near in the cores' common cache

// What is written: sums, plus `bias` (columns) and `residual` (as `to`) where there are any. Of a panel too long for the
// cache a part is taken at a time; the sums so far lie in `sums` (rows, 32).
struct Out {
  bits16* to;
  int64_t row;
  const bits16 *residual = nullptr, *bias = nullptr;
  float* sums = nullptr;
  bool starts = true, ends = true;
};

inline __m512bh pair_of(const bits16* from) {
  int32_t both;
  std::memcpy(&both, from, sizeof both);
  return (__m512bh)_mm512_set1_epi32(both);
}
inline __m512bh line(const bits16* from) { return (__m512bh)_mm512_loadu_si512(from); }
inline void fetch(const bits16* from) { _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T1); }

// R rows of the left side, `row` apart, by `size` rows of a panel. `lines`: of each pair's two, those fetched of `next`.
template <int R>
void tile(const bits16* left, int64_t row, const bits16* panel, int64_t size, const bits16* next, int lines,
          const Out out) {
  __m512 sums[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
    for (int half = 0; half < 2; half++)
      sums[r][half] = out.starts ? _mm512_setzero_ps() : _mm512_loadu_ps(out.sums + r * PANEL + half * WIDE);
  for (int64_t k = 0; k < size; k += 2) {
    const __m512bh first = line(panel + k * PANEL), second = line(panel + k * PANEL + PANEL);
    if (lines > 0) fetch(next + k * PANEL);
    if (lines > 1) fetch(next + k * PANEL + PANEL);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const __m512bh value = pair_of(left + r * row + k);
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], first, value);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], second, value);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    for (int half = 0; half < 2; half++) {
      const int64_t at = half * WIDE;
      if (!out.ends) _mm512_storeu_ps(out.sums + r * PANEL + at, sums[r][half]);
      if (out.ends && out.bias) sums[r][half] += (__m512)load(out.bias + at);
      if (out.ends && out.residual) sums[r][half] += (__m512)load(out.residual + r * out.row + at);
    }
    if (out.ends) _mm512_storeu_si512(out.to + r * out.row, (__m512i)_mm512_cvtne2ps_pbh(sums[r][1], sums[r][0]));
  }
}

using Tile = void (*)(const bits16*, int64_t, const bits16*, int64_t, const bits16*, int, const Out);
constexpr Tile TILES[ROWS + 1] = {nullptr, tile<1>, tile<2>,  tile<3>,  tile<4>,  tile<5>,  tile<6>, tile<7>,
                                  tile<8>, tile<9>, tile<10>, tile<11>, tile<12>, tile<13>, tile<14>};

// `rows` rows by one panel, in tiles of equal height. The `next` panel, if any, is brought into the cache meanwhile.
void strip(const bits16* left, int64_t rows, int64_t inner, const bits16* panel, const bits16* next, const Out out) {
  const int64_t tiles = (rows + ROWS - 1) / ROWS, parts = (inner + PART - 1) / PART;
  std::vector<float> sums(parts > 1 ? rows * PANEL : 0);
  for (int64_t part = 0; part < parts; part++) {
    const bool ends = part + 1 == parts;
    // pairs stay together; parts differ by one pair at most, so what is fetched ends one line beyond the part at most
    const int64_t k = part * (inner / 2) / parts * 2, size = (part + 1) * (inner / 2) / parts * 2 - k;
    const bits16* ahead = ends ? next : panel + (k + size) * PANEL;
    for (int64_t i = 0; i < tiles; i++) {
      const int64_t first = i * rows / tiles, count = (i + 1) * rows / tiles - first, at = first * out.row;
      // spread over two tiles: more at once than a core can wait for would stop it
      const int lines = ahead == nullptr || i > 1 ? 0 : tiles == 1 ? 2 : 1;
      TILES[count](left + first * inner + k, inner, panel + k * PANEL, size, lines > 0 ? ahead + i * PANEL : nullptr,
                   lines, {out.to + at, out.row, out.residual ? out.residual + at : nullptr, out.bias,
                           sums.data() + first * PANEL, part == 0, ends});
    }
  }
}

// work(first row, rows, panel, whether it is this thread's last), for all rows and panels.
template <typename Work>
void for_each_panel(int64_t rows, int64_t inner, int64_t panels, const Work& work) {
  const int64_t most = std::max(ROWS, AT_ONCE / inner);
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = 0; first < rows; first += most)
      for (int64_t i = begin; i < end; i++) work(first, std::min(most, rows - first), i, i + 1 == end);
  });
}

at::Tensor room(const std::optional<at::Tensor>& given, int64_t rows, const at::Tensor& x, const at::Tensor& panels) {
  check(x, at::kBFloat16, "x");
  check(panels, at::kBFloat16, "panels");
  TORCH_CHECK(panels.dim() == 4 && panels.size(1) > 0 && panels.size(2) == PANEL && panels.size(3) == 2,
              "a weight that `pack` has not laid out");
  TORCH_CHECK(x.size(1) == panels.size(1) * 2, "x has ", x.size(1), " columns and the weight ", panels.size(1) * 2);
  const int64_t columns = panels.size(0) * PANEL;
  if (!given) return at::empty({rows, columns}, x.options());
  check(*given, at::kBFloat16, "out");
  TORCH_CHECK(given->size(0) == rows && given->size(1) == columns, "out has another size than the product");
  return *given;
}

}  // namespace

bool multiplies() { return true; }

at::Tensor pack(const at::Tensor& weight) {
  check(weight, at::kBFloat16, "weight");
  const int64_t columns = weight.size(0), inner = weight.size(1);
  TORCH_CHECK(columns % PANEL == 0 && inner % 2 == 0 && inner > 0 && inner < (int64_t(1) << 27), "a weight of ", columns,
              " x ", inner, " has no panels");
  at::Tensor panels = at::empty({columns / PANEL, inner / 2, PANEL, 2}, weight.options());
  const bits16* from = in<bits16>(weight);
  bits16* into = to<bits16>(panels);
  const __m512i rows = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                          _mm512_set1_epi32(int32_t(inner / 2)));
  at::parallel_for(0, columns / WIDE, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)  // half a panel
      for (int64_t k = 0; k < inner; k += 2)
        _mm512_storeu_si512(into + (i / 2 * inner + k) * PANEL + i % 2 * PANEL,
                            _mm512_i32gather_epi32(rows, from + i * WIDE * inner + k, 4));
  });
  return panels;
}

at::Tensor times_packed(const at::Tensor& x, const at::Tensor& panels, const std::optional<at::Tensor>& bias,
                        const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& given) {
  const int64_t rows = x.size(0), inner = x.size(1), columns = panels.size(0) * PANEL;
  const at::Tensor out = room(given, rows, x, panels);
  if (bias) check(*bias, at::kBFloat16, "bias");
  if (residual) check(*residual, at::kBFloat16, "residual");
  TORCH_CHECK((!bias || bias->numel() == columns) && (!residual || residual->sizes() == out.sizes()),
              "bias or residual have other sizes than the product");
  const bits16 *left = in<bits16>(x), *right = in<bits16>(panels), *more = residual ? in<bits16>(*residual) : nullptr;
  const bits16* each = bias ? in<bits16>(*bias) : nullptr;
  bits16* into = to<bits16>(out);
  for_each_panel(rows, inner, panels.size(0), [&](int64_t first, int64_t few, int64_t i, bool last) {
    const int64_t at = first * columns + i * PANEL;
    const bits16* panel = right + i * inner * PANEL;
    strip(left + first * inner, few, inner, panel, last ? nullptr : panel + inner * PANEL,
          {into + at, columns, more ? more + at : nullptr, each ? each + i * PANEL : nullptr});
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gated(const at::Tensor& x, const at::Tensor& gate_panels,
                                                     const at::Tensor& up_panels,
                                                     const std::optional<at::Tensor>& gate,
                                                     const std::optional<at::Tensor>& up) {
  const int64_t rows = x.size(0), inner = x.size(1), columns = gate_panels.size(0) * PANEL;
  TORCH_CHECK(gate_panels.sizes() == up_panels.sizes(), "gate and up are not of one size");
  const at::Tensor gates = room(gate, rows, x, gate_panels), ups = room(up, rows, x, up_panels);
  const at::Tensor product = at::empty_like(gates);
  const bits16 *left = in<bits16>(x), *gate_side = in<bits16>(gate_panels), *up_side = in<bits16>(up_panels);
  bits16 *g = to<bits16>(gates), *u = to<bits16>(ups), *into = to<bits16>(product);
  for_each_panel(rows, inner, gate_panels.size(0), [&](int64_t first, int64_t few, int64_t i, bool last) {
    const int64_t at = first * columns + i * PANEL, panel = i * inner * PANEL;
    const bits16* mine = left + first * inner;
    strip(mine, few, inner, gate_side + panel, up_side + panel, {g + at, columns});
    strip(mine, few, inner, up_side + panel, last ? nullptr : gate_side + panel + inner * PANEL, {u + at, columns});
    for (int64_t r = 0; r < few; r++)
      for (int64_t j = at + r * columns; j < at + r * columns + PANEL; j += WIDE) {
        const floats value = load(g + j);
        save(into + j, value * sigmoid(value) * load(u + j));
      }
  });
  return {product, gates, ups};
}

#else

bool multiplies() { return false; }

namespace {
[[noreturn]] void missing() { TORCH_CHECK(false, "this CPU does not multiply pairs of bf16 numbers, or has AMX"); }
}  // namespace

at::Tensor pack(const at::Tensor&) { missing(); }
at::Tensor times_packed(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                        const std::optional<at::Tensor>&, const std::optional<at::Tensor>&) { missing(); }
std::tuple<at::Tensor, at::Tensor, at::Tensor> gated(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                     const std::optional<at::Tensor>&,
                                                     const std::optional<at::Tensor>&) { missing(); }

#endif

}  // namespace ups_rm
