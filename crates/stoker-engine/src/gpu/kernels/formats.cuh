// Eight consecutive elements of a row of weights, as the tensor cores want them. Layouts: ggml's `ggml-common.h` and
// `ggml-quants.c`. `k` is a multiple of 8.
#pragma once
#include "common.cuh"

__device__ __forceinline__ uint32_t load16(const uint8_t* at) { return *reinterpret_cast<const uint16_t*>(at); }
__device__ __forceinline__ float load_f16(const uint8_t* at) { return __half2float(__ushort_as_half(load16(at))); }
// Blocks are only as aligned as their length.
__device__ __forceinline__ uint32_t load32_of_16(const uint8_t* at) { return load16(at) | load16(at + 2) << 16; }
__device__ __forceinline__ uint32_t load32(const uint8_t* at) { return *reinterpret_cast<const uint32_t*>(at); }
// Eight bytes. What begins a tensor is aligned, so that two bytes before an odd one are the tensor's.
__device__ __forceinline__ uint2 load64_of_16(const uint8_t* at) {
  if (reinterpret_cast<uintptr_t>(at) % 4 == 0) return {load32(at), load32(at + 4)};
  const uint32_t a = load32(at - 2), b = load32(at + 2), c = load16(at + 6);
  return {__funnelshift_r(a, b, 16), __funnelshift_r(b, c, 16)};
}

// Two halves of two bytes of a word: the byte behind the exponent of 1024, less 1024 + `zero`, exactly.
__device__ __forceinline__ __half2 halves(uint32_t word, uint32_t bytes, __half2 zero) {
  const uint32_t pair = __byte_perm(word, 0x64646464, bytes);
  return __hsub2(*reinterpret_cast<const __half2*>(&pair), zero);
}

__device__ __forceinline__ uint32_t bits(__half2 pair) { return *reinterpret_cast<const uint32_t*>(&pair); }
__device__ __forceinline__ __half half_of(uint32_t word, int which) { return __ushort_as_half(word >> (16 * which) & 0xffff); }

// scale * (q - ZERO) + min for the four bytes of a word, twice, each rounded once.
template <int ZERO> __device__ __forceinline__ uint4 scaled(uint32_t low, uint32_t high, __half scale, __half min) {
  const __half2 zero = __float2half2_rn(1024 + ZERO), s = __half2half2(scale), m = __half2half2(min);
  auto two = [&](uint32_t word, uint32_t bytes) { return bits(__hfma2(halves(word, bytes, zero), s, m)); };
  return {two(low, 0x4140), two(low, 0x4342), two(high, 0x4140), two(high, 0x4342)};
}
template <int ZERO> __device__ __forceinline__ uint4 scaled(uint32_t low, uint32_t high, __half scale) {
  const __half2 zero = __float2half2_rn(1024 + ZERO), s = __half2half2(scale);
  auto two = [&](uint32_t word, uint32_t bytes) { return bits(__hmul2(halves(word, bytes, zero), s)); };
  return {two(low, 0x4140), two(low, 0x4342), two(high, 0x4140), two(high, 0x4342)};
}

// Four bits, one each into bit 4 of the four bytes.
__device__ __forceinline__ uint32_t fifth_bits(uint32_t bits) {
  const uint32_t four = bits & 0xf;
  const uint32_t two = four | four << 14;
  return ((two | two << 7) & 0x01010101) << 4;
}

// Scale and min of a group of Q4_K or Q5_K, of the 16 bytes that a block begins with: two halves and eight pairs of six bits.
__device__ __forceinline__ void scale_and_min(uint4 head, int group, __half& scale, __half& min) {
  const int shift = group % 4 * 8;
  const uint32_t s = head.y >> shift, m = head.z >> shift, both = head.w >> shift;
  const bool first = group < 4;
  const uint32_t sc = first ? s & 63 : (both & 0xf) | (s >> 2 & 0x30);
  const uint32_t mn = first ? m & 63 : (both >> 4 & 0xf) | (m >> 2 & 0x30);
  scale = __hmul(half_of(head.x, 0), __ushort2half_rn(sc));
  min = __hneg(__hmul(half_of(head.x, 1), __ushort2half_rn(mn)));
}

// A number of which the compiler knows nothing. nvcc 13.0 computes the group of Q4_K and Q5_K wrongly in `matmul_many` when it
// sees through the column, whatever the launch bounds: `check.cu` holds every kernel against plain arithmetic for that.
__device__ __forceinline__ int opaque(int k) {
  asm("" : "+r"(k));
  return k;
}

// Bytes of a row of `k` columns.
template <int FORMAT> __host__ __device__ constexpr size_t row_bytes(size_t k) {
  return FORMAT == F32    ? k * 4
         : FORMAT == F16  ? k * 2
         : FORMAT == BF16 ? k * 2
         : FORMAT == Q4_0 ? k / 32 * 18
         : FORMAT == Q4_1 ? k / 32 * 20
         : FORMAT == Q5_0 ? k / 32 * 22
         : FORMAT == Q5_1 ? k / 32 * 24
         : FORMAT == Q8_0 ? k / 32 * 34
         : FORMAT == Q2_K ? k / 256 * 84
         : FORMAT == Q3_K ? k / 256 * 110
         : FORMAT == Q4_K ? k / 256 * 144
         : FORMAT == Q5_K ? k / 256 * 176
                          : k / 256 * 210;
}

// What eight elements are made of, as it is loaded: the bits of the elements, and what scales them. Loads are far ahead of
// their use; nothing is computed of them before.
template <int FORMAT> struct Packed {
  static constexpr bool two_words = FORMAT == F32;
  static constexpr bool is_k = FORMAT >= Q2_K;
  static constexpr bool is_float = FORMAT <= BF16;
  uint4 words[is_float ? (two_words ? 2 : 1) : 1];
  // Of the block: scales and the like.
  uint4 head;
};

template <class T, int FORMAT> __device__ __forceinline__ Packed<FORMAT> load_packed(const uint8_t* row, int k) {
  Packed<FORMAT> p;
  if constexpr (FORMAT == F32) {
    p.words[0] = *reinterpret_cast<const uint4*>(row + size_t(k) * 4);
    p.words[1] = *reinterpret_cast<const uint4*>(row + size_t(k) * 4 + 16);
  } else if constexpr (FORMAT == F16 || FORMAT == BF16) {
    p.words[0] = load_streaming(row + size_t(k) * 2);
  } else if constexpr (FORMAT == Q4_0 || FORMAT == Q4_1 || FORMAT == Q5_0 || FORMAT == Q5_1) {
    constexpr int bytes = int(row_bytes<FORMAT>(32));
    const uint8_t* block = row + size_t(k / 32) * bytes;
    const uint8_t* q = block + bytes - 16 + k % 16;
    if constexpr (FORMAT == Q4_1 || FORMAT == Q5_1) {
      p.words[0].x = load32(q), p.words[0].y = load32(q + 4), p.head.x = load32(block);
      if constexpr (FORMAT == Q5_1) p.head.y = load32(block + 4);
    } else {
      const uint2 two = load64_of_16(q);
      p.words[0].x = two.x, p.words[0].y = two.y, p.head.x = load16(block);
      if constexpr (FORMAT == Q5_0) p.head.y = load32_of_16(block + 2);
    }
  } else if constexpr (FORMAT == Q8_0) {
    const uint8_t* block = row + size_t(k / 32) * 34;
    const uint8_t* q = block + 2 + k % 32;
    const uint2 two = load64_of_16(q);
    p.words[0].x = two.x, p.words[0].y = two.y, p.head.x = load16(block);
  } else {
    const int i = k % 256, at = i % 32;
    constexpr int bytes = int(row_bytes<FORMAT>(256));
    const uint8_t* block = row + size_t(k / 256) * bytes;
    if constexpr (FORMAT == Q4_K || FORMAT == Q5_K) {
      // Blocks of these are as long as a multiple of 16 bytes, and rows begin at one.
      const uint2 q = *reinterpret_cast<const uint2*>(block + bytes - 128 + i / 64 * 32 + at);
      p.words[0].x = q.x, p.words[0].y = q.y, p.head = *reinterpret_cast<const uint4*>(block);
      if constexpr (FORMAT == Q5_K) {
        const uint2 fifths = *reinterpret_cast<const uint2*>(block + 16 + at);
        p.words[0].z = fifths.x, p.words[0].w = fifths.y;
      }
    } else {
      const int half = i / 128, quarter = i % 128 / 32;
      if constexpr (FORMAT == Q6_K) {
        const uint8_t* ql = block + 64 * half + quarter % 2 * 32 + at;
        const uint8_t* qh = block + 128 + 32 * half + at;
        p.words[0] = {load32_of_16(ql), load32_of_16(ql + 4), load32_of_16(qh), load32_of_16(qh + 4)};
        p.head.x = load16(block + 208), p.head.y = block[192 + i / 16];
      } else if constexpr (FORMAT == Q2_K) {
        const uint8_t* q = block + 16 + 32 * half + at;
        p.words[0].x = load32(q), p.words[0].y = load32(q + 4);
        p.head.x = load32(block + 80), p.head.y = block[i / 16];
      } else {
        static_assert(FORMAT == Q3_K, "");
        const uint8_t* q = block + 32 + 32 * half + at;
        const uint8_t* third = block + at;
        p.words[0] = {load32_of_16(q), load32_of_16(q + 4), load32_of_16(third), load32_of_16(third + 4)};
        // Sixteen 6-bit scales: nibbles of the first 8 bytes, upper pairs from the last 4.
        const int group = i / 16;
        const uint8_t* s = block + 96;
        p.head.x = load16(block + 108), p.head.y = s[group % 8], p.head.z = s[8 + group % 4];
      }
    }
  }
  return p;
}

template <class T, int FORMAT> __device__ __forceinline__ uint4 unpacked(const Packed<FORMAT>& p, int column) {
  const int k = FORMAT > BF16 ? opaque(column) : column;
  if constexpr (FORMAT == F32) {
    auto one = [](uint32_t word) { return __uint_as_float(word); };
    const uint4 a = p.words[0], b = p.words[1];
    return {pack<T>(one(a.x), one(a.y)), pack<T>(one(a.z), one(a.w)), pack<T>(one(b.x), one(b.y)), pack<T>(one(b.z), one(b.w))};
  } else if constexpr (FORMAT == F16 || FORMAT == BF16) {
    // The type of the weights is the type of the activations: see `compute_type`.
    static_assert(sizeof(T) == 2, "");
    return p.words[0];
  } else if constexpr (FORMAT == Q4_0 || FORMAT == Q4_1 || FORMAT == Q5_0 || FORMAT == Q5_1) {
    const int i = k % 32, shift = i / 16 * 4;
    uint32_t low = p.words[0].x >> shift & 0x0f0f0f0f, high = p.words[0].y >> shift & 0x0f0f0f0f;
    if constexpr (FORMAT == Q5_0 || FORMAT == Q5_1) {
      const uint32_t fifths = p.head.y >> i;
      low |= fifth_bits(fifths), high |= fifth_bits(fifths >> 4);
    }
    const __half d = half_of(p.head.x, 0);
    if constexpr (FORMAT == Q4_0) return scaled<8>(low, high, d);
    else if constexpr (FORMAT == Q5_0) return scaled<16>(low, high, d);
    else return scaled<0>(low, high, d, half_of(p.head.x, 1));
  } else if constexpr (FORMAT == Q8_0) {
    // Signed, moved up by 128.
    return scaled<128>(p.words[0].x ^ 0x80808080, p.words[0].y ^ 0x80808080, half_of(p.head.x, 0));
  } else {
    const int i = k % 256;
    if constexpr (FORMAT == Q4_K || FORMAT == Q5_K) {
      const int group = i / 32, shift = group % 2 * 4;
      __half scale, min;
      scale_and_min(p.head, group, scale, min);
      uint32_t low = p.words[0].x >> shift & 0x0f0f0f0f, high = p.words[0].y >> shift & 0x0f0f0f0f;
      if constexpr (FORMAT == Q5_K) {
        low |= (p.words[0].z >> group & 0x01010101) << 4;
        high |= (p.words[0].w >> group & 0x01010101) << 4;
      }
      return scaled<0>(low, high, scale, min);
    } else {
      const int half = i / 128, quarter = i % 128 / 32;
      if constexpr (FORMAT == Q6_K) {
        const int nibble = quarter / 2 * 4, pair = quarter * 2;
        const uint32_t low = (p.words[0].x >> nibble & 0x0f0f0f0f) | (p.words[0].z >> pair & 0x03030303) << 4;
        const uint32_t high = (p.words[0].y >> nibble & 0x0f0f0f0f) | (p.words[0].w >> pair & 0x03030303) << 4;
        return scaled<32>(low, high, __hmul(half_of(p.head.x, 0), __short2half_rn(int8_t(p.head.y))));
      } else if constexpr (FORMAT == Q2_K) {
        const uint32_t low = p.words[0].x >> (2 * quarter) & 0x03030303, high = p.words[0].y >> (2 * quarter) & 0x03030303;
        const __half scale = __hmul(half_of(p.head.x, 0), __ushort2half_rn(p.head.y & 15));
        return scaled<0>(low, high, scale, __hneg(__hmul(half_of(p.head.x, 1), __ushort2half_rn(p.head.y >> 4))));
      } else {
        const int bit = 4 * half + quarter, group = i / 16;
        const uint32_t low = (p.words[0].x >> (2 * quarter) & 0x03030303) | (p.words[0].z >> bit & 0x01010101) << 2;
        const uint32_t high = (p.words[0].y >> (2 * quarter) & 0x03030303) | (p.words[0].w >> bit & 0x01010101) << 2;
        const uint32_t sc = (p.head.y >> (group / 8 * 4) & 0xf) | (p.head.z >> (group / 4 * 2) & 3) << 4;
        return scaled<4>(low, high, __hmul(half_of(p.head.x, 0), __short2half_rn(int(sc) - 32)));
      }
    }
  }
}

template <class T, int FORMAT> __device__ __forceinline__ uint4 fetch(const uint8_t* row, int k) {
  return unpacked<T, FORMAT>(load_packed<T, FORMAT>(row, k), k);
}

// A thread's eight elements of each of some consecutive steps of STEP columns: as many as share the bytes that they are in.
template <int FORMAT> struct Span {
  static constexpr int STEPS = 1;
  Packed<FORMAT> one;
};
template <> struct Span<Q4_K> {
  static constexpr int STEPS = 2;
  uint2 q;
  uint4 head;
};
template <> struct Span<Q5_K> {
  static constexpr int STEPS = 2;
  uint2 q, fifths;
  uint4 head;
};
template <> struct Span<Q6_K> {
  static constexpr int STEPS = 4;
  uint2 low[2], high, scales;
  uint32_t d;
};

// `k`: the first column of the first step.
template <class T, int FORMAT> __device__ __forceinline__ Span<FORMAT> load_span(const uint8_t* row, int k) {
  Span<FORMAT> p;
  if constexpr (FORMAT == Q4_K || FORMAT == Q5_K) {
    const int i = k % 256;
    constexpr int bytes = int(row_bytes<FORMAT>(256));
    const uint8_t* block = row + size_t(k / 256) * bytes;
    p.q = *reinterpret_cast<const uint2*>(block + bytes - 128 + i / 64 * 32 + i % 32);
    p.head = *reinterpret_cast<const uint4*>(block);
    if constexpr (FORMAT == Q5_K) p.fifths = *reinterpret_cast<const uint2*>(block + 16 + i % 32);
  } else if constexpr (FORMAT == Q6_K) {
    const int half = k % 256 / 128, at = k % 32;
    const uint8_t* block = row + size_t(k / 256) * 210;
    p.low[0] = load64_of_16(block + 64 * half + at);
    p.low[1] = load64_of_16(block + 64 * half + 32 + at);
    p.high = load64_of_16(block + 128 + 32 * half + at);
    p.scales = load64_of_16(block + 192 + 8 * half);
    p.d = load16(block + 208);
  } else {
    p.one = load_packed<T, FORMAT>(row, k);
  }
  return p;
}

// The elements of its step `s`; `k` as for `load_span`.
template <class T, int FORMAT> __device__ __forceinline__ uint4 unpacked(const Span<FORMAT>& p, int s, int column) {
  const int k = FORMAT > BF16 ? opaque(column) : column;
  if constexpr (FORMAT == Q4_K || FORMAT == Q5_K) {
    const int group = k % 256 / 32 + s;
    __half scale, min;
    scale_and_min(p.head, group, scale, min);
    uint32_t low = p.q.x >> (4 * s) & 0x0f0f0f0f, high = p.q.y >> (4 * s) & 0x0f0f0f0f;
    if constexpr (FORMAT == Q5_K) {
      low |= (p.fifths.x >> group & 0x01010101) << 4;
      high |= (p.fifths.y >> group & 0x01010101) << 4;
    }
    return scaled<0>(low, high, scale, min);
  } else if constexpr (FORMAT == Q6_K) {
    const uint2 q = p.low[s % 2];
    const int nibble = s / 2 * 4, pair = s * 2;
    const uint32_t low = (q.x >> nibble & 0x0f0f0f0f) | (p.high.x >> pair & 0x03030303) << 4;
    const uint32_t high = (q.y >> nibble & 0x0f0f0f0f) | (p.high.y >> pair & 0x03030303) << 4;
    const uint32_t scale = (s < 2 ? p.scales.x : p.scales.y) >> (s % 2 * 16 + k % 32 / 16 * 8);
    return scaled<32>(low, high, __hmul(half_of(p.d, 0), __short2half_rn(int8_t(scale & 0xff))));
  } else {
    return unpacked<T, FORMAT>(p.one, k);
  }
}
