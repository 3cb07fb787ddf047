"""What lies in the state file of a session."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from mustafar import Session


def pages_of(session: Session, path: Path) -> np.ndarray:
    """Bytes of the compressed store, uint8 [pages, page_bytes], from a state file."""
    session.save(path)
    whole = path.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", whole, 16)
    header = json.loads(whole[64 : 64 + header_bytes])
    at = 64 + (header_bytes + 63) // 64 * 64
    for section in header["sections"]:
        if section["name"] == "pages":
            break
        at += (section["bytes"] + 63) // 64 * 64
    return np.frombuffer(whole, np.uint8, section["bytes"], at).reshape(-1, header["page_bytes"])
