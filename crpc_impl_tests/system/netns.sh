#!/bin/bash
# System tests that change the host's addresses, each in a network namespace of its own that ends
# with it. Prints `N passed, N failed`.
set -u
cd "$(dirname "$0")/../.." || exit 1
build=${BUILD:-build}
export CRPC_TEST_NETNS=1
passed=0 failed=0

# One interface with an IPv4 address and, because it is up, an IPv6 link-local one.
network='ip link set lo up && ip link add crpc0 type veth peer name crpc1 &&
    ip link set crpc0 up && ip link set crpc1 up && ip addr add 10.77.0.1/24 dev crpc0 &&
    for i in $(seq 50); do ip -6 addr show dev crpc0 tentative | grep -q . || exit 0; sleep 0.1; done'

if ! unshare -n sh -c "$network" 2>/dev/null; then
    echo "skipped: network namespaces need root"
    echo "0 passed, 0 failed"
    exit 0
fi
for driver in mt st; do
    log=$build/log/netns.$driver
    mkdir -p "$(dirname "$log")"
    if unshare -n sh -c "($network); exec \"\$0\"" "$build/system/sys_zookeeper.$driver" \
        >"$log" 2>&1 </dev/null; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL sys_zookeeper.$driver"
        tail -n 30 "$log"
    fi
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
