"""Eigenbases of stacks of Kronecker factors: once from scratch, then followed.

A factor S (D, D) is symmetric, positive semi-definite and moves slowly. Its first basis comes from a
decomposition, later ones from one step of orthogonal iteration (Golub & Van Loan, section 8.2),

    Q <- qr(S Q),    columns sorted by their Rayleigh quotients q^T S q, the largest first,

which costs a product and a QR and has the eigenvectors as its fixed points. How far Q is from them is read
off T = Q^T S Q: off = ||T - diag T||_F / ||T||_F, 0 when Q diagonalises S (Eschenhagen et al. 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor


def eigenbasis(factors_NDD: Tensor) -> Tensor:
    """Orthonormal eigenvectors of each factor as columns, the largest eigenvalue first.

    float32 decompositions can fail on the rank-deficient factors of a first gradient: then float64 with the
    diagonal lifted by 1e-12 of its mean; if that fails too, one iteration from the identity.
    """
    size = factors_NDD.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    unit = torch.ldexp(factors_NDD, -torch.frexp(size).exponent)  # by a power of two: nothing is rounded
    for dtype, lift in ((unit.dtype, 0.0), (torch.float64, 1e-12)):
        matrix = unit.to(dtype, copy=True)
        matrix.diagonal(dim1=-2, dim2=-1).add_(lift)
        try:
            vectors = torch.linalg.eigh(matrix).eigenvectors
        except torch.linalg.LinAlgError:
            continue
        if bool(torch.isfinite(vectors).all()):
            return vectors.flip(-1).to(factors_NDD.dtype)
    return torch.linalg.qr(unit).Q


def followed(factors_NDD: Tensor, basis_NDD: Tensor, above: float = 0.0) -> tuple[Tensor, Tensor] | None:
    """The basis one iteration on, and for each new column the number of the old one it came from (N, D).

    None where off <= above in every factor of the stack: the old basis will do.
    """
    product = factors_NDD @ basis_NDD
    if above > 0 and float(off_diagonal(basis_NDD.mT @ product).max()) <= above:
        return None
    quotients_ND = (basis_NDD * product).sum(-2)
    order_ND = quotients_ND.argsort(dim=-1, descending=True)
    sorted_NDD = product.gather(-1, order_ND[:, None, :].expand_as(product))
    return torch.linalg.qr(sorted_NDD).Q, order_ND


def off_diagonal(matrices_NDD: Tensor) -> Tensor:
    """||T - diag T||_F / ||T||_F of each matrix (N,), in [0, 1]; 0 for a zero matrix."""
    whole = matrices_NDD.square().sum((-2, -1))
    inside = matrices_NDD.diagonal(dim1=-2, dim2=-1).square().sum(-1)
    return ((whole - inside).clamp(min=0) / whole.clamp(min=torch.finfo(whole.dtype).tiny)).sqrt()
