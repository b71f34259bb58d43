// Holds the kernels against plain arithmetic and against each other, and times them: `scripts/gpu/kernels` runs it.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>
#define STOKER_FLOATS_ONLY
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
static void matmul(Kind kind, bool pair, const Matmul& p, uint32_t features) {
  const uint32_t out = pair ? 2 : 1;
  auto grid = [&](uint32_t rows) { return (features * out + rows - 1) / rows; };
  if (kind == FEW8) launch(pair ? few8_pair_f16 : few8_f16, grid(pair ? 32 : 16), 256, 0, p);
  if (kind == FEW32) launch(pair ? few32_pair_f16 : few32_f16, grid(32), 256, 0, p);
  const dim3 tiles(grid(ROWS), (p.tokens + TOKENS - 1) / TOKENS, kind == DIVIDED ? SEGMENTS : 1);
  const size_t shared = STAGES * (ROWS + TOKENS) * 128;
  if (kind == DIVIDED && tiles.x * tiles.y > TILES) return;
  if (kind == DIVIDED) launch(pair ? divided_pair_f16 : divided_f16, tiles, 256, shared, p);
  if (kind == MANY) launch(pair ? many_pair_f16 : many_f16, tiles, 256, shared, p);
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
  if (argc > 1) return failures > 0;
  time_matmul("qkv", 12288, 4096, false);
  time_matmul("out", 4096, 4096, false);
  time_matmul("gate,up", 11008, 4096, true);
  time_matmul("down", 4096, 11008, false);
  time_matmul("head", 32000, 4096, false);
  printf("%s\n", failures ? "FAILED" : "all right");
  return failures > 0;
}
