"""A WebSocket server over HTTP/2 on 8766 (`serve`), and a client of it (`ask HOST`), with the libraries that Python's servers
use. Says "well" when everything came back as it was sent."""
import socket
import sys
import threading
import time

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, ResponseReceived
from h2.settings import SettingCodes, Settings
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage


class Peer:
    """One connection. What is said waits until the other side takes it."""

    def __init__(self, sock, client):
        self.sock = sock
        self.h2 = H2Connection(H2Configuration(client_side=client, header_encoding="utf-8"))
        if not client:
            self.h2.local_settings = Settings(client=False, initial_values={SettingCodes.ENABLE_CONNECT_PROTOCOL: 1})
        self.h2.initiate_connection()
        self.waiting = {}
        self.flush()

    def say(self, stream, data):
        self.waiting.setdefault(stream, bytearray()).extend(data)

    def flush(self):
        for stream, data in self.waiting.items():
            while data:
                room = min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size)
                if room <= 0:
                    break
                self.h2.send_data(stream, bytes(data[:room]))
                del data[:room]
        self.sock.sendall(self.h2.data_to_send())

    def events(self):
        while True:
            self.flush()
            data = self.sock.recv(65536)
            if not data:
                return
            for event in self.h2.receive_data(data):
                if isinstance(event, DataReceived):
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                yield event


def serve(sock):
    peer, chats = Peer(sock, False), {}
    for event in peer.events():
        if isinstance(event, RequestReceived):
            headers = dict(event.headers)
            chat = headers[":method"] == "CONNECT" and headers.get(":protocol") == "websocket"
            peer.h2.send_headers(event.stream_id, [(":status", "200")], end_stream=not chat)
            if chat:
                chats[event.stream_id] = Connection(ConnectionType.SERVER)
        elif isinstance(event, DataReceived) and event.stream_id in chats:
            chat = chats[event.stream_id]
            chat.receive_data(event.data)
            for said in chat.events():
                answer = said.response() if isinstance(said, (Ping, CloseConnection)) else said
                peer.say(event.stream_id, chat.send(answer))


def request(peer, method, path, protocol=None):
    """The stream of a request and the status of its answer."""
    stream = peer.h2.get_next_available_stream_id()
    headers = [(":method", method), (":scheme", "http"), (":authority", "both"), (":path", path)]
    if protocol:
        headers += [(":protocol", protocol), ("sec-websocket-version", "13")]
    peer.h2.send_headers(stream, headers, end_stream=not protocol)
    for event in peer.events():
        if isinstance(event, ResponseReceived) and event.stream_id == stream:
            return stream, dict(event.headers)[":status"]
    raise AssertionError("no answer")


def offered(host):
    """A connection on which WebSockets are offered: a proxy may have to see a server's answer first."""
    for _ in range(200):
        peer = Peer(socket.create_connection((host, 8766), 60), True)
        assert request(peer, "GET", "/")[1] == "200"
        if peer.h2.remote_settings.enable_connect_protocol:
            return peer
        time.sleep(0.1)
    raise AssertionError("not offered")


def ask(host):
    peer = offered(host)
    assert request(peer, "CONNECT", "/closed", "websocket")[1] == "403"
    stream, status = request(peer, "CONNECT", "/chat", "websocket")
    assert status == "200", status
    chat = Connection(ConnectionType.CLIENT)
    texts = ["hello", "x" * 300_000] + [str(number) for number in range(2000)]
    data = bytes(range(256)) * 1000
    for message in [TextMessage(text) for text in texts] + [BytesMessage(data), Ping(b"there"), CloseConnection(1000)]:
        peer.say(stream, chat.send(message))
    heard, text, sound = [], "", b""
    for event in peer.events():
        if not isinstance(event, DataReceived):
            continue
        chat.receive_data(event.data)
        for said in chat.events():
            if isinstance(said, TextMessage):
                text += said.data
                if said.message_finished:
                    heard.append(text)
                    text = ""
            elif isinstance(said, BytesMessage):
                sound += said.data
            elif isinstance(said, Pong):
                assert bytes(said.payload) == b"there"
                heard.append("pong")
            elif isinstance(said, CloseConnection):
                assert heard == texts + ["pong"] and sound == data
                return
    raise AssertionError("broken off")


if sys.argv[1] == "serve":
    listener = socket.create_server(("::", 8766), family=socket.AF_INET6, dualstack_ipv6=True)
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
else:
    ask(sys.argv[2])
    print("well")
