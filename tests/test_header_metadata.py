"""Metadata is split off before a header is parsed; what is accepted stays what it was."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import SafetensorError, deserialize

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import read_header, safetensors
from mergeprobe_fast.io.safetensors import peek

X = '"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def packed(header: str, data: bytes = bytes(4)) -> bytes:
    raw = header.encode()
    return len(raw).to_bytes(8, "little") + raw + data


HEADERS = {
    "first": f'{{"__metadata__":{{"a":"b"}},{X}}}',
    "last": f'{{{X},"__metadata__":{{"a":"b"}}}}',
    "spaces": f'{{"__metadata__":{{"a":"b"}} \n,\t {X} }}  ',
    "space before": f'{{"__metadata__": {{"a":"b"}},{X}}}',
    "empty": f'{{"__metadata__":{{}},{X}}}',
    "unicode": f'{{"__metadata__":{{"é":"日本\\u00e9"}},{X}}}',
    "brackets in text": f'{{"__metadata__":{{"a":"}},{{\\"x"}},{X}}}',
    "alone": '{"__metadata__":{"a":"b"}}',
    "twice": f'{{"__metadata__":{{"a":"b"}},{X},"__metadata__":{{"a":"b"}}}}',
    "twice in a row": f'{{"__metadata__":{{}},"__metadata__":{{}},{X}}}',
    "key twice": f'{{"__metadata__":{{"a":"b","a":"c"}},{X}}}',
    "tensor twice": f'{{"__metadata__":{{}},{X},{X}}}',
    "trailing comma": '{"__metadata__":{"a":"b"},}',
    "two commas": f'{{"__metadata__":{{"a":"b"}},,{X}}}',
    "no comma": f'{{"__metadata__":{{"a":"b"}}{X}}}',
    "no end": f'{{"__metadata__":{{"a":"b"}},{X}',
    "cut": '{"__metadata__":{"a":',
    "number": f'{{"__metadata__":{{"a":1}},{X}}}',
    "nested": f'{{"__metadata__":{{"a":{{"b":"c"}}}},{X}}}',
    "surrogate": f'{{"__metadata__":{{"a":"\\ud800"}},{X}}}',
    "nan": f'{{"__metadata__":{{"a":NaN}},{X}}}',
    "after the end": f'{{"__metadata__":{{"a":"b"}},{X}}} x',
    "list": f'{{"__metadata__":[],{X}}}',
}
# Duplicates are refused by us on purpose; the library takes the last one.
STRICTER = {"key twice", "tensor twice", "twice", "twice in a row"}


@pytest.mark.parametrize("case", HEADERS)
def test_accepted_is_what_the_library_accepts(tmp_path, case):
    raw = packed(HEADERS[case], b"" if '"x":{' not in HEADERS[case] else bytes(4))
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw)
    try:
        deserialize(raw)
        accepted = case not in STRICTER
    except SafetensorError:
        accepted = False
    if not accepted:
        with pytest.raises(InputError):
            read_header(path)
        return
    header = read_header(path)
    assert header.metadata == json.loads(HEADERS[case])["__metadata__"]
    assert header.data_start == 8 + len(HEADERS[case].encode())
    for ref in header.tensors.values():
        assert ref.offset == header.data_start and ref.nbytes == 4


def test_files_that_differ_in_metadata_share_one_layout(tmp_path, rng):
    values = rng.standard_normal(5).astype(np.float32)
    layouts = []
    various = (None, {}, {"a": "b"}, {"a": "longer", "é": "x" * 999}, {"c": "d" * 3})
    for i, texts in enumerate(various):
        path = tmp_path / f"{i}.safetensors"
        safetensors.write(path, {"k": values, "l": values[:2]}, texts)
        header = read_header(path)
        assert header.metadata == (texts or {})
        layouts.append(header.layout)
        ref = header.tensors["k"]
        stored = np.frombuffer(path.read_bytes()[ref.offset : ref.offset + ref.nbytes], "<f4")
        np.testing.assert_array_equal(stored, values)
    assert len({id(layout) for layout in layouts}) == 1


def test_peek_reads_a_cut_file_and_nothing_more(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(packed(HEADERS["first"])[:-2])
    assert [entry.key for entry in peek(path).entries] == ["x"]
    with pytest.raises(InputError, match="is truncated"):
        read_header(path)
    path.write_bytes(packed(HEADERS["first"])[:20])
    with pytest.raises(InputError, match="is truncated"):
        peek(path)


def test_the_hash_of_the_data_is_that_of_the_bytes_behind_the_header(tmp_path, rng):
    import hashlib

    tensors = {"b": rng.standard_normal(3), "a": np.ones(2, np.float16), "c": np.array(1, np.int8)}
    safetensors.write(tmp_path / "a", tensors, {"x": "y"})
    raw = (tmp_path / "a").read_bytes()[read_header(tmp_path / "a").data_start :]
    assert safetensors.data_sha256(tensors) == hashlib.sha256(raw).hexdigest()
