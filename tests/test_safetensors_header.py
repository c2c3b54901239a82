"""The header reader against the safetensors library, truncation, bit flips and hostile headers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import safetensors as ours
from mergeprobe_fast.io.dtypes import DTYPE_BITS, STORAGE, bf16_to_f32, f32_to_bf16

# One temporary folder serves all examples of a test: each overwrites the same file.
PROPERTY = settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def packed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype="F32", shape=(1,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def library_reads(raw: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {k: (v["dtype"], tuple(v["shape"]), bytes(v["data"])) for k, v in deserialize(raw)}


def check_against_library(path: Path, raw: bytes) -> bool:
    """Ours refuses with InputError, or agrees with the library on every tensor. True if read."""
    path.write_bytes(raw)
    try:
        header = ours.read_header(path)
    except InputError as error:
        assert error.path == str(path)
        assert "\n" not in str(error)
        return False
    read = {
        key: (ref.dtype, ref.shape, raw[ref.offset : ref.offset + ref.nbytes])
        for key, ref in header.tensors.items()
    }
    assert read == library_reads(raw)
    assert header.stamp.size == len(raw)
    return True


@pytest.fixture
def small(tmp_path: Path) -> bytes:
    path = tmp_path / "small.safetensors"
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(3, dtype=np.float16),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "scalar": np.array(3.0),
        "é": np.array([True, False]),
    }
    ours.write(path, arrays, {"format": "pt"})
    return path.read_bytes()


def test_reads_what_the_library_wrote(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {
        f"layer.{i}.{name}": generator.integers(0, 2, (i, 3)).astype(STORAGE[name])
        for i in range(3)
        for name in STORAGE
        if name != "BF16"
    }
    safetensors.numpy.save_file(arrays, tmp_path / "f.safetensors", {"format": "pt"})
    raw = (tmp_path / "f.safetensors").read_bytes()
    assert check_against_library(tmp_path / "f.safetensors", raw)
    header = ours.read_header(tmp_path / "f.safetensors")
    assert header.metadata == {"format": "pt"}
    assert set(header.tensors) == set(arrays)


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_of_the_library_is_listed(tmp_path, dtype):
    nbytes = 8 * DTYPE_BITS[dtype] // 8
    raw = packed({"x": tensor(dtype, (8,), (0, nbytes))}, bytes(nbytes))
    assert check_against_library(tmp_path / "f.safetensors", raw)


def test_our_dtypes_are_those_of_the_library():
    with pytest.raises(SafetensorError) as caught:
        deserialize(packed({"x": tensor("nonsense")}, bytes(4)))
    named = str(caught.value).split("expected one of ")[1].split(" at line")[0]
    assert named.replace("`", "").split(", ") == list(DTYPE_BITS)


@given(
    st.dictionaries(
        st.text(max_size=20).filter(lambda key: key != "__metadata__"),
        st.tuples(
            st.sampled_from([n for n in STORAGE if n != "BF16"]),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        max_size=6,
    )
)
@PROPERTY
def test_writes_the_same_bytes_as_the_library(tmp_path, sizes):
    generator = np.random.default_rng(1)
    arrays = {
        key: generator.integers(0, 2, shape).astype(STORAGE[dtype])
        for key, (dtype, shape) in sizes.items()
    }
    ours.write(tmp_path / "f", arrays, {"format": "pt"})
    assert (tmp_path / "f").read_bytes() == safetensors.numpy.save(arrays, {"format": "pt"})


def test_writing_is_deterministic(tmp_path):
    arrays = {f"k{i}": np.full(3, i, dtype=np.float32) for i in range(5)}
    metadata = {f"m{i}": str(i) for i in range(5)}
    ours.write(tmp_path / "one", arrays, metadata)
    backwards = dict(reversed(arrays.items())), dict(reversed(metadata.items()))
    ours.write(tmp_path / "two", *backwards)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_writes_strided_and_big_endian_arrays_and_raw_bits(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    bits = f32_to_bf16(values)
    tensors = {
        "strided": values[:, ::2],
        "big": values.astype(">f4"),
        "bf16": ("BF16", (3, 4), bits),
        "bytes": ("BF16", (12,), bits.tobytes()),
    }
    ours.write(tmp_path / "f", tensors)
    read = library_reads((tmp_path / "f").read_bytes())
    assert read["strided"] == ("F32", (3, 2), values[:, ::2].tobytes())
    assert read["big"] == ("F32", (3, 4), values.tobytes())
    assert read["bf16"] == ("BF16", (3, 4), bits.tobytes())
    assert read["bytes"] == ("BF16", (12,), bits.tobytes())


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("x", ("BF16", (3,), b"1234"), "does not take 4 bytes"),
        ("x", ("Q4", (3,), b"1234"), "Q4"),
        ("x", np.zeros(2, dtype="U3"), "<U3 is not stored"),
        ("__metadata__", np.zeros(2, dtype="f4"), "reserved"),
    ],
)
def test_writing_refuses(tmp_path, key, value, reason):
    with pytest.raises(InputError, match=reason):
        ours.write(tmp_path / "f", {key: value})


def test_every_truncation_is_refused(tmp_path, small):
    path = tmp_path / "f.safetensors"
    for length in range(len(small)):
        assert not check_against_library(path, small[:length])
    assert check_against_library(path, small)
    assert not check_against_library(path, small + b"\0")


def test_every_single_bit_flip_of_the_header_agrees_or_is_refused(tmp_path, small):
    header = 8 + int.from_bytes(small[:8], "little")
    read = 0
    for position in range(header):
        for bit in range(8):
            raw = bytearray(small)
            raw[position] ^= 1 << bit
            read += check_against_library(tmp_path / "f.safetensors", bytes(raw))
    assert 0 < read < header * 8  # some flips only rename a tensor


@given(st.data())
@PROPERTY
def test_random_damage_agrees_or_is_refused(tmp_path, small, data):
    raw = bytearray(small)
    for _ in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.integers(0, len(raw) - 1))
        length = data.draw(st.integers(0, 8))
        raw[start : start + length] = data.draw(st.binary(max_size=8))
    check_against_library(tmp_path / "f.safetensors", bytes(raw))


@given(st.binary(max_size=200))
@PROPERTY
def test_random_bytes_agree_or_are_refused(tmp_path, raw):
    check_against_library(tmp_path / "f.safetensors", raw)


SIZES = st.one_of(
    st.integers(-2, 9), st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30, True, None, 1.0])
)


@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c", "__metadata__"]),
        st.one_of(
            st.none(),
            st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
            st.fixed_dictionaries(
                {
                    "dtype": st.sampled_from(["F32", "BF16", "F4", "F6_E2M3", "f32", 3]),
                    "shape": st.one_of(st.lists(SIZES, max_size=3), st.none(), st.just("12")),
                    "data_offsets": st.one_of(st.lists(SIZES, max_size=3), st.none()),
                },
                optional={"extra": st.just(1)},
            ),
        ),
        max_size=3,
    ),
    st.integers(0, 64),
)
@PROPERTY
def test_generated_headers_agree_or_are_refused(tmp_path, header, nbytes):
    check_against_library(tmp_path / "f.safetensors", packed(header, bytes(nbytes)))


HOSTILE = {
    "empty": (b"", "0 bytes"),
    "huge length": ((2**63).to_bytes(8, "little"), "the limit is"),
    "all ones": (b"\xff" * 8, "the limit is"),
    "over the limit": ((100_000_001).to_bytes(8, "little") + b"{}", "the limit is"),
    "over the file": ((50).to_bytes(8, "little") + b"{}", "truncated"),
    "empty header": (packed(b""), "not a JSON object"),
    "not utf-8": (packed(b'{"\xff":1}'), "not UTF-8"),
    "not json": (packed(b"{nope}"), "not valid JSON"),
    "two values": (packed(b"{}{}"), "not valid JSON"),
    "leading blank": (packed(b" {}"), "not a JSON object"),
    "list": (packed(b"[]"), "not a JSON object"),
    "string": (packed(b'"x"'), "not a JSON object"),
    "number": (packed(b"17"), "not a JSON object"),
    "duplicate tensor": (
        packed(b'{"x":%b,"x":%b}' % ((json.dumps(tensor()).encode(),) * 2), bytes(4)),
        "x: key appears twice",
    ),
    "duplicate field": (
        packed(b'{"x":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "dtype: key appears twice",
    ),
    "tensor is null": (packed({"x": None}), "x: needs exactly dtype, shape and data_offsets"),
    "field missing": (packed({"x": {"dtype": "F32", "shape": [1]}}), "x: needs exactly"),
    "field added": (packed({"x": tensor(extra=1)}, bytes(4)), "x: needs exactly"),
    "unknown dtype": (packed({"x": tensor("F33")}, bytes(4)), "x: unknown dtype 'F33'"),
    "dtype is a list": (packed({"x": tensor(["F32"])}, bytes(4)), "x: unknown dtype"),
    "negative size": (packed({"x": tensor(shape=(-1,))}, bytes(4)), "x: shape"),
    "size true": (packed({"x": tensor(shape=(True,))}, bytes(4)), "x: shape"),
    "size float": (packed({"x": tensor(shape=(1.0,))}, bytes(4)), "x: shape"),
    "size string": (packed({"x": tensor(shape=("1",))}, bytes(4)), "x: shape"),
    "size over 63 bits": (packed({"x": tensor(shape=(2**63,))}, bytes(4)), "x: shape"),
    "overflow hidden by zero": (
        packed({"x": tensor(shape=(2**40, 2**40, 0), offsets=(0, 0))}),
        "x: shape overflows",
    ),
    "overflow": (packed({"x": tensor(shape=(2**32, 2**32))}, bytes(4)), "x: shape overflows"),
    "offsets swapped": (packed({"x": tensor(offsets=(4, 0))}, bytes(4)), "x: data_offsets"),
    "offsets three": (packed({"x": tensor(offsets=(0, 4, 4))}, bytes(4)), "x: data_offsets"),
    "offsets bool": (packed({"x": tensor(offsets=(False, 4))}, bytes(4)), "x: data_offsets"),
    "wrong nbytes": (packed({"x": tensor(shape=(2,))}, bytes(4)), "x: F32 of shape"),
    "half bytes": (packed({"x": tensor("F4", (3,), (0, 1))}, bytes(1)), "x: F4 of shape"),
    "hole at the start": (packed({"x": tensor(offsets=(4, 8))}, bytes(8)), "x: leaves a hole"),
    "hole": (
        packed({"x": tensor(), "y": tensor(offsets=(8, 12))}, bytes(12)),
        "y: leaves a hole",
    ),
    "overlap": (
        packed({"x": tensor(shape=(2,), offsets=(0, 8)), "y": tensor(offsets=(4, 8))}, bytes(8)),
        "y: overlaps",
    ),
    "same bytes twice": (packed({"x": tensor(), "y": tensor()}, bytes(4)), "overlaps"),
    "beyond the file": (packed({"x": tensor()}, bytes(3)), "truncated"),
    "longer than declared": (packed({"x": tensor()}, bytes(5)), "bytes that no tensor owns"),
    "metadata list": (packed({"__metadata__": []}), "__metadata__: is not an object"),
    "metadata number": (packed({"__metadata__": {"a": 1}}), "__metadata__: value of 'a'"),
    "nan": (packed(b'{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'), "NaN is not"),
    "infinity": (packed(b'{"a":-Infinity}'), "-Infinity is not JSON"),
    "surrogate": (packed(b'{"__metadata__":{"a":"\\ud800"}}'), "lone surrogate"),
    "deep": (packed(b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "nested too deeply"),
    "long integer": (packed(b'{"x":' + b"9" * 1_000_000 + b"}"), "integer of 1000000 digits"),
    "line break in a key": (packed({"a\nb": None}), r"'a\\nb': needs exactly"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header(tmp_path, case):
    raw, reason = HOSTILE[case]
    path = tmp_path / "f.safetensors"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=reason) as caught:
        ours.read_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_trailing_blanks_in_the_header_are_allowed(tmp_path):
    raw = packed(json.dumps({"x": tensor()}).encode() + b"   ", bytes(4))
    assert check_against_library(tmp_path / "f.safetensors", raw)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".PT", ".pkl"])
def test_pickles_are_refused_by_name_even_when_absent(tmp_path, suffix):
    with pytest.raises(InputError, match=r"pickle.*convert to safetensors"):
        ours.read_header(tmp_path / f"adapter_model{suffix}")


def test_what_is_not_a_file(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        ours.read_header(tmp_path / "absent.safetensors")
    with pytest.raises(InputError, match="not a regular file"):
        ours.read_header(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        ours.read_header("nul\0.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(InputError, match="not a regular file"):
        ours.read_header(tmp_path / "pipe.safetensors")


def test_the_header_cache_does_not_hide_a_changed_length(tmp_path):
    raw = packed({"x": tensor()}, bytes(4))
    (tmp_path / "good").write_bytes(raw)
    (tmp_path / "short").write_bytes(raw[:-1])
    assert ours.read_header(tmp_path / "good").tensors["x"].nbytes == 4
    with pytest.raises(InputError, match="truncated"):
        ours.read_header(tmp_path / "short")


def test_f32_to_bf16_is_torch_on_every_exponent_and_tie():
    torch = pytest.importorskip("torch")
    high = np.arange(2**16, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    values = (high[:, None] | low).view(np.float32)
    bits = f32_to_bf16(values)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(values)
    np.testing.assert_array_equal(bits[~nan], expected[~nan])
    assert np.isnan(bf16_to_f32(bits))[nan].all()


def test_bf16_to_f32_is_exact_and_round_trips():
    bits = np.arange(2**16, dtype=np.uint16)
    wide = bf16_to_f32(bits)
    finite = ~np.isnan(wide)
    np.testing.assert_array_equal(f32_to_bf16(wide)[finite], bits[finite])
    assert f32_to_bf16(np.float32(1.0)).shape == ()
