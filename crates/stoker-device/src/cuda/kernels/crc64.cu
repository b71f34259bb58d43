// CRC-64/NVME of device memory, without initial value and final inversion: what is left when the bytes, as a polynomial times
// x^64, are divided by the CRC's polynomial. Coefficients are reflected, as in the table-driven CRC.
//
// Words lie in rows of 256. Thread t sums the words of column t (Horner's rule in x^(64 * 256), by eight tables of 256
// entries), so that neighbouring threads read neighbouring words; then its sum is moved to its column's place by one
// multiplication, and a block adds up its threads' sums. Block b does rows [b * rows_per_block, ...).
//
// Compile: see `regenerate` beside this file.

typedef unsigned long long u64;

#define COLUMNS 256
#define POLYNOMIAL 0x9a6c9329ac4bc9b5ULL

__device__ u64 multiply(u64 a, u64 b) {
    u64 product = 0;
    for (int i = 63; i >= 0; i--) {
        product ^= b & (0 - ((a >> i) & 1));
        b = (b >> 1) ^ (POLYNOMIAL & (0 - (b & 1)));
    }
    return product;
}

// tables: 8 x 256: byte i of a word times x^(64 * 256). columns: x^(64 * (256 - t)).
extern "C" __global__ void __launch_bounds__(COLUMNS)
stoker_crc64(const u64 *words, u64 rows, u64 rows_per_block, const u64 *tables, const u64 *columns, u64 *sums) {
    __shared__ u64 table[8 * 256];
    __shared__ u64 partial[COLUMNS];
    unsigned t = threadIdx.x;
    for (int i = 0; i < 8; i++) table[i * 256 + t] = tables[i * 256 + t];
    __syncthreads();
    u64 row = blockIdx.x * rows_per_block;
    u64 end = row + rows_per_block < rows ? row + rows_per_block : rows;
    u64 sum = 0;
    const u64 *at = words + row * COLUMNS + t;
#pragma unroll 4
    for (; row < end; row++, at += COLUMNS) {
        u64 word = *at;
        u64 moved = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) moved ^= table[i * 256 + ((sum >> (8 * i)) & 255)];
        sum = moved ^ word;
    }
    partial[t] = multiply(columns[t], sum);
    for (unsigned half = COLUMNS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (t < half) partial[t] ^= partial[t + half];
    }
    if (t == 0) sums[blockIdx.x] = partial[0];
}
