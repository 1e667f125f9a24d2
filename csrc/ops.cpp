// The table of contents: every operator's schema. Kernels register themselves at the foot of csrc/cpu/<stem>.cpp.
//
// Conventions shared by all schemas
//   k            number of tangents; tangent tensors carry it as their leading axis
//   state        int64 tensor [seed, step]; for distribution 2 (standard basis) the k coordinates themselves
//   first        index of the first tangent, so that a chunk of tangents draws what the whole set would
//   offset       position of the first element inside the global tangent vector
//   distribution 0 normal, 1 Rademacher, 2 standard basis
#include "stable_compat.h"

STABLE_TORCH_LIBRARY(frog_cuda, m) {
  // tangents
  m.def(
      "sample_tangents(Tensor state, int k, int numel, int offset, int first, int distribution, ScalarType dtype) -> "
      "Tensor");
  m.def("tangent_gram(Tensor state, int k, int numel, int offset, int first, int distribution) -> Tensor");
  m.def("gram(Tensor tangents) -> Tensor");
  m.def(
      "sample_blocks(Tensor state, int k, int[] numels, int[] offsets, int first, int distribution, ScalarType dtype) "
      "-> Tensor");
  m.def("gram_blocks(Tensor blocks, int k, int[] numels) -> Tensor");
  m.def("combine_blocks(Tensor blocks, int k, int[] numels, Tensor coefficients) -> Tensor[]");
  m.def(
      "tangent_combine(Tensor state, Tensor coefficients, int numel, int offset, int first, int distribution, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "tangent_combine_samples(Tensor state, Tensor coefficients, int numel, int offset, int first, int distribution, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "tangent_axpy_(Tensor(a!) self, Tensor state, Tensor coefficients, float alpha, int offset, int first, int "
      "distribution) -> ()");
  m.def(
      "tangent_sgd_(Tensor(a!) self, Tensor(b!)? buffer, Tensor state, Tensor coefficients, float lr, float momentum, "
      "float dampening, float weight_decay, bool nesterov, bool fresh, int offset, int first, int distribution) -> ()");
  // low rank
  m.def("low_rank_combine(Tensor factors, int k, int r, int[] heights, int[] widths, Tensor coefficients) -> Tensor[]");
  // projection
  m.def("cholesky_project(Tensor gram, Tensor derivatives, float rtol) -> (Tensor coefficients, Tensor rank)");
  // linear
  m.def(
      "linear_jvp(Tensor x, Tensor? dx, Tensor weight, Tensor? bias, Tensor? dweight, Tensor? dbias, Tensor? activity, "
      "Tensor? state, int k, int first, int distribution, int? weight_offset, int? bias_offset, int activation, float "
      "alpha, float beta, bool want_gram, Tensor? left=None, Tensor? right=None) -> (Tensor y, Tensor dy, Tensor "
      "gram)");
  m.def("linear_rows(Tensor x, Tensor weight) -> Tensor");
  m.def("linear_gradient(Tensor gradient, Tensor x) -> Tensor");
  // pointwise
  m.def(
      "pointwise_jvp(Tensor x, Tensor? dx, Tensor? activity, int function, float alpha, float beta) -> (Tensor y, "
      "Tensor dy)");
  // sum
  m.def("tangent_sum(Tensor a, Tensor? va, Tensor? b, Tensor? vb, float alpha) -> Tensor");
  // convolution
  m.def(
      "convolution_jvp(Tensor x, Tensor dx, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
      "bool transposed, int[] output_padding, int groups) -> (Tensor y, Tensor dy)");
  m.def("narrow_convolution(Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation) -> Tensor");
  m.def(
      "sampled_convolution_(Tensor(a!) self, Tensor x, Tensor state, int[] kernel, int[] stride, int[] padding, int[] "
      "dilation, bool transposed, int[] output_padding, int groups, int offset, int first, int distribution, bool add) "
      "-> "
      "()");
  // embedding
  m.def(
      "embedding_jvp(Tensor indices, Tensor weight, Tensor? dweight, Tensor? state, int k, int first, int "
      "distribution, int? weight_offset, ScalarType? dtype) -> (Tensor y, Tensor dy)");
  // softmax
  m.def("softmax_jvp(Tensor x, Tensor dx, int dim) -> (Tensor y, Tensor dy)");
  m.def("log_softmax_jvp(Tensor x, Tensor dx, int dim) -> (Tensor y, Tensor dy)");
  // pooling
  m.def(
      "max_pool_jvp(Tensor x, Tensor dx, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode, "
      "bool want_indices) -> (Tensor y, Tensor dy, Tensor indices)");
  // attention
  m.def(
      "attention_jvp(Tensor query, Tensor? dquery, Tensor key, Tensor? dkey, Tensor value, Tensor? dvalue, Tensor? "
      "mask, "
      "bool is_causal, float scale) -> (Tensor out, Tensor dout)");
  // normalization
  m.def(
      "normalization_jvp(Tensor x, Tensor? dx, Tensor? weight, Tensor? dweight, Tensor? bias, Tensor? dbias, Tensor? "
      "mean, "
      "Tensor? var, int outer, int groups, int weight_groups, bool centred, float eps) -> (Tensor y, Tensor dy, Tensor "
      "mean, Tensor var)");
  // loss
  m.def(
      "cross_entropy_jvp(Tensor logits, Tensor dlogits, Tensor target, Tensor? weight, int ignore_index, float "
      "label_smoothing, int reduction) -> (Tensor loss, Tensor dloss)");
  m.def("mse_jvp(Tensor input, Tensor? dinput, Tensor target, Tensor? dtarget) -> (Tensor loss, Tensor dloss)");
  m.def(
      "bce_jvp(Tensor input, Tensor dinput, Tensor target, Tensor? weight, Tensor? pos_weight, bool with_logits) -> "
      "(Tensor loss, Tensor dloss)");
}
