#!/usr/bin/env bash
# What is tested against a real API server, then one summary and target/test-kube.json. Called by `make test-kube`.
#
# Each test runs by itself, so that it has a log, a time, a limit and a record of what was asked of the API server. With
# CI set, what cannot run is a failure; elsewhere it is reported as skipped.
#
#   ONLY=<regex>   only tests whose program/name matches
#   LIMIT=<s>      seconds that one test may take (600)
set -uo pipefail
cd "$(dirname "$0")/.."

only=${ONLY:-.}
limit=${LIMIT:-600}
logs=$PWD/target/test-kube-logs
results=$PWD/target/test-kube.json
began=$SECONDS
passed=0 failed=0 skipped=0
failures=() entries=()
export PATH=$PATH:/usr/sbin:/sbin
rm -rf "$logs" && mkdir -p "$logs"

# skip WHY: nothing can be run here.
skip() {
    echo "SKIPPED all of it: $1"
    echo '[]' >"$results"
    if [ -n "${CI:-}" ]; then echo "0 passed, 1 failed"; exit 1; fi
    echo "0 passed, 0 failed"
    exit 0
}

# finish PROGRAM TEST LOG STATUS SECONDS: adds one test to the summary and to the results.
finish() {
    local program=$1 name=$2 log=$3 status=$4 took=$5 verdict=passed note='' evidence measured
    if [ "$status" = 124 ]; then note="over its limit of $limit s"; fi
    if [ "$status" != 0 ]; then
        verdict=failed failed=$((failed + 1))
        failures+=("$program $name (${log#"$PWD"/})")
    elif grep -q '^SKIPPED' "$log"; then
        verdict=skipped skipped=$((skipped + 1)) note=$(grep -m1 '^SKIPPED' "$log" | cut -c10-100)
        if [ -n "${CI:-}" ]; then failed=$((failed + 1)) failures+=("$program $name: skipped"); fi
    elif ! grep -qE '^test result: ok\. 1 passed' "$log"; then
        verdict=failed failed=$((failed + 1)) note='it did not run'
        failures+=("$program $name (${log#"$PWD"/})")
    else
        passed=$((passed + 1))
    fi
    # Lines of `EVIDENCE <test> <JSON>`, one for each API server of the test.
    evidence=$(sed -nE 's/^EVIDENCE [^{]*(\{.*\})$/\1/p' "$log" | paste -sd,)
    # Lines of `MEASURED <JSON>`: what a test found out and does not judge.
    measured=$(sed -nE 's/^MEASURED (\{.*\})$/\1/p' "$log" | paste -sd,)
    entries+=("{\"program\":\"$program\",\"name\":\"$name\",\"verdict\":\"$verdict\",\"seconds\":$took,\"requests\":[$evidence],\"measured\":[$measured]}")
    printf '%-16s %-70s %-8s %5d s  %s\n' "$program" "$name" "$verdict" "$took" "$note"
    if [ "$verdict" = failed ]; then grep -nE 'panicked at|^Error:' -A8 "$log" | head -40 | sed 's/^/    /'; fi
}

./.ci/tools.sh all || { [ -z "${CI:-}" ] || exit 1; }

echo "building…"
# Beside the Rust build, and behind it: the tests need both.
nice -n 5 ./.ci/kube.sh >"$logs/kube-folder" 2>"$logs/kube.log" &
kube=$!
# Without it the tests of the chart say what is missing.
nice -n 10 ./.ci/helm.sh >"$logs/helm.log" 2>&1 &
helm=$!
cargo build --workspace --locked 2>"$logs/build.log" || { tail -40 "$logs/build.log"; wait; echo "0 passed, 1 failed (the build)"; exit 1; }
# Of the whole workspace: for one package alone, dependencies would be built once more, with other features.
cargo test --workspace --locked --no-run --test 'kube_*' --message-format=json 2>>"$logs/build.log" >"$logs/build.json" ||
    { tail -40 "$logs/build.log"; wait; echo "0 passed, 1 failed (the build of the tests)"; exit 1; }
echo "programs built in $((SECONDS - began)) s"
if ! wait $kube; then
    tail -5 "$logs/kube.log"
    skip "the programs of Kubernetes cannot be built: $(tail -1 "$logs/kube.log")"
fi
wait $helm || tail -5 "$logs/helm.log"
echo "API server: $(tail -1 "$logs/kube-folder"), after $((SECONDS - began)) s"
command -v etcd >/dev/null || [ -x "${KUBEBUILDER_ASSETS:-/}/etcd" ] || skip "there is no etcd; install etcd-server"

programs=$(grep '"name":"kube_' "$logs/build.json" | sed -nE 's#.*"name":"(kube_[^"]*)".*"executable":"([^"]*)".*#\1 \2#p' | LC_ALL=C sort -u)
[ -n "$programs" ] || { echo "0 passed, 1 failed (no test programs were found)"; exit 1; }

printf '\n%-16s %-70s %-8s %7s\n' PROGRAM TEST verdict time
while read -r program executable; do
    tests=$("$executable" --list --format terse 2>/dev/null | sed -nE 's/^(.*): test$/\1/p')
    for name in $tests; do
        [[ $program/$name =~ $only ]] || continue
        log=$logs/$program-${name//:/_}.log start=$SECONDS
        (cd e2e && exec timeout --kill-after=30 "$limit" "$executable" --exact "$name" --test-threads=1 --show-output) >"$log" 2>&1 </dev/null
        finish "$program" "$name" "$log" $? $((SECONDS - start))
    done
done <<<"$programs"

printf '[\n%s\n]\n' "$(IFS=$'\n'; echo "${entries[*]}" | sed '$!s/$/,/')" >"$results"
echo
for failure in "${failures[@]}"; do echo "FAILED $failure"; done
[ "$skipped" = 0 ] || echo "SKIPPED $skipped: see above; with CI set they are failures"
echo "took $((SECONDS - began)) s; results are in target/test-kube.json"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
