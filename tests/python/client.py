"""A stock QMP client, qemu.qmp from PyPI, that does what it is told line by line.

Each line of standard input is an object, and has one line in answer:

    {"execute": NAME, "arguments": {...}}   {"return": ...} or {"error": TEXT}
    {"wait": DATA}                          the first event with that data since the last one waited for
"""

import asyncio
import json
import sys

from qemu.qmp import EventListener, ExecuteError, QMPClient


async def wait(listener, data):
    async for event in listener:
        if event.get("data") == data:
            return dict(event)
    raise AssertionError("no more events")


async def execute(client, request):
    try:
        return {"return": await client.execute(request["execute"], request["arguments"])}
    except ExecuteError as error:
        return {"error": str(error)}


async def main(path):
    client = QMPClient("test")
    listener = EventListener(names=["JOB_STATUS_CHANGE"])
    client.register_listener(listener)
    await client.connect(path)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        request = json.loads(line)
        if "wait" in request:
            answer = await wait(listener, request["wait"])
        else:
            answer = await execute(client, request)
        print(json.dumps(answer), flush=True)
    await client.disconnect()


asyncio.run(main(sys.argv[1]))
