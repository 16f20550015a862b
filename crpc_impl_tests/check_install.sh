#!/bin/bash
# `make install` and what it installs: programs built from the installed files alone, with the flags
# that pkg-config prints, and by CMake. Prints `N passed, N failed`.
set -u
cd "$(dirname "$0")/.." || exit 1
unset MAKEFLAGS MAKELEVEL                # of a make that runs this
unset C_INCLUDE_PATH CPLUS_INCLUDE_PATH  # a user does not have them
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
check "nanopb.proto" test -f "$("$dir/usr/bin/protoc-gen-crpc" --nanopb-proto)/nanopb.proto"

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

check "the plugin's place" test "$(variable plugin)" = "$dir/usr/bin/protoc-gen-crpc"

# A CMake project: a program whose .proto file lies beside it, and one with a tree of .proto files.
mkdir -p "$dir/project/protos/sub"
cp "$dir/impl.c" "$dir/user.c" examples/echo/echo.options "$dir/project"
cp examples/echo/echo.proto "$dir/project/echo.proto"
cat >"$dir/project/CMakeLists.txt" <<EOS
cmake_minimum_required(VERSION 3.13)
project(check C)
find_package(crpc ${version%.*} REQUIRED)
add_executable(flat flat.c impl.c user.c)
crpc_generate(flat echo.proto)
target_link_libraries(flat crpc::crpc)
add_executable(tree tree.c impl.c)
crpc_generate(tree ROOT protos protos/main.proto protos/sub/types.proto)
target_link_libraries(tree crpc::crpc_without_zookeeper)
EOS
cat >"$dir/project/flat.c" <<'EOS'
#include "echo.crpc.h"
const crpc_service *flat(void);
const crpc_service *flat(void) { return &example_EchoService; }
EOS
cat >"$dir/project/tree.c" <<'EOS'
#include "main.crpc.h"
int main(void)
{
    sub_Name name = sub_Name_init_zero;
    return sizeof name.text == 21 && demo_Tree.name[0] == 'd' ? 0 : 1;
}
EOS
cat >"$dir/project/protos/main.proto" <<'EOS'
syntax = "proto3";
import "nanopb.proto";
import "sub/types.proto";
package demo;
message Reply { string text = 1 [(nanopb).max_size = 8]; }
service Tree { rpc Find(sub.Name) returns (Reply); }
EOS
printf 'syntax = "proto3";\npackage sub;\nmessage Name { string text = 1; }\n' \
    >"$dir/project/protos/sub/types.proto"
echo 'sub.Name.text max_length:20' >"$dir/project/protos/sub/types.options"
cmake_build() {
    (cd "$dir/project" && cmake -B build -DCMAKE_PREFIX_PATH="$dir/usr" "$@" && cmake --build build)
}
check "CMake" cmake_build
runs_flat() { "$dir/project/build/flat" | grep -q 'driver mt$'; }
check "CMake: one .proto" runs_flat
check "CMake: a tree of them" "$dir/project/build/tree"
echo 'sub.Name.text max_length:30' >"$dir/project/protos/sub/types.options"
sed -i 's/== 21/== 31/' "$dir/project/tree.c"
check "CMake: changed options" cmake_build
check "CMake: generated again" "$dir/project/build/tree"
sed -i "s/${version%.*} REQUIRED/99 REQUIRED/" "$dir/project/CMakeLists.txt"
refuses_version() { cmake_build 2>&1 | grep -q 'requested version "99"'; }
check "CMake: another version is refused" refuses_version

check "DESTDIR" install_to "$dir/stage"
check "staged" test -f "$dir/stage$dir/usr/include/crpc.h"
check "uninstall" make --no-print-directory uninstall PREFIX="$dir/usr" DESTDIR=
check "nothing left" test -z "$(find "$dir/usr" -type f)"

echo "$passed passed, $failed failed"
[ $failed = 0 ]
