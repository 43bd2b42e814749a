"""Sends stray packets, and connects from ports of choice.

Arguments: address, port, and what to do in order: `stray:FIRST-LAST` sends a lone ACK from each of these ports, `ask:PORT` asks for a
page by HTTP from that port and prints the answer's first line or the error, `hold:FIRST-LAST` keeps connections from these ports, prints
`open`, and in the end how they ended. A stray packet carries a signature (RFC 2385) that nobody
has asked for, which is why the receiver drops it without an answer, after connection tracking has seen it.
"""

import socket
import struct
import sys
import time

TO, PORT = sys.argv[1], int(sys.argv[2])
FAMILY = socket.AF_INET6 if ":" in TO else socket.AF_INET
ACK, HEADER = 16, 40


def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def stray(first, last):
    with socket.socket(FAMILY, socket.SOCK_DGRAM) as probe:
        probe.connect((TO, PORT))
        source = probe.getsockname()[0]
    ends = socket.inet_pton(FAMILY, source) + socket.inet_pton(FAMILY, TO)
    with socket.socket(FAMILY, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        for own in range(first, last + 1):
            body = struct.pack("!HHIIBBHHH", own, PORT, 1000, 2000, HEADER // 4 << 4, ACK, 65535, 0, 0)
            body += bytes([19, 18]) + b"x" * 16 + bytes([1, 1])
            total = checksum(ends + struct.pack("!HH", 6, len(body)) + body)
            raw.sendto(body[:16] + struct.pack("!H", total) + body[18:], (TO, 0))
    return "sent"


def opened(own):
    client = socket.socket(FAMILY, socket.SOCK_STREAM)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client.settimeout(5)
    client.bind(("", own))
    client.connect((TO, PORT))
    return client


def hold(first, last):
    clients = [opened(own) for own in range(first, last + 1)]
    print("open", flush=True)
    ends = []
    while clients:
        time.sleep(0.05)
        for client in list(clients):
            try:
                client.sendall(b"GET / HTTP/1.1\r\nHost: cart\r\n\r\n")
                client.settimeout(0.2)
                end = None if client.recv(4096) else "closed"
            except TimeoutError:
                # Who waits for an answer hears of a reset when it speaks again.
                end = None
            except OSError as error:
                end = type(error).__name__
            if end:
                ends.append(end)
                clients.remove(client)
                client.close()
    return " ".join(sorted(set(ends)))


def ask(own):
    with opened(own) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: cart\r\nConnection: close\r\n\r\n")
        return client.recv(4096).split(b"\r\n")[0].decode()


for deed in sys.argv[3:]:
    what, ports = deed.split(":")
    deeds = {"ask": ask, "hold": hold, "stray": stray}
    try:
        print(deeds[what](*map(int, ports.split("-"))))
    except OSError as error:
        print(f"{type(error).__name__}: {error}")
