#!/bin/bash
# Bare systems of other distributions: `make demo`, the unit tests, the generator's tests and
# `make install` in each. `make distros` calls this.
#
#   distros.sh [DISTRIBUTION...]      default: bookworm trixie noble
#
# debootstrap makes a minimal system in build/distros/NAME, once; each run begins with a copy of it that
# sees this checkout's files and has a process and mount namespace of its own. Debian comes from the
# mirror that this machine's apt uses, Ubuntu from its own, or from debootstrap's default mirror.
# JOBS is passed on to make. Prints `N passed, N failed`; the logs are build/distros/NAME.log.
set -u
cd "$(dirname "$0")/.." || exit 1
here=$PWD work=$PWD/build/distros jobs=${JOBS:-$(nproc)}
unset MAKEFLAGS MAKELEVEL
passed=0 failed=0 skipped=0

[ "$(id -u)" = 0 ] && command -v unshare debootstrap >/dev/null &&
    unshare -m -p -f --mount-proc true 2>/dev/null || {
    echo "distros: needs root, debootstrap and the right to make namespaces and mounts"
    exit 1
}

# Through the proxy that apt uses.
[ -n "${http_proxy:-}" ] || eval "$(apt-config shell http_proxy Acquire::http::Proxy)"
[ -z "${http_proxy:-}" ] || export http_proxy

own=$(. /etc/os-release && echo "${ID^}")

# mirror ORIGIN: the first that apt's sources name for it
mirror() {
    apt-get indextargets --format '$(ORIGIN) $(LABEL) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
        awk -v origin="$1" '$1 == origin && $2 == origin { print $3; exit }'
}

# bootstrap SUITE ORIGIN COMPONENTS KEYRING [SCRIPT]
bootstrap() {
    local suite=$1 new=$work/$1.new
    [ -d "$work/$suite" ] && return 0
    rm -rf "$new"
    debootstrap --variant=minbase --components="$3" --keyring="$4" "$suite" "$new" "$(mirror "$2")" \
        ${5:+"$5"} >"$work/$suite.log" 2>&1 || return 1
    mv "$new" "$work/$suite"
}

# inside SUITE COMMAND: in a copy of the system, with this checkout in /crpc. The mounts and processes
# go with the namespaces.
inside() {
    local root=$work/$1.run
    unshare -m -p -f --kill-child bash -c '
        set -e
        mount -t proc proc "$1/proc"
        mount --rbind /dev "$1/dev"
        cp -L /etc/resolv.conf "$1/etc/resolv.conf"
        exec chroot "$1" bash -c "cd /crpc && $2"' - "$root" "$2"
}

# step NAME COMMAND...: appends its output to $log, adds its `N passed, N failed`, or 1
step() {
    local name=$1 begin=$SECONDS status counts p f
    shift
    printf '  %-10s' "$name"
    printf '\n=== %s\n' "$name" >>"$log"
    "$@" 2>&1 </dev/null | tee -a "$log" >"$log.step"
    status=${PIPESTATUS[0]}
    counts=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$log.step" | tail -n 1)
    read -r p _ f _ <<<"${counts:-0 passed, 0 failed}"
    [ -z "$counts" ] && [ $status = 0 ] && p=1
    [ $status != 0 ] && [ "$f" = 0 ] && f=1
    passed=$((passed + p)) failed=$((failed + f))
    printf '%4d passed, %d failed  %4d s\n' "$p" "$f" $((SECONDS - begin))
    [ $status = 0 ] || grep -E '^(FAIL|Err:|E:|make.*\*\*\*)|error:|  FAILED' "$log.step" | head -n 12 |
        sed 's/^/      /'
    rm -f "$log.step"
    return $status
}

mkdir -p "$work"
[ $# -gt 0 ] || set -- bookworm trixie noble
number=0
for suite; do
    number=$((number + 1)) log=$work/$suite.log
    keys=/usr/share/keyrings
    case $suite in
        bookworm) name="Debian 12" origin=Debian from=(main $keys/debian-archive-keyring.gpg) ;;
        trixie) name="Debian 13" origin=Debian from=(main $keys/debian-archive-keyring.gpg) ;;
        noble) name="Ubuntu 24.04" origin=Ubuntu
            from=(main,universe $keys/ubuntu-archive-keyring.gpg gutsy) ;; # the script of all Ubuntus
        *) echo "distros: no distribution '$suite': bookworm, trixie or noble"; exit 2 ;;
    esac
    printf '%d of %d: %s (%s); to see the work: tail -f %s\n' $number $# "$name" "$suite" \
        "${log#"$here"/}"
    if [ ! -e "${from[1]}" ]; then
        echo "  skipped: ${from[1]} is missing (package debian-archive-keyring or ubuntu-keyring)"
        skipped=$((skipped + 1))
        continue
    fi
    echo "  a bare system by debootstrap"
    if ! bootstrap "$suite" $origin "${from[@]}"; then
        # No mirror of another distribution need answer here, one of this machine's own must.
        why=$(grep -m 1 '^E:' "$log" || tail -n 1 "$log")
        if [ "$origin" = "$own" ]; then
            echo "  FAILED: debootstrap: $why"
            failed=$((failed + 1))
        else
            echo "  skipped: debootstrap: $why"
            skipped=$((skipped + 1))
        fi
        continue
    fi
    rm -rf "$work/$suite.run"
    cp -a "$work/$suite" "$work/$suite.run"
    mkdir "$work/$suite.run/crpc"
    git ls-files -z -co --exclude-standard | tar -c --null -T - | tar -x -C "$work/$suite.run/crpc"
    : >"$log"
    before=$failed
    # The bare system has no make yet.
    if step packages inside "$suite" "crpc_impl_tests/setup.sh test"; then
        step demo inside "$suite" "make demo JOBS=$jobs"
        step tests inside "$suite" "make test JOBS=$jobs T='test_ plugin/ check_install'"
    fi
    [ "$failed" != "$before" ] || rm -rf "$work/$suite.run" # after a failure it can be looked at
done
[ $skipped = 0 ] || echo "$skipped skipped"
echo "$passed passed, $failed failed"
[ $failed = 0 ] && [ $passed -gt 0 ]
