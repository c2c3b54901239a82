"""What the primitives and the table refuse: type and exact text, always one line."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from adapters import make_adapter

import mergeprobe_fast as mpf
from mergeprobe_fast import BackendError, InputError, MergeprobeError, _native
from mergeprobe_fast.features import PAIR_FEATURES
from mergeprobe_fast.ops import block_gram, canonical

X = np.ones((4, 5), np.float32)
SHORT = np.ones((3, 5), np.float32)
NARROW = np.ones((4, 3), np.float32)
O = [0, 2, 4]  # noqa: E741
B, A = np.ones((6, 2)), np.ones((2, 5))
RISE = "must rise from 0 to the number of rows, 4"
AXIS = "expected one axis of integers, starting with 0"
KIND = "expected float32, bfloat16, float16 or float64"
BOTH = "a second stack needs all of U2, V2 and offsets2"

GRAM = {
    "reduce: expected 'both', 'columns' or 'none', got 'rows'": ((X, X, O), {"reduce": "rows"}),
    "accumulate: expected 'fp32' or 'fp64', got 'fp16'": ((X, X, O), {"accumulate": "fp16"}),
    "backend: expected 'auto', 'cpu', 'triton' or 'reference', got 'cuda'": (
        (X, X, O), {"backend": "cuda"},
    ),
    "scale2: given without a second stack": ((X, X, O), {"scale2": [1, 1]}),
    "scale: expected 2 values, got shape (3,)": ((X, X, O), {"scale": [1, 2, 3]}),
    "scale: expected 2 values, got shape ()": ((X, X, O), {"scale": 2.0}),
    "scale2: expected 2 values, got shape (1,)": ((X, X, O, X, X, O), {"scale2": [1]}),
    "threads must be a positive integer, got 0": ((X, X, O), {"threads": 0}),
    "threads must be a positive integer, got True": ((X, X, O), {"threads": True}),
    "threads must be a positive integer, got 1.5": ((X, X, O), {"threads": 1.5}),
    "U: expected a torch tensor or numpy array, got list": ((X.tolist(), X, O), {}),
    "V: expected a torch tensor or numpy array, got NoneType": ((X, None, O), {}),
    "U: expected 2 dimensions, got 1": ((X[0], X, O), {}),
    "V: expected 2 dimensions, got 3": ((X, X[None], O), {}),
    "V: expected 4 rows like U, got 3": ((X, SHORT, O), {}),
    "U2: expected 5 columns like U, got 3": ((X, X, O, NARROW, X, O), {}),
    "V2: expected 5 columns like V, got 3": ((X, X, O, X, NARROW, O), {}),
    "V2: expected 4 rows like U2": ((X, X, O, X, SHORT, O), {}),
    f"U: {KIND}": ((X.astype(int), X, O), {}),
    f"V: {KIND}": ((X, X.astype(np.complex64), O), {}),
    f"U2: {KIND}": ((X, X, O, torch.ones(4, 5, dtype=torch.int8), X, O), {}),
    f"V2: {KIND}": ((X, X, O, X, X > 0, O), {}),
    "U: float64 input needs accumulate='fp64'": ((X.astype(float), X, O), {}),
    "V: float64 input needs accumulate='fp64'": ((X, X.astype(float), O), {}),
    "U2: float64 input needs accumulate='fp64'": ((X, X, O, X.astype(float), X, O), {}),
    "V2: float64 input needs accumulate='fp64'": ((X, X, O, X, X.astype(float), O), {}),
}  # fmt: skip


@pytest.mark.parametrize("text", GRAM)
def test_block_gram(text):
    arguments, options = GRAM[text]
    with pytest.raises(InputError) as caught:
        block_gram(*arguments, **options)
    assert str(caught.value) == text


@pytest.mark.parametrize("given", [(X, None, None), (None, X, O), (X, X, None), (None, None, O)])
def test_half_a_second_stack(given):
    with pytest.raises(InputError, match=f"^U2: {BOTH}$"):
        block_gram(X, X, O, *given)


OFFSETS = {
    "floats": ([0.0, 2, 4], AXIS), "two_axes": ([[0, 4]], AXIS), "empty": ([], AXIS),
    "none": (None, AXIS), "booleans": ([False, True], AXIS), "too_large": ([0, 2**70], AXIS),
    "not_from_0": ([1, 4], RISE), "too_short": ([0, 3], RISE), "past_the_end": ([0, 2, 5], RISE),
    "falling": ([0, 3, 2, 4], RISE), "beyond_and_back": ([0, 9, 4], RISE),
    "negative": ([0, -1, 4], RISE),
}  # fmt: skip


@pytest.mark.parametrize("kind", OFFSETS)
def test_offsets(kind):
    offsets, text = OFFSETS[kind]
    with pytest.raises(InputError, match=f"^offsets: {re.escape(text)}$"):
        block_gram(X, X, offsets)
    if offsets is not None:
        with pytest.raises(InputError, match=f"^offsets2: {re.escape(text)}$"):
            block_gram(X, X, O, X, X, offsets)


def record_field(x):
    return np.rec.fromarrays([x, x.astype("u2")], names="x,y")["x"]


UNREADABLE = {
    "on_meta_device": lambda: torch.ones(4, 5, device="meta"),
    "sparse": lambda: torch.ones(4, 5).to_sparse(),
    "objects": lambda: X.astype(object),
    "other_byte_order": lambda: X.astype(X.dtype.newbyteorder(">")),
    "record_field": lambda: record_field(X),
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("name", ["U", "V"])
def test_memory_that_cannot_be_read_in_place(kind, name):
    bad = UNREADABLE[kind]()
    with pytest.raises((InputError, BackendError)) as caught:
        block_gram(*((bad, X) if name == "U" else (X, bad)), O)
    assert str(caught.value).startswith(f"{name}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [
    {"threads": 10**10}, {"scale": ["a", "b"]}, {"scale": [1j, 1]}, {"backend": "triton"},
], ids=lambda o: next(iter(o)))  # fmt: skip
def test_refused_by_us_in_one_line(options):
    if options.get("backend") == "triton" and torch.cuda.is_available():
        options = {"backend": "rocm"}
    with pytest.raises(MergeprobeError) as caught:
        block_gram(X, X, O, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


CANONICAL = {
    "factors: expected at least one (B, A, scale)": ([], {}),
    "factors[0]: B (6, 2) and A (3, 5) do not chain": ([(B, np.ones((3, 5)), 1)], {}),
    "factors[0]: B (6,) and A (2, 5) do not chain": ([(B[:, 0], A, 1)], {}),
    "factors[1]: delta is 7 x 5, expected 6 x 5": ([(B, A, 1), (np.ones((7, 2)), A, 1)], {}),
    "factors[0]: B holds NaN or infinite values": ([(B * np.nan, A, 1)], {}),
    "factors[1]: A holds NaN or infinite values": ([(B, A, 1), (B, A * np.inf, 1)], {}),
}


@pytest.mark.parametrize("text", CANONICAL)
def test_canonical(text):
    factors, options = CANONICAL[text]
    with pytest.raises(InputError) as caught:
        canonical(factors, **options)
    assert str(caught.value) == text


WRONG_USE = {
    "list_for_b": ("factors[0]", [(B.tolist(), A, 1.0)], {}),
    "one_axis_a": ("factors[0]", [(B, A[0], 1.0)], {}),
    "no_scale": ("factors[0]", [(B, A)], {}),
    "scale_nan": ("factors[1]", [(B, A, 1.0), (B, A, np.nan)], {}),
    "scale_inf": ("factors[0]", [(B, A, np.inf)], {}),
    "scale_text": ("factors[0]", [(B, A, "x")], {}),
    "complex_b": ("factors[0]", [(B.astype(complex), A, 1.0)], {}),
    "text_a": ("factors[0]", [(B, A.astype(str), 1.0)], {}),
    "max_rank_negative": ("max_rank", [(B, A, 1.0)], {"max_rank": -1}),
    "max_rank_fraction": ("max_rank", [(B, A, 1.0)], {"max_rank": 1.5}),
    "backend_unknown": ("backend", [(B, A, 1.0)], {"backend": "nonsense"}),
    "relative_nan": ("relative", [(B, A, 1.0)], {"relative": float("nan")}),
    "noise_negative": ("noise", [(B, A, 1.0)], {"noise": -1.0}),
}


@pytest.mark.parametrize("kind", WRONG_USE)
@pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")
def test_canonical_wrong_use_names_the_argument(kind):
    key, factors, options = WRONG_USE[kind]
    with pytest.raises(InputError) as caught:
        canonical(factors, **options)
    assert caught.value.key == key and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["not_finite", "do_not_chain"])
def test_reference_backend_refuses_the_same(kind):
    factors = [(B * np.nan, A, 1.0)] if kind == "not_finite" else [(B, np.ones((3, 5)), 1.0)]
    texts = []
    for backend in ("cpu", "reference"):
        with pytest.raises(InputError) as caught:
            canonical(factors, backend=backend)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", " 2"])
def test_environment_threads(monkeypatch, value):
    monkeypatch.setenv("MERGEPROBE_THREADS", value)
    with pytest.raises(InputError) as caught:
        block_gram(X, X, O)
    assert str(caught.value) == f"MERGEPROBE_THREADS must be a positive number, got {value!r}"


@pytest.mark.parametrize("value", ["neon", "AVX2"])
def test_environment_isa(monkeypatch, value):
    monkeypatch.setenv("MERGEPROBE_ISA", value)
    have = ", ".join(_native.core().available_isas())
    for call in (lambda: block_gram(X, X, O), lambda: canonical([(B, A, 1.0)])):
        with pytest.raises(BackendError) as caught:
            call()
        assert str(caught.value) == (
            f"MERGEPROBE_ISA={value}: not available here (this CPU and build have {have})"
        )


def test_errors_are_ours_and_standard():
    for error, standard in ((InputError, ValueError), (BackendError, RuntimeError)):
        assert issubclass(error, MergeprobeError) and issubclass(error, standard)
    error = InputError("why", path="file", key="key")
    assert str(error) == "file: key: why"
    assert (error.path, error.key, error.reason) == ("file", "key", "why")
    assert str(InputError("why", key="key")) == "key: why" and str(InputError("why")) == "why"


@pytest.fixture
def zoo(tmp_path):
    for i in range(3):
        make_adapter(tmp_path / str(i), seed=i)
    return mpf.open_zoo(tmp_path)


def test_pair_features(zoo):
    known = ", ".join(PAIR_FEATURES)
    for features, text in {
        "cosin": f"features: no feature 'cosin'; there are: {known}",
        ("cosine", "x"): f"features: no feature 'x'; there are: {known}",
        ("cosine", "cosine"): "features: a feature is named twice",
    }.items():
        with pytest.raises(InputError) as caught:
            mpf.pair_features(zoo, features if isinstance(features, str) else list(features))
        assert str(caught.value) == text
    with pytest.raises(InputError, match=r"^threads must be a positive integer, got 0$"):
        mpf.pair_features(zoo, threads=0)


def test_table(zoo):
    table = mpf.pair_features(zoo, ["norm_ratio"])
    with pytest.raises(KeyError, match="no column 'cosine'; there are: a, b, norm_ratio, "):
        table["cosine"]
    with pytest.raises(KeyError, match="no column 'cosine'"):
        table.matrix("cosine")
    with pytest.raises(InputError, match=r"^a: is not a feature$"):
        table.matrix("a")
