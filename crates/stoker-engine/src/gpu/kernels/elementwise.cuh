// What lies between matrix products and attention. One block for each row, unless said otherwise.
#pragma once
#include "formats.cuh"

constexpr int THREADS = 256;

// The same order of additions for every row.
__device__ __forceinline__ float sum_of_block(float x) {
  __shared__ float warps[THREADS / 32];
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x = __fadd_rn(x, __shfl_xor_sync(~0u, x, i));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < THREADS / 32; i++) sum = __fadd_rn(sum, warps[i]);
  return sum;
}

struct Embed {
  const uint8_t* weights;
  const uint32_t* tokens;
  float* x;               // [tokens, k]
  uint32_t k;
};

// Rows of the embedding into the residual stream.
template <class T, int FORMAT> __device__ __forceinline__ void embed(const Embed& p) {
  wait_for_predecessor();
  let_successor_start();
  const uint8_t* row = p.weights + p.tokens[blockIdx.x] * row_bytes<FORMAT>(p.k);
  float* x = p.x + size_t(blockIdx.x) * p.k;
  if constexpr (sizeof(T) == 4) {
    for (uint32_t at = threadIdx.x; at < p.k; at += THREADS) x[at] = reinterpret_cast<const float*>(row)[at];
  } else {
    for (uint32_t at = threadIdx.x * 8; at < p.k; at += THREADS * 8) {
      const uint4 packed = fetch<T, FORMAT>(row, at);
      const T* eight = reinterpret_cast<const T*>(&packed);
#pragma unroll
      for (int i = 0; i < 8; i++) x[at + i] = to_float(eight[i]);
    }
  }
}

struct Norm {
  const float* x;       // [tokens, k]
  const uint32_t* rows; // which rows of x; null: all, in order
  const void* weight;   // [k]
  void* out;            // T [rows, k]
  uint32_t k, weight_format;
  float epsilon;
};

template <class T> __device__ __forceinline__ void norm(const Norm& p) {
  wait_for_predecessor();
  let_successor_start();
  const float* x = p.x + size_t(p.rows ? p.rows[blockIdx.x] : blockIdx.x) * p.k;
  float squares = 0;
  for (uint32_t i = threadIdx.x * 4; i < p.k; i += THREADS * 4) {
    const float4 v = *reinterpret_cast<const float4*>(x + i);
    squares = fmaf(v.x, v.x, squares), squares = fmaf(v.y, v.y, squares);
    squares = fmaf(v.z, v.z, squares), squares = fmaf(v.w, v.w, squares);
  }
  const float scale = rsqrtf(sum_of_block(squares) / float(p.k) + p.epsilon);
  T* out = static_cast<T*>(p.out) + size_t(blockIdx.x) * p.k;
  for (uint32_t i = threadIdx.x * 4; i < p.k; i += THREADS * 4) {
    const float4 v = *reinterpret_cast<const float4*>(x + i);
    const float in[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; j++) out[i + j] = from_float<T>(in[j] * scale * element(p.weight, p.weight_format, i + j));
  }
}

struct Angles {
  const uint32_t* positions;  // of each token
  const float* frequencies;   // [pairs]
  const float* divisors;      // likewise, of the frequencies; null: none
  float2* angles;             // [tokens, pairs]: cosine and sine
  uint32_t pairs;
};

// What all layers of a pass rotate by. One block for each token.
__device__ __forceinline__ void angles(const Angles& p) {
  wait_for_predecessor();
  let_successor_start();
  const float position = float(p.positions[blockIdx.x]);
  for (uint32_t i = threadIdx.x; i < p.pairs; i += THREADS) {
    const float frequency = p.divisors ? __fdiv_rn(p.frequencies[i], p.divisors[i]) : p.frequencies[i];
    float sin, cos;
    sincosf(position * frequency, &sin, &cos);
    p.angles[size_t(blockIdx.x) * p.pairs + i] = {cos, sin};
  }
}

struct Rope {
  void* qkv;                 // T [tokens, stride]: queries, keys, values; queries are rotated in place
  const float2* angles;      // [tokens, dims / 2]
  const uint32_t* places;    // block * BLOCK_TOKENS + place in it, of each token
  uint8_t* blocks;
  uint64_t block_bytes;
  uint64_t keys, values;     // this layer's, within a block: T [kv_heads, BLOCK_TOKENS, head_dim]
  uint32_t heads, kv_heads, head_dim, dims, stride, interleaved;
};

// Heads that a block rotates or moves.
constexpr uint32_t ROPE_HEADS = 8;

// Rotates queries and keys, and puts keys and values where attention looks for them. A block for each token and each
// ROPE_HEADS of the heads of all three.
template <class T> __device__ __forceinline__ void rope(const Rope& p) {
  wait_for_predecessor();
  let_successor_start();
  T* row = static_cast<T*>(p.qkv) + size_t(blockIdx.x) * p.stride;
  const uint32_t place = p.places[blockIdx.x];
  uint8_t* block = p.blocks + place / BLOCK_TOKENS * p.block_bytes;
  auto cached = [&](uint64_t what, uint32_t head) {
    return reinterpret_cast<T*>(block + what) + (size_t(head) * BLOCK_TOKENS + place % BLOCK_TOKENS) * p.head_dim;
  };
  const uint32_t pairs = p.head_dim / 2, rotated = p.dims / 2;
  const float2* angles = p.angles + size_t(blockIdx.x) * rotated;
  const uint32_t first_head = blockIdx.y * ROPE_HEADS, end = p.heads + 2 * p.kv_heads;
  for (uint32_t i = threadIdx.x; i < ROPE_HEADS * pairs; i += blockDim.x) {
    const uint32_t head = first_head + i / pairs, pair = i % pairs;
    if (head >= end) return;
    // Pairs behind the rotated ones, and values, are passed on.
    const bool turns = pair < rotated && head < p.heads + p.kv_heads;
    uint32_t first, second;
    if (!turns || p.interleaved) {
      first = pair * 2, second = first + 1;
      if (!turns && pair < rotated && !p.interleaved) first = pair, second = pair + rotated;
    } else {
      first = pair, second = pair + rotated;
    }
    const T* in = row + head * p.head_dim;
    float a = to_float(in[first]), b = to_float(in[second]);
    if (turns) {
      const float2 angle = angles[pair];
      const float x = a, y = b;
      a = __fsub_rn(__fmul_rn(x, angle.x), __fmul_rn(y, angle.y));
      b = __fadd_rn(__fmul_rn(x, angle.y), __fmul_rn(y, angle.x));
    }
    T* out = head < p.heads                ? row + head * p.head_dim
             : head < p.heads + p.kv_heads ? cached(p.keys, head - p.heads)
                                           : cached(p.values, head - p.heads - p.kv_heads);
    out[first] = from_float<T>(a), out[second] = from_float<T>(b);
  }
}

struct Silu {
  const void* gate;  // T [tokens, k]
  const void* up;    // likewise
  void* out;         // likewise
  uint32_t k;
};

// silu(gate) * up where gate and up are of different formats.
template <class T> __device__ __forceinline__ void silu(const Silu& p) {
  wait_for_predecessor();
  let_successor_start();
  for (uint32_t i = threadIdx.x; i < p.k; i += THREADS) {
    const size_t at = size_t(blockIdx.x) * p.k + i;
    const float g = to_float(static_cast<const T*>(p.gate)[at]), u = to_float(static_cast<const T*>(p.up)[at]);
    static_cast<T*>(p.out)[at] = from_float<T>(__fmul_rn(__fdiv_rn(g, __fadd_rn(1.f, expf(-g))), u));
  }
}

struct Likeliest {
  const float* logits;  // [rows, vocab]
  uint32_t* tokens;     // [rows]
  uint32_t vocab;
};

// The likeliest token of each row of logits, the lowest among equals; ~0 where one isn't finite.
__device__ __forceinline__ void likeliest(const Likeliest& p) {
  const uint32_t vocab = p.vocab;
  wait_for_predecessor();
  let_successor_start();
  __shared__ float values[THREADS / 32];
  __shared__ uint32_t ids[THREADS / 32];
  __shared__ int broken;
  if (threadIdx.x == 0) broken = 0;
  __syncthreads();
  const float* row = p.logits + size_t(blockIdx.x) * vocab;
  float best = -INFINITY;
  uint32_t id = ~0u;
  bool finite = true;
  for (uint32_t i = threadIdx.x; i < vocab; i += THREADS) {
    finite &= isfinite(row[i]);
    if (row[i] > best) best = row[i], id = i;
  }
  if (!finite) broken = 1;
  auto better = [&](float value, uint32_t other) {
    if (value > best || (value == best && other < id)) best = value, id = other;
  };
#pragma unroll
  for (int i = 16; i > 0; i /= 2) {
    const float value = __shfl_xor_sync(~0u, best, i);
    better(value, __shfl_xor_sync(~0u, id, i));
  }
  if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = best, ids[threadIdx.x / 32] = id;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int i = 0; i < THREADS / 32; i++) better(values[i], ids[i]);
  p.tokens[blockIdx.x] = broken ? ~0u : id;
}
