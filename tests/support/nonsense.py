"""Command lines that no run can have: what a tired user, a broken script or an attacker types."""

import random

START = (
    ("task=quadratic", "steps=4", "workers=4"), ("experiment=cifar10_small_slowmo_sgp",), ("experiment=imagenet_small_sgp",),
    ("experiment=cifar10_osgp",),
)  # fmt: skip
COUNTS = ("workers", "steps", "checkpoint_every", "evaluate.every", "outer.tau")
NUMBERS = ("optimizer.lr", "optimizer.momentum", "optimizer.weight_decay", "outer.alpha", "outer.beta", "cluster.timeout")
SWITCHES = ("dry_run", "cluster.tf32", "cluster.deterministic", "optimizer.nesterov", "optimizer.fused")
WORDS = ("dtype", "evaluate.batchnorm", "cluster.device")
GROUPS = ("base", "outer", "optimizer", "schedule", "cluster", "launch", "data", "task", "experiment")
STRANGE = ("ſgp", "スローモー", "½", "\u202esgp", "é" * 40, "💥", "a" * 300, "../../etc/passwd", "/dev/null", "-1", "True", "NaN")
SYNTAX = (
    "=", "==", "=3", "outer.beta", "outer.beta=[", "outer.beta={", "outer.beta=[0.1", "outer.beta='0.1", "outer.beta=)", "a b=c",
    "seed=1 2", "outer..beta=0.1", ".=1", "+=1", "~", "++", "a=b=c,d", "workers=1,2,3", "seed=range(3)", "seed=choice(1,2)",
    "seed=glob(*)", "outer=", "{}", "[]", "null", "workers=4,", "base/=sgp", "/base=sgp", "base@outer=sgp", "%s%s%n", "`id`",
    "$(id)", "\t", "\n", "\x07=1", "!",
)  # fmt: skip
CLASHES = (
    "base=local_sgd base/graph=ring", "base=allreduce base.gossip_buffers=true", "outer=none outer.beta=0.4",
    "outer=average outer.alpha=1.0", "optimizer=adam optimizer.momentum=0.9", "optimizer=adamw optimizer.nesterov=true",
    "steps=4 epochs=2", "steps=null epochs=null", "base=dpsgd base/graph=exponential", "task=imagenet data=photos",
    "task=cifar10 data=wmt16", "task=imagenet data=libreoffice", "launch=inprocess launch.processes=2", "launch=local launch.nodes=2",
    "launch=local launch.name=slurm", "data=photos data.classes=3", "base=local_sgd outer=none",
    "base=local_sgd outer=slowmo outer.exact=false", "base=sgp base/graph=mixing", "schedule=constant schedule.warmup=3",
    "experiment=cifar10_small_sgp experiment=cifar10_small_osgp,cifar10_sgp", "base=sgp base=", "~outer", "~workers", "~optimizer.lr",
    "~base", "~cluster.device", "launch=local launch.processes=3 workers=4", "launch=slurm launch.nodes=3 workers=4",
    "optimizer=sgd optimizer.betas=[0.9,0.99]", "optimizer._target_=os.system", "optimizer._target_=torch.optim.Nope",
    "outer._target_=3", "base._target_=null", "optimizer.nesterov=true optimizer.momentum=0",
    "schedule=step schedule.milestones=[9,1]", "schedule=inverse_sqrt schedule.warmup=0", "base=sgp base.comm_dtype=float8",
)  # fmt: skip


def nonsense(count: int, seed: int) -> list[list[str]]:
    """`count` command lines, each with something in it that must be refused; the same for the same seed."""
    rng = random.Random(seed)
    kinds = (_type, _type, _type, _number, _number, _empty, _unicode, _unknown, _syntax, _clash, _clash, _group, _reference)
    return [[*start, *rng.choice(kinds)(rng)] for start in (_start(rng) for _ in range(count))]


def _start(rng) -> tuple[str, ...]:
    return rng.choice(START)


def _type(rng) -> list[str]:
    key = rng.choice(COUNTS + NUMBERS + SWITCHES + WORDS)
    wrong = ["[]", "[1,2]", "{a:1}", "{}", "[[nan]]", "a word"]
    if key not in WORDS:
        wrong += ["maybe", "0x1G", "1_", "one", "'1'"]
    if key in SWITCHES:
        wrong += ["2", "0.0", "null"]
    if key in COUNTS:
        wrong += ["0.5", "true", "1e400"] + ["null"] * (key != "steps")
    if key in NUMBERS:
        wrong += ["true", "null"]
    if key in WORDS:
        wrong += ["3", "null", "true", "float16x"]
    return [f"{key}={rng.choice(wrong)}"]


def _number(rng) -> list[str]:
    if rng.random() < 0.5:
        return [f"{rng.choice(COUNTS)}={rng.choice(('0', '-1', '-999999999999', 'nan', 'inf', '-inf'))}"]
    return [f"{rng.choice(NUMBERS)}={rng.choice(('nan', 'inf', '-inf', '-1.0', '-1e-300'))}"]


def _empty(rng) -> list[str]:
    return [f"{rng.choice(COUNTS + NUMBERS + SWITCHES + WORDS + ('seed', 'runs'))}="]


def _unicode(rng) -> list[str]:
    strange = rng.choice(STRANGE[:6])
    return [rng.choice((f"{rng.choice(GROUPS)}={strange}", f"{strange}=1", f"{rng.choice(NUMBERS)}={strange}", f"+{strange}.beta=1",
                        f"{rng.choice(WORDS)}={strange}"))]  # fmt: skip


def _unknown(rng) -> list[str]:
    key = rng.choice(COUNTS + NUMBERS + SWITCHES)
    at = rng.randrange(len(key))
    changed = key[:at] + rng.choice("qzx") + key[at + 1 :]
    return [f"{rng.choice(('', '+', '++'))}{changed}=1"]


def _syntax(rng) -> list[str]:
    return [rng.choice(SYNTAX)]


def _clash(rng) -> list[str]:
    return rng.choice(CLASHES).split()


def _group(rng) -> list[str]:
    group = rng.choice(GROUPS)
    return [f"{group}={rng.choice(('[a,b]', '{a:1}', '3', 'nope', 'null' if group != 'experiment' else 'nope', *STRANGE[6:]))}"]


def _reference(rng) -> list[str]:
    key = rng.choice(COUNTS + NUMBERS)
    return [f"{key}={rng.choice(('${nope}', f'${{{key}}}', '${oc.env:SURELY_NOT_SET}', '${', '${now:}', '${dtype}', '${a.b.c}', '???'))}"]
