// The backward: weights are made again from the rows' lse (FlashAttention-2, 2307.08691, algorithm 2). One thread has a
// KV head's rows, or each `parts`-th of them, so that dK and dV are added up in a fixed order, without atomics.

#include "call.h"

extern "C" {

struct Gradients {  // mirrored by `_Gradients` in cpp.py
  const float *lse, *delta, *grad_out;  // (batch, heads, q_tokens) twice; grad_out by its steps
  int64_t grad_out_step[3];
  float *grad_q, *grad_k, *grad_v;  // grad_k and grad_v: (parts, batch, kv_heads, kv_tokens, head_dim), zeros at first
  int64_t parts;
};
}

namespace raybsa {
namespace {

class Backward {
 public:
  Backward(const Call& c, const Gradients& g)
      : c_(c), g_(g), rows_(3 * c.head_dim + 2 * c.kv_block + 3), q_(rows_.take(c.head_dim)),
        grad_out_(rows_.take(c.head_dim)), grad_q_(rows_.take(c.head_dim)), weights_(rows_.take(c.kv_block)),
        grad_scores_(rows_.take(c.kv_block)), lse_(rows_.take(1)), delta_(rows_.take(1)), ones_(rows_.take(1)) {
    std::fill(ones_, ones_ + kTile, 1.0f);
  }

  void operator()(const Tile& t, int64_t part) {
    const int dim = (int)c_.head_dim;
    const int64_t* step = g_.grad_out_step;
    const float* grad_out = g_.grad_out + t.sample * step[0] + t.head * step[1] + t.token * step[2];
    const int64_t heads = (part * c_.batch + t.sample) * c_.kv_heads + t.kv_head;
    to_lanes(t.q, c_.q_step[2], t, dim, c_.scale, q_);
    to_lanes(grad_out, step[2], t, dim, 1.0f, grad_out_);
    take_rows(t);
    std::fill(grad_q_, grad_q_ + dim * kTile, 0.0f);
    for (const int32_t* at = t.begin; at < t.end; ++at) {
      const Block b(c_, t, *at);
      const int64_t to = (heads * c_.kv_tokens + b.token) * dim;
      scores(c_, t, b, q_, weights_);
      matrix<To::kSet>({b.values, c_.v_step[2], 1}, {grad_out_, kTile}, b.count, t.lanes, dim, {grad_scores_, kTile});
      softmax(b.count, t.lanes);
      matrix<To::kAdd>({weights_, kTile, 1}, {grad_out, step[2]}, b.count, dim, t.queries, {g_.grad_v + to, dim});
      matrix<To::kAdd>({grad_scores_, kTile, 1}, {t.q, c_.q_step[2]}, b.count, dim, t.queries, {g_.grad_k + to, dim});
      matrix<To::kAdd>({b.keys, 1, c_.k_step[2]}, {grad_scores_, kTile}, dim, t.lanes, b.count, {grad_q_, kTile});
    }
    from_lanes(grad_q_, ones_, t, dim, g_.grad_q + t.line * dim);
  }

 private:
  // lse and delta of the queries; no weight for those that saw nothing and for lanes beyond them.
  void take_rows(const Tile& t) {
    for (int i = 0; i < t.lanes; ++i) {
      const bool there = i < t.queries && g_.lse[t.line + i] != -kInf;
      lse_[i] = there ? g_.lse[t.line + i] : kInf;
      delta_[i] = there ? g_.delta[t.line + i] : 0.0f;
    }
  }

  // Scores become weights, and gradients of weights those of products of queries and keys.
  void softmax(int keys, int lanes) {
    for (int i = 0; i < lanes; i += kWidth) {
      const Vec lse = load(lse_ + i), delta = load(delta_ + i);
      for (int j = 0; j < keys; ++j) {
        const int at = j * kTile + i;
        const Vec weight = exp_negative(load(weights_ + at) - lse);
        store(weights_ + at, weight);
        store(grad_scores_ + at, weight * (load(grad_scores_ + at) - delta) * c_.scale);
      }
    }
  }

  const Call& c_;
  const Gradients& g_;
  Rows rows_;
  float *q_, *grad_out_, *grad_q_, *weights_, *grad_scores_, *lse_, *delta_, *ones_;
};

}  // namespace
}  // namespace raybsa

extern "C" void raybsa_backward(const Call* call, const Gradients* gradients) {
  using namespace raybsa;
  const Call& c = *call;
  const Gradients& g = *gradients;
  const auto make = [&] {
    return [&c, &g, backward = Backward(c, g)](int64_t item) mutable {
      const int64_t part = item % g.parts, kv_head = item / g.parts, members = c.heads / c.kv_heads;
      for (int64_t head = kv_head * members; head < (kv_head + 1) * members; ++head)
        for (int64_t block = part; block < c.q_blocks; block += g.parts)
          each_tile(c, head, block, [&](const Tile& t) { backward(t, part); });
    };
  };
  share_out(c, c.batch * c.kv_heads * g.parts, make);
}
