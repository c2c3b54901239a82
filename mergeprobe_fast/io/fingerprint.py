"""A fingerprint of an adapter: of what it adds to the base, not of its file."""

from __future__ import annotations

import hashlib

from .adapter import AdapterRef
from .read import read_tensor


def fingerprint(adapter: AdapterRef) -> str:
    """SHA-256 over every module's name, sizes, scale and stored factors, in hexadecimal.

    Reads all factors, one at a time. The name of the adapter and of its files do not matter, nor
    what else is in them. Raises ``InputError`` for a file that changed since it was opened.
    """
    digest = hashlib.sha256()
    for name in sorted(adapter.modules):
        m = adapter.modules[name]
        facts = (name, m.kind, m.d_out, m.d_in, m.rank, float(m.scale).hex(), m.a.dtype, m.b.dtype)
        digest.update(repr(facts).encode("utf-8"))
        for ref in (m.a, m.b):
            digest.update(read_tensor(ref))
    return digest.hexdigest()
