// One new token of every row: q and k are rotated, the new key and value go to the cache, and the row attends over its
// cached keys and the new one. A CTA takes a row, a key head and every `lanes`-th split of the row's keys.
//
// D: head size, GROUP: query heads of a key head (at most 8), HEADS: key heads, BLOCK: keys of a cache block, SLOTS: tiles
// that a warp has in flight, SPLIT: keys of a split at least, MAX_SPLITS, NORM: 1 if q and k are normed.
//
// Keys are the M side of both products (16 keys x 8 query heads, 16 dims x 8 query heads), so that a group of 4 wastes
// half of a tensor core's work and not three quarters. Every warp brings its own tiles of 16 keys, waits for nobody, and
// starts before the launch ahead has ended: only what that launch writes, q and the new key and value, is waited for.
//
// A row's splits, the warps' share of each, and the order in which they are added depend on its length alone: its bits are
// the same in every batch, whether one CTA adds all splits in registers or the last of many adds them from memory.
#include "common.cuh"

constexpr int WARPS = 4, TILE = 16, COLS = 8;
constexpr int CHUNKS = D / 8;  // pieces of 16 bytes a head
constexpr int DIM_TILES = D / 16;
constexpr int TILE_BYTES = TILE * D * 2;
constexpr int Q_STRIDE = D + 8;  // rows of q start in different banks
constexpr int ROUNDS = (GROUP + 2 + WARPS - 1) / WARPS;
constexpr int PARTIAL_WORDS = (DIM_TILES * 4 + 4) * 32;  // of one warp's share of a split
#define LOWEST __int_as_float(0xff800000)  // minus infinity

struct Shared {
  u16 q[COLS * Q_STRIDE];
  float new_key[D], new_value[D];
  float new_score[COLS];
  float highest[WARPS][COLS], total[WARPS][COLS];
  int is_last;
};
constexpr int RING_AT = (sizeof(Shared) + 127) / 128 * 128;
constexpr int RING_BYTES = SLOTS * 2 * TILE_BYTES;  // of one warp

struct Row {
  const int *table;
  int first, end;  // keys [first, end) are cached and visible
};

// Which tile of 16 keys comes next: every fourth of a split, then those of the next split of this CTA.
struct Cursor {
  int tile, left;
  DEVICE bool next(int in_split, int jump) {
    const bool ends = --left == 0;
    tile += ends ? jump : WARPS;
    if (ends) left = in_split;
    return ends;
  }
};

// The running softmax of one warp's keys, for the two query heads of a lane's columns.
struct Sum {
  float highest[2], total[2];
  float acc[DIM_TILES][4];
  DEVICE void clear() {
    highest[0] = highest[1] = LOWEST;
    total[0] = total[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < DIM_TILES; i++) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.0f;
  }
  DEVICE void add(const Sum &other) {
    float mine[2], theirs[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      if (other.highest[j] == LOWEST && other.total[j] == 0.0f) return;  // no keys: in no column
      const float raised = fmaxf(highest[j], other.highest[j]);
      mine[j] = exp2f(highest[j] - raised);
      theirs[j] = exp2f(other.highest[j] - raised);
      total[j] = total[j] * mine[j] + other.total[j] * theirs[j];
      highest[j] = raised;
    }
#pragma unroll
    for (int i = 0; i < DIM_TILES; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) acc[i][j] = acc[i][j] * mine[j & 1] + other.acc[i][j] * theirs[j & 1];
  }
  DEVICE void store(float *to, int lane) const {
    float4 *at = (float4 *)to + lane;
    __stcg(at, make_float4(highest[0], highest[1], total[0], total[1]));
#pragma unroll
    for (int i = 0; i < DIM_TILES; i++) __stcg(at + (i + 1) * 32, make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]));
  }
  DEVICE void load(const float *from, int lane) {
    const float4 *at = (const float4 *)from + lane;
    const float4 sums = __ldcg(at);
    highest[0] = sums.x, highest[1] = sums.y, total[0] = sums.z, total[1] = sums.w;
#pragma unroll
    for (int i = 0; i < DIM_TILES; i++) {
      const float4 v = __ldcg(at + (i + 1) * 32);
      acc[i][0] = v.x, acc[i][1] = v.y, acc[i][2] = v.z, acc[i][3] = v.w;
    }
  }
};

// 16 bytes past L1, or zeros.
DEVICE void copy_or_zero16(u32 to, const void *from, bool copies) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(to), "l"(from), "r"(copies ? 16 : 0) : "memory");
}
DEVICE uint4 load_matrix4_transposed(u32 at) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}
DEVICE u32 transpose8x8(u32 v) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(r) : "r"(v));
  return r;
}
DEVICE float2 rounded2(float x, float y) { return unpack2(pack2(x, y)); }
DEVICE float over_rows(float x, bool sums) {  // of the lanes that hold the same columns
#pragma unroll
  for (int step = 4; step < 32; step *= 2) {
    const float other = __shfl_xor_sync(~0u, x, step);
    x = sums ? x + other : fmaxf(x, other);
  }
  return x;
}
DEVICE float over_warp(float x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// Where a cached key's (or value's) head lies.
DEVICE size_t cached_at(int block, int key, int head) { return ((size_t)(block * BLOCK + key % BLOCK) * HEADS + head) * D; }

// Ask for a tile of keys and values; zeros where a key is not visible, for what lies there may be no number.
DEVICE void fetch(u32 to, const u16 *keys, const u16 *values, const Row &row, int tile, int block, int head, int lane) {
  const size_t at = cached_at(block, tile * TILE, head);
#pragma unroll
  for (int i = 0; i < TILE * CHUNKS / 32; i++) {
    const int key = (i * 32 + lane) / CHUNKS, chunk = (i * 32 + lane) % CHUNKS;
    const bool visible = tile * TILE + key >= row.first && tile * TILE + key < row.end;
    const size_t from = at + (size_t)key * HEADS * D + chunk * 8;
    const u32 place = to + key * D * 2 + ((chunk ^ (key & 7)) << 4);
    copy_or_zero16(place, keys + from, visible);
    copy_or_zero16(place + TILE_BYTES, values + from, visible);
  }
}

// Add one tile of 16 keys to the running softmax.
DEVICE void attend(Sum &sum, u32 at, const u32 (*q)[2], const Row &row, int tile, float scale_log2, int lane) {
  float parts[2][4] = {};
  const int key = (lane & 7) + (lane >> 3 & 1) * 8;
#pragma unroll
  for (int i = 0; i < DIM_TILES; i++) {
    const uint4 a = load_matrix4(at + key * D * 2 + (((i * 2 + (lane >> 4)) ^ (key & 7)) << 4));
    mma16816(parts[i & 1], a.x, a.y, a.z, a.w, q[i][0], q[i][1]);
  }
  float scores[4], shrink[2];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const int position = tile * TILE + lane / 4 + (j >> 1) * 8;
    const bool visible = position >= row.first && position < row.end;
    scores[j] = visible ? (parts[0][j] + parts[1][j]) * scale_log2 : LOWEST;
  }
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const float raised = fmaxf(sum.highest[j], over_rows(fmaxf(scores[j], scores[j + 2]), false));
    shrink[j] = exp2f(sum.highest[j] - raised);
    scores[j] = exp2f(scores[j] - raised), scores[j + 2] = exp2f(scores[j + 2] - raised);
    sum.total[j] = sum.total[j] * shrink[j] + scores[j] + scores[j + 2];
    sum.highest[j] = raised;
  }
  const u32 low = transpose8x8(pack2(scores[0], scores[1])), high = transpose8x8(pack2(scores[2], scores[3]));
  const int value = (lane & 7) + (lane >> 4) * 8;
#pragma unroll
  for (int i = 0; i < DIM_TILES; i++) {
    const int chunk = i * 2 + (lane >> 3 & 1);
    const uint4 a = load_matrix4_transposed(at + TILE_BYTES + value * D * 2 + ((chunk ^ (value & 7)) << 4));
#pragma unroll
    for (int j = 0; j < 4; j++) sum.acc[i][j] *= shrink[j & 1];
    mma16816(sum.acc[i], a.x, a.y, a.z, a.w, low, high);
  }
}

struct Args {
  const u16 *qkv;
  u16 *keys, *values;
  const int *tables, *lens;
  const u16 *cos, *sin, *norm;
  u16 *out;
  float *partial;
  int *counters;
  int table_stride, lanes, window;
  float scale_log2, eps;
};

// Norm and rotation of one head, two neighboring dims of each half a lane, rounded where the definition rounds.
DEVICE void rotate(float2 &a, float2 &b, float2 cos, float2 sin, const u16 *norm, float eps, int lane, bool active) {
  if (NORM) {
    const float mean = over_warp(active ? a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y : 0.0f) / D;
    const float scale = rsqrtf(mean + eps);
    const float2 low = active ? unpack2(*(const u32 *)(norm + lane * 2)) : a;
    const float2 high = active ? unpack2(*(const u32 *)(norm + D / 2 + lane * 2)) : b;
    a = rounded2(a.x * scale, a.y * scale), b = rounded2(b.x * scale, b.y * scale);
    a = rounded2(a.x * low.x, a.y * low.y), b = rounded2(b.x * high.x, b.y * high.y);
  }
  const float2 ac = rounded2(a.x * cos.x, a.y * cos.y), bs = rounded2(b.x * sin.x, b.y * sin.y);
  const float2 bc = rounded2(b.x * cos.x, b.y * cos.y), as = rounded2(a.x * sin.x, a.y * sin.y);
  a = make_float2(ac.x - bs.x, ac.y - bs.y);
  b = make_float2(bc.x + as.x, bc.y + as.y);
}

// q of the group and the new key and value into shared memory; those of lane 0 into the cache as well.
DEVICE void take_new(Shared &s, const Args &args, int row, int head, int position, int block, bool writes, float2 cos,
                     float2 sin, int warp, int lane) {
  const u16 *from = args.qkv + (size_t)row * (GROUP + 2) * HEADS * D;
  const bool active = lane < D / 4;
  u32 low[ROUNDS], high[ROUNDS];
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const int j = warp + i * WARPS;
    const int of = j < GROUP ? head * GROUP + j : (GROUP + j - GROUP) * HEADS + head;
    if (j < GROUP + 2 && active) {
      low[i] = *(const u32 *)(from + of * D + lane * 2);
      high[i] = *(const u32 *)(from + of * D + D / 2 + lane * 2);
    } else {
      low[i] = high[i] = 0;
    }
  }
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const int j = warp + i * WARPS;
    if (j >= GROUP + 2) break;
    float2 a = unpack2(low[i]), b = unpack2(high[i]);
    const u16 *norm = args.norm + (j < GROUP ? head * GROUP + j : GROUP * HEADS + head) * D;
    if (j <= GROUP) rotate(a, b, cos, sin, norm, args.eps, lane, active);
    const u32 first = pack2(a.x, a.y), second = pack2(b.x, b.y);
    if (!active) continue;
    if (j < GROUP) {
      *(u32 *)(s.q + j * Q_STRIDE + lane * 2) = first;
      *(u32 *)(s.q + j * Q_STRIDE + D / 2 + lane * 2) = second;
      continue;
    }
    float *kept = j == GROUP ? s.new_key : s.new_value;
    *(float2 *)(kept + lane * 2) = unpack2(first);
    *(float2 *)(kept + D / 2 + lane * 2) = unpack2(second);
    if (writes) {
      u16 *to = (j == GROUP ? args.keys : args.values) + cached_at(block, position, head);
      *(u32 *)(to + lane * 2) = first;
      *(u32 *)(to + D / 2 + lane * 2) = second;
    }
  }
}

// Join the warps' sums and the new key, in order, and write the group's output.
DEVICE void finish(Shared &s, u8 *ring, Sum &sum, u16 *out, int warp, int lane) {
  float *mine = (float *)(ring + warp * RING_BYTES);
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const int col = (lane & 3) * 2 + j;
    const float total = over_rows(sum.total[j], true);
    if (lane < 4) s.highest[warp][col] = sum.highest[j], s.total[warp][col] = total;
    if (col < GROUP) {
#pragma unroll
      for (int i = 0; i < DIM_TILES; i++) {
        mine[col * D + i * 16 + lane / 4] = sum.acc[i][j];
        mine[col * D + i * 16 + lane / 4 + 8] = sum.acc[i][j + 2];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < GROUP * D / 4; i += WARPS * 32) {
    const int col = i / (D / 4), dim = i % (D / 4) * 4;
    float raised = s.new_score[col];
#pragma unroll
    for (int w = 0; w < WARPS; w++) raised = fmaxf(raised, s.highest[w][col]);
    const float weight = exp2f(s.new_score[col] - raised);
    const float4 v = *(const float4 *)(s.new_value + dim);
    float total = weight;
    float4 acc = make_float4(v.x * weight, v.y * weight, v.z * weight, v.w * weight);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float factor = exp2f(s.highest[w][col] - raised);
      const float4 part = *(const float4 *)((const float *)(ring + w * RING_BYTES) + col * D + dim);
      total += s.total[w][col] * factor;
      acc = make_float4(acc.x + part.x * factor, acc.y + part.y * factor, acc.z + part.z * factor, acc.w + part.w * factor);
    }
    const float inverse = 1.0f / total;
    *(uint2 *)(out + i * 4) = make_uint2(pack2(acc.x * inverse, acc.y * inverse), pack2(acc.z * inverse, acc.w * inverse));
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2) attend_rows(const Args args) {
  extern __shared__ __align__(128) u8 shared[];
  Shared &s = *(Shared *)shared;
  u8 *ring = shared + RING_AT;
  const int head = blockIdx.x % HEADS, share = blockIdx.x / HEADS % args.lanes, index = blockIdx.x / HEADS / args.lanes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  allow_next_launch();
  const int num_keys = args.lens[index];
  const int position = max(num_keys - 1, 0);
  const Row row = {args.tables + (size_t)index * args.table_stride,
                   args.window > 0 ? max(num_keys - args.window, 0) : 0, num_keys - 1};
  const int base = row.first / TILE, tiles = (num_keys + TILE - 1) / TILE - base;
  const int in_share = ((tiles + MAX_SPLITS - 1) / MAX_SPLITS + WARPS - 1) / WARPS;  // a warp's tiles of one split
  const int in_split = max(in_share, SPLIT / TILE / WARPS);
  const int num_splits = max((tiles + in_split * WARPS - 1) / (in_split * WARPS), 1);
  if (share >= num_splits) return;  // share 0 never leaves before it has waited
  const int end_tile = row.end > row.first ? (row.end + TILE - 1) / TILE : 0;
  const int jump = args.lanes * in_split * WARPS - (in_split - 1) * WARPS;
  Cursor loads = {base + share * in_split * WARPS + warp, in_split}, uses = loads;
  const u32 mine = shared_address(ring) + warp * RING_BYTES;

  int blocks[SLOTS];
  Cursor ahead = loads;
#pragma unroll
  for (int i = 0; i < SLOTS; i++) {
    blocks[i] = ahead.tile < end_tile ? row.table[ahead.tile * TILE / BLOCK] : 0;
    ahead.next(in_split, jump);
  }
#pragma unroll
  for (int i = 0; i < SLOTS; i++) {
    if (loads.tile < end_tile)
      fetch(mine + i * 2 * TILE_BYTES, args.keys, args.values, row, loads.tile, blocks[i], head, lane);
    copy_async_commit();
    loads.next(in_split, jump);
  }
  int block = loads.tile < end_tile ? row.table[loads.tile * TILE / BLOCK] : 0;
  const int new_block = row.table[position / BLOCK];
  float2 cos = {}, sin = {};
  if (lane < D / 4) {
    cos = unpack2(*(const u32 *)(args.cos + (size_t)position * (D / 2) + lane * 2));
    sin = unpack2(*(const u32 *)(args.sin + (size_t)position * (D / 2) + lane * 2));
  }
  for (int i = threadIdx.x; i < (COLS - GROUP) * Q_STRIDE; i += WARPS * 32) s.q[GROUP * Q_STRIDE + i] = 0;

  wait_previous_launch();
  u16 *out = args.out + ((size_t)index * HEADS + head) * GROUP * D;
  if (num_keys == 0) {
    for (int i = threadIdx.x; i < GROUP * D / 2; i += WARPS * 32) ((u32 *)out)[i] = 0;
    return;
  }
  take_new(s, args, index, head, position, new_block, share == 0, cos, sin, warp, lane);
  __syncthreads();
  u32 q[DIM_TILES][2];
#pragma unroll
  for (int i = 0; i < DIM_TILES; i++) {
    const u16 *at = s.q + lane / 4 * Q_STRIDE + i * 16 + lane % 4 * 2;
    q[i][0] = *(const u32 *)at;
    q[i][1] = *(const u32 *)(at + 8);
  }
  for (int j = warp; j < GROUP; j += WARPS) {
    float score = 0.0f;
    for (int i = lane; i < D / 2; i += 32) {
      const float2 two = unpack2(*(const u32 *)(s.q + j * Q_STRIDE + i * 2));
      score += two.x * s.new_key[i * 2] + two.y * s.new_key[i * 2 + 1];
    }
    score = over_warp(score) * args.scale_log2;
    if (lane == 0) s.new_score[j] = score;
  }

  const int unit = index * HEADS + head;
  const bool joins = args.lanes > 1 && num_splits > 1;
  Sum sum, split_sum;
  sum.clear();
  split_sum.clear();
  int slot = 0, split = share;
  bool pending = false;
  while (uses.tile < end_tile) {
    copy_async_wait<SLOTS - 1>();
    __syncwarp();
    attend(split_sum, mine + slot * 2 * TILE_BYTES, q, row, uses.tile, args.scale_log2, lane);
    __syncwarp();
    if (loads.tile < end_tile)
      fetch(mine + slot * 2 * TILE_BYTES, args.keys, args.values, row, loads.tile, block, head, lane);
    copy_async_commit();
    loads.next(in_split, jump);
    block = loads.tile < end_tile ? row.table[loads.tile * TILE / BLOCK] : 0;
    slot = slot + 1 == SLOTS ? 0 : slot + 1;
    pending = true;
    if (uses.next(in_split, jump)) {
      if (joins)
        split_sum.store(args.partial + ((size_t)(unit * MAX_SPLITS + split) * WARPS + warp) * PARTIAL_WORDS, lane);
      else
        sum.add(split_sum);
      split_sum.clear();
      split += args.lanes;
      pending = false;
    }
  }
  if (!joins) {
    if (pending) sum.add(split_sum);
  } else {
    // The last split may have ended early, or hold no tile of this warp.
    if (split < num_splits)
      split_sum.store(args.partial + ((size_t)(unit * MAX_SPLITS + split) * WARPS + warp) * PARTIAL_WORDS, lane);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      const int shares = min(args.lanes, num_splits);
      s.is_last = atomicAdd(args.counters + unit, 1) == shares - 1;
      if (s.is_last) args.counters[unit] = 0;
    }
    __syncthreads();
    if (!s.is_last) return;
    __threadfence();
    for (int i = 0; i < num_splits; i++) {
      split_sum.load(args.partial + ((size_t)(unit * MAX_SPLITS + i) * WARPS + warp) * PARTIAL_WORDS, lane);
      sum.add(split_sum);
    }
  }
  finish(s, ring, sum, out, warp, lane);
}
