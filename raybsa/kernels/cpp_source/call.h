// The arguments of one attention, as raybsa/kernels/cpp.py fills them in, and the tiles of queries it is worked through.

#pragma once

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "products.h"

extern "C" {

// Runs work(data) on so many threads; null where no OpenMP of this interface is loaded.
void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags) __attribute__((weak));

struct Call {  // mirrored by `_Call` in cpp.py
  const float *q, *k, *v;
  const int64_t* crow;                // (groups, q_blocks + 1)
  const int32_t* col;                 // KV blocks
  const int64_t *q_start, *kv_start;  // the position of each block's first token
  int64_t q_step[3], k_step[3], v_step[3];  // numbers between samples, heads and tokens
  int64_t batch, heads, kv_heads, groups, q_blocks, q_tokens, kv_tokens, head_dim, q_block, kv_block, causal, threads;
  float scale;
};
}

namespace raybsa {

constexpr int kTile = 64;  // queries worked on together: the lanes of the vectors

// Rows of kTile floats at addresses that vectors like.
class Rows {
 public:
  explicit Rows(int64_t rows) : data_(rows * kTile + kTile) {
    next_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(data_.data()) + 63) / 64 * 64);
  }
  float* take(int64_t rows) {
    float* found = next_;
    next_ += rows * kTile;
    return found;
  }

 private:
  std::vector<float> data_;
  float* next_;
};

// Up to kTile queries of one head and one query block, and the KV blocks they see.
struct Tile {
  int64_t sample, head, kv_head, token;  // token: the first query, of those at hand
  int queries, lanes;                    // lanes: queries in whole vectors
  int64_t position;                      // of the first query
  const int32_t *begin, *end;            // KV blocks
  int64_t line;                          // of the first query in (batch, heads, q_tokens)
  const float* q;                        // the first query

  Tile(const Call& c, int64_t sample, int64_t head, int64_t block, int64_t first)
      : sample(sample), head(head), kv_head(head / (c.heads / c.kv_heads)), token(block * c.q_block + first) {
    queries = (int)std::min({(int64_t)kTile, c.q_block - first, c.q_tokens - token});
    lanes = (queries + kWidth - 1) / kWidth * kWidth;
    position = c.q_start[block] + first;
    const int64_t group = c.groups == 1 ? 0 : c.groups == c.heads ? head : sample * c.heads + head;
    const int64_t* crow = c.crow + group * (c.q_blocks + 1) + block;
    begin = c.col + crow[0], end = c.col + crow[1];
    line = (sample * c.heads + head) * c.q_tokens + token;
    q = c.q + sample * c.q_step[0] + head * c.q_step[1] + token * c.q_step[2];
  }
};

// Calls work(tile) for the tiles of one query block; `head` counts on over samples.
template <typename Work>
void each_tile(const Call& c, int64_t head, int64_t block, Work work) {
  for (int64_t first = 0; first < std::min(c.q_block, c.q_tokens - block * c.q_block); first += kTile)
    work(Tile(c, head / c.heads, head % c.heads, block, first));
}

// The keys and values of one block.
struct Block {
  const float *keys, *values;
  int64_t token;  // the first, of those at hand
  int count;      // tokens
  int64_t position;

  Block(const Call& c, const Tile& t, int64_t block) : token(block * c.kv_block), position(c.kv_start[block]) {
    count = (int)std::min(c.kv_block, c.kv_tokens - token);
    keys = c.k + t.sample * c.k_step[0] + t.kv_head * c.k_step[1] + token * c.k_step[2];
    values = c.v + t.sample * c.v_step[0] + t.kv_head * c.v_step[1] + token * c.v_step[2];
  }
};

// (head_dim, kTile) from `queries` rows of head_dim numbers, scaled; lanes beyond the queries are 0.
inline void to_lanes(const float* from, int64_t step, const Tile& t, int64_t head_dim, float scale, float* to) {
  Vec x[kWidth];
  for (int i = 0; i < t.lanes; i += kWidth)
    for (int64_t n = 0; n < head_dim; n += kWidth) {
      for (int j = 0; j < kWidth; ++j) x[j] = i + j < t.queries ? load(from + (i + j) * step + n) * scale : Vec{};
      transpose(x);
      for (int j = 0; j < kWidth; ++j) store(to + (n + j) * kTile + i, x[j]);
    }
}

// Rows of head_dim numbers from (head_dim, kTile), lane i times factor[i].
inline void from_lanes(const float* from, const float* factor, const Tile& t, int64_t head_dim, float* to) {
  Vec x[kWidth];
  for (int i = 0; i < t.lanes; i += kWidth)
    for (int64_t n = 0; n < head_dim; n += kWidth) {
      for (int j = 0; j < kWidth; ++j) x[j] = load(from + (n + j) * kTile + i) * load(factor + i);
      transpose(x);
      for (int j = 0; j < std::min(kWidth, t.queries - i); ++j) store(to + (i + j) * head_dim + n, x[j]);
    }
}

// Scores (keys, kTile) of a block; pairs that causality hides are -inf.
inline void scores(const Call& c, const Tile& t, const Block& b, const float* q, float* to) {
  matrix<To::kSet>({b.keys, c.k_step[2], 1}, {q, kTile}, b.count, t.lanes, (int)c.head_dim, {to, kTile});
  if (!c.causal || b.position + b.count - 1 <= t.position) return;
  for (int j = 0; j < b.count; ++j) {
    const int64_t hidden = std::clamp<int64_t>(b.position + j - t.position, 0, t.lanes);
    std::fill(to + j * kTile, to + j * kTile + hidden, -kInf);
  }
}

// Calls work(item) for each of `items` on the call's threads; each makes one `work` for itself by make().
//
// The threads are those of the OpenMP that torch has loaded, through the entry that compilers use: its threads go on
// spinning for a while after torch's own operations, and others beside them would share their processors.
template <typename Make>
void share_out(const Call& c, int64_t items, Make make) {
  std::atomic<int64_t> next{0};
  const auto run = [&] {
    auto work = make();
    for (int64_t item; (item = next.fetch_add(1)) < items;) work(item);
  };
  const auto threads = (unsigned)std::min(c.threads, items);
  if (threads > 1 && GOMP_parallel) {
    GOMP_parallel([](void* data) { (*static_cast<decltype(run)*>(data))(); }, (void*)&run, threads, 0);
    return;
  }
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(run);
  run();
  for (auto& one : others) one.join();
}

}  // namespace raybsa
