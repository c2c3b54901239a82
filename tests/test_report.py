"""Reports: what goes in comes out, hostile names do nothing, and it fits."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest

from mergeprobe_fast.report import (
    FeatureInfo,
    ScreenReport,
    leaf_order,
    print_screen_summary,
    progress,
    render_html,
    write_html,
)
from mergeprobe_fast.report import payload as payload_module

EIGHT = ["math-a", "math-b", "code", "science", "instruct", "safety", "code-r4", "science-rslora"]
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[bold red]not markup[/bold red]",
    "quote\" 'single' \\back` ${x} {{data}}",
    "line\nbreak\x1b[31mred\x07 \u202eright-to-left",
    "\u6570\u5b66-\u9002\u914d\u5668-\U0001f600",
    "lone\udcff\u2028",
    "a" * 4000,
    "<!--<script>",
]
FEATURES = [
    FeatureInfo(
        "cosine",
        "cosine",
        "Angle between the two deltas over all modules: 1 the same direction, 0 unrelated, "
        "-1 opposed.",
        -1,
        1,
        0.0,
    ),
    FeatureInfo(
        "cosine_z",
        "cosine z",
        "The cosine in standard deviations of what random deltas of this size would show.",
        None,
        None,
        0.0,
    ),
    FeatureInfo("norm_ratio", "norm ratio", "Smaller norm over larger norm.", 0, 1),
    FeatureInfo(
        "over_amplification",
        "over-amplification",
        "How much longer the sum is than orthogonal deltas would make it.",
        -1,
        1,
        0.0,
    ),
    FeatureInfo(
        "shared_energy_a",
        "shared energy: a",
        "How much of a lies in modules that b has too.",
        0,
        1,
        None,
        "shared_energy_b",
    ),
    FeatureInfo(
        "shared_energy_b",
        "shared energy: b",
        "How much of b lies in modules that a has too.",
        0,
        1,
        None,
        "shared_energy_a",
    ),
    *(
        FeatureInfo(
            f"{side}_{name}",
            f"{space} {title}",
            f"How far the {space} spaces of the two deltas {text}.",
            0,
            1,
            0.004,
        )
        for name, title, text in (
            ("overlap", "overlap", "coincide, every direction counted alike"),
            ("rv", "RV", "coincide, directions weighted by their energy"),
        )
        for side, space in (("row", "input"), ("col", "output"))
    ),
    *(
        FeatureInfo(
            f"{side}_capture_{x}_by_{y}",
            f"{space} capture: {x} by {y}",
            f"How much of the energy of {x} falls into the {space} space of {y}.",
            0,
            1,
            0.004,
            f"{side}_capture_{y}_by_{x}",
        )
        for side, space in (("row", "input"), ("col", "output"))
        for x, y in (("a", "b"), ("b", "a"))
    ),
]


def make_report(names: list[str], layers: int = 4, seed: int = 0, **changes) -> ScreenReport:
    """A zoo in blocks of alike adapters, shuffled; eight of them are the ones of the README."""
    rng = np.random.default_rng(seed)
    n = len(names)
    block = rng.permutation(np.arange(n) // max(1, n // 8))
    if names == EIGHT:
        block = np.array([0, 0, 1, 2, 3, 4, 1, 2])
    a, b = np.triu_indices(n, 1)
    m = len(a)
    same = block[a] == block[b]
    cosine = np.where(same, rng.uniform(0.3, 0.6, m), rng.normal(0.02, 0.05, m))
    if names == EIGHT:
        cosine[(a == 0) & (b == 1)] = 0.803
        cosine[(a == 4) & (b == 5)] = -0.174
    norm = rng.lognormal(0.5, 0.4, n)
    ratio = norm[a] / norm[b]
    pairs: dict[str, np.ndarray] = {"a": a, "b": b}
    for f in FEATURES:
        pairs[f.name] = np.clip(rng.beta(1.2, 12, m) + 0.5 * np.abs(cosine), 0, 1)
    pairs["cosine"] = cosine
    pairs["cosine_z"] = cosine * 576
    pairs["norm_ratio"] = np.minimum(ratio, 1 / ratio)
    pairs["over_amplification"] = 2 * cosine / (ratio + 1 / ratio)
    pairs["shared_energy_a"] = np.where(rng.random(m) < 0.1, np.nan, 1.0)
    profile = cosine[:, None] * rng.uniform(0.4, 1.6, (m, layers))
    profile = np.clip(profile + rng.normal(0, 0.02, (m, layers)), -1, 1)
    profile[rng.random((m, layers)) < 0.02] = np.nan
    ranked = np.argsort(-cosine, kind="stable")
    rows = [{"a": names[a[p]], "b": names[b[p]], "cosine": cosine[p]} for p in ranked]
    fields = {
        "zoo": "smollm2-tasks",
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "version": "0.1.0",
        "command": "mergeprobe-fast screen zoo/smollm2-tasks --out screening",
        "notes": ["science-rslora declares no base model; taken for the same one as the others"],
        "adapters": {
            "name": names,
            "path": [f"zoo/smollm2-tasks/{i:03d}" for i in range(n)],
            "rank": [str(4 * 2 ** int(k)) if k < 3 else "4-8" for k in rng.integers(0, 4, n)],
            "modules": [7 * layers] * n,
            "parameters": [int(x) for x in rng.integers(200_000, 2_000_000, n)],
            "norm": norm,
            "spectral_norm": norm * rng.uniform(0.3, 0.6, n),
            "stable_rank": rng.uniform(1.5, 6, n),
            "effective_rank": rng.uniform(3, 8, n),
            "energy_rank_90": rng.integers(2, 8, n),
        },
        "pairs": pairs,
        "features": FEATURES,
        "layers": [f"layers.{i}" for i in range(layers)],
        "profile": profile.astype(np.float32),
        "adapter_profile": rng.lognormal(0, 0.3, (n, layers)) * norm[:, None] / layers,
        "summary": {
            "most_aligned": rows[:5],
            "most_conflicting": rows[::-1][:5],
            "near_duplicates": [row for row in rows if row["cosine"] > 0.7],
        },
    }
    return ScreenReport(**{**fields, **changes})


def numbered(n: int) -> list[str]:
    return [f"adapter-{i:03d}" for i in range(n)]


def data_of(page: str) -> dict:
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(block)


def column(block: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(block["d"]), np.dtype(block["t"]).newbyteorder("<"))


# ---- the HTML file ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2, 8])
def test_data_block_gives_back_every_value(n):
    report = make_report(EIGHT[:n])
    data = data_of(render_html(report))
    assert data["n_adapters"] == n and data["n_pairs"] == n * (n - 1) // 2
    assert data["adapters"]["name"] == EIGHT[:n]
    for name in ("a", "b"):
        np.testing.assert_array_equal(column(data["pairs"][name]), report.pairs[name])
    for f, got in zip(FEATURES, data["features"], strict=True):
        assert got["name"] == f.name and got["text"] == f.text and got["twin"] == f.directed_twin
        np.testing.assert_array_equal(
            column(data["pairs"]["features"][f.name]), report.pairs[f.name]
        )
    for key in ("norm", "parameters", "energy_rank_90") if n else ():
        np.testing.assert_array_equal(column(data["adapters"][key]), report.adapters[key])
    assert data["layers"] == list(report.layers)
    if n > 1:
        got = column(data["profile"]["values"]).reshape(report.profile.shape)
        np.testing.assert_array_equal(got, report.profile)
        assert sorted(column(data["order"])) == list(range(n))
        row = data["summary"]["most_aligned"][0]
        assert row["pair"] == [0, 1] and row["cosine"] == report.pairs["cosine"].max()


def test_200_adapters_stay_small_and_precise():
    report = make_report(numbered(200), layers=32)
    page = render_html(report)
    assert len(page) < 6_000_000
    data = data_of(page)
    for f in FEATURES:
        got = column(data["pairs"]["features"][f.name])
        np.testing.assert_array_equal(got, report.pairs[f.name].astype(np.float32))
    values, scale = column(data["profile"]["values"]), column(data["profile"]["scale"])
    assert data["profile"]["values"]["t"] == "i2"
    steps = values.reshape(report.profile.shape)
    np.testing.assert_array_equal(steps == -(2**15), np.isnan(report.profile))
    largest = np.nanmax(np.abs(report.profile), axis=1, keepdims=True)
    error = np.abs(steps * scale[:, None] - report.profile) / largest
    assert np.nanmax(error) < 0.51 / (2**15 - 1) + 1e-6  # half a step, and float32 of the scale


def test_80_layers_fall_back_to_one_byte():
    report = make_report(numbered(200), layers=80)
    page = render_html(report)
    assert len(page) < 6_000_000
    block = data_of(page)["profile"]
    assert block["values"]["t"] == "i1"
    steps = column(block["values"]).reshape(report.profile.shape)
    np.testing.assert_array_equal(steps == -128, np.isnan(report.profile))


def test_too_many_pairs_keeps_the_strongest(monkeypatch):
    monkeypatch.setattr(payload_module, "MAX_PAIRS", 40)
    report = make_report(numbered(20))
    data = data_of(render_html(report))
    assert data["pairs"]["count"] == 40 and data["n_pairs"] == 190
    kept = np.abs(column(data["pairs"]["features"]["cosine"]))
    assert kept.min() == np.sort(np.abs(report.pairs["cosine"]))[-40]
    assert column(data["profile"]["values"]).size == 40 * 4


def test_hostile_text_is_inert():
    text = {key: HOSTILE[0] for key in ("zoo", "base_model", "version", "command")}
    feature = [FeatureInfo("cosine", HOSTILE[0], HOSTILE[1], -1, 1)]
    report = make_report(HOSTILE, notes=HOSTILE, layers=9, **text, features=feature)
    report = ScreenReport(**{**vars(report), "layers": HOSTILE})
    page = render_html(report)
    assert page.isascii()
    plain = render_html(make_report(EIGHT))
    for tag in ("<script", "</script", "<img", "<!--"):
        assert page.lower().count(tag) == plain.lower().count(tag)
    data = data_of(page)
    assert data["adapters"]["name"] == HOSTILE and data["notes"] == HOSTILE
    assert data["features"][0]["title"] == HOSTILE[0]
    assert data["summary"]["most_aligned"][0]["pair"] is not None


def test_page_loads_nothing_and_runs_only_its_own_script():
    page = render_html(make_report(EIGHT))
    assert not re.search(r"https?://|//cdn|@import|url\(|\beval\(|new Function|innerHTML", page)
    assert not re.search(r"<(link|iframe|img|object|embed|base)\b|\ssrc=|\shref=", page)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"\sstyle=", page)  # the policy would drop it


def test_numbers_that_json_lacks_are_null():
    features = [FeatureInfo("cosine", "cosine", "", float("-inf"), float("nan"))]
    summary = {"most_aligned": [{"a": "math-a", "b": "gone", "cosine": float("nan"), "same": True}]}
    data = data_of(render_html(make_report(EIGHT, features=features, summary=summary)))
    assert data["features"][0]["low"] is None and data["features"][0]["high"] is None
    row = data["summary"]["most_aligned"][0]
    assert row["cosine"] is None and row["pair"] is None and row["same"] == "True"


def test_write_replaces_the_file_as_a_whole(tmp_path: Path):
    path = tmp_path / "report.html"
    path.write_text("old")
    write_html(path, make_report(EIGHT))
    assert path.read_text("ascii") == render_html(make_report(EIGHT))
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"adapters": {"name": EIGHT, "rank": ["8"]}}, "rank"),
        ({"pairs": {"a": np.zeros(1, int), "b": np.ones(1, int)}}, "cosine"),
        ({"profile": np.zeros((3, 4))}, "profile"),
        ({"features": [FeatureInfo("cosine", "", "", directed_twin="x")]}, "directed_twin"),
        ({"pairs": {"a": np.array([1]), "b": np.array([1])}, "features": []}, "a < b"),
    ],
)
def test_wrong_input_is_named(changes, word):
    with pytest.raises(ValueError, match=word):
        make_report(EIGHT, **changes)


# ---- order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2])
def test_order_of_few(n):
    np.testing.assert_array_equal(leaf_order(np.eye(n)), np.arange(n))


@pytest.mark.parametrize("n", [24, 320])  # below and above the limit of optimal ordering
def test_order_keeps_blocks_together(n):
    rng = np.random.default_rng(1)
    block = rng.permutation(np.arange(n) // 8)
    s = np.where(block[:, None] == block, 0.7, 0.0) + rng.normal(0, 0.02, (n, n))
    order = leaf_order((s + s.T) / 2)
    assert sorted(order) == list(range(n))
    assert (np.diff(block[order]) != 0).sum() == n // 8 - 1
    np.testing.assert_array_equal(order, leaf_order((s + s.T) / 2))


def test_order_does_not_depend_on_the_order_of_the_input():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(30, 5))
    s = np.corrcoef(x)
    order, shuffle = leaf_order(s), rng.permutation(30)
    again = shuffle[leaf_order(s[np.ix_(shuffle, shuffle)])]
    assert again.tolist() in (order.tolist(), order[::-1].tolist())


def test_order_survives_missing_values():
    s = make_report(numbered(16)).similarity()
    s[3] = s[:, 3] = np.nan
    s[5, 6] = np.inf
    order = leaf_order(s)
    assert sorted(order) == list(range(16)) and 3 in (order[0], order[-1])
    np.testing.assert_array_equal(leaf_order(np.full((5, 5), np.nan)), np.arange(5))
    with pytest.raises(ValueError, match="square"):
        leaf_order(np.zeros((2, 3)))


# ---- terminal --------------------------------------------------------------------------------


def printed(report: ScreenReport, width: int = 80, encoding: str = "utf-8", folder="out") -> str:
    from rich.console import Console

    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="")
    print_screen_summary(report, Console(file=file, width=width), folder)
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("names", [[], EIGHT[:1], EIGHT[:2], EIGHT, HOSTILE, numbered(200)])
def test_terminal_fits_and_is_plain_text(names, width):
    from rich.cells import cell_len

    out = printed(make_report(names), width)
    assert "\x1b" not in out and "\x07" not in out and "\u202e" not in out
    assert max(map(cell_len, out.splitlines())) <= width


def test_terminal_says_what_it_left_out():
    out = printed(make_report(EIGHT), folder="somewhere/out")
    assert "15 strongest of 28 pairs" in out and "13 more pairs" in out
    assert "somewhere/out/pairs.parquet" in out.replace("\n", "")
    for title in ("Most aligned", "Most conflicting", "Near-duplicates", "Adapters", "0.803"):
        assert title in out
    assert "more pairs" not in printed(make_report(EIGHT[:5]))


def test_terminal_shows_markup_literally():
    names = ["[red]r[/red]", "[/]", "[link=x]y[/link]"]
    out = printed(make_report(names, notes=["[bold]n[/bold]"]), 120)
    assert all(name in out for name in [*names, "[bold]n[/bold]"])


def test_terminal_in_ascii():
    out = printed(make_report([*EIGHT[:3], HOSTILE[5], "x" * 200]), encoding="ascii")
    assert out.isascii() and "\\u6570" in out and "x..." in out


def test_progress_draws_on_a_terminal_only():
    from rich.console import Console

    for terminal in (False, True):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=80, _environ={"TERM": "xterm"})
        with progress(console, 3, "[b]screen") as advance:
            advance(1)
            advance(2)
        assert bool(file.getvalue()) == terminal
        assert ("[b]screen" in file.getvalue()) == terminal
