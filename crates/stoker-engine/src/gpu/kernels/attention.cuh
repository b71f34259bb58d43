// Attention of new tokens over the keys and values of their sequences, in pages of BLOCK_TOKENS tokens.
#pragma once
#include "common.cuh"

// Query rows of one sequence, (token, head of the group) pairs, and the tokens that they look at.
struct Work {
  uint32_t first_row;  // of the span's rows: (token of the span) * group + head
  uint32_t rows;
  uint32_t span_token; // the span's first token in the batch
  uint32_t position;   // and in its sequence
  uint32_t table;      // where the sequence's blocks begin in the table
  uint32_t split;      // which SPLIT tokens, of `splits`; with one split: all, one after the other
  uint32_t splits;
  uint32_t partial;    // first of this row group's places for partial results
};

struct Attention {
  const void* query;   // T [tokens, query_stride]
  void* out;           // T [tokens, heads * HD]
  const Work* work;
  const uint32_t* tables;
  const uint8_t* blocks;
  uint64_t block_bytes;
  uint64_t keys, values;  // this layer's, within a block: T [kv_heads, BLOCK_TOKENS, HD]
  float* partials;        // [places, kv_heads, partial_rows, HD + 2]
  uint32_t* arrived;      // [places, kv_heads], zeros before and after
  uint32_t group, kv_heads, query_stride, window, head_dim;
  uint32_t partial_rows;  // at least the rows of every work with more than one split
  float scale;            // log2(e) / sqrt(HD)
};

// Merges a later split's result into what came before it. The same operations wherever it is done.
__device__ __forceinline__ void merge_scales(float& m, float& l, float split_m, float split_l, float& mine, float& theirs) {
  const float larger = fmaxf(m, split_m);
  const float base = larger == -INFINITY ? 0.f : larger;
  mine = exp2f(m - base);
  theirs = exp2f(split_m - base);
  l = __fadd_rn(__fmul_rn(l, mine), __fmul_rn(split_l, theirs));
  m = larger;
}
__device__ __forceinline__ float merge(float o, float mine, float split_o, float theirs) {
  return __fadd_rn(__fmul_rn(o, mine), __fmul_rn(split_o, theirs));
}

template <class T, int HD, int WARPS>
__device__ __forceinline__ void attention(const Attention& p) {
  constexpr int U = HD / 8;           // 16-byte units of a row
  constexpr int KS = HD / 16;         // products along a head
  constexpr int MASK = ((U & -U) > 8 ? 8 : U & -U) - 1;  // of a row's units, those that are exchanged with each other
  // A warp alone has more on its way, to make up for the others.
  constexpr int STAGES = WARPS == 1 ? 4 : 2;
  extern __shared__ uint4 shared[];   // stages of keys and values, [BLOCK_TOKENS, U] each
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  wait_for_predecessor();
  let_successor_start();
  const Work w = p.work[blockIdx.x];
  const uint32_t head = blockIdx.y;
  const uint32_t* table = p.tables + w.table;

  // This thread's two rows of the warp's sixteen.
  uint32_t row[2], token[2], position[2];
  bool there[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint32_t r = warp * 16 + i * 8 + g;
    there[i] = r < w.rows;
    row[i] = w.first_row + (there[i] ? r : 0);
    token[i] = row[i] / p.group;
    position[i] = w.position + token[i];
  }
  const T* query[2];
  uint32_t q[KS][4];
#pragma unroll
  for (int i = 0; i < 2; i++)
    query[i] = static_cast<const T*>(p.query) + size_t(w.span_token + token[i]) * p.query_stride +
               (head * p.group + row[i] % p.group) * HD;
#pragma unroll
  for (int k = 0; k < KS; k++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      q[k][i] = there[i % 2] ? *reinterpret_cast<const uint32_t*>(query[i % 2] + k * 16 + i / 2 * 8 + t * 2) : 0;

  // Tokens that any row of this work looks at.
  const uint32_t first_position = w.position + w.first_row / p.group;
  const uint32_t end = w.position + (w.first_row + w.rows - 1) / p.group + 1;
  uint32_t begin = p.window && first_position + 1 > p.window ? first_position + 1 - p.window : 0;
  uint32_t until = end;
  if (w.splits > 1) {
    begin = max(begin, w.split * SPLIT);
    until = min(until, (w.split + 1) * SPLIT);
  }
  const int first_tile = begin / BLOCK_TOKENS, tiles = until > begin ? (until + BLOCK_TOKENS - 1) / BLOCK_TOKENS : first_tile;

  auto fetch = [&](int tile) {
    uint4* keys = shared + tile % STAGES * 2 * BLOCK_TOKENS * U;
    uint4* values = keys + BLOCK_TOKENS * U;
    const uint8_t* block = p.blocks + table[tile] * p.block_bytes + size_t(head) * BLOCK_TOKENS * HD * sizeof(T);
    for (int i = threadIdx.x; i < BLOCK_TOKENS * U; i += WARPS * 32) {
      const int r = i / U, u = i % U, at = r * U + (u ^ (r & MASK));
      // Behind the end there may be anything, NaN too, and 0 * NaN isn't 0.
      const bool written = uint32_t(tile * BLOCK_TOKENS + r) < end;
      copy_async(keys + at, block + p.keys + i * 16, written);
      copy_async(values + at, block + p.values + i * 16, written);
    }
  };

  float m[2] = {-INFINITY, -INFINITY}, l[2] = {}, o[HD / 8][4] = {};
  float total_m[2] = {-INFINITY, -INFINITY}, total_l[2] = {}, total[HD / 8][4] = {};
  auto end_of_split = [&] {
    float mine[2], theirs[2];
#pragma unroll
    for (int i = 0; i < 2; i++) merge_scales(total_m[i], total_l[i], m[i], l[i], mine[i], theirs[i]);
#pragma unroll
    for (int n = 0; n < HD / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        total[n][i] = merge(total[n][i], mine[i / 2], o[n][i], theirs[i / 2]);
        o[n][i] = 0;
      }
#pragma unroll
    for (int i = 0; i < 2; i++) m[i] = -INFINITY, l[i] = 0;
  };

#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) {
    if (first_tile + i < tiles) fetch(first_tile + i);
    copies_begun();
  }
  for (int tile = first_tile; tile < tiles; tile++) {
    if (tile + STAGES - 1 < tiles) fetch(tile + STAGES - 1);
    copies_begun();
    wait_copies<STAGES - 1>();
    __syncthreads();
    const uint32_t keys = shared_address(shared + tile % STAGES * 2 * BLOCK_TOKENS * U);
    const uint32_t values = keys + BLOCK_TOKENS * U * 16;
    // Scores of 16 rows with 32 keys.
    float s[4][4] = {};
#pragma unroll
    for (int k = 0; k < KS; k++)
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        // Matrices: keys n*8.., dims k*16..; the same keys, dims +8; keys +8; both.
        const int r = n * 8 + lane / 16 * 8 + lane % 8, u = k * 2 + lane / 8 % 2;
        uint32_t b[4];
        load_matrices(b, keys + (r * U + (u ^ (r & MASK))) * 16);
        mma(T(), s[n], q[k], b[0], b[1]);
        mma(T(), s[n + 1], q[k], b[2], b[3]);
      }
    float largest[2] = {m[0], m[1]};
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t at = tile * BLOCK_TOKENS + n * 8 + t * 2 + i % 2;
        const bool seen = at <= position[i / 2] && (!p.window || at + p.window > position[i / 2]);
        s[n][i] = seen ? __fmul_rn(s[n][i], p.scale) : -INFINITY;
        largest[i / 2] = fmaxf(largest[i / 2], s[n][i]);
      }
    float old[2], sum[2] = {}, base[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      largest[i] = fmaxf(largest[i], __shfl_xor_sync(~0u, largest[i], 1));
      largest[i] = fmaxf(largest[i], __shfl_xor_sync(~0u, largest[i], 2));
      base[i] = largest[i] == -INFINITY ? 0.f : largest[i];
      old[i] = exp2f(m[i] - base[i]);
      m[i] = largest[i];
    }
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        s[n][i] = exp2f(s[n][i] - base[i / 2]);
        sum[i / 2] = __fadd_rn(sum[i / 2], s[n][i]);
      }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      sum[i] = __fadd_rn(sum[i], __shfl_xor_sync(~0u, sum[i], 1));
      sum[i] = __fadd_rn(sum[i], __shfl_xor_sync(~0u, sum[i], 2));
      l[i] = __fadd_rn(__fmul_rn(l[i], old[i]), sum[i]);
    }
#pragma unroll
    for (int n = 0; n < HD / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) o[n][i] = __fmul_rn(o[n][i], old[i / 2]);
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const uint32_t a[4] = {pack<T>(s[2 * k][0], s[2 * k][1]), pack<T>(s[2 * k][2], s[2 * k][3]),
                             pack<T>(s[2 * k + 1][0], s[2 * k + 1][1]), pack<T>(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
      for (int n = 0; n < HD / 8; n += 2) {
        // Matrices: tokens k*16.., dims n*8..; tokens +8; dims +8; both.
        const int r = k * 16 + lane / 8 % 2 * 8 + lane % 8, u = n + lane / 16;
        uint32_t b[4];
        load_matrices_transposed(b, values + (r * U + (u ^ (r & MASK))) * 16);
        mma(T(), o[n], a, b[0], b[1]);
        mma(T(), o[n + 1], a, b[2], b[3]);
      }
    }
    __syncthreads();
    if ((tile + 1) * BLOCK_TOKENS % SPLIT == 0) end_of_split();
  }
  // A split that was begun. One that wasn't merges nothing, without changing a bit.
  end_of_split();

  if (w.splits > 1) {
    // The places of a row group: [splits, kv_heads, partial_rows, HD + 2].
    auto place_of = [&](uint32_t split) {
      return p.partials + (size_t(w.partial + split) * p.kv_heads + head) * p.partial_rows * (HD + 2);
    };
    float* place = place_of(w.split);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float* mine = place + (i * 8 + g) * (HD + 2);
      if (!there[i]) continue;
#pragma unroll
      for (int n = 0; n < HD / 8; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) mine[n * 8 + t * 2 + j] = total[n][i * 2 + j];
      if (t == 0) mine[HD] = total_m[i], mine[HD + 1] = total_l[i];
    }
    // Whoever comes last merges all, in order.
    __threadfence();
    __syncwarp();
    uint32_t* arrived = p.arrived + size_t(w.partial) * p.kv_heads + head;
    uint32_t before = lane == 0 ? atomicAdd(arrived, 1) : 0;
    before = __shfl_sync(~0u, before, 0);
    if (before + 1 < w.splits) return;
    __threadfence();
    if (lane == 0) *arrived = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) total_m[i] = -INFINITY, total_l[i] = 0;
#pragma unroll
    for (int n = 0; n < HD / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) total[n][i] = 0;
    for (uint32_t split = 0; split < w.splits; split++) {
      const float* theirs_at = place_of(split);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (!there[i]) continue;
        const float* from = theirs_at + (i * 8 + g) * (HD + 2);
        float mine, theirs;
        merge_scales(total_m[i], total_l[i], __ldcg(from + HD), __ldcg(from + HD + 1), mine, theirs);
#pragma unroll
        for (int n = 0; n < HD / 8; n++)
#pragma unroll
          for (int j = 0; j < 2; j++)
            total[n][i * 2 + j] = merge(total[n][i * 2 + j], mine, __ldcg(from + n * 8 + t * 2 + j), theirs);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (!there[i]) continue;
    T* out = static_cast<T*>(p.out) + (size_t(w.span_token + token[i]) * p.kv_heads * p.group + head * p.group +
                                       row[i] % p.group) * HD;
#pragma unroll
    for (int n = 0; n < HD / 8; n++)
      *reinterpret_cast<uint32_t*>(out + n * 8 + t * 2) =
          pack<T>(__fdiv_rn(total[n][i * 2], total_l[i]), __fdiv_rn(total[n][i * 2 + 1], total_l[i]));
  }
}
