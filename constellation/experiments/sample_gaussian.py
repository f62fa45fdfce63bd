"""How many effective samples a gradient is worth, with the Gauss-Newton mass matrix and with the identity.

    python -m constellation.experiments.sample_gaussian

The target is a correlated Gaussian, p ~ exp(-1/2 |r(theta)|^2) with r = A (theta - mean); Pyro's NUTS draws from it. A
gradient is one evaluation of the potential's derivative, warm-up included; the effective number is Pyro's, the smallest
over the entries.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from constellation.errors import ConfigError
from constellation.optim.flat import curvature, descend, inverse_mass, log_prob

SIZE, SAMPLES, WARMUP, CONDITION = 10, 400, 100, 1e3


Residuals = Callable[[Tensor], Tensor]


def target(seed: int = 0, size: int = SIZE, condition: float = CONDITION) -> tuple[Residuals, Tensor, Tensor]:
    """(residuals, mean (P,), covariance (P, P)) of a Gaussian whose covariance has this condition number."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    mean = torch.randn(size, generator=generator, dtype=torch.float64)
    widths = torch.logspace(0, torch.log10(torch.tensor(condition)).item() / 2, size, dtype=torch.float64)
    root = turn / widths  # precision = root root^T
    return lambda theta: root.mT @ (theta - mean), mean, (turn * widths.square()) @ turn.mT


def sample(
    log_density: Callable[[Tensor], Tensor], start: Tensor, mass: Tensor | None, *, samples: int, warmup: int, seed: int
) -> tuple[Tensor, int]:
    """(draws (S, P), gradients taken) of NUTS with this inverse mass matrix; None is the identity, neither is adapted.

    ConfigError without Pyro.
    """
    try:
        import pyro
        from pyro.infer import MCMC, NUTS
        from pyro.infer.mcmc.adaptation import BlockMassMatrix
    except ImportError:
        raise ConfigError("sampling needs Pyro: pip install 'constellation[sample]'") from None
    taken = 0

    def potential(site: dict[str, Tensor]) -> Tensor:
        nonlocal taken
        taken += 1
        return -log_density(site["theta"])

    class GivenMass(BlockMassMatrix):  # type: ignore[misc,unused-ignore]
        """Pyro begins at the identity; this one at `mass`."""

        def configure(self, mass_matrix_shape: Any, *arguments: Any, **options: Any) -> None:
            super().configure(mass_matrix_shape, *arguments, **options)
            self.inverse_mass_matrix = {("theta",): mass}

    pyro.set_rng_seed(seed)
    kernel = NUTS(potential_fn=potential, adapt_mass_matrix=False, full_mass=mass is not None)
    if mass is not None:
        kernel.mass_matrix_adapter = GivenMass()
    start = start.clone()
    chain = MCMC(kernel, samples, warmup_steps=warmup, initial_params={"theta": start}, disable_progbar=True)
    chain.run()
    return chain.get_samples()["theta"], taken


def effective(draws: Tensor) -> float:
    """The smallest effective number over the entries of draws (S, P)."""
    from pyro.ops.stats import effective_sample_size

    return float(effective_sample_size(draws[None], chain_dim=0, sample_dim=1).min())


def compare(seed: int = 0, samples: int = SAMPLES, warmup: int = WARMUP) -> dict[str, Any]:
    """Effective samples a gradient of both mass matrices, and how far their moments are from the true ones."""
    residuals, mean, covariance = target(seed)

    def loss(theta: Tensor) -> Tensor:
        return residuals(theta).square().sum() / 2

    found = descend(loss, torch.zeros_like(mean), tier="advanced", residuals=residuals)
    mass = inverse_mass(curvature(loss, found.theta, residuals), damping=1e-12)
    rows = {}
    for name, own in (("identity", None), ("gauss_newton", mass)):
        draws, taken = sample(log_prob(loss), found.theta, own, samples=samples, warmup=warmup, seed=seed)
        count = effective(draws)
        off = (draws.mean(0) - mean) / (covariance.diagonal() / count).sqrt()
        rows[name] = {
            "gradients": taken, "effective": round(count, 1), "effective_per_gradient": round(count / taken, 5),
            "mean_off_in_standard_errors": round(float(off.abs().max()), 2),
            "variance_ratio": [round(float(v), 3) for v in (draws.var(0) / covariance.diagonal()).aminmax()],
        }  # fmt: skip
    return rows


if __name__ == "__main__":
    print(json.dumps(compare(), indent=1))
