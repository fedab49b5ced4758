// Layers alike that share memory and a link: prices of a byte that stays and of a byte that is copied, at which the
// cheapest items of a menu just fit (the Lagrangian relaxation).
#ifndef TESSERA_PRICES_H
#define TESSERA_PRICES_H

#include "model/program/menu.h"

// Seconds that a byte costs.
typedef struct Prices {
  double resident, copied;
} Prices;

// What limits the sums over layers.
typedef struct Limits {
  double resident, copied; // bytes
  double link;             // bytes a second that are copied while the compute lane waits
  int layers;
} Limits;

// Moves to the front the items that are cheapest at some prices and those that leave least in memory, with copies and
// without; returns their number. Keeps the order otherwise.
int prices_corners(Menu *m);

// The item that leaves least in memory, of all or of those that copy least.
int prices_leanest(const Menu *m, int copies);

// A lower bound of the seconds that the layers' policies add within these limits, exact but for how items mix.
// `corners`: of the menu, its first items.
double prices_bound(const Menu *m, int corners, const Limits *l);

// How many layers have which item.
enum { MIX_ITEMS = 3 };
typedef struct Mix {
  int item[MIX_ITEMS], count[MIX_ITEMS];
  double seconds;
} Mix;
// The shortest mix of up to three items within the limits, of those that are cheapest near the best prices. 0: none
// fits.
int prices_mix(const Menu *m, int corners, const Limits *l, Mix *best);
#endif
