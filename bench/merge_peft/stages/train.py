"""Training LoRA adapters of the upper layers, with probes, from what enters these layers."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergeprobe_fast import record
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import strict_json
from mergeprobe_fast.io.atomic import AtomicFolder

from ..model.base import Base
from ..model.batches import Row, collate, make_row
from ..model.suffix import Suffix, threads_of
from ..model.whole import WholeModel, layer_prefix
from ..tasks.item import Item
from ..tiers.recipe import Recipe
from .initial import input_moments, quiet_rows, random_rows, sparse_rows

RECORD_NAME = "training.json"
OTHERS_ITEMS = 100  # of each other domain, for OSRM: as many as in the paper
_WARMUP, _FINAL = 0.1, 0.1  # share of the steps, and of the rate that is left at the end
_CLIP = 1.0
_LOSS_WINDOW = 20  # last steps, whose mean loss is reported
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainingResult:
    """A trained adapter on disk.

    ``first_loss`` is that of the first step, ``loss`` the mean of the last ``_LOSS_WINDOW`` ones,
    in nats a target token. ``seconds`` is None where the adapter was there already.
    """

    recipe: Recipe
    adapter: Path
    probes: Path | None
    items: int
    first_loss: float
    loss: float
    seconds: float | None


def train(
    recipe: Recipe, base: Base, items: Sequence[Item], out_adapter: str | os.PathLike[str],
    out_probes: str | os.PathLike[str] | None, *, dtype: str = "float32",
    threads: int | None = None,
) -> TrainingResult:  # fmt: skip
    """Train one adapter with PEFT and write it as a PEFT folder, with probes of its first steps.

    AdamW without weight decay, the rate rising over a tenth of the steps and falling to a tenth,
    gradients clipped to a norm of 1, batches from epochs in an order of their own. The loss is the
    mean over the batch's target tokens. The base model is as it was before when this returns.

    The same recipe, items, machine, library versions and ``threads`` give the same bytes. Where
    ``out_adapter`` exists it is left alone, if this very training wrote it.

    Args:
        items: what the recipe takes is trained on; "osrm" looks at the other domains among them.
        out_adapter: folder; has a ``training.json`` too. It appears when all is done.
        out_probes: folder of the run (:class:`mergeprobe_fast.record.record`); None: no probes.
        dtype: of the factors that are written, "float32" or "bfloat16"; trained in float32.
        threads: of torch, while this runs; default: as many as it has.

    Raises:
        InputError: nothing to train on, modules that the model lacks, an output folder that is of
            something else, a loss that is not finite.
    """
    if dtype not in _DTYPES:
        raise InputError(f"{dtype!r} is none of {', '.join(_DTYPES)}", key="dtype")
    out, probes = Path(out_adapter), None if out_probes is None else Path(out_probes)
    mine = [item for item in items if recipe.takes(item)]
    if not mine:
        raise InputError(f"none of {len(items)} items is of {recipe.domain}", key="items")
    facts = {
        "recipe": json.loads(json.dumps(asdict(recipe))), "base": base.fingerprint,
        "dtype": dtype, "items": len(mine), "texts_sha256": _digest(mine),
    }  # fmt: skip
    if out.exists():
        return _already(recipe, out, probes, facts)
    started = time.perf_counter()
    folder = AtomicFolder(out)
    folder.check()
    names = _modules(recipe, base)
    with threads_of(threads), folder as temporary:
        suffix = base.runner(recipe.layers[0])
        rows = [make_row(base, item.prompt, [item.target]) for item in mine]
        suffix.states(rows)
        start = _initial(recipe, suffix, items, names)
        with _adapted(base, recipe, start) as model:
            losses = _run(recipe, model, suffix, rows, probes, out.name)
            _save(model, temporary, _DTYPES[dtype])
        found = {"first_loss": losses[0], "loss": float(np.mean(losses[-_LOSS_WINDOW:]))}
        text = json.dumps(facts | found, indent=1, ensure_ascii=False) + "\n"
        (temporary / RECORD_NAME).write_text(text, encoding="utf-8")
    seconds = time.perf_counter() - started
    return TrainingResult(recipe, out, probes, len(mine), **found, seconds=seconds)


def _digest(items: Sequence[Item]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.prompt, item.target]).encode())
    return digest.hexdigest()


def _already(
    recipe: Recipe, out: Path, probes: Path | None, facts: dict[str, Any]
) -> TrainingResult:
    """What was trained before; the probes were complete before the adapter was there."""
    if not (out / RECORD_NAME).is_file():
        raise InputError(f"exists and has no {RECORD_NAME}", path=out)
    read = strict_json.read(out / RECORD_NAME)
    for key, value in facts.items():
        if read.get(key) != value:
            raise InputError(f"is of another training: it has {read.get(key)!r}, not {value!r}",
                             path=out / RECORD_NAME, key=key)  # fmt: skip
    if probes is not None and not probes.is_dir():
        raise InputError(f"is missing beside {out}; remove that to train again", path=probes)
    numbers = float(read["first_loss"]), float(read["loss"])
    return TrainingResult(recipe, out, probes, facts["items"], *numbers, seconds=None)


def _modules(recipe: Recipe, base: Base) -> list[str]:
    """Paths of the modules to adapt, in the model's order."""
    first, last = recipe.layers
    start = layer_prefix(base.model)
    prefixes = tuple(f"{start}{i}." for i in range(first, last + 1))
    found = [
        name for name, module in base.model.named_modules()
        if name.startswith(prefixes) and name.rpartition(".")[2] in recipe.projections
        and type(module) is torch.nn.Linear
    ]  # fmt: skip
    if len(found) != len(prefixes) * len(recipe.projections):
        reason = f"{len(prefixes)} layers x {len(recipe.projections)} projections asked for, the "
        raise InputError(f"{reason}model has {len(found)} of these modules", key="layers")
    return found


def _initial(
    recipe: Recipe, suffix: Suffix | WholeModel, items: Sequence[Item], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """A0 of every module, float32 (rank, d_in)."""
    rank, seed = recipe.rank, recipe.init_seed
    sizes = {name: suffix.base.model.get_submodule(name).in_features for name in names}
    if recipe.variant != "osrm":
        draw = random_rows if recipe.variant == "lora" else sparse_rows
        return {name: draw(name, rank, d_in, seed) for name, d_in in sizes.items()}
    others: dict[str, list[Item]] = {}
    for item in items:
        if item.domain != recipe.domain:
            others.setdefault(item.domain, []).append(item)
    chosen = [item for group in others.values() for item in group[:OTHERS_ITEMS]]
    if not chosen:
        raise InputError("osrm needs items of other domains", key="items")
    rows = [make_row(suffix.base, item.prompt, [item.target]) for item in chosen]
    quiet: dict[int, np.ndarray] = {}  # modules that read the same tensor share the array
    moments = input_moments(suffix, rows, names)
    for moment in moments.values():
        if id(moment) not in quiet:
            quiet[id(moment)] = quiet_rows(moment, rank)
    return {name: quiet[id(moment)] for name, moment in moments.items()}


@contextmanager
def _adapted(base: Base, recipe: Recipe, start: Mapping[str, np.ndarray]) -> Iterator[Any]:
    """The base model with a fresh adapter; its own modules are back in their places after that."""
    from peft import LoraConfig, get_peft_model

    first, last = recipe.layers
    config = LoraConfig(
        task_type="CAUSAL_LM", r=recipe.rank, lora_alpha=recipe.alpha,
        target_modules=list(recipe.projections),
        layers_to_transform=list(range(first, last + 1)),
    )  # fmt: skip
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # PEFT 0.21 asks every model this; transformers 5 renamed the attribute.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        model = get_peft_model(base.model, config)
    try:
        for name, a in start.items():
            layer = base.model.get_submodule(name)
            layer.lora_A["default"].weight.data.copy_(torch.from_numpy(a))
        yield model
    finally:
        model.unload()
        # PEFT leaves this behind, and warns of it the next time.
        for left in ("peft_config", "_hf_peft_config_loaded"):
            vars(base.model).pop(left, None)
        base.model.eval()


def _run(
    recipe: Recipe, model: Any, suffix: Suffix | WholeModel, rows: Sequence[Row],
    probes: Path | None, name: str,
) -> list[float]:  # fmt: skip
    """Train, and return the loss of every step."""
    factors: dict[str, list[torch.nn.Parameter]] = {"A": [], "B": []}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            factors["A" if ".lora_A." in path else "B"].append(parameter)
    frozen = recipe.variant == "flylora"
    # A rate of zero freezes A and still leaves its gradient to the probes.
    groups = [
        {"params": factors["A"], "lr": 0.0 if frozen else recipe.lr},
        {"params": factors["B"], "lr": recipe.lr},
    ]
    trained = factors["B"] if frozen else factors["A"] + factors["B"]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: _rate(s, recipe.steps))
    recorder = nullcontext() if probes is None else record.record(
        model, probes, total_steps=recipe.steps, optimizer=optimizer, overwrite=True, name=name
    )  # fmt: skip
    losses: list[float] = []
    states = suffix.states(rows)  # all kept from before the adapter was there
    model.eval()  # no dropout, which some models have: the same numbers every time
    with recorder as recording:
        for step, chosen in zip(range(recipe.steps), _batches(recipe, len(rows)), strict=False):
            batch = collate([rows[n] for n in chosen], suffix.base.device)
            loss = suffix.token_losses([states[n] for n in chosen], batch).mean()
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            if not np.isfinite(losses[-1]):
                raise InputError(f"the loss of step {step} is {losses[-1]}", key="lr")
            if recording is not None:
                recording.loss(loss)
            _clip(trained, factors["A"] + factors["B"])
            optimizer.step()
            schedule.step()
    return losses


def _batches(recipe: Recipe, count: int) -> Iterator[list[int]]:
    """Batches without end: every epoch is a permutation, and they follow each other seamlessly."""
    rng, left = np.random.default_rng(recipe.seed), []
    while True:
        while len(left) < recipe.batch:
            left += rng.permutation(count).tolist()
        yield left[: recipe.batch]
        left = left[recipe.batch :]


def _rate(step: int, steps: int) -> float:
    """Of the recipe's rate, in step ``step`` from 0."""
    warm = max(1, round(_WARMUP * steps))
    return min(1.0, (step + 1) / warm) * (1 - (1 - _FINAL) * step / steps)


def _clip(trained: Sequence[torch.Tensor], every: Sequence[torch.Tensor]) -> None:
    """One factor for all gradients, which bounds the norm of those that are trained."""
    norm = torch.stack([p.grad.norm() for p in trained]).norm()
    if norm > _CLIP:
        for parameter in every:
            parameter.grad.mul_(_CLIP / norm)


def _save(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """PEFT's own files, the same bytes for the same factors."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    # "auto" would ask the hub whether the vocabulary was resized.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"].sort()  # PEFT writes a set, in an order that changes from run to run
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
