"""Answer prompts with the adapter that a router picks for each: what ``plan --apply`` wrote, run.

    mergeprobe-fast plan examples/zoo --out out/plan --apply
    python examples/route.py out/plan/applied
    python examples/route.py out/plan/applied --chat "Tom has 3 coins and buys 4 more. How many?"

Without prompts, one item of each of the example domains is asked, none of which any adapter was
trained on. The base model runs over a prompt once without adapters; what enters its modules there
is all that the router reads. Then PEFT answers with the adapter that was picked.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from tasks import DOMAINS, END_OF_TURN, draw_items

from mergeprobe_fast.io.router_file import Choice, load_router
from mergeprobe_fast.merge_peft.model.base import Base, load_base
from mergeprobe_fast.planning.served import read_served

SEED = 2  # calibrate_data.py draws with 1, train_zoo.py measures with 0
MOST_TOKENS = 24


class Routed:
    """A base model with every resident adapter of a folder, one of which answers at a time."""

    def __init__(self, base: Base, folder: Path, rule: str | None = None) -> None:
        self.base, self.rule = base, rule
        self.served, self.router = read_served(folder), load_router(folder)
        fingerprints = {r.name: r.fingerprint for r in self.served.residents}
        if fingerprints != dict(self.router.info.adapters):
            raise SystemExit(f"{folder}: the router is not of these adapters")
        # PEFT's own names: a dot in one would break its modules.
        self.loaded = {r.name: f"adapter{i}" for i, r in enumerate(self.served.residents)}
        first, *others = self.loaded
        where = self.served.folder
        self.model = PeftModel.from_pretrained(base.model, str(where(first)), self.loaded[first])
        for name in others:
            self.model.load_adapter(str(where(name)), self.loaded[name])
        self.model.eval()

    @torch.no_grad()
    def choose(self, ids: Sequence[int]) -> Choice:
        """The adapter for a prompt of these tokens."""
        with self.model.disable_adapter(), recorded_inputs(
            self.model.get_base_model(), self.router.needed(self.rule)
        ) as inputs:
            self.model(input_ids=torch.tensor([list(ids)]), use_cache=False)
        return self.router.choose(inputs, self.rule)

    @torch.no_grad()
    def logits(self, name: str, ids: Sequence[int]) -> torch.Tensor:
        """Of the last token with one of the resident adapters, (vocabulary,)."""
        self.model.set_adapter(self.loaded[name])
        return self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]

    def answer(self, prompt: str, most: int = MOST_TOKENS) -> tuple[Choice, str]:
        """The choice, and what that adapter writes, greedily, to the end of its line or turn."""
        ids = self.base.encode(prompt)
        choice = self.choose(ids)
        written: list[int] = []
        while len(written) < most:
            written.append(int(self.logits(choice.adapter, ids + written).argmax()))
            text = self.base.decode(written)
            if END_OF_TURN in text or text.endswith("\n"):
                break
        return choice, self.base.decode(written).replace(END_OF_TURN, "").strip()


@contextmanager
def recorded_inputs(model: Any, modules: Sequence[str]):
    """What enters these modules in the one pass made inside: float32 (tokens, d_in) by name."""
    inputs: dict[str, np.ndarray] = {}

    def keep(name: str):
        def hook(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            inputs[name] = arguments[0][0].float().cpu().numpy()

        return hook

    with ExitStack() as stack:
        for name in modules:
            handle = model.get_submodule(name).register_forward_pre_hook(keep(name))
            stack.callback(handle.remove)
        yield inputs


def example_prompts() -> list[str]:
    """One of each domain, from the side that no adapter was trained on."""
    return [draw_items(domain, 1, SEED, held_out=True)[0].prompt for domain in DOMAINS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what plan --apply wrote")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument("--base", type=Path, help="folder of the base (default: SmolLM2's wheel)")
    parser.add_argument("--rule", help="arrow or linear (default: the router's own)")
    parser.add_argument("--chat", action="store_true", help="each prompt is one user turn")
    options = parser.parse_args()
    # PEFT 0.21 asks every model this; transformers 5 renamed the attribute.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    routed = Routed(load_base(options.base), options.folder, options.rule)
    prompts = options.prompts or example_prompts()
    if options.chat and options.prompts:
        turn = "<|im_start|>user\n{}" + END_OF_TURN + "\n<|im_start|>assistant\n"
        prompts = [turn.format(prompt) for prompt in prompts]
    for prompt in prompts:
        choice, written = routed.answer(prompt)
        print(f"{choice.adapter} ({choice.rule})")
        print(f"  {prompt!r}\n  {written!r}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
