#!/usr/bin/env bash
# Everything that can be tested here without an API server, then one summary. Called by `make test`.
#
# Test programs are built once and run one after another, so that each has a log, a time and a limit of its own. As root
# there are two passes: everything, and then once more what makes namespaces, entered from an unprivileged user. Started
# by an unprivileged user there is one. With CI set, what cannot run is a failure; elsewhere it is reported as skipped.
#
#   ONLY=<regex>   only programs whose package/name matches
#   LIMIT=<s>      seconds that one program may take (900)
set -uo pipefail
cd "$(dirname "$0")/.."

only=${ONLY:-.}
limit=${LIMIT:-900}
logs=$PWD/target/test-logs
began=$SECONDS
passed=0 failed=0 skipped=0
rows=() failures=()
export PATH=$PATH:/usr/sbin:/sbin
rm -rf "$logs" && mkdir -p "$logs"

# Programs that make network namespaces: they run in both passes.
needs_namespaces() {
    case $1 in
        */lib | */bin-* | e2e/tidy) return 1 ;;
        e2e/* | ztunnel/churn | ztunnel/defects | ztunnel/ends | ztunnel/federation | ztunnel/fence | ztunnel/flow | ztunnel/recovery | ztunnel/tunnel) return 0 ;;
        *) return 1 ;;
    esac
}

# finish PASS PROGRAM LOG STATUS SECONDS: adds one program's counts to the summary.
finish() {
    local pass=$1 program=$2 log=$3 status=$4 took=$5 good bad lost note=''
    good=$(sed -nE 's/^test result: .* ([0-9]+) passed; .*/\1/p' "$log" | awk '{n+=$1} END {print n+0}')
    bad=$(sed -nE 's/^test result: .* ([0-9]+) failed; .*/\1/p' "$log" | awk '{n+=$1} END {print n+0}')
    lost=$(grep -c '^SKIPPED' "$log")
    if [ "$status" = 124 ]; then note="over its limit of $limit s"; fi
    # Ended without a verdict: a crash, a signal or the limit.
    if [ "$status" != 0 ] && [ "$bad" = 0 ]; then bad=1 note=${note:-"ended with status $status"}; fi
    if [ "$lost" != 0 ]; then
        good=$((good > lost ? good - lost : 0)) note="$lost skipped: $(grep -m1 '^SKIPPED' "$log" | cut -c10-100)"
    fi
    passed=$((passed + good)) failed=$((failed + bad)) skipped=$((skipped + lost))
    rows+=("$(printf '%-9s %-28s %6d %6d %6d s  %s' "$pass" "$program" "$good" "$bad" "$took" "$note")")
    echo "${rows[-1]}"
    if [ "$bad" != 0 ]; then
        failures+=("$pass $program: $(grep -E '^test .* FAILED$|^(test )?.* has overflowed' "$log" | awk '{print $2}' | paste -sd' ') (${log#"$PWD"/})")
        grep -nE 'panicked at|^Error:' -A6 "$log" | head -40 | sed 's/^/    /'
    fi
}

# run PASS PROGRAM DIRECTORY COMMAND…
run() {
    local pass=$1 program=$2 folder=$3 log start=$SECONDS
    shift 3
    log=$logs/$pass-${program//\//-}.log
    (cd "$folder" && exec timeout --kill-after=20 "$limit" "$@") >"$log" 2>&1 </dev/null
    finish "$pass" "$program" "$log" $? $((SECONDS - start))
}

# as_nobody COMMAND…: as a user who owns nothing but a home. A tree that this user cannot reach (a clone below /root)
# is shown to it under the same name in a mount namespace of its own.
home=''
as_nobody() {
    local drop=(setpriv --reuid=65534 --regid=65534 --clear-groups env -i "PATH=$PATH" "HOME=$home"
        "XDG_RUNTIME_DIR=$home" "TMPDIR=$home" USER=nobody)
    [ -z "${CI:-}" ] || drop+=("CI=$CI")
    if setpriv --reuid=65534 --regid=65534 --clear-groups test -x "$PWD"; then
        "${drop[@]}" "$@"
        return
    fi
    local tree hidden=/
    tree=$(git rev-parse --show-toplevel 2>/dev/null || dirname "$PWD")
    local part parts
    IFS=/ read -ra parts <<<"${tree#/}"
    for part in "${parts[@]}"; do
        hidden=${hidden%/}/$part
        setpriv --reuid=65534 --regid=65534 --clear-groups test -x "$hidden" || break
    done
    # shellcheck disable=SC2016 # expanded by the inner shell
    unshare --mount --propagation private sh -ec '
        tree=$1 hidden=$2 folder=$3 aside=$4/tree; shift 4
        mkdir -p "$aside"; mount --rbind "$tree" "$aside"
        mount -t tmpfs -o mode=755 tmpfs "$hidden"
        mkdir -p "$tree"; mount --rbind "$aside" "$tree"
        cd "$folder"; exec "$@"' sh "$tree" "$hidden" "$PWD" "$home" "${drop[@]}" "$@"
}

# Namespaces of its own around a program that expects to be root.
in_user_namespace=(unshare --user --map-root-user --mount --net sh -ec
    'mount -t tmpfs tmpfs /run; ip link set lo up; exec "$@"' sh)

./.ci/tools.sh all || { [ -z "${CI:-}" ] || exit 1; }

echo "building…"
start=$SECONDS
cargo build --workspace --locked 2>"$logs/build.log" || { tail -40 "$logs/build.log"; echo "0 passed, 1 failed (the build)"; exit 1; }
cargo test --workspace --locked --no-run --message-format=json 2>>"$logs/build.log" >"$logs/build.json" ||
    { tail -40 "$logs/build.log"; echo "0 passed, 1 failed (the build of the tests)"; exit 1; }
# Lines of `crate/test crate-folder executable`; the unit tests are crate/lib and crate/bin-name.
programs=$(grep '"test":true},"features"' "$logs/build.json" | sed -nE \
    's#.*"manifest_path":"([^"]*)/([^/"]*)/Cargo\.toml","target":\{"kind":\["([^"]*)"[^{]*"name":"([^"]*)".*"executable":"([^"]*)".*#\2/\3-\4 \1/\2 \5#p' |
    sed -E 's#^([^/ ]*)/lib-[^ ]* #\1/lib #; s#^([^/ ]*)/test-#\1/#' | LC_ALL=C sort -u)
echo "built in $((SECONDS - start)) s: $(echo "$programs" | wc -l) test programs; logs are in target/test-logs/"
[ -n "$programs" ] || { echo "0 passed, 1 failed (no test programs were found)"; exit 1; }
# They need an API server, or programs of another version, which take long to build.
programs=$(grep -vE '^e2e/(kube_|skew )' <<<"$programs")

root=$([ "$(id -u)" = 0 ] && echo yes || echo no)
pass=$([ $root = yes ] && echo root || echo user)
printf '\n%-9s %-28s %6s %6s %8s\n' PASS PROGRAM passed failed time
while read -r program folder executable; do
    [[ $program =~ $only ]] || continue
    options=(--show-output)
    wrap=()
    if needs_namespaces "$program"; then
        options+=(--test-threads=1)
    fi
    # All of the proxy's: its unit tests enter a namespace, too.
    [ $root = yes ] || [[ $program != ztunnel/* ]] || wrap=("${in_user_namespace[@]}")
    run "$pass" "$program" "$folder" "${wrap[@]}" "$executable" "${options[@]}"
done <<<"$programs"

if [[ documentation =~ $only ]]; then
    run "$pass" documentation "$PWD" cargo test --workspace --locked --doc --quiet
fi

if [ $root = yes ]; then
    home=$(mktemp -d /tmp/tulle-rootless.XXXXXX)
    chown 65534:65534 "$home"
    trap 'rm -rf "$home"' EXIT
    if why=$(as_nobody unshare --user --map-root-user --net true 2>&1); then
        while read -r program folder executable; do
            [[ $program =~ $only ]] && needs_namespaces "$program" || continue
            wrap=()
            [[ $program != ztunnel/* ]] || wrap=("${in_user_namespace[@]}")
            log=$logs/rootless-${program//\//-}.log start=$SECONDS
            (as_nobody timeout --kill-after=20 "$limit" "${wrap[@]}" "$executable" --show-output --test-threads=1) >"$log" 2>&1 </dev/null
            finish rootless "$program" "$log" $? $((SECONDS - start))
        done <<<"$programs"
    else
        echo "rootless  unprivileged users may not make namespaces here: $why"
        if [ -n "${CI:-}" ]; then failed=$((failed + 1)) failures+=("rootless: $why"); else skipped=$((skipped + 1)); fi
    fi
fi

echo
echo "NOT RUN what needs an API server, or the version before this one: \`make test-kube\` and \`make test-skew\` run it"
[ $root = yes ] || echo "NOT RUN the pass as root, which needs root: everything above ran once, as $(id -un)"
for failure in "${failures[@]}"; do echo "FAILED $failure"; done
[ "$skipped" = 0 ] || echo "SKIPPED $skipped: see above; with CI set they would be failures"
echo "took $((SECONDS - began)) s"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
