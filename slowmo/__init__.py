"""SlowMo: slow momentum for communication-efficient distributed SGD (Wang, Tantia, Ballas, Rabbat, ICLR 2020).

`slowmo.SlowMo(model, optimizer, ...)` wraps a training loop's optimizer. Underneath are the objects that the experiments use one by one:
Cluster, Replicas, a base algorithm (slowmo.base) and an outer one (slowmo.outer).
"""

from slowmo.base import DPSGD, OSGP, SGP, AllReduce, LocalSGD
from slowmo.cluster import Cluster
from slowmo.optimizer import SlowMo
from slowmo.outer import Average, NesterovOuter
from slowmo.replicas import Replicas
from slowmo.topology import Complete, Exponential, Mixing, Ring, mixing_matrix

__all__ = [
    "SGP", "OSGP", "DPSGD", "AllReduce", "LocalSGD", "Cluster", "Average", "NesterovOuter", "SlowMo", "Replicas",
    "Complete", "Exponential", "Mixing", "Ring", "mixing_matrix",
]  # fmt: skip
