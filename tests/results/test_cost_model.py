"""The model of an iteration's time, by hand on small numbers, and what it says of the paper and of what was measured."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from results import cost_model, store
from results import timing as report
from results.cost_model import Links, algorithm, iteration, seconds
from slowmo.buckets import cut

ROOT = Path(__file__).parents[2]
# a link that carries 1 MB of payload in a second, one tenth of a second away, and processes that are nodes
SLOW = Links(4, 8e6 / cost_model.PAYLOAD, 0.1, 1)
MB = 1e6


def test_messages_and_averages_by_hand():
    assert SLOW.message(2 * MB) == pytest.approx([2.0, 0.1])
    assert SLOW.average(2 * MB) == pytest.approx([3.0, 0.6])  # 6 pieces of half a MB
    assert SLOW.average(2 * MB, tree=True) == pytest.approx([3.0, 0.4])


def test_processes_of_a_node_share_a_message():
    one, eight = Links(4, node=1).message(MB), Links(4, node=8).message(MB)
    assert eight - one == pytest.approx([7 / 8 * 8 * MB / cost_model.INSIDE, 0])
    # a ring over all processes: 32 of them, so 62 pieces of a 32nd cross each link; between nodes there are still 4 hops around
    assert Links(4, 8e6 / cost_model.PAYLOAD, 0.1, 8).allreduce(MB) == pytest.approx([62 / 32, 0.6])
    assert SLOW.allreduce(MB) == pytest.approx(SLOW.average(MB))


def test_iterations_by_hand():
    of = lambda cell, **options: seconds(f"imagenet_{cell}", 3.0, MB, SLOW, **options)
    ring = 1.5 + 0.6
    assert of("local_sgd") == of("slowmo_local_sgd") == pytest.approx(3 + ring / 12)
    assert of("sgp") == of("sgp_noaverage") == pytest.approx(3 + 1.1)
    assert of("slowmo_sgp") == pytest.approx(3 + 1.1 * 47 / 48 + ring / 48)
    assert of("osgp") == pytest.approx(3) and seconds("imagenet_osgp", 0.5, MB, SLOW) == pytest.approx(1.1)
    assert of("double_averaging_sgp") == pytest.approx(3 + 2 * 1.1 * 47 / 48 + 2 * ring / 48)
    assert of("ar_sgd") == pytest.approx(3 + ring)
    # during backward, 1 to 3: these buckets are there at 1.04, 1.12, 1.28, 1.6, 2.24, 2.74 and 3, and take 0.6 and 1.5 times their size;
    # the wire is busy from 1.04 on
    assert cost_model.buckets(MB, 0.5 * MB) == pytest.approx([size * MB for size in (0.02, 0.04, 0.08, 0.16, 0.32, 0.25, 0.13)])
    assert of("ar_sgd", early=True, bucket=0.5 * MB) == pytest.approx(1.04 + 7 * 0.6 + 1.5)
    assert of("ar_sgd", early=True, bucket=25 * MB) == pytest.approx(3 + ring)  # one bucket
    # SGP's messages of these buckets take 0.1 and their size: the last two are waited for
    assert of("sgp", overlap=True, bucket=0.5 * MB) == pytest.approx(2.74 + 0.35 + 0.23)
    assert of("local_sgd", overlap=True, bucket=0.5 * MB) == pytest.approx(3 + (of("ar_sgd", early=True, bucket=0.5 * MB) - 3) / 12)


def test_buckets_are_those_of_the_algorithm():
    """Many small parameters, so that boundaries lie where they should."""
    model = torch.nn.ParameterList(torch.zeros(10) for _ in range(1000))
    sizes = lambda cap: [
        4 * sum(place.shape.numel() for segment in bucket.segments for place in segment.places)
        for bucket in cut(list(model.named_parameters()), [0] * 1000, 1, torch.float32, cap)
    ]
    assert sizes(25.0) == [40000]  # all of it is smaller than a first bucket
    assert sizes(8000 / 2**20) == pytest.approx(cost_model.buckets(40000, 8000), abs=80)


def test_terms_add_up_to_what_is_waited_for():
    terms = iteration("imagenet_slowmo_osgp", 0.5, MB, SLOW)
    assert terms["compute"] == 0.5 and terms["bytes"] + terms["latency"] == pytest.approx(0.6 * 47 / 48)
    assert terms["bytes of averages"] == pytest.approx(1.5 / 48) and terms["latency of averages"] == pytest.approx(0.6 / 48)


def test_what_an_experiment_sends_is_read_off_its_files():
    assert algorithm("wmt16_slowmo_local_adam") == {"base": "local_sgd", "tau": 12, "averaged": 1, "gossiped": 1}
    assert algorithm("imagenet_double_averaging_sgp") == {"base": "sgp", "tau": 48, "averaged": 2, "gossiped": 2}
    assert algorithm("imagenet_sgp_noaverage")["tau"] is None and algorithm("cifar10_small_osgp")["tau"] is None
    assert algorithm("cifar10_small_double_averaging_local_sgd") == {"base": "local_sgd", "tau": 12, "averaged": 2, "gossiped": 1}
    assert algorithm("cifar10_small_slowmo_sgp")["tau"] == 12 and algorithm("imagenet_slowmo_sgp,outer.tau=96")["tau"] == 96


def test_the_parameters_are_the_models():
    from experiments.tasks.torchvision_cpu import torchvision

    model = torchvision.models.resnet50()
    assert sum(p.numel() for p in model.parameters()) == cost_model.TASKS["imagenet"].parameters
    # fairseq's big transformer: d = 1024, 4096 between, 6 + 6 layers, one table of 32768 words
    d, ffn = 1024, 4096
    attention, norm, forward = 4 * (d * d + d), 2 * d, 2 * d * ffn + d + ffn
    layers = 6 * (attention + forward + 2 * norm) + 6 * (2 * attention + forward + 3 * norm)
    assert layers + 32768 * d == cost_model.TASKS["wmt16"].parameters


@pytest.mark.parametrize("data, exceptions", [("imagenet", {"double_averaging_local_sgd"}), ("wmt16", set())])
def test_one_number_explains_the_papers_column(data, exceptions):
    task, compute = cost_model.TASKS[data], cost_model.fitted(data)
    off = {
        cell: seconds(f"{data}_{cell}", compute, 4 * task.parameters, Links(task.nodes)) / value
        for cell, value in cost_model.paper(data).items()
    }
    assert {cell for cell, ratio in off.items() if abs(math.log(ratio)) > math.log(1.15)} == exceptions


def test_measured_on_links_and_modelled_agree():
    """The committed measurements; a cell that is off by more than 15% is named here."""
    lines = pd.read_csv(ROOT / "results/data/links.csv")
    off = {}
    for network, part in lines[lines["network"] == "emulated"].groupby(store.NETWORK):
        ratio = part.groupby("row")["milliseconds"].median() / cost_model.model(part)
        off |= {(*network[:3], row): value for row, value in ratio.items() if abs(math.log(value)) > math.log(1.15)}
    assert not off


def lines():
    facts = {"data": "imagenet", "network": "emulated", "hosts": 4, "node": 1, "rate": "8mbit", "delay": "0.1ms", "emulated": True,
             "bytes": MB, "commit": "abc", "machine": "x"}  # fmt: skip
    rows = {"compute": 500.0, "osgp": 1100.0, "sgp": 1700.0, "ar_sgd_after": 9000.0}
    made = [facts | {"row": row, "round": k, "milliseconds": value + k - 1} for row, value in rows.items() for k in range(3)]
    return pd.DataFrame(made)[store.COLUMNS["links"]]


def test_the_model_of_a_measurement_takes_its_compute_and_its_links():
    found = cost_model.model(lines())
    wire = 8 * MB / (cost_model.PAYLOAD * 8e6) + 1e-4 + cost_model.LATENCY
    assert found["compute"] == 500 and found["osgp"] == pytest.approx(1000 * wire) and found["sgp"] == pytest.approx(500 + 1000 * wire)


def test_measurements_stand_beside_model_and_paper():
    text = report.beside(lines())
    row = next(line for line in text.splitlines() if line.startswith("| SGP |"))
    assert "1700.0 (1699.5 to 1700.5)" in row and "| 1.545 |" in row and f"| {304 / 271:.3f} |" in row and "(!)" not in row
    assert "(!)" in next(line for line in text.splitlines() if "after backward" in line)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/links.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="python -m benchmarks.table2"):
        store.Store(tmp_path).read("links")


def test_other_clusters():
    found = cost_model.elsewhere("imagenet", (8, 32), (10, 400))
    cell = lambda rate, m, name: found[(found["rate"] == rate) & (found["nodes"] == m) & (found["cell"] == name)].iloc[0]
    local = cell(10, 32, "slowmo_local_sgd")
    assert local["over base"] == 1 and local["milliseconds"] / cell(10, 32, "ar_sgd")["milliseconds"] == pytest.approx(
        local["over AllReduce"]
    )
    assert cell(10, 32, "slowmo_sgp")["over base"] > cell(400, 32, "slowmo_sgp")["over base"] > 1
    text = report.sentences("imagenet", found)
    assert len(text) == 4 and "OSGP + SlowMo pays at m = 8 to 32 and adds at most 1." in text[0] and "pays nowhere here" in text[2]
    assert "compute is the largest term everywhere." in text[1] and "above m = 1,710." in text[1]
    slow = report.sentences("wmt16", cost_model.elsewhere("wmt16", (8, 32), (10,)))[1]
    assert "everywhere but of AR-Adam at m = 8 to 32, of SGP + SlowMo at m = 8 to 32, where link bytes are" in slow


def test_exponents_of_what_grows_with_its_size():
    grid = [("step", m, 10**6, 1e-3 * m) for m in (1, 8, 16, 64)] + [("step", 2, d, d**0.9) for d in (10**4, 10**7, 10**8)]
    grid += [("memory", m, 10**6, 5.0) for m in (4, 64)] + [("start", 8, 0, 2.5)]
    text = report.exponents(pd.DataFrame(grid, columns=["what", "m", "d", "value"]).assign(commit="abc", machine="x"))
    assert "step against m 1.00, step against d 0.90, memory against m" in text and "2.5 s" in text
    assert np.isfinite(float(text.split("memory against m ")[1].split(".")[0]))
