"""A gRPC server with TLS on 50051 (`serve FOLDER`, which holds host.pem and host.key), and clients that check certificates by
FOLDER/ca.pem: `call FOLDER HOST [ADDRESS]` (gRPC, by name or at an address) and `get FOLDER HOST` (urllib); an address is nobody's
name, so that `get` does not check its certificate. The server answers with the address of who asks."""
import ssl
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


{"serve": serve, "call": call, "get": get}[sys.argv[1]](*sys.argv[3:])
