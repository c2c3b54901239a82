"""PEFT's ``add_weighted_adapter``, on models with several LoRA adapters in memory.

By default it does what the name says: the merged adapter's delta is the merge of the adapters'
deltas. ``compat="peft"`` gives PEFT 0.21.2's own numbers instead, for every combination type.

=======================  ==================================  =======================================
what                     PEFT 0.21.2, and ``compat="peft"``  default
=======================  ==================================  =======================================
linear                   adds A's and B's apart: cross       the weighted sum, exact; as high a rank
                         terms B_i A_j; equal ranks only     as the sum has in any layer, any ranks
ties, dare_*,            on A and on B apart: depends on     on the deltas, as the types with _svd:
magnitude_prune          the basis each was trained in       gauge-invariant
use_rslora               kept with lora_alpha = r: result    switched off; scaling is 1
                         too large by sqrt(r)
name taken               returns, nothing said               InputError
layers                   target_modules together, filtered   exactly those that an adapter has
                         as adapters[0] is (exclude_modules,
                         layers_to_transform)
rank_pattern (linear,    factors narrower than r: cannot be  merged; one rank, no patterns
ties, ...)               loaded again (padded here)
one adapter              any type is linear                  the type asked for
weights                  the shorter of the lists decides;   one per adapter, or InputError;
                         rounded to float32                  float64
DoRA, lora_bias, KaSA,   dropped or wrong                    InputError, nothing changed
modules_to_save, ...                                         (compat: KaSA and layer_replication)
initialisations that     run again: the base weights change  refused (compat: not run)
rewrite the base
svd_rank > a layer       fails                               zeros up to that rank (compat: too)
                                                             InputError if larger than all layers
half precision (CPU)     every delta rounded, svd in float32 factors read exactly, float64 inside,
                         if weights are floats               rounded once
unknown "..._svd"        a zero adapter                      InputError (compat: PEFT's ValueError)
an error half-way        the new adapter stays               the model is as before (compat: too)
adapter merged into      taken out, with a warning           left in (compat: too)
the base
freezing                 every parameter whose name has      the new adapter only (compat: too)
                         adapter_name in it
mode                     dropout of the new adapter trains   that of the model (compat: too)
=======================  ==================================  =======================================
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal

import numpy as np
import torch
from peft.tuners.lora import LoraModel

from mergeprobe_fast import _env
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.integrations._peft_compat import add_like_peft
from mergeprobe_fast.integrations._peft_inject import check_name, injected, plain_config
from mergeprobe_fast.merging.merge import run
from mergeprobe_fast.merging.methods import MergedModule
from mergeprobe_fast.merging.registry import MERGE_METHODS
from mergeprobe_fast.merging.request import prepare
from mergeprobe_fast.record.peft_layers import (
    LiveLayer,
    live_source,
    refuse_unmergeable,
    tuner_of,
    weights_of,
)

_SVD_TYPES = ("ties_svd", "dare_ties_svd", "dare_linear_svd", "magnitude_prune_svd")


@_env.one_blas_thread()
def add_weighted_adapter(
    model: Any,
    adapters: Sequence[str],
    weights: Sequence[float] | None,
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
    *,
    compat: Literal["peft"] | None = None,
    seed: int | None = None,
    threads: int | None = None,
    **arguments: Any,
) -> None:
    """Add an adapter to the model that is the merge of some of its adapters.

    Everything is computed from the factors where they lie (weights on a GPU are copied to the
    host); no delta is formed. The new adapter is frozen, inactive, on the layers that any of the
    adapters has, in the dtype and on the device of their weights, of one rank, with scaling 1 and
    no patterns. Nothing else in the model changes, and nothing at all when this raises.

    Args:
        model: a ``PeftModel`` or its ``LoraModel``.
        adapters: names of adapters in the model.
        weights: one per adapter, multiplied into its delta; None: what ``mergeprobe_fast.merge``
            takes for None.
        adapter_name: of the new adapter.
        combination_type: one of PEFT's, or a name in ``mergeprobe_fast.MERGE_METHODS`` of a method
            that needs no calibration. "ties" and "ties_svd" are one method, like the other pairs.
        svd_rank: rank of the result; None: what the method takes for None.
        svd_clamp: for ``compat="peft"`` only: it depends on the signs of singular vectors, which
            are arbitrary.
        svd_full_matrices, svd_driver: of PEFT's own SVD; without effect on the default result.
        density: share of entries kept; None: the method's default.
        majority_sign_method: what elects signs in "ties" and "dare_ties".
        compat: "peft" for the numbers of PEFT 0.21.2 (the module's table). Then torch's global
            generator decides what DARE drops, as it does there: the same ``torch.manual_seed``
            before either gives the same masks, for which one layer's deltas exist at a time.
        seed: of methods that draw; None: their default.
        threads: default all.
        arguments: the method's own, see ``MERGE_METHODS[name].arguments``.

    Raises:
        InputError: (a ValueError) an adapter that is more than ``scale * B @ A``, a layer whose
            factors cannot be merged, arguments that do not fit, by name. ``compat="peft"`` raises
            what PEFT does, in its words.
    """
    tuner = tuner_of(model)
    if compat not in (None, "peft"):
        raise InputError(f"must be 'peft' or None, got {compat!r}", key="compat")
    if compat:
        if seed is not None or arguments:
            reason = "is unknown to PEFT; its chance is that of torch.manual_seed"
            raise InputError(reason, key=next(iter(arguments), "seed"))
        add_like_peft(
            tuner, adapters, weights, adapter_name, combination_type, svd_rank, threads=threads,
            svd_clamp=svd_clamp, svd_full_matrices=svd_full_matrices, svd_driver=svd_driver,
            density=density, majority_sign_method=majority_sign_method,
        )  # fmt: skip
        return
    adapters = _check(tuner, adapters, adapter_name, svd_clamp)
    method = combination_type
    if method in _SVD_TYPES:
        method = method.removesuffix("_svd")
    given = {"density": density, "seed": seed, **arguments}
    if majority_sign_method != "total":
        given["majority_sign_method"] = majority_sign_method
    if method in MERGE_METHODS and MERGE_METHODS[method].data:
        raise InputError(f"{method} needs a calibration; use mergeprobe_fast.merge",
                         key="combination_type")  # fmt: skip
    refuse_unmergeable(tuner, adapters)
    source, live = live_source(tuner, adapters)
    chosen, request = prepare(
        source, method, weights=None if weights is None else list(weights), rank=svd_rank,
        threads=threads, arguments={k: v for k, v in given.items() if v is not None},
    )  # fmt: skip
    ready = {m.module.name: _placed(m, live[m.module.name]) for m in run(chosen, request)}
    rank = max(len(a) for a, _ in ready.values())
    config = plain_config(tuner, adapters, list(ready), rank)
    with injected(tuner, adapter_name, config, empty=True) as layers:
        found = {path for path, _ in layers}
        if found != set(ready):
            path = min(found ^ set(ready))
            raise InputError("PEFT did not put the adapter where it belongs", key=path)
        for path, layer in layers:
            _set(layer, adapter_name, *ready.pop(path))


def _check(
    tuner: LoraModel, adapters: Sequence[str], adapter_name: str, svd_clamp: float | None
) -> list[str]:
    if isinstance(adapters, str) or not adapters:
        raise InputError(f"expected names of adapters, got {adapters!r}", key="adapters")
    for name in adapters:
        if name not in tuner.peft_config:
            known = ", ".join(tuner.peft_config)
            raise InputError(f"no adapter {name!r} in this model; there are: {known}",
                             key="adapters")  # fmt: skip
    check_name(adapter_name)
    if adapter_name in tuner.peft_config:
        raise InputError(f"there is an adapter {adapter_name!r} already", key="adapter_name")
    if svd_clamp is not None:
        reason = "depends on signs that are arbitrary; it is there for compat='peft' only"
        raise InputError(reason, key="svd_clamp")
    return list(adapters)


def _placed(m: MergedModule, live: LiveLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """A merged module in the layer's shapes, dtype and device; refused if that dtype loses it."""
    a, b = live.tensors(m.a, m.b, live.dtype)
    for given, tensor in ((m.a, a), (m.b, b)):
        if not torch.isfinite(tensor).all() or (np.any(given) and not tensor.any()):
            raise InputError(f"the merged update does not fit {live.dtype}", key=m.module.name)
    return a, b


def _set(layer: Any, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """Give a layer its factors, with zeros up to its rank."""
    missing = layer.r[name] - len(a)
    if missing:
        a = torch.cat([a, a.new_zeros(missing, *a.shape[1:])])
        b = torch.cat([b, b.new_zeros(len(b), missing, *b.shape[2:])], 1)
    for held, tensor in zip(weights_of(layer, name), (a, b), strict=True):
        if held.shape != tensor.shape:
            reason = f"PEFT expects {tuple(held.shape)}, the merge is {tuple(tensor.shape)}"
            raise InputError(reason, key=name)
    new_a, new_b = (torch.nn.Parameter(t, requires_grad=False) for t in (a, b))
    if name in layer.lora_A:
        layer.lora_A[name].weight, layer.lora_B[name].weight = new_a, new_b
    else:
        layer.lora_embedding_A[name], layer.lora_embedding_B[name] = new_a, new_b


@contextmanager
def drop_in(compat: Literal["peft"] | None = "peft") -> Iterator[None]:
    """Within the block, ``model.add_weighted_adapter`` of every PEFT LoRA model is this one.

    For code that cannot be changed, and for running PEFT's own tests against it.
    """
    original = LoraModel.add_weighted_adapter

    @wraps(original)
    def replacement(self: LoraModel, *args: Any, **kwargs: Any) -> None:
        add_weighted_adapter(self, *args, **{"compat": compat, **kwargs})

    LoraModel.add_weighted_adapter = replacement
    try:
        yield
    finally:
        LoraModel.add_weighted_adapter = original
