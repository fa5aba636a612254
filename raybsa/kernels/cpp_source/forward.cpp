// The forward: one pass over each tile's blocks with an online softmax (FlashAttention-2, 2307.08691). Scores lie as
// (key, query), so that no sum or maximum runs across lanes and keys and values are read where they are.

#include <cmath>

#include "call.h"

namespace raybsa {
namespace {

// Asks for rows of keys or values before they are read.
inline void fetch_ahead(const float* rows, int64_t step, int count, int64_t dim) {
  for (int j = 0; j < count; ++j)
    for (int64_t n = 0; n < dim; n += 16) __builtin_prefetch(rows + j * step + n, 0, 2);
}

class Forward {
 public:
  Forward(const Call& c, float* out, float* lse)
      : c_(c), out_(out), lse_(lse), rows_(2 * c.head_dim + c.kv_block + 3), q_(rows_.take(c.head_dim)),
        sums_(rows_.take(c.head_dim)), scores_(rows_.take(c.kv_block)), top_(rows_.take(1)), total_(rows_.take(1)),
        factor_(rows_.take(1)) {}

  void operator()(const Tile& t) {
    to_lanes(t.q, c_.q_step[2], t, c_.head_dim, c_.scale, q_);
    std::fill(sums_, sums_ + c_.head_dim * kTile, 0.0f);
    std::fill(top_, top_ + kTile, -kInf);
    std::fill(total_, total_ + kTile, 0.0f);
    for (const int32_t* at = t.begin; at < t.end; ++at) {
      const Block b(c_, t, *at);
      fetch_ahead(b.values, c_.v_step[2], b.count, c_.head_dim);
      scores(c_, t, b, q_, scores_);
      softmax(b.count, t.lanes);
      if (at + 1 < t.end) {
        const Block next(c_, t, at[1]);
        fetch_ahead(next.keys, c_.k_step[2], next.count, c_.head_dim);
      }
      const int dim = (int)c_.head_dim;
      matrix<To::kScaleAndAdd>({b.values, 1, c_.v_step[2]}, {scores_, kTile}, dim, t.lanes, b.count, {sums_, kTile}, factor_);
    }
    finish(t);
  }

 private:
  // Scores become weights against the largest score so far; `factor` brings older sums to it.
  void softmax(int keys, int lanes) {
    for (int i = 0; i < lanes; i += kWidth) {
      const Vec before = load(top_ + i);
      Vec top = before;
      for (int j = 0; j < keys; ++j) {
        const Vec x = load(scores_ + j * kTile + i);
        top = x > top ? x : top;
      }
      const Vec base = top == -kInf ? Vec{} : top, factor = exp_negative(before - base);
      Vec total = load(total_ + i) * factor;
      for (int j = 0; j < keys; ++j) {
        const Vec weight = exp_negative(load(scores_ + j * kTile + i) - base);
        store(scores_ + j * kTile + i, weight);
        total += weight;
      }
      store(top_ + i, top);
      store(total_ + i, total);
      store(factor_ + i, factor);
    }
  }

  // Output and lse (natural logarithm); 0 and -inf for a query that saw nothing.
  void finish(const Tile& t) {
    for (int i = 0; i < t.queries; ++i) {
      if (lse_) lse_[t.line + i] = total_[i] == 0 ? -kInf : top_[i] + std::log(total_[i]);
      factor_[i] = total_[i] == 0 ? 0.0f : 1.0f / total_[i];
    }
    from_lanes(sums_, factor_, t, c_.head_dim, out_ + t.line * c_.head_dim);
  }

  const Call& c_;
  float *out_, *lse_;
  Rows rows_;
  float *q_, *sums_, *scores_, *top_, *total_, *factor_;
};

}  // namespace
}  // namespace raybsa

// out (batch, heads, q_tokens, head_dim); lse (batch, heads, q_tokens), or null where nobody wants it.
extern "C" void raybsa_forward(const Call* call, float* out, float* lse) {
  using namespace raybsa;
  const Call& c = *call;
  const auto make = [&] {
    return [&c, forward = Forward(c, out, lse)](int64_t item) mutable {
      each_tile(c, item / c.q_blocks, item % c.q_blocks, [&](const Tile& t) { forward(t); });
    };
  };
  share_out(c, c.batch * c.heads * c.q_blocks, make);
}
