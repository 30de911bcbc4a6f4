"""Translation on the real fairseq: whose loss and batches these are, shards, pieces, evaluation, BLEU, and what an import leaves behind."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

if importlib.util.find_spec("fairseq") is None:
    pytest.skip("the wmt16 extra is not installed", allow_module_level=True)
from generated import PAIRS, databin
from helpers import build, sgd
from processes import spawn

from experiments.runner import run_dir
from experiments.runner.recorder import RunRecorder
from experiments.tasks.wmt16 import WMT16
from slowmo import outer
from slowmo.cluster import Cluster
from slowmo.evaluate import evaluate
from slowmo.train import TrainingMeter, train

ROOT = Path(__file__).parents[2]
WORKERS = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return databin(tmp_path_factory.mktemp("wmt16"))


@pytest.fixture(scope="module")
def make(root):
    def make(workers=WORKERS, seed=1, dtype="float32", where=root, **options):
        settings = {"max_tokens": 64, "pieces": 4, "arch": "transformer_wmt_en_de", "layers": 1, "dim": 16, "ffn": 32, "heads": 2,
                    "dropout": 0.2, "label_smoothing": 0.1, "autocast": None, "loss_scale": 1024.0} | options  # fmt: skip
        settings.setdefault("bleu", SimpleNamespace(subsets=["valid"], beam=4, lenpen=0.6, average=1))
        return WMT16(workers, seed, dtype, "cpu", SimpleNamespace(name="wmt16", root=str(where)), **settings)

    return make


def same(left, right):
    return all(a["id"].tolist() == b["id"].tolist() and s == t for (a, s), (b, t) in zip(left, right, strict=True))


def places(batches):
    return [k for sample, _ in batches for k in sample["id"].tolist()]


def test_shards_are_disjoint_and_reshuffled(make):
    task = make()
    epochs = []
    for epoch in range(2):
        steps = range(epoch * task.steps_per_epoch, (epoch + 1) * task.steps_per_epoch)
        seen = [sum((places(task.batches(step, [i], (0, 1))) for step in steps), []) for i in range(WORKERS)]
        assert len(set(seen[0]) | set(seen[1])) == len(seen[0]) + len(seen[1]) > 0.8 * PAIRS["train"]
        epochs.append(seen)
    assert all(set(a) != set(b) for a, b in zip(*epochs))
    assert same(make().batches(9, range(2), (0, 1)), task.batches(9, range(2), (0, 1)))
    assert not same(make(seed=2).batches(0, range(2), (0, 1)), task.batches(0, range(2), (0, 1)))


def test_batches_are_fairseq_s(make):
    """The same batches as fairseq's own iterator gives over an epoch, in another order."""
    task = make()
    own = task.fairseq.get_batch_iterator(task.fairseq.dataset("train"), max_tokens=64, max_positions=(64, 64),
                                          required_batch_size_multiple=8, seed=1, disable_iterator_cache=True)  # fmt: skip
    theirs = {tuple(sorted(sample["id"].tolist())) for sample in own.next_epoch_itr(shuffle=False)}
    drawn = [piece for step in range(task.steps_per_epoch) for piece in task.batches(step, range(2), (0, 1))]
    ours = [tuple(sorted(sample["id"].tolist())) for sample, _ in drawn]
    assert set(ours) <= theirs and len(ours) == task.steps_per_epoch * 8 and len(theirs) - len(ours) < 8
    for sample, _ in task.batches(0, range(2), (0, 1)):
        assert sample["net_input"]["src_tokens"].numel() <= 64 and sample["target"].numel() <= 64


@pytest.mark.parametrize("processes", [2, 4])
def test_the_processes_of_a_node_share_the_pieces(processes, make):
    task = make()
    whole = list(task.batches(3, range(2), (0, 1)))
    parts = [list(task.batches(3, range(2), (lane, processes))) for lane in range(processes)]
    for worker in range(2):
        pieces = whole[worker * 4 : worker * 4 + 4]
        count = 4 // processes
        for lane, part in enumerate(parts):
            mine = part[worker * count : (worker + 1) * count]
            assert same([(sample, processes * share) for sample, share in pieces[lane::processes]], mine)
    with pytest.raises(ValueError, match="4 pieces per worker over its 3 processes: choose task.pieces"):
        next(task.batches(0, range(1), (0, 3)))


def test_the_loss_is_fairseq_s_criterion(make):
    """On the same batch and parameters: the gradient that of the label-smoothed loss, the value the NLL in base 2."""
    task = make(dropout=0.0, pieces=1)
    model = task.model()
    (sample, share), *_ = task.batches(0, range(1), (0, 1))
    value = task.loss(model, (sample, share))
    value.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss, tokens, log = task.criterion(model, sample)
    (loss / tokens).backward()
    assert float(value.detach()) == pytest.approx(float(log["nll_loss"]) / tokens / math.log(2), rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-6, atol=1e-9)


def test_within_a_worker_every_token_counts_the_same(make):
    """Pieces differ in tokens: their losses add up to the sum over tokens by the number of tokens, on one process or four."""
    task = make(dropout=0.0)
    model = task.model()
    pieces = list(task.batches(1, range(1), (0, 1)))
    logs = [task.criterion(model, sample)[2] for sample, _ in pieces]
    tokens = [log["ntokens"] for log in logs]
    expected = sum(float(log["nll_loss"]) for log in logs) / sum(tokens) / math.log(2)
    assert len(set(tokens)) > 1
    assert sum(float(task.loss(model, piece).detach()) for piece in pieces) == pytest.approx(expected, rel=1e-6)
    lanes = [sum(float(task.loss(model, piece).detach()) for piece in task.batches(1, range(1), (lane, 4))) for lane in range(4)]
    assert np.mean(lanes) == pytest.approx(expected, rel=1e-6) and np.std(lanes) > 0


def test_evaluation_is_the_mean_over_tokens(make):
    task = make()
    model = task.model().eval()
    dataset = task.fairseq.dataset("valid")
    with torch.no_grad():
        alone = [task.criterion(model, dataset.collater([dataset[k]]))[2] for k in range(len(dataset))]
        sums = task.evaluate(model, (0, 1))
        assert sums["count"] == sum(log["ntokens"] for log in alone) == dataset.tgt_sizes.sum()
        assert sums["nll"] == pytest.approx(sum(float(log["nll_loss"]) for log in alone), rel=1e-5)
        assert sums["nll_base2"] == sums["validation_loss"] == pytest.approx(sums["nll"] / math.log(2))
        parts = [task.evaluate(model, (k, 20)) for k in range(20)]  # some have none
        assert {name: pytest.approx(sum(part[name] for part in parts), rel=1e-5) for name in sums} == sums


# ---- foldings


def rows_after(make, base, steps, processes_of=None, workers=WORKERS):
    """Rows after some steps of SlowMo, the metric row beside them."""
    task = make(workers=workers)
    cluster = Cluster(workers)
    optimizer = lambda parameters: sgd(parameters, lr=0.5, momentum=0.9)  # Adam would blow up roundings of tiny gradients
    slow = lambda base: outer.SlowMo(base, tau=2, beta=0.5, buffers="maintain")
    replicas, algorithm = build(task, workers, base, optimizer, slow, cluster, accumulate=task.pieces // cluster.worker_size)
    tally = TrainingMeter(len(cluster.local_workers), torch.device("cpu"))
    for _ in train(task, replicas, algorithm, lambda step: 0.5, steps, 1, tally):
        pass
    row, _ = evaluate(task, replicas, algorithm, tally)
    return replicas.rows(), row


@pytest.mark.parametrize("base", ["sgp", "allreduce"])
def test_one_process_is_many_are_node_workers(base, make):
    """Dropout included: a piece draws the same random numbers wherever it is computed."""
    expected, row = rows_after(make, base, 3)
    for processes in (2, 4):
        parts = spawn(rows_after, processes, make, base, 3)
        node = processes // WORKERS
        rows = torch.cat([part[0] for part in parts[::node]])
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-6)
        assert {name: value for name, value in parts[0][1].items() if "loss" in name or "nll" in name} == {
            name: pytest.approx(value, rel=1e-4) for name, value in row.items() if "loss" in name or "nll" in name}  # fmt: skip


def test_pieces_add_up_before_one_step(make):
    """Two workers of Local SGD by hand: gradients of all pieces, then torch's own step."""
    task = make(dropout=0.0)
    replicas, algorithm = build(task, WORKERS, "local_sgd", lambda parameters: sgd(parameters, lr=0.1), accumulate=4)
    for _ in train(task, replicas, algorithm, lambda step: 0.1, 1, 1, TrainingMeter(2, torch.device("cpu"))):
        pass
    for i, replica in enumerate(replicas.models):
        twin = task.model()
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        for piece in task.batches(0, [i], (0, 1)):
            task.loss(twin, piece).backward()
        optimizer.step()
        for p, q in zip(replica.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


# ---- translation


@pytest.fixture(scope="module")
def trained(make, tmp_path_factory):
    """(task, files of three averaged models) of a network that knows most of its few words."""
    task = make(dim=32, ffn=64, dropout=0.0, max_tokens=256, pieces=1, label_smoothing=0.0)
    model, path = task.model(), tmp_path_factory.mktemp("models")
    optimizer, files = torch.optim.Adam(model.parameters(), lr=0.01), []
    book = RunRecorder(path, SimpleNamespace(evaluate=SimpleNamespace(keep=3)), Cluster(1))
    for step in range(360):
        for piece in task.batches(step, range(2), (0, 1)):
            task.loss(model, piece).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 350 and step % 3 == 0:
            book.save_model(step, model)
    files = run_dir.saved_models(path)
    assert [file.name for file in files] == [f"step-{step:09d}.safetensors" for step in (351, 354, 357)]
    return task, files


def test_tied_weights_survive_a_file(trained):
    task, files = trained
    model = task.averaged(files[-1:])
    tied = [model.encoder.embed_tokens.weight, model.decoder.embed_tokens.weight, model.decoder.output_projection.weight]
    assert len({p.data_ptr() for p in tied}) == 1
    other = task.model()
    run_dir.load_model(files[-1], other)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_averaging_models(trained):
    task, files = trained
    models = [task.averaged([file]) for file in files]
    for p, *others in zip(task.averaged(files).parameters(), *(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, torch.stack(others).mean(0))


@pytest.mark.parametrize("average", [1, 3, 9])
def test_bleu_with_its_protocol(average, trained):
    task, files = trained
    task.bleu = SimpleNamespace(subsets=["valid", "test"], beam=4, lenpen=0.6, average=average)
    found = task.finish(files, Cluster(1))["bleu"]
    assert found.keys() == {"valid", "test"}
    for subset, facts in found.items():
        assert 20 < facts["bleu"] <= 100  # chance is 0
        assert "version:" in facts["signature"] and (facts["beam"], facts["lenpen"]) == (4, 0.6)
        assert facts["models"] == [file.stem for file in files[-average:]] and facts["references"] == f"{subset}.raw.de"
    task.bleu.subsets = []
    assert task.finish(files, Cluster(1)) == {}


def shared_out(make, files):
    task = make(dim=32, ffn=64, dropout=0.0)
    return task.finish(files, Cluster(2))


def test_processes_translate_together(trained, make):
    task, files = trained
    task.bleu = SimpleNamespace(subsets=["valid"], beam=4, lenpen=0.6, average=1)
    alone = task.finish(files, Cluster(1))
    first, second = spawn(shared_out, 2, make, files)
    assert first == alone and second == {"bleu": {}}


def test_bleu_without_references_says_so(trained):
    task, files = trained
    translations = task.translate(task.averaged(files), "valid", (0, 1))
    raw = task.root.parent / "valid.raw.de"
    text = raw.read_text()
    try:
        raw.unlink()
        facts = task.score("valid", translations)
        assert facts["references"] == "data-bin, detokenised" and facts["bleu"] > 20
        raw.write_text(text.replace(" ", "\u2028", 1))  # no end of a line to fairseq
        assert task.score("valid", translations)["bleu"] > 20
        raw.write_text("one line\n")
        with pytest.raises(ValueError, match="valid.raw.de has 1 lines for 14 sentences"):
            task.score("valid", translations)
    finally:
        raw.write_text(text)


@pytest.mark.slow
def test_fairseq_generate_reads_an_exported_run(trained, tmp_path):
    """fairseq's own command, on the checkpoint that we export, gives our translations and scores them as we do."""
    import sacrebleu

    sys.path.insert(0, str(ROOT / "scripts"))
    from export_fairseq import export

    task, files = trained
    export(task, files[-1:], tmp_path / "model.pt")
    command = [sys.executable, "-m", "fairseq_cli.generate", str(task.root), "--path", str(tmp_path / "model.pt"), "--gen-subset", "valid",
               "--beam", "4", "--lenpen", "0.6", "--remove-bpe", "--max-tokens", "256", "--cpu",
               "--required-batch-size-multiple", "1"]  # fmt: skip
    environment = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    theirs = {int(line.split("\t")[0][2:]): line.split("\t")[2] for line in done.stdout.splitlines() if line.startswith("H-")}
    assert len(theirs) == PAIRS["valid"], done.stderr[-2000:]
    assert theirs == task.translate(task.averaged(files[-1:]), "valid", (0, 1))
    assert sacrebleu.corpus_bleu(list(theirs.values()), [list(theirs.values())]).score == pytest.approx(100)


# ---- the rest


@pytest.mark.slow
def test_importing_fairseq_leaves_no_marks():
    """Neither in Hydra's store, where later configs would meet it, nor on the root logger."""
    code = f"""
import logging, hydra
from hydra.core.config_store import ConfigStore
store, root = ConfigStore.instance(), logging.getLogger()
before = sorted(store.repo), root.level, list(root.handlers)
import experiments.tasks.wmt16
assert before == (sorted(store.repo), root.level, list(root.handlers)), sorted(store.repo)
with hydra.initialize_config_dir({str(ROOT / "configs")!r}, version_base="1.3"):
    assert hydra.compose("config", ["optimizer=adam"]).optimizer._target_ == "torch.optim.Adam"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_paper_s_network(make):
    task = make(arch="transformer_wmt_en_de_big", layers=None, dim=None, ffn=None, heads=None, dropout=0.3)
    a = task.architecture
    assert (a.encoder_embed_dim, a.encoder_ffn_embed_dim, a.encoder_attention_heads, a.encoder_layers) == (1024, 4096, 16, 6)
    assert (a.decoder_embed_dim, a.decoder_ffn_embed_dim, a.decoder_attention_heads, a.decoder_layers) == (1024, 4096, 16, 6)
    assert a.share_all_embeddings and a.dropout == 0.3


def test_autocast_keeps_rows_in_their_dtype(make):
    task = make(autocast="bfloat16")
    model, used = task.model(), []
    model.encoder.layers[0].fc1.register_forward_hook(lambda module, inputs, output: used.append(output.dtype))
    value = task.loss(model, next(task.batches(0, range(1), (0, 1))))
    value.backward()
    assert used == [torch.bfloat16] and math.isfinite(float(value.detach()))
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert make(autocast="float16").loss_scale == 1024.0 and task.loss_scale == 1.0


@pytest.mark.parametrize("options, words", [
    ({"pieces": 100}, "do not fill one step of 2 workers with 100 each: lower task.max_tokens or task.pieces"),
    ({"arch": "transformer_of_doom"}, "fairseq has no such transformer"),
    ({"dropout": 1.0}, "dropout=1.0"),
    ({"dim": 10, "heads": 4}, "task.dim=10 over task.heads=4: choose a multiple of 4"),
    ({"autocast": "half"}, "choose bfloat16, float16 or null"),
    ({"bleu": SimpleNamespace(subsets=["train"], beam=4, lenpen=0.6, average=1)}, "of valid and test"),
    ({"where": "/nowhere"}, "no binarised WMT16 under /nowhere: .*scripts/prepare_wmt16.sh.*data.root=.*data=libreoffice"),
])  # fmt: skip
def test_nonsense_is_refused(options, words, make):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        next(make(**options).batches(0, range(1), (0, 1)))  # a plan needs no data, a run does
