"""Where a running cluster is looked for, and who answers there: Ray itself would wait for minutes, without a word."""

from __future__ import annotations

import os
import re
import socket

_ANSWER_SECONDS = 10.0
_OUTSIDE = "ray://"
_WANTED = "HOST:PORT of its head, as `ray start --head` prints it (port 6379 by default)"
_CLIENT = f"{_OUTSIDE}HOST:10001"


def target_of(address: str | None) -> str:
    """``address``, else RAY_ADDRESS where it says anything, else ``"local"``: a cluster of our own."""
    given, named = (text.strip() for text in (address or "", os.environ.get("RAY_ADDRESS", "")))
    return (named if given in ("", "auto") else "") or given or "local"


def is_outside(target: str) -> bool:
    """Whether the driver would stay outside of the cluster: Ray Client."""
    return target.startswith(_OUTSIDE)


def require_an_answer(target: str) -> None:
    """Checks that a head is at ``target``, within seconds; ``"local"``, ``"auto"`` and other words are no addresses.

    Raises:
        ValueError: it is the address of something else, which the message names.
        OSError: nothing answers there, or it is no address at which anything could.
    """
    scheme, _, rest = target.rpartition("://")
    if scheme in ("http", "https"):
        raise ValueError(f"that is the job server's, for `ray job submit --address`; wanted is {_WANTED}")
    if scheme not in ("", "ray"):
        raise ValueError(f"there are no clusters of {scheme}://; wanted is {_WANTED}")
    host, colon, port = rest.partition("/")[0].rpartition(":")
    if not colon:
        if not scheme:
            return
        host, port = port, ""
    host = _checked(host, port, _CLIENT if scheme else _WANTED)
    with socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS):
        pass
    if os.environ.get("RAY_USE_TLS", "0") != "1":
        _require_ray(rest, outside=bool(scheme))


def _checked(host: str, port: str, wanted: str) -> str:
    """The host without the brackets of IPv6."""
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
        raise ConnectionError(f"a port is a number in 1..65535, got {port!r}; wanted is {wanted}")
    if host.startswith("[") and host.endswith("]"):
        return host[1:-1]
    if not host or ":" in host:
        raise ConnectionError(f"wanted is {wanted}; an IPv6 address stands in brackets, as in [::1]:6379")
    return host


def _require_ray(target: str, *, outside: bool) -> None:
    """Asks what only a head knows, or Ray Client's server. Whoever wants a token first is the one, too."""
    import grpc
    from ray.core.generated import gcs_service_pb2 as head
    from ray.core.generated import gcs_service_pb2_grpc, ray_client_pb2_grpc
    from ray.core.generated import ray_client_pb2 as client

    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            if outside:
                ping = client.ClusterInfoRequest(type=client.ClusterInfoType.PING)  # type: ignore[attr-defined]
                ray_client_pb2_grpc.RayletDriverStub(channel).ClusterInfo(ping, timeout=_ANSWER_SECONDS)
            else:
                number = head.GetClusterIdRequest()  # type: ignore[attr-defined]
                gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetClusterId(number, timeout=_ANSWER_SECONDS)
        except grpc.RpcError as error:
            others = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.DEADLINE_EXCEEDED)
            if error.code() in others:
                wanted = _CLIENT if outside else _WANTED
                raise ValueError(
                    f"what answers there is something else (port 8265 is the dashboard's); wanted is {wanted}"
                ) from error
