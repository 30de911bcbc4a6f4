"""Quadratics: worker i minimises f_i(x) = 1/2 (x - b_i)' A_i (x - b_i), with optional gradient noise. For exact checks and theory."""

import hashlib
import math
import zipfile

import numpy as np
import torch

from experiments.tasks import Task


class Quadratic(Task):
    """problem: an `.npz` with `A` [m, d, d], `b` [m, d], `x0` [d]; None draws one from the seed, with eigenvalues in [0.5, 1.5].

    noise: standard deviation of the Gaussian noise on each gradient coordinate; it depends on (seed, step, worker) alone. An epoch is one
    step. Raises ValueError for a file that lacks an array or has the wrong shapes, FileNotFoundError for a missing one.
    """

    steps_per_epoch = 1
    final = True  # iterates are small: a run writes them all to final.npz

    def __init__(self, workers: int, seed: int, dtype: str, device: str, dimension: int = 16, spread: float = 1.0,
                 noise: float = 0.0, problem: str | None = None):  # fmt: skip
        if dimension < 1 or noise < 0 or not math.isfinite(spread):
            given = f"task.dimension={dimension}, task.noise={noise}, task.spread={spread}"
            raise ValueError(f"{given}: dimension >= 1, noise >= 0 and a finite spread are needed")
        self.seed, self.noise, self.fingerprint = seed % 2**63, noise, None
        self.dtype, self.device = getattr(torch, dtype), torch.device(device)
        self.origin = problem or "drawn from the seed"
        if problem is None:
            rng = np.random.default_rng([self.seed, 0])
            factors = rng.standard_normal((workers, dimension, dimension))
            bases = np.linalg.qr(factors)[0]
            A = np.einsum("wij,wj,wkj->wik", bases, rng.uniform(0.5, 1.5, (workers, dimension)), bases)
            b, x0 = spread * rng.standard_normal((workers, dimension)), np.zeros(dimension)
        else:
            A, b, x0 = self._read(problem, workers)
        self.A, self.b, self.x0 = (torch.as_tensor(t).to(self.device, self.dtype) for t in (A, b, x0))

    def _read(self, path: str, workers: int):
        try:
            with open(path, "rb") as file:
                self.fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:8]
        except OSError as error:
            raise FileNotFoundError(f"task.problem={path}: {error.strerror}; give an .npz with A [m, d, d], b [m, d] and x0 [d]") from error
        try:
            with np.load(path, allow_pickle=False) as archive:
                A, b, x0 = archive["A"], archive["b"], archive["x0"]
        except (KeyError, OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"task.problem={path} is not an .npz with A [m, d, d], b [m, d] and x0 [d] as numbers") from error
        m, d = len(A) if A.ndim else 0, x0.shape[-1] if x0.ndim else 0
        if A.shape != (m, d, d) or b.shape != (m, d) or x0.shape != (d,):
            raise ValueError(f"{path}: A {A.shape}, b {b.shape}, x0 {x0.shape} are not [m, d, d], [m, d], [d]")
        if m != workers:
            raise ValueError(f"{path} holds {m} workers' functions, the run has {workers}: set workers={m}")
        if not all(t.dtype.kind in "fiu" and np.isfinite(t).all() for t in (A, b, x0)):
            raise ValueError(f"{path}: A, b and x0 must be finite real numbers")
        return A, b, x0

    def found(self) -> str:
        return self.origin

    def model(self) -> torch.nn.Module:
        model = torch.nn.Module()
        model.x = torch.nn.Parameter(self.x0.clone())
        return model

    def batches(self, step: int, workers, part: tuple[int, int]):
        for i in workers:
            if self.noise:
                noise = np.random.default_rng([self.seed, 1, step, i]).standard_normal(len(self.x0))
                yield self.A[i], self.b[i], self.noise * torch.as_tensor(noise).to(self.device, self.dtype)
            else:
                yield self.A[i], self.b[i], None

    def loss(self, model: torch.nn.Module, batch) -> torch.Tensor:
        A, b, noise = batch
        gap = model.x - b
        loss = gap @ A @ gap / 2
        return loss if noise is None else loss + noise @ model.x

    def evaluate(self, model: torch.nn.Module, part: tuple[int, int]) -> dict:
        """Sum of the workers' f_i without noise; each is one sample."""
        A, gap = self.A[part[0] :: part[1]], model.x - self.b[part[0] :: part[1]]
        return {"count": len(gap), "validation_loss": float(torch.einsum("wi,wij,wj->", gap, A, gap)) / 2}
