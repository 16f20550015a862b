#!/bin/bash
# setup.sh finds what is missing, and installs it or says how: with stand-ins for dpkg-query,
# apt-get, id and sudo. Prints `N passed, N failed`.
set -u
cd "$(dirname "$0")" || exit 1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0

stand_in() {
    { echo '#!/bin/bash'; cat; } >"$dir/$1"
    chmod +x "$dir/$1"
}
# All that is asked for is installed, but for what the file `lacking` lists.
stand_in dpkg-query <<'EOS'
for p in "${@:4}"; do
    grep -qx "$p" "$(dirname "$0")/lacking" || echo "$p install ok installed"
done
EOS
stand_in apt-get <<'EOS'
here=$(dirname "$0")
echo "$*" >>"$here/calls"
[ "$1" = install ] && [ ! -e "$here/broken" ] && : >"$here/lacking"
[ ! -e "$here/broken" ]
EOS
stand_in id <<<'cat "$(dirname "$0")/uid"'
stand_in sudo <<<'exit 1'

# expect NAME STATUS CALLS PATTERN: what setup.sh did about the packages now lacking
expect() {
    local output status calls
    : >"$dir/calls"
    output=$(PATH="$dir:$PATH" TMPDIR="$dir" ./setup.sh build demo test tsan lint matrix 2>&1)
    status=$?
    calls=$(wc -l <"$dir/calls")
    if [ $status = "$2" ] && [ "$calls" = "$3" ] && [[ $output =~ $4 ]]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf 'FAIL %s: status %s, %s calls of apt-get:\n%s\n' "$1" $status "$calls" "$output"
    fi
}

: >"$dir/lacking"
echo 0 >"$dir/uid"
expect "nothing is missing" 0 0 '^$'
printf 'zookeeper\nlibcmocka-dev\n' >"$dir/lacking"
expect "root installs" 0 2 'installing: libcmocka-dev zookeeper$'
touch "$dir/broken"
echo clang >"$dir/lacking"
expect "the installation fails" 1 1 'the command was: apt-get update && apt-get install .*clang'
rm "$dir/broken"
echo 1000 >"$dir/uid"
expect "nobody may install" 1 0 'sudo sh -c "apt-get update && apt-get install -y [^"]* clang"'
stand_in sudo <<'EOS'
[ "$1" = -n ] && shift
exec "$@"
EOS
expect "sudo wants no password" 0 2 'installing: clang$'
if ! ./setup.sh cake >/dev/null 2>&1; then passed=$((passed + 1)); else failed=$((failed + 1)); fi

echo "$passed passed, $failed failed"
[ $failed = 0 ]
