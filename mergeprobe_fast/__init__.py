"""mergeprobe_fast: which LoRA adapters can live together, and the merge itself, from the factors.

>>> import mergeprobe_fast as mpf
>>> zoo = mpf.open_zoo("examples/zoo")                      # reads headers only
>>> pairs = mpf.pair_features(zoo)                          # one row per pair
>>> mpf.set_features(zoo, size=3)                           # one row per set of three
>>> mpf.merge(zoo, method="svd", rank=16).save("merged")    # PEFT loads it as it is

Names are resolved on first use: importing the package imports neither torch nor any compiled code.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "BackendError": "errors",
    "Costs": "planning",
    "CROSSWALK": "features",
    "FEATURES": "features.listing",
    "InputError": "errors",
    "MERGE_METHODS": "merging",
    "Merge": "merges",
    "MergeprobeError": "errors",
    "Plan": "planning",
    "RetentionPredictor": "predict",
    "Zoo": "zoo",
    "adapter_features": "screening",
    "apply_plan": "planning.artefacts",
    "canonical": "engine.forms",
    "entry_features": "features.entries",
    "integrations": "integrations:",
    "load_router": "io.router_file",
    "merge": "merging",
    "merge_features": "merges",
    "merge_into": "merging",
    "open_calibration": "io.calibration",
    "open_zoo": "zoo",
    "ops": "ops:",
    "pair_features": "screening",
    "plan": "planning",
    "read_served": "planning.served",
    "record": "record:",
    "set_features": "sets",
}

__all__ = [
    "CROSSWALK",
    "FEATURES",
    "MERGE_METHODS",
    "BackendError",
    "Costs",
    "InputError",
    "Merge",
    "MergeprobeError",
    "Plan",
    "RetentionPredictor",
    "Zoo",
    "__version__",
    "adapter_features",
    "apply_plan",
    "canonical",
    "entry_features",
    "integrations",
    "load_router",
    "merge",
    "merge_features",
    "merge_into",
    "open_calibration",
    "open_zoo",
    "ops",
    "pair_features",
    "plan",
    "read_served",
    "record",
    "set_features",
]

if TYPE_CHECKING:
    from mergeprobe_fast import integrations, ops, record
    from mergeprobe_fast.engine.forms import canonical
    from mergeprobe_fast.errors import BackendError, InputError, MergeprobeError
    from mergeprobe_fast.features import CROSSWALK
    from mergeprobe_fast.features.entries import entry_features
    from mergeprobe_fast.features.listing import FEATURES
    from mergeprobe_fast.io.calibration import open_calibration
    from mergeprobe_fast.io.router_file import load_router
    from mergeprobe_fast.merges import Merge, merge_features
    from mergeprobe_fast.merging import MERGE_METHODS, merge, merge_into
    from mergeprobe_fast.planning import Costs, Plan, plan
    from mergeprobe_fast.planning.artefacts import apply_plan
    from mergeprobe_fast.planning.served import read_served
    from mergeprobe_fast.predict import RetentionPredictor
    from mergeprobe_fast.screening import adapter_features, pair_features
    from mergeprobe_fast.sets import set_features
    from mergeprobe_fast.zoo import Zoo, open_zoo


def __getattr__(name: str) -> Any:
    where = _WHERE.get(name)
    if where is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = where.partition(":")
    found = import_module(f"{__name__}.{module}")
    value = found if where.endswith(":") else getattr(found, attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
