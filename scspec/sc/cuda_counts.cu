// Signed SC counts of a few rows with a packed weight: for every row n, segment s of dimensions and output m,
//   sums[s, n, m] = sum over d in s of sign_a sign_b C[d, K[n, d], |code_b[m, d]|],   integers, exact.
//
// A block owns a contiguous span of warp tiles (32 outputs x one segment). Per segment it quantises the rows itself, then
// builds in shared memory, for each dimension, the table of what every weight code contributes: ROWS rows packed per
// entry in WORDS 32-bit words, two 16-bit fields a word, summed as plain integers (|sum| <= 128 * 128 or 64 * 256, under
// 2**15; sign extension of the low field recovers both). Look-ups never conflict: the line of 128 bytes of an entry
// holds it for the LANES_D dimensions that a group of lanes works on, each in banks of its own. A lane sums its DIMS
// dimensions for U outputs; then the lanes of a group exchange halves until each holds the total of one output.
//
// Layouts (C order). weight: uint8 (runs of 64 dimensions, m_pad, 64), sign bit 7 | magnitude; m_pad is a multiple of 32,
// padding has code 0, which counts nothing. x: (rows, depth). ones: int16 (256, 128), K of [dimension][code].
// counts: (256, stoc_len + 1, 128). sums: int16 (segments, rows, m_pad); a segment is a run of 64 dimensions where 8 rows
// are packed, else a chunk of 128. scale_a: float (rows, chunks).

#include "cuda_common.cuh"

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr int CHUNK = 128;
constexpr int LINE = 128;
constexpr int TABLE_BYTES = 128 * 1024;  // after them come STAGE_BYTES, set by the host

template <int WORDS> struct Shape {
  static constexpr int ROWS = 2 * WORDS;
  static constexpr int LANES_D = 32 / WORDS;       // lanes that share an output, each with dimensions of its own
  static constexpr int DIMS = WORDS == 1 ? 4 : 8;  // dimensions of a lane
  static constexpr int SEGMENT = LANES_D * DIMS;   // dimensions of a segment
  static constexpr bool SIGNED = WORDS == 1;       // the table holds the negative codes too
  static constexpr int ENTRIES = SIGNED ? 256 : 128;
  static constexpr int U = LANES_D;                // outputs of a lane
  static_assert(DIMS * ENTRIES * LINE == TABLE_BYTES, "the table fills its room");
};

template <int WORDS> struct Words { u32 at[WORDS]; };
template <> struct __align__(8) Words<2> { u32 at[2]; };
template <> struct __align__(16) Words<4> { u32 at[4]; };

__device__ __forceinline__ void load_once(const u8* at, Words<1>& out) {
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(out.at[0]) : "l"(at));
}
__device__ __forceinline__ void load_once(const u8* at, Words<2>& out) {
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(out.at[0]), "=r"(out.at[1]) : "l"(at));
}

template <int WORDS, class T>
__device__ void encode(const T* x, const short* ones_of, short (&ones)[2 * WORDS][CHUNK], float* scale_a, int first_row,
                       int rows, int depth, int chunk, int chunks, float max_code, bool write_scale) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp >= 2 * WORDS) return;
  int row = first_row + warp;
  float v[4];
  int peak = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int d = chunk * CHUNK + i * 32 + lane;
    v[i] = row < rows && d < depth ? to_float(x[size_t(row) * depth + d]) : 0.0f;
    peak = max(peak, magnitude_bits(v[i]));
  }
  float scale = row_scale(__reduce_max_sync(0xffffffffu, peak), max_code);
  if (write_scale && lane == 0 && row < rows) scale_a[size_t(row) * chunks + chunk] = scale;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int dim = i * 32 + lane, code = clipped_code(v[i], scale, max_code), k = ones_of[dim * CODES + abs(code)];
    ones[warp][dim] = short(row < rows ? (code < 0 ? -k : k) : 0);
  }
}

__device__ __forceinline__ void copy_16(char* to, const char* from) {  // to shared memory, past the registers
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(u32(__cvta_generic_to_shared(to))), "l"(from));
}

// Fills the table of a segment. The lines of counts are copied to `stage` first, all at once, as much of each as fits;
// then a thread turns 16 bytes of the lines of one dimension into entries. Blocks of 16 bytes lie swizzled in a line, so
// that eight lanes, who read the same block of neighbouring lines, meet in no bank.
template <int WORDS, class COUNT, class THEN>
__device__ void build(char* tables, char* stage, const short (&ones)[2 * WORDS][CHUNK], const COUNT* counts_of, int stride,
                      int half, THEN when_copied) {
  using S = Shape<WORDS>;
  constexpr int LINES = S::SEGMENT * S::ROWS, PART = STAGE_BYTES / LINES < LINE ? STAGE_BYTES / LINES : LINE;
  constexpr int BLOCKS = PART / 16, BITS = 8 * sizeof(COUNT), PER = 32 / BITS, WIDTH = 4 * PER;
  auto staged = [&](int line, int block) { return stage + line * PART + (block ^ line / (LINE / PART) % BLOCKS) * 16; };
  for (int begin = 0; begin < CODES * int(sizeof(COUNT)); begin += PART) {
    if (begin) __syncthreads();  // the part before has been read
#pragma unroll
    for (int item = threadIdx.x; item < LINES * BLOCKS; item += THREADS) {
      int line = item / BLOCKS, block = item % BLOCKS, row = line / S::SEGMENT, place = line % S::SEGMENT;
      int dim = half * S::SEGMENT + place % S::LANES_D * S::DIMS + place / S::LANES_D;
      const COUNT* from = counts_of + (size_t(dim) * stride + abs(ones[row][dim])) * CODES;
      copy_16(staged(line, block), reinterpret_cast<const char*>(from) + begin + block * 16);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    if (begin == 0) when_copied();
    for (int item = threadIdx.x; item < S::SEGMENT * BLOCKS; item += THREADS) {
      int lane = item % S::LANES_D, block = item / S::LANES_D % BLOCKS, i = item / (S::LANES_D * BLOCKS);
      int dim = half * S::SEGMENT + lane * S::DIMS + i;
      int sign[S::ROWS];
      u32 raw[S::ROWS][4];
#pragma unroll
      for (int r = 0; r < S::ROWS; r++) {
        sign[r] = ones[r][dim] < 0 ? -1 : 1;
        uint4 four = *reinterpret_cast<const uint4*>(staged(r * S::SEGMENT + i * S::LANES_D + lane, block));
        raw[r][0] = four.x, raw[r][1] = four.y, raw[r][2] = four.z, raw[r][3] = four.w;
      }
      char* out = tables + (i * S::ENTRIES + (begin + block * 16) / int(sizeof(COUNT))) * LINE + lane * 4 * WORDS;
#pragma unroll
      for (int e = 0; e < WIDTH; e++) {
        Words<WORDS> entry, negative;
#pragma unroll
        for (int w = 0; w < WORDS; w++) {
          u32 low = (raw[2 * w][e / PER] >> (e % PER * BITS)) & ((1u << BITS) - 1);
          u32 high = (raw[2 * w + 1][e / PER] >> (e % PER * BITS)) & ((1u << BITS) - 1);
          entry.at[w] = low * u32(sign[2 * w]) + high * u32(sign[2 * w + 1] * 65536);
          negative.at[w] = 0u - entry.at[w];
        }
        *reinterpret_cast<Words<WORDS>*>(out + e * LINE) = entry;
        if (S::SIGNED) *reinterpret_cast<Words<WORDS>*>(out + (128 + e) * LINE) = negative;
      }
    }
  }
}

template <int WORDS, int J> __device__ __forceinline__ void add_byte(const char* base, u32 codes, u32 signs, u32 (&sum)[WORDS]) {
  using S = Shape<WORDS>;
  Words<WORDS> entry = *reinterpret_cast<const Words<WORDS>*>(base + J * S::ENTRIES * LINE + unsigned_byte<J>(codes) * LINE);
#pragma unroll
  for (int w = 0; w < WORDS; w++) sum[w] += S::SIGNED ? entry.at[w] : entry.at[w] * signed_byte<J>(signs);
}

// Adds to sum the look-ups of a lane's dimensions of one output.
template <int WORDS>
__device__ __forceinline__ void look_up(const char* lane_tables, Words<Shape<WORDS>::DIMS / 4> bytes, u32 (&sum)[WORDS]) {
  using S = Shape<WORDS>;
#pragma unroll
  for (int part = 0; part < S::DIMS / 4; part++) {
    u32 word = bytes.at[part];
    u32 codes = S::SIGNED ? word : word & 0x7f7f7f7fu;
    u32 signs = sign_bytes(word);
    const char* base = lane_tables + part * 4 * S::ENTRIES * LINE;
    add_byte<WORDS, 0>(base, codes, signs, sum);
    add_byte<WORDS, 1>(base, codes, signs, sum);
    add_byte<WORDS, 2>(base, codes, signs, sum);
    add_byte<WORDS, 3>(base, codes, signs, sum);
  }
}

// Leaves in sum[0] of each lane the total over its group of LANES_D lanes of output number lane % LANES_D.
template <int WORDS, int STEP> __device__ __forceinline__ void exchange(u32 (&sum)[Shape<WORDS>::U][WORDS]) {
  if constexpr (STEP > 0) {
    bool upper = threadIdx.x & STEP;
#pragma unroll
    for (int u = 0; u < STEP; u++)
#pragma unroll
      for (int w = 0; w < WORDS; w++) {
        u32 given = upper ? sum[u][w] : sum[u + STEP][w];
        u32 kept = upper ? sum[u + STEP][w] : sum[u][w];
        sum[u][w] = kept + __shfl_xor_sync(0xffffffffu, given, STEP);
      }
    exchange<WORDS, STEP / 2>(sum);
  }
}

template <int WORDS, class T, class COUNT>
__device__ __forceinline__ void count_spans(const T* __restrict__ x, const u8* __restrict__ weight,
                                            const short* __restrict__ ones_of, const COUNT* __restrict__ counts_of,
                                            short* __restrict__ sums, float* __restrict__ scale_a, int rows, int depth,
                                            int chunks, int m_pad, int max_code, int stride, int span) {
  using S = Shape<WORDS>;
  using Bytes = Words<S::DIMS / 4>;
  extern __shared__ __align__(128) char tables[];
  __shared__ short ones[S::ROWS][CHUNK];
  constexpr int HALVES = CHUNK / S::SEGMENT;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, lane_d = lane % S::LANES_D, lane_m = lane / S::LANES_D;
  int m_tiles = m_pad / 32, segments = chunks * HALVES, groups = (rows + S::ROWS - 1) / S::ROWS;
  int total = groups * segments * m_tiles;
  int unit = blockIdx.x * span, end = min(unit + span, total);
  const char* lane_tables = tables + lane_d * 4 * WORDS;
  while (unit < end) {
    int tile = unit % m_tiles, segment = unit / m_tiles % segments, group = unit / m_tiles / segments;
    int last = tile + min(m_tiles - tile, end - unit);
    int chunk = segment / HALVES, half = segment % HALVES;
    int dim = half * S::SEGMENT + lane_d * S::DIMS;
    const u8* codes = weight + (size_t(chunk * 2 + dim / 64) * m_pad + lane_m) * 64 + dim % 64;
    Bytes next[S::U];
    auto fetch = [&](int t) {
#pragma unroll
      for (int u = 0; u < S::U; u++) load_once(codes + (size_t(t) * 32 + u * WORDS) * 64, next[u]);
    };
    int mine = tile + warp;
    encode<WORDS>(x, ones_of, ones, scale_a, group * S::ROWS, rows, depth, chunk, chunks, float(max_code),
                  tile == 0 && half == 0);
    __syncthreads();
    build<WORDS>(tables, tables + TABLE_BYTES, ones, counts_of, stride, half, [&] {
      if (mine < last) fetch(mine);  // not before: 64 KB of weights a block would hold up the short loads above
    });
    __syncthreads();
    for (; mine < last; mine += WARPS) {
      Bytes now[S::U];
#pragma unroll
      for (int u = 0; u < S::U; u++) now[u] = next[u];
      if (mine + WARPS < last) fetch(mine + WARPS);
      u32 sum[S::U][WORDS];
#pragma unroll
      for (int u = 0; u < S::U; u++) {
#pragma unroll
        for (int w = 0; w < WORDS; w++) sum[u][w] = 0;
        look_up<WORDS>(lane_tables, now[u], sum[u]);
      }
      exchange<WORDS, S::U / 2>(sum);
      int m = mine * 32 + lane_d * WORDS + lane_m;
#pragma unroll
      for (int r = 0; r < S::ROWS; r++) {
        int row = group * S::ROWS + r;
        u32 word = sum[0][r / 2];
        short low = short(word & 0xffffu);
        short value = r % 2 ? short((word - u32(int(low))) >> 16) : low;
        if (row < rows) sums[(size_t(segment) * rows + row) * m_pad + m] = value;
      }
    }
    __syncthreads();  // the next segment's tables overwrite these
    unit += last - tile;
  }
}

#define KERNEL(NAME, WORDS, T, COUNT)                                                                                   \
  extern "C" __global__ __launch_bounds__(THREADS, 1) void NAME(                                                        \
      const T* x, const u8* weight, const short* ones_of, const COUNT* counts_of, short* sums, float* scale_a, int rows, \
      int depth, int chunks, int m_pad, int max_code, int stride, int span) {                                           \
    count_spans<WORDS, T, COUNT>(x, weight, ones_of, counts_of, sums, scale_a, rows, depth, chunks, m_pad, max_code,     \
                                 stride, span);                                                                         \
  }
#define KERNELS(T, SUFFIX)            \
  KERNEL(counts_2_##SUFFIX, 1, T, u8) \
  KERNEL(counts_4_##SUFFIX, 2, T, u8) \
  KERNEL(counts_8_##SUFFIX, 4, T, u8) \
  KERNEL(counts_8_long_##SUFFIX, 4, T, short)

KERNELS(float, float32)
KERNELS(Float16, float16)
KERNELS(BFloat16, bfloat16)
