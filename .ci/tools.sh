#!/bin/sh
# Makes sure of the two system tools that the lab uses, nft and ip. Installs them where that needs no question
# (root on a Debian-like system), and otherwise prints the command.
set -eu

missing=''
command -v nft >/dev/null 2>&1 || [ -x /usr/sbin/nft ] || missing="$missing nftables"
command -v ip >/dev/null 2>&1 || [ -x /usr/sbin/ip ] || missing="$missing iproute2"
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing$missing (apt-get), which the lab needs"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # shellcheck disable=SC2086 # a list of packages
    apt-get install -y -qq --no-install-recommends $missing >/dev/null
    exit 0
fi
echo "missing:$missing. Install with: sudo apt-get install$missing (or the same packages of your system)" >&2
exit 1
