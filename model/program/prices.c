#include "model/program/prices.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { PICKED = 12 }; // items that are mixed

static double item_price(const MenuItem *i, Prices p) {
  return i->seconds + p.resident * (double)i->resident + p.copied * (double)i->copied;
}

// Of the first n items.
static int cheapest(const Menu *m, int n, Prices p) {
  double lowest = INFINITY;
  int least = 0;
  for (int i = 0; i < n; i++) {
    double price = item_price(&m->item[i], p);
    if (price >= lowest) continue;
    lowest = price;
    least = i;
  }
  return least;
}

int prices_leanest(const Menu *m, int copies) {
  int64_t copied = INT64_MAX;
  int least = -1;
  for (int i = 0; i < m->n; i++) copied = min_i64(copied, m->item[i].copied);
  for (int i = 0; i < m->n; i++)
    if ((copies || m->item[i].copied == copied) && (least < 0 || m->item[i].resident < m->item[least].resident))
      least = i;
  return least;
}

int prices_corners(Menu *m) {
  char *is_corner = xcalloc((size_t)m->n, 1);
  MenuItem *item = xmalloc((size_t)m->n * sizeof *item);
  is_corner[0] = is_corner[prices_leanest(m, 0)] = is_corner[prices_leanest(m, 1)] = 1;
  double resident = 1e-14; // 10 us a gigabyte; in steps of 1.15 to a second
  for (int k = 0; k < 83; k++, resident *= 1.15)
    for (int i = 0; i <= 12; i++) is_corner[cheapest(m, m->n, (Prices){resident, resident * i / 12})] = 1;
  int n = 0, corners;
  for (int i = 0; i < m->n; i++)
    if (is_corner[i]) item[n++] = m->item[i];
  corners = n;
  for (int i = 0; i < m->n; i++)
    if (!is_corner[i]) item[n++] = m->item[i];
  free(m->item);
  free(is_corner);
  m->item = item;
  return corners;
}

// The seconds that all layers cost at least, if memory and link had these prices.
static double bound_at(const Menu *m, int n, const Limits *l, Prices p) {
  double least = item_price(&m->item[cheapest(m, n, p)], p);
  return l->layers * least - p.resident * l->resident - p.copied * l->copied;
}

// The price of copies that gives the highest bound. A copy that finds no room on the link stays, or is waited for: its
// price is at most that of either.
static double copied_price(const Menu *m, int n, const Limits *l, double resident) {
  double low = 0, high = fmin(resident, 1 / l->link);
  for (int i = 0; i < 16; i++) { // the bound is concave: it rises while more is copied than may be
    double price = (low + high) / 2;
    double copied = (double)m->item[cheapest(m, n, (Prices){resident, price})].copied;
    *(l->layers * copied > l->copied ? &low : &high) = price;
  }
  return (low + high) / 2;
}

static Prices best_prices(const Menu *m, int n, const Limits *l) {
  double low = 0, high = 1e-9;
  for (int i = 0; i < 40; i++) {
    double a = low + (high - low) / 3, b = high - (high - low) / 3;
    if (bound_at(m, n, l, (Prices){a, copied_price(m, n, l, a)}) <
        bound_at(m, n, l, (Prices){b, copied_price(m, n, l, b)}))
      low = a;
    else
      high = b;
  }
  double resident = (low + high) / 2;
  return (Prices){resident, copied_price(m, n, l, resident)};
}

double prices_bound(const Menu *m, int corners, const Limits *l) {
  return fmax(0, bound_at(m, m->n, l, best_prices(m, corners, l)));
}

// ---- counting out ----

typedef struct Picks {
  int n, item[PICKED];
} Picks;

static void pick(Picks *x, int item) {
  for (int i = 0; i < x->n; i++)
    if (x->item[i] == item) return;
  if (x->n < PICKED) x->item[x->n++] = item;
}

// The items that are cheapest at prices near these, nearest first; and the leanest, so that some mix fits if any does.
static Picks picks_near(const Menu *m, int corners, Prices p) {
  static const double off[] = {1, .97, 1.03, .9, 1.1, .75, 1.3, .5, 2};
  enum { OFF = sizeof off / sizeof *off };
  Picks x = {0};
  pick(&x, prices_leanest(m, 0));
  pick(&x, prices_leanest(m, 1));
  for (int far = 0; far < OFF; far++)
    for (int i = 0; i <= far; i++) {
      pick(&x, cheapest(m, corners, (Prices){p.resident * off[far], p.copied * off[i]}));
      pick(&x, cheapest(m, corners, (Prices){p.resident * off[i], p.copied * off[far]}));
    }
  return x;
}

static int mix_fits(const Menu *m, const Mix *x, const Limits *l) {
  double resident = 0, copied = 0;
  for (int k = 0; k < MIX_ITEMS; k++) {
    resident += (double)m->item[x->item[k]].resident * x->count[k];
    copied += (double)m->item[x->item[k]].copied * x->count[k];
  }
  return resident <= l->resident && copied <= l->copied;
}

int prices_mix(const Menu *m, int corners, const Limits *l, Mix *best) {
  const Picks p = picks_near(m, corners, best_prices(m, corners, l));
  int found = 0;
  for (int a = 0; a < p.n; a++)
    for (int b = a; b < p.n; b++)
      for (int c = b; c < p.n; c++)
        for (int i = 0; i <= l->layers; i++)
          for (int k = 0; i + k <= l->layers; k++) {
            if ((a == b && k) || (b == c && k)) continue; // counted as another
            Mix x = {{p.item[a], p.item[b], p.item[c]}, {i, k, l->layers - i - k}, 0};
            for (int j = 0; j < MIX_ITEMS; j++) x.seconds += x.count[j] * m->item[x.item[j]].seconds;
            if ((found && x.seconds >= best->seconds) || !mix_fits(m, &x, l)) continue;
            *best = x;
            found = 1;
          }
  return found;
}
