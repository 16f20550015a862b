#!/bin/bash
# The examples are there, and those without ZooKeeper need nothing but libc at run time.
# Prints `N passed, N failed`.
set -u
cd "$(dirname "$0")/.." || exit 1
programs=${BUILD:-build}/examples
passed=0 failed=0

verdict() {
    if [ "$1" = 0 ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL $2"
    fi
}

for source in $(grep -lw '^int main' examples/*/*.c); do
    name=$(basename "$source" .c)
    [ -x "$programs/$name" ]
    verdict $? "$name was not built"
done

for name in echo_server echo_client embedded_loop hand_table; do
    # pthread and the like are part of libc.so.6 since glibc 2.34
    others=$(objdump -p "$programs/$name" 2>&1 |
        awk '$1 == "NEEDED" && $2 !~ /^(libc\.so|ld-linux|ld\.so)/ { print $2 }')
    objdump -p "$programs/$name" >/dev/null 2>&1 && [ -z "$others" ]
    verdict $? "$name needs more than libc: $others"
done

echo "$passed passed, $failed failed"
[ $failed = 0 ]
