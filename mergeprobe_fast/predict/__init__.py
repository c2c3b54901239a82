"""From columns of merges to retention with intervals: fitting, the model file, evaluation."""

from mergeprobe_fast.predict.banks import read_banks
from mergeprobe_fast.predict.evaluate import evaluate
from mergeprobe_fast.predict.fit import fit
from mergeprobe_fast.predict.labels import Adapter, Labels, read_labels
from mergeprobe_fast.predict.prediction import Explanation, Prediction
from mergeprobe_fast.predict.predictor import RetentionPredictor
from mergeprobe_fast.predict.recipe import Recipe

__all__ = [
    "Adapter",
    "Explanation",
    "Labels",
    "Prediction",
    "Recipe",
    "RetentionPredictor",
    "evaluate",
    "fit",
    "read_banks",
    "read_labels",
]
