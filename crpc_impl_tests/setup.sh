#!/bin/bash
# Installs the Debian packages that a purpose needs: setup.sh PURPOSE...
# Purposes: build demo test tsan lint matrix models bench instructions size distros all; bench-PEER is
# one peer of the bench. Root, or a user whose sudo asks for no password, gets missing packages installed,
# with a line of progress for each tenth of them. Anybody else gets the command to run, and exit
# status 1. When no package is missing, this prints nothing.
set -u
export LC_ALL=C # sort, comm, apt's messages
tried="Debian 12, Debian 13 and Ubuntu 24.04"

# libprotobuf-dev: google/protobuf/descriptor.proto, which nanopb.proto imports.
build="gcc libc6-dev make libnanopb-dev nanopb protobuf-compiler libprotobuf-dev python3
       python3-protobuf libzookeeper-mt-dev pkg-config"
# zookeeper: the server and its start scripts. libslf4j-java: the server logs nothing without it.
server="zookeeper default-jre-headless libslf4j-java"
# libzookeeper-st2 is enough for the single-threaded driver: its -dev package conflicts with the
# other one and holds the same headers.
test="g++ binutils cmake libcmocka-dev libzookeeper-st2 strace python3-kazoo iproute2 util-linux"
lint="g++ clang clang-format universal-ctags binutils git libzookeeper-st2"
models="gcc libc6-dev make python3 spin"

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
        models) need+=" $models" ;;
        instructions) need+=" $build binutils valgrind" ;;
        size) need+=" $build binutils musl-tools gcc-arm-linux-gnueabihf libc6-dev-armhf-cross
                     gcc-mips-linux-gnu libc6-dev-mips-cross" ;;
        distros) need+=" debootstrap git util-linux" ;;
        bench) need+=" $build binutils $(for p in tirpc zmq nng thrift grpc capnp; do bench $p; done)" ;;
        bench-*)
            need+=" $build binutils $(bench "${purpose#bench-}")" || {
                echo "setup.sh: no peer '${purpose#bench-}'" >&2
                exit 2
            }
            ;;
        all) need+=" $build $server $test $lint $models" ;;
        *)
            echo "setup.sh: no purpose '$purpose'" >&2
            exit 2
            ;;
    esac
done
need=$(printf '%s\n' $need | sort -u)

if ! command -v dpkg-query >/dev/null; then
    echo "setup.sh: this system has no dpkg, so nothing can be installed here. crpc was tried on" \
        "$tried. It needs what these Debian packages hold:" $need >&2
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

# Two of these may run at a time (make -j); the second finds nothing left to do.
exec 9>"${TMPDIR:-/tmp}/crpc-setup-$(id -u).lock"
flock 9
lacking=$(missing)
[ -z "$lacking" ] && exit 0

# progress WORD N M PACKAGE: on a terminal one line that changes, else a line for each tenth of M
progress() {
    if [ -t 1 ]; then
        printf '\r\033[K  %s %d of %d: %s' "$1" "$2" "$3" "$4"
        [ "$2" -lt "$3" ] || echo
    elif [ $(($2 * 10 / $3)) -gt $((($2 - 1) * 10 / $3)) ]; then
        printf '  %s %d of %d: %s\n' "$1" "$2" "$3" "$4"
    fi
}

# Reads apt-get's output, keeps it in $log, and shows how far the installation is.
watch() {
    local line words total=0 fetched=0 installed=0
    while IFS= read -r line; do
        printf '%s\n' "$line" >>"$log"
        read -ra words <<<"$line"
        case $line in
            *" newly installed, "*) total=$((words[0] + words[2])) ;;
            Get:*) [ $total = 0 ] || progress downloading $((++fetched)) $total "${words[4]:-}" ;;
            "Setting up "*) [ $total = 0 ] || progress installing $((++installed)) $total "${words[2]}" ;;
        esac
    done
}

echo "installing with apt-get, which may take some minutes:" $lacking
log=$(mktemp)
trap 'rm -f "$log"' EXIT
"${run[@]}" "export DEBIAN_FRONTEND=noninteractive; $install" 2>&1 </dev/null | watch
if [ "${PIPESTATUS[0]}" != 0 ]; then
    # The first error is the cause of the others: without a network there is one for each package.
    # apt puts the reason of an Err: on the next line.
    sed -n '/^\(Err\|E\|W\):/ { p; n; /^  /p; q }' "$log" >&2
    echo "setup.sh: the installation failed on $(
        . /etc/os-release 2>/dev/null && echo "${PRETTY_NAME:-this system}"
    ); crpc was tried on $tried. The command was: $install" >&2
    exit 1
fi
lacking=$(missing)
[ -z "$lacking" ] && exit 0
echo "setup.sh: apt-get succeeded, but these packages are still missing:" $lacking >&2
exit 1
