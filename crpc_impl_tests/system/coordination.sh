#!/bin/bash
# The examples config_watch, lock and election against a ZooKeeper of their own: what they print and
# how they end. Prints `N passed, N failed`. Needs the examples built, java and ZooKeeper's jars.
set -u
cd "$(dirname "$0")/../.." || exit 1
programs=${BUILD:-build}/examples
dir=$(mktemp -d /tmp/crpc-test-XXXXXX)
passed=0 failed=0

finish() {
    local pids
    pids=$(jobs -p)
    [ -z "$pids" ] || kill -9 $pids 2>/dev/null
    wait 2>/dev/null
    rm -rf "$dir"
}
trap finish EXIT
trap 'exit 1' TERM INT

verdict() {
    if [ "$1" = 0 ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL $2"
    fi
}

# Waits up to 20 s for a line in a file.
await() {
    local i
    for i in $(seq 400); do
        grep -q -- "$2" "$dir/$1" 2>/dev/null && return 0
        sleep 0.05
    done
    echo "no \"$2\" in: $(cat "$dir/$1")"
    return 1
}

ready() {
    { exec 3<>"/dev/tcp/127.0.0.1/$port"; } 2>/dev/null && printf srvr >&3 && grep -q ^Mode: <&3
}

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
cat >"$dir/zoo.cfg" <<END
tickTime=200
dataDir=$dir/data
clientPort=$port
clientPortAddress=127.0.0.1
admin.enableServer=false
4lw.commands.whitelist=*
minSessionTimeout=400
maxSessionTimeout=60000
END
java -Xmx64m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 \
    -cp /usr/share/java/zookeeper.jar:/usr/share/java/slf4j-simple.jar \
    org.apache.zookeeper.server.quorum.QuorumPeerMain "$dir/zoo.cfg" >"$dir/zookeeper" 2>&1 &
for _ in $(seq 400); do ready && break; sleep 0.05; done
ready || { echo "ZooKeeper does not start: $(tail -n 5 "$dir/zookeeper")"; echo "0 passed, 1 failed"; exit 1; }
url=zookeeper://127.0.0.1:$port/app

# a value that does not exist, then does, then changes
"$programs/config_watch" "$url" limits/rate >"$dir/watch" 2>"$dir/watch.err" &
watch=$!
await watch "limits/rate does not exist"
verdict $? "config_watch: before the node exists"
"$programs/config_watch" "$url" limits/rate 100 2>/dev/null
verdict $? "config_watch: writing"
await watch "^version 0: 100$"
verdict $? "config_watch: the first value"
"$programs/config_watch" "$url" limits/rate 250 2>/dev/null
await watch "^version 1: 250$"
verdict $? "config_watch: the second value"
kill -TERM $watch
wait $watch
verdict $? "config_watch: ends with 0 after SIGTERM"

# two that take turns, and one that does not wait
"$programs/lock" "$url" locks/one --name anna --work-ms 1000 --times 2 >>"$dir/lock" &
anna=$!
await lock "anna: begin"
verdict $? "lock: begins"
"$programs/lock" "$url" locks/one --name berta --work-ms 100 >>"$dir/lock" &
berta=$!
"$programs/lock" "$url" locks/one --wait-ms 0 >/dev/null 2>&1
[ $? = 3 ]
verdict $? "lock: does not wait"
wait $anna && wait $berta
verdict $? "lock: ends with 0"
[ "$(sed 's/, token.*//' "$dir/lock" | tr '\n' ' ')" = "anna: begin anna: done berta: begin \
berta: done anna: begin anna: done " ]
verdict $? "lock: turns are taken: $(cat "$dir/lock")"
awk '{ t = $NF; if (/begin/ && t <= last) exit 1; last = t }' "$dir/lock"
verdict $? "lock: tokens grow"
"$programs/lock" "$url" locks/one --name carla --times 0 >"$dir/carla" &
carla=$!
await carla "carla: begin" && kill -TERM $carla && wait $carla
verdict $? "lock: ends with 0 after SIGTERM"

# a leader, the next one when it is killed, nobody when that one leaves
"$programs/election" "$url" leader --ask >/dev/null 2>&1
[ $? = 1 ]
verdict $? "election: nobody leads"
"$programs/election" "$url" leader --name anna --session-ms 1000 >"$dir/anna" &
anna=$!
await anna "anna: leads"
verdict $? "election: the first leads"
"$programs/election" "$url" leader --name berta --session-ms 1000 >"$dir/berta" &
berta=$!
await berta "berta: a candidate; the leader is anna"
verdict $? "election: the second is a candidate"
[ "$("$programs/election" "$url" leader --ask | cut -d' ' -f1,2)" = "anna leads," ]
verdict $? "election: asked who leads"
kill -KILL $anna
await berta "berta: leads"
verdict $? "election: the next one leads"
kill -TERM $berta
wait $berta
verdict $? "election: ends with 0 after SIGTERM"
"$programs/election" "$url" leader --ask >/dev/null 2>&1
[ $? = 1 ]
verdict $? "election: the leader has left"

for name in config_watch lock election; do
    "$programs/$name" >/dev/null 2>"$dir/usage"
    [ $? = 2 ] && grep -q "^usage: $name REGISTRY_URL PATH" "$dir/usage"
    verdict $? "$name: usage"
done

echo "$passed passed, $failed failed"
[ $failed = 0 ]
