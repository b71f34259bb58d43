// Models whose weights are 32 bits wide: exact rather than fast, and as row-invariant as the rest.
#pragma once
#include "attention.cuh"
#include "matmul.cuh"

// A warp for each feature, eight tokens at a time.
template <bool PAIR> __device__ __forceinline__ void matmul_single(const Matmul& p) {
  constexpr int TOKENS = 8;
  wait_for_predecessor();
  let_successor_start();
  const uint32_t feature = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.y * TOKENS;
  const float* row[2];
#pragma unroll
  for (int i = 0; i < (PAIR ? 2 : 1); i++) {
    const int tile_row = PAIR ? i * 16 : 0;
    row[i] = reinterpret_cast<const float*>(weights_of<F32, PAIR>(p, feature, tile_row));
  }
  if (!row[0]) return;
  const float* x = static_cast<const float*>(p.x);
  float sum[PAIR ? 2 : 1][TOKENS] = {};
  for (uint32_t k = lane; k < p.k; k += 32)
#pragma unroll
    for (int token = 0; token < TOKENS; token++) {
      if (first + token >= p.tokens) break;
      const float v = x[size_t(first + token) * p.k + k];
#pragma unroll
      for (int i = 0; i < (PAIR ? 2 : 1); i++) sum[i][token] = fmaf(v, row[i][k], sum[i][token]);
    }
#pragma unroll
  for (int token = 0; token < TOKENS; token++) {
#pragma unroll
    for (int i = 0; i < (PAIR ? 2 : 1); i++)
#pragma unroll
      for (int j = 16; j > 0; j /= 2) sum[i][token] = __fadd_rn(sum[i][token], __shfl_xor_sync(~0u, sum[i][token], j));
    if (lane == 0 && first + token < p.tokens)
      put<float, PAIR>(p, first + token, feature, sum[0][token], PAIR ? sum[PAIR ? 1 : 0][token] : 0.f);
  }
}

// A warp for each row of a work, one key after the other.
__device__ __forceinline__ void attention_single(const Attention& p, uint32_t dims) {
  constexpr int PER_LANE = 8;  // heads of at most 256
  wait_for_predecessor();
  let_successor_start();
  const Work w = p.work[blockIdx.x];
  const uint32_t head = blockIdx.y, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (uint32_t r = threadIdx.x / 32; r < w.rows; r += warps) {
    const uint32_t row = w.first_row + r, token = row / p.group, position = w.position + token;
    const uint32_t query_head = head * p.group + row % p.group;
    const float* query = static_cast<const float*>(p.query) + size_t(w.span_token + token) * p.query_stride + query_head * dims;
    float m = -INFINITY, l = 0, o[PER_LANE] = {};
    for (uint32_t at = p.window && position + 1 > p.window ? position + 1 - p.window : 0; at <= position; at++) {
      const uint8_t* block = p.blocks + p.tables[w.table + at / BLOCK_TOKENS] * p.block_bytes;
      const size_t place = (size_t(head) * BLOCK_TOKENS + at % BLOCK_TOKENS) * dims;
      const float* key = reinterpret_cast<const float*>(block + p.keys) + place;
      const float* value = reinterpret_cast<const float*>(block + p.values) + place;
      float dot = 0;
      for (uint32_t d = lane; d < dims; d += 32) dot = fmaf(query[d], key[d], dot);
#pragma unroll
      for (int j = 16; j > 0; j /= 2) dot = __fadd_rn(dot, __shfl_xor_sync(~0u, dot, j));
      dot = __fmul_rn(dot, p.scale);
      const float larger = fmaxf(m, dot), old = exp2f(m - larger), weight = exp2f(dot - larger);
      m = larger;
      l = __fadd_rn(__fmul_rn(l, old), weight);
#pragma unroll
      for (int i = 0; i < PER_LANE; i++)
        if (lane + i * 32 < dims) o[i] = fmaf(weight, value[lane + i * 32], __fmul_rn(o[i], old));
    }
    float* out = static_cast<float*>(p.out) + (size_t(w.span_token + token) * p.kv_heads * p.group + query_head) * dims;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
      if (lane + i * 32 < dims) out[lane + i * 32] = __fdiv_rn(o[i], l);
  }
}
