// Eight consecutive elements of a row of weights, as the tensor cores want them. Layouts: ggml's `ggml-common.h` and
// `ggml-quants.c`. `k` is a multiple of 8.
#pragma once
#include "common.cuh"

__device__ __forceinline__ uint32_t load16(const uint8_t* at) { return *reinterpret_cast<const uint16_t*>(at); }
__device__ __forceinline__ float load_f16(const uint8_t* at) { return __half2float(__ushort_as_half(load16(at))); }
// Blocks are only as aligned as their length.
__device__ __forceinline__ uint32_t load32_of_16(const uint8_t* at) { return load16(at) | load16(at + 2) << 16; }
__device__ __forceinline__ uint32_t load32(const uint8_t* at) { return *reinterpret_cast<const uint32_t*>(at); }

// scale * q + min for the four bytes of a word, twice.
template <class T>
__device__ __forceinline__ uint4 scaled(uint32_t low, uint32_t high, float scale, float min) {
  auto one = [&](uint32_t word, int byte) { return fmaf(scale, float(word >> (8 * byte) & 0xff), min); };
  return {pack<T>(one(low, 0), one(low, 1)), pack<T>(one(low, 2), one(low, 3)), pack<T>(one(high, 0), one(high, 1)),
          pack<T>(one(high, 2), one(high, 3))};
}

// Four bits, one each into bit 4 of the four bytes.
__device__ __forceinline__ uint32_t fifth_bits(uint32_t bits) {
  const uint32_t four = bits & 0xf;
  const uint32_t two = four | four << 14;
  return ((two | two << 7) & 0x01010101) << 4;
}

// Six-bit scale and min of a group of Q4_K or Q5_K, from the 12 bytes.
__device__ __forceinline__ void scale_and_min(const uint8_t* at, int group, float& scale, float& min) {
  const float d = load_f16(at), dmin = load_f16(at + 2);
  const uint8_t* s = at + 4;
  uint32_t sc, m;
  if (group < 4) {
    sc = s[group] & 63;
    m = s[group + 4] & 63;
  } else {
    sc = (s[group + 4] & 0xf) | (s[group - 4] >> 6) << 4;
    m = (s[group + 4] >> 4) | (s[group] >> 6) << 4;
  }
  scale = d * float(sc);
  min = -dmin * float(m);
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

template <class T, int FORMAT> __device__ __forceinline__ uint4 fetch(const uint8_t* row, int k) {
  constexpr bool bits16 = (FORMAT == F16 && sizeof(T) == 2) || FORMAT == BF16;
  if constexpr (FORMAT == F32) {
    const float4 a = *reinterpret_cast<const float4*>(row + size_t(k) * 4);
    const float4 b = *reinterpret_cast<const float4*>(row + size_t(k) * 4 + 16);
    return {pack<T>(a.x, a.y), pack<T>(a.z, a.w), pack<T>(b.x, b.y), pack<T>(b.z, b.w)};
  } else if constexpr (bits16) {
    // The type of the weights is the type of the activations: see `compute_type`.
    return load_streaming(row + size_t(k) * 2);
  } else if constexpr (FORMAT == Q4_0 || FORMAT == Q4_1 || FORMAT == Q5_0 || FORMAT == Q5_1) {
    constexpr int bytes = int(row_bytes<FORMAT>(32));
    const uint8_t* block = row + size_t(k / 32) * bytes;
    const int i = k % 32;
    const uint8_t* q = block + bytes - 16 + i % 16;
    uint32_t low, high;
    if constexpr (FORMAT == Q4_1 || FORMAT == Q5_1) {
      low = load32(q), high = load32(q + 4);
    } else {
      low = load32_of_16(q), high = load32_of_16(q + 4);
    }
    const int shift = i / 16 * 4;
    low = low >> shift & 0x0f0f0f0f, high = high >> shift & 0x0f0f0f0f;
    if constexpr (FORMAT == Q5_0 || FORMAT == Q5_1) {
      const uint32_t fifths = (FORMAT == Q5_1 ? load32(block + 4) : load32_of_16(block + 2)) >> i;
      low |= fifth_bits(fifths), high |= fifth_bits(fifths >> 4);
    }
    const float d = load_f16(block);
    const float min = FORMAT == Q4_0 ? -8 * d : FORMAT == Q5_0 ? -16 * d : load_f16(block + 2);
    return scaled<T>(low, high, d, min);
  } else if constexpr (FORMAT == Q8_0) {
    const uint8_t* block = row + size_t(k / 32) * 34;
    const float d = load_f16(block);
    const uint8_t* q = block + 2 + k % 32;
    // Signed, moved up by 128.
    return scaled<T>(load32_of_16(q) ^ 0x80808080, load32_of_16(q + 4) ^ 0x80808080, d, -128 * d);
  } else {
    const int i = k % 256;
    constexpr int bytes = int(row_bytes<FORMAT>(256));
    const uint8_t* block = row + size_t(k / 256) * bytes;
    if constexpr (FORMAT == Q4_K || FORMAT == Q5_K) {
      const int group = i / 32, at = i % 32;
      float scale, min;
      scale_and_min(block, group, scale, min);
      const uint8_t* q = block + bytes - 128 + group / 2 * 32 + at;
      const int shift = group % 2 * 4;
      uint32_t low = load32(q) >> shift & 0x0f0f0f0f, high = load32(q + 4) >> shift & 0x0f0f0f0f;
      if constexpr (FORMAT == Q5_K) {
        low |= (load32(block + 16 + at) >> group & 0x01010101) << 4;
        high |= (load32(block + 16 + at + 4) >> group & 0x01010101) << 4;
      }
      return scaled<T>(low, high, scale, min);
    } else {
      const int half = i / 128, quarter = i % 128 / 32, at = i % 32;
      if constexpr (FORMAT == Q6_K) {
        const uint8_t* ql = block + 64 * half + quarter % 2 * 32 + at;
        const uint8_t* qh = block + 128 + 32 * half + at;
        const int nibble = quarter / 2 * 4, pair = quarter * 2;
        const uint32_t low = (load32_of_16(ql) >> nibble & 0x0f0f0f0f) | (load32_of_16(qh) >> pair & 0x03030303) << 4;
        const uint32_t high =
            (load32_of_16(ql + 4) >> nibble & 0x0f0f0f0f) | (load32_of_16(qh + 4) >> pair & 0x03030303) << 4;
        const float scale = load_f16(block + 208) * float(int8_t(block[192 + i / 16]));
        return scaled<T>(low, high, scale, -32 * scale);
      } else if constexpr (FORMAT == Q2_K) {
        const uint8_t* q = block + 16 + 32 * half + at;
        const uint32_t sc = block[i / 16];
        const uint32_t low = load32(q) >> (2 * quarter) & 0x03030303, high = load32(q + 4) >> (2 * quarter) & 0x03030303;
        return scaled<T>(low, high, load_f16(block + 80) * float(sc & 15), -load_f16(block + 82) * float(sc >> 4));
      } else {
        static_assert(FORMAT == Q3_K, "");
        const uint8_t* q = block + 32 + 32 * half + at;
        const uint8_t* third = block + at;
        const int bit = 4 * half + quarter;
        const uint32_t low =
            (load32_of_16(q) >> (2 * quarter) & 0x03030303) | (load32_of_16(third) >> bit & 0x01010101) << 2;
        const uint32_t high =
            (load32_of_16(q + 4) >> (2 * quarter) & 0x03030303) | (load32_of_16(third + 4) >> bit & 0x01010101) << 2;
        // Sixteen 6-bit scales: nibbles of the first 8 bytes, upper pairs from the last 4.
        const int group = i / 16;
        const uint8_t* s = block + 96;
        const uint32_t sc = (s[group % 8] >> (group / 8 * 4) & 0xf) | (s[8 + group % 4] >> (group / 4 * 2) & 3) << 4;
        const float scale = load_f16(block + 108) * float(int(sc) - 32);
        return scaled<T>(low, high, scale, -4 * scale);
      }
    }
  }
}
