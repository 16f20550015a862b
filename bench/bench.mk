# `make bench`: programs of all peers that the system has packages for, and bench/run.py. Included
# by the Makefile at the top.

BENCH := $(B)/bench
BENCH_PEERS := floor crpc tirpc zmq $(if $(QUICK),,nng thrift grpc capnp)
BENCH_CFLAGS := -O2 -std=gnu11 -ffunction-sections -fdata-sections -Wl,--gc-sections -Wall -Wextra -I. -Ibench/peers -I$(BENCH)/gen
BENCH_CXXFLAGS := -O2 -Wl,--as-needed -std=c++17 -Wall -Wextra -I. -Ibench/peers -I$(BENCH)/gen
BENCH_LIBS := -lpthread

# A peer consists of PEER_server and PEER_client, made from the sources of these names and of what is
# generated from the peer's definition of the echo.
BENCH_GEN = $(BENCH)/gen

.PHONY: bench build-bench
bench: ## measure crpc beside other RPC systems: build/bench/report.html; QUICK=1 measures less
	@$(T_DIR)/setup.sh build
	+@peers=; for p in $(BENCH_PEERS); do \
	    $(T_DIR)/setup.sh bench-$$p && peers="$$peers $$p"; done; \
	  $(call SUB,-k build-bench BENCH_PEERS="$$peers") || true
	@bench/run.py --build $(BENCH) $(if $(QUICK),--quick --budget 36)

build-bench: $(foreach p,$(BENCH_PEERS),$(BENCH)/$(p)_server $(BENCH)/$(p)_client)

# The old program goes first: one that no longer compiles must not be measured.
define bench_cc
	@mkdir -p $(@D)
	@rm -f $@
	@$(call step,cc      $@)
	$(Q)$(CC) $(BENCH_CFLAGS) $(1) $(filter %.c,$^) -o $@ $(2) $(BENCH_LIBS)
endef
define bench_cxx
	@mkdir -p $(@D)
	@rm -f $@
	@$(call step,c++     $@)
	$(Q)$(CXX) $(BENCH_CXXFLAGS) $(1) $(filter %.cc,$^) -o $@ $(2) $(BENCH_LIBS)
endef
define bench_generate
	@mkdir -p $(@D)
	@$(call step,gen     $<)
	$(Q)cd $(BENCH_GEN) && cp $(abspath $<) . && $(1)
endef

$(BENCH)/%: bench/bench.mk bench/peers/bench.h

$(BENCH)/floor_%: bench/peers/floor_%.c bench/peers/bench.h
	$(bench_cc)

BENCH_CRPC := $(BENCH_GEN)/echo.crpc.c $(BENCH_GEN)/echo.pb.c
$(BENCH_CRPC) &: bench/peers/echo.proto bench/peers/echo.options protoc-gen-crpc
	@mkdir -p $(@D)
	@$(call step,protoc  $<)
	$(Q)cd bench/peers && protoc -I. -I$(NANOPB_PROTO) \
	  --plugin=protoc-gen-crpc=$(CURDIR)/protoc-gen-crpc \
	  --nanopb_out=$(CURDIR)/$(@D) --crpc_out=$(CURDIR)/$(@D) echo.proto
$(BENCH)/crpc_%: bench/peers/crpc_%.c $(BENCH_CRPC) bench/peers/bench.h crpc.h
	$(call bench_cc,$(FLAGS_none),$(LIBS_none))

BENCH_TIRPC := $(BENCH_GEN)/tirpc_xdr.c $(BENCH_GEN)/tirpc_svc.c
$(BENCH_TIRPC) &: bench/peers/tirpc.x
	$(call bench_generate,rm -f tirpc.h tirpc_xdr.c tirpc_svc.c && \
	  rpcgen -h -o tirpc.h tirpc.x && rpcgen -c -o tirpc_xdr.c tirpc.x && \
	  rpcgen -m -o tirpc_svc.c tirpc.x)
$(BENCH)/tirpc_server: bench/peers/tirpc_server.c $(BENCH_TIRPC)
	$(call bench_cc,-w $(shell pkg-config --cflags libtirpc),-ltirpc)
$(BENCH)/tirpc_client: bench/peers/tirpc_client.c $(BENCH_GEN)/tirpc_xdr.c bench/peers/bench.h
	$(call bench_cc,-w $(shell pkg-config --cflags libtirpc),-ltirpc)

$(BENCH)/zmq_%: bench/peers/zmq_%.c bench/peers/bench.h
	$(call bench_cc,,-lzmq)

$(BENCH)/nng_%: bench/peers/nng_%.c bench/peers/bench.h
	$(call bench_cc,,-lnng)

$(BENCH_GEN)/gen-c_glib/bench_echo.c: bench/peers/thrift.thrift
	$(call bench_generate,thrift --gen c_glib thrift.thrift)
$(BENCH)/thrift_%: bench/peers/thrift_%.c $(BENCH_GEN)/gen-c_glib/bench_echo.c bench/peers/bench.h
	$(call bench_cc,-Wno-cast-function-type -Wno-unused-parameter -Wno-deprecated-declarations -Wno-unused-variable \
	  -Wno-unused-function -I$(BENCH_GEN)/gen-c_glib $(shell pkg-config --cflags thrift_c_glib) \
	  $(BENCH_GEN)/gen-c_glib/bench_thrift_types.c,$(shell pkg-config --libs thrift_c_glib))

# In a directory of its own: nanopb's header has the same name.
BENCH_GRPC := $(BENCH_GEN)/grpc/echo.pb.cc $(BENCH_GEN)/grpc/echo.grpc.pb.cc
$(BENCH_GRPC) &: bench/peers/echo.proto
	$(call bench_generate,protoc --plugin=protoc-gen-grpc=$$(command -v grpc_cpp_plugin) \
	  --cpp_out=grpc --grpc_out=grpc echo.proto)
$(BENCH)/grpc_%: bench/peers/grpc_%.cc $(BENCH_GRPC) bench/peers/bench.h
	$(call bench_cxx,-I$(BENCH_GEN)/grpc,$(shell pkg-config --libs grpc++ protobuf) -labsl_synchronization)

$(BENCH_GEN)/capnp.capnp.c++: bench/peers/capnp.capnp
	$(call bench_generate,capnp compile -oc++ capnp.capnp)
$(BENCH)/capnp_%: bench/peers/capnp_%.cc $(BENCH_GEN)/capnp.capnp.c++ bench/peers/bench.h
	$(call bench_cxx,$(BENCH_GEN)/capnp.capnp.c++,-lcapnp-rpc -lcapnp -lkj-async -lkj)

# --- load generator, instruction counts, footprint, allocations -----------------------------------
# Programs around the examples' echo service, compiled as a user would.

comma := ,
BENCH_ECHO := $(GEN)/examples/echo/echo
BENCH_ECHO_C := $(BENCH_ECHO).pb.c $(BENCH_ECHO).crpc.c
define bench_echo
	@mkdir -p $(@D)
	@rm -f $@
	@$(call step,cc      $@)
	$(Q)$(CC) -O2 -g -std=gnu99 -Wall -Wextra $(FLAGS_none) -I. -I$(dir $(BENCH_ECHO)) $(1) \
	  $(filter %.c,$^) -o $@ $(2) $(LIBS_none)
endef
BENCH_DEPS := $(BENCH_ECHO_C) $(BENCH_ECHO).pb.h $(BENCH_ECHO).crpc.h crpc.h bench/bench.mk
$(BENCH)/instructions: bench/instructions.c $(BENCH_DEPS)
	$(call bench_echo)
$(BENCH)/footprint: bench/footprint.c $(BENCH_DEPS)
	$(call bench_echo)
$(BENCH)/allocs: bench/allocs.c $(BENCH_DEPS)
	$(call bench_echo,,-Wl$(comma)--wrap=malloc$(comma)--wrap=calloc$(comma)--wrap=realloc)
$(BENCH)/attack_server: bench/attack/attack_server.c $(BENCH_DEPS)
	$(call bench_echo)
$(BENCH)/crpc_press: bench/press/crpc_press.c bench/press/hist.h crpc.h bench/bench.mk
	@mkdir -p $(@D)
	@rm -f $@
	@$(call step,cc      $@)
	$(Q)$(CC) -O2 -std=gnu99 -Wall -Wextra $(FLAGS_none) -I. $< -o $@ $(LIBS_none) -lm
$(BENCH)/hist_test: bench/press/hist_test.c bench/press/hist.h
	@mkdir -p $(@D)
	$(Q)$(CC) -O1 -g -std=gnu99 -Wall -Wextra -fsanitize=address,undefined $< -o $@ -lm

build-test: $(if $(filter %/press_test.py,$(SCRIPTS)),$(BENCH)/crpc_press $(BENCH)/hist_test \
  build-examples)
build-test: $(if $(filter %/system/attack.py,$(SCRIPTS)),$(BENCH)/attack_server $(BENCH)/crpc_press)

.PHONY: press
press: $(BENCH)/crpc_press ## build build/bench/crpc_press, a load generator for any baidu_std server

.PHONY: attack
attack: ## beset a server and measure honest calls meanwhile (40 minutes); QUICK=1 takes one, and judges less
	@$(T_DIR)/setup.sh build
	+@$(call SUB,$(BENCH)/attack_server $(BENCH)/crpc_press)
	@bench/attack/attack.py --build $(BENCH) $(if $(QUICK),--quick)

.PHONY: instructions
instructions: ## compare instructions of a call with bench/baseline; 3 % more fail; UPDATE=1 replaces the baseline
	@$(T_DIR)/setup.sh instructions
	+@$(call SUB,$(BENCH)/instructions)
	@bench/instructions.py $(if $(UPDATE),--update) $(BENCH)/instructions

.PHONY: size
size: ## compare code, data and memory with bench/baseline and ceilings; UPDATE=1 replaces the baseline
	@$(T_DIR)/setup.sh size
	+@$(call SUB,$(BENCH)/footprint $(B)/examples/echo_server)
	@bench/footprint.py $(if $(UPDATE),--update) --build $(B) --jobs $(JOBS)

.PHONY: allocs
allocs: ## check that warm calls of every form allocate nothing, on either side
	@$(T_DIR)/setup.sh build
	+@$(call SUB,$(BENCH)/allocs)
	@$(BENCH)/allocs
