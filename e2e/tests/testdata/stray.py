"""Sends stray packets, and connects from ports of choice.

Arguments: address, port, and what to do in order: `stray:FIRST-LAST` sends a lone ACK from each of these ports, `ask:PORT` asks for a
page by HTTP from that port and prints the answer's first line or the error, `hold:FIRST-LAST` keeps connections from these ports, prints
`open`, and in the end how they ended; `cookie:PORT` asks in a connection that was never opened: a namespace of its own, with the
receiver's address, tells what SYN cookie it would send (RFC 4987), since a kernel has one secret for all namespaces. A stray packet carries a signature (RFC 2385) that nobody
has asked for, which is why the receiver drops it without an answer, after connection tracking has seen it.
"""

import socket
import struct
import subprocess
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


MAKER = """
import os, socket, struct, threading
to, port, source, own = {to!r}, {port}, {source!r}, {own}
os.system("PATH=$PATH:/usr/sbin; ip link set lo up; ip addr add %s/32 dev lo; ip addr add %s/32 dev lo" % (to, source))
open("/proc/sys/net/ipv4/tcp_syncookies", "w").write("2")
open("/proc/sys/net/ipv4/tcp_timestamps", "w").write("0")
seen = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
seen.settimeout(5)
listener = socket.create_server((to, port))
client = socket.socket()
client.bind((source, own))
threading.Thread(target=client.connect, args=((to, port),), daemon=True).start()
while True:
    frame = seen.recv(2048)
    tcp = frame[14 + (frame[14] & 15) * 4:]
    if frame[23] == 6 and tcp[13] & 18 == 18:
        print(*struct.unpack("!II", tcp[4:12]), flush=True)
        os._exit(0)
"""


def cookie(own):
    with socket.socket(FAMILY, socket.SOCK_DGRAM) as probe:
        probe.connect((TO, PORT))
        source = probe.getsockname()[0]
    maker = MAKER.format(to=TO, port=PORT, source=source, own=own)
    made = subprocess.run(["unshare", "--net", "--mount-proc", "--fork", "--pid", sys.executable, "-c", maker], capture_output=True, text=True)
    if made.returncode or not made.stdout:
        return f"no cookie: {made.stderr}"
    sent, acked = map(int, made.stdout.split())
    # Our own kernel knows nothing of that connection, and would end it.
    quiet = "table inet quiet { chain out { type filter hook output priority -500; tcp flags & rst == rst drop; }; }"
    subprocess.run(["/usr/sbin/nft", "-f", "-"], input=quiet, text=True, check=True)
    ends = socket.inet_pton(FAMILY, source) + socket.inet_pton(FAMILY, TO)
    with socket.socket(FAMILY, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        raw.settimeout(2)
        for data in (b"", b"GET / HTTP/1.1\r\nHost: cart\r\nConnection: close\r\n\r\n"):
            body = struct.pack("!HHIIBBHHH", own, PORT, acked, sent + 1 & 0xFFFFFFFF, 80, ACK | 8, 65535, 0, 0) + data
            body += b"\0" * (len(body) % 2)
            total = checksum(ends + struct.pack("!HH", 6, len(body)) + body)
            raw.sendto(body[:16] + struct.pack("!H", total) + body[18:], (TO, 0))
        try:
            while True:
                answer = raw.recv(4096)
                if b"HTTP/1.1" in answer:
                    return answer[answer.index(b"HTTP/1.1"):].split(b"\r\n")[0].decode()
        except TimeoutError:
            return "no answer"


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
    deeds = {"ask": ask, "cookie": cookie, "hold": hold, "stray": stray}
    try:
        print(deeds[what](*map(int, ports.split("-"))))
    except OSError as error:
        print(f"{type(error).__name__}: {error}")
