// One layer, in the order of its formula: record_layer on one page, record_layer_backward on the next.
//
// The op that adds a branch to the residual stream normalises the sum for what reads it next. So the last op of a layer
// makes x and the h = AdaLN(x) of the layer above (of the heads, above the last), and its backward is the first op of
// record_layer_backward; h of layer 0 is made by record_first_site. Here and nowhere else two layers meet.
#include "model/recording.h"

Site record_first_site(Recording *r, TensorId x) {
  return record_site(r, x, NO_TENSOR, site_args(r, 0, 0, SHIFT1));
}

TensorId record_first_site_backward(Recording *r, SiteGradient g) {
  const Site *s = &r->layer[0].site1;
  OpArgs args = site_args(r, 0, 0, SHIFT1);
  args.adaln.x_is_new = 1;
  TensorId rstd = program_need(r->p, s->rstd), mean = program_need(r->p, s->mean), x = program_need(r->p, s->x);
  return record_site_backward(r, args, g, x, NO_TENSOR, mean, rstd).dx;
}

static int has_shared(const Dims *d) {
  return d->S[TEXT] || d->S[IMAGE];
}

static OpArgs router_args(const Recording *r, int l) {
  return (OpArgs){.accumulate = r->accumulate,
                  .router = {.balance = r->config->router.balance / r->d.L,
                             .z = r->config->router.z / r->d.L,
                             .layer = l,
                             .even = r->config->router.even}};
}

static OpArgs expert_args(const Recording *r) {
  const TileColumns *tiles = r->config->kernels.tiles;
  return (OpArgs){.accumulate = r->accumulate, .experts = {.tiles = {128 * (int)tiles[TEXT], 128 * (int)tiles[IMAGE]}}};
}

// ---- forward ----

static void save_site1(Recording *r, int l) {
  const Site *s = &r->layer[l].site1;
  program_save(r->p, s->x, SAVED_X);
  program_save(r->p, s->mean, SAVED_NORM_STATS);
  program_save(r->p, s->rstd, SAVED_NORM_STATS);
  program_save(r->p, s->h, SAVED_H1);
  // x alone rebuilds h with the same bits: the site took them from the rounded x.
  OpArgs again = site_args(r, 0, l, SHIFT1);
  program_save_rebuild(r->p, OUT(NO_TENSOR, s->h, s->mean, s->rstd), OP_ADALN_FWD, IN(s->x, NO_TENSOR, r->mod), &again);
}

static void save_site2(Recording *r, int l) {
  const Site *s = &r->layer[l].site2;
  program_save(r->p, s->x, SAVED_X2);
  program_save(r->p, s->h, SAVED_H2);
  program_save(r->p, s->mean, SAVED_NORM_STATS);
  program_save(r->p, s->rstd, SAVED_NORM_STATS);
}

// Shared_m(h), or NO_TENSOR where neither modality has a shared expert.
static TensorId record_shared(Recording *r, int l) {
  const LayerParams *w = &r->model->params.layer[l];
  const Dims *d = &r->d;
  const int *S = d->S, C = d->C;
  Activations *f = &r->layer[l];
  f->shared_pre = NO_TENSOR;
  if (!has_shared(d)) return NO_TENSOR;
  f->shared_pre = two_sided(r, DT_ACT, one_row, 2 * S[TEXT], 2 * S[IMAGE], "shared pre-activation");
  TensorId a = two_sided(r, DT_ACT, one_row, S[TEXT], S[IMAGE], "shared activation");
  program_op(r->p, OP_SHARED_UP_FWD, IN(f->site2.h, weight(r, w->shared1[0]), weight(r, w->shared1[1])),
             OUT(f->shared_pre, a), NULL);
  program_save(r->p, f->shared_pre, SAVED_SHARED_PRE);
  TensorId y = rows_tensor(r, C, "shared out");
  OpArgs down = linear_args(EXT_SPLIT, S[TEXT], S[IMAGE], C, C, 0);
  program_op(r->p, OP_LINEAR_FWD, IN(a, weight(r, w->shared2[0]), weight(r, w->shared2[1]), NO_TENSOR), OUT(y), &down);
  return y;
}

// b2 = Shared + sum over the chosen experts; x' = x2 + gate2 b2; h' = AdaLN(x'). One op where the backend has it.
static Site record_end(Recording *r, int l) {
  Activations *f = &r->layer[l];
  Program *p = r->p;
  const TensorId y = f->expert_out, route = f->route, weights = f->router_weights, shared = f->shared_out;
  const OpArgs args = site_args(r, mod_column(r, l, GATE2), l + 1, SHIFT1);
  if (!r->model->backend->fn[OP_COMBINE_ADALN_FWD]) {
    f->b2 = rows_tensor(r, r->d.C, "expert branch");
    program_op(p, OP_EXPERT_COMBINE, IN(y, route, weights, shared), OUT(f->b2), NULL);
    program_save(p, f->b2, SAVED_B2);
    return record_site(r, f->site2.x, f->b2, args);
  }
  f->b2 = r->train ? rows_tensor(r, r->d.C, "expert branch") : NO_TENSOR;
  Site s = {.x = rows_tensor(r, r->d.C, "x")};
  s.h = rows_tensor(r, r->d.C, "h");
  s.mean = program_tensor(p, DT_REAL, r->d.T, "mean");
  s.rstd = program_tensor(p, DT_REAL, r->d.T, "rstd");
  program_op(p, OP_COMBINE_ADALN_FWD, IN(y, route, weights, shared, f->site2.x, r->mod),
             OUT(f->b2, s.x, s.h, s.mean, s.rstd), &args);
  if (r->train) {
    program_save(p, f->b2, SAVED_B2);
    program_save_rebuild(p, OUT(f->b2), OP_EXPERT_COMBINE, IN(y, route, weights, shared), NULL);
  }
  return s;
}

Site record_layer(Recording *r, int l, Site in) {
  const LayerParams *w = &r->model->params.layer[l];
  const Dims *d = &r->d;
  const int C = d->C, HD = d->H * d->D, GD = d->G * d->D, *F = d->F;
  Activations *f = &r->layer[l];
  Program *p = r->p;
  program_layer(p, l);

  // x; h = AdaLN(x) = (1 + scale1) LN(x) + shift1
  f->site1 = in;
  save_site1(r, l);

  // q, k, v = h Wqkv
  f->qkv = linear_rows(r, f->site1.h, w->qkv, C, HD + 2 * GD, "qkv");
  program_save(p, f->qkv, SAVED_QKV);

  // q, k = rotary(RMSnorm(q, k))
  f->q = rows_tensor(r, HD, "q");
  f->k = rows_tensor(r, GD, "k");
  f->v = rows_tensor(r, GD, "v");
  program_op(p, OP_QKNORM_ROPE_FWD, IN(f->qkv, weight(r, w->q_norm), weight(r, w->k_norm)), OUT(f->q, f->k, f->v),
             NULL);
  program_save(p, f->q, SAVED_QKV_ROTATED);
  program_save(p, f->k, SAVED_QKV_ROTATED);
  program_save(p, f->v, SAVED_QKV_ROTATED);

  // o = attention(q, k, v)
  f->o = rows_tensor(r, HD, "attention out");
  f->lse = program_tensor(p, DT_REAL, (int64_t)d->H * d->T, "attention lse");
  program_op(p, OP_ATTENTION_FWD, IN(f->q, f->k, f->v), OUT(f->o, f->lse), NULL);
  program_save(p, f->o, SAVED_ATTENTION);
  program_save(p, f->lse, SAVED_ATTENTION);

  // b1 = o Wo
  f->b1 = linear_rows(r, f->o, w->out, HD, C, "attention branch");
  program_save(p, f->b1, SAVED_B1);

  // x2 = x + gate1 b1; h = AdaLN(x2)
  f->site2 = record_site(r, f->site1.x, f->b1, site_args(r, mod_column(r, l, GATE1), l, SHIFT2));
  save_site2(r, l);

  // top-k of h Wr, their weights, and where each (row, expert) goes
  f->router_logits = two_sided(r, DT_REAL, one_row, d->E[TEXT], d->E[IMAGE], "router logits");
  f->router_weights = program_tensor(p, DT_REAL, (int64_t)d->T * dims_kmax(d), "router weights");
  f->route = program_tensor(p, DT_I32, route_bind(&(Route){0}, d, NULL), "route");
  const OpArgs router = router_args(r, l);
  program_op(p, OP_ROUTER_FWD, IN(f->site2.h, weight(r, w->router[0]), weight(r, w->router[1])),
             OUT(f->router_logits, f->router_weights, f->route), &router);
  program_save(p, f->router_logits, SAVED_ROUTER);
  program_save(p, f->router_weights, SAVED_ROUTER);
  program_save(p, f->route, SAVED_ROUTER);
  if (r->train || r->mode == MODE_EVAL)
    program_op(p, OP_ROUTER_LOSS, IN(f->router_logits, f->route), OUT(r->metrics), &router);

  // Shared(h)
  f->shared_out = record_shared(r, l);

  // y_e = W2_e (silu(gate_e) * up_e), gate_e and up_e = h W1_e
  f->expert_pre = two_sided(r, DT_ACT, d->K, 2 * F[TEXT], 2 * F[IMAGE], "expert pre-activation");
  TensorId a = two_sided(r, DT_ACT, d->K, F[TEXT], F[IMAGE], "expert activation");
  const OpArgs experts = expert_args(r);
  program_op(p, OP_EXPERT_UP_FWD, IN(f->site2.h, f->route, weight(r, w->w1[0]), weight(r, w->w1[1])),
             OUT(f->expert_pre, a), &experts);
  program_save(p, f->expert_pre, SAVED_EXPERT_PRE);
  f->expert_out = two_sided(r, DT_ACT, d->K, C, C, "expert out");
  program_op(p, OP_EXPERT_DOWN_FWD, IN(a, f->route, weight(r, w->w2[0]), weight(r, w->w2[1])), OUT(f->expert_out),
             &experts);

  // b2 = Shared(h) + sum w_e y_e; x' = x2 + gate2 b2; h' = AdaLN(x')
  return f->end = record_end(r, l);
}

// ---- backward ----

// dx2 and db2 from dx' and dh', under the layer above.
static BranchGradient record_end_backward(Recording *r, int l, SiteGradient g) {
  const Activations *f = &r->layer[l];
  OpArgs args = site_args(r, mod_column(r, l, GATE2), l + 1, SHIFT1);
  args.adaln.x_is_new = 1;
  TensorId b2 = program_need(r->p, f->b2), rstd = program_need(r->p, f->end.rstd);
  TensorId mean = program_need(r->p, f->end.mean), x = program_need(r->p, f->end.x);
  return record_site_backward(r, args, g, x, b2, mean, rstd);
}

// The gradients of the shared expert; returns its share of dh, or NO_TENSOR without one.
static TensorId record_shared_backward(Recording *r, int l, TensorId db2, TensorId h) {
  const LayerParams *w = &r->model->params.layer[l];
  const Dims *d = &r->d;
  const int *S = d->S, C = d->C;
  Program *p = r->p;
  if (!has_shared(d)) return NO_TENSOR;
  TensorId pre = program_need(p, r->layer[l].shared_pre);
  TensorId dpre = two_sided(r, DT_ACT, one_row, 2 * S[TEXT], 2 * S[IMAGE], "d shared pre-activation");
  TensorId a = two_sided(r, DT_ACT, one_row, S[TEXT], S[IMAGE], "shared activation");
  program_op(p, OP_SHARED_DOWN_BWD, IN(db2, pre, weight(r, w->shared2[0]), weight(r, w->shared2[1])), OUT(dpre, a),
             NULL);
  OpArgs down = linear_args(EXT_SPLIT, S[TEXT], S[IMAGE], C, C, r->accumulate);
  program_op(p, OP_LINEAR_WGRAD, IN(db2, a), OUT(gradient(r, w->shared2[0]), gradient(r, w->shared2[1]), NO_TENSOR),
             &down);
  OpArgs up = linear_args(EXT_SPLIT, C, C, 2 * S[TEXT], 2 * S[IMAGE], r->accumulate);
  program_op(p, OP_LINEAR_WGRAD, IN(dpre, h), OUT(gradient(r, w->shared1[0]), gradient(r, w->shared1[1]), NO_TENSOR),
             &up);
  TensorId dh = rows_tensor(r, C, "dh shared");
  program_op(p, OP_LINEAR_DGRAD, IN(dpre, weight(r, w->shared1[0]), weight(r, w->shared1[1]), NO_TENSOR), OUT(dh), &up);
  return dh;
}

// dh = dh of router and shared expert + sum of its slots' gradients; from dx2 and dh to dx and db1. One op where the
// backend has it.
static BranchGradient record_site2_backward(Recording *r, int l, TensorId dx2, TensorId dslot, TensorId route,
                                            TensorId dh_router) {
  const Activations *f = &r->layer[l];
  Program *p = r->p;
  const OpArgs args = site_args(r, mod_column(r, l, GATE1), l, SHIFT2);
  TensorId x = program_need(p, f->site1.x), b1 = program_need(p, f->b1);
  TensorId mean = program_need(p, f->site2.mean), rstd = program_need(p, f->site2.rstd);
  if (!r->model->backend->fn[OP_COMBINE_ADALN_BWD]) {
    TensorId dh = rows_tensor(r, r->d.C, "dh2");
    program_op(p, OP_EXPERT_COMBINE, IN(dslot, route, NO_TENSOR, dh_router), OUT(dh), NULL);
    return record_site_backward(r, args, (SiteGradient){dx2, dh}, x, b1, mean, rstd);
  }
  BranchGradient to = {.dx = rows_tensor(r, r->d.C, "dx")};
  to.dbranch = rows_tensor(r, r->d.C, "d branch");
  program_op(p, OP_COMBINE_ADALN_BWD, IN(dslot, route, dh_router, dx2, x, b1, r->mod, mean, rstd),
             OUT(to.dx, to.dbranch, r->dmod), &args);
  return to;
}

// q, k = rotary(RMSnorm(q, k)); o = attention(q, k, v): from do to dqkv. One op where the backend has it.
static TensorId record_attention_backward(Recording *r, int l, TensorId d_o, TensorId o) {
  const LayerParams *w = &r->model->params.layer[l];
  const int HD = r->d.H * r->d.D, GD = r->d.G * r->d.D;
  const Activations *f = &r->layer[l];
  Program *p = r->p;
  const OpArgs acc = {.accumulate = r->accumulate};
  TensorId q = program_need(p, f->q), k = program_need(p, f->k), v = program_need(p, f->v);
  TensorId lse = program_need(p, f->lse), dqkv = rows_tensor(r, HD + 2 * GD, "dqkv");
  const TensorId dwq = gradient(r, w->q_norm), dwk = gradient(r, w->k_norm);
  if (!r->model->backend->fn[OP_ATTENTION_ROPE_BWD]) {
    TensorId dq = rows_tensor(r, HD, "dq"), dk = rows_tensor(r, GD, "dk"), dv = rows_tensor(r, GD, "dv");
    program_op(p, OP_ATTENTION_BWD, IN(d_o, o, q, k, v, lse), OUT(dq, dk, dv), NULL);
    program_op(p, OP_QKNORM_ROPE_BWD,
               IN(dq, dk, dv, program_need(p, f->qkv), weight(r, w->q_norm), weight(r, w->k_norm)), OUT(dqkv, dwq, dwk),
               &acc);
    return dqkv;
  }
  program_op(p, OP_ATTENTION_ROPE_BWD,
             IN(d_o, o, q, k, v, lse, program_need(p, f->qkv), weight(r, w->q_norm), weight(r, w->k_norm)),
             OUT(dqkv, dwq, dwk, rows_tensor(r, HD + 2 * GD, "dq, dk, dv")), &acc);
  return dqkv;
}

SiteGradient record_layer_backward(Recording *r, int l, SiteGradient g) {
  const LayerParams *w = &r->model->params.layer[l];
  const Dims *d = &r->d;
  const int C = d->C, HD = d->H * d->D, GD = d->G * d->D, *F = d->F;
  const Activations *f = &r->layer[l];
  const OpArgs experts = expert_args(r);
  Program *p = r->p;

  // x' = x2 + gate2 b2; h' = AdaLN(x')
  BranchGradient end = record_end_backward(r, l, g);
  const TensorId db2 = end.dbranch;
  program_layer(p, l);

  // y_e = W2_e (silu(gate_e) * up_e)
  TensorId route = program_need(p, f->route), weights = program_need(p, f->router_weights);
  TensorId pre = program_need(p, f->expert_pre), h2 = program_need(p, f->site2.h);
  TensorId dpre = two_sided(r, DT_ACT, d->K, 2 * F[TEXT], 2 * F[IMAGE], "d expert pre-activation");
  TensorId sa = two_sided(r, DT_ACT, d->K, F[TEXT], F[IMAGE], "weighted activation");
  TensorId dweights = program_tensor(p, DT_REAL, (int64_t)d->T * dims_kmax(d), "d router weights");
  program_op(p, OP_EXPERT_DOWN_BWD, IN(db2, pre, weights, route, weight(r, w->w2[0]), weight(r, w->w2[1])),
             OUT(dpre, sa, dweights), &experts);
  program_op(p, OP_EXPERT_DOWN_WGRAD, IN(db2, sa, route), OUT(gradient(r, w->w2[0]), gradient(r, w->w2[1])), &experts);

  // gate_e, up_e = h W1_e
  TensorId dslot = two_sided(r, DT_ACT, d->K, C, C, "d expert input");
  program_op(p, OP_EXPERT_UP_DGRAD, IN(dpre, route, weight(r, w->w1[0]), weight(r, w->w1[1])), OUT(dslot), &experts);
  program_op(p, OP_EXPERT_UP_WGRAD, IN(dpre, h2, route), OUT(gradient(r, w->w1[0]), gradient(r, w->w1[1])), &experts);

  // Shared(h)
  TensorId dh_shared = record_shared_backward(r, l, db2, h2);

  // the weights of top-k of h Wr
  const OpArgs router = router_args(r, l);
  TensorId dh_router = rows_tensor(r, C, "dh router"); // the shared expert's share included
  program_op(p, OP_ROUTER_BWD,
             IN(dweights, program_need(p, f->router_logits), weights, route, h2, weight(r, w->router[0]),
                weight(r, w->router[1]), dh_shared),
             OUT(dh_router, gradient(r, w->router[0]), gradient(r, w->router[1])), &router);

  // x2 = x + gate1 b1; h = AdaLN(x2)
  BranchGradient site2 = record_site2_backward(r, l, end.dx, dslot, route, dh_router);
  const TensorId db1 = site2.dbranch;

  // b1 = o Wo
  TensorId o = program_need(p, f->o);
  linear_rows_wgrad(r, db1, o, w->out, HD, C);
  TensorId d_o = linear_rows_dgrad(r, db1, w->out, HD, C, "d attention out");

  // q, k = rotary(RMSnorm(q, k)); o = attention(q, k, v)
  TensorId dqkv = record_attention_backward(r, l, d_o, o);

  // q, k, v = h Wqkv
  linear_rows_wgrad(r, dqkv, program_need(p, f->site1.h), w->qkv, C, HD + 2 * GD);
  TensorId dh = linear_rows_dgrad(r, dqkv, w->qkv, C, HD + 2 * GD, "dh1");

  // h = AdaLN(x) belongs to the layer below
  return (SiteGradient){.dx = site2.dx, .dh = dh};
}
