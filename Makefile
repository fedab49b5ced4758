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

# ---- probes: what is there to build with, asked once and kept in BUILD/probes.mk ----
# The CUDA backend is built where nvcc is and its libraries link; without it, or with CUDA=0, the binary runs on the CPU
# alone. Sanitizers and coverage look at host code.
CUDA_SOURCES := $(if $(SANITIZE)$(COVERAGE)$(filter 0,$(CUDA)),,$(wildcard kernels/cuda/*.cu))
ifeq ($(filter deps clean format help,$(MAKECMDGOALS)),)
PROBES := $(BUILD)/probes.mk
PROBE_KEY := $(strip $(CC) $(shell $(CC) -dumpfullversion 2>/dev/null) $(CFLAGS) $(if $(CUDA_SOURCES),$(shell command -v nvcc)))
$(eval $(file < $(PROBES)))
ifneq ($(PROBED)$(PROBES_INCOMPLETE),$(PROBE_KEY))
$(shell CC='$(CC) $(CFLAGS)' CUDA='$(if $(CUDA_SOURCES),yes)' scripts/probe.sh '$(PROBE_KEY)' $(PROBES))
$(eval $(file < $(PROBES)))
endif
endif

# ---- flags ----
# No array on a stack is sized by what a config says.
WARN := -Wall -Wextra -Wvla -Werror
BASE := -std=gnu11 -D_GNU_SOURCE -I. -MMD -MP -g -fopenmp
OPT := -O2
# NaN and infinity must be seen, so no -ffast-math.
KERNEL_OPT := -O3 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math
INSTRUMENT := $(if $(COVERAGE),--coverage -fprofile-update=atomic)
ifeq ($(SANITIZE),thread)
INSTRUMENT += -fsanitize=thread -fno-omit-frame-pointer
else ifdef SANITIZE
INSTRUMENT += -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
endif
ifneq ($(SANITIZE)$(COVERAGE),)
OPT := -O1
KERNEL_OPT := -O1 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math
endif
CFLAGS_ALL := $(BASE) $(WARN) $(INSTRUMENT) $(CFLAGS)
# Compute capabilities to build for: 90a is Hopper (H100, H200); make CUDA_ARCH="80 89 90a" adds others.
CUDA_ARCH ?= 90a
# Plain 90 has none of Hopper's matrix instructions. Registers that spill to memory are an error, and so is a wgmma that
# ptxas serialises (nvcc_strict.sh).
NVCC_FLAGS := -std=c++17 -I. -O3 -lineinfo $(foreach arch,$(CUDA_ARCH:90=90a),-gencode=arch=compute_$(arch),code=sm_$(arch)) \
  -Xcompiler -Wall,-Wextra,-Werror -Werror all-warnings -Xptxas -warn-spills,-Werror
LIBS := -lopenblas -lcjson -lpcre2-8 -lm -lpthread

# ---- sources ----
ENGINE := $(wildcard base/*.c data/*.c model/*.c model/*/*.c trainer/*.c kernels/*.c)
KERNELS := $(wildcard kernels/cpu/*.c)
# Programs of tests/unit and tests/ops are built in BUILD/tests, their objects in the folders of their sources.
TEST_SOURCES := $(wildcard tests/unit/*.c tests/ops/*.c)
TESTS := $(patsubst %.c,%,$(notdir $(wildcard tests/unit/test_*.c tests/ops/test_*.c)))
OBJ := $(ENGINE:%.c=$(BUILD)/%.o) $(KERNELS:%.c=$(BUILD)/%.o)
ifdef HAVE_CUDA
OBJ += $(CUDA_SOURCES:%.cu=$(BUILD)/%.o)
CFLAGS_ALL += -DTESSERA_CUDA
LIBS += $(CUDA_LIBS)
endif
# The same engine in double precision, for central differences.
OBJ64 := $(ENGINE:%.c=$(BUILD)/f64/%.o) $(KERNELS:%.c=$(BUILD)/f64/%.o)
REAL64 := -DTESSERA_REAL=double -DTESSERA_DOUBLE -UTESSERA_CUDA
PRELOADED := $(wildcard tests/scripts/*.c)
TEST_HELPERS := $(filter-out tests/unit/test_%.c tests/ops/test_%.c tests/ops/bench_%.c tests/ops/dump_%.c,$(TEST_SOURCES))
F64_TESTS := $(patsubst tests/ops/%.c,%,$(wildcard tests/ops/test_*.c))
TEST_BINS := $(TESTS:%=$(BUILD)/tests/%) $(patsubst %,$(BUILD)/f64/tests/%,$(filter $(F64_TESTS),$(TESTS)))
TOOLS := $(patsubst tests/ops/%.c,$(BUILD)/tests/%,$(wildcard tests/ops/bench_*.c tests/ops/dump_*.c))
ifeq ($(SANITIZE),thread)
# OpenMP's runtime synchronizes out of ThreadSanitizer's sight: only what has threads of its own. One helper owns the
# allocator, which ThreadSanitizer does too.
THREADED_TESTS := test_base test_hostile test_loader test_saver test_source test_stream test_tokenizer
TEST_HELPERS := $(filter-out tests/unit/count_malloc.c,$(TEST_HELPERS))
TOOLS :=
endif

.PHONY: all demo demo-emoji demo-icons test test-long mutants test-gpu bench-gpu gpu-tests check-asan check-blas check-tsan coverage suite-coverage bench tests suite deps format lint clean help probes
all: train

ifeq ($(SANITIZE)$(COVERAGE),)
train: $(BUILD)/train
	@cp -f $< $@
else
.PHONY: train
train: $(BUILD)/train
endif

probes:
	@test -n "$(HAVE_CC)" || { \
	  if command -v $(firstword $(CC)) >/dev/null; then \
	    echo "error: $(CC) is too old: it says it is gcc $$(echo __GNUC__ | $(CC) -E -P -), 11 or newer is needed; make CC=... takes another"; \
	  else \
	    echo "error: there is no compiler $(firstword $(CC)); 'make deps' installs gcc, make CC=... takes another"; \
	  fi; exit 2; }
	@printf 'openblas %s, cjson %s, pcre2 %s, stb %s, openmp %s, cuda %s, cmocka %s (tests only)\n' "$(or $(HAVE_OPENBLAS),NO)" "$(or $(HAVE_CJSON),NO)" "$(or $(HAVE_PCRE2),NO)" "$(or $(HAVE_STB),NO)" "$(or $(HAVE_OPENMP),NO)" "$(or $(HAVE_CUDA),no)" "$(or $(HAVE_CMOCKA),NO)"
	@test -n "$(HAVE_CUDA)$(if $(CUDA_SOURCES),,cpu)" || ! command -v nvcc >/dev/null || \
	  echo "no CUDA backend: nvcc is there, but what it compiles does not link with libcudart_static"
	@test -n "$(HAVE_OPENBLAS)" -a -n "$(HAVE_CJSON)" -a -n "$(HAVE_PCRE2)" -a -n "$(HAVE_STB)" -a -n "$(HAVE_OPENMP)" || { \
	  echo "error: a library is missing (NO above); 'make deps' installs all of them"; exit 2; }

$(BUILD)/train: $(BUILD)/train.o $(OBJ) | probes
	$(CC) $(CFLAGS_ALL) -o $@ $(filter %.o,$^) $(LIBS)

# ---- objects ----
$(BUILD)/kernels/cpu/%.o: kernels/cpu/%.c | probes
	@mkdir -p $(@D)
	$(CC) $(CFLAGS_ALL) $(KERNEL_OPT) -c -o $@ $<
$(BUILD)/kernels/cuda/%.o: kernels/cuda/%.cu | probes
	@mkdir -p $(@D)
	scripts/nvcc_strict.sh $(NVCC_FLAGS) -MMD -MP -c -o $@ $<
$(BUILD)/f64/kernels/cpu/%.o: kernels/cpu/%.c | probes
	@mkdir -p $(@D)
	$(CC) $(CFLAGS_ALL) $(KERNEL_OPT) $(REAL64) -c -o $@ $<
$(BUILD)/f64/%.o: %.c | probes
	@mkdir -p $(@D)
	$(CC) $(CFLAGS_ALL) $(OPT) $(REAL64) -c -o $@ $<
$(BUILD)/%.o: %.c | probes
	@mkdir -p $(@D)
	$(CC) $(CFLAGS_ALL) $(OPT) -c -o $@ $<

# Billions of initial weights are drawn and split for a large model. No product is fused with a sum, so that they have
# the same bits on every CPU.
$(BUILD)/model/params.o $(BUILD)/kernels/master.o: \
  OPT := $(subst -O2,-O3 -march=native -ffp-contract=off -fno-math-errno,$(OPT))

# ---- tests ----
$(BUILD)/f64/tests/%: $(BUILD)/f64/tests/ops/%.o $(TEST_HELPERS:%.c=$(BUILD)/f64/%.o) $(OBJ64)
	$(CC) $(CFLAGS_ALL) -o $@ $(filter %.o,$^) $(LIBS) -lcmocka
$(BUILD)/tests/%: $(BUILD)/tests/ops/%.o $(TEST_HELPERS:%.c=$(BUILD)/%.o) $(OBJ)
	$(CC) $(CFLAGS_ALL) -o $@ $(filter %.o,$^) $(LIBS) -lcmocka
$(BUILD)/tests/%: $(BUILD)/tests/unit/%.o $(TEST_HELPERS:%.c=$(BUILD)/%.o) $(OBJ)
	$(CC) $(CFLAGS_ALL) -o $@ $(filter %.o,$^) $(LIBS) -lcmocka
# What compares the CUDA backend with the CPU's, or times it, is no cmocka program.
gpu_objects = $(patsubst %,$(BUILD)/tests/gpu/%.o,$(1))
CUDA_TESTS := $(patsubst %,$(BUILD)/tests/%,cuda_ops cuda_model cuda_large cuda_peer)
$(BUILD)/tests/cuda_ops: $(call gpu_objects,cuda_ops cuda_families cuda_update cuda_stability cuda_shapes)
$(BUILD)/tests/cuda_model: $(call gpu_objects,cuda_model cuda_shapes)
$(BUILD)/tests/cuda_large: $(call gpu_objects,cuda_large)
$(BUILD)/tests/cuda_peer: $(call gpu_objects,cuda_peer)
$(CUDA_TESTS): $(call gpu_objects,cuda_case cuda_bench) $(BUILD)/tests/ops/op_case.o $(OBJ)
	$(CC) $(CFLAGS_ALL) -o $@ $(filter %.o,$^) $(LIBS)
# Objects that only pattern rules ask for are kept too. No program is in the list: make would not rebuild one that is
# missing.
.SECONDARY: $(OBJ64) $(TEST_SOURCES:%.c=$(BUILD)/%.o) $(TEST_SOURCES:%.c=$(BUILD)/f64/%.o)
include tests/fuzz/Makefile.inc
ifeq ($(SANITIZE),thread)
TEST_BINS := $(THREADED_TESTS:%=$(BUILD)/tests/%)
endif

# Libraries that tests put before the program's own.
$(BUILD)/tests/%.so: tests/scripts/%.c | probes
	@mkdir -p $(@D)
	$(CC) -std=gnu11 -D_GNU_SOURCE $(WARN) -O1 -shared -fPIC -o $@ $< -ldl

tests: train $(TEST_BINS) $(TOOLS) $(PRELOADED:tests/scripts/%.c=$(BUILD)/tests/%.so)

# A make of its own for what needs libraries that were installed only now.
suite: tests
	@tests/run.sh $(BUILD) $(if $(filter thread,$(SANITIZE)),--threads,$(if $(SANITIZE),--sanitized)) $(TEST_BINS)

test: deps-test
	@$(MAKE) --no-print-directory suite

# About two hours on two cores. FUZZ_SECONDS=5 shortens the fuzzing.
test-long: deps-test
	@$(MAKE) --no-print-directory tests
	@$(MAKE) --no-print-directory SANITIZE=1 BUILD=$(BUILD)-sanitize \
	  $(BUILD)-sanitize/tests/test_hostile $(BUILD)-sanitize/tests/test_fuzz
	@FUZZ_SECONDS=$(FUZZ_SECONDS) FUZZ_CC="$(FUZZ_CC)" tests/run_long.sh $(BUILD) $(BUILD)-sanitize $(FUZZ_TARGETS)

# Does a test notice when a line is wrong? tests/scripts/mutants.txt, in a copy of the tree; SELECT="..." names some of them.
mutants: deps-test
	@MUTANTS_CC="$(CC)" $(PYTHON) tests/scripts/mutants.py $(BUILD) $(SELECT)

# Everything but training runs under ASan and UBSan.
check-asan: deps-test
	@$(MAKE) --no-print-directory SANITIZE=1 suite

# What computes with OpenBLAS, under each of its kinds of kernels that this processor runs.
check-blas: deps-test
	@$(MAKE) --no-print-directory tests
	@tests/ops/blas_kinds.sh $(BUILD)

# The loader and whatever else starts threads, under ThreadSanitizer.
check-tsan: deps-test
	@$(MAKE) --no-print-directory SANITIZE=thread suite

# Which lines of the host code the suite runs. Fails below 85%.
coverage: deps-test
	@$(MAKE) --no-print-directory COVERAGE=1 suite-coverage
suite-coverage: tests
	@find $(BUILD) -name '*.gcda' -delete
	@rc=0; tests/run.sh $(BUILD) $(TEST_BINS) || rc=1; \
	  $(PYTHON) tests/scripts/coverage.py $(BUILD) --at-least 85 || rc=1; exit $$rc

bench: deps-test
	@$(MAKE) --no-print-directory tests
	@tests/ops/bench.sh $(BUILD)

# The CUDA backend against the CPU's, and what a GPU run must keep to; exit code 77 of a script: no GPU, skipped.
test-gpu: gpu-tests
	@$(if $(HAVE_CUDA),tests/gpu/run_gpu.sh $(BUILD) || [ $$? -eq 77 ],echo 'test-gpu: SKIPPED: no CUDA backend without nvcc')

# Every op against its floor, then the engine against PyTorch on the same GPU. About ten minutes.
bench-gpu: gpu-tests
	@$(if $(HAVE_CUDA),$(BUILD)/tests/cuda_ops --bench && { $(PYTHON) tests/gpu/bench_gpu.py $(BUILD) || [ $$? -eq 77 ]; },echo 'bench-gpu: SKIPPED: no CUDA backend without nvcc')

gpu-tests: $(if $(HAVE_CUDA),train $(CUDA_TESTS) $(BUILD)/tests/cuda_calls.so)

# CUPTI is a part of the toolkit that some distributions leave out: then its test is skipped.
$(BUILD)/tests/cuda_calls.so: tests/gpu/cuda_calls.c | probes
	@mkdir -p $(@D)
	@rm -f $@
	@if echo '#include <cupti.h>' | nvcc -E -x cu - >/dev/null 2>&1; then \
	  nvcc --shared -Xcompiler -fPIC,-Wall,-Wextra -o $@ $< -lcupti; else echo 'no $@: there is no CUPTI'; fi

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
FORMATTED := $(wildcard train.c base/*.[ch] data/*.[ch] model/*.[ch] model/*/*.[ch] trainer/*.[ch] kernels/*.[ch] kernels/cpu/*.[ch] tests/*/*.[ch])
FORMATTED_CUDA := $(wildcard kernels/cuda/*.cu kernels/cuda/*.h)
format:
	clang-format -i $(FORMATTED) $(FORMATTED_CUDA)
lint: | probes
	clang-format --dry-run -Werror $(FORMATTED) $(FORMATTED_CUDA)
	clang-tidy --quiet $(filter %.c,$(filter-out data/stb.c tests/%,$(FORMATTED))) -- -std=gnu11 -D_GNU_SOURCE -I. -fopenmp
clean:
	rm -rf build build-sanitize build-thread build-coverage build-fuzz train
help:
	@sed -n '/^#/!q; s/^# //p' Makefile
	@sed -n '/^| `make[` ]/s/^| \(.*\) | \(.*\) |$$/  \1: \2/p' README.md | tr -d '`'

-include $(shell find $(BUILD) $(FUZZ_BUILD) -name '*.d' 2>/dev/null)
