"""A gRPC server with TLS on 50051 (`serve FOLDER`, which holds host.pem and host.key), repositories in FOLDER/git by git's own
protocol at 8418 of loopback (`git FOLDER`, for a server with TLS in front of it), and clients that check certificates by
FOLDER/ca.pem: `call FOLDER HOST [ADDRESS]` (gRPC, by name or at an address) and `get FOLDER HOST` (urllib); an address is nobody's
name, so that `get` does not check its certificate. The server answers with the address of who asks."""
import http.server
import os
import ssl
import subprocess
import sys
import urllib.request
from concurrent import futures

import grpc


def read(name):
    with open(f"{sys.argv[2]}/{name}", "rb") as file:
        return file.read()


def serve():
    answer = grpc.unary_unary_rpc_method_handler(lambda data, context: data + b" " + context.peer().encode())
    handler = grpc.method_handlers_generic_handler("who.Who", {"Asks": answer})
    server = grpc.server(futures.ThreadPoolExecutor(4), handlers=(handler,))
    own = grpc.ssl_server_credentials([(read("host.key"), read("host.pem"))])
    assert server.add_secure_port("[::]:50051", own)
    server.start()
    server.wait_for_termination()


class Git(http.server.BaseHTTPRequestHandler):
    """What a web server is to `git http-backend` (RFC 3875)."""

    def do_GET(self):
        path, _, query = self.path.partition("?")
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        more = {
            "GIT_PROJECT_ROOT": sys.argv[2],
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_PROTOCOL": self.headers.get("git-protocol", ""),
            "REQUEST_METHOD": self.command,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_TYPE": self.headers.get("content-type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("content-encoding", ""),
            "REMOTE_USER": "anybody",
        }
        made = subprocess.run(["git", "http-backend"], input=body, env={**os.environ, **more}, stdout=subprocess.PIPE, check=True)
        head, _, answer = made.stdout.partition(b"\r\n\r\n")
        fields = [line.split(": ", 1) for line in head.decode().split("\r\n")]
        self.send_response(next((int(value[:3]) for name, value in fields if name == "Status"), 200))
        for name, value in fields:
            if name != "Status":
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_GET


def git():
    http.server.ThreadingHTTPServer(("127.0.0.1", 8418), Git).serve_forever()


def call(host, address=None):
    options = [("grpc.ssl_target_name_override", host)] if address else []
    target = f"ipv4:{address}:50051" if address else f"{host}:50051"
    with grpc.secure_channel(target, grpc.ssl_channel_credentials(read("ca.pem")), options) as channel:
        print(channel.unary_unary("/who.Who/Asks")(b"inet", timeout=20).decode())


def get(host):
    checks = ssl.create_default_context(cafile=f"{sys.argv[2]}/ca.pem")
    if host[0].isdigit():
        checks = ssl._create_unverified_context()
    with urllib.request.urlopen(f"https://{host}/", context=checks, timeout=20) as answer:
        print(answer.read().decode())


{"serve": serve, "git": git, "call": call, "get": get}[sys.argv[1]](*sys.argv[3:])
