// Holds the kernels against plain arithmetic and against each other, and times them: `scripts/gpu/kernels` runs it.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>
#include "stoker.cu"

#define CHECK(x)                                                                                   \
  do {                                                                                             \
    cudaError_t error = (x);                                                                       \
    if (error) printf("line %d: %s\n", __LINE__, cudaGetErrorString(error)), exit(1);              \
  } while (0)

static int failures = 0;
static void expect(bool right, const char* what, double value) {
  printf("%s %s (%g)\n", right ? "ok   " : "WRONG", what, value);
  failures += !right;
}

template <class T> struct Buffer {
  T* at;
  size_t n;
  explicit Buffer(size_t n) : n(n) { CHECK(cudaMalloc(&at, n * sizeof(T))); }
  ~Buffer() { cudaFree(at); }
  void set(const std::vector<T>& v) { CHECK(cudaMemcpy(at, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice)); }
  std::vector<T> get() const {
    std::vector<T> v(n);
    CHECK(cudaMemcpy(v.data(), at, n * sizeof(T), cudaMemcpyDeviceToHost));
    return v;
  }
};

__global__ void fill_kernel(f16* at, size_t n, uint32_t seed, float scale) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
    uint32_t h = uint32_t(i) * 2654435761u ^ seed;
    h ^= h >> 15, h *= 2246822519u, h ^= h >> 13, h *= 3266489917u, h ^= h >> 16;
    at[i] = __float2half((float(h) / 4294967296.f - 0.5f) * 2 * scale);
  }
}
static void fill(Buffer<f16>& b, uint32_t seed, float scale) { fill_kernel<<<1024, 256>>>(b.at, b.n, seed, scale); CHECK(cudaGetLastError()); }

// Launched as the engine does: early, behind the predecessor.
template <class P> static void launch(void (*kernel)(P), dim3 grid, int threads, size_t shared, const P& p) {
  if (shared > 48 << 10) CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = threads, config.dynamicSmemBytes = shared;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early, config.numAttrs = 1;
  CHECK(cudaLaunchKernelEx(&config, kernel, p));
}

static float milliseconds(const std::function<void()>& work, int times) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin), cudaEventCreate(&end);
  work();
  cudaEventRecord(begin);
  for (int i = 0; i < times; i++) work();
  cudaEventRecord(end);
  CHECK(cudaEventSynchronize(end));
  float ms;
  cudaEventElapsedTime(&ms, begin, end);
  return ms / times;
}

// Tiles that there is room for in divided products.
constexpr uint32_t TILES = 600;

enum Kind { FEW8, FEW32, DIVIDED, MANY };
typedef void (*Product)(Matmul);
// By kind, plain and paired.
struct Products {
  Product of[4][2];
};
#define PRODUCTS(NAME)                                                                                                         \
  Products{{{few8_##NAME, few8_pair_##NAME}, {few32_##NAME, few32_pair_##NAME}, {divided_##NAME, divided_pair_##NAME},         \
            {many_##NAME, many_pair_##NAME}}}

static void matmul(Kind kind, bool pair, const Matmul& p, uint32_t features, const Products& products = PRODUCTS(f16)) {
  const uint32_t out = pair ? 2 : 1;
  auto grid = [&](uint32_t rows) { return (features * out + rows - 1) / rows; };
  const Product of = products.of[kind][pair];
  if (kind == FEW8) launch(of, grid(pair ? 32 : 16), 256, 0, p);
  if (kind == FEW32) launch(of, grid(32), 256, 0, p);
  const dim3 tiles(grid(ROWS), (p.tokens + TOKENS - 1) / TOKENS, kind == DIVIDED ? SEGMENTS : 1);
  const size_t shared = STAGES * (ROWS + TOKENS) * 128;
  if (kind == DIVIDED && tiles.x * tiles.y > TILES) return;
  if (kind >= DIVIDED) launch(of, tiles, 256, shared, p);
}
static const char* names[] = {"few8", "few32", "divided", "many"};

static float* partials() {
  static Buffer<float> memory(size_t(TILES) * SEGMENTS * ROWS * TOKENS);
  return memory.at;
}
static uint32_t* arrived() {
  static Buffer<uint32_t> memory(TILES);
  static bool zeroed = (cudaMemset(memory.at, 0, TILES * 4), true);
  (void)zeroed;
  return memory.at;
}

static Matmul product(const Buffer<f16>& w, const Buffer<f16>* w2, const Buffer<f16>& x, void* out, uint32_t n, uint32_t k, uint32_t tokens, uint32_t mode) {
  Matmul p{};
  p.weight[0] = (const uint8_t*)w.at, p.weight[1] = w2 ? (const uint8_t*)w2->at : nullptr;
  p.end[0] = p.end[1] = p.end[2] = n;
  p.partials = partials(), p.arrived = arrived();
  p.x = x.at, p.out = out, p.tokens = tokens, p.k = k, p.stride = n, p.mode = mode;
  return p;
}

static void check_matmul(uint32_t n, uint32_t k, uint32_t tokens) {
  Buffer<f16> w(size_t(n) * k), w2(size_t(n) * k), x(size_t(tokens) * k);
  fill(w, 1, 0.05f), fill(w2, 2, 0.05f), fill(x, 3, 1.f);
  auto hw = w.get(), hw2 = w2.get(), hx = x.get();
  for (int pair = 0; pair < 2; pair++) {
    std::vector<std::vector<float>> results;
    for (Kind kind : {FEW8, FEW32, DIVIDED, MANY}) {
      const uint32_t some = kind == FEW8 ? std::min(tokens, 8u) : kind == FEW32 ? std::min(tokens, 32u) : tokens;
      std::vector<float> got;
      if (pair) {
        Buffer<f16> out(size_t(tokens) * n);
        CHECK(cudaMemset(out.at, 0, out.n * 2));
        matmul(kind, true, product(w, &w2, x, out.at, n, k, some, STORE), n);
        for (f16 v : out.get()) got.push_back(__half2float(v));
      } else {
        Buffer<float> out(size_t(tokens) * n);
        CHECK(cudaMemset(out.at, 0, out.n * 4));
        matmul(kind, false, product(w, nullptr, x, out.at, n, k, some, FLOAT), n);
        got = out.get();
      }
      got.resize(size_t(some) * n);
      results.push_back(got);
    }
    double worst = 0;
    for (size_t i = 0; i < results[3].size(); i += 1 + results[3].size() / 5000) {
      const uint32_t token = i / n, feature = i % n;
      double sum = 0, second = 0, size = 0;
      for (uint32_t j = 0; j < k; j++) {
        const double a = __half2float(hx[size_t(token) * k + j]);
        sum += a * __half2float(hw[size_t(feature) * k + j]), second += a * __half2float(hw2[size_t(feature) * k + j]);
        size += fabs(a * __half2float(hw[size_t(feature) * k + j]));
      }
      const double wanted = pair ? sum / (1 + exp(-sum)) * second : sum;
      worst = std::max(worst, fabs(wanted - results[3][i]) / (pair ? std::max(1.0, fabs(wanted)) : size));
    }
    char what[200];
    snprintf(what, sizeof what, "%s [%u, %u] x %u tokens against double", pair ? "pair" : "plain", n, k, tokens);
    expect(worst < (pair ? 2e-3 : 2e-6), what, worst);
    for (int kind = 0; kind < 3; kind++) {
      size_t differ = 0;
      for (size_t i = 0; i < results[kind].size(); i++) differ += memcmp(&results[kind][i], &results[3][i], 4) != 0;
      snprintf(what, sizeof what, "  %s has the bits of many", names[kind]);
      expect(differ == 0, what, double(differ));
    }
  }
}

static void time_matmul(const char* what, uint32_t n, uint32_t k, bool pair) {
  // Enough copies that no weight is in the cache from the last time.
  const int copies = std::max(1, int(1e9 / (double(n) * k * 2 * (pair ? 2 : 1))));
  Buffer<f16> w(size_t(n) * k * copies), w2(size_t(n) * k * copies), x(size_t(1024) * k), out(size_t(1024) * n * 2);
  fill(w, 1, 0.05f), fill(w2, 2, 0.05f), fill(x, 3, 1.f);
  const double bytes = double(n) * k * 2 * (pair ? 2 : 1);
  printf("%s [%u, %u]\n", what, n, k);
  for (uint32_t tokens : {1u, 8u, 32u, 64u, 128u, 256u, 512u, 1024u})
    for (Kind kind : {FEW8, FEW32, DIVIDED, MANY}) {
      if ((kind == FEW8 && tokens > 8) || (kind == FEW32 && (tokens > 32 || tokens == 1)) || (kind >= DIVIDED && tokens < 64)) continue;
      if (kind == DIVIDED && (n * (pair ? 2 : 1) + ROWS - 1) / ROWS * ((tokens + TOKENS - 1) / TOKENS) > TILES) continue;
      int i = 0;
      const float ms = milliseconds([&] {
        Matmul p = product(w, &w2, x, out.at, n, k, tokens, STORE);
        p.weight[0] = (const uint8_t*)(w.at + size_t(n) * k * (i % copies)), p.weight[1] = (const uint8_t*)(w2.at + size_t(n) * k * (i % copies));
        i++;
        matmul(kind, pair, p, n);
      }, 40);
      if (tokens <= 32) printf("  %4u tokens, %-7s %7.1f us %5.0f GB/s\n", tokens, names[kind], ms * 1e3, bytes / ms / 1e6);
      else printf("  %4u tokens, %-7s %7.1f us %5.0f Tflop/s\n", tokens, names[kind], ms * 1e3, bytes * tokens / ms / 1e9);
    }
}

// Quantised weights: random blocks with scales that are small numbers.
struct Quantised { const char* name; int format; uint32_t elements, bytes; std::vector<uint32_t> scales; Products products; };

// An element, as ggml defines it.
static double element_of(const Quantised& q, const uint8_t* row, uint32_t k) {
  const uint8_t* b = row + k / q.elements * q.bytes;
  auto half = [&](uint32_t at) { f16 h; memcpy(&h, b + at, 2); return double(__half2float(h)); };
  const uint32_t i = k % q.elements;
  auto nibble = [&](uint32_t at) { return int(b[at + i % 16] >> i / 16 * 4 & 15); };
  auto fifth = [&](uint32_t at) { uint32_t bits; memcpy(&bits, b + at, 4); return int(bits >> i & 1) << 4; };
  switch (q.format) {
    case Q8_0: return half(0) * int8_t(b[2 + i]);
    case Q4_0: return half(0) * (nibble(2) - 8);
    case Q4_1: return half(0) * nibble(4) + half(2);
    case Q5_0: return half(0) * ((nibble(6) | fifth(2)) - 16);
    case Q5_1: return half(0) * (nibble(8) | fifth(4)) + half(2);
  }
  const uint32_t upper = i / 128, quarter = i % 128 / 32, at = i % 32;
  if (q.format == Q4_K || q.format == Q5_K) {
    const uint32_t group = i / 32;
    const uint8_t* s = b + 4;
    const int scale = group < 4 ? s[group] & 63 : (s[group + 4] & 15) | s[group - 4] >> 6 << 4;
    const int min = group < 4 ? s[group + 4] & 63 : s[group + 4] >> 4 | s[group] >> 6 << 4;
    const int low = b[q.bytes - 128 + group / 2 * 32 + at] >> group % 2 * 4 & 15;
    const int high = q.format == Q5_K ? (b[16 + at] >> group & 1) << 4 : 0;
    return half(0) * scale * (low | high) - half(2) * min;
  }
  if (q.format == Q6_K) {
    const int low = b[64 * upper + quarter % 2 * 32 + at] >> quarter / 2 * 4 & 15, high = b[128 + 32 * upper + at] >> quarter * 2 & 3;
    return half(208) * int8_t(b[192 + i / 16]) * ((low | high << 4) - 32);
  }
  if (q.format == Q2_K) {
    const int two = b[16 + 32 * upper + at] >> 2 * quarter & 3;
    return half(80) * (b[i / 16] & 15) * two - half(82) * (b[i / 16] >> 4);
  }
  // Q3_K: a cleared third bit takes four away.
  const int two = b[32 + 32 * upper + at] >> 2 * quarter & 3, third = b[at] >> (4 * upper + quarter) & 1, group = i / 16;
  const int scale = (b[96 + group % 8] >> group / 8 * 4 & 15) | (b[104 + group % 4] >> group / 4 * 2 & 3) << 4;
  return half(108) * (scale - 32) * (two - (third ? 0 : 4));
}

static size_t fill_blocks(Buffer<uint8_t>& b, const Quantised& q) {
  std::vector<uint8_t> host(b.n);
  std::mt19937 random(7);
  for (size_t i = 0; i + 4 <= host.size(); i += 4) { const uint32_t r = random(); memcpy(&host[i], &r, 4); }
  for (size_t block = 0; block + q.bytes <= host.size(); block += q.bytes)
    for (uint32_t at : q.scales) {
      const f16 scale = __float2half(1e-3f * (1 + random() % 64));
      memcpy(&host[block + at], &scale, 2);
    }
  b.set(host);
  return host.size();
}

static void check_quantised(const Quantised& q, uint32_t n, uint32_t k, uint32_t tokens) {
  const size_t bytes = size_t(n) * k / q.elements * q.bytes;
  Buffer<uint8_t> w(bytes + 16);
  Buffer<f16> x(size_t(tokens) * k), none(1);
  fill_blocks(w, q), fill(x, 3, 1.f);
  for (int pair = 0; pair < 2; pair++) {
    std::vector<std::vector<uint8_t>> results;
    for (Kind kind : {FEW8, FEW32, DIVIDED, MANY}) {
      const uint32_t some = kind == FEW8 ? std::min(tokens, 8u) : kind == FEW32 ? std::min(tokens, 32u) : tokens;
      Buffer<uint8_t> out(size_t(tokens) * n * 4);
      CHECK(cudaMemset(out.at, 0, out.n));
      Matmul p = product(none, nullptr, x, out.at, n, k, some, pair ? STORE : FLOAT);
      p.weight[0] = p.weight[1] = w.at;
      matmul(kind, pair, p, n, q.products);
      CHECK(cudaDeviceSynchronize());
      results.push_back(out.get());
      results.back().resize(size_t(some) * n * (pair ? 2 : 4));
    }
    char what[200];
    for (int kind = 0; kind < 4 && !pair; kind++) {
      const auto hx = x.get();
      const auto hw = w.get();
      double worst = 0;
      for (size_t i = 0; i < results[kind].size() / 4; i += 1 + results[kind].size() / 4000) {
        double sum = 0, size = 0;
        for (uint32_t j = 0; j < k; j++) {
          const double term = element_of(q, &hw[i % n * (bytes / n)], j) * __half2float(hx[i / n * k + j]);
          sum += term, size += fabs(term);
        }
        float got;
        memcpy(&got, &results[kind][i * 4], 4);
        worst = std::max(worst, fabs(sum - got) / size);
      }
      snprintf(what, sizeof what, "%s [%u, %u] x %u tokens, %s against double", q.name, n, k, tokens, names[kind]);
      expect(worst < 3e-4, what, worst);
    }
    for (int kind = 0; kind < 3; kind++) {
      size_t differ = 0;
      for (size_t i = 0; i < results[kind].size(); i++) differ += results[kind][i] != results[3][i];
      snprintf(what, sizeof what, "%s %s: %s has the bits of many", q.name, pair ? "pair" : "plain", names[kind]);
      expect(differ == 0, what, double(differ));
    }
  }
}

static void time_quantised(const Quantised& q, const char* what, uint32_t n, uint32_t k, bool pair) {
  const size_t bytes = size_t(n) * k / q.elements * q.bytes;
  const int copies = std::max(1, int(4e8 / double(bytes)));
  Buffer<uint8_t> w(bytes * copies + 16);
  Buffer<f16> x(size_t(512) * k), out(size_t(512) * n * 2), none(1);
  fill_blocks(w, q), fill(x, 3, 1.f);
  for (uint32_t tokens : {1u, 8u, 32u, 512u})
    for (Kind kind : {FEW8, FEW32, MANY}) {
      if ((kind == FEW8 && tokens > 8) || (kind == FEW32 && (tokens > 32 || tokens <= 8)) || (kind == MANY && tokens < 64)) continue;
      int i = 0;
      const float ms = milliseconds([&] {
        Matmul p = product(none, nullptr, x, out.at, n, k, tokens, STORE);
        p.weight[0] = w.at + bytes * (i % copies), p.weight[1] = w.at + bytes * ((i + 1) % copies);
        i += pair ? 2 : 1;
        matmul(kind, pair, p, n, q.products);
      }, 40);
      const double read = double(bytes) * (pair ? 2 : 1), flop = 2.0 * n * k * tokens * (pair ? 2 : 1);
      printf("  %s %-8s [%u, %u] %4u tokens, %-7s %7.1f us %5.0f GB/s %5.0f Tflop/s\n", q.name, what, n, k, tokens, names[kind], ms * 1e3, read / ms / 1e6, flop / ms / 1e9);
    }
}

struct Case { uint32_t heads, kv_heads, start, tokens, window; };

// One sequence over a scattered table.
template <int HD> static void check_attention(const Case& c) {
  const uint32_t end = c.start + c.tokens, blocks = (end + 31) / 32, group = c.heads / c.kv_heads;
  const size_t layer = size_t(c.kv_heads) * 32 * HD;
  Buffer<f16> cache(layer * 2 * blocks * 2), query(size_t(c.tokens) * c.heads * HD);
  fill(cache, 5, 1.f), fill(query, 6, 1.f);
  std::vector<uint32_t> table(blocks);
  for (uint32_t i = 0; i < blocks; i++) table[i] = (i * 7 + 3) % (blocks * 2);
  for (uint32_t i = 0; i < blocks; i++)
    for (uint32_t j = 0; j < i; j++) if (table[i] == table[j]) table[i] = (table[i] + 1) % (blocks * 2), j = ~0u;
  Buffer<uint32_t> tables(blocks);
  tables.set(table);
  Attention p{};
  p.query = query.at, p.tables = tables.at, p.blocks = (uint8_t*)cache.at, p.block_bytes = layer * 2 * 2;
  p.keys = 0, p.values = layer * 2, p.group = group, p.kv_heads = c.kv_heads, p.query_stride = c.heads * HD, p.window = c.window;
  p.partial_rows = 16;
  p.scale = 1.4426950408889634f / sqrtf(HD);
  auto run = [&](int warps, bool split) {
    std::vector<Work> work;
    uint32_t places = 0;
    if (warps == 4) {
      for (uint32_t r = 0; r < c.tokens * group; r += 64) work.push_back({r, std::min(64u, c.tokens * group - r), 0, c.start, 0, 0, 1, 0});
    } else {
      for (uint32_t r = 0; r < c.tokens * group; r += 16) {
        const uint32_t rows = std::min(16u, c.tokens * group - r), last = c.start + (r + rows - 1) / group + 1;
        const uint32_t splits = split ? (last + SPLIT - 1) / SPLIT : 1;
        for (uint32_t s = 0; s < splits; s++) work.push_back({r, rows, 0, c.start, 0, s, splits, places});
        if (splits > 1) places += splits;
      }
    }
    Buffer<Work> items(work.size());
    items.set(work);
    Buffer<f16> out(size_t(c.tokens) * c.heads * HD);
    Buffer<float> partials(std::max(places, 1u) * size_t(c.kv_heads) * 16 * (HD + 2));
    Buffer<uint32_t> arrived(std::max(places, 1u) * size_t(c.kv_heads));
    CHECK(cudaMemset(arrived.at, 0, arrived.n * 4));
    CHECK(cudaMemset(out.at, 0xff, out.n * 2));
    Attention q = p;
    q.out = out.at, q.work = items.at, q.partials = partials.at, q.arrived = arrived.at;
    void (*kernel)(Attention) = HD == 128 ? (warps == 4 ? attention4_f16_128 : attention1_f16_128) : HD == 96 ? (warps == 4 ? attention4_f16_96 : attention1_f16_96) : (warps == 4 ? attention4_f16_64 : attention1_f16_64);
    const size_t shared = size_t(warps == 1 ? 4 : 2) * 2 * 32 * HD * 2;
    launch(kernel, dim3(work.size(), c.kv_heads), warps * 32, shared, q);
    CHECK(cudaDeviceSynchronize());
    for (uint32_t v : arrived.get()) if (v) expect(false, "counters are back", v);
    return out.get();
  };
  const auto whole = run(4, false), one = run(1, false), split = run(1, true);
  const auto hq = query.get();
  const auto kv = cache.get();
  double worst = 0;
  for (uint32_t token = 0; token < c.tokens; token += 1 + c.tokens / 5)
    for (uint32_t head = 0; head < c.heads; head++) {
      const uint32_t position = c.start + token, kv_head = head / group;
      auto at = [&](uint32_t i, int d, bool value) { return double(__half2float(kv[size_t(table[i / 32]) * layer * 2 + (value ? layer : 0) + (size_t(kv_head) * 32 + i % 32) * HD + d])); };
      std::vector<double> s;
      const uint32_t from = c.window && position + 1 > c.window ? position + 1 - c.window : 0;
      double largest = -1e30, sum = 0;
      for (uint32_t i = from; i <= position; i++) {
        double dot = 0;
        for (int d = 0; d < HD; d++) dot += at(i, d, false) * __half2float(hq[(size_t(token) * c.heads + head) * HD + d]);
        s.push_back(dot / sqrt(HD)), largest = std::max(largest, s.back());
      }
      for (double& v : s) v = exp(v - largest), sum += v;
      for (int d = 0; d < HD; d += 3) {
        double o = 0;
        for (uint32_t i = from; i <= position; i++) o += s[i - from] / sum * at(i, d, true);
        worst = std::max(worst, fabs(o - __half2float(whole[(size_t(token) * c.heads + head) * HD + d])));
      }
    }
  char what[200];
  snprintf(what, sizeof what, "attention of %d, %u/%u heads, %u tokens from %u, window %u, against double", HD, c.heads, c.kv_heads, c.tokens, c.start, c.window);
  expect(worst < 2e-3, what, worst);
  expect(!memcmp(whole.data(), one.data(), whole.size() * 2), "  a warp alone has the same bits", 0);
  expect(!memcmp(whole.data(), split.data(), whole.size() * 2), "  split has the same bits", 0);
}

int main(int argc, char** argv) {
  check_matmul(192, 576, 5);
  check_matmul(272, 96, 33);
  check_matmul(1000, 1536, 130);
  check_matmul(4096, 4096, 128);
  check_matmul(512, 11008, 40);
  check_attention<64>({9, 3, 0, 40, 0});
  check_attention<128>({8, 8, 0, 300, 0});
  check_attention<128>({32, 8, 1000, 1, 0});
  check_attention<128>({8, 1, 515, 70, 0});
  check_attention<64>({4, 2, 700, 33, 200});
  check_attention<96>({4, 4, 100, 50, 0});
  const std::vector<Quantised> quantised = {
      {"q4_k", Q4_K, 256, 144, {0, 2}, PRODUCTS(q4_k)}, {"q6_k", Q6_K, 256, 210, {208}, PRODUCTS(q6_k)},
      {"q8_0", Q8_0, 32, 34, {0}, PRODUCTS(q8_0)},      {"q5_k", Q5_K, 256, 176, {0, 2}, PRODUCTS(q5_k)},
      {"q2_k", Q2_K, 256, 84, {80, 82}, PRODUCTS(q2_k)}, {"q3_k", Q3_K, 256, 110, {108}, PRODUCTS(q3_k)},
      {"q4_0", Q4_0, 32, 18, {0}, PRODUCTS(q4_0)},      {"q4_1", Q4_1, 32, 20, {0, 2}, PRODUCTS(q4_1)},
      {"q5_0", Q5_0, 32, 22, {0}, PRODUCTS(q5_0)},      {"q5_1", Q5_1, 32, 24, {0, 2}, PRODUCTS(q5_1)}};
  for (const auto& q : quantised) check_quantised(q, 272, 1536, 70), check_quantised(q, 64, 256, 5);
  if (argc > 1) return failures > 0;
  // An 8B model's.
  for (size_t i = 0; i < 3; i++) {
    const Quantised& q = quantised[i];
    time_quantised(q, "qkv", 6144, 4096, false);
    time_quantised(q, "out", 4096, 4096, false);
    time_quantised(q, "gate,up", 14336, 4096, true);
    time_quantised(q, "down", 4096, 14336, false);
  }
  time_matmul("qkv", 12288, 4096, false);
  time_matmul("out", 4096, 4096, false);
  time_matmul("gate,up", 11008, 4096, true);
  time_matmul("down", 4096, 11008, false);
  time_matmul("head", 32000, 4096, false);
  printf("%s\n", failures ? "FAILED" : "all right");
  return failures > 0;
}
