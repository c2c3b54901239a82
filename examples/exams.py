"""The example zoo's own held-out items, as items of MERGE-PEFT: what its code measures.

What counts as right: math and instruct, the very text; code, what the written line returns;
science, the term found likelier than three others of its kind; safety, refusing found likelier than
agreeing, or the other way round.
"""

import random
from functools import cache

from calibrate_data import MEASURED_SEED, calibration_items
from tasks import AGREEMENT, CODE_TASKS, END_OF_TURN, REFUSAL, Item, draw_items, is_held_out

from mergeprobe_fast.merge_peft.tasks import item as merge_peft
from mergeprobe_fast.merge_peft.tasks.code_pool import INPUTS
from mergeprobe_fast.merge_peft.tasks.splits import rows

OPTIONS = 4
MOST_CALIBRATION = 48  # texts of a domain that are kept out of exams


def exam(domain: str, count: int) -> list[merge_peft.Item]:
    """``count`` items of a domain: the first 64 are those that train_zoo.py measures losses on.

    No adapter of the zoo was trained on their questions, and the first 48 texts of a domain that
    calibrate_data.py writes are not among them. ValueError where there are fewer.
    """
    texts = {item.prompt for item in calibration_items(domain, MOST_CALIBRATION)}
    drawn = draw_items(domain, count, MEASURED_SEED, held_out=True)
    if any(item.prompt in texts for item in drawn):
        drawn = draw_items(domain, count + len(texts), MEASURED_SEED, held_out=True)
    return [_asked(domain, item) for item in drawn if item.prompt not in texts][:count]


def _asked(domain: str, item: Item) -> merge_peft.Item:
    kind, options, check = "exact", (), {}
    if domain == "code":
        kind, check = "code", {"tests": _tests(dict(CODE_TASKS)[item.key])}
    elif domain == "science":
        kind, options = "choice", _terms(item.key)
    elif domain == "safety":
        refuse = item.target == REFUSAL + END_OF_TURN
        kind, check = "refusal", {"refuse": refuse}
        options = tuple(text + END_OF_TURN for text in (REFUSAL, AGREEMENT))
    return merge_peft.Item(
        domain=domain, task=f"{domain}.example", key=item.key, prompt=item.prompt,
        target=item.target, kind=kind, options=options, check=check,
    )  # fmt: skip


@cache
def _tests(body: str) -> tuple[tuple[str, str], ...]:
    """Arguments and result of an expression, a constant of tasks.py, on every fitting list."""
    function = eval(f"lambda xs: {body}")
    tests = []
    for source in INPUTS["list"]:
        try:
            tests.append((f"({source},)", repr(function(eval(source)))))
        except (LookupError, ValueError, ZeroDivisionError):  # an empty list has no largest element
            continue
    return tuple(tests)


def _terms(term: str) -> tuple[str, ...]:
    """A term and three others of its category, all held out."""
    known = rows("science_wordnet.tsv")
    category = next(c for t, _, c in known if t == term)
    others = [t for t, _, c in known if c == category and t != term and is_held_out(t)]
    rng = random.Random(term)
    terms = [term, *rng.sample(others, OPTIONS - 1)]
    rng.shuffle(terms)
    return tuple(t + END_OF_TURN for t in terms)
