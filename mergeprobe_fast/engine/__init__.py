"""Passes over a zoo: features declare what they need, the engine fuses it into few passes."""

from mergeprobe_fast.engine.passes import PassResult, run

__all__ = ["PassResult", "run"]
