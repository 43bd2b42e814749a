"""Holds a Lease as a controller does, until it is ended: `lease.py SERVER TOKEN CA LEASE`. One line for each renewal, over a new
connection and over one that is kept by turns: `ok`, or what failed."""

import datetime
import http.client
import json
import ssl
import sys
import time

SERVER, TOKEN, CA, LEASE = sys.argv[1:5]


def connection():
    context = ssl.create_default_context(cafile=CA)
    return http.client.HTTPSConnection(SERVER, timeout=5, context=context)


def renew(over):
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    spec = {"holderIdentity": "operator", "leaseDurationSeconds": 15, "renewTime": now}
    headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/merge-patch+json"}
    over.request("PATCH", LEASE, json.dumps({"spec": spec}), headers)
    answer = over.getresponse()
    answer.read()
    assert answer.status == 200, answer.status


kept = None
turn = 0
while True:
    turn += 1
    over = connection() if turn % 2 else (kept or connection())
    try:
        renew(over)
        print("ok", flush=True)
        if turn % 2:
            over.close()
        else:
            kept = over
    except (OSError, http.client.HTTPException, AssertionError) as error:
        print(f"{'new' if turn % 2 else 'kept'}: {error!r}", flush=True)
        over.close()
        kept = None
    time.sleep(0.2)
