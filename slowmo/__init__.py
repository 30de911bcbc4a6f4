"""SlowMo: slow momentum for communication-efficient distributed SGD (Wang, Tantia, Ballas, Rabbat, ICLR 2020)."""

from slowmo.base import DPSGD, OSGP, SGP, AllReduce, LocalSGD
from slowmo.cluster import Cluster
from slowmo.outer import Average, NesterovOuter, SlowMo
from slowmo.replicas import Replicas
from slowmo.topology import Complete, Exponential, Mixing, Ring, mixing_matrix

__all__ = [
    "SGP", "OSGP", "DPSGD", "AllReduce", "LocalSGD", "Cluster", "Average", "NesterovOuter", "SlowMo", "Replicas",
    "Complete", "Exponential", "Mixing", "Ring", "mixing_matrix",
]  # fmt: skip
