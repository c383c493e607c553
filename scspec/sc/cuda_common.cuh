// What the CUDA kernels share: types, quantisation as in `encoding`, bytes of a word, look-ups with a sign.

typedef unsigned char u8;
typedef unsigned int u32;

constexpr int CODES = 128;  // codes in a line of a table: all counts of one dimension and K
constexpr int DIMS = 256;   // dimensions in a table; streams repeat after them

// The 16-bit types without their headers, which a machine that only runs kernels may lack.
struct Float16 { unsigned short bits; };
struct BFloat16 { unsigned short bits; };
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __int_as_float(int(x.bits) << 16); }
__device__ __forceinline__ float to_float(Float16 x) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
}
__device__ __forceinline__ void store_rounded(float* at, float x) { *at = x; }
__device__ __forceinline__ void store_rounded(Float16* at, float x) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(at->bits) : "f"(x));
}
__device__ __forceinline__ void store_rounded(BFloat16* at, float x) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(at->bits) : "f"(x));
}

// Magnitudes order like their bits, and a NaN's lie above infinity's.
__device__ __forceinline__ int magnitude_bits(float x) { return __float_as_int(x) & 0x7fffffff; }

// max(|x|max, floor) / q, NaN if the peak is one.
__device__ __forceinline__ float row_scale(int peak_bits, float max_code) {
  float peak = __int_as_float(peak_bits);
  return __fdiv_rn(peak < 1e-5f ? 1e-5f : peak, max_code);
}

// rint(x / scale), half to even, clipped to -q..q; NaN gives q, so that no index leaves its table.
__device__ __forceinline__ int clipped_code(float x, float scale, float max_code) {
  float code = rintf(__fdiv_rn(x, scale));
  code = code < max_code ? code : max_code;
  return int(code > -max_code ? code : -max_code);
}

template <int SELECTOR> __device__ __forceinline__ u32 pick(u32 word) {
  u32 out;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(out) : "r"(word), "n"(SELECTOR));
  return out;
}
template <int J> __device__ __forceinline__ u32 unsigned_byte(u32 word) { return pick<0x4440 + J>(word); }
template <int J> __device__ __forceinline__ u32 signed_byte(u32 word) {  // bit 3 of a selector repeats the sign
  return pick<(8 + J) * 0x1110 + J>(word);
}
__device__ __forceinline__ u32 sign_bytes(u32 word) {  // bytes 1 or -1, for codes with their sign in bit 7
  return ((word >> 7) & 0x01010101u) * 0xfeu + 0x01010101u;
}
