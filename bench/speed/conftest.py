"""Options, the gate and the results. `pytest bench/speed` and run.py both end up here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
for folder in (HERE, HERE.parents[1]):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from cases import Case, Measured, measure  # noqa: E402
from gate import refusal  # noqa: E402
from results import append, default_path, rows  # noqa: E402
from suites import ON_DEVICE, SUITES, load  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("speed")
    group.addoption("--quick", action="store_true", help="small problems, few repetitions")
    group.addoption("--only", choices=(*SUITES, *ON_DEVICE), action="append",
                    help="run these suites only")  # fmt: skip
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu",
                    help="cuda: the suites device_..., by events")  # fmt: skip
    group.addoption("--no-gate", action="store_true", help="time without the correctness tests")
    group.addoption("--results", type=Path, help="JSON lines file to append to")


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("bench/speed: timings need the machine to themselves, not -n")


def pytest_report_header(config: pytest.Config) -> str:
    state = "UNGATED: the correctness tests were not run" if config.getoption("--no-gate") else "on"
    return f"speed: gate {state}, results {_path(config)}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per case and variant, in the order of the suites."""
    if "measured" not in metafunc.fixturenames:
        return
    suites = ON_DEVICE if metafunc.config.getoption("--device") == "cuda" else SUITES
    chosen = metafunc.config.getoption("--only") or suites
    quick = metafunc.config.getoption("--quick")
    cases = [c for suite in suites if suite in chosen for c in load(suite).cases(quick)]
    metafunc.parametrize(
        ("measured", "variant"),
        [(c, v.name) for c in cases for v in c.variants],
        indirect=["measured"],
        ids=[f"{c.id}: {v.name}" for c in cases for v in c.variants],
        scope="module",
    )


@pytest.fixture(scope="session")
def gate(pytestconfig: pytest.Config) -> None:
    """Stops the session when the correctness tests are red."""
    if pytestconfig.getoption("--no-gate"):
        return
    reason = refusal()
    if reason:
        pytest.exit(f"speed: nothing is timed, {reason}", returncode=3)


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest, pytestconfig: pytest.Config, gate: None
) -> Measured | Exception:
    """The case, run once for all its variants; its rows are written as soon as it is done.

    An exception is kept and raised again in each test: pytest would run the case anew for each.
    """
    return _run(request.param, pytestconfig)


_done: dict[str, Any] = {}


def _run(case: Case, config: pytest.Config) -> Measured | Exception:
    if case.id not in _done:
        try:
            found = measure(case)
            new = rows(
                found, gated=not config.getoption("--no-gate"), quick=config.getoption("--quick"),
                device=config.getoption("--device"),
            )  # fmt: skip
            append(_path(config), new)
            config.stash.setdefault(ROWS, []).extend(new)
            _done[case.id] = found
        except Exception as error:
            _done[case.id] = error
    return _done[case.id]


ROWS: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()


def _path(config: pytest.Config) -> Path:
    return config.getoption("--results") or default_path(config.getoption("--device"))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash.get(ROWS, [])
    if not found:
        return
    from table import missed, render

    terminalreporter.section("speed: ratios, all interleaved")
    terminalreporter.write_line(render(found))
    terminalreporter.write_line(missed(found))
