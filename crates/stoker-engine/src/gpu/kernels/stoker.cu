// Every kernel under its name. `compile` makes machine code of this.
#include "attention.cuh"
#include "elementwise.cuh"
#include "matmul.cuh"
#include "single.cuh"

#define KERNEL extern "C" __global__ void

// Unpacking takes registers: of those kernels one block at a time is faster than two.
constexpr int blocks_of(int format) { return format > BF16 ? 1 : 2; }

#define MATMUL(NAME, T, FORMAT)                                                                                                \
  KERNEL __launch_bounds__(256, 2) few8_##NAME(Matmul p) { matmul_few<T, FORMAT, false, 16, 1>(p); }                           \
  KERNEL __launch_bounds__(256, 2) few8_pair_##NAME(Matmul p) { matmul_few<T, FORMAT, true, 32, 1>(p); }                       \
  KERNEL __launch_bounds__(256) few32_##NAME(Matmul p) { matmul_few<T, FORMAT, false, 32, 4>(p); }                             \
  KERNEL __launch_bounds__(256) few32_pair_##NAME(Matmul p) { matmul_few<T, FORMAT, true, 32, 4>(p); }                         \
  KERNEL __launch_bounds__(256, blocks_of(FORMAT)) many_##NAME(Matmul p) { matmul_many<T, FORMAT, false, false>(p); }                          \
  KERNEL __launch_bounds__(256, blocks_of(FORMAT)) many_pair_##NAME(Matmul p) { matmul_many<T, FORMAT, true, false>(p); }                      \
  KERNEL __launch_bounds__(256, blocks_of(FORMAT)) divided_##NAME(Matmul p) { matmul_many<T, FORMAT, false, true>(p); }                        \
  KERNEL __launch_bounds__(256, blocks_of(FORMAT)) divided_pair_##NAME(Matmul p) { matmul_many<T, FORMAT, true, true>(p); }                    \
  KERNEL __launch_bounds__(THREADS) embed_##NAME(Embed p) { embed<T, FORMAT>(p); }

#define ATTENTION(NAME, T, HD)                                                                                                 \
  KERNEL __launch_bounds__(32) attention1_##NAME##_##HD(Attention p) { attention<T, HD, 1>(p); }                               \
  KERNEL __launch_bounds__(128) attention4_##NAME##_##HD(Attention p) { attention<T, HD, 4>(p); }

#define BETWEEN(NAME, T)                                                                                                       \
  KERNEL __launch_bounds__(THREADS) norm_##NAME(Norm p) { norm<T>(p); }                                                        \
  KERNEL __launch_bounds__(THREADS) rope_##NAME(Rope p) { rope<T>(p); }                                                        \
  KERNEL __launch_bounds__(THREADS) silu_##NAME(Silu p) { silu<T>(p); }

#define TYPE(NAME, T)                                                                                                          \
  ATTENTION(NAME, T, 16)                                                                                                       \
  ATTENTION(NAME, T, 32)                                                                                                       \
  ATTENTION(NAME, T, 64)                                                                                                       \
  ATTENTION(NAME, T, 80)                                                                                                       \
  ATTENTION(NAME, T, 96)                                                                                                       \
  ATTENTION(NAME, T, 128)                                                                                                      \
  BETWEEN(NAME, T)

TYPE(f16, f16)
TYPE(bf16, bf16)

MATMUL(f16, f16, F16)
MATMUL(bf16, bf16, BF16)
MATMUL(f32, f16, F32)
MATMUL(q4_0, f16, Q4_0)
MATMUL(q4_1, f16, Q4_1)
MATMUL(q5_0, f16, Q5_0)
MATMUL(q5_1, f16, Q5_1)
MATMUL(q8_0, f16, Q8_0)
MATMUL(q2_k, f16, Q2_K)
MATMUL(q3_k, f16, Q3_K)
MATMUL(q4_k, f16, Q4_K)
MATMUL(q5_k, f16, Q5_K)
MATMUL(q6_k, f16, Q6_K)

BETWEEN(single, float)
KERNEL __launch_bounds__(THREADS) embed_single(Embed p) { embed<float, F32>(p); }
KERNEL __launch_bounds__(256) matmul_single(Matmul p) { matmul_single<false>(p); }
KERNEL __launch_bounds__(256) matmul_pair_single(Matmul p) { matmul_single<true>(p); }
KERNEL __launch_bounds__(128) attention_single(Attention p) { attention_single(p, p.head_dim); }

KERNEL __launch_bounds__(THREADS) angles_table(Angles p) { angles(p); }
KERNEL __launch_bounds__(THREADS) likeliest_token(Likeliest p) { likeliest(p); }
