// Lists what the policies of one layer cost together: bytes that stay, bytes copied, seconds of recomputation. They do
// not add up tensor by tensor: rebuilding one tensor may need others, and an op that is recorded again rebuilds all
// that it makes.
#ifndef TESSERA_MENU_H
#define TESSERA_MENU_H

#include "model/program/seconds.h"

typedef struct MenuItem {
  uint8_t of[SAVED_COUNT]; // Policy
  int64_t resident;        // bytes that stay from the forward to the backward pass
  int64_t copied;          // bytes to the host, and back
  double seconds;          // of ops that run again, and that copies take from the others
} MenuItem;

typedef struct Menu {
  MenuItem
      *item; // [n], none at least as costly as another in all three, ascending by seconds; item[0] keeps all it may
  int n;
} Menu;

// Which policies may be chosen.
typedef struct MenuRules {
  uint8_t pinned[SAVED_COUNT]; // Policy, or POLICY_COUNT: any that it can have
  int offload;                 // 0: nothing is offloaded but what is pinned so
  int64_t least_copy;          // bytes: what is smaller stays instead
} MenuRules;

// The menu of a layer of a finished program that was recorded with everything kept. Free with menu_free.
Menu menu_new(const Program *kept, int layer, const Costs *costs, const MenuRules *rules);
void menu_free(Menu *m);
#endif
