# crpc is one header: there is nothing to build before using it. This file builds and runs the
# examples, the tests and the checks, all under build/. `make help` lists what there is.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SECONDARY:
MAKEFLAGS += --no-builtin-rules
export PYTHONDONTWRITEBYTECODE := 1

ifeq ($(origin CC),default)
CC := gcc
endif
ifeq ($(origin CXX),default)
CXX := g++
endif
PREFIX ?= /usr/local
JOBS ?= $(shell nproc)

# What narrows a test run:
T ?=#       T="frame loop": only programs whose name holds one of these
FILTER ?=#  FILTER='*late*': only the tests of these names
SEED ?=#    SEED=n: the order and the random numbers of an earlier run
J ?= 1#     J=n: programs at a time

# V=1 shows the commands.
V ?=
Q := $(if $(V),,@)

B := build
T_DIR := crpc_impl_tests
VERSION := $(shell sed -n 's/^\#define CRPC_VERSION "\(.*\)"/\1/p' crpc.h)

# The ZooKeeper client comes with two drivers. libzookeeper_mt has threads of its own and wants
# THREADED defined; libzookeeper_st is driven by the loop. Its -dev package conflicts with the other
# one, so the runtime library is linked by its file name, with the same headers.
FLAGS_mt := -DTHREADED
FLAGS_st := -DCRPC_ZOOKEEPER_ST=1
FLAGS_none := -DCRPC_ENABLE_ZOOKEEPER=0
LIBS_mt := -lprotobuf-nanopb -lzookeeper_mt -lpthread
LIBS_st := -lprotobuf-nanopb -l:libzookeeper_st.so.2 -lpthread
LIBS_none := -lprotobuf-nanopb -lpthread

# Runs another target of this file in parallel, after the set-up.
SUB = $(MAKE) --no-print-directory $(if $(findstring -j,$(MAKEFLAGS)),,-j$(JOBS))

.PHONY: help
help: ## this list
	@awk -F' ## ' '/^[a-z-]+:.* ## / { sub(/:.*/, "", $$1); printf "make %-14s %s\n", $$1, $$2 }' \
	  Makefile bench/bench.mk

.PHONY: setup
setup: ## install the Debian packages that all of this needs
	@$(T_DIR)/setup.sh all

# --- generated code -----------------------------------------------------------------------
# A .proto gives nanopb's X.pb.h/.c and crpc's X.crpc.h/.c. Those of the tests go to
# build/gen/tests/, those of examples/DIR to build/gen/examples/DIR/.

GEN := $(B)/gen
NANOPB_PROTO := /usr/lib/python3/dist-packages/proto# where nanopb.proto is

TEST_PROTOS := $(wildcard $(T_DIR)/proto/*.proto)
EXAMPLE_PROTOS := $(wildcard examples/*/*.proto)
OPTIONS := $(wildcard $(T_DIR)/proto/*.options examples/*/*.options)

TEST_GEN := $(TEST_PROTOS:$(T_DIR)/proto/%.proto=$(GEN)/tests/%)
EXAMPLE_GEN := $(EXAMPLE_PROTOS:%.proto=$(GEN)/%)

# Run where the .proto is: nanopb looks for X.options there. The touch covers a .proto without a
# service, for which the plugin need not write anything.
define protoc
	@mkdir -p $(@D)
	@echo "  protoc  $<"
	$(Q)cd $(<D) && protoc -I. -I$(NANOPB_PROTO) --plugin=protoc-gen-crpc=$(CURDIR)/protoc-gen-crpc \
	  --nanopb_out=$(CURDIR)/$(@D) --crpc_out=$(CURDIR)/$(@D) $(<F)
	@cd $(@D) && touch $(*F).pb.h $(*F).pb.c $(*F).crpc.h $(*F).crpc.c
endef

$(GEN)/tests/%.pb.h $(GEN)/tests/%.pb.c $(GEN)/tests/%.crpc.h $(GEN)/tests/%.crpc.c: \
    $(T_DIR)/proto/%.proto protoc-gen-crpc $(OPTIONS)
	$(protoc)

$(GEN)/examples/%.pb.h $(GEN)/examples/%.pb.c $(GEN)/examples/%.crpc.h $(GEN)/examples/%.crpc.c: \
    examples/%.proto protoc-gen-crpc $(OPTIONS)
	$(protoc)

# --- tests ----------------------------------------------------------------------------------
# test_*.c and system/sys_*.c define CRPC_IMPLEMENTATION and are a program each. A line
# `crpc-test-flags: ...` in a source adds to its compiler command.

WARN := -Wall -Wextra -Wshadow -Wundef -Wstrict-prototypes -Wwrite-strings -Werror
# Sanitizers make gcc see uninitialised variables where there are none.
TEST_CFLAGS := -std=c99 -D_GNU_SOURCE -DCRPC_DEBUG=1 -g -fno-omit-frame-pointer $(WARN) -Wno-maybe-uninitialized \
  -I. -I$(T_DIR) -I$(GEN)/tests
ASAN := -Og -fsanitize=address,undefined -fno-sanitize-recover=all
TSAN := -O1 -fsanitize=thread

# Rules that test-tsan leaves out of the implementation, one at a time, with -DCRPCI_MUTANT_<name>=1.
# A tsan_*.c that must notice names them in a line `crpc-test-mutants: ...`.
MUTANTS := P4_HANDOVER P6_KICK P7_CLOSE

# Only the sources that T selects.
select = $(if $(T),$(foreach t,$(T),$(foreach s,$(1),$(if $(findstring $(t),$(s:$(T_DIR)/%=%)),$(s)))),$(1))

UNIT_SRC := $(sort $(call select,$(wildcard $(T_DIR)/test_*.c)))
SYSTEM_SRC := $(sort $(call select,$(wildcard $(T_DIR)/system/sys_*.c)))
TSAN_SRC := $(sort $(call select,$(wildcard $(T_DIR)/tsan_*.c)))
SCRIPTS := $(sort $(call select,$(wildcard $(T_DIR)/plugin/run.py $(T_DIR)/check_*.sh \
  $(T_DIR)/check_*.py $(T_DIR)/system/*.sh $(T_DIR)/system/*.py bench/press/*_test.py)))
# Helpers that scripts share begin with an underscore.
SCRIPTS := $(foreach s,$(SCRIPTS),$(if $(filter _%,$(notdir $(s))),,$(s)))

UNIT_BIN := $(UNIT_SRC:$(T_DIR)/%.c=$(B)/test/%)
SYSTEM_BIN := $(foreach d,mt st,$(SYSTEM_SRC:$(T_DIR)/system/%.c=$(B)/system/%.$(d)))
TSAN_BIN := $(TSAN_SRC:$(T_DIR)/%.c=$(B)/tsan/%)
# MUTANT/PROGRAM for the programs that name it, else MUTANT/none, which the runner reports.
mutant_programs = $(or $(patsubst $(T_DIR)/%.c,%,$(shell grep -lsw 'crpc-test-mutants:.*$(1)' /dev/null $(TSAN_SRC))),none)
MUTANT_BIN := $(foreach m,$(MUTANTS),$(addprefix $(B)/mutant/$(m)/,$(call mutant_programs,$(m))))

TEST_GEN_C := $(foreach g,$(TEST_GEN),$(g).pb.c $(g).crpc.c)
TEST_GEN_H := $(foreach g,$(TEST_GEN),$(g).pb.h $(g).crpc.h)

$(B)/obj/asan/%.o: SANITIZE = $(ASAN)
$(B)/obj/tsan/%.o: SANITIZE = $(TSAN)
define compile_generated
	@mkdir -p $(@D)
	@echo "  cc      $@"
	$(Q)$(CC) $(TEST_CFLAGS) $(SANITIZE) -c $< -o $@
endef
$(B)/obj/asan/%.o: $(GEN)/tests/%.c crpc.h $(TEST_GEN_H)
	$(compile_generated)
$(B)/obj/tsan/%.o: $(GEN)/tests/%.c crpc.h $(TEST_GEN_H)
	$(compile_generated)

# What the tests' .proto files give, as a library: a program takes from it what it uses.
define archive
	@mkdir -p $(@D)
	@rm -f $@
	$(Q)ar rcs $@ $^
endef
$(B)/obj/libgen-asan.a: $(TEST_GEN_C:$(GEN)/tests/%.c=$(B)/obj/asan/%.o)
	$(archive)
$(B)/obj/libgen-tsan.a: $(TEST_GEN_C:$(GEN)/tests/%.c=$(B)/obj/tsan/%.o)
	$(archive)

# The old program goes first, so that a test which no longer compiles cannot pass.
define test_program
	@mkdir -p $(@D)
	@rm -f $@
	@echo "  cc      $@"
	$(Q)$(CC) $(TEST_CFLAGS) $(1) -MMD -MP -MF $@.d -MT $@ $< -o $@ $(2) -lcmocka \
	  $$(sed -n 's/.*crpc-test-flags: *\([^*]*\).*/\1/p' $<)
endef
COMMON_DEPS := crpc.h $(T_DIR)/crpc_test.h Makefile
$(B)/test/%: $(T_DIR)/%.c $(B)/obj/libgen-asan.a $(COMMON_DEPS)
	$(call test_program,$(ASAN) $(FLAGS_mt),$(B)/obj/libgen-asan.a $(LIBS_mt))
$(B)/system/%.mt: $(T_DIR)/system/%.c $(B)/obj/libgen-asan.a $(COMMON_DEPS)
	$(call test_program,$(ASAN) $(FLAGS_mt),$(B)/obj/libgen-asan.a $(LIBS_mt))
$(B)/system/%.st: $(T_DIR)/system/%.c $(B)/obj/libgen-asan.a $(COMMON_DEPS)
	$(call test_program,$(ASAN) $(FLAGS_st),$(B)/obj/libgen-asan.a $(LIBS_st))
$(B)/tsan/%: $(T_DIR)/%.c $(B)/obj/libgen-tsan.a $(COMMON_DEPS)
	$(call test_program,$(TSAN) $(FLAGS_mt),$(B)/obj/libgen-tsan.a $(LIBS_mt))
define mutant_rule
$(B)/mutant/$(1)/%: $(T_DIR)/%.c $(B)/obj/libgen-tsan.a $(COMMON_DEPS)
	$$(call test_program,$(TSAN) $(FLAGS_mt) -DCRPCI_MUTANT_$(1)=1 -w,$(B)/obj/libgen-tsan.a $(LIBS_mt))
endef
$(foreach m,$(MUTANTS),$(eval $(call mutant_rule,$(m))))

-include $(wildcard $(B)/test/*.d $(B)/system/*.d $(B)/tsan/*.d $(B)/mutant/*/*.d)

.PHONY: build-test build-test-tsan
build-test: $(if $(filter %/netns.sh,$(SCRIPTS)),$(B)/system/sys_zookeeper.mt $(B)/system/sys_zookeeper.st)
# What runs the examples.
EXAMPLE_SCRIPTS := %/check_examples.sh %/coordination.sh %/fleet.py %/wire.py %/syscalls.py
build-test: $(UNIT_BIN) $(SYSTEM_BIN) $(if $(filter $(EXAMPLE_SCRIPTS),$(SCRIPTS)),build-examples)
build-test-tsan: $(TSAN_BIN) $(filter-out %/none,$(MUTANT_BIN))

# Builds what can be built, runs it, and counts the rest as failed.
build_tests = mkdir -p $(B); rm -f $(B)/$@-unbuilt; $(SUB) -k build-$@ || touch $(B)/$@-unbuilt
run_tests = CRPC_TEST_FILTER='$(FILTER)' $(T_DIR)/run_tests.py --build $(B) --log $(B)/log/$@ \
  --jobs $(J) $(addprefix --seed=,$(SEED)) $$([ ! -e $(B)/$@-unbuilt ] || echo --build-failed)

.PHONY: test
test: ## unit and system tests with ASan and UBSan; T="name ..." FILTER='*x*' SEED=n J=n narrow it
	@$(T_DIR)/setup.sh test
	+@$(build_tests)
	@$(run_tests) $(UNIT_BIN) $(SYSTEM_BIN) $(SCRIPTS)

# Without address randomisation where that is allowed: TSan's fixed memory layout can collide.
NO_ASLR = $(shell setarch -R true 2>/dev/null && echo 'setarch -R')

.PHONY: test-tsan
test-tsan: ## the threads' tests with TSan, and again with each of MUTANTS, which must fail
	@$(T_DIR)/setup.sh tsan
	+@$(build_tests)
	@$(run_tests) --prefix='$(NO_ASLR)' $(TSAN_BIN) $(MUTANT_BIN)

.PHONY: matrix
matrix: ## compile and link crpc.h: compilers, standards, toggles, static mode, sizes
	@$(T_DIR)/setup.sh matrix
	@$(T_DIR)/matrix.py --build $(B)/matrix --jobs $(JOBS)

.PHONY: lint
lint: ## the rules of the source: order, names, comments, data, samples; and that they can fail
	@$(T_DIR)/setup.sh lint
	+@$(SUB) -k generated >/dev/null || true
	@$(T_DIR)/lint.py --build $(B)/lint --include $(GEN)/tests \
	  $(addprefix --include ,$(sort $(dir $(EXAMPLE_GEN))))

.PHONY: generated
generated: $(TEST_GEN_H) $(foreach g,$(EXAMPLE_GEN),$(g).pb.h $(g).crpc.h)

# --- examples -------------------------------------------------------------------------------
# examples/DIR/NAME.c with a main becomes build/examples/NAME, compiled the way a user would: with
# what the .proto files of its directory give and the directory's files that have no main.

EXAMPLE_CFLAGS ?= -O2 -Wall -Wextra -Werror -ffunction-sections -fdata-sections -Wl,--gc-sections
EXAMPLES_WITHOUT_ZOOKEEPER := echo embedded_loop hand_table# these need nothing but libc at run time
EXAMPLE_SRC := $(wildcard examples/*/*.c)
EXAMPLE_MAIN := $(if $(EXAMPLE_SRC),$(shell grep -lw '^int main' $(EXAMPLE_SRC)))
EXAMPLE_BIN := $(addprefix $(B)/examples/,$(notdir $(basename $(EXAMPLE_MAIN))))

# $(1): DIR, $(2): NAME, $(3): the flags to use, mt or none
define example_rule
$(B)/examples/$(2): examples/$(1)/$(2).c \
    $(filter-out $(EXAMPLE_MAIN),$(filter examples/$(1)/%,$(EXAMPLE_SRC))) \
    $(foreach g,$(filter $(GEN)/examples/$(1)/%,$(EXAMPLE_GEN)),$(g).pb.c $(g).crpc.c) \
    | $(foreach g,$(filter $(GEN)/examples/$(1)/%,$(EXAMPLE_GEN)),$(g).pb.h $(g).crpc.h)
	@mkdir -p $$(@D)
	@rm -f $$@
	@echo "  cc      $$@"
	$(Q)$(CC) $(EXAMPLE_CFLAGS) $(FLAGS_$(3)) -I. -Iexamples/$(1) -I$(GEN)/examples/$(1) \
	  $$(filter %.c,$$^) -o $$@ $(LIBS_$(3))
$(B)/examples/$(2): crpc.h Makefile $(wildcard examples/$(1)/*.h)
endef
dir_of = $(notdir $(patsubst %/,%,$(dir $(1))))
$(foreach m,$(EXAMPLE_MAIN),$(eval $(call example_rule,$(call dir_of,$(m)),$(notdir $(basename $(m))),$(if $(filter $(EXAMPLES_WITHOUT_ZOOKEEPER),$(call dir_of,$(m))),none,mt))))

.PHONY: build-examples
build-examples: $(EXAMPLE_BIN)

.PHONY: examples
examples: ## build/examples/*: the programs of examples/, built as a user would
	@$(T_DIR)/setup.sh build
	+@$(SUB) build-examples

.PHONY: demo
demo: ## examples against a ZooKeeper of its own: register, find, call, fail over
	@$(T_DIR)/setup.sh demo
	+@$(SUB) -s build-examples
	@BUILD=$(CURDIR)/$(B) bash examples/demo.sh

.PHONY: interop
interop: ## echo with implementations that others wrote, fetched from a network
	@$(T_DIR)/setup.sh build
	+@$(SUB) -s build-examples
	@BUILD=$(CURDIR)/$(B) $(T_DIR)/interop/run.py

include bench/bench.mk

# --- install ---------------------------------------------------------------------------------

define PC
prefix=$(PREFIX)
includedir=$${prefix}/include
# Without ZooKeeper: pkg-config --variable=cflags_without_zookeeper crpc, and libs_...
cflags_without_zookeeper=-I$${includedir} $(FLAGS_none)
libs_without_zookeeper=$(LIBS_none)
# With the single-threaded client, driven by crpc's loop:
cflags_zookeeper_st=-I$${includedir} $(FLAGS_st)
libs_zookeeper_st=-lprotobuf-nanopb -lzookeeper_st -lpthread

Name: crpc
Description: remote procedure calls for embedded Linux, in one C header
Version: $(VERSION)
Cflags: -I$${includedir} $(FLAGS_mt)
Libs: $(LIBS_mt)
endef

.PHONY: install
install: ## crpc.h, protoc-gen-crpc and crpc.pc to PREFIX (/usr/local) under DESTDIR
	$(shell mkdir -p $(B))$(file >$(B)/crpc.pc,$(PC))
	install -d $(DESTDIR)$(PREFIX)/include $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/pkgconfig
	install -m 644 crpc.h $(DESTDIR)$(PREFIX)/include/crpc.h
	install -m 755 protoc-gen-crpc $(DESTDIR)$(PREFIX)/bin/protoc-gen-crpc
	install -m 644 $(B)/crpc.pc $(DESTDIR)$(PREFIX)/lib/pkgconfig/crpc.pc

.PHONY: uninstall
uninstall: ## remove what install put there
	rm -f $(DESTDIR)$(PREFIX)/include/crpc.h $(DESTDIR)$(PREFIX)/bin/protoc-gen-crpc \
	  $(DESTDIR)$(PREFIX)/lib/pkgconfig/crpc.pc

# --- the rest ----------------------------------------------------------------------------------

FORMATTED = $(shell git ls-files -co --exclude-standard '*.c' '*.h')

.PHONY: format
format: ## clang-format all C files in place
	clang-format -i $(FORMATTED)

.PHONY: format-check
format-check: ## what clang-format would change; reports only
	@for f in $(FORMATTED); do \
	  n=$$(clang-format $$f | diff $$f - | grep -c '^>'); [ $$n = 0 ] || echo "$$f: $$n lines"; done

.PHONY: clean
clean: ## remove build/
	rm -rf $(B)
