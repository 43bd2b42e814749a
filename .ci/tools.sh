#!/bin/sh
# Makes sure of the system tools that the lab uses (nft and ip) and, with `all`, of the programs that tests compare with and put through
# the mesh, or with `kube` of what a cluster's nodes need. Installs them where that needs no question (root on a Debian-like system), and otherwise prints the command.
set -eu
PATH=$PATH:/usr/sbin:/sbin

missing=''
# need PACKAGE PROGRAM…: the package is missing if one of its programs is.
need() {
    package=$1
    shift
    for program in "$@"; do
        command -v "$program" >/dev/null 2>&1 || { missing="$missing $package" && return; }
    done
}
need nftables nft
need iproute2 ip
if [ "${1:-}" = all ]; then
    need bind9-dnsutils dig
    need unbound unbound
    need curl curl
    need util-linux setpriv
    need nginx-light nginx
    need nghttp2-client h2load
    need wrk wrk
    [ -d /usr/lib/python3/dist-packages/websockets ] || missing="$missing python3-websockets"
    [ -d /usr/lib/python3/dist-packages/h2 ] || missing="$missing python3-h2"
    [ -d /usr/lib/python3/dist-packages/wsproto ] || missing="$missing python3-wsproto"
    [ -d /usr/lib/python3/dist-packages/grpc ] || missing="$missing python3-grpcio"
    need redis-server redis-server
    need redis-tools redis-cli redis-benchmark
    need openssh-server sshd
    need openssh-client ssh scp ssh-keygen
    need git git
    need wget wget
    [ -x /usr/lib/cni/bridge ] || [ -x /opt/cni/bin/bridge ] || missing="$missing containernetworking-plugins"
    need iperf3 iperf3
    need postgresql-client psql
    [ -n "$(find /usr/lib/postgresql -name initdb 2>/dev/null | head -1)" ] || missing="$missing postgresql"
    need etcd-server etcd
    [ -x /usr/lib/cni/bridge ] || [ -x /opt/cni/bin/bridge ] || missing="$missing containernetworking-plugins"
    [ -n "$(find /usr/lib -maxdepth 2 -name libnss_wrapper.so 2>/dev/null | head -1)" ] || missing="$missing libnss-wrapper"
fi
if [ "${1:-}" = kube ]; then
    # What nodes of `lab cluster` run besides Kubernetes' own programs (.ci/kube.sh).
    need etcd-server etcd
    need containerd containerd ctr
    need runc runc
    need busybox-static busybox
    [ -x /usr/lib/cni/ptp ] || missing="$missing containernetworking-plugins"
fi
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing$missing (apt-get)"
    # Run level 1: packages of servers do not start them.
    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
    apt-get update -qq
    # shellcheck disable=SC2086 # a list of packages
    apt-get install -y -qq --no-install-recommends $missing >/dev/null
    exit 0
fi
echo "missing:$missing. Install with: sudo apt-get install$missing (or the same packages of your system)" >&2
exit 1
