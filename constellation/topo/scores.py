"""How good clusters are against labels that they have not seen: accuracy by assignment, purity, NMI, AMI, ARI.

Clusters and labels are (M,) whole numbers. Every score is 1 for clusters that are the classes, whatever their names;
AMI and ARI are about 0 for clusters by chance, accuracy and purity are not: compare with a control of as many clusters.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from constellation.errors import ConfigError


def contingency(cluster_M: NDArray[np.int64], label_M: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts (clusters, classes)."""
    table = np.zeros((int(cluster_M.max()) + 1, int(label_M.max()) + 1), np.int64)
    np.add.at(table, (cluster_M, label_M), 1)
    return table


def accuracy(cluster_M: NDArray[np.int64], label_M: NDArray[np.int64]) -> float:
    """The share that the best one-to-one naming of clusters by classes gets right (Kuhn 1955), [0, 1].

    >>> accuracy(np.array([1, 1, 0, 0]), np.array([0, 0, 1, 1]))
    1.0
    >>> accuracy(np.array([0, 0, 0, 0]), np.array([0, 0, 1, 1]))
    0.5
    """
    from scipy.optimize import linear_sum_assignment

    table = contingency(cluster_M, label_M)
    rows, columns = linear_sum_assignment(-table)
    return float(table[rows, columns].sum() / len(label_M))


def purity(cluster_M: NDArray[np.int64], label_M: NDArray[np.int64]) -> float:
    """The share of every cluster's commonest class, [1 / classes, 1]; 1 also when every image is a cluster."""
    return float(contingency(cluster_M, label_M).max(1).sum() / len(label_M))


def scores(cluster_M: NDArray[np.int64], label_M: NDArray[np.int64]) -> dict[str, float]:
    """All five by name."""
    try:
        from sklearn import metrics
    except ImportError:
        raise ConfigError("scores against labels need scikit-learn: pip install 'constellation[topo]'") from None
    return {
        "accuracy": accuracy(cluster_M, label_M),
        "purity": purity(cluster_M, label_M),
        "nmi": float(metrics.normalized_mutual_info_score(label_M, cluster_M)),
        "ami": float(metrics.adjusted_mutual_info_score(label_M, cluster_M)),
        "ari": float(metrics.adjusted_rand_score(label_M, cluster_M)),
    }
