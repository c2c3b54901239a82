"""What calibrate reads, and what it refuses: data files, base folders and arguments."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_bases import VOCABULARY, make_base, make_tokenizer, save, write_ids

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io import safetensors
from mergeprobe_fast.record import calibrate, data_arguments, plan_calibration
from mergeprobe_fast.record.texts import read_texts

TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def read(path: Path, tokenizer: Any = None, **options: Any) -> list[list[int]]:
    arguments = {"max_length": 512, "max_sequences": None, "least": 2, "seed": 0} | options
    given = tokenizer or make_tokenizer(TEMPLATE)
    texts = read_texts("d", path, lambda: given, VOCABULARY, **arguments)
    assert texts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert texts.source == path.name
    return [ids.tolist() for ids in texts.sequences]


def write_lines(path: Path, *items: Any) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def test_the_four_forms_of_a_line(tmp_path):
    path = write_lines(
        tmp_path / "d.jsonl",
        {"text": "w1 w2 w3", "id": 7},
        {"prompt": "w1 w", "completion": "2 w3"},  # one text: the parts meet inside a word
        {"messages": [{"role": "w5", "content": "w6"}, {"role": "w7", "content": "w8"}]},
        {"input_ids": [4, 0, 47]},
    )
    assert read(path) == [[1, 2, 3], [1, 2, 3], [5, 6, 7, 8], [4, 0, 47]]


def test_blank_lines_and_a_byte_order_mark_are_no_texts(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "w1 w2"}\r\n\n  \n{"text": "w3 w4"}')
    assert read(path) == [[1, 2], [3, 4]]


def test_paragraphs_of_a_text_file(tmp_path):
    path = tmp_path / "d.txt"
    path.write_text("\n\nw1 w2\nw3\n \n\n\nw4 w5\r\n\r\nw6 w7")
    assert read(path) == [[1, 2, 3], [4, 5], [6, 7]]


def test_special_tokens_are_those_the_tokenizer_adds(tmp_path):
    class Adding:
        chat_template = TEMPLATE

        def __call__(self, text, add_special_tokens, verbose):
            inner = make_tokenizer()(text)["input_ids"]
            return {"input_ids": [46, *inner] if add_special_tokens else inner}

        def apply_chat_template(self, messages, tokenize):
            return make_tokenizer(TEMPLATE).apply_chat_template(messages, tokenize=tokenize)

    chat = {"messages": [{"role": "w5", "content": "w6"}]}
    path = write_lines(tmp_path / "d.jsonl", {"text": "w1 w2"}, chat)
    assert read(path, Adding()) == [[46, 1, 2], [5, 6]]


BAD_LINES = [
    ('{"text": "w1"', "is not valid JSON"),
    ('["w1"]', "is not a JSON object"),
    ('{"txt": "w1 w2"}', "one of them: none"),
    ('{"text": "w1", "messages": []}', "one of them: text and messages"),
    ('{"prompt": "w1"}', "has a prompt without a completion"),
    ('{"text": 5}', "text: is not a text"),
    ('{"prompt": "w1", "completion": null}', "completion: is not a text"),
    ('{"messages": []}', "messages: is not a list of"),
    ('{"messages": [{"role": "user"}]}', "messages: is not a list of"),
    ('{"input_ids": [1, 2.0]}', "input_ids: is not a list of token ids"),
    ('{"input_ids": [1, -2]}', "input_ids: is not a list of token ids"),
    ('{"input_ids": [1, true]}', "input_ids: is not a list of token ids"),
    ('{"input_ids": [1, 48]}', "token id 48 is outside the vocabulary of 48"),
    ('{"input_ids": []}', "has 0 tokens, 2 or more are needed"),
    ('{"text": "w1"}', "has 1 tokens, 2 or more are needed"),
    ('{"text": "w1", "text": "w2"}', "key appears twice"),
]


@pytest.mark.parametrize("line, reason", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, line, reason):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "w1 w2"}\n\n' + line + '\n{"text": "w1 w2"}\n')
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: line 3: ") and reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_data(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "d.json").write_text("[]")
    (tmp_path / "latin.txt").write_bytes(b"w1\nw2 \xe9\n")
    for name, reason in [
        ("empty.jsonl", "empty.jsonl: is empty"),
        ("d.json", "d.json: is neither .jsonl"),
        ("none.txt", "none.txt: cannot be read: No such file"),
        ("latin.txt", "latin.txt: line 2: is not UTF-8"),
    ]:
        with pytest.raises(InputError) as caught:
            read(tmp_path / name)
        assert reason in str(caught.value)


def test_a_chat_needs_a_template_that_takes_it(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", {"messages": [{"role": "w5", "content": "w6"}]})
    with pytest.raises(InputError, match="line 1: messages: the tokenizer has no chat template"):
        read(path, make_tokenizer())
    picky = make_tokenizer("{{ raise_exception('roles must\nalternate') }}")
    with pytest.raises(InputError, match="line 1: messages: the chat template refuses it: roles"):
        read(path, picky)


def test_of_many_sequences_some_are_drawn(tmp_path, rng):
    path = write_ids(tmp_path / "d.jsonl", [[i, i] for i in range(40)])
    drawn = read(path, max_sequences=8, seed=3)
    numbers = [ids[0] for ids in drawn]
    assert len(numbers) == 8 and numbers == sorted(set(numbers))
    assert drawn == read(path, max_sequences=8, seed=3)
    assert drawn != read(path, max_sequences=8, seed=4)
    assert len(read(path, max_sequences=41)) == 40


def test_long_sequences_are_cut_and_noted(tmp_path):
    make_base(tmp_path / "base", "GPT2")
    data = {"d": write_ids(tmp_path / "d.jsonl", [[1] * 70, [2] * 5])}
    plan = plan_calibration(tmp_path / "base", data, max_length=9)
    assert "domain d: 1 sequences were cut to 9 tokens" in plan.info.notes
    assert plan.info.domains["d"].tokens == 8 + 4
    plan = plan_calibration(tmp_path / "base", data)
    assert "max_length 512 is beyond the model's 64 positions" in plan.info.notes
    assert plan.info.max_length == 64 and plan.info.domains["d"].tokens == 63 + 4
    plan.record(tmp_path / "cal").sampled_tokens("d")


def test_data_arguments():
    assert data_arguments(["math=a/m.jsonl", "b/code.txt", "x=y=z.txt"]) == {
        "math": "a/m.jsonl", "code": "b/code.txt", "x": "y=z.txt"
    }  # fmt: skip
    with pytest.raises(InputError, match=r"c.txt: domain 'math' is given twice"):
        data_arguments(["math=a", "math=c.txt"])
    with pytest.raises(InputError, match=r"domain 'math' has no file"):
        data_arguments(["math="])


@pytest.mark.parametrize(
    "names, reason",
    [
        (["a/b"], "'a/b': is no name for a domain"),
        (["a\n"], "is no name for a domain"),
        (["Math", "math"], "math: is the same file name as 'Math'"),
        ([], "no domain is given"),
    ],
)
def test_names_of_domains_are_checked(tmp_path, names, reason):
    with pytest.raises(InputError) as caught:
        plan_calibration(tmp_path, {name: "d.jsonl" for name in names})
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    return {"d": write_ids(tmp_path / "d.jsonl", [np.arange(9), np.arange(5)])}


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"samples": 0}, "samples is 0"),
        ({"samples": True}, "samples is True"),
        ({"max_sequences": 0}, "max_sequences is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"skip_first": 1.5}, "skip_first is 1.5"),
        ({"max_length": 3, "skip_first": 3}, "sequences of 3 tokens have none behind the first 3"),
        ({"skip_first": 5}, "d.jsonl: line 2: has 5 tokens, 6 or more are needed"),
        ({"labels": "mine"}, "labels 'mine' are none of model, data"),
        ({"dtype": "int8"}, "dtype 'int8' is none of auto, float32"),
        ({"modules": "*.q_proj"}, "modules is a list of globs"),
        ({"modules": []}, "modules is empty"),
        ({"modules": ["*.q_proj", "*.query"]}, "*.query: matches no Linear or Conv1D"),
        ({"threads": 0}, "threads must be a positive integer"),
    ],
)
def test_arguments_are_checked(tmp_path, data, arguments, reason):
    make_base(tmp_path / "base")
    with pytest.raises(InputError) as caught:
        plan_calibration(tmp_path / "base", data, **arguments)
    assert reason in str(caught.value)


def test_base_folders_that_cannot_be_used(tmp_path, data):
    with pytest.raises(InputError, match=r"org/name: has no config.json"):
        plan_calibration("org/name", data)
    make_base(tmp_path / "base")
    base = tmp_path / "base"
    weights = base / "model.safetensors"
    good = weights.read_bytes()
    tensors = {
        key: (ref.dtype, ref.shape, good[ref.offset : ref.offset + ref.nbytes])
        for key, ref in safetensors.read_header(weights).tensors.items()
    }
    lacking = {k: v for k, v in tensors.items() if "layers.1.mlp.up" not in k}
    safetensors.write(weights, lacking, {"format": "pt"})
    with pytest.raises(InputError) as caught:  # transformers would fill in random numbers
        plan_calibration(base, data)
    assert "do not fit the model: missing_keys" in str(caught.value)
    assert caught.value.key == "model.layers.1.mlp.up_proj.weight"
    weights.write_bytes(good[:-8])
    with pytest.raises(InputError, match="is truncated"):
        plan_calibration(base, data)
    weights.unlink()
    (base / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"has no model.safetensors"):
        plan_calibration(base, data)
    (base / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(InputError, match="the config cannot be loaded: "):
        plan_calibration(base, data)
    with pytest.raises(InputError, match="neither a folder nor a model"):
        plan_calibration(7, data)


def test_weights_in_shards_and_without_prefix(tmp_path, data):
    model = make_base(tmp_path / "base")
    base = tmp_path / "base"
    calibrate(base, data, tmp_path / "single")
    raw = (base / "model.safetensors").read_bytes()
    halves: list[dict[str, Any]] = [{}, {}]
    for i, (key, ref) in enumerate(
        safetensors.read_header(base / "model.safetensors").tensors.items()
    ):
        value = ref.dtype, ref.shape, raw[ref.offset : ref.offset + ref.nbytes]
        halves[i % 2][key.removeprefix("model.")] = value
    (base / "model.safetensors").unlink()
    where = {}
    for i, half in enumerate(halves):
        safetensors.write(base / f"part{i}.safetensors", half, {"format": "pt"})
        where |= dict.fromkeys(half, f"part{i}.safetensors")
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    plan = plan_calibration(base, data)
    assert plan.streamed
    plan.record(tmp_path / "shards")
    one, other = (tmp_path / n / "d.safetensors" for n in ("single", "shards"))
    assert one.read_bytes() == other.read_bytes()
    index.write_text(json.dumps({"weight_map": {"a": "../part0.safetensors"}}))
    with pytest.raises(InputError, match=r"'../part0.safetensors' is not the name of a file"):
        plan_calibration(base, data)
    assert model is not None


def test_weights_that_change_meanwhile_are_an_error(tmp_path, data):
    model = make_base(tmp_path / "base")
    plan = plan_calibration(tmp_path / "base", data)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    save(model, tmp_path / "base")
    with pytest.raises(InputError, match="changed since its header was read"):
        plan.record(tmp_path / "cal")
    assert not (tmp_path / "cal").exists()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_a_model_with_adapters_is_not_a_base(tmp_path, data):
    from peft import LoraConfig, get_peft_model

    model = make_base(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    for given in (adapted, adapted.base_model.model):
        with pytest.raises(InputError, match="holds adapters; give the base model itself"):
            plan_calibration(given, data)


@pytest.mark.parametrize("domain", ["math", "code", "science", "instruct", "safety"])
def test_the_example_texts_were_neither_trained_nor_measured_on(monkeypatch, domain):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    texts, tasks = (importlib.import_module(name) for name in ("calibrate_data", "tasks"))
    items = texts.calibration_items(domain, 48)
    prompts = {item.prompt for item in items}
    assert len(items) == len(prompts) == 48
    measured = tasks.draw_items(domain, 64, 0, held_out=True)
    assert not prompts & {item.prompt for item in measured}
    for seed in (0, 1):  # of the zoo's recipes; whole questions, terms and tasks are kept apart
        trained = tasks.draw_items(domain, 320, seed, held_out=False)
        assert not {item.key for item in items} & {item.key for item in trained}


def test_importing_loads_no_torch():
    code = (
        "import sys, mergeprobe_fast.record, mergeprobe_fast.io.calibration as c; "
        "print(*{'torch', 'transformers', 'tokenizers'} & set(sys.modules), c.CALIBRATION_NAME)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "calibration.json\n"), found.stderr


def test_the_base_is_described(tmp_path, data):
    model = make_base(tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    info = plan_calibration(tmp_path / "base", data).info
    assert info.base_model == info.base_path == str(tmp_path / "base")
    assert info.config_sha256 == hashlib.sha256(config.read_bytes()).hexdigest()
    named = json.loads(config.read_text()) | {"_name_or_path": "org/tiny"}
    config.write_text(json.dumps(named))
    info = plan_calibration(tmp_path / "base", data).info
    assert (info.base_model, info.base_path) == ("org/tiny", str(tmp_path / "base"))
    model.name_or_path = "org/object"
    info = plan_calibration(model, data).info
    assert (info.base_model, info.base_path) == ("org/object", None)
    assert info.domains["d"].sha256 == hashlib.sha256(data["d"].read_bytes()).hexdigest()
    assert info.domains["d"].source == "d.jsonl"


def test_modules_that_are_never_called_are_noted_or_refused(tmp_path, data):
    model = make_base(tmp_path / "base")
    model.spare = torch.nn.Linear(3, 4)
    model.again = model.model.layers[0].mlp.down_proj
    notes = plan_calibration(model, data).info.notes
    assert "1 modules are not recorded, such as spare: not called for text" in notes
    with pytest.raises(InputError, match="spare: cannot be recorded: not called for text"):
        plan_calibration(model, data, modules=["spare", "*.q_proj"])
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x)) + mlp.down_proj(mlp.gate_proj(x))
    routed = model.model.layers[2].mlp
    routed.forward = lambda x: torch.nn.functional.pad(
        routed.down_proj(routed.up_proj(x[:, :2])), (0, 0, 0, x.shape[1] - 2)
    )
    plan = plan_calibration(model, data)
    notes = " ".join(plan.info.notes)
    assert "such as model.layers.1.mlp.down_proj: called more than once for one text" in notes
    assert "2 modules are not recorded, such as model.layers.2.mlp.up_proj: not fed every" in notes
    assert not {"model.layers.1.mlp.down_proj", "model.layers.2.mlp.up_proj"} & set(
        plan.info.modules
    )
