#!/bin/sh
# Builds Helm once from e2e/helm/go.mod, keeps it in the user's cache by the hash of go.sum, and prints its path.
# HELM names one to use instead. Needs Go 1.26 or newer.
set -eu
cd "$(dirname "$0")/../e2e/helm"
if [ -n "${HELM:-}" ]; then echo "$HELM"; exit 0; fi
dir=${XDG_CACHE_HOME:-$HOME/.cache}/tulle/helm/$(sha256sum go.sum | cut -c1-16)
if [ ! -x "$dir/helm" ]; then
    command -v go >/dev/null 2>&1 || { echo "helm.sh: there is no go program; install Go 1.26, or set HELM to a helm program" >&2; exit 1; }
    mkdir -p "$dir"
    # A name of its own, then a rename: two builds at once end with one whole program.
    go build -trimpath -ldflags '-s -w' -o "$dir/helm.$$" helm.sh/helm/v3/cmd/helm
    mv "$dir/helm.$$" "$dir/helm"
fi
echo "$dir/helm"
