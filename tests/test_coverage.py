"""The account of every tensor, and that it always agrees with opening."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from adapters import DEFAULT_MODULES, make_adapter

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import check, open_adapter, safetensors

ONE = np.ones((2, 3), dtype=np.float32)
Q0 = "model.layers.0.self_attn.q_proj"
PRE = "base_model.model."


def test_a_good_adapter(tmp_path):
    made = make_adapter(tmp_path, ranks={Q0: 2}, rslora=True, dtypes={Q0: "BF16"})
    found = check(tmp_path)
    assert found.ok and found.problems == () and found.notes == ()
    assert found.base_model == "test/base"
    assert found.counts() == {"used": 8, "refused": 0, "ignored": 0}
    rows = {row.name: row for row in found.modules}
    for name, truth in made.modules.items():
        row = rows[name]
        assert (row.rank, row.d_in, row.d_out) == (*truth.a.shape, truth.b.shape[0])
        assert row.scale == truth.scale and row.kind == "linear"
    assert rows[Q0].dtypes == ("BF16", "BF16")
    assert rows[Q0].scale == 8 / math.sqrt(2)


def test_every_tensor_has_its_reason(tmp_path):
    extra = {
        f"{PRE}m.lora_magnitude_vector": ONE,
        f"{PRE}half.lora_A.weight": ONE,
        f"{PRE}lm_head.weight": ONE,
        f"{PRE}{Q0}.lora_velora_embed": ONE,
        "stranger": ONE.astype("i8"),
    }
    make_adapter(tmp_path, extra=extra, config={"use_dora": True, "shiny": 1})
    found = check(tmp_path)
    assert not found.ok
    rows = {row.key: row for row in found.keys}
    assert found.counts() == {"used": 8, "refused": 4, "ignored": 1}
    assert "DoRA" in rows[f"{PRE}m.lora_magnitude_vector"].reason
    assert "half a pair" in rows[f"{PRE}half.lora_A.weight"].reason
    assert "full weight" in rows[f"{PRE}lm_head.weight"].reason
    assert rows[f"{PRE}{Q0}.lora_velora_embed"].status == "ignored"
    assert "backward" in rows[f"{PRE}{Q0}.lora_velora_embed"].reason
    assert (rows["stranger"].dtype, rows["stranger"].shape) == ("I64", (2, 3))
    assert {row.reason for row in rows.values() if row.status == "used"} == {None}
    assert [p.key for p in found.problems if p.path.endswith(".json")] == ["use_dora"]
    assert len(found.problems) == 5
    assert any("shiny" in note for note in found.notes)
    # Nothing is missing from the account.
    header = safetensors.read_header(tmp_path / "adapter_model.safetensors")
    assert set(rows) == set(header.tensors)


def test_a_rank_that_disagrees_refuses_both_factors(tmp_path):
    make_adapter(tmp_path, config={"rank_pattern": {Q0: 3}})
    found = check(tmp_path)
    assert found.counts() == {"used": 6, "refused": 2, "ignored": 0}
    assert found.problems[0].key == Q0
    assert {row.key.split(".lora_")[0] for row in found.keys if row.status == "refused"} == {
        PRE + Q0
    }


def test_the_partner_of_a_refused_factor_is_not_called_used(tmp_path):
    half = {f"{PRE}m.lora_A.weight": ONE.astype("f8"), f"{PRE}m.lora_B.weight": ONE.T}
    make_adapter(tmp_path, extra=half)
    rows = {row.key: row for row in check(tmp_path).keys}
    assert "dtype F64" in rows[f"{PRE}m.lora_A.weight"].reason
    assert rows[f"{PRE}m.lora_B.weight"].reason == "the other factor of its module is refused"
    assert len(check(tmp_path).problems) == 1


def test_without_usable_rules_the_modules_are_still_listed(tmp_path):
    make_adapter(tmp_path, config={"lora_alpha": "x"})
    found = check(tmp_path)
    assert len(found.modules) == 4 and {row.scale for row in found.modules} == {None}
    (tmp_path / "adapter_config.json").unlink()
    found = check(tmp_path)
    assert len(found.modules) == 4 and found.base_model is None
    assert [p.reason for p in found.problems] == ["has no adapter_config.json"]


def test_to_dict_is_json(tmp_path):
    make_adapter(tmp_path, extra={"stranger": ONE})
    found = check(tmp_path)
    value = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert value["ok"] is False and value["path"] == str(tmp_path)
    assert value["counts"] == {"used": 8, "refused": 1, "ignored": 0}
    assert {row["key"]: row["status"] for row in value["keys"]}["stranger"] == "refused"
    assert value["modules"][0]["rank"] == 4
    assert value["problems"][0]["path"].endswith("adapter_model.safetensors")


BAD = {
    "nothing": lambda f: None,
    "config": lambda f: (f / "adapter_config.json").write_text("{"),
    "no weights": lambda f: (f / "adapter_model.safetensors").unlink(),
    "truncated": lambda f: (f / "adapter_model.safetensors").write_bytes(b"12345678"),
    "stranger": lambda f: make_adapter(f, extra={"x": ONE}),
    "init": lambda f: make_adapter(f, config={"init_lora_weights": "pissa"}),
    "rank": lambda f: make_adapter(f, config={"r": 9}),
    "dtype": lambda f: make_adapter(f, dtype="F64"),
    "many": lambda f: make_adapter(f, config={"r": 9, "use_dora": True}, extra={"x": ONE}),
}


@pytest.mark.parametrize("case", BAD)
def test_check_and_open_agree(tmp_path, case):
    make_adapter(tmp_path, DEFAULT_MODULES)
    BAD[case](tmp_path)
    found = check(tmp_path)
    if found.ok:
        assert case == "nothing"
        open_adapter(tmp_path)
        return
    with pytest.raises(InputError) as caught:
        open_adapter(tmp_path)
    first = found.problems[0]
    assert (caught.value.path, caught.value.key) == (first.path, first.key)
    assert caught.value.reason.startswith(first.reason)
    many = f"1 of {len(found.problems)} problems"
    assert (many in caught.value.reason) == (len(found.problems) > 1)


def test_what_is_no_folder_is_reported_and_not_raised(tmp_path):
    for path in (tmp_path / "absent", tmp_path, "nul\0"):
        found = check(path)
        assert not found.ok and len(found.problems) == 1 and found.keys == ()
