"""docs/features.md, from the declarations: ``mergeprobe-fast features --markdown``."""

from __future__ import annotations

from mergeprobe_fast.features import CROSSWALK, NOT_OFFERED, Crossing
from mergeprobe_fast.features.listing import ADAPTERS, AGGREGATES, FEATURES, Statistic

_HEAD = """\
# Every statistic

Written by `mergeprobe-fast features --markdown > docs/features.md` from the declarations; do not
edit it. In Python: `mpf.FEATURES[name]`, `mpf.CROSSWALK[source][name]`. On the command line:
`mergeprobe-fast features [NAME] [--zoo ZOO] [--json]`.

W_a = s B A is the update of a module by adapter a, sigma its singular values, |.| the Frobenius
norm, <., .> the inner product; of several modules, W_a is their block diagonal, an absent one being
zero. Statistics of updates are unchanged by A -> MA, B -> BM^-1. A zero or missing update gives
NaN, never 0 or 1.

"unrelated" is what a statistic is for updates that point in independent random directions:
compare with it before mixing modules of different sizes, or ranks. "cost" is multiply-adds of a
pair and module of rank r (d_out x d_in; T samples of a calibration); what shares it is computed
once. Those of entries are of a sample of four million entries of each adapter: more, fewer or all
of them with `entry_features(N)` or `entry_features("exact")` of `mergeprobe_fast.features.entries`
in the list of features, or `screen --entries N|exact`.

Statistics with an asterisk are not among the features "default", only among "all". Those with +
have, beside the column of the whole update, ones over the modules that both adapters have, with the
suffixes """
_HEAD += (
    ", ".join(f"`.{how}`" for how in AGGREGATES)
    + " (the mean weighted by |W_a| |W_b|);\nof adapters `.mean` and `.max`, unweighted.\n"
)

YOURS = '''\
## Your own

A statistic on the tiles is a `Feature`: what it needs of the pass, and how it finishes.
`s.need[DOT]` is <W_a, W_b> of a module or of the whole update, as arrays over pairs, and
`s.energy_a`, `s.rank_a`, ... are what one adapter has (`mergeprobe_fast.engine.declare.Sums` says
what there is). It joins the pass of the others and gets the same aggregates over modules. With
`device="cuda"` it runs there if it only does what numpy does with each pair by itself, else on the
CPU, with the same result:

```python
import numpy as np
import mergeprobe_fast as mpf
from mergeprobe_fast.features.declare import DOT, Feature, ratio

shrinkage = Feature(
    "shrinkage", "Shrinkage", "|(W_a + W_b) / 2| over the mean of the two norms.",
    finish=lambda s: ratio(np.sqrt(np.maximum(s.energy_a + s.energy_b + 2 * s.need[DOT], 0)),
                           np.sqrt(s.energy_a) + np.sqrt(s.energy_b)),
    needs=(DOT,), low=0.0, high=1.0,
)
pairs = mpf.pair_features("examples/zoo", ["cosine", shrinkage])
```

What needs something else is a column of a `Family`: a function that goes over the zoo once, and
columns that read what it returns. `sweep` gives the canonical factors of a few modules at a time:
W = U diag(sigma) V^T of each entry.

```python
import numpy as np
import mergeprobe_fast as mpf
from mergeprobe_fast.engine.sweep import sweep
from mergeprobe_fast.features.declare import Family, PairColumn

def largest_column(zoo, recorded, threads):
    found = np.full((len(zoo), len(zoo.modules)), np.nan)
    places = {m.name: k for k, m in enumerate(zoo.modules)}
    for chunk in sweep(zoo, threads):
        for k, module in enumerate(chunk.modules):
            for i in chunk.entries([k]):
                if chunk.rank[i]:
                    right = chunk.vectors("v", i) * chunk.sigma[i, : chunk.rank[i]]
                    found[chunk.adapter[i], places[module.name]] = np.square(right).sum(1).argmax()
    return found

same_peak = PairColumn(
    "same_peak", "Same largest input", "Share of modules whose largest input channel is the same.",
    finish=lambda found, a, b: np.mean(found[a] == found[b], axis=1), low=0.0, high=1.0,
)
peaks = Family("peaks", missing=lambda recorded: None, compute=largest_column, pairs=(same_peak,))
pairs = mpf.pair_features("examples/zoo", ["default", peaks])
```
'''


def feature_page() -> str:
    """The whole page, in Markdown."""
    parts = [_HEAD]
    for of, title in (("pair", "Of pairs"), ("adapter", "Of adapters")):
        here = [s for s in FEATURES.values() if s.of == of]
        parts.append(f"## {title}\n")
        for group in dict.fromkeys(s.group for s in here):
            parts.append(_group(group, [s for s in here if s.group == group]))
    parts.append(YOURS)
    parts.append(
        "## Other tools' names\n\n"
        "`features=\"2601.22285\"` and `features=\"gradience\"` compute what is offered of these "
        "pair metrics, under these names; they stand in a list with others: "
        '`["default", "2601.22285"]`.\n'
    )
    for source, crossings in CROSSWALK.items():
        parts.append(_crosswalk(source, list(crossings.values())))
    parts.append("## Not offered\n")
    parts.append(_table(["what", "why"], [[k, v[0].upper() + v[1:]] for k, v in
                                          NOT_OFFERED.items()]))  # fmt: skip
    return "\n".join(part.rstrip("\n") + "\n" for part in parts if part)


def _group(title: str, statistics: list[Statistic]) -> str:
    text = [f"### {title}\n"]
    about = []
    needs = list(dict.fromkeys(s.needs for s in statistics))
    if needs != [ADAPTERS]:
        about.append("Needs " + (f"{needs[0]}." if len(needs) == 1 else "what the rows say."))
    if about:
        text.append(" ".join(about) + "\n")
    rows = []
    for s in statistics:
        mark = ("" if s.default else "\\*") + ("+" if s.per_module else "")
        text_of = s.definition + (f" Needs {s.needs}." if len(needs) > 1 else "")
        rows.append([f"`{s.name}`{mark}", text_of, s.range, s.null, s.cost, s.source])
    text.append(_table(["name", "definition", "range", "unrelated", "cost", "source"], rows))
    return "\n".join(text)


def _crosswalk(source: str, crossings: list[Crossing]) -> str:
    rows = []
    for c in crossings:
        ours = ", ".join(f"`{name}`" for name in c.ours) or ("" if c.offered else "not offered")
        rows.append([f"`{c.name}`", c.of, ours, c.remark])
    return f"### {source}\n\n" + _table(["theirs", "of", "ours", "remark"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)]) + "\n"
