// What the files that record the model share: the recording itself, operands, linear layers, AdaLN sites.
//
// T slots, C dim, H query and G kv heads of D, P = 3p^2, V vocab, Z cond_dim, SEG modulation rows, M = 6CL + 2C.
// "two-sided" buffers hold text and image rows at different widths (kernels.h).
#ifndef TESSERA_RECORDING_H
#define TESSERA_RECORDING_H

#include "model/model.h"

#define IN(...) TENSORS(__VA_ARGS__)
#define OUT(...) TENSORS(__VA_ARGS__)

enum { SHIFT1, SCALE1, GATE1, SHIFT2, SCALE2, GATE2 }; // column blocks of a layer in the modulation table

// The residual stream where it is normalised: x [T, C], h = AdaLN(x) [T, C], mean and rstd [T] of its LayerNorm.
typedef struct Site {
  TensorId x, h, mean, rstd;
} Site;

// Gradients that arrive at a site: of x by the residual path, and of h. dx is NO_TENSOR at the last site.
typedef struct SiteGradient {
  TensorId dx, dh; // [T, C]
} SiteGradient;

// A layer's activations, which its backward pass reads.
typedef struct Activations {
  Site site1, site2, end;                        // at its input, between attention and experts, at its output
  TensorId qkv, q, k, v, o, lse;                 // [T,(H+2G)D], [T,H,D], [T,G,D] x 2, [T,HD], [H,T]
  TensorId b1;                                   // [T, C] attention branch
  TensorId router_logits, router_weights, route; // two-sided [T,E_m], [T,Kmax], Route
  TensorId shared_pre, shared_out;               // two-sided [T, 2 S_m], [T, C]; NO_TENSOR without a shared expert
  TensorId expert_pre, expert_out;               // two-sided [T K_m, 2 F_m], [T K_m, C]
  TensorId b2;                                   // [T, C] expert branch
} Activations;

// What the input's backward pass reads.
typedef struct Input {
  TensorId z, bottleneck;        // [T, P], [T, B]
  TensorId features, t1, t1_act; // [SEG, TIME_FEATURES], [SEG, Z] x 2
  TensorId pooled, c, a;         // [SEG, C], [SEG, Z] x 2
} Input;

// What the heads' backward pass reads; NO_TENSOR where not training.
typedef struct Heads {
  TensorId dh;    // [T, C] from the text head
  TensorId dxhat; // [T, P]
} Heads;

typedef struct Recording {
  const Model *model;
  const Config *config;
  Program *p;
  Dims d;
  Mode mode;
  int train;
  Space grads;
  int accumulate;             // gradients of this program add to what is there
  const ParamBucket *summing; // whose gradients the processes sum while others are computed; NULL: none's
  TensorId mod;               // [SEG, M]
  TensorId dmod;              // [SEG, M]
  TensorId metrics;
  Activations layer[]; // [L]
} Recording;

// ---- operands ----

// A parameter and its gradient, by its index in the table; NO_TENSOR for -1, an absent one.
TensorId weight(Recording *r, int param);
TensorId gradient(Recording *r, int param);

// Fresh tensors of activations: [T, width], and two-sided with rows[m] rows a token of width w0 (text), w1 (image).
TensorId rows_tensor(Recording *r, int width, const char *name);
TensorId two_sided(Recording *r, Dtype type, const int rows[MODALITIES], int w0, int w1, const char *name);
extern const int one_row[MODALITIES]; // {1, 1}

// ---- linear layers ----

OpArgs linear_args(Extent extent, int in0, int in1, int out0, int out1, int accumulate);

// y = x W^T (+ bias), dx = dy W (+ add) into fresh tensors of `rows` rows; dW = dy^T x, and dbias.
TensorId linear(Recording *r, Extent extent, TensorId x, int w, int bias, int in, int out, int rows, const char *name);
TensorId linear_dgrad(Recording *r, Extent extent, TensorId dy, int w, TensorId add, int in, int out, int rows,
                      const char *name);
void linear_wgrad(Recording *r, Extent extent, TensorId dy, TensorId x, int w, int bias, int in, int out);

// The same for text and image rows, with a matrix per modality, or one matrix where w[IMAGE] is absent.
TensorId linear_rows(Recording *r, TensorId x, const int w[MODALITIES], int in, int out, const char *name);
TensorId linear_rows_dgrad(Recording *r, TensorId dy, const int w[MODALITIES], int in, int out, const char *name);
void linear_rows_wgrad(Recording *r, TensorId dy, TensorId x, const int w[MODALITIES], int in, int out);

// ---- AdaLN ----

// Columns of the modulation table where block `part` of layer l begins; layer L is the final site [shift, scale].
int mod_column(const Recording *r, int l, int part);
// A site that adds its branch with the gate at column `gate`, and normalises for layer l (L: the heads).
OpArgs site_args(const Recording *r, int gate, int l, int shift_part);
// x + gate branch (branch NO_TENSOR: x itself), normalised.
Site record_site(Recording *r, TensorId x, TensorId branch, OpArgs args);

// The gradients that a site gives: of x before the branch was added, and of the branch where there is one.
typedef struct BranchGradient {
  TensorId dx, dbranch; // [T, C]
} BranchGradient;
// x: the stream after the branch was added with args' x_is_new, else before.
BranchGradient record_site_backward(Recording *r, OpArgs args, SiteGradient g, TensorId x, TensorId branch,
                                    TensorId mean, TensorId rstd);

// ---- parts of the model ----

// The modulation table (r->mod), and x [T, C] of the patches and tokens.
TensorId record_input(Recording *r, Input *in);
void record_input_backward(Recording *r, const Input *in, TensorId dx);

// h of layer 0 from the input x; dx from the gradients there.
Site record_first_site(Recording *r, TensorId x);
TensorId record_first_site_backward(Recording *r, SiteGradient g);

// One layer: from the site at its input to the site at its output, which is the next layer's input (layer.c).
Site record_layer(Recording *r, int l, Site in);
SiteGradient record_layer_backward(Recording *r, int l, SiteGradient g);

// Predictions and losses from the last site's h; gives the gradient of h.
Heads record_heads(Recording *r, TensorId h, ModelProgram *out);
SiteGradient record_heads_backward(Recording *r, const Heads *heads, TensorId h);
#endif
