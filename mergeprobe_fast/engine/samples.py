"""What a calibration says about the modules of a zoo, on the domains of its adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mergeprobe_fast.errors import InputError
from mergeprobe_fast.io.calibration import Calibration
from mergeprobe_fast.recorded import Recorded
from mergeprobe_fast.zoo import Module, Zoo


class Scaled(NamedTuple):
    """``factor * values``: float32 values of at most 1, so that no product leaves float32."""

    values: np.ndarray
    factor: float  # a power of two: the scaling is exact


class Samples:
    """Samples by domain and module; nothing is kept.

    Attributes:
        domains: of the calibration, those that are wanted.
        counts: their numbers of samples T.
    """

    def __init__(self, zoo: Zoo, calibration: Calibration, domains: Sequence[str]) -> None:
        """InputError: the calibration lacks a module of the zoo or has it in another shape."""
        self.calibration, self.domains = calibration, list(domains)
        require(calibration, zoo.modules)
        self.counts = np.array([calibration.domains[d].samples for d in self.domains])
        for d, count in zip(self.domains, self.counts, strict=True):
            if count == 0:
                raise InputError("has no samples", path=calibration.path, key=d)

    @classmethod
    def of_adapters(
        cls, zoo: Zoo, recorded: Recorded, members: np.ndarray
    ) -> tuple[Samples, np.ndarray]:
        """Samples of the domains of some adapters, and each one's index into ``domains``.

        It is -1 for other adapters. InputError: nothing was calibrated.
        """
        calibration = recorded.calibration
        if calibration is None:
            raise InputError("these features need a calibration", key="calibration")
        named = {recorded.domains[i] for i in members}
        samples = cls(zoo, calibration, [d for d in calibration.domains if d in named])
        of = np.full(len(zoo), -1)
        of[members] = [samples.domains.index(recorded.domains[i]) for i in members]
        return samples, of

    def inputs(self, d: int, module: str) -> Scaled:
        """Inputs of a module, (T, d_in)."""
        return scaled(self.calibration.inputs(self.domains[d], module))

    def gradients(self, d: int, module: str) -> Scaled:
        """Output gradients, (T, d_out), of labels drawn from the model where there are such."""
        return scaled(self.calibration.gradients(self.domains[d], module))

    def moment_roots(self, d: int, module: str) -> tuple[Scaled, Scaled]:
        """Root mean squares of the output gradients (d_out,) and of the inputs (d_in,)."""
        domain, calibration = self.domains[d], self.calibration
        both = calibration.gradient_moment(domain, module), calibration.moment(domain, module)
        left, right = (scaled(np.sqrt(x)) for x in both)
        return left, right

    def base_energies(self, modules: Sequence[Module]) -> np.ndarray:
        """Mean squared norm of the base module's output, (domains, modules)."""
        return np.array(
            [[self.calibration.output_moment(d, m.name).sum() for m in modules]
             for d in self.domains]
        ).reshape(len(self.domains), len(modules))  # fmt: skip

    def groups(self, modules: Sequence[Module]) -> list[list[int]]:
        """Positions of the modules that are fed the same tensor, together."""
        by_key: dict[str, list[int]] = {}
        for k, m in enumerate(modules):
            by_key.setdefault(self.calibration.input_key(m.name), []).append(k)
        return list(by_key.values())


def scaled(values: np.ndarray) -> Scaled:
    """Values over the power of two above the largest of them."""
    exponent = int(np.frexp(np.abs(values).max(initial=0.0))[1])
    return Scaled(np.ldexp(values, -exponent).astype(np.float32), 2.0**exponent)


def require(calibration: Calibration, modules: Sequence[Module]) -> None:
    """Refuse modules that the calibration lacks or has in another shape, before any work."""
    for m in modules:
        recorded = calibration.modules.get(m.name)
        if recorded is None:
            raise InputError("the calibration did not record this module", path=calibration.path,
                             key=m.name)  # fmt: skip
        if (recorded.d_out, recorded.d_in) != (m.d_out, m.d_in):
            reason = (
                f"is {recorded.d_out} x {recorded.d_in} in the calibration, and "
                f"{m.d_out} x {m.d_in} in the adapters"
            )
            raise InputError(reason, path=calibration.path, key=m.name)
