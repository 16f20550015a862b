#!/bin/bash
# setup.sh finds what is missing, and installs it or prints the command: with stand-ins for dpkg-query,
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
# The file `broken` holds what a failing apt-get prints.
stand_in apt-get <<'EOS'
here=$(dirname "$0")
echo "$*" >>"$here/calls"
[ -e "$here/broken" ] && { cat "$here/broken"; exit 100; }
[ "$1" = update ] && { echo "Get:1 http://mirror/debian stable InRelease [151 kB]"; exit; }
echo "0 upgraded, 30 newly installed, 0 to remove and 4 not upgraded."
for i in {1..30}; do echo "Get:$i http://mirror/debian stable/main amd64 lib$i amd64 1.0-$i [25 kB]"; done
for i in {1..30}; do echo "Setting up lib$i:amd64 (1.0-$i) ..."; done
: >"$here/lacking"
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
expect "root installs" 0 2 'some minutes: libcmocka-dev zookeeper'
echo clang >"$dir/lacking"
expect "progress" 0 2 $'\n  downloading 3 of 30: lib3\n.*\n  installing 30 of 30: lib30:amd64$'
echo clang >"$dir/lacking"
expect "a line for each tenth of it" 0 2 $'clang(\n[^\n]*){20}$'
cat >"$dir/broken" <<'EOS'
Ign:1 http://mirror/debian stable InRelease
Err:1 http://mirror/debian stable InRelease
  Temporary failure resolving 'mirror'
Err:2 http://mirror/debian stable-updates InRelease
  Temporary failure resolving 'mirror'
E: Some index files failed to download.
EOS
echo clang >"$dir/lacking"
expect "the first error alone" 1 1 $'clang\nErr:1 [^\n]*\n  Temporary failure [^\n]*\nsetup.sh: '
expect "the command that failed" 1 1 'tried on Debian 12, .* was: apt-get update && apt-get install .*clang'
rm "$dir/broken"
echo 1000 >"$dir/uid"
expect "nobody may install" 1 0 'sudo sh -c "apt-get update && apt-get install -y [^"]* clang"'
stand_in sudo <<'EOS'
[ "$1" = -n ] && shift
exec "$@"
EOS
expect "sudo wants no password" 0 2 'some minutes: clang'
mkdir "$dir/bare"
for tool in bash sort; do ln -s "$(command -v $tool)" "$dir/bare"; done
if output=$(PATH="$dir/bare" ./setup.sh build 2>&1) && [[ $output =~ "no dpkg".*"Debian 13".*nanopb ]]; then
    passed=$((passed + 1))
else
    failed=$((failed + 1))
    printf 'FAIL another system: %s\n' "$output"
fi
if ! ./setup.sh cake >/dev/null 2>&1; then passed=$((passed + 1)); else failed=$((failed + 1)); fi

echo "$passed passed, $failed failed"
[ $failed = 0 ]
