"""A gRPC server with TLS on 50051 (`serve KEY CERTIFICATE`), and a client (`ask HOST CA`), which prints what came back."""
import sys
from concurrent import futures

import grpc


def read(path):
    with open(path, "rb") as file:
        return file.read()


if sys.argv[1] == "serve":
    handlers = {"Say": grpc.unary_unary_rpc_method_handler(lambda data, context: b"said " + data)}
    server = grpc.server(futures.ThreadPoolExecutor(2), handlers=(grpc.method_handlers_generic_handler("echo.Echo", handlers),))
    credentials = grpc.ssl_server_credentials([(read(sys.argv[2]), read(sys.argv[3]))])
    assert server.add_secure_port("[::]:50051", credentials)
    server.start()
    server.wait_for_termination()
else:
    with grpc.secure_channel(f"{sys.argv[2]}:50051", grpc.ssl_channel_credentials(read(sys.argv[3]))) as channel:
        print(channel.unary_unary("/echo.Echo/Say")(b"hello", timeout=20).decode())
