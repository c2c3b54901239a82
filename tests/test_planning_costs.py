"""What plans cost: the numbers of the user, their checks and files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from planning_judges import HashJudge, dense_cost

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.planning import Costs, load_costs
from mergeprobe_fast.planning.book import Book
from mergeprobe_fast.planning.costs import NEVER, UNIT, parse_cost

NAMES = ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("traffic", [{}, {"a": 1, "b": 2, "c": 0, "d": 5, "e": 0.5}])
@pytest.mark.parametrize("floor_on", ["prediction", "low"])
def test_the_price_of_a_group_is_its_definition(rng, traffic, floor_on):
    costs = Costs(*rng.uniform(0, 2, 4), 0.9, floor_on, traffic)
    judge, seed = HashJudge(NAMES, 3, low=0.85), 3
    book = Book(judge, costs, np.arange(5), costs.shares(NAMES), ("merge", "regmean"), costly=99)
    sets = [(0, 1), (1, 2, 3), (0, 1, 2, 3, 4), (2, 4)]
    book.ask(sets)
    book.ask(sets, ["regmean"])
    for s in [*sets, (3,)]:
        dense = dense_cost(HashJudge(NAMES, seed, low=0.85), [s], costs, ("merge", "regmean"))
        price = book.price(s)
        assert (price == NEVER) == np.isinf(dense)
        # Half a billionth of rounding, and the millionth of the loss that decides ties.
        assert price == NEVER or 0 <= price / UNIT - dense + 1e-9 <= 1e-6 * 5 * 0.2 + 2e-9


def test_routing_costs_nothing_with_one_resident_adapter_and_the_chance_of_a_switch_with_more():
    costs = Costs(adapter=0, request=1, average=0, worst=0)
    assert costs.cost(1.0, 0.0, 0.0) == 0.0
    switch = 1 - 0.5**2 - 0.3**2 - 0.2**2
    assert sum(costs.cost(p, 0, 0) for p in (0.5, 0.3, 0.2)) == pytest.approx(switch)


def test_the_defaults_merge_what_loses_little_and_keep_apart_what_does_not():
    costs = Costs()
    assert costs.cost(0.4, 2 * 0.05, 0.05) == pytest.approx(1.3)
    assert costs.cost(1.0, 5 * 0.03, 0.03) == pytest.approx(1.36)
    assert costs.cost(0.4, 2 * 0.09, 0.09) < 2 * costs.cost(0.2, 0, 0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"adapter": -1}, "costs: adapter: must be finite and not negative"),
        ({"adapter": float("nan")}, "costs: adapter: must be finite"),
        ({"average": float("inf")}, "costs: average: must be finite"),
        ({"worst": "much"}, "costs: worst: expected a number, got 'much'"),
        ({"request": True}, "costs: request: expected a number"),
        ({"worst": 1e5}, "costs: worst: must be at most 10000"),
        ({"floor": 1.5}, "costs: floor: must be at most 1"),
        ({"floor_on": "high"}, "costs: floor_on: must be prediction or low"),
        ({"traffic": [1, 2]}, "costs: traffic: expected adapters and numbers"),
        ({"traffic": {"a": -1}}, "costs: traffic: a: must be finite and not negative"),
        ({"traffic": {"a": 0}}, "costs: traffic: is zero for every adapter"),
        ({"price": 1}, "costs: price: is no cost; there are: adapter, average, floor"),
    ],
)
def test_a_cost_that_cannot_be_is_refused_by_name(given, said):
    with pytest.raises(InputError) as error:
        load_costs(None, given)
    assert str(error.value).startswith(said)


def test_traffic_names_every_adapter_and_no_other():
    for traffic, said in (({"a": 1, "x": 1}, "x"), ({"a": 1}, "'b'")):
        with pytest.raises(InputError, match=said):
            Costs(traffic=traffic).shares(["a", "b"])
    assert Costs(traffic={"a": 3, "b": 1}).shares(["b", "a"]).tolist() == [0.25, 0.75]


def test_a_file_of_costs_is_yaml_or_json_and_the_command_line_comes_first(tmp_path):
    (tmp_path / "c.yaml").write_text("adapter: 2\nfloor: 0.8\ntraffic: {a: 1, b: 1e1}\n")
    (tmp_path / "c.json").write_text(json.dumps({"adapter": 2, "floor": 0.8}))
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_costs(tmp_path / "c.yaml") == Costs(2, floor=0.8, traffic={"a": 1, "b": 10})
    assert load_costs(tmp_path / "c.json", {"floor": 0.7}) == Costs(2, floor=0.7)
    assert load_costs(tmp_path / "empty.yaml") == Costs()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("adapter: [1", "is neither YAML nor JSON"),
        ("[1, 2]", "is no mapping"),
        ("adapter: 1\nadapter: 2", "stands twice"),
        ("floor: high", "floor: expected a number, got 'high'"),
        ("price: 3", "price: is no cost"),
        ("floor: .nan", "floor: must be finite"),
        ("adapter: !!python/object:os.system {}", "is neither YAML nor JSON"),
        ("\xff", "is neither YAML nor JSON"),
    ],
)
def test_a_malformed_file_of_costs_is_one_error_with_its_path(tmp_path, content, said):
    path = tmp_path / "costs.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError) as error:
        load_costs(path)
    assert str(error.value).startswith(f"{path}: ") and said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_of_costs_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        load_costs(tmp_path / "none.yaml")


def test_a_cost_on_the_command_line_is_a_name_and_a_number():
    assert parse_cost("adapter=2.5") == ("adapter", 2.5)
    assert parse_cost("floor_on=low") == ("floor_on", "low")
    for text in ("adapter", "=2", "adapter=two"):
        with pytest.raises(InputError):
            parse_cost(text)
