"""A controller that holds a Lease as client-go's leader election does: every second it renews or, when the holder has let it run out
(by the controller's own clock), takes it. `leader.py HOST[:PORT] CA TOKEN-FILE NAMESPACE/LEASE HOLDER`; a connection that breaks is made
anew, and whoever held the lease and lost it ends."""
import datetime
import http.client
import json
import ssl
import sys
import time

LEASE_S = 15
host, ca, token, lease, holder = sys.argv[1:]
namespace, name = lease.split("/")
leases = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
checks = ssl.create_default_context(cafile=ca)
connection, seen, since, held = None, None, 0.0, False


def ask(method, path, body=None):
    global connection
    if connection is None:
        connection = http.client.HTTPSConnection(host, timeout=5, context=checks)
    with open(token, encoding="ascii") as file:
        headers = {"authorization": f"Bearer {file.read()}", "content-type": "application/json"}
    try:
        connection.request(method, path, body and json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    except Exception:
        connection.close()
        connection = None
        raise


def turn():
    global seen, since, held
    status, found = ask("GET", f"{leases}/{name}")
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    spec = {"holderIdentity": holder, "leaseDurationSeconds": LEASE_S, "renewTime": now, "leaseTransitions": 0}
    if status == 404:
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name}, "spec": spec}
        held = ask("POST", leases, body)[0] == 201
        return
    assert status == 200, found
    if found["spec"] != seen:
        seen, since = found["spec"], time.monotonic()
    if seen["holderIdentity"] != holder:
        if held:
            sys.exit(f"lost to {seen['holderIdentity']}")
        if time.monotonic() - since < LEASE_S:
            return
        spec["leaseTransitions"] = seen["leaseTransitions"] + 1
    else:
        spec["leaseTransitions"] = seen["leaseTransitions"]
    held = ask("PUT", f"{leases}/{name}", {**found, "spec": spec})[0] == 200


while True:
    try:
        turn()
    except (OSError, http.client.HTTPException, AssertionError) as error:
        print("again:", repr(error), file=sys.stderr, flush=True)
    time.sleep(1)
