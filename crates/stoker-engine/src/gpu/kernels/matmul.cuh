// y = W x for rows of W that are features and rows of x that are tokens.
//
// Two kernels, the same bits: `matmul_few` for few tokens, bound by memory: a warp for each of the SEGMENTS of 16 features,
// weights straight from memory to registers; `matmul_many` with tiles in shared memory, bound by arithmetic, which computes
// the segments one after the other, or each in a block of its own where there are few tiles.
#pragma once
#include "formats.cuh"

// What `out` is, [tokens, stride]; numbered as `kernels.rs` does.
enum Mode {
  STORE,   // T
  ADD,     // float, added to
  FLOAT,   // float
};

// Up to three matrices over the same input, one below the other; or a pair, a gate and what it gates, of which
// silu(gate) * other is stored.
struct Matmul {
  const uint8_t* weight[3];
  const void* bias[3];   // null: none
  uint32_t end[3];       // first feature behind each matrix
  uint32_t bias_format;
  const void* x;         // T [tokens, k]
  void* out;
  float* partials;       // room for what blocks of a divided product have to tell each other
  uint32_t* arrived;     // [tiles], zeros before and after
  uint32_t tokens, k, stride;
  uint32_t mode;
};

// A row of the tile that begins at `first`: in a gated product, 16 rows of the gate and 16 of what it gates take turns.
template <bool PAIR> __device__ __forceinline__ uint32_t feature_of(uint32_t first, int row) {
  return PAIR ? first + row / 32 * 16 + row % 16 : first + row;
}

// Where the weights of a row of the tile are; null behind the last.
template <int FORMAT, bool PAIR>
__device__ __forceinline__ const uint8_t* weights_of(const Matmul& p, uint32_t first, int row) {
  const uint32_t feature = feature_of<PAIR>(first, row);
  const size_t bytes = row_bytes<FORMAT>(p.k);
  if (PAIR) return feature < p.end[0] ? (row / 16 % 2 ? p.weight[1] : p.weight[0]) + feature * bytes : nullptr;
  if (feature < p.end[0]) return p.weight[0] + feature * bytes;
  if (feature < p.end[1]) return p.weight[1] + (feature - p.end[0]) * bytes;
  if (feature < p.end[2]) return p.weight[2] + (feature - p.end[1]) * bytes;
  return nullptr;
}

__device__ __forceinline__ float bias_of(const Matmul& p, int matrix, uint32_t feature) {
  const void* bias = matrix == 0 ? p.bias[0] : matrix == 1 ? p.bias[1] : p.bias[2];
  return bias ? element(bias, p.bias_format, feature) : 0.f;
}

// What becomes of a sum. `second`: the gated one.
template <class T, bool PAIR>
__device__ __forceinline__ void put(const Matmul& p, uint32_t token, uint32_t feature, float sum, float second) {
  const size_t at = size_t(token) * p.stride + feature;
  if (PAIR) {
    const float gate = __fadd_rn(sum, bias_of(p, 0, feature));
    const float up = __fadd_rn(second, bias_of(p, 1, feature));
    const float gated = __fmul_rn(__fdiv_rn(gate, __fadd_rn(1.f, expf(-gate))), up);
    static_cast<T*>(p.out)[at] = from_float<T>(gated);
    return;
  }
  const int matrix = feature < p.end[0] ? 0 : feature < p.end[1] ? 1 : 2;
  const uint32_t before = matrix == 0 ? 0 : matrix == 1 ? p.end[0] : p.end[1];
  sum = __fadd_rn(sum, bias_of(p, matrix, feature - before));
  if (p.mode == STORE) static_cast<T*>(p.out)[at] = from_float<T>(sum);
  if (p.mode == ADD) static_cast<float*>(p.out)[at] = __fadd_rn(static_cast<float*>(p.out)[at], sum);
  if (p.mode == FLOAT) static_cast<float*>(p.out)[at] = sum;
}

__device__ __forceinline__ int segment_begin(int steps, int segment) { return steps * segment / SEGMENTS; }

// ROWS / 16 times 16 rows of weights for each warp, 8 * NT tokens.
template <class T, int FORMAT, bool PAIR, int ROWS, int NT>
__device__ __forceinline__ void matmul_few(const Matmul& p) {
  constexpr int MT = ROWS / 16, SPAN = Span<FORMAT>::STEPS;
  // Spans whose weights are on their way at the same time; those of them whose tokens are read at once.
  constexpr int AHEAD = (MT == 1 ? 4 : 2) * (SPAN == 1 && FORMAT > BF16 ? 2 : 1) / (SPAN == 4 ? 2 : 1);
  constexpr int AT_ONCE = NT == 1 ? AHEAD : 1;
  __shared__ float sums[SEGMENTS][ROWS][NT * 8 + 1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t first = blockIdx.x * (PAIR ? ROWS / 2 : ROWS);
  const int steps = (p.k + STEP - 1) / STEP;
  const int from = segment_begin(steps, warp), to = segment_begin(steps, warp + 1);
  const int first_span = from / SPAN, end_span = from < to ? (to + SPAN - 1) / SPAN : first_span;
  const uint8_t* row[2 * MT];
#pragma unroll
  for (int i = 0; i < 2 * MT; i++) row[i] = weights_of<FORMAT, PAIR>(p, first, i * 8 + g);

  Span<FORMAT> a[AHEAD][2 * MT];
  auto column = [&](int span) { return span * SPAN * STEP + t * 8; };
  auto fetch_weights = [&](int u, int span) {
#pragma unroll
    for (int i = 0; i < 2 * MT; i++)
      a[u][i] = span < end_span && column(span) < int(p.k) && row[i] ? load_span<T, FORMAT>(row[i], column(span)) : Span<FORMAT>{};
  };
  float d[MT][NT][4] = {};
  // Weights don't depend on what was computed before.
#pragma unroll
  for (int u = 0; u < AHEAD; u++) fetch_weights(u, first_span + u);
  wait_for_predecessor();
  let_successor_start();
  const T* x = static_cast<const T*>(p.x);
  for (int span = first_span; span < end_span; span += AHEAD) {
#pragma unroll
    for (int group = 0; group < AHEAD; group += AT_ONCE) {
      uint4 b[AT_ONCE][SPAN][NT];
#pragma unroll
      for (int u = 0; u < AT_ONCE; u++)
#pragma unroll
        for (int s = 0; s < SPAN; s++)
#pragma unroll
          for (int n = 0; n < NT; n++) {
            const uint32_t token = n * 8 + g;
            const int step = (span + group + u) * SPAN + s, k = step * STEP + t * 8;
            const bool there = token < p.tokens && step < to && k < int(p.k);
            b[u][s][n] = there ? *reinterpret_cast<const uint4*>(x + size_t(token) * p.k + k) : uint4{};
          }
#pragma unroll
      for (int u = 0; u < AT_ONCE; u++) {
        const int now = span + group + u;
        uint4 w[SPAN][2 * MT];
#pragma unroll
        for (int s = 0; s < SPAN; s++)
#pragma unroll
          for (int i = 0; i < 2 * MT; i++) w[s][i] = unpacked<T, FORMAT>(a[group + u][i], s, column(now));
        fetch_weights(group + u, now + AHEAD);
#pragma unroll
        for (int s = 0; s < SPAN; s++) {
          // A step outside the segment must not be added: adding zeros can change a sum's bits (-0).
          const int step = now * SPAN + s;
          if (step >= from && step < to) mma_step<T, MT, NT>(d, w[s], b[u][s]);
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[warp][m * 16 + i / 2 * 8 + g][n * 8 + 2 * t + i % 2] = d[m][n][i];
  __syncthreads();
  constexpr int OUT = PAIR ? ROWS / 2 : ROWS;
  for (int i = threadIdx.x; i < OUT * NT * 8; i += blockDim.x) {
    const int out = i % OUT, token = i / OUT;
    const uint32_t feature = first + out;
    if (token >= int(p.tokens) || feature >= p.end[PAIR ? 0 : 2]) continue;
    const int at = PAIR ? out / 16 * 32 + out % 16 : out;
    float sum = 0, second = 0;
#pragma unroll
    for (int s = 0; s < SEGMENTS; s++) {
      sum = __fadd_rn(sum, sums[s][at][token]);
      if (PAIR) second = __fadd_rn(second, sums[s][at + 16][token]);
    }
    put<T, PAIR>(p, token, feature, sum, second);
  }
}

// Columns of a stage, and 16-byte units of its rows.
constexpr int STAGE = 64;
constexpr int UNITS = STAGE / 8;

// Where a unit of a row is, so that neither copies nor products meet in a bank.
__device__ __forceinline__ int unit_at(int row, int unit) { return row * UNITS + (unit ^ (row & 1) << 2); }

// A tile of features and tokens, and its warps across the features.
constexpr int ROWS = 128, TOKENS = 64, WR = 4, STAGES = 4;

template <class T, int FORMAT, bool PAIR, bool DIVIDED>
__device__ __forceinline__ void matmul_many(const Matmul& p) {
  constexpr int WT = 8 / WR, MT = ROWS / WR / 16, NT = TOKENS / WT / 8;
  constexpr bool direct = FORMAT == F16 || FORMAT == BF16;
  constexpr int A = ROWS * UNITS / 256, B = TOKENS * UNITS / 256;
  extern __shared__ uint4 shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int wr = warp / WT, wt = warp % WT;
  const uint32_t first = blockIdx.x * (PAIR ? ROWS / 2 : ROWS);
  const uint32_t first_token = blockIdx.y * TOKENS;
  // Steps that this block computes: all, or those of one segment.
  const int all = (p.k + STEP - 1) / STEP;
  const int first_step = DIVIDED ? segment_begin(all, blockIdx.z) : 0;
  const int steps = (DIVIDED ? segment_begin(all, blockIdx.z + 1) : all) - first_step;
  const int stages = (steps * STEP + STAGE - 1) / STAGE;
  const int end_k = min(int(p.k), (first_step + steps) * STEP);
  const T* x = static_cast<const T*>(p.x);

  const int unit = threadIdx.x % UNITS, line = threadIdx.x / UNITS;
  const uint8_t* row[A];
#pragma unroll
  for (int i = 0; i < A; i++) row[i] = weights_of<FORMAT, PAIR>(p, first, line + i * 32);
  auto weights_at = [&](int stage) { return shared + stage % STAGES * (ROWS + TOKENS) * UNITS; };
  auto tokens_at = [&](int stage) { return weights_at(stage) + ROWS * UNITS; };
  Packed<FORMAT> ahead[direct ? 1 : A];
  // Weights on their way: into shared memory, or into registers where they have to be unpacked.
  auto fetch_weights = [&](int stage) {
    const int k = first_step * STEP + stage * STAGE + unit * 8;
#pragma unroll
    for (int i = 0; i < A; i++) {
      const bool there = row[i] && k < end_k;
      if constexpr (direct) {
        copy_async(weights_at(stage) + unit_at(line + i * 32, unit), there ? row[i] + size_t(k) * 2 : p.weight[0], there);
      } else {
        ahead[i] = there ? load_packed<T, FORMAT>(row[i], k) : Packed<FORMAT>{};
      }
    }
  };
  auto put_weights = [&](int stage) {
    if constexpr (!direct) {
#pragma unroll
      for (int i = 0; i < A; i++)
        weights_at(stage)[unit_at(line + i * 32, unit)] =
            unpacked<T, FORMAT>(ahead[i], first_step * STEP + stage * STAGE + unit * 8);
    }
  };
  auto fetch_tokens = [&](int stage) {
    const int k = first_step * STEP + stage * STAGE + unit * 8;
#pragma unroll
    for (int i = 0; i < B; i++) {
      const uint32_t token = first_token + line + i * 32;
      const bool there = token < p.tokens && k < end_k;
      copy_async(tokens_at(stage) + unit_at(line + i * 32, unit), x + (there ? size_t(token) * p.k + k : 0), there);
    }
  };

  // Weights don't depend on what was computed before.
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++)
    if (s < stages) {
      fetch_weights(s);
      put_weights(s);
    }
  wait_for_predecessor();
  let_successor_start();
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < stages) fetch_tokens(s);
    copies_begun();
  }
  float total[MT][NT][4] = {}, sum[MT][NT][4] = {};
  auto add_segment = [&] {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          total[m][n][i] = __fadd_rn(total[m][n][i], sum[m][n][i]);
          sum[m][n][i] = 0;
        }
  };
  int segment = 1, end = segment_begin(all, 1);
  for (int stage = 0; stage < stages; stage++) {
    wait_copies<STAGES - 2>();
    __syncthreads();
    const int next = stage + STAGES - 1;
    if (next < stages) {
      fetch_weights(next);
      fetch_tokens(next);
    }
    copies_begun();
    const uint4* weights = weights_at(stage);
    const uint4* tokens = tokens_at(stage);
    uint4 a[2][2 * MT], b[2][NT];
    auto load = [&](int half) {
#pragma unroll
      for (int n = 0; n < NT; n++) b[half][n] = tokens[unit_at((wt * NT + n) * 8 + g, half * 4 + t)];
#pragma unroll
      for (int i = 0; i < 2 * MT; i++) a[half][i] = weights[unit_at(wr * MT * 16 + i * 8 + g, half * 4 + t)];
    };
    load(0);
#pragma unroll
    for (int half = 0; half < STAGE / STEP; half++) {
      const int step = stage * (STAGE / STEP) + half;
      if (half + 1 < STAGE / STEP) load(half + 1);
      if (step >= steps) break;
      if constexpr (!DIVIDED)
        while (step == end && segment < SEGMENTS) {
          add_segment();
          end = segment_begin(all, ++segment);
        }
      mma_step<T, MT, NT>(sum, a[half], b[half]);
    }
    if (next < stages) put_weights(next);
  }
  if constexpr (DIVIDED) {
    // Every segment's sums, as the threads hold them; whoever comes last adds all, in order.
    constexpr int PARTS = MT * NT;
    const uint32_t tile = blockIdx.y * gridDim.x + blockIdx.x;
    float4* places = reinterpret_cast<float4*>(p.partials) + size_t(tile) * SEGMENTS * PARTS * 256 + threadIdx.x;
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      const float* four = sum[i / NT][i % NT];
      __stcg(places + (blockIdx.z * PARTS + i) * 256, make_float4(four[0], four[1], four[2], four[3]));
    }
    __threadfence();
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
      last = atomicAdd(p.arrived + tile, 1) + 1 == SEGMENTS;
      if (last) p.arrived[tile] = 0;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int s = 0; s < SEGMENTS; s++)
#pragma unroll
      for (int i = 0; i < PARTS; i++) {
        const float4 four = __ldcg(places + (s * PARTS + i) * 256);
        float* to = total[i / NT][i % NT];
        to[0] = __fadd_rn(to[0], four.x), to[1] = __fadd_rn(to[1], four.y);
        to[2] = __fadd_rn(to[2], four.z), to[3] = __fadd_rn(to[3], four.w);
      }
  } else {
    for (; segment <= SEGMENTS; segment++) add_segment();
  }

#pragma unroll
  for (int m = 0; m < MT; m++) {
    if (PAIR && m % 2 == 1) continue;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t feature = feature_of<PAIR>(first, (wr * MT + m) * 16 + i / 2 * 8 + g);
        const uint32_t token = first_token + (wt * NT + n) * 8 + 2 * t + i % 2;
        if (feature >= p.end[PAIR ? 0 : 2] || token >= p.tokens) continue;
        put<T, PAIR>(p, token, feature, total[m][n][i], PAIR ? total[m + 1 < MT ? m + 1 : m][n][i] : 0.f);
      }
  }
}
