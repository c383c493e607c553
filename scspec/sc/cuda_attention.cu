// Integer parts of causal SC attention over the stores of `triton_kv`: query-key products, and P @ V over the list
// of positions that have ones. The floats in between (softmax, the codes of P) are Triton's, for both backends.
//
// A row is a head of a new token: row = (sequence * steps + step) * heads + head. What a look-up needs is a line of 128
// counts; a block copies its lines to shared memory, all at once, since each copy from the L2 cache is a long wait.

#include "cuda_common.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int WORDS = 16;          // of a key that are on their way at a time, four codes each
constexpr int POSITIONS = 8;       // that a warp mixes at a time
constexpr int ONES_BITS = 9;       // an entry of the list: position, then K in the low bits
constexpr u32 ALL = 0xffffffffu;

// The sequence and KV head that a row reads.
__device__ __forceinline__ size_t slot_of(int row, int steps, int heads, int shared) {
  return size_t(row / heads / steps) * (heads / shared) + row % heads / shared;
}

template <int J, class COUNT> __device__ __forceinline__ int signed_count(const COUNT* line, u32 codes, u32 signs) {
  return int(line[unsigned_byte<J>(codes)]) * int(signed_byte<J>(signs));
}

template <class COUNT> __device__ __forceinline__ void fetch_line_part(uint4& to, const COUNT* counts, size_t line, int part) {
  to = __ldg(reinterpret_cast<const uint4*>(counts + line * CODES) + part);
}

template <class T, class COUNT>
__device__ void score(const T* query, const u32* k_words, const float* k_scale, const int* start, const short* ones,
                      const COUNT* counts, float* scores, int steps, int capacity, int words, int heads, int shared,
                      int head_dim, int stride, float max_code, float factor, float scaling) {
  constexpr int PARTS = CODES * sizeof(COUNT) / 16;  // 16-byte parts of a line
  extern __shared__ __align__(16) char memory[];     // lines, where they come from, signs of the query
  COUNT* lines = reinterpret_cast<COUNT*>(memory);
  int* line_of = reinterpret_cast<int*>(lines + size_t(words) * 4 * CODES);
  u32* negative = reinterpret_cast<u32*>(line_of + words * 4);
  __shared__ int peaks[WARPS];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int begin = blockIdx.y * THREADS;
  int row = blockIdx.x, visible = start[row / heads / steps] + row / heads % steps + 1;
  if (begin >= visible) return;
  size_t slot = slot_of(row, steps, heads, shared);
  query += size_t(row) * head_dim;
  int key = begin + threadIdx.x;
  const u32* mine = k_words + slot * words * capacity + min(key, visible - 1);
  u32 next[WORDS];
  auto fetch = [&](int first) {
#pragma unroll
    for (int u = 0; u < WORDS; u++) next[u] = first + u < words ? __ldg(mine + size_t(first + u) * capacity) : 0;
  };
  fetch(0);  // on its way while the query is encoded

  int peak = 0;
  for (int d = threadIdx.x; d < head_dim; d += THREADS) peak = max(peak, magnitude_bits(to_float(query[d])));
  peak = __reduce_max_sync(ALL, peak);
  if (lane == 0) peaks[warp] = peak;
  for (int w = threadIdx.x; w < words; w += THREADS) negative[w] = 0;
  __syncthreads();
  peak = __reduce_max_sync(ALL, peaks[lane % WARPS]);
  float scale = row_scale(peak, max_code);
  for (int d = threadIdx.x; d < words * 4; d += THREADS) {
    int code = d < head_dim ? clipped_code(to_float(query[d]), scale, max_code) : 0;
    line_of[d] = d % DIMS * stride + ones[d % DIMS * CODES + abs(code)];
    if (code < 0) atomicOr(negative + d / 4, 0x80u << d % 4 * 8);
  }
  __syncthreads();
#pragma unroll 4
  for (int i = threadIdx.x; i < words * 4 * PARTS; i += THREADS)
    fetch_line_part(reinterpret_cast<uint4*>(lines)[i], counts, line_of[i / PARTS], i % PARTS);
  __syncthreads();

  int sum = 0;
  for (int first = 0; first < words; first += WORDS) {
    u32 now[WORDS];
#pragma unroll
    for (int u = 0; u < WORDS; u++) now[u] = next[u];
    if (first + WORDS < words) fetch(first + WORDS);
#pragma unroll
    for (int u = 0; u < WORDS; u++) {
      if (first + u >= words) break;
      u32 word = now[u] ^ negative[first + u];
      u32 codes = word & 0x7f7f7f7fu, signs = sign_bytes(word);
      const COUNT* line = lines + (first + u) * 4 * CODES;
      sum += signed_count<0>(line, codes, signs) + signed_count<1>(line + CODES, codes, signs) +
             signed_count<2>(line + 2 * CODES, codes, signs) + signed_count<3>(line + 3 * CODES, codes, signs);
    }
  }
  if (key < visible) {
    float value = __fmul_rn(__fmul_rn(scale, k_scale[slot * capacity + key]), float(sum));
    scores[size_t(row) * capacity + key] = __fmul_rn(__fmul_rn(value, factor), scaling);
  }
}

// width: lanes that share a position, a power of two; a block mixes 128 channels, blockIdx.y says which.
template <class T, class COUNT>
__device__ void mix(const int* entries, const int* active_of, const float* scale_of, const u32* v_words,
                    const COUNT* counts, T* out, int steps, int capacity, int words, int heads, int shared, int head_dim,
                    int stride, int width, float factor) {
  constexpr int PARTS = CODES * sizeof(COUNT) / 16, TURNS = POSITIONS * PARTS / 32;
  __shared__ __align__(16) COUNT lines[WARPS][POSITIONS * CODES];
  __shared__ int total[128];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, beside = 32 / width, lane_p = lane / width;
  int word_at = blockIdx.y * 32 + lane % width;
  int row = blockIdx.x, active = active_of[row];
  entries += size_t(row) * capacity;
  v_words += slot_of(row, steps, heads, shared) * capacity * words;
  if (threadIdx.x < 128) total[threadIdx.x] = 0;
  __syncthreads();

  uint4 parts[TURNS];
  u32 next[POSITIONS];
  auto fetch = [&](int first) {  // beyond the list: position 0 with K = 0, which counts nothing
    int entry = lane < POSITIONS && first + lane < active ? entries[first + lane] : 0;
    int position = entry >> ONES_BITS, line = position % DIMS * stride + (entry & ((1 << ONES_BITS) - 1));
#pragma unroll
    for (int i = 0; i < TURNS; i++)
      fetch_line_part(parts[i], counts, __shfl_sync(ALL, line, (i * 32 + lane) / PARTS), lane % PARTS);
#pragma unroll
    for (int i = 0; i < POSITIONS; i++) {
      if (i * beside >= POSITIONS) break;
      int of = __shfl_sync(ALL, position, (i * beside + lane_p) % POSITIONS);
      next[i] = word_at < words ? __ldg(v_words + size_t(of) * words + word_at) : 0;
    }
  };
  int sum[4] = {0, 0, 0, 0}, first = warp * POSITIONS;
  if (first < active) fetch(first);
  for (; first < active; first += WARPS * POSITIONS) {
    u32 now[POSITIONS];
#pragma unroll
    for (int i = 0; i < TURNS; i++) reinterpret_cast<uint4*>(lines[warp])[i * 32 + lane] = parts[i];
#pragma unroll
    for (int i = 0; i < POSITIONS; i++) now[i] = next[i];
    __syncwarp();
    if (first + WARPS * POSITIONS < active) fetch(first + WARPS * POSITIONS);
#pragma unroll
    for (int i = 0; i < POSITIONS; i++) {
      int at = i * beside + lane_p;
      if (i * beside >= POSITIONS) break;
      u32 codes = now[i] & 0x7f7f7f7fu, signs = sign_bytes(now[i]);
      const COUNT* line = lines[warp] + at % POSITIONS * CODES;
      if (at >= POSITIONS) continue;
      sum[0] += signed_count<0>(line, codes, signs);
      sum[1] += signed_count<1>(line, codes, signs);
      sum[2] += signed_count<2>(line, codes, signs);
      sum[3] += signed_count<3>(line, codes, signs);
    }
    __syncwarp();
  }
#pragma unroll
  for (int j = 0; j < 4; j++) atomicAdd(total + lane % width * 4 + j, sum[j]);
  __syncthreads();
  int channel = blockIdx.y * 128 + threadIdx.x;
  if (threadIdx.x < 128 && channel < head_dim) {
    float value = __fmul_rn(__fmul_rn(scale_of[row], float(total[threadIdx.x])), factor);
    store_rounded(out + size_t(row) * head_dim + channel, value);
  }
}

#define KERNELS(T, COUNT, SUFFIX)                                                                                        \
  extern "C" __global__ __launch_bounds__(THREADS) void score_##SUFFIX(                                                  \
      const T* query, const u32* k_words, const float* k_scale, const int* start, const short* ones, const COUNT* counts, \
      float* scores, int steps, int capacity, int words, int heads, int shared, int head_dim, int stride,                \
      float max_code, float factor, float scaling) {                                                                     \
    score(query, k_words, k_scale, start, ones, counts, scores, steps, capacity, words, heads, shared, head_dim, stride, \
          max_code, factor, scaling);                                                                                    \
  }                                                                                                                      \
  extern "C" __global__ __launch_bounds__(THREADS) void mix_##SUFFIX(                                                    \
      const int* entries, const int* active_of, const float* scale_of, const u32* v_words,                               \
      const COUNT* counts, T* out, int steps, int capacity, int words, int heads, int shared, int head_dim, int stride,  \
      int width, float factor) {                                                                                         \
    mix(entries, active_of, scale_of, v_words, counts, out, steps, capacity, words, heads, shared, head_dim,      \
        stride, width, factor);                                                                                          \
  }

KERNELS(float, u8, float32)
KERNELS(Float16, u8, float16)
KERNELS(BFloat16, u8, bfloat16)
KERNELS(float, short, long_float32)
KERNELS(Float16, short, long_float16)
KERNELS(BFloat16, short, long_bfloat16)
