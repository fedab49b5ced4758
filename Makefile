# Builds ./train and everything around it. Two commands do everything, dependencies included:
#   make demo    draws a data set, trains on it for about three minutes, shows what the model learned
#   make test    the whole test suite
# Options, each with a build folder of its own: SANITIZE=1 (ASan + UBSan), SANITIZE=thread (ThreadSanitizer),
# COVERAGE=1 (gcov). And CC=....

ifeq ($(origin CC),default)
CC := gcc
endif
export PYTHON ?= /usr/bin/python3
BUILD := build$(if $(filter thread,$(SANITIZE)),-thread,$(if $(SANITIZE),-sanitize))$(if $(COVERAGE),-coverage)

.PHONY: all clean demo demo-emoji demo-icons deps format help lint probes
all: train

# ---- probes: what there is to build with ----
# Asked once and kept in BUILD/probes.mk; asked again when something was missing, or the compiler, its flags or nvcc
# change. The CUDA backend is built where nvcc is and its libraries link; without it, or with CUDA=0, the binary runs on
# the CPU alone. Sanitizers and coverage look at host code.
CUDA_SOURCES := $(if $(SANITIZE)$(COVERAGE)$(filter 0,$(CUDA)),,$(wildcard kernels/cuda/*.cu))
ifeq ($(filter deps clean format help,$(MAKECMDGOALS)),)
PROBES := $(BUILD)/probes.mk
PROBE_KEY := $(CC) $(shell $(CC) -dumpfullversion 2>/dev/null) $(CFLAGS)
PROBE_KEY := $(strip $(PROBE_KEY) $(shell command -v mpicc) $(if $(CUDA_SOURCES),$(shell command -v nvcc)))
$(eval $(file < $(PROBES)))
ifneq ($(PROBED)$(PROBES_INCOMPLETE),$(PROBE_KEY))
$(shell CC='$(CC) $(CFLAGS)' CUDA='$(if $(CUDA_SOURCES),yes)' scripts/probe.sh '$(PROBE_KEY)' $(PROBES))
$(eval $(file < $(PROBES)))
endif
endif

define GCC_MISSING
if command -v $(firstword $(CC)) >/dev/null; then \
  echo "error: $(CC) is too old: it says it is gcc $$(echo __GNUC__ | $(CC) -E -P -), 11 or newer is needed;" \
    "make CC=... takes another"; \
else \
  echo "error: there is no compiler $(firstword $(CC)); 'make deps' installs gcc, make CC=... takes another"; \
fi
endef
FOUND := openblas $(or $(HAVE_OPENBLAS),NO), cjson $(or $(HAVE_CJSON),NO), pcre2 $(or $(HAVE_PCRE2),NO),
FOUND += stb $(or $(HAVE_STB),NO), openmp $(or $(HAVE_OPENMP),NO), mpi $(if $(HAVE_MPI),yes,no),
FOUND += cuda $(or $(HAVE_CUDA),no),
FOUND += cmocka $(or $(HAVE_CMOCKA),NO) (tests only)
LIBRARIES_MISSING := $(strip $(foreach library,OPENBLAS CJSON PCRE2 STB OPENMP,$(if $(HAVE_$(library)),,$(library))))
probes:
	@$(if $(HAVE_CC),:,$(GCC_MISSING); exit 2)
	@echo '$(FOUND)'
	@test -n "$(HAVE_CUDA)" -o -z "$(CUDA_SOURCES)" || ! command -v nvcc >/dev/null || \
	  echo "no CUDA backend: nvcc is there, but what it compiles does not link with libcudart_static"
	@$(if $(LIBRARIES_MISSING),echo "error: a library is missing (NO above); 'make deps' installs all of them"; exit 2)

# ---- flags ----
# -Wvla: no array on a stack is sized by what a config says.
WARN := -Wall -Wextra -Wvla -Werror
OPT := -O2
# NaN and infinity must be seen, so no -ffast-math.
KERNEL_OPT := -O3 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math
ifneq ($(SANITIZE)$(COVERAGE),)
OPT := -O1
KERNEL_OPT := $(subst -O3,-O1,$(KERNEL_OPT))
endif
# Billions of initial weights are drawn and split for a large model: by vectors. No product is fused with a sum, so that
# they have the same bits on every CPU.
WEIGHTS_OPT := $(subst -O2,-O3 -march=native -fno-math-errno,$(OPT)) -ffp-contract=off
INSTRUMENT := $(if $(COVERAGE),--coverage -fprofile-update=atomic)
ifeq ($(SANITIZE),thread)
INSTRUMENT += -fsanitize=thread -fno-omit-frame-pointer
else ifdef SANITIZE
INSTRUMENT += -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
endif
CFLAGS_ALL := -std=gnu11 -D_GNU_SOURCE -I. -MMD -MP -g -fopenmp $(WARN) $(INSTRUMENT) $(CFLAGS)
LIBS := -lopenblas -lcjson -lpcre2-8 -lm -lpthread -ldl
# Compute capabilities to build for: 90a is Hopper (H100, H200); plain 90 has none of Hopper's matrix instructions. make
# CUDA_ARCH="80 89 90a" adds others.
CUDA_ARCH ?= 90a
# Registers that spill to memory are an error, and so is a wgmma that ptxas serialises (nvcc_strict.sh).
NVCC_FLAGS := -std=c++17 -I. -O3 -lineinfo -MMD -MP -Xcompiler -Wall,-Wextra,-Werror -Werror all-warnings \
  -Xptxas -warn-spills,-Werror
NVCC_FLAGS += $(foreach arch,$(CUDA_ARCH:90=90a),-gencode=arch=compute_$(arch),code=sm_$(arch))

# ---- the engine ----
ENGINE := $(wildcard base/*.c data/*.c model/*.c model/*/*.c trainer/*.c trainer/*/*.c kernels/*.c kernels/cpu/*.c)
OBJ := $(ENGINE:%.c=$(BUILD)/%.o)
ifdef HAVE_CUDA
OBJ += $(CUDA_SOURCES:%.cu=$(BUILD)/%.o)
CFLAGS_ALL += -DTESSERA_CUDA
LIBS += $(CUDA_LIBS)
endif
# The same engine in double precision, for central differences.
OBJ64 := $(ENGINE:%.c=$(BUILD)/f64/%.o)
REAL64 := -DTESSERA_REAL=double -DTESSERA_DOUBLE -UTESSERA_CUDA

define COMPILE
@mkdir -p $(@D)
$(CC) $(CFLAGS_ALL) $(OPT) -c -o $@ $<
endef
LINK = $(CC) $(CFLAGS_ALL) -o $@ $(filter %.o,$^) $(LIBS)

$(BUILD)/train: $(BUILD)/train.o $(OBJ) | probes
	$(LINK)
ifeq ($(SANITIZE)$(COVERAGE),)
train: $(BUILD)/train
	@cp -f $< $@
else
.PHONY: train
train: $(BUILD)/train
endif

$(BUILD)/%.o: %.c | probes
	$(COMPILE)
$(BUILD)/f64/%.o: %.c | probes
	$(COMPILE)
$(BUILD)/kernels/cuda/%.o: kernels/cuda/%.cu | probes
	@mkdir -p $(@D)
	scripts/nvcc_strict.sh $(NVCC_FLAGS) -c -o $@ $<
$(BUILD)/f64/%.o: CFLAGS_ALL += $(REAL64)
$(BUILD)/kernels/cpu/%.o $(BUILD)/f64/kernels/cpu/%.o: OPT := $(KERNEL_OPT)
$(addprefix $(BUILD)/,base/normals.o model/params.o kernels/master.o): OPT := $(WEIGHTS_OPT)
# The one file that knows MPI, whose library it loads by name.
ifdef HAVE_MPI
$(BUILD)/base/ranks.o $(BUILD)/f64/base/ranks.o: CFLAGS_ALL += -DTESSERA_MPI='"$(HAVE_MPI)"' $(MPI_FLAGS)
endif

include tests/Makefile.inc

# ---- demos ----
# Drawn shapes on a CPU; where there is a GPU, the small model on icons.
demo: deps-demo
	@$(MAKE) --no-print-directory train
	@scripts/demo.sh

demo-icons: deps-icons
	@$(MAKE) --no-print-directory train
	@scripts/demo.sh icons

demo-emoji: deps-emoji
	@$(MAKE) --no-print-directory train
	@scripts/demo.sh emoji

deps: deps-test deps-emoji
deps-%:
	@scripts/deps.sh $*

# ---- upkeep ----
ROOMS := base data model model/config model/program model/files trainer trainer/output kernels kernels/cpu \
  kernels/cpu/reference kernels/cuda tests/unit tests/ops tests/gpu tests/scripts tests/fuzz
FORMATTED := train.c $(foreach room,$(ROOMS),$(wildcard $(room)/*.[ch] $(room)/*.cu))
format:
	clang-format -i $(FORMATTED)
lint: | probes
	clang-format --dry-run -Werror $(FORMATTED)
	clang-tidy --quiet $(filter %.c,$(filter-out data/stb.c tests/%,$(FORMATTED))) -- -std=gnu11 -D_GNU_SOURCE -I. -fopenmp
clean:
	rm -rf build build-sanitize build-thread build-coverage build-fuzz train
help:
	@sed -n '/^#/!q; s/^# //p' Makefile
	@sed -n '/^| `make[` ]/s/^| \(.*\) | \(.*\) |$$/  \1: \2/p' README.md | tr -d '`'

-include $(shell find $(BUILD) $(FUZZ_BUILD) -name '*.d' 2>/dev/null)
