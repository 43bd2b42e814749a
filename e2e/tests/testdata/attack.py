"""Tries to get packets out of a pod past everything that is in the pod: with marks, raw sockets and frames written by hand.

Arguments: the pod's own addresses, those of the prey outside, of a pod outside of the mesh, of one in the mesh, and of the node;
each as `IPv4,IPv6`. Whether something came out is seen at the prey; nothing here can tell. What the system refuses is passed over.
"""

import ipaddress
import socket
import struct
import subprocess
import sys

OWN, PREY, PLAIN, MATE, NODE = [argument.split(",") for argument in sys.argv[1:6]]
MARK = 0x539
SYN, ACK = 2, 16


def tried(attempt):
    try:
        attempt()
    except OSError:
        pass


def raw(ip):
    return ipaddress.ip_address(ip).packed


def checksum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def pseudo(source, target, proto, length):
    if ":" in source:
        return raw(source) + raw(target) + struct.pack("!IHBB", length, 0, 0, proto)
    return raw(source) + raw(target) + struct.pack("!BBH", 0, proto, length)


def with_sum(source, target, proto, body, at):
    total = checksum(pseudo(source, target, proto, len(body)) + body)
    return body[:at] + struct.pack("!H", total) + body[at + 2 :]


def tcp(source, target, near, far, flags, data=b"", sequence=1000, acked=0):
    body = struct.pack("!HHIIBBHHH", near, far, sequence, acked, 5 << 4, flags, 65535, 0, 0) + data
    return 6, with_sum(source, target, 6, body, 16)


def udp(source, target, near, far, data):
    return 17, with_sum(source, target, 17, struct.pack("!HHHH", near, far, 8 + len(data), 0) + data, 6)


def icmp(source, target, kind, code, data):
    body = struct.pack("!BBHHH", kind, code, 0, 7, 1) + data
    if ":" in source:
        return 58, with_sum(source, target, 58, body, 2)
    return 1, body[:2] + struct.pack("!H", checksum(body)) + body[4:]


def ip(source, target, proto, body, options=b"", fragment=0):
    if ":" in source:
        return struct.pack("!IHBB", 6 << 28, len(body), proto, 64) + raw(source) + raw(target) + body
    words = 5 + len(options) // 4
    head = struct.pack("!BBHHHBBH", 4 << 4 | words, 0, words * 4 + len(body), 77, fragment, 64, proto, 0)
    head += raw(source) + raw(target) + options
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body


def packet(source, target, made):
    return ip(source, target, *made)


def strangers(source, target):
    """One packet of every kind."""
    v6 = ":" in source
    echo = (128 if v6 else 8), 0
    yield packet(source, target, udp(source, target, 53, 53, b"question"))
    yield packet(source, target, udp(source, target, 40000, 443, b"\xc0" * 1200))
    for port in (80, 443, 15008):
        yield packet(source, target, tcp(source, target, 40001, port, SYN))
    yield packet(source, target, tcp(source, target, 443, 40001, SYN | ACK, acked=1))
    yield packet(source, target, icmp(source, target, *echo, b"x" * 16))
    inner = packet(source, target, udp(source, target, 53, 53, b"inner"))
    for proto in (4, 41, 47, 50, 132, 253):
        yield ip(source, target, proto, inner)
    if v6:
        _, question = udp(source, target, 53, 53, b"behind a header")
        for header in (0, 43, 60):
            yield ip(source, target, header, bytes([17, 0]) + b"\x01\x04" + b"\0" * 4 + question)
        yield ip(source, target, 44, bytes([17, 0]) + struct.pack("!HI", 0, 9) + question)
    else:
        _, question = udp(source, target, 53, 53, b"in two pieces...")
        yield ip(source, target, 17, question[:16], fragment=0x2000)
        yield ip(source, target, 17, question[16:], fragment=2)


def invented(peer, port, target):
    """A conversation that the prey seems to begin, so that what goes out looks like the answer."""
    for near, flags in ((443, SYN), (443, ACK)):
        yield packet(target, peer, tcp(target, peer, near, port, flags, acked=2000))
        yield packet(peer, target, tcp(peer, target, port, near, SYN | ACK, sequence=2000, acked=1001))
        yield packet(peer, target, tcp(peer, target, port, near, ACK, b"carried out", 2001, 1001))
    yield packet(target, peer, udp(target, peer, 53, port, b"question"))
    yield packet(peer, target, udp(peer, target, port, 53, b"carried out"))
    about = packet(target, peer, tcp(target, peer, 443, port, SYN))
    kind = (1, 4) if ":" in peer else (3, 3)
    yield packet(peer, target, icmp(peer, target, *kind, about))


def about_others(own, peer, target):
    """An error about what the prey has sent to another pod. What it quotes is the sender's to write."""
    quoted = packet(target, peer, udp(target, peer, 4444, 7777, b"carried out"))
    kind = (1, 4) if ":" in peer else (3, 1)
    yield packet(own, target, icmp(own, target, *kind, quoted))


def detours(own, mate, node, target):
    """To somebody who might pass it on."""
    inner = packet(own, target, udp(own, target, 53, 53, b"inner"))
    for proto in (4, 41, 47):
        for via in (node, mate):
            yield ip(own, via, proto, inner)
    for port in (4789, 6081, 8472):
        frame = struct.pack("!II", 0x08000000, 1 << 8) + b"\2" * 12 + b"\x08\0" + inner
        yield packet(own, node, udp(own, node, 50000, port, frame))
    if ":" not in own:
        _, begin = tcp(own, mate, 40002, 15008, SYN)
        for option in (0x83, 0x89):
            yield ip(own, mate, 6, begin, options=bytes([option, 7, 4]) + raw(target) + b"\0")


def frames():
    for family in (0, 1):
        own, prey, plain, mate, node = (group[family] for group in (OWN, PREY, PLAIN, MATE, NODE))
        kind = b"\x86\xdd" if family else b"\x08\0"
        for source in (own, prey, plain, mate, node):
            for one in strangers(source, prey):
                yield kind + one
        for peer, port in ((own, 15008), (mate, 15008), (plain, 9000), (node, 15008), (own, 9000)):
            for one in invented(peer, port, prey):
                yield kind + one
        for one in about_others(own, plain, prey):
            yield kind + one
        for one in detours(own, mate, node, prey):
            yield kind + one
        plainly = packet(own, prey, udp(own, prey, 53, 53, b"tagged"))
        yield b"\x81\0\0\x07" + kind + plainly
        yield b"\x88\xa8\0\x07\x81\0\0\x07" + kind + plainly
    yield b"\x88\xb5" + b"no protocol that anybody knows"


def by_hand():
    with open("/sys/class/net/eth0/address") as file:
        own = bytes.fromhex(file.read().strip().replace(":", ""))
    listed = subprocess.run(["ip", "neigh", "show", "dev", "eth0"], capture_output=True, text=True, check=False).stdout
    words = listed.split()
    near = bytes.fromhex(words[words.index("lladdr") + 1].replace(":", ""))
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as out:
        out.bind(("eth0", 0))
        for frame in frames():
            tried(lambda frame=frame: out.send(near + own + frame))
            if frame[:2] == b"\x88\xb5":
                tried(lambda frame=frame: out.send(b"\xff" * 6 + own + frame))


def by_sockets():
    for family, prey in ((socket.AF_INET, PREY[0]), (socket.AF_INET6, PREY[1])):
        for mark in (0, MARK):
            for kind, ports in ((socket.SOCK_DGRAM, (53, 443)), (socket.SOCK_STREAM, (80, 443, 15008))):
                for port in ports:
                    with socket.socket(family, kind) as out:
                        out.settimeout(0.05)
                        tried(lambda out=out, mark=mark: out.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark))
                        tried(lambda out=out, prey=prey, port=port: out.connect((prey, port)))
                        tried(lambda out=out: out.send(b"out"))
        for proto in (socket.IPPROTO_ICMP, socket.IPPROTO_UDP, socket.IPPROTO_TCP, 132, 253):

            def send(family=family, proto=proto, prey=prey):
                with socket.socket(family, socket.SOCK_RAW, proto) as out:
                    out.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
                    out.sendto(struct.pack("!HHHHI", 53, 53, 16, 0, 0) * 2, (prey, 0))

            tried(send)


tried(by_hand)
tried(by_sockets)
print("tried")
