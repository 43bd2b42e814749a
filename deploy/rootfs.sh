#!/bin/sh
# Assembles the files of a container image in a folder: the one list of what is in an image and why. The Dockerfile uses it, and
# so does whoever makes images without a container engine. It runs on a glibc system of the kind that built the programs.
#
#   deploy/rootfs.sh control|ztunnel PROGRAMS FOLDER     PROGRAMS: the folder with the built programs, target/release
#
# There is no shell, no package manager and nothing else in the images.
set -eu
PATH=$PATH:/usr/sbin:/sbin
[ $# = 3 ] || { sed -n 5p "$0" >&2; exit 2; }
part=$1 programs=$2 folder=$3

# add FILE [PATH]: a file under its own or another path, and, of a program, the libraries that it is linked to.
add() {
    to=$folder${2:-$1}
    mkdir -p "$(dirname "$to")"
    cp -L "$1" "$to"
    # `ldd` says `name => /path (address)`, or `/path (address)` of the loader.
    ldd "$1" 2>/dev/null | sed -nE 's#^[[:space:]]*(.* => )?(/[^ ]+) \(0x.*#\2#p' | while read -r library; do
        [ -e "$folder$library" ] || { mkdir -p "$folder$(dirname "$library")" && cp -L "$library" "$folder$library"; }
    done
}

mkdir -p "$folder/etc" "$folder/tmp" "$folder/run" "$folder/var"
chmod 1777 "$folder/tmp"
ln -sfn /run "$folder/var/run"
echo 'root:x:0:0:root:/:/sbin/nologin
tulle:x:65532:65532:tulle:/:/sbin/nologin' >"$folder/etc/passwd"
echo 'root:x:0:
tulle:x:65532:' >"$folder/etc/group"
echo 'hosts: files dns' >"$folder/etc/nsswitch.conf"

# Roots of the system: control fetches key sets by HTTPS, the egress gateway and, by `verify`, the node check hosts outside.
roots=/etc/ssl/certs/ca-certificates.crt
if [ -r $roots ]; then add $roots; else echo "rootfs.sh: there is no $roots (package ca-certificates); going on without" >&2; fi

case $part in
control)
    add "$programs/control" /usr/local/bin/control
    # The chart's uninstall hook runs it.
    add "$programs/tulle" /usr/local/bin/tulle
    ;;
ztunnel)
    # The node's proxy, the egress gateway, the CNI plugin (copied to the node under another name) and its installer.
    add "$programs/ztunnel" /usr/local/bin/ztunnel
    # Redirect rules, the fence, datagram filters.
    add "$(command -v nft)" /usr/sbin/nft
    # Routes and addresses in pods' network namespaces.
    add "$(command -v ip)" /usr/sbin/ip
    # What is left of a cleaned node's pod during `tulle uninstall`.
    add "$(command -v sleep)" /bin/sleep
    ;;
*)
    echo "rootfs.sh: $part is neither control nor ztunnel" >&2
    exit 2
    ;;
esac
