#!/usr/bin/env bash
# This version and the one before it in one mesh (e2e/tests/skew.rs), then one summary. Called by `make test-skew`.
#
# The version before is the newest tag v* that is an ancestor of HEAD and not HEAD itself; as long as there is none, the commit
# that .ci/previous names. Its `control` and `ztunnel` are built once, in a tree of their own below target/, and kept in
# ~/.cache/tulle/previous/<commit>. With CI set, what cannot run is a failure; elsewhere it is reported as skipped.
#
#   ONLY=<regex>           only tests whose name matches
#   LIMIT=<s>              seconds that one test may take (300)
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/sbin:/sbin

if tag=$(git describe --tags --match 'v*' --abbrev=0 HEAD^ 2>/dev/null); then
    commit=$(git rev-parse --verify --quiet "$tag^{commit}")
else
    commit=$(cat .ci/previous)
fi
folder=${XDG_CACHE_HOME:-$HOME/.cache}/tulle/previous/$commit

has() { [ -x "$folder/control" ] && [ -x "$folder/ztunnel" ]; }

# Everything is said on standard error.
build() {
    local began=$SECONDS place=$PWD/target/previous built
    has && return
    git cat-file -e "$commit^{commit}" 2>/dev/null ||
        { echo "commit $commit is not in this clone; fetch the whole history" >&2; return 1; }
    mkdir -p "$folder" target
    # Whoever comes second waits, and then finds them.
    exec 9>"$folder/.lock"
    flock 9
    has && return
    rm -rf "$place" && mkdir -p "$place/tree" "$place/target/debug/deps"
    # -m: newer than what is copied below, or cargo would take this tree's own crates for those of the version before.
    git archive "$commit" | tar -xm -C "$place/tree" || return 1
    # What both versions depend on is compiled already, if this tree was built: cargo looks whether it is the same.
    if [ -d target/debug/.fingerprint ]; then
        cp -a target/debug/.fingerprint target/debug/build "$place/target/debug/"
        find target/debug/deps -maxdepth 1 -type f \( -name '*.rlib' -o -name '*.rmeta' -o -name '*.so' \) \
            -exec cp -al -t "$place/target/debug/deps/" {} +
    fi
    (cd "$place/tree" && CARGO_TARGET_DIR=$place/target CARGO_INCREMENTAL=0 cargo build --workspace --locked --bin control --bin ztunnel) \
        >"$folder/build.log" 2>&1 || { tail -20 "$folder/build.log" >&2; return 1; }
    for built in control ztunnel; do
        strip -o "$folder/.$built.new" "$place/target/debug/$built" 2>/dev/null ||
            cp "$place/target/debug/$built" "$folder/.$built.new" || return 1
        mv "$folder/.$built.new" "$folder/$built" || return 1
    done
    rm -rf "$place"
    exec 9>&-
    echo "control and ztunnel of $commit built in $((SECONDS - began)) s" >&2
}

only=${ONLY:-.}
limit=${LIMIT:-300}
logs=$PWD/target/test-skew-logs
began=$SECONDS
passed=0 failed=0 skipped=0
failures=()
rm -rf "$logs" && mkdir -p "$logs"

echo "building…"
cargo build --workspace --locked 2>"$logs/build.log" || { tail -40 "$logs/build.log"; echo "0 passed, 1 failed (the build)"; exit 1; }
cargo test --workspace --locked --no-run --test skew --message-format=json 2>>"$logs/build.log" >"$logs/build.json" ||
    { tail -40 "$logs/build.log"; echo "0 passed, 1 failed (the build of the tests)"; exit 1; }
program=$(sed -nE 's#.*"name":"skew".*"executable":"([^"]*)".*#\1#p' "$logs/build.json" | head -1)
[ -n "$program" ] || { echo "0 passed, 1 failed (the test program was not found)"; exit 1; }
if ! build; then
    echo "SKIPPED all of it: the version before could not be built"
    [ -z "${CI:-}" ] || { echo "0 passed, 1 failed"; exit 1; }
    echo "0 passed, 0 failed"
    exit 0
fi
echo "the version before is ${tag:-$commit}; built after $((SECONDS - began)) s"

names=$("$program" --list --format terse 2>>"$logs/build.log" | sed -nE 's/^(.*): test$/\1/p')
for name in $names; do
    [[ $name =~ $only ]] || continue
    log=$logs/$name.log start=$SECONDS verdict=passed
    (cd e2e && TULLE_PREVIOUS=$folder exec timeout --kill-after=30 "$limit" "$program" --exact "$name" --test-threads=1 --show-output) \
        >"$log" 2>&1 </dev/null
    status=$?
    if [ "$status" = 0 ] && grep -q '^SKIPPED' "$log"; then
        verdict=skipped skipped=$((skipped + 1))
    elif [ "$status" = 0 ] && grep -qE '^test result: ok\. 1 passed' "$log"; then
        passed=$((passed + 1))
    else
        verdict=failed failed=$((failed + 1)) failures+=("$name (${log#"$PWD"/})")
    fi
    printf '%-90s %-8s %5d s\n' "$name" "$verdict" $((SECONDS - start))
    if [ "$verdict" = failed ]; then grep -nE 'panicked at|^Error:' -A8 "$log" | head -40 | sed 's/^/    /'; fi
done

echo
for failure in "${failures[@]}"; do echo "FAILED $failure"; done
[ "$skipped" = 0 ] || echo "SKIPPED $skipped: see the logs; with CI set they would be failures"
[ $((passed + failed + skipped)) != 0 ] || { echo "FAILED none of the tests was run: ${names:-the program lists none}" && failed=1; }
echo "took $((SECONDS - began)) s"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
