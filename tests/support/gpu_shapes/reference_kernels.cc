// GPU operators that Paddle's CPU wheel lacks, as plain loops in float32, under Paddle's names and for the element types
// of its GPU kernels. They were written from the operators' documentation and signatures, to be right, not fast: the
// package's GPU branches then run on a CPU, forward and backward, through Paddle's own argument checks and shape
// inference, and their values can be compared with the plain operations.
//
// tests/support/gpu_stand_in.py compiles and loads this file.

#include <algorithm>
#include <cmath>
#include <vector>

#include "paddle/phi/backends/cpu/cpu_context.h"
#include "paddle/phi/common/bfloat16.h"
#include "paddle/phi/common/float16.h"
#include "paddle/phi/core/dense_tensor.h"
#include "paddle/phi/core/kernel_registry.h"

namespace stand_in {

using phi::DataType;
using phi::DenseTensor;
using paddle::optional;

template <typename T>
std::vector<float> Wide(const DenseTensor& x) {
  std::vector<float> wide(x.numel());
  const T* data = x.data<T>();
  for (size_t i = 0; i < wide.size(); ++i) wide[i] = static_cast<float>(data[i]);
  return wide;
}

template <typename T, typename Context>
void Store(const Context& context, const std::vector<float>& values, DenseTensor* x) {
  if (x == nullptr) return;
  T* data = context.template Alloc<T>(x);
  for (size_t i = 0; i < values.size(); ++i) data[i] = static_cast<T>(values[i]);
}

// fused_rms_norm_ext: y = w x / rms(x); the second output is 1 / rms(x).

template <typename T, typename Context>
void RMSNorm(const Context& context, const DenseTensor& x, const DenseTensor& scale, float epsilon, DenseTensor* y,
             DenseTensor* inverse) {
  const int64_t columns = x.dims()[x.dims().size() - 1], rows = x.numel() / columns;
  const std::vector<float> in = Wide<T>(x), weight = Wide<T>(scale);
  std::vector<float> out(in.size());
  inverse->Resize({rows});
  float* r = context.template Alloc<float>(inverse);
  for (int64_t i = 0; i < rows; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < columns; ++j) sum += double(in[i * columns + j]) * in[i * columns + j];
    r[i] = static_cast<float>(1.0 / std::sqrt(sum / columns + epsilon));
    for (int64_t j = 0; j < columns; ++j) out[i * columns + j] = in[i * columns + j] * r[i] * weight[j];
  }
  Store<T>(context, out, y);
}

template <typename T, typename Context>
void RMSNormGrad(const Context& context, const DenseTensor& x, const DenseTensor& scale, const DenseTensor& inverse,
                 const DenseTensor& dy, float epsilon, DenseTensor* dx, DenseTensor* dscale) {
  const int64_t columns = x.dims()[x.dims().size() - 1], rows = x.numel() / columns;
  const std::vector<float> in = Wide<T>(x), weight = Wide<T>(scale), d = Wide<T>(dy);
  const float* r = inverse.data<float>();
  std::vector<float> gradient(in.size()), of_weight(columns, 0.0f);
  for (int64_t i = 0; i < rows; ++i) {
    double dot = 0;
    for (int64_t j = 0; j < columns; ++j) dot += double(weight[j]) * d[i * columns + j] * in[i * columns + j];
    for (int64_t j = 0; j < columns; ++j) {
      const float x_hat = in[i * columns + j] * r[i], dy_j = d[i * columns + j];
      gradient[i * columns + j] = r[i] * (weight[j] * dy_j - x_hat * r[i] * float(dot / columns));
      of_weight[j] += dy_j * x_hat;
    }
  }
  Store<T>(context, gradient, dx);
  Store<T>(context, of_weight, dscale);
}

// fused_rotary_position_embedding: neighbouring pairs; sin and cos [1, T, 1, d] have the element type of q.

template <typename T, typename Context>
void Turn(const Context& context, const DenseTensor& x, const DenseTensor& sin, const DenseTensor& cos, bool adjoint,
          DenseTensor* y) {
  PADDLE_ENFORCE_EQ(x.dims().size() == 4 && sin.dims() == cos.dims() && sin.dims()[1] == x.dims()[1] &&
                        sin.dims()[sin.dims().size() - 1] == x.dims()[3],
                    true, common::errors::InvalidArgument("sin and cos do not fit q"));
  const int64_t tokens = x.dims()[0] * x.dims()[1], heads = x.dims()[2], size = x.dims()[3];
  // As in the GPU kernel, data<T>() refuses tables of another element type.
  const std::vector<float> in = Wide<T>(x), s = Wide<T>(sin), c = Wide<T>(cos);
  std::vector<float> out(in.size());
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      const float* pair = &in[(t * heads + h) * size];
      for (int64_t j = 0; j < size; j += 2) {
        const int64_t at = (t % x.dims()[1]) * size + j;
        const float angle_sin = adjoint ? -s[at] : s[at];
        out[(t * heads + h) * size + j] = pair[j] * c[at] - pair[j + 1] * angle_sin;
        out[(t * heads + h) * size + j + 1] = pair[j + 1] * c[at] + pair[j] * angle_sin;
      }
    }
  }
  Store<T>(context, out, y);
}

template <typename T, typename Context>
void Rotary(const Context& context, const DenseTensor& q, const optional<DenseTensor>& k, const optional<DenseTensor>& v,
            const optional<DenseTensor>& sin, const optional<DenseTensor>& cos, const optional<DenseTensor>& positions,
            bool neighbours, bool time_major, float base, DenseTensor* out_q, DenseTensor* out_k, DenseTensor* out_v) {
  PADDLE_ENFORCE_EQ(neighbours && !time_major && !k && !v && !positions && sin && cos, true,
                    common::errors::Unimplemented("the stand-in turns q alone, by tables"));
  Turn<T>(context, q, *sin, *cos, false, out_q);
}

template <typename T, typename Context>
void RotaryGrad(const Context& context, const optional<DenseTensor>& sin, const optional<DenseTensor>& cos,
                const optional<DenseTensor>& positions, const DenseTensor& dq, const optional<DenseTensor>& dk,
                const optional<DenseTensor>& dv, bool neighbours, bool time_major, float base, DenseTensor* out_q,
                DenseTensor* out_k, DenseTensor* out_v) {
  Turn<T>(context, dq, *sin, *cos, true, out_q);
}

// flashmask_attention: query i sees key j where j <= i < ends[j], ends [1, 1, T, 1]. H query heads share G key heads.

struct AttentionSizes {
  int64_t tokens, heads, kv_heads, size;
  float scale;
  AttentionSizes(const DenseTensor& q, const DenseTensor& k)
      : tokens(q.dims()[1]), heads(q.dims()[2]), kv_heads(k.dims()[2]), size(q.dims()[3]),
        scale(1.0f / std::sqrt(static_cast<float>(q.dims()[3]))) {}
  int64_t At(int64_t token, int64_t head) const { return (token * heads + head) * size; }
  int64_t KeyAt(int64_t token, int64_t head) const {
    return (token * kv_heads + head / (heads / kv_heads)) * size;
  }
};

inline float Dot(const float* a, const float* b, int64_t size) {
  float sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

template <typename T, typename Context>
void FlashMask(const Context& context, const DenseTensor& q, const DenseTensor& k, const DenseTensor& v,
               const DenseTensor& ends, const optional<DenseTensor>& seed, float dropout, bool causal, bool, bool,
               const std::string&, DenseTensor* out, DenseTensor* softmax, DenseTensor* lse, DenseTensor* seed_offset) {
  PADDLE_ENFORCE_EQ(dropout == 0.0f && causal && q.dims()[0] == 1 && ends.dims()[1] == 1 && ends.dims()[3] == 1, true,
                    common::errors::Unimplemented("the stand-in has one mask, causal, and no dropout"));
  const AttentionSizes n(q, k);
  PADDLE_ENFORCE_EQ(n.heads % n.kv_heads, 0, common::errors::InvalidArgument("heads do not divide"));
  const std::vector<float> wq = Wide<T>(q), wk = Wide<T>(k), wv = Wide<T>(v);
  const int* end = ends.data<int>();
  std::vector<float> result(wq.size(), 0.0f), weights(n.tokens);
  lse->Resize({1, n.heads, n.tokens});
  float* log_sums = context.template Alloc<float>(lse);
  for (int64_t h = 0; h < n.heads; ++h) {
    for (int64_t i = 0; i < n.tokens; ++i) {
      float largest = -INFINITY, sum = 0;
      for (int64_t j = 0; j <= i; ++j) {
        weights[j] = i < end[j] ? n.scale * Dot(&wq[n.At(i, h)], &wk[n.KeyAt(j, h)], n.size) : -INFINITY;
        largest = std::max(largest, weights[j]);
      }
      for (int64_t j = 0; j <= i; ++j) sum += (weights[j] = std::exp(weights[j] - largest));
      log_sums[h * n.tokens + i] = largest + std::log(sum);
      for (int64_t j = 0; j <= i; ++j) {
        for (int64_t d = 0; d < n.size; ++d) result[n.At(i, h) + d] += weights[j] / sum * wv[n.KeyAt(j, h) + d];
      }
    }
  }
  Store<T>(context, result, out);
  context.template Alloc<T>(softmax);
  seed_offset->Resize({2});
  context.template Alloc<int64_t>(seed_offset);
}

template <typename T, typename Context>
void FlashMaskGrad(const Context& context, const DenseTensor& q, const DenseTensor& k, const DenseTensor& v,
                   const DenseTensor& ends, const DenseTensor& out, const DenseTensor& lse, const DenseTensor&,
                   const DenseTensor& dout, float, bool, DenseTensor* dq, DenseTensor* dk, DenseTensor* dv) {
  const AttentionSizes n(q, k);
  const std::vector<float> wq = Wide<T>(q), wk = Wide<T>(k), wv = Wide<T>(v), wo = Wide<T>(out), wd = Wide<T>(dout);
  const int* end = ends.data<int>();
  const float* log_sums = lse.data<float>();
  std::vector<float> of_q(wq.size(), 0.0f), of_k(wk.size(), 0.0f), of_v(wv.size(), 0.0f);
  for (int64_t h = 0; h < n.heads; ++h) {
    for (int64_t i = 0; i < n.tokens; ++i) {
      const float* d_out = &wd[n.At(i, h)];
      const float row = Dot(d_out, &wo[n.At(i, h)], n.size);
      for (int64_t j = 0; j <= i; ++j) {
        if (i >= end[j]) continue;
        const float score = n.scale * Dot(&wq[n.At(i, h)], &wk[n.KeyAt(j, h)], n.size);
        const float p = std::exp(score - log_sums[h * n.tokens + i]);
        const float ds = n.scale * p * (Dot(d_out, &wv[n.KeyAt(j, h)], n.size) - row);
        for (int64_t d = 0; d < n.size; ++d) {
          of_v[n.KeyAt(j, h) + d] += p * d_out[d];
          of_q[n.At(i, h) + d] += ds * wk[n.KeyAt(j, h) + d];
          of_k[n.KeyAt(j, h) + d] += ds * wq[n.At(i, h) + d];
        }
      }
    }
  }
  Store<T>(context, of_q, dq);
  Store<T>(context, of_k, dk);
  Store<T>(context, of_v, dv);
}

// batched_gemm: a product for each group of rows. The result is rounded to T, the sum is float32.

template <typename T, typename Context>
void GroupedProduct(const Context& context, const DenseTensor& left, const DenseTensor& right,
                    const std::vector<int64_t>& counts, bool transpose_left, bool transpose_right, DenseTensor* out) {
  const std::vector<float> l = Wide<T>(left), r = Wide<T>(right);
  std::vector<float> result(out->numel(), 0.0f);
  const int64_t width = left.dims()[1];
  int64_t begin = 0;
  for (size_t e = 0; e < counts.size(); begin += counts[e++]) {
    if (transpose_left) {
      const int64_t columns = right.dims()[1];
      for (int64_t i = begin; i < begin + counts[e]; ++i)
        for (int64_t a = 0; a < width; ++a)
          for (int64_t b = 0; b < columns; ++b)
            result[(e * width + a) * columns + b] += l[i * width + a] * r[i * columns + b];
      continue;
    }
    const int64_t rows = right.dims()[1], columns = right.dims()[2], made = transpose_right ? rows : columns;
    const float* matrix = &r[e * rows * columns];
    for (int64_t i = begin; i < begin + counts[e]; ++i)
      for (int64_t a = 0; a < width; ++a)
        for (int64_t b = 0; b < made; ++b)
          result[i * made + b] += l[i * width + a] * matrix[transpose_right ? b * columns + a : a * columns + b];
  }
  Store<T>(context, result, out);
}

// moe_permute and moe_unpermute, without padding.

template <typename T, typename Context>
void Permute(const Context& context, const DenseTensor& x, const optional<DenseTensor>&, const DenseTensor& experts,
             const DenseTensor& weights, int num_experts, const std::vector<int>& counts, int alignment, bool do_gather,
             bool, bool, int, DenseTensor* rows, DenseTensor* row_of, DenseTensor* row_weights, DenseTensor* scales,
             DenseTensor* indices) {
  PADDLE_ENFORCE_EQ(alignment == 1 && do_gather && num_experts <= 64 && num_experts == int(counts.size()), true,
                    common::errors::Unimplemented("the stand-in pads nothing, and has at most 64 experts"));
  const int64_t tokens = x.dims()[0], size = x.dims()[1], choices = experts.dims()[1];
  const int* expert = experts.data<int>();
  const float* weight = weights.data<float>();
  const T* from = x.data<T>();
  T* to = context.template Alloc<T>(rows);
  int* map = context.template Alloc<int>(row_of);
  float* made = context.template Alloc<float>(row_weights);
  context.template Alloc<float>(scales);
  context.template Alloc<int>(indices);
  std::fill(map, map + tokens * num_experts, -1);
  std::vector<int> next(num_experts, 0);
  for (int e = 1; e < num_experts; ++e) next[e] = next[e - 1] + counts[e - 1];
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t c = 0; c < choices; ++c) {
      const int e = expert[t * choices + c];
      if (e < 0) continue;
      const int row = next[e]++;
      map[t * num_experts + e] = row;
      made[row] = weight[t * choices + c];
      std::copy(from + t * size, from + (t + 1) * size, to + row * size);
    }
  }
}

template <typename T, typename Context>
void Unpermute(const Context& context, const DenseTensor& rows, const DenseTensor& row_of, const DenseTensor& experts,
               const DenseTensor& row_weights, int tokens, int num_experts, bool wide, bool weighted, DenseTensor* out,
               DenseTensor* weights) {
  PADDLE_ENFORCE_EQ(wide && !weighted && num_experts <= 64, true, common::errors::Unimplemented("another sum"));
  const int64_t size = rows.dims()[1], choices = experts.dims()[1];
  const std::vector<float> in = Wide<T>(rows);
  const int *map = row_of.data<int>(), *expert = experts.data<int>();
  std::vector<float> sums(tokens * size, 0.0f);
  float* of_pair = context.template Alloc<float>(weights);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int e = 0; e < num_experts; ++e) {
      const int row = map[t * num_experts + e];
      for (int64_t d = 0; row >= 0 && d < size; ++d) sums[t * size + d] += in[row * size + d];
    }
    for (int64_t c = 0; c < choices; ++c) {
      const int e = expert[t * choices + c];
      of_pair[t * choices + c] = e < 0 ? 0.0f : row_weights.data<float>()[map[t * num_experts + e]];
    }
  }
  Store<T>(context, sums, out);
}

// fused_linear_param_grad_add: total + x^T dout in float32, in place of the total.

template <typename T, typename Context>
void AddProduct(const Context& context, const DenseTensor& x, const DenseTensor& dout, const optional<DenseTensor>& total,
                const optional<DenseTensor>&, bool multi_precision, bool has_bias, DenseTensor* out, DenseTensor*) {
  PADDLE_ENFORCE_EQ(multi_precision && !has_bias, true, common::errors::Unimplemented("another sum"));
  const int64_t columns = x.dims()[1], made = dout.dims()[1], rows = x.dims()[0];
  const std::vector<float> l = Wide<T>(x), r = Wide<T>(dout);
  if (total) {
    *out = *total;
  } else {
    float* zeros = context.template Alloc<float>(out);
    std::fill(zeros, zeros + columns * made, 0.0f);
  }
  float* sum = out->data<float>();
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t a = 0; a < columns; ++a)
      for (int64_t b = 0; b < made; ++b) sum[a * made + b] += l[i * columns + a] * r[i * made + b];
}

}  // namespace stand_in

using phi::bfloat16;
using phi::float16;

PD_REGISTER_KERNEL(fused_rms_norm_ext, CPU, ALL_LAYOUT, stand_in::RMSNorm, float, bfloat16) {}
PD_REGISTER_KERNEL(fused_rms_norm_ext_grad, CPU, ALL_LAYOUT, stand_in::RMSNormGrad, float, bfloat16) {}
PD_REGISTER_KERNEL(fused_rotary_position_embedding, CPU, ALL_LAYOUT, stand_in::Rotary, float, float16, bfloat16) {}
PD_REGISTER_KERNEL(fused_rotary_position_embedding_grad, CPU, ALL_LAYOUT, stand_in::RotaryGrad, float, float16,
                   bfloat16) {}
PD_REGISTER_KERNEL(flashmask_attention, CPU, ALL_LAYOUT, stand_in::FlashMask, float16, bfloat16) {}
PD_REGISTER_KERNEL(flashmask_attention_grad, CPU, ALL_LAYOUT, stand_in::FlashMaskGrad, float16, bfloat16) {}
PD_REGISTER_KERNEL(batched_gemm, CPU, ALL_LAYOUT, stand_in::GroupedProduct, float, bfloat16) {}
PD_REGISTER_KERNEL(moe_permute, CPU, ALL_LAYOUT, stand_in::Permute, bfloat16) {}
PD_REGISTER_KERNEL(moe_unpermute, CPU, ALL_LAYOUT, stand_in::Unpermute, bfloat16) {}
PD_REGISTER_KERNEL(fused_linear_param_grad_add, CPU, ALL_LAYOUT, stand_in::AddProduct, float16, bfloat16) {}
