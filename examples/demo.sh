#!/bin/bash
# demo.sh: crpc with a real ZooKeeper, in under half a minute. Run by `make demo`.
#
#   examples/demo.sh [DIRECTORY WITH THE EXAMPLE PROGRAMS]     default: $BUILD/examples
#
# Starts a ZooKeeper server, two providers, and a consumer that finds them by name; then it kills one
# provider under load. Exits with 0 only if everything went as the text says. Needs the Debian packages
# zookeeper and default-jre. It stops every process that it has started, however it ends.
set -u

readonly here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly bin=${1:-${BUILD:-$here/../build}/examples}
readonly jars=/usr/share/java
readonly rate=200 login_ms=20 load_seconds=8 kill_after=3 session_ms=2000

dir=           # logs, ZooKeeper's data
port=          # ZooKeeper's
started=()     # every process of ours, for the check at the end
declare -A pid # those that may still run, by name

# --- small tools ----------------------------------------------------------------------------------

heading() { if [[ -t 1 ]]; then printf '\n\e[1m%s\e[0m\n' "$*"; else printf '\n%s\n' "$*"; fi; }
say() { printf '  %s\n' "$@"; }
fail() {
    printf '\n  FAILED: %s\n' "$*"
    exit 1
}

# within SECONDS COMMAND...: repeats it until it succeeds or the time is over
within() {
    local end=$((SECONDS + $1 + 1))
    shift
    until "$@"; do
        ((SECONDS < end)) || return 1
        sleep 0.05
    done
}

# start NAME COMMAND...: in the background, output to a log
start() {
    local name=$1
    shift
    "$@" >"$dir/$name.log" 2>&1 &
    pid[$name]=$!
    started+=($!)
}

gone() { ! kill -0 "$1" 2>/dev/null; }

# finish NAME SECONDS: waits until it has ended; its exit code is in $code
finish() {
    within "$2" gone "${pid[$1]}" || return 1
    wait "${pid[$1]}"
    code=$?
    unset "pid[$1]"
} 2>/dev/null # without bash's own "Killed" message

clean_up() {
    local result=$? name
    trap '' INT TERM
    trap - EXIT
    for name in "${!pid[@]}"; do kill -TERM "${pid[$name]}" 2>/dev/null; done
    for name in "${!pid[@]}"; do
        finish "$name" 6 || { kill -KILL "${pid[$name]}" 2>/dev/null; finish "$name" 6; }
    done
    if ((result == 1)); then
        say "The logs are kept in $dir"
    else
        rm -rf "$dir"
    fi
    exit "$result"
}

# --- ZooKeeper ------------------------------------------------------------------------------------

port_is_free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

zookeeper_answers() (
    exec 2>/dev/null
    exec 3<>"/dev/tcp/127.0.0.1/$port" || exit 1
    printf srvr >&3
    while read -r -t 1 line <&3; do
        [[ $line == Mode:* ]] && exit 0
    done
    exit 1
)

answers_or_died() { zookeeper_answers || gone "${pid[zookeeper]}"; }

start_zookeeper() {
    local try
    for try in 1 2 3 4 5; do
        port=$((20000 + RANDOM % 10000))
        port_is_free "$port" || continue
        mkdir -p "$dir/zookeeper"
        printf '%s\n' tickTime=200 "dataDir=$dir/zookeeper" "clientPort=$port" \
            clientPortAddress=127.0.0.1 admin.enableServer=false 4lw.commands.whitelist=srvr \
            minSessionTimeout=400 maxSessionTimeout=60000 >"$dir/zoo.cfg"
        start zookeeper java -Xmx64m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 \
            -cp "$jars/zookeeper.jar:$jars/slf4j-simple.jar" \
            org.apache.zookeeper.server.quorum.QuorumPeerMain "$dir/zoo.cfg"
        within 20 answers_or_died
        zookeeper_answers && return 0
        kill -KILL "${pid[zookeeper]}" 2>/dev/null # the port was taken meanwhile: another one
        finish zookeeper 5
    done
    return 1
}

# What any ZooKeeper tool sees: here ZooKeeper's own command line client.
list_providers() {
    local line
    line=$(timeout --foreground 20 java -Xmx64m -XX:TieredStopAtLevel=1 \
        -cp "$jars/zookeeper.jar:$jars/slf4j-nop.jar" \
        org.apache.zookeeper.ZooKeeperMain -server "127.0.0.1:$port" \
        ls "/dubbo/demo.UserService/providers" 2>/dev/null | grep '^\[') || return 1
    line=${line#[}
    line=${line%]}
    line=${line//, /$'\n'}
    printf '%b\n' "${line//%/\\x}" | sed 's/?.*//; s/^/    /' # names are URL-encoded URLs
}

# --- the programs ---------------------------------------------------------------------------------

provider_ready() { grep -q "^provider $1 serving on" "$dir/$1.log" || gone "${pid[$1]}"; }

start_provider() {
    start "$1" "$bin/user_provider" "$registry" --id "$1" \
        --login-ms $login_ms --session-ms $session_ms
    within 10 provider_ready "$1"
    grep "^provider $1 serving on" "$dir/$1.log" | sed 's/^/  /' | grep . || {
        cat "$dir/$1.log"
        fail "provider $1 did not start"
    }
}

# start_consumer OPTIONS...: what it shows is for the reader, its counts are kept
start_consumer() {
    "$bin/user_consumer" "$registry" --providers 2 --json "$@" 2>&1 >"$dir/counts.json" &
    pid[consumer]=$!
    started+=($!)
}

# number KEY: from the counts
number() { sed -n "s/.*\"$1\":\([0-9]*\).*/\1/p" "$dir/counts.json"; }

# last_answer PROVIDER: milliseconds since the load began
last_answer() {
    sed -n "s/.*\"$1\":{\"count\":[0-9]*,\"first_ms\":[0-9]*,\"last_ms\":\([0-9]*\)}.*/\1/p" \
        "$dir/counts.json"
}

check() { # check CONDITION TEXT
    if (($1)); then
        say "yes  $2"
    else
        say "NO   $2"
        bad=1
    fi
}

# --- the demo -------------------------------------------------------------------------------------

for program in user_provider user_consumer; do
    [[ -x $bin/$program ]] || fail "$bin/$program is missing: run 'make demo'"
done
command -v java >/dev/null || fail "java is missing: apt-get install zookeeper"
for jar in zookeeper slf4j-simple slf4j-nop; do
    [[ -e $jars/$jar.jar ]] || fail "$jars/$jar.jar is missing: apt-get install zookeeper"
done

trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
dir=$(mktemp -d "${TMPDIR:-/tmp}/crpc-demo.XXXXXX") || exit 1
bad=0

heading "1. A ZooKeeper server"
start_zookeeper || fail "ZooKeeper did not start; see $dir/zookeeper.log"
registry=zookeeper://127.0.0.1:$port/dubbo
say "It answers on port $port. The registry is $registry"

heading "2. Two providers, each with two services, register there"
start_provider berlin
start_provider tokyo
say "What ZooKeeper's own client lists under /dubbo/demo.UserService/providers:"
list_providers || fail "nothing is registered"

heading "3. A consumer finds them by name and calls them"
start_consumer
finish consumer 30 || fail "the consumer did not end"
((code == 0)) || fail "the consumer exited with $code"

heading "4. The same under load, and one provider is killed"
say "Each login takes $login_ms ms, so some are always under way on both providers."
start_consumer --only-load --seconds $load_seconds --rate $rate
sleep $kill_after
{ kill -KILL "${pid[berlin]}" && finish berlin 5; } 2>/dev/null || fail "berlin cannot be killed"
say ">>> kill -9 berlin. It cannot unregister: ZooKeeper lists it for about $((session_ms / 1000)) s more."
finish consumer $((load_seconds + 20)) || fail "the consumer did not end"
consumer_code=$code

heading "5. What happened"
say "The connections to berlin broke at once. Calls that waited there for a reply have failed:" \
    "nobody knows whether berlin executed them, and Login is not declared idempotent, so crpc" \
    "does not retry them. All other calls were retried on tokyo or went to tokyo at once, even" \
    "while ZooKeeper still listed berlin."
echo
ok=$(number ok) failed=$(number failed) in_flight=$(number failed_in_flight)
berlin=$(last_answer berlin) tokyo=$(last_answer tokyo)
check "consumer_code == 0" "the consumer ended well"
check "${ok:-0} > 0" "calls succeeded: ${ok:-none}"
check "${failed:--1} == ${in_flight:--2}" \
    "only calls in flight failed: ${failed:-?} failed, ${in_flight:-?} of them in flight"
check "$(number unfinished) + 0 == 0" "every call ended, with a result or an error"
check "${berlin:-0} > 0" "berlin answered, for the last time after ${berlin:-?} ms"
check "${tokyo:-0} > ${berlin:-0} + 1000" "tokyo went on answering, up to ${tokyo:-?} ms"

heading "6. The end"
kill -TERM "${pid[tokyo]}"
finish tokyo 15 || fail "provider tokyo did not stop"
check "$code == 0" "tokyo finished its work and left with exit code 0 on SIGTERM"
kill -TERM "${pid[zookeeper]}"
finish zookeeper 10 || fail "ZooKeeper did not stop"
left=0
for p in "${started[@]}"; do gone "$p" || left=$((left + 1)); done
check "$left == 0" "none of the ${#started[@]} processes is left running"

((bad == 0)) || fail "not everything was as it should be"
printf '\n  All as expected.\n'
