"""The nodes that Flower's SuperLink knows: number, name, key and state of each.

Flower's command line tells neither names nor keys, so its interface for operators is asked.
"""

import ssl
from dataclasses import dataclass

import httpx
from cryptography.hazmat.primitives import serialization
from flwr.proto.control_pb2 import ListNodesRequest, ListNodesResponse

from dafne_federated.core.errors import RunError
from dafne_federated.server.deployment_folder import ServerFolder

_TIMEOUT = 30.0  # seconds


@dataclass(frozen=True)
class FlowerNode:
    """One node.

    Attributes:
        number: Flower's own.
        name: That it was registered with.
        public_key: Its key, one line as OpenSSH writes it.
        state: ``registered`` (and never seen), ``online`` or ``offline``.
    """

    number: int
    name: str
    public_key: str
    state: str


def flower_nodes(folder: ServerFolder) -> list[FlowerNode]:
    """Return the nodes that are registered; those that were taken back are not.

    Raises:
        RunError: The SuperLink gives no answer.
    """
    url = f"https://127.0.0.1:{folder.settings.local_port}/v1/control/list-nodes"
    trust = ssl.create_default_context(cafile=str(folder.authority))
    headers = {"content-type": "application/protobuf"}
    try:
        with httpx.Client(verify=trust, trust_env=False, timeout=_TIMEOUT) as client:
            content = ListNodesRequest().SerializeToString()
            answer = client.post(url, content=content, headers=headers).raise_for_status()
    except httpx.HTTPError as error:
        msg = f"Flower's SuperLink does not say which sites it knows: {error}"
        raise RunError(msg) from None
    listed = ListNodesResponse.FromString(answer.content).nodes_info
    return [
        FlowerNode(node.node_id, node.name, _openssh(node.public_key), node.status)
        for node in listed
        if not node.unregistered_at
    ]


def _openssh(pem: bytes) -> str:
    key = serialization.load_pem_public_key(pem)
    openssh = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return key.public_bytes(*openssh).decode()
