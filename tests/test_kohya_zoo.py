"""A zoo of single files: finding them, and the same numbers as from PEFT folders."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
from adapters import make_adapter
from single_files import COMFYUI, CONVS, DIFFUSERS, FLUX, KOHYA, make_file
from tolerances import bound

import mergeprobe_fast as mpf
from mergeprobe_fast.errors import InputError
from mergeprobe_fast.report.check import check_paths

SMALL = {"lora_unet_x": (6, 5, 2)}
ONE = {"layers.0.q": (6, 5, 2)}


def as_peft(folder, made):
    """The same factors in a PEFT folder, under the same names."""
    return make_adapter(
        folder,
        {name: (*m.up.shape[:1], m.down[0].size, len(m.down)) for name, m in made.modules.items()},
        factors={
            name: (m.down.reshape(len(m.down), -1), m.up.reshape(len(m.up), -1))
            for name, m in made.modules.items()
        },
        alphas={
            name: m.down.shape[0] if m.alpha is None else m.alpha
            for name, m in made.modules.items()
        },
        convs={name: CONVS[name] for name in made.modules if name in CONVS},
        base_model=None,
    )


def make_ragged(folder, rng, modules, style):
    """Ranks, alphas and dtypes differ; a zero B, a duplicate, a missing module, rank deficiency."""
    names = list(modules)
    base = int(rng.integers(1 << 30))
    d_out, d_in, r = modules[names[0]]
    thin = np.repeat(rng.standard_normal((1, d_in)), r, axis=0), rng.standard_normal((d_out, r))
    zero = rng.standard_normal((r, d_in)), np.zeros((d_out, r))
    fewer = {name: modules[name] for name in names[1:]}
    recipes = [
        {"alpha": 1.0}, {"rank": 2, "alpha": 3.5}, {"rank": 7, "alphas": {names[1]: None}},
        {"factors": {names[0]: thin}}, {"factors": {names[0]: zero}}, {"modules": fewer},
    ]  # fmt: skip
    recipes.append({"alpha": 1.0, "seed": base})
    common = {"modules": modules, "style": style}
    return [
        make_file(folder / f"f{i}.safetensors", **{**common, "seed": base + i, **recipe})
        for i, recipe in enumerate(recipes)
    ]


@pytest.mark.parametrize(
    ("modules", "style"), [(KOHYA, "lora_down"), (FLUX, "lora_down"), (DIFFUSERS, "lora_A")],
    ids=["sd15", "flux", "diffusers"],
)  # fmt: skip
def test_screening_files_equals_screening_the_same_adapters_as_peft(tmp_path, rng, modules, style):
    made = make_ragged(tmp_path / "files", rng, modules, style)
    for i, one in enumerate(made):
        as_peft(tmp_path / "peft" / f"f{i}", one)
    files, peft = mpf.open_zoo(tmp_path / "files"), mpf.open_zoo(tmp_path / "peft")
    assert files.names == peft.names and files.modules == peft.modules
    fields = ["module", "adapter", "rank", "scale"]
    assert files.table.entries[fields].tolist() == peft.table.entries[fields].tolist()
    ours, theirs = mpf.pair_features(files, "all"), mpf.pair_features(peft, "all")
    assert list(ours) == list(theirs) and len(ours) > 10
    for column in ours:
        np.testing.assert_array_equal(ours[column], theirs[column], err_msg=column)
    norms = [one.norm for one in made]
    assert mpf.adapter_features(files)["norm"] == pytest.approx(norms, rel=1e-6)
    flat = [{n: m.weight.ravel() for n, m in one.modules.items()} for one in made]
    cosine = ours.matrix("cosine")
    for (i, a), (j, b) in itertools.combinations(enumerate(flat), 2):
        inner = sum(float(a[n] @ b[n]) for n in a.keys() & b.keys())
        assert abs(cosine[i, j] - inner / (norms[i] * norms[j])) < bound("feature")
    assert abs(cosine[0, 6] - 1) < bound("feature")  # the duplicate


def test_a_folder_is_searched_for_lora_files(tmp_path):
    make_file(tmp_path / "b.safetensors", SMALL)
    make_file(tmp_path / "deep" / "er" / "x10.safetensors", SMALL)
    make_file(tmp_path / "deep" / "er" / "x9.safetensors", SMALL)
    make_file(tmp_path / "a" / "base.safetensors", {"w": (2, 2, 1)}, drop=(
        "w.lora_up.weight", "w.lora_down.weight"))  # fmt: skip
    (tmp_path / "deep" / "empty.safetensors").write_bytes(b"")
    make_file(tmp_path / ".b.safetensors.tmp-0123456789abcdef", SMALL)
    zoo = mpf.open_zoo(tmp_path)
    assert zoo.names == ["b", "deep/er/x9", "deep/er/x10"]
    assert {a.format for a in zoo} == {"kohya"} and zoo.root == tmp_path
    strays = [note for note in zoo.notes if "were not opened" in note]
    assert len(strays) == 2
    assert "base.safetensors" in strays[0] and "empty.safetensors" in strays[1]


def test_the_layer_of_a_kohya_module_ends_at_its_first_number(tmp_path):
    names = {
        "lora_unet_down_blocks_0_attentions_1_proj_in": "lora_unet_down_blocks_0",
        "lora_te1_text_model_encoder_layers_11_mlp_fc1": "lora_te1_text_model_encoder_layers_11",
        "lora_unet_x": "lora_unet_x",
    }
    make_file(tmp_path / "a.safetensors", {name: (6, 5, 2) for name in names})
    assert {m.name: m.layer for m in mpf.open_zoo(tmp_path).modules} == names


def test_files_are_listed_by_path_with_their_stems(tmp_path):
    paths = [tmp_path / f"{name}.safetensors" for name in ("z", "a.b", "m")]
    for i, path in enumerate(paths):
        make_file(path, SMALL, seed=i)
    zoo = mpf.open_zoo(paths)
    assert zoo.names == ["z", "a.b", "m"] and zoo.root is None
    assert mpf.open_zoo(paths[0]).names == ["z"]
    make_file(tmp_path / "other" / "z.safetensors", SMALL, seed=9)
    same = mpf.open_zoo([paths[0], tmp_path / "other" / "z.safetensors"])
    assert len(set(same.names)) == 2
    with pytest.raises(InputError, match="is given twice"):
        mpf.open_zoo([paths[0], paths[0]])
    (tmp_path / "other" / "latest.safetensors").symlink_to("z.safetensors")
    assert any("the same file as" in note for note in mpf.open_zoo(tmp_path / "other").notes)


def test_a_peft_folder_may_be_named_like_a_file(tmp_path):
    make_adapter(tmp_path / "x.safetensors", ONE)
    zoo = mpf.open_zoo(tmp_path)
    assert zoo.names == ["x.safetensors"] and zoo[0].format == "peft" and zoo.notes == ()


def test_lora_files_beside_a_peft_adapter_are_noted(tmp_path):
    make_adapter(tmp_path / "a", ONE)
    make_file(tmp_path / "a" / "pytorch_lora_weights.safetensors", SMALL)
    zoo = mpf.open_zoo(tmp_path)
    assert zoo.names == ["a"]
    assert any("1 LoRA files beside the PEFT adapter" in note for note in zoo.notes)


def test_a_cut_lora_file_is_an_error_and_skip_bad_goes_on(tmp_path):
    for i in range(3):
        make_file(tmp_path / f"f{i}.safetensors", SMALL, seed=i)
    path = tmp_path / "f1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="is truncated"):
        mpf.open_zoo(tmp_path)
    zoo = mpf.open_zoo(tmp_path, skip_bad=True)
    assert zoo.names == ["f0", "f2"] and [s.path for s in zoo.skipped] == [path]
    error = InputError("anything", path=zoo[0].path, key="lora_unet_x")
    assert zoo.without(error).names == ["f2"]


def test_nan_weights_are_found_by_check_and_by_the_engine(tmp_path):
    bad = np.full((2, 5), np.nan), np.ones((6, 2))
    make_file(tmp_path / "good.safetensors", SMALL)
    make_file(tmp_path / "bad.safetensors", SMALL, factors={"lora_unet_x": bad})
    checked = check_paths([str(tmp_path)])
    assert [c.ok for c in checked.adapters] == [False, True]
    assert checked.adapters[0].problems[0].key == "lora_unet_x.lora_down.weight"
    with pytest.raises(InputError, match=r"not finite|NaN") as caught:
        mpf.pair_features(mpf.open_zoo(tmp_path))
    assert caught.value.path == os.fspath(tmp_path / "bad.safetensors")


def test_formats_whose_names_cannot_agree_are_refused(tmp_path):
    make_file(tmp_path / "k1.safetensors", SMALL)
    make_file(tmp_path / "k2.safetensors", SMALL, seed=1)
    make_file(tmp_path / "d.safetensors", DIFFUSERS, alpha=None, style="lora_A")
    make_file(tmp_path / "c.safetensors", COMFYUI, style="lora_A")
    make_adapter(tmp_path / "p", ONE)
    for other in ("d.safetensors", "c.safetensors", "p"):
        with pytest.raises(InputError, match="cannot be matched") as caught:
            mpf.open_zoo([tmp_path / p for p in ("k1.safetensors", "k2.safetensors", other)])
        assert caught.value.path == str(tmp_path / other)
        assert "kohya's underscore names (2: k1, k2)" in caught.value.reason
    zoo = mpf.open_zoo(tmp_path, skip_bad=True)  # the odd ones are left out, as any that do not fit
    assert zoo.names == ["k1", "k2"] and len(zoo.skipped) == 3


def test_bare_peft_keys_go_with_peft_folders(tmp_path):
    make_adapter(tmp_path / "a", ONE, base_model=None)
    bare = {"style": "lora_A", "prefix": "base_model.model.", "alpha": None}
    make_file(tmp_path / "b.safetensors", ONE, **bare)
    zoo = mpf.open_zoo(tmp_path)
    assert [a.format for a in zoo] == ["peft", "diffusers"]
    assert [m.name for m in zoo.modules] == list(ONE)


def test_files_that_share_no_module_are_noted(tmp_path):
    make_file(tmp_path / "a.safetensors", SMALL)
    make_file(tmp_path / "b.safetensors", SMALL, seed=1)
    assert not any("share no module" in note for note in mpf.open_zoo(tmp_path).notes)
    make_file(tmp_path / "c.safetensors", {"lora_transformer_x": (6, 5, 2)})
    notes = [n for n in mpf.open_zoo(tmp_path).notes if "share no module" in n]
    assert len(notes) == 1 and "a, b | c" in notes[0]


def test_two_declared_bases_are_refused_unless_they_are_said_to_be_one(tmp_path):
    for name in ("sd_v1", "sdxl_base_v1-0"):
        texts = {"ss_base_model_version": name}
        make_file(tmp_path / f"{name}.safetensors", SMALL, metadata=texts)
    with pytest.raises(InputError, match="--same-base"):
        mpf.open_zoo(tmp_path)
    assert len(mpf.open_zoo(tmp_path, same_base=True)) == 2


def test_linear_and_conv_of_one_name_do_not_fit(tmp_path):
    name = next(iter(CONVS.keys() & KOHYA.keys()))
    make_file(tmp_path / "a.safetensors", {name: KOHYA[name]})
    raw = {f"{name}.lora_down.weight": np.ones((2, KOHYA[name][1]), np.float32),
           f"{name}.lora_up.weight": np.ones((KOHYA[name][0], 2), np.float32)}  # fmt: skip
    make_file(tmp_path / "b.safetensors", SMALL, extra=raw)
    with pytest.raises(InputError, match="not the same base model"):
        mpf.open_zoo(tmp_path)


def test_the_few_are_to_blame_whatever_recipes_the_many_share(tmp_path):
    """Three of one recipe against two recipes of one shape."""
    for i in range(3):
        make_file(tmp_path / f"many{i}.safetensors", SMALL, seed=i)
    for rank in (1, 3):
        make_file(tmp_path / f"few{rank}.safetensors", {"lora_unet_x": (6, 4, rank)})
    with pytest.raises(InputError, match="linear 6 x 4 here, linear 6 x 5 in 'many0'") as caught:
        mpf.open_zoo(tmp_path)
    assert caught.value.path == str(tmp_path / "few1.safetensors")


def test_checking_a_folder_accounts_for_files(tmp_path):
    make_file(tmp_path / "a.safetensors", KOHYA)
    make_file(tmp_path / "b.safetensors", KOHYA, extra={"lora_unet_x.hada_w1_a": np.ones(3)})
    checked = check_paths([str(tmp_path)])
    assert [c.ok for c in checked.adapters] == [True, False] and not checked.ok
    assert [c.counts()["used"] for c in checked.adapters] == [15, 15]
    assert "LoHa" in checked.adapters[1].problems[0].reason


def test_files_that_differ_in_metadata_only_share_their_plan(tmp_path):
    """What keeps 50,000 files in memory: one layout, one plan, one tuple of scales."""
    for i in range(5):
        texts = {"ss_session_id": "x" * (i * 7), "ss_tag": "é" * i} if i else None
        make_file(tmp_path / f"{i}.safetensors", KOHYA, seed=i, metadata=texts)
    zoo = mpf.open_zoo(tmp_path)
    tables = [a.modules for a in zoo]
    assert len({id(table.plan) for table in tables}) == 1
    assert len({id(table._scales) for table in tables}) == 1
    for i, adapter in enumerate(zoo):
        made = make_file(tmp_path / "again" / "x.safetensors", KOHYA, seed=i)
        ref = next(iter(adapter.modules.values()))
        data = ref.a.file.path.read_bytes()[ref.a.offset : ref.a.offset + ref.a.nbytes]
        stored = np.frombuffer(data, "<f4").reshape(ref.a.shape)
        np.testing.assert_array_equal(stored, made.modules[ref.name].down)
