#!/bin/bash
# Sees to the Debian packages that a purpose needs: setup.sh PURPOSE...
# Purposes: build demo test tsan lint matrix bench instructions size all; bench-PEER is one peer of
# the bench. Missing packages are installed when that is possible without asking (as root, or with a
# sudo that wants no password); else the one command to run is printed and the exit status is 1. Says
# nothing when there is nothing to do.
set -u
export LC_ALL=C # sort and comm must agree

build="gcc libc6-dev make libnanopb-dev nanopb protobuf-compiler python3 python3-protobuf
       libzookeeper-mt-dev pkg-config"
# zookeeper: the server and its start scripts. libslf4j-java: the server logs nothing without it.
server="zookeeper default-jre-headless libslf4j-java"
# libzookeeper-st2 is enough for the single-threaded driver: its -dev package conflicts with the
# other one and holds the same headers.
# libprotobuf-dev: google/protobuf/*.proto, which the tests of the generator import.
test="g++ binutils libcmocka-dev libprotobuf-dev libzookeeper-st2 strace python3-kazoo iproute2 util-linux"
lint="g++ clang clang-format universal-ctags binutils git libzookeeper-st2"

# bench PEER: what one peer of `make bench` needs.
bench() {
    case $1 in
        floor | crpc) ;;
        tirpc) echo libtirpc-dev rpcsvc-proto pkg-config ;;
        zmq) echo libzmq3-dev ;;
        nng) echo libnng-dev ;;
        thrift) echo thrift-compiler libthrift-c-glib-dev libglib2.0-dev pkg-config ;;
        grpc) echo g++ libgrpc++-dev protobuf-compiler-grpc libprotobuf-dev pkg-config ;;
        capnp) echo g++ capnproto libcapnp-dev pkg-config ;;
        *) return 1 ;;
    esac
}

need=
for purpose in "${@:-all}"; do
    case $purpose in
        build) need+=" $build" ;;
        demo) need+=" $build $server" ;;
        test) need+=" $build $server $test" ;;
        tsan) need+=" $build $server $test" ;;
        lint | matrix) need+=" $build $lint" ;;
        instructions) need+=" $build binutils valgrind" ;;
        size) need+=" $build binutils musl-tools gcc-arm-linux-gnueabihf libc6-dev-armhf-cross
                     gcc-mips-linux-gnu libc6-dev-mips-cross" ;;
        bench) need+=" $build binutils $(for p in tirpc zmq nng thrift grpc capnp; do bench $p; done)" ;;
        bench-*)
            need+=" $build binutils $(bench "${purpose#bench-}")" || {
                echo "setup.sh: no peer '${purpose#bench-}'" >&2
                exit 2
            }
            ;;
        all) need+=" $build $server $test $lint" ;;
        *)
            echo "setup.sh: no purpose '$purpose'" >&2
            exit 2
            ;;
    esac
done
need=$(printf '%s\n' $need | sort -u)

if ! command -v dpkg-query >/dev/null; then
    echo "setup.sh: this is not Debian; crpc needs the equivalents of:" $need >&2
    exit 0 # whatever is missing will be named by what needs it
fi

# The packages of $need that are not installed.
missing() {
    dpkg-query -W -f '${Package} ${Status}\n' $need 2>/dev/null |
        awk '$NF == "installed" { print $1 }' | sort -u | comm -13 - <(printf '%s\n' $need)
}

lacking=$(missing)
[ -z "$lacking" ] && exit 0

install="apt-get update && apt-get install -y --no-install-recommends $(echo $lacking)"
if [ "$(id -u)" = 0 ]; then
    run=(sh -c)
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    run=(sudo -n sh -c)
else
    printf 'Packages are missing. Run this, then try again:\n\n    sudo sh -c "%s"\n\n' "$install" >&2
    exit 1
fi

echo "installing:" $lacking
# Two of these may run at a time (make -j); the second finds nothing left to do.
exec 9>"${TMPDIR:-/tmp}/crpc-setup-$(id -u).lock"
flock 9
lacking=$(missing)
[ -z "$lacking" ] && exit 0
log=$(mktemp)
if ! "${run[@]}" "export DEBIAN_FRONTEND=noninteractive; $install" >"$log" 2>&1 </dev/null; then
    tail -n 30 "$log" >&2
    echo "setup.sh: the installation failed; the command was: $install" >&2
    rm -f "$log"
    exit 1
fi
rm -f "$log"
lacking=$(missing)
[ -z "$lacking" ] && exit 0
echo "setup.sh: still missing:" $lacking >&2
exit 1
