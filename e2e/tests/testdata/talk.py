"""A WebSocket server on 8765 and a gRPC server on 50051 (`serve`), and clients of both (`ask HOST`), with the libraries that
people use. Says "well" when everything came back as it was sent."""
import asyncio
import sys
from concurrent import futures

import grpc
import websockets


def handlers():
    def unary(data, context):
        if data == b"refuse":
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not today")
        context.set_trailing_metadata((("x-trailer", "1"),))
        return data

    def many(data, context):
        for number in range(int(data)):
            yield b"%d" % number

    return grpc.method_handlers_generic_handler("echo.Echo", {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Many": grpc.unary_stream_rpc_method_handler(many),
        "Sum": grpc.stream_unary_rpc_method_handler(lambda all, context: b"%d" % sum(len(one) for one in all)),
        "Each": grpc.stream_stream_rpc_method_handler(lambda all, context: all),
    })


async def chat(socket, path):
    async for message in socket:
        await socket.send(message)


async def serve():
    server = grpc.server(futures.ThreadPoolExecutor(8), handlers=(handlers(),))
    assert server.add_insecure_port("[::]:50051")
    server.start()
    async with websockets.serve(chat, None, 8765, max_size=None):
        await asyncio.Future()


async def talk(host):
    async with websockets.connect(f"ws://{host}:8765/chat", max_size=None) as socket:
        for message in ["hello", "x" * 300_000, bytes(range(256)) * 1000, ""]:
            await socket.send(message)
            assert await socket.recv() == message
        await (await socket.ping())
        sent = [str(number) for number in range(2000)]
        receive = asyncio.ensure_future(gather(socket, len(sent)))
        for message in sent:
            await socket.send(message)
        assert await receive == sent
    try:
        async with websockets.connect(f"ws://{host}:8765/closed"):
            raise AssertionError("let in")
    except websockets.exceptions.InvalidStatusCode as error:
        assert error.status_code == 403, error


async def gather(socket, count):
    return [await socket.recv() for _ in range(count)]


def call(host):
    with grpc.insecure_channel(f"{host}:50051") as channel:
        unary = channel.unary_unary("/echo.Echo/Unary")
        answer, about = unary.with_call(b"x" * 1_000_000, timeout=30)
        assert len(answer) == 1_000_000 and ("x-trailer", "1") in about.trailing_metadata()
        assert len(list(channel.unary_stream("/echo.Echo/Many")(b"5000", timeout=30))) == 5000
        assert channel.stream_unary("/echo.Echo/Sum")((b"ab" for _ in range(5000)), timeout=30) == b"10000"
        each = channel.stream_stream("/echo.Echo/Each")((b"%d" % n for n in range(3000)), timeout=30)
        assert list(each) == [b"%d" % n for n in range(3000)]
        for method, data, code in [
            ("Unary", b"refuse", grpc.StatusCode.FAILED_PRECONDITION),
            ("Nothing", b"", grpc.StatusCode.UNIMPLEMENTED),
            ("Closed", b"", grpc.StatusCode.PERMISSION_DENIED),
        ]:
            try:
                channel.unary_unary(f"/echo.Echo/{method}")(data, timeout=30)
                raise AssertionError(method)
            except grpc.RpcError as error:
                assert error.code() == code, (method, error)


if sys.argv[1] == "serve":
    asyncio.run(serve())
else:
    asyncio.run(talk(sys.argv[2]))
    call(sys.argv[2])
    print("well")
