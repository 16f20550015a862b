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

# Debian 13 and Ubuntu 24.04 have nanopb's headers in a directory of their own, Debian 12 has them in
# /usr/include. gcc and clang search the directories named here as they search /usr/include, also when
# a script runs them; one that does not exist does no harm.
NANOPB_INCLUDE := /usr/include/nanopb
export C_INCLUDE_PATH := $(if $(C_INCLUDE_PATH),$(C_INCLUDE_PATH):)$(NANOPB_INCLUDE)
export CPLUS_INCLUDE_PATH := $(if $(CPLUS_INCLUDE_PATH),$(CPLUS_INCLUDE_PATH):)$(NANOPB_INCLUDE)
# The directory of nanopb.proto. The plugin is asked once, by the first recipe that needs it.
NANOPB_PROTO = $(eval NANOPB_PROTO := $$(shell ./protoc-gen-crpc --nanopb-proto))$(NANOPB_PROTO)

# $(call SUB,TARGETS) builds targets of this file in parallel, after the set-up. Each step says which
# of how many it is: a dry run counts them first.
SUB = total=$$($(MAKE) -n -k --no-print-directory $(1) 2>/dev/null | grep -c '^echo "  '); \
  $(MAKE) --no-print-directory $(if $(findstring -j,$(MAKEFLAGS)),,-j$(JOBS)) TOTAL=$$total $(1)
STEPS :=# one word for each step so far
step = $(eval STEPS += x)echo "  $(if $(TOTAL),$(words $(STEPS)) of $(TOTAL)  )$(1)"

.PHONY: help
help: ## print this list
	@awk -F' ## ' '/^[a-z-]+:.* ## / { sub(/:.*/, "", $$1); printf "make %-14s %s\n", $$1, $$2 }' \
	  Makefile bench/bench.mk

.PHONY: setup
setup: ## install the Debian packages that these targets need
	@$(T_DIR)/setup.sh all

# --- generated code -----------------------------------------------------------------------
# A .proto gives nanopb's X.pb.h/.c and crpc's X.crpc.h/.c. Those of the tests go to
# build/gen/tests/, those of examples/DIR to build/gen/examples/DIR/.

GEN := $(B)/gen

TEST_PROTOS := $(wildcard $(T_DIR)/proto/*.proto)
EXAMPLE_PROTOS := $(wildcard examples/*/*.proto)
OPTIONS := $(wildcard $(T_DIR)/proto/*.options examples/*/*.options)

TEST_GEN := $(TEST_PROTOS:$(T_DIR)/proto/%.proto=$(GEN)/tests/%)
EXAMPLE_GEN := $(EXAMPLE_PROTOS:%.proto=$(GEN)/%)

# Run where the .proto is: nanopb looks for X.options there. The touch covers a .proto without a
# service, for which the plugin need not write anything.
define protoc
	@mkdir -p $(@D)
	@$(call step,protoc  $<)
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
MUTANT_BIN := $(if $(T),$(filter-out %/none,$(MUTANT_BIN)),$(MUTANT_BIN))

TEST_GEN_C := $(foreach g,$(TEST_GEN),$(g).pb.c $(g).crpc.c)
TEST_GEN_H := $(foreach g,$(TEST_GEN),$(g).pb.h $(g).crpc.h)

$(B)/obj/asan/%.o: SANITIZE = $(ASAN)
$(B)/obj/tsan/%.o: SANITIZE = $(TSAN)
define compile_generated
	@mkdir -p $(@D)
	@$(call step,cc      $@)
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
	@$(call step,cc      $@)
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
EXAMPLE_SCRIPTS := %/check_examples.sh %/coordination.sh %/fleet.py %/lease.py %/wire.py %/syscalls.py
build-test: $(UNIT_BIN) $(SYSTEM_BIN) $(if $(filter $(EXAMPLE_SCRIPTS),$(SCRIPTS)),build-examples)
build-test-tsan: $(TSAN_BIN) $(filter-out %/none,$(MUTANT_BIN))

# Builds what can be built, runs it, and counts the rest as failed.
build_tests = mkdir -p $(B); rm -f $(B)/$@-unbuilt; $(call SUB,-k build-$@) || touch $(B)/$@-unbuilt
run_tests = CRPC_TEST_FILTER='$(FILTER)' $(T_DIR)/run_tests.py --build $(B) --log $(B)/log/$@ \
  --jobs $(J) $(addprefix --seed=,$(SEED)) $$([ ! -e $(B)/$@-unbuilt ] || echo --build-failed)

.PHONY: test
test: ## run unit and system tests with ASan and UBSan; T="name ...", FILTER='*x*', SEED=n, J=n
	@$(T_DIR)/setup.sh test
	+@$(build_tests)
	@$(run_tests) $(UNIT_BIN) $(SYSTEM_BIN) $(SCRIPTS)

# Without address randomisation where that is allowed: TSan's fixed memory layout can collide.
NO_ASLR = $(shell setarch -R true 2>/dev/null && echo 'setarch -R')

.PHONY: test-tsan
test-tsan: ## run the threads' tests with TSan, then with one rule of crpc left out, which must fail
	@$(T_DIR)/setup.sh tsan
	+@$(build_tests)
	@$(run_tests) --prefix='$(NO_ASLR)' $(TSAN_BIN) $(MUTANT_BIN)

.PHONY: matrix
matrix: ## compile and link crpc.h: compilers, standards, toggles, static mode; print sizes
	@$(T_DIR)/setup.sh matrix
	@$(T_DIR)/matrix.py --build $(B)/matrix --jobs $(JOBS)

.PHONY: models
models: ## explore models of the protocols whole with spin, then with one rule left out, which must fail
	@$(T_DIR)/setup.sh models
	@$(T_DIR)/models/models.py --build $(B)/models

.PHONY: lint
lint: ## check order, names, comments, data and samples, and that each check can fail
	@$(T_DIR)/setup.sh lint
	+@$(call SUB,-k generated) >/dev/null || true
	@$(T_DIR)/lint.py --build $(B)/lint --include $(GEN)/tests \
	  $(addprefix --include ,$(sort $(dir $(EXAMPLE_GEN))))

.PHONY: generated
generated: $(TEST_GEN_H) $(foreach g,$(EXAMPLE_GEN),$(g).pb.h $(g).crpc.h)

.PHONY: distros
distros: ## run demo and unit tests in bare Debian 12 and 13 and Ubuntu 24.04 (as root); SUITES="trixie"
	@$(T_DIR)/setup.sh distros
	@JOBS=$(JOBS) $(T_DIR)/distros.sh $(SUITES)

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
	@$$(call step,cc      $$@)
	$(Q)$(CC) $(EXAMPLE_CFLAGS) $(FLAGS_$(3)) -I. -Iexamples/$(1) -I$(GEN)/examples/$(1) \
	  $$(filter %.c,$$^) -o $$@ $(LIBS_$(3))
$(B)/examples/$(2): crpc.h Makefile $(wildcard examples/$(1)/*.h)
endef
dir_of = $(notdir $(patsubst %/,%,$(dir $(1))))
$(foreach m,$(EXAMPLE_MAIN),$(eval $(call example_rule,$(call dir_of,$(m)),$(notdir $(basename $(m))),$(if $(filter $(EXAMPLES_WITHOUT_ZOOKEEPER),$(call dir_of,$(m))),none,mt))))

.PHONY: build-examples
build-examples: $(EXAMPLE_BIN)

.PHONY: examples
examples: ## build the programs of examples/ as a user would: build/examples/*
	@$(T_DIR)/setup.sh build
	+@$(call SUB,build-examples)

.PHONY: demo
demo: ## run examples against a ZooKeeper of its own: register, find, call, fail over
	@$(T_DIR)/setup.sh demo
	+@$(call SUB,-s build-examples)
	@BUILD=$(CURDIR)/$(B) bash examples/demo.sh

INTEROP_ECHO := $(GEN)/examples/echo/echo
$(B)/interop/guarded_server: $(T_DIR)/interop/guarded_server.c $(INTEROP_ECHO).pb.c $(INTEROP_ECHO).crpc.c \
    crpc.h Makefile | $(INTEROP_ECHO).pb.h $(INTEROP_ECHO).crpc.h
	@mkdir -p $(@D)
	@rm -f $@
	@$(call step,cc      $@)
	$(Q)$(CC) $(EXAMPLE_CFLAGS) $(FLAGS_none) -I. -I$(dir $(INTEROP_ECHO)) $(filter %.c,$^) -o $@ $(LIBS_none)

.PHONY: interop
interop: ## run echo with implementations by others, which are fetched from the network
	@$(T_DIR)/setup.sh build
	+@$(call SUB,-s build-examples $(B)/interop/guarded_server)
	@BUILD=$(CURDIR)/$(B) $(T_DIR)/interop/run.py

include bench/bench.mk

# --- install ---------------------------------------------------------------------------------

define PC
prefix=$(PREFIX)
includedir=$${prefix}/include
# protoc --plugin=protoc-gen-crpc=$$(pkg-config --variable=plugin crpc); with --nanopb-proto the plugin
# prints the directory of nanopb.proto.
plugin=$${prefix}/bin/protoc-gen-crpc
# Debian 13 and Ubuntu 24.04 have nanopb's headers there, Debian 12 has them in /usr/include.
nanopb_includedir=$(NANOPB_INCLUDE)
# Without ZooKeeper: pkg-config --variable=cflags_without_zookeeper crpc, and libs_...
cflags_without_zookeeper=-I$${includedir} -I$${nanopb_includedir} $(FLAGS_none)
libs_without_zookeeper=$(LIBS_none)
# With the single-threaded client, driven by crpc's loop:
cflags_zookeeper_st=-I$${includedir} -I$${nanopb_includedir} $(FLAGS_st)
libs_zookeeper_st=-lprotobuf-nanopb -lzookeeper_st -lpthread

Name: crpc
Description: remote procedure calls for embedded Linux, in one C header
Version: $(VERSION)
Cflags: -I$${includedir} -I$${nanopb_includedir} $(FLAGS_mt)
Libs: $(LIBS_mt)
endef

define CMAKE
# find_package(crpc) defines
#
#   crpc::crpc                       crpc.h with libzookeeper_mt
#   crpc::crpc_zookeeper_st          crpc.h with libzookeeper_st, which needs no thread
#   crpc::crpc_without_zookeeper     crpc.h alone
#   crpc_generate(TARGET [ROOT DIR] FILE.proto...)
#
# Link a program with one of the first three, and define CRPC_IMPLEMENTATION in one of its files.
# crpc_generate adds nanopb's and crpc's code for .proto files to a program or library. A file is known
# to protoc by its path below ROOT, by default by its name alone, and X.options lies beside X.proto.

get_filename_component(CRPC_PREFIX "$${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
find_path(CRPC_NANOPB_INCLUDE_DIR pb.h PATH_SUFFIXES nanopb)
find_library(CRPC_NANOPB_LIBRARY protobuf-nanopb)
find_program(CRPC_PROTOC protoc)
find_program(CRPC_PLUGIN protoc-gen-crpc HINTS "$${CRPC_PREFIX}/bin")
if(NOT CRPC_NANOPB_INCLUDE_DIR OR NOT CRPC_NANOPB_LIBRARY)
  set(crpc_FOUND FALSE)
  set(crpc_NOT_FOUND_MESSAGE "pb.h or libprotobuf-nanopb is missing: install nanopb (libnanopb-dev)")
  return()
endif()

function(crpc_add_target name options libraries)
  if(NOT TARGET $${name})
    separate_arguments(options)
    separate_arguments(libraries)
    add_library($${name} INTERFACE IMPORTED)
    set_target_properties($${name} PROPERTIES
      INTERFACE_INCLUDE_DIRECTORIES "$${CRPC_PREFIX}/include;$${CRPC_NANOPB_INCLUDE_DIR}"
      INTERFACE_COMPILE_OPTIONS "$${options}"
      INTERFACE_LINK_LIBRARIES "$${CRPC_NANOPB_LIBRARY};$${libraries}")
  endif()
endfunction()
crpc_add_target(crpc::crpc "$(FLAGS_mt)" "$(filter-out -lprotobuf-nanopb,$(LIBS_mt))")
crpc_add_target(crpc::crpc_zookeeper_st "$(FLAGS_st)" "-lzookeeper_st -lpthread")
crpc_add_target(crpc::crpc_without_zookeeper "$(FLAGS_none)" "-lpthread")

function(crpc_generate target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "ROOT" "")
  if(NOT CRPC_PROTOC OR NOT CRPC_PLUGIN)
    message(FATAL_ERROR "crpc_generate: protoc or protoc-gen-crpc is not on the PATH")
  endif()
  execute_process(COMMAND "$${CRPC_PLUGIN}" --nanopb-proto OUTPUT_VARIABLE nanopb ERROR_VARIABLE error
    RESULT_VARIABLE failed OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(failed)
    message(FATAL_ERROR "crpc_generate: $${error}")
  endif()
  set(protos)
  foreach(proto IN LISTS arg_UNPARSED_ARGUMENTS)
    get_filename_component(proto "$${proto}" ABSOLUTE)
    list(APPEND protos "$${proto}")
  endforeach()
  set(out "$${CMAKE_CURRENT_BINARY_DIR}/$${target}.crpc")
  file(MAKE_DIRECTORY "$${out}")
  foreach(proto IN LISTS protos)
    get_filename_component(root "$${proto}" DIRECTORY)
    if(arg_ROOT)
      get_filename_component(root "$${arg_ROOT}" ABSOLUTE)
    endif()
    file(RELATIVE_PATH name "$${root}" "$${proto}")
    string(REGEX REPLACE "\\.proto$$" "" stem "$${name}")
    set(files "$${out}/$${stem}.pb.c" "$${out}/$${stem}.pb.h" "$${out}/$${stem}.crpc.c" "$${out}/$${stem}.crpc.h")
    set(options "$${root}/$${stem}.options")
    if(NOT EXISTS "$${options}")
      set(options)
    endif()
    # The plugin writes nothing for a file without services: touch makes the two empty files.
    add_custom_command(OUTPUT $${files} WORKING_DIRECTORY "$${root}" VERBATIM
      DEPENDS $${protos} $${options} "$${CRPC_PLUGIN}"
      COMMAND "$${CRPC_PROTOC}" -I. "-I$${nanopb}" "--plugin=protoc-gen-crpc=$${CRPC_PLUGIN}"
        "--nanopb_out=$${out}" "--crpc_out=$${out}" "$${name}"
      COMMAND "$${CMAKE_COMMAND}" -E touch $${files})
    target_sources($${target} PRIVATE $${files})
  endforeach()
  target_include_directories($${target} PUBLIC "$${out}")
endfunction()
endef

# A later 0.x with another x may change the interface.
define CMAKE_VERSION
set(PACKAGE_VERSION $(VERSION))
set(PACKAGE_VERSION_COMPATIBLE FALSE)
if("$${PACKAGE_FIND_VERSION_MAJOR}.$${PACKAGE_FIND_VERSION_MINOR}" VERSION_EQUAL $(basename $(VERSION))
    AND NOT PACKAGE_FIND_VERSION VERSION_GREATER PACKAGE_VERSION)
  set(PACKAGE_VERSION_COMPATIBLE TRUE)
endif()
if(PACKAGE_FIND_VERSION VERSION_EQUAL PACKAGE_VERSION)
  set(PACKAGE_VERSION_EXACT TRUE)
endif()
endef

# What is installed: FILE:MODE:PLACE below PREFIX.
INSTALLED := crpc.h:644:include/crpc.h protoc-gen-crpc:755:bin/protoc-gen-crpc \
  $(B)/crpc.pc:644:lib/pkgconfig/crpc.pc $(B)/crpc-config.cmake:644:lib/cmake/crpc/crpc-config.cmake \
  $(B)/crpc-config-version.cmake:644:lib/cmake/crpc/crpc-config-version.cmake

.PHONY: install
install: ## install crpc.h, protoc-gen-crpc, crpc.pc and CMake's files to PREFIX (/usr/local) under DESTDIR
	$(shell mkdir -p $(B))$(file >$(B)/crpc.pc,$(PC))
	$(file >$(B)/crpc-config.cmake,$(CMAKE))$(file >$(B)/crpc-config-version.cmake,$(CMAKE_VERSION))
	$(foreach i,$(INSTALLED),$(call install_one,$(subst :, ,$(i))))
define install_one
install -D -m $(word 2,$(1)) $(word 1,$(1)) $(DESTDIR)$(PREFIX)/$(word 3,$(1))

endef

.PHONY: uninstall
uninstall: ## remove what make install installed
	rm -f $(foreach i,$(INSTALLED),$(DESTDIR)$(PREFIX)/$(lastword $(subst :, ,$(i))))

# --- the rest ----------------------------------------------------------------------------------

FORMATTED = $(shell git ls-files -co --exclude-standard '*.c' '*.h')

.PHONY: format
format: ## clang-format all C files in place
	clang-format -i $(FORMATTED)

.PHONY: format-check
format-check: ## print what clang-format would change
	@for f in $(FORMATTED); do \
	  n=$$(clang-format $$f | diff $$f - | grep -c '^>'); [ $$n = 0 ] || echo "$$f: $$n lines"; done

.PHONY: clean
clean: ## remove build/
	rm -rf $(B)
