"""Says hello in TLS to an address, in ways that no library would, and tells whether a server answered: `hello.py ADDRESS NAME HOW`.

HOW: `whole`; `dribble`, a byte at a time; `records`, cut into small records; `ech`, with an Encrypted ClientHello besides; `twice`,
with two server names. Or `quic`: a datagram to port 443, and what the system says of it.
"""

import errno
import socket
import ssl
import struct
import sys
import time

ADDRESS, NAME, HOW = sys.argv[1:4]


def quic():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        out.settimeout(30)
        out.connect((ADDRESS, 443))
        try:
            out.send(b"\xc0" * 1200)
            out.recv(1)
        except OSError as error:
            return errno.errorcode.get(error.errno, type(error).__name__)
    return "answered"


def hello():
    """The handshake message that a library would send, without its record."""
    sent = ssl.MemoryBIO()
    session = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), sent, server_hostname=NAME)
    try:
        session.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return sent.read()[5:]


def with_extension(message, kind, content):
    """The message with one more extension at its front."""
    at = 4 + 2 + 32
    at += 1 + message[at]
    at += 2 + struct.unpack_from("!H", message, at)[0]
    at += 1 + message[at]
    (size,) = struct.unpack_from("!H", message, at)
    added = struct.pack("!HH", kind, len(content)) + content
    body = message[4:at] + struct.pack("!H", size + len(added)) + added + message[at + 2 :]
    return b"\1" + struct.pack("!I", len(body))[1:] + body


def records(message, size):
    pieces = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(b"\x16\3\1" + struct.pack("!H", len(piece)) + piece for piece in pieces)


def tls():
    message = hello()
    if HOW == "ech":
        message = with_extension(message, 0xFE0D, b"\0\0\1\0\1\7" + struct.pack("!H", 32) + b"k" * 32 + struct.pack("!H", 144) + b"p" * 144)
    if HOW == "twice":
        other = b"api.example"
        message = with_extension(message, 0, struct.pack("!HBH", len(other) + 3, 0, len(other)) + other)
    data = records(message, 40 if HOW == "records" else 1 << 14)
    with socket.create_connection((ADDRESS, 443), 30) as out:
        out.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(data), 1 if HOW == "dribble" else len(data)):
            out.sendall(data[at : at + (1 if HOW == "dribble" else len(data))])
            if HOW == "dribble":
                time.sleep(0.0005)
        try:
            return "answered" if out.recv(1) == b"\x16" else "refused"
        except OSError:
            return "refused"


print(quic() if HOW == "quic" else tls())
