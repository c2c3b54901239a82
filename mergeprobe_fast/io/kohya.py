"""kohya's single files: which keys are theirs, and what their metadata says.

``<module>.lora_down.weight`` (r, in[, kh, kw]), ``<module>.lora_up.weight`` (out, r[, 1, 1]) and a
scalar ``<module>.alpha``; scale = alpha / r. LyCORIS has the same keys for plain LoRA and LoCon.
Module names are paths with their dots made underscores, which cannot be turned back: they are kept.
Source: kohya-ss/sd-scripts, `networks/lora.py` and `networks/svd_merge_lora.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_KEY = re.compile(r"(lora|lycoris)_[^.]+\.", re.DOTALL)

# Where a file says what it was trained on, in the order of how comparable the texts are.
_BASE_KEYS = ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name")


def is_key(key: str) -> bool:
    """Whether a key begins with a module name as kohya and LyCORIS write them."""
    return _KEY.match(key) is not None


def declared(metadata: Mapping[str, str], key: str) -> str | None:
    """A metadata entry, or None when absent; trainers write a missing value as 'None'."""
    value = metadata.get(key)
    return None if value in (None, "", "None") else value


def base_model(metadata: Mapping[str, str]) -> str | None:
    """What the trainer calls the base model; free text. ``modelspec.architecture`` less '/lora'."""
    for key in _BASE_KEYS:
        value = declared(metadata, key)
        if value is not None:
            return value.removesuffix("/lora") if key == "modelspec.architecture" else value
    return None


def alpha_note(metadata: Mapping[str, str]) -> str | None:
    """What to say of a file without alpha tensors whose metadata names an alpha all the same."""
    alpha = declared(metadata, "ss_network_alpha")
    if alpha is None or alpha == declared(metadata, "ss_network_dim"):
        return None
    return f"ss_network_alpha is {alpha[:40]!r}, which kohya's own tools do not read back"
