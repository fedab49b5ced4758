#include "trainer/costs.h"

#include "base/hash.h"
#include "base/ranks.h"
#include "kernels/backends.h"
#include "model/program/expected.h"
#include "model/program/seconds_file.h"
#include "model/transformer.h"
#include "trainer/group_rates.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

// A hash of the program's own file: another build may have other kernels. malloc'd.
static char *build_hash(void) {
  uint64_t hash = 0;
  struct stat st;
  int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
  void *at =
      fd >= 0 && fstat(fd, &st) == 0 ? mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0) : MAP_FAILED;
  if (fd >= 0) close(fd);
  if (at != MAP_FAILED) {
    hash = hash64(at, (size_t)st.st_size, 0);
    munmap(at, (size_t)st.st_size);
  }
  return xasprintf("%016" PRIx64, hash);
}

// What ops' times depend on besides what their classes say. malloc'd.
static char *sizes_text(const Config *c) {
  Dims d = dims_from_config(c, c->data.micro_batch_tokens, config_max_images(c) + 1);
  ConfigWay way[CONFIG_WAYS];
  char ways[CONFIG_WAYS * (sizeof way->word + 2)] = "";
  for (int i = 0, n = config_ways(c, way); i < n; i++)
    snprintf(ways + strlen(ways), sizeof ways - strlen(ways), ", %s", way[i].word);
  return xasprintf(
      "T %d, %d modulation rows, C %d, H %d, G %d, D %d, P %d, V %d, Z %d, L %d, text %d x %d of %d shared "
      "%d, image %d x %d of %d shared %d, packing %d, graph %d, pdl %d%s",
      d.T, d.segments, d.C, d.H, d.G, d.D, d.P, d.V, d.Z, d.L, d.K[TEXT], d.F[TEXT], d.E[TEXT], d.S[TEXT], d.K[IMAGE],
      d.F[IMAGE], d.E[IMAGE], d.S[IMAGE], c->kernels.packing, c->kernels.graph, c->kernels.pdl, ways);
}

typedef struct OwnKey {
  char *path, *build, *sizes, *processes;
  CostsKey key;
} OwnKey;

static OwnKey own_key(const Config *c, const Backend *b, const char *run) {
  OwnKey k = {xasprintf("%s/" COSTS_FILE, run),
              build_hash(),
              sizes_text(c),
              xasprintf("%d, %d of a host", c->processes, ranks_on_host()),
              {0}};
  const char *device = b->kernels(); // none: a plan for one that is not here
  k.key = (CostsKey){device[0] ? device : NULL, k.build, k.sizes, k.processes};
  return k;
}

static void own_key_free(OwnKey *k) {
  free(k->path);
  free(k->build);
  free(k->sizes);
  free(k->processes);
}

// Measures what depends on the machine alone: all processes do so together, since a host's devices may share its link.
static void measure_machine(Costs *costs, const Config *c, const Backend *b, int connected) {
  LinkRates link = b->link ? b->link() : (LinkRates){0};
  if (link.d2h > 0) costs->link = link; // else no device is open
  if (!connected) return;
  Backend own = *b; // with the collectives that training uses
  backend_choose(&own, c);
  double began = time_now();
  GroupRates group = group_rates_measure(&own);
  if (!group.measured) return;
  costs->group = group;
  log_info("collectives of %d processes: %.4g and %.4g GB/s, %.0f us each (measured in %.1f s)", c->processes,
           group.reduce / 1e9, group.gather / 1e9, 1e6 * group.latency, time_now() - began);
}

static Costs open_costs(const Config *c, const Backend *b, const char *run, int connected) {
  Extents extents = extents_expected(c, c->data.micro_batch_tokens);
  Costs costs = costs_new(b, &extents);
  if (!b->link && c->processes == 1) return costs;
  OwnKey k = own_key(c, b, run);
  int found = costs_load(&costs, &k.key, k.path);
  own_key_free(&k);
  costs.group.measured = found && c->processes > 1;
  if (ranks_any(!found)) measure_machine(&costs, c, b, connected);
  return costs;
}

Costs costs_open(const Config *c, const Backend *b, const char *run) {
  return open_costs(c, b, run, c->processes > 1);
}

Costs costs_open_plan(const Config *c, const Backend *b, const char *run) {
  Costs costs = open_costs(c, b, run, backend_join_for_plan(b, c));
  int is_open = b->link && b->kernels()[0];
  DeviceRates rates = is_open && !costs.n_classes ? b->rates() : (DeviceRates){0};
  if (rates.bytes > 0) costs.rates = rates;
  return costs;
}

int costs_keep(const Config *c, const Backend *b, const char *run, const Costs *costs, Error *err) {
  OwnKey k = own_key(c, b, run);
  int bad = costs_save(costs, &k.key, k.path, err);
  own_key_free(&k);
  return bad;
}
