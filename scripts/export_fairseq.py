"""A run's averaged model as a checkpoint that fairseq's commands read.

    python scripts/export_fairseq.py runs/wmt16_slowmo_sgp/seed1 model.pt [--average 10]
    TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 fairseq-generate data-bin --path model.pt --beam 4 --lenpen 0.6 --remove-bpe \
        --required-batch-size-multiple 1    # fairseq 0.12.3.1 loses sentences when it rounds the last batch to 8

fairseq loads checkpoints by pickle, which recent versions of torch refuse without that variable: give it this file alone.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.runner import build, run_dir  # noqa: E402


def export(task, models: list[Path], path: Path) -> None:
    """Write the mean of `models` (files of a run's models/) to `path`."""
    # what fairseq 0.12 asks for: the old "args" form needs no configuration tree; "optimizer_history" and "extra_state" must be there
    args = argparse.Namespace(**vars(task.architecture), task="translation", source_lang="en", target_lang="de")
    state = {name: value.cpu() for name, value in task.averaged(models).state_dict().items()}
    aside = Path(f"{path}.partial")
    torch.save({"args": args, "model": state, "optimizer_history": [{"lr_scheduler_state": {}}], "extra_state": {}}, aside)
    os.replace(aside, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--average", type=int, default=1, help="how many of the last averaged models")
    options = parser.parse_args()
    models = run_dir.saved_models(options.run)[-options.average :]
    if not (options.run / "config.yaml").exists() or len(models) < max(1, options.average):
        sys.exit(f"{options.run} holds {len(models)} averaged models: name a run's folder, and no more models than its evaluate.keep")
    cfg = OmegaConf.load(options.run / "config.yaml")
    if "bleu" not in cfg.task:
        sys.exit(f"{options.run} is no run of task=wmt16: fairseq reads translation models alone")
    cfg.cluster.device = cfg.task.device = "cpu"
    try:
        export(build.build(cfg.task), models, options.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {options.out}: {', '.join(model.stem for model in models)}")


if __name__ == "__main__":
    main()
