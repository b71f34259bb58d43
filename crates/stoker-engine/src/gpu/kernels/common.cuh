// What the kernels share: types, loads, the tensor cores' product, launch order.
//
// Row invariance: a row's result depends on that row alone, bit for bit. So the order in which numbers are added is fixed by
// a matrix's columns and a token's position, never by how many rows there are or how the work is divided:
// - a dot product is SEGMENTS partial sums over fixed ranges of columns, each in steps of 32 columns by the tensor cores,
//   added in order. A kernel may compute them one after the other, or at once in as many warps.
// - attention is partial results over SPLIT tokens each, at absolute positions, merged in order, likewise.
#pragma once
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef __half f16;
typedef __nv_bfloat16 bf16;

constexpr int SEGMENTS = 8;
constexpr int STEP = 32;
constexpr int BLOCK_TOKENS = 32;
constexpr int SPLIT = 128;

// Element types, numbered as `kernels.rs` does.
enum Format { F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K };

// Launched early, a kernel waits here for its predecessor's results; before this it touches nothing but weights.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_successor_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ uint4 load_streaming(const void* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}

template <class T> __device__ __forceinline__ T from_float(float x);
// A finite number beyond what half can hold becomes the largest that it can; what isn't a number stays so.
template <> __device__ __forceinline__ f16 from_float<f16>(float x) {
  const float size = fabsf(x);
  return __float2half_rn(size > 65504.f && size < INFINITY ? copysignf(65504.f, x) : x);
}
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }

template <class T> __device__ __forceinline__ uint32_t pack(float low, float high) {
  T pair[2] = {from_float<T>(low), from_float<T>(high)};
  return *reinterpret_cast<uint32_t*>(pair);
}

// Element `i` of a vector of one of the plain types.
__device__ __forceinline__ float element(const void* vector, int format, size_t i) {
  if (format == F32) return static_cast<const float*>(vector)[i];
  if (format == F16) return to_float(static_cast<const f16*>(vector)[i]);
  return to_float(static_cast<const bf16*>(vector)[i]);
}

// d += a b for 16 rows of `a`, 8 columns of `b` and 16 products each.
__device__ __forceinline__ void mma(f16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(bf16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A step of 32 columns: each of a row's four threads holds eight consecutive columns, which are the elements that the two
// products want from it. That permutes the columns within a step, for both operands alike. A product waits for the one before
// it into the same sums, so all sums get their first product, then all their second.
template <class T, int MT, int NT>
__device__ __forceinline__ void mma_step(float (&d)[MT][NT][4], const uint4 (&a)[2 * MT], const uint4 (&b)[NT]) {
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const uint32_t first[4] = {a[2 * m].x, a[2 * m + 1].x, a[2 * m].y, a[2 * m + 1].y};
      mma(T(), d[m][n], first, b[n].x, b[n].y);
    }
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const uint32_t second[4] = {a[2 * m].z, a[2 * m + 1].z, a[2 * m].w, a[2 * m + 1].w};
      mma(T(), d[m][n], second, b[n].z, b[n].w);
    }
}

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// 16 bytes into shared memory, asynchronously; zeros where `there` is false.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copies_begun() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
