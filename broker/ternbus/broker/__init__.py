"""The protocol (docs/protocol.md), an MQTT client for it, and brokers as child processes.

The names below are public: a program that implements a device or an aggregator needs them. Everything else is private
and may change.
"""

from typing import TYPE_CHECKING

from ternbus.broker.exports import exports

if TYPE_CHECKING:
    from ternbus.broker.errors import ConfigError, FederationError, LinkError, ProtocolError
    from ternbus.broker.link.events import Arrived, Connected, Disconnected, LinkEvent, Published, Refused, Token
    from ternbus.broker.link.link import Link
    from ternbus.broker.link.tls import Tls
    from ternbus.broker.model_files import load_safetensors, save_safetensors
    from ternbus.broker.protocol import topics
    from ternbus.broker.protocol.endpoint import Endpoint
    from ternbus.broker.protocol.frame import FRAME_BYTES, Frame, build, parse
    from ternbus.broker.protocol.identity import AGGREGATOR, Identity, KeyId, enroll_proof, key_id, seal, verify
    from ternbus.broker.protocol.invitation import Invitation
    from ternbus.broker.protocol.messages import Enroll, Grant, Metrics, Offer, Receipt, Status, Update
    from ternbus.broker.protocol.model_messages import Delta, Head, Snapshot, SnapshotRef
    from ternbus.broker.protocol.parts import Collector, Whole, cut, whole
    from ternbus.broker.protocol.schema import (
        Schema,
        Tensor,
        Vector,
        to_tensors,
        to_vector,
        vector_digest,
        vector_of,
    )
    from ternbus.broker.protocol.ternary import Block, decode, encode, nearest_block
else:
    __getattr__, __dir__ = exports(
        __name__,
        {
            "ternbus.broker.errors": ["FederationError", "ProtocolError", "ConfigError", "LinkError"],
            "ternbus.broker.link.events": [
                "Token",
                "Connected",
                "Disconnected",
                "Arrived",
                "Published",
                "Refused",
                "LinkEvent",
            ],
            "ternbus.broker.link.link": ["Link"],
            "ternbus.broker.link.tls": ["Tls"],
            "ternbus.broker.model_files": ["load_safetensors", "save_safetensors"],
            "ternbus.broker.protocol": ["topics"],
            "ternbus.broker.protocol.endpoint": ["Endpoint"],
            "ternbus.broker.protocol.frame": ["FRAME_BYTES", "Frame", "build", "parse"],
            "ternbus.broker.protocol.identity": [
                "AGGREGATOR",
                "Identity",
                "KeyId",
                "enroll_proof",
                "key_id",
                "seal",
                "verify",
            ],
            "ternbus.broker.protocol.invitation": ["Invitation"],
            "ternbus.broker.protocol.messages": [
                "Enroll",
                "Grant",
                "Metrics",
                "Offer",
                "Receipt",
                "Status",
                "Update",
            ],
            "ternbus.broker.protocol.model_messages": ["Delta", "Head", "Snapshot", "SnapshotRef"],
            "ternbus.broker.protocol.parts": ["Collector", "Whole", "cut", "whole"],
            "ternbus.broker.protocol.schema": [
                "Schema",
                "Tensor",
                "Vector",
                "to_tensors",
                "to_vector",
                "vector_digest",
                "vector_of",
            ],
            "ternbus.broker.protocol.ternary": ["Block", "decode", "encode", "nearest_block"],
        },
    )

__all__ = [
    "AGGREGATOR",
    "FRAME_BYTES",
    "Arrived",
    "Block",
    "Collector",
    "ConfigError",
    "Connected",
    "Delta",
    "Disconnected",
    "Endpoint",
    "Enroll",
    "FederationError",
    "Frame",
    "Grant",
    "Head",
    "Identity",
    "Invitation",
    "KeyId",
    "Link",
    "LinkError",
    "LinkEvent",
    "Metrics",
    "Offer",
    "ProtocolError",
    "Published",
    "Receipt",
    "Refused",
    "Schema",
    "Snapshot",
    "SnapshotRef",
    "Status",
    "Tensor",
    "Tls",
    "Token",
    "Update",
    "Vector",
    "Whole",
    "build",
    "cut",
    "decode",
    "encode",
    "enroll_proof",
    "key_id",
    "load_safetensors",
    "nearest_block",
    "parse",
    "save_safetensors",
    "seal",
    "to_tensors",
    "to_vector",
    "topics",
    "vector_digest",
    "vector_of",
    "verify",
    "whole",
]
