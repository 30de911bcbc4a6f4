"""WMT16 En-De, or other English-German texts in fairseq's data-bin format. Data, batches, network, criterion, beam search: fairseq's."""

import argparse
import contextlib
import copy
import functools
import importlib.util
import json
import logging
import math
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from hydra.core.config_store import ConfigStore

from experiments.data import libreoffice
from experiments.runner.run_dir import load_model
from experiments.tasks.amp import HalfPrecision

logging.getLogger("fairseq").setLevel(logging.WARNING)
# fairseq gives torch's attention a mask of truth values and one of numbers
warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")


@contextlib.contextmanager
def _undisturbed():
    """Importing fairseq writes its own groups into Hydra's store, which later configs would meet, and turns on debug logging."""
    store, root = ConfigStore.instance(), logging.getLogger()
    repo, level, handlers = copy.deepcopy(store.repo), root.level, root.handlers[:]
    logging.disable(logging.INFO)  # "please install tensorboardX"
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)
        store.repo, root.handlers[:] = repo, handlers
        root.setLevel(level)


if importlib.util.find_spec("fairseq") is None:
    raise FileNotFoundError('translation needs fairseq: pip install -c constraints.txt -e ".[wmt16]"')
with _undisturbed():
    from fairseq import utils
    from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
    from fairseq.data import Dictionary
    from fairseq.models import ARCH_CONFIG_REGISTRY
    from fairseq.models.transformer import TransformerModel
    from fairseq.tasks.translation import TranslationConfig, TranslationTask

# entries of the joint dictionary, and tokens of a pass over the training set, padding included. WMT16: fairseq's scaling_nmt recipe
# (--nwordssrc 32768), and the paper's 25 epochs in about 17,000 steps of 64 x 3584 tokens; LibreOffice: 7.4's packages
SIZES = {"wmt16": (32_768, 680 * 64 * 3584), "libreoffice": (2_152, 984 * 256)}
REMEDY = ("make it from Google's archive with scripts/prepare_wmt16.sh (its head says where that is) and give its data-bin with "
          "data.root=FOLDER")  # fmt: skip


class WMT16(HalfPrecision):
    """data: `name` wmt16 or libreoffice, `root` (for wmt16 the data-bin folder).

    max_tokens: of a piece, padding included, on the longer side: what one GPU takes at a time. pieces: of a worker's batch, shared out
    over the processes of its node. arch: fairseq's name; layers, dim, ffn, heads: of encoder and decoder, null as `arch` has them; all
    embeddings are shared. autocast, loss_scale: as in imagenet.py. bleu: `subsets` to translate after the last step, `beam`, `lenpen`, and
    how many of the last averaged models to `average`.

    fairseq makes the batches once, and may leave out a few sentences where it rounds to multiples of eight (2 of wmt16_small's 13,826). A
    worker's share of them and its order depend on (seed, epoch, worker) alone; what does not fill a step of all workers is left out of
    that epoch. Batches differ in tokens: a worker's loss is the sum over the target tokens of all its
    pieces over their number, so within a worker every token counts the same, on however many processes, and every worker counts the same.

    The gradient is that of the label-smoothed loss; the loss that is reported is the negative log likelihood a token in base 2, as in
    fairseq's logs and, it seems, the paper: train_loss, validation_loss and nll_base2. `nll` is the same in nats.
    Raises ValueError for numbers that do not fit, FileNotFoundError for missing data.
    """

    same_shapes = False

    def __init__(self, workers: int, seed: int, dtype: str, device: str, data, max_tokens: int, pieces: int, arch: str, layers: int | None,
                 dim: int | None, ffn: int | None, heads: int | None, dropout: float, label_smoothing: float, autocast: str | None,
                 loss_scale: float, bleu):  # fmt: skip
        if data.name not in ("wmt16", "libreoffice"):
            raise ValueError(f"task=wmt16 does not read data={data.name}: choose data=wmt16 or data=libreoffice")
        if arch not in ARCH_CONFIG_REGISTRY or not arch.startswith("transformer"):
            raise ValueError(f"task.arch={arch}: fairseq has no such transformer; transformer_wmt_en_de_big is the paper's")
        if max_tokens < 1 or pieces < 1 or not 0 <= dropout < 1 or not 0 <= label_smoothing < 1:
            raise ValueError(f"task: max_tokens={max_tokens} and pieces={pieces} are at least 1, dropout={dropout} and "
                             f"label_smoothing={label_smoothing} in [0, 1)")  # fmt: skip
        self.compute_in(autocast, loss_scale)
        if not set(bleu.subsets) <= {"valid", "test"} or bleu.beam < 1 or bleu.average < 1:
            raise ValueError(f"task.bleu: subsets={list(bleu.subsets)} of valid and test, beam={bleu.beam} and average={bleu.average} >= 1")
        if dim and heads and dim % heads:
            raise ValueError(f"task.dim={dim} over task.heads={heads}: choose a multiple of {heads}")
        self.workers, self.seed, self.dtype, self.device = workers, seed % 2**31, getattr(torch, dtype), torch.device(device)
        self.data, self.max_tokens, self.pieces, self.bleu = data, max_tokens, pieces, bleu
        sizes = {"embed_dim": dim, "ffn_embed_dim": ffn, "attention_heads": heads, "layers": layers}
        sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sizes.items() if value}
        self.architecture = argparse.Namespace(arch=arch, share_all_embeddings=True, dropout=dropout, max_source_positions=1024,
                                               max_target_positions=1024, **sizes)  # fmt: skip
        ARCH_CONFIG_REGISTRY[arch](self.architecture)  # fills in what is not given
        self.label_smoothing, self._order = label_smoothing, (None, None)
        if self.there():
            _ = self.steps_per_epoch  # too few are found now

    @functools.cached_property
    def fairseq(self) -> TranslationTask:
        """The texts, loaded when first asked for: a plan does not need them."""
        config = TranslationConfig(data=str(self.root), source_lang="en", target_lang="de", train_subset="train", dataset_impl=None,
                                   required_seq_len_multiple=1)  # fmt: skip
        task = TranslationTask.setup_task(config)
        for split in ("train", "valid"):
            task.load_dataset(split)
        return task

    @functools.cached_property
    def criterion(self) -> LabelSmoothedCrossEntropyCriterion:
        return LabelSmoothedCrossEntropyCriterion(self.fairseq, sentence_avg=False, label_smoothing=self.label_smoothing)

    @functools.cached_property
    def _batches(self) -> list:
        longest = min(1024, self.max_tokens)
        return self.fairseq.get_batch_iterator(
            self.fairseq.dataset("train"), max_tokens=self.max_tokens, max_positions=(longest, longest), ignore_invalid_inputs=True,
            required_batch_size_multiple=8, seed=self.seed, disable_iterator_cache=True,
        ).frozen_batches  # fmt: skip

    @property
    def steps_per_epoch(self) -> int:
        """Of data that are not there yet, as many as their published size gives."""
        if self.there():
            batches = len(self._batches)
        else:
            batches = SIZES[self.data.name][1] // self.max_tokens
        steps = batches // (self.workers * self.pieces)
        if not steps:
            raise ValueError(
                f"{batches} batches of task.max_tokens={self.max_tokens} do not fill one step of {self.workers} workers with "
                f"{self.pieces} each: lower task.max_tokens or task.pieces"
            )
        return steps

    def model(self) -> torch.nn.Module:
        torch.manual_seed(self.seed)
        texts = self.fairseq if self.there() else _Published(SIZES[self.data.name][0])
        return TransformerModel.build_model(self.architecture, texts).to(self.device, self.dtype)

    def there(self) -> bool:
        """Whether the data are on this machine; LibreOffice's are made when a run begins."""
        if "root" in self.__dict__:
            return True
        if self.data.name == "wmt16":
            return _binarised(Path(self.data.root))
        return _made(self.data) is not None

    def found(self) -> str:
        if self.data.name == "wmt16":
            where = self.data.root
            return where if self.there() else f"not there: no binarised WMT16 under {where}; its published sizes stand in, {REMEDY}"
        where = f"made under {self.data.root} from Debian's packages (6 MB) when the run begins; the sizes of version 7.4 stand in"
        return str(_made(self.data) or f"not there: {where}")

    def batches(self, step: int, workers, part: tuple[int, int]):
        lane, processes = part
        if self.pieces % processes:
            raise ValueError(f"{self.pieces} pieces per worker over its {processes} processes: choose task.pieces so that it divides")
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, 2, epoch]).permutation(len(self._batches))
        train = self.fairseq.dataset("train")
        for i in workers:
            start = (i * self.steps_per_epoch + position) * self.pieces
            pieces = [self._batches[k] for k in self._order[1][start : start + self.pieces]]
            tokens = sum(int(train.tgt_sizes[piece].sum()) for piece in pieces)
            for piece in pieces[lane::processes]:
                yield self._sample("train", piece), processes / tokens

    def loss(self, model: torch.nn.Module, batch) -> torch.Tensor:
        sample, share = batch
        with self.precision():
            loss, _, log = self.criterion(model, sample)
        loss = loss * share
        # the value is the unsmoothed loss in base 2, the gradient that of the smoothed one
        return loss + (log["nll_loss"] * share / math.log(2) - loss).detach()

    def evaluate(self, model: torch.nn.Module, part: tuple[int, int]) -> dict:
        """Sums over target tokens of every part[1]-th validation sentence, of its NLL in base 2 and in nats."""
        nll, count = 0.0, 0
        with self.precision():
            for _, sample in self._sentences("valid", part):
                _, tokens, log = self.criterion(model, sample)
                nll += float(log["nll_loss"])
                count += tokens
        return {"count": count, "validation_loss": nll / math.log(2), "nll": nll, "nll_base2": nll / math.log(2)}

    def finish(self, models: list[Path], cluster) -> dict:
        """BLEU of the average of the last models, translated by all processes together, with the whole protocol beside the number."""
        models = models[-self.bleu.average :]  # at most evaluate.keep of them
        if not self.bleu.subsets or not models:
            return {}
        model, found = self.averaged(models), {}
        for subset in self.bleu.subsets:
            parts = cluster.all_gather_object(self.translate(model, subset, (cluster.rank, cluster.world_size), cluster.is_main))
            if cluster.is_main:
                found[subset] = self.score(subset, {k: text for part in parts for k, text in part.items()})
                found[subset]["models"] = [path.stem for path in models]
        return {"bleu": found}

    def averaged(self, models: list[Path]) -> torch.nn.Module:
        """The network whose parameters are the mean over files of averaged models. (fairseq has this as a script outside its package.)"""
        model = self.model().eval()
        total = {}
        for path in models:
            load_model(path, model)
            for name, value in model.state_dict().items():
                total[name] = total.get(name, 0) + value.double() / len(models)
        model.load_state_dict(total)
        return model

    @torch.no_grad()
    def translate(self, model: torch.nn.Module, subset: str, part: tuple[int, int], show: bool = False) -> dict[int, str]:
        """{place in the subset: detokenised translation} of every part[1]-th sentence, by beam search."""
        from sacremoses import MosesDetokenizer

        detokenizer = MosesDetokenizer(lang="de")
        generator = self.fairseq.build_generator([model], argparse.Namespace(beam=self.bleu.beam, lenpen=self.bleu.lenpen))
        out, told = {}, time.monotonic()
        for batch, sample in self._sentences(subset, part):
            hypotheses = self.fairseq.inference_step(generator, [model], sample)
            for k, best in zip(sample["id"].tolist(), hypotheses, strict=True):
                words = self.fairseq.target_dictionary.string(best[0]["tokens"], "subword_nmt")
                out[k] = detokenizer.detokenize(words.split())
            if show and time.monotonic() - told > 20:
                told = time.monotonic()
                print(f"translating {subset}: {len(out) * part[1]}/{len(self.fairseq.dataset(subset))}", flush=True)
        return out

    def score(self, subset: str, translations: dict[int, str]) -> dict:
        """sacrebleu's score, its signature and how the translations came about."""
        import sacrebleu

        raw = self.root.parent / f"{subset}.raw.de"
        if raw.exists():
            references, source = raw.read_text(encoding="utf-8").removesuffix("\n").split("\n"), raw.name
        else:
            from sacremoses import MosesDetokenizer

            dataset, detokenizer = self.fairseq.dataset(subset), MosesDetokenizer(lang="de")
            words = (self.fairseq.target_dictionary.string(dataset.tgt[k], "subword_nmt") for k in range(len(dataset)))
            references, source = [detokenizer.detokenize(line.split()) for line in words], "data-bin, detokenised"
        if len(references) != len(translations):
            raise ValueError(f"{source} has {len(references)} lines for {len(translations)} sentences of {subset}: make the data anew")
        metric = sacrebleu.BLEU()
        bleu = metric.corpus_score([translations[k] for k in range(len(references))], [references])
        return {"bleu": bleu.score, "signature": str(metric.get_signature()), "beam": self.bleu.beam, "lenpen": self.bleu.lenpen,
                "references": source, "translations": "detokenised by sacremoses"}  # fmt: skip

    def _sentences(self, split: str, part: tuple[int, int]):
        """(places, sample) in batches, of every part[1]-th sentence, those of one length together."""
        if split not in self.fairseq.datasets:
            self.fairseq.load_dataset(split)
        dataset = self.fairseq.dataset(split)
        mine = np.arange(len(dataset))[part[0] :: part[1]]
        if len(mine):
            mine = mine[np.argsort(dataset.tgt_sizes[mine], kind="stable")]
            tokens = max(self.max_tokens, *(dataset.num_tokens(k) for k in mine))
            for batch in dataset.batch_by_size(mine, max_tokens=tokens):
                yield batch, self._sample(split, batch)

    def _sample(self, split: str, places):
        dataset = self.fairseq.dataset(split)
        sample = dataset.collater([dataset[k] for k in places])
        return utils.apply_to_sample(lambda t: t.to(self.device, non_blocking=True), sample)

    @functools.cached_property
    def root(self) -> Path:
        if self.data.name == "libreoffice":
            return libreoffice.make(self.data.root, self.data.vocabulary, self.data.packages)
        root = Path(self.data.root)
        if not _binarised(root):
            raise FileNotFoundError(f"no binarised WMT16 under {root}: {REMEDY}; data=libreoffice needs none")
        return root


class _Published:
    """In place of texts that are not there: a vocabulary of the right size, for a network of the right size."""

    def __init__(self, words: int):
        self.source_dictionary = self.target_dictionary = Dictionary()
        for k in range(words - len(self.source_dictionary)):
            self.source_dictionary.add_symbol(f"word {k}")


def _binarised(root: Path) -> bool:
    return all((root / f"dict.{language}.txt").is_file() for language in ("en", "de"))


def _made(data) -> Path | None:
    """The folder of LibreOffice's texts of this vocabulary, of whichever packages; None where they have not been made."""
    for path in sorted(Path(data.root).glob("libreoffice-*/about.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            made = json.loads(path.read_text())
            if (made["recipe"], made["vocabulary"]) == (libreoffice.RECIPE, data.vocabulary):
                return path.parent / "data-bin"
    return None
