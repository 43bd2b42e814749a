#!/bin/sh
# Makes sure of the system tools that the lab uses, nft and ip, and of those that tests compare with, dig and unbound.
# Installs them where that needs no question (root on a Debian-like system), and otherwise prints the command.
set -eu

missing=''
command -v nft >/dev/null 2>&1 || [ -x /usr/sbin/nft ] || missing="$missing nftables"
command -v ip >/dev/null 2>&1 || [ -x /usr/sbin/ip ] || missing="$missing iproute2"
command -v dig >/dev/null 2>&1 || missing="$missing bind9-dnsutils"
command -v unbound >/dev/null 2>&1 || [ -x /usr/sbin/unbound ] || missing="$missing unbound"
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing$missing (apt-get), which the lab and its tests need"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # shellcheck disable=SC2086 # a list of packages
    apt-get install -y -qq --no-install-recommends $missing >/dev/null
    exit 0
fi
echo "missing:$missing. Install with: sudo apt-get install$missing (or the same packages of your system)" >&2
exit 1
