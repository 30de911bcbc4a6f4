"""From a config's nodes to objects: the task, its schedule and length, the optimizer, the algorithm, the device and its arithmetic."""

import copy
import os

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments.runner.config import whole_steps
from slowmo.cluster import Cluster
from slowmo.replicas import Replicas

OURS = ("decay_norms",)  # keys of an optimizer's config that its class does not know


def build(node: DictConfig, *args, **kwargs):
    """Instantiate `node`, partial or not, with these arguments. What is wrong with them comes out as ValueError or OSError."""
    if any(key in node for key in OURS):
        node = OmegaConf.masked_copy(node, [key for key in node if key not in OURS])
    try:
        built = instantiate(node)
        return built(*args, **kwargs) if node.get("_partial_") else built
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, (ValueError, OSError)):
            raise cause from None
        said = _first(cause or error)
        where = "; name the folder of your modules in PYTHONPATH" if "ModuleNotFoundError" in said else ""
        raise ValueError(f"{node._target_}: {said}{where}") from None
    except torch.cuda.OutOfMemoryError:
        raise
    # a partial's, called here
    except (TypeError, AttributeError, IndexError, KeyError, AssertionError, OverflowError, MemoryError, RuntimeError) as error:
        raise ValueError(f"{node.get('_target_')}: {_first(error)}") from None


def _first(error: BaseException) -> str:
    return " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2]) or type(error).__name__


def optimizer_groups(model: torch.nn.Module, cfg: DictConfig) -> list[dict]:
    """The parameter groups of `model` that an optimizer's config asks for; takes `decay_norms` out of `cfg`, which its class does not know.

    decay_norms true: one group with everything. false: the weights of normalisation layers, and all biases, are a group of
    their own without weight decay. Shared parameters come once, frozen ones not at all.
    """
    everywhere = cfg.pop("decay_norms", True)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if everywhere or not cfg.get("weight_decay"):
        return [{"params": list(parameters.values())}]
    norms = {id(p) for module in model.modules() if isinstance(module, NORMS) for p in module.parameters(recurse=False)}
    free = {name for name, p in parameters.items() if id(p) in norms or name.rpartition(".")[2] == "bias"}
    groups = [{"params": [p for name, p in parameters.items() if name not in free]},
              {"params": [p for name, p in parameters.items() if name in free], "weight_decay": 0.0}]  # fmt: skip
    return [group for group in groups if group["params"]]


def algorithm(cfg: DictConfig, model: torch.nn.Module, cluster: Cluster, accumulate: int = 1, loss_scale: float = 1.0):
    """(replicas of `model`, the algorithm that trains them: base and, if any, outer). ValueError for what does not fit."""
    node = copy.deepcopy(cfg.optimizer)
    OmegaConf.set_struct(node, False)
    optimizer = build(node, optimizer_groups(model, node))
    cap = cfg.cluster.bucket_cap_mb
    outer = cfg.outer.copy()
    OmegaConf.set_struct(outer, False)
    replicas = Replicas(model, cluster, optimizer.param_groups, bucket_cap_mb=cap, accumulate=accumulate, loss_scale=loss_scale,
                        num_fragments=outer.pop("num_fragments", 1))  # fmt: skip
    base = build(cfg.base, replicas, optimizer, overlap=overlaps(cfg, cluster.world_size))
    return replicas, build(outer, base) if outer.get("_target_") else base


def overlaps(cfg: DictConfig, processes: int) -> bool:
    """Whether buckets advance during backward: where something is sent, and the config does not forbid it."""
    return cfg.cluster.overlap and processes > 1


NORMS = (torch.nn.modules.batchnorm._NormBase, torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.RMSNorm)


def steps(cfg: DictConfig, task) -> int:
    """Inner steps of the run."""
    return whole_steps(cfg) or max(1, round(cfg.epochs * task.steps_per_epoch))


def device(name: str, graph: bool | int = False) -> str:
    """`auto` is this process's GPU when there is one. graph: whether it must be one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if graph and name == "cpu":
            raise ValueError("cluster.graph captures a GPU's kernels, but torch sees no GPU: set cluster.graph=false")
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("cluster.device=cuda, but torch sees no GPU: install a CUDA build of torch or set cluster.device=cpu")
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if here > 1 == gpus and _own_gpu(here):
            return "cuda:0"
        if here > gpus:
            raise ValueError(f"{here} processes for {gpus} GPUs on this machine: start at most {gpus} here, or set cluster.device=cpu")
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
    if name != "cpu":
        raise ValueError(f"cluster.device={name}: choose auto, cpu or cuda")
    return name


def _own_gpu(processes: int) -> bool:
    """Whether the one GPU that this process sees is its own, as with srun --gpus-per-task: hidden from the others by the launcher."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if "SLURM_GPUS_ON_NODE" in os.environ:
        return int(os.environ["SLURM_GPUS_ON_NODE"]) >= processes
    return bool(visible) and "," not in visible


def arithmetic(cluster: DictConfig) -> None:
    """Set how torch computes: `cluster.threads`, `cluster.tf32`, `cluster.deterministic`. Before the first use of a GPU."""
    if cluster.threads:
        torch.set_num_threads(cluster.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cluster.tf32
    torch.backends.cudnn.benchmark = not cluster.deterministic
    if cluster.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(cluster.deterministic)


def arithmetic_now() -> dict:
    """How torch computes, for result.json."""
    return {"tf32": torch.backends.cuda.matmul.allow_tf32, "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "deterministic": torch.are_deterministic_algorithms_enabled()}  # fmt: skip
