#!/bin/bash
# `make install` and what it installs: a program built from the installed files alone, with the
# flags that pkg-config says. Prints `N passed, N failed`.
set -u
cd "$(dirname "$0")/.." || exit 1
unset MAKEFLAGS MAKELEVEL # of a make that runs this
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0

# check NAME COMMAND...
check() {
    local name=$1 output
    shift
    if output=$("$@" 2>&1); then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf 'FAIL %s: %s\n%s\n' "$name" "$*" "$output"
    fi
}

# B keeps the files made on the way out of a build that is running.
install_to() {
    make --no-print-directory install B="$dir/build" PREFIX="$dir/usr" DESTDIR="$1"
}

check "install" install_to ""
check "header" cmp crpc.h "$dir/usr/include/crpc.h"
check "plugin" test -x "$dir/usr/bin/protoc-gen-crpc"

export PKG_CONFIG_PATH="$dir/usr/lib/pkgconfig"
version=$(sed -n 's/^#define CRPC_VERSION "\(.*\)"/\1/p' crpc.h)
check "version" test "$(pkg-config --modversion crpc)" = "$version"

cat >"$dir/impl.c" <<'EOS'
#define CRPC_IMPLEMENTATION
#include <crpc.h>
EOS
cp crpc_impl_tests/compile/user.c "$dir/user.c"
# build DRIVER CFLAGS LIBS: a program that says which driver it was built with
build() {
    (cd "$dir" && cc -I. $2 impl.c user.c -o program $3 && ./program | grep -q "driver $1\$")
}
variable() {
    pkg-config --variable="$1" crpc
}
check "with ZooKeeper" build mt "$(pkg-config --cflags crpc)" "$(pkg-config --libs crpc)"
check "without ZooKeeper" build none "$(variable cflags_without_zookeeper)" \
    "$(variable libs_without_zookeeper)"
# the -dev package of the single-threaded client conflicts with the other one: its library by name
st=$(variable libs_zookeeper_st)
check "single-threaded" build st "$(variable cflags_zookeeper_st)" \
    "${st/-lzookeeper_st/-l:libzookeeper_st.so.2}"

check "DESTDIR" install_to "$dir/stage"
check "staged" test -f "$dir/stage$dir/usr/include/crpc.h"
check "uninstall" make --no-print-directory uninstall PREFIX="$dir/usr" DESTDIR=
check "nothing left" test -z "$(find "$dir/usr" -type f)"

echo "$passed passed, $failed failed"
[ $failed = 0 ]
