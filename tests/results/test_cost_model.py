"""The model of an iteration's time, by hand on small numbers, and what it says of the paper and of what was measured."""

import dataclasses
import math

import pandas as pd
import pytest
import torch

from benchmarks.table2 import Waiting
from results import cost_model, store, straggling
from results import timing as report
from results.cost_model import Links, algorithm, iteration, seconds
from results.tables import LABELS
from slowmo.buckets import cut

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
    """After backward, in one bucket: of each kind of message one."""
    of = lambda cell, compute=3.0: seconds(f"imagenet_{cell}", compute, MB, SLOW, bucket=25 * MB)
    ring = 1.5 + 0.6
    assert of("local_sgd") == of("slowmo_local_sgd") == pytest.approx(3 + ring / 12)
    assert of("sgp") == of("sgp_noaverage") == pytest.approx(3 + 1.1)
    assert of("slowmo_sgp") == pytest.approx(3 + 1.1 * 47 / 48 + ring / 48)
    assert of("osgp") == pytest.approx(3) and of("osgp", 0.5) == pytest.approx(1.1)
    assert of("slowmo_osgp", 0.5) == pytest.approx(1.1 * 47 / 48 + (0.5 + ring) / 48)
    assert of("double_averaging_sgp") == pytest.approx(3 + 2.1 * 47 / 48 + 2 * ring / 48)  # a buffer follows its rows on the wire
    assert of("ar_sgd") == pytest.approx(3 + ring)


def test_iterations_in_buckets_by_hand():
    """C = 3, so that gradients come from 1 to 3: those of the first bucket are there at 1.04, of the last but one at 2.935."""
    sizes = (0.02, 0.04, 0.08, 0.16, 0.32, 0.19, 0.095, 0.0625, 0.0325)
    assert cost_model.buckets(MB, 0.5 * MB) == pytest.approx([size * MB for size in sizes])
    of = lambda cell, overlap, links=SLOW: seconds(f"imagenet_{cell}", 3.0, MB, links, overlap, bucket=0.5 * MB)
    # each ring takes 0.6 and 1.5 times its bucket; during backward the wire is busy from 1.04 on
    during, after = 1.04 + 9 * 0.6 + 1.5, 3 + 9 * 0.6 + 1.5
    assert of("ar_sgd", True) == pytest.approx(during) and of("ar_sgd", False) == pytest.approx(after)
    assert of("local_sgd", True) == of("slowmo_local_sgd", True) == pytest.approx(3 + (during - 3) / 12)
    assert of("local_sgd", False) == pytest.approx(3 + (after - 3) / 12)
    # messages follow each other, latency counts once: during backward the last bucket's alone is waited for
    assert of("sgp", True) == pytest.approx(3 + 0.0325 + 0.1)
    assert of("sgp", False) == pytest.approx(3 + 1 + 0.1)
    assert of("osgp", True) == of("osgp", False) == 3
    # buffers are averaged when rows are there: nothing hides them
    assert of("double_averaging_local_sgd", True) == pytest.approx(3 + (during - 3 + 9 * 0.6 + 1.5) / 12)
    # of two rings at once the link carries one's bytes during the other's latency: (1, 2), (3, 4), (5, 6), (7, 8) and 9
    two = dataclasses.replace(SLOW, at_once=2)
    assert 3 + 1.5 + 5 * 0.6 > of("ar_sgd", False, two) > 3 + 1.5 + 0.6


def test_which_rows_have_two_ways():
    ways = {cell: cost_model.two_ways(f"imagenet_{cell}") for cell in cost_model.paper("imagenet")}
    assert [cell for cell, both in ways.items() if not both] == ["osgp"]
    of = lambda cell, overlap: iteration(f"imagenet_{cell}", 3.0, MB, SLOW, overlap, bucket=0.5 * MB)
    assert all((of(cell, True) != of(cell, False)) == both for cell, both in ways.items())


def test_buckets_are_those_of_the_algorithm():
    """Many small parameters, so that boundaries lie where they should."""
    model = torch.nn.ParameterList(torch.zeros(10) for _ in range(1000))
    sizes = lambda cap: [
        4 * sum(place.shape.numel() for segment in bucket.segments for place in segment.places)
        for bucket in cut(list(model.named_parameters()), [(0, 0)] * 1000, 1, torch.float32, cap)
    ]
    assert sizes(25.0) == [40000]  # all of it is smaller than a first bucket
    assert sizes(8000 / 2**20) == pytest.approx(cost_model.buckets(40000, 8000), abs=80)
    assert sizes(8000 / 2**20) == pytest.approx(cost_model.buckets(40000, 8000, layer=40))
    assert sizes(8000 / 2**20)[-3:] == sorted(sizes(8000 / 2**20)[-3:], reverse=True)  # no computation hides the last ones


def test_the_buckets_of_what_waits_are_the_models():
    model = Waiting(1_000_000, 0.1)
    full = cost_model.emulated_bucket("imagenet", 4e6)
    cut_ = cut(list(model.named_parameters()), [(0, 0)] * cost_model.LAYERS, 1, torch.float32, full / 2**20)
    sizes = [4 * sum(place.shape.numel() for segment in bucket.segments for place in segment.places) for bucket in cut_]
    assert sizes == pytest.approx(cost_model.buckets(4e6, full, 4e6 / cost_model.LAYERS)) and len(sizes) > 5


def test_terms_add_up_to_what_is_waited_for():
    terms = iteration("imagenet_slowmo_osgp", 0.5, MB, SLOW)  # less than a bucket
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
    """A cell that is off by more than 15% has its sentence."""
    task, compute = cost_model.TASKS[data], cost_model.fitted(data)
    off = {
        cell: seconds(f"{data}_{cell}", compute, 4 * task.parameters, Links(task.nodes)) / value
        for cell, value in cost_model.paper(data).items()
    }
    assert {cell for cell, ratio in off.items() if abs(math.log(ratio)) > math.log(1.15)} == exceptions
    said = report.NOTES[data].lower()
    assert all(LABELS[cell].lower() in said for cell in exceptions)


def test_the_papers_sgp_lies_between_ours():
    task, compute = cost_model.TASKS["imagenet"], cost_model.fitted("imagenet")
    during, after = (seconds("imagenet_sgp", compute, task.size, Links(task.nodes), overlap) for overlap in (True, False))
    assert during < 0.304 < after
    assert "takes 1.12 times as long as its OSGP, ours 1.01" in report.against_paper("imagenet")
    assert "hides 60% of its message" in report.hidden("OSGP", 1.2, 1.1, 1.5)
    assert "waits for the whole message" in report.hidden("OSGP", 1.6, 1.1, 1.5) and "all that" in report.hidden("OSGP", 1.0, 1.1, 1.5)


def test_measured_on_links_and_modelled_agree():
    """The committed measurements of hosts that wait; a cell that is off by more than 15% is named here."""
    lines = store.PUBLISHED.find("links")
    off = set()
    for network, part in lines[(lines["network"] == "emulated") & (lines["emulated"] == True)].groupby(store.NETWORK):  # noqa: E712
        even = report.equal(part).all()
        by = part.groupby("row")["milliseconds"]
        ratio = by.median() / cost_model.model(part) if even else by.mean() / straggling.model(part)
        facts = dict(zip(store.NETWORK, network))
        where = facts["hosts"] > 8, facts["straggler"], facts["jitter"]
        off |= {(*where, row) for row, value in ratio.items() if abs(math.log(value)) > math.log(1.15)}
    # rings of many hosts on two cores: docs/runtime.md
    even = {(False, "ar_sgd"), (False, "ar_sgd_after"), (True, "ar_sgd"), (True, "local_sgd"), (True, "slowmo_local_sgd")}
    assert off == {(many, 1.0, 0.0, row) for many, row in even} | {(False, 1.5, 0.0, "ar_sgd")}


def lines(**given):
    facts = {"data": "imagenet", "network": "emulated", "hosts": 4, "node": 1, "rate": "8mbit", "delay": "0.1ms", "straggler": 1.0,
             "jitter": 0.0, "emulated": True, "bytes": MB, "warmup": 4, "iterations": 48, "commit": "abc", "machine": "x"}  # fmt: skip
    facts |= given
    rows = {"compute": 500.0, "osgp": 1100.0, "sgp": 1250.0, "sgp_after": 1700.0, "slowmo_sgp_after,outer.tau=12": 1700.0,
            "ar_sgd_after": 9000.0}  # fmt: skip
    made = [facts | {"row": row, "round": k, "milliseconds": value + k - 1} for row, value in rows.items() for k in range(3)]
    return pd.DataFrame(made)[store.COLUMNS["links"]]


def test_the_model_of_a_measurement_takes_its_compute_and_its_links():
    found = cost_model.model(lines())
    wire = 8 * MB / (cost_model.PAYLOAD * 8e6) + 1e-4 + cost_model.LATENCY
    assert found["compute"] == 500 and found["osgp"] == pytest.approx(1000 * wire)
    assert found["sgp_after"] == pytest.approx(500 + 1000 * wire)
    first = 500 * (1 / 3 + 2 / 3 / 32)  # when the first layer is there, the wire is free and has all to carry
    assert found["sgp"] == pytest.approx(first + 1000 * wire) and found["ar_sgd_after"] > found["sgp_after"]


def test_measurements_stand_beside_model_and_paper():
    text = report.beside(lines())
    table = {line.split(" | ")[0]: line.strip("| ").split(" | ") for line in text.splitlines()}
    assert table["| SGP"][:3] == ["SGP", f"304 ({304 / 271:.2f})", "1250.0 (1.14)"] and table["| SGP"][4] == "1700.0 (1.55) (!)"
    assert table["| SGP + SlowMo, τ = 12"][1:4] == ["", "", ""] and "(!)" in table["| AR-SGD"][4]
    assert max(line.count("|") for line in text.splitlines()) == 7  # six columns
    assert "quartiles within 0.1% of the median" in report.on_links("imagenet", lines())
    assert report.on_links("imagenet", lines(jitter=0.05)).startswith("Not measured")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/links.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="python -m benchmarks.table2"):
        store.Store(tmp_path).read("links")


def test_other_clusters():
    found = cost_model.elsewhere("imagenet", (8, 32), (10, 400), overlap=True)
    grid = found.set_index(["machine", "width", "rate", "nodes", "cell"])
    cell = lambda machine, width, rate, m, name: grid.loc[machine, width, rate, m, name]
    base = ("DGX-1", "float32", 10, 32)
    local = cell(*base, "slowmo_local_sgd")
    assert local["over base"] == 1
    assert local["milliseconds"] / cell(*base, "ar_sgd")["milliseconds"] == pytest.approx(local["over AllReduce"])
    whole = seconds("imagenet_ar_sgd", cost_model.fitted("imagenet"), cost_model.TASKS["imagenet"].size, Links(32), overlap=True, tree=True)
    assert cell(*base, "ar_sgd")["milliseconds"] == pytest.approx(1000 * whole)
    # a link carries half the bytes, and an H100 computes faster: where all of the time is bytes, or none
    assert cell("H100", "bfloat16", 10, 32, "ar_sgd")["milliseconds"] < 0.6 * cell("H100", "float32", 10, 32, "ar_sgd")["milliseconds"]
    fast = cost_model.MACHINES["H100"]["imagenet"]
    ratio = cell("DGX-1", "float32", 400, 8, "slowmo_osgp")["milliseconds"] / cell("H100", "float32", 400, 8, "slowmo_osgp")["milliseconds"]
    assert 10 < ratio < fast * 1.001
    late = cost_model.elsewhere("imagenet", (8, 32), (10, 400), overlap=False)
    assert (late["milliseconds"] >= found["milliseconds"] - 1e-9).all() and (late["milliseconds"] > 1.1 * found["milliseconds"]).any()
    text = report.sentences("imagenet", found)
    assert len(text) == 2 and text[0].startswith("10 Gbit/s: SlowMo pays on DGX-1 nodes in float32 over Local SGD (−")
    assert "on DGX-1 nodes in bfloat16 nowhere" in text[0] and "on DGX-1 nodes in float32 nowhere" in text[1]
    table = report.clusters("imagenet", (8, 32), (10, 400))
    assert "| 400 | 8 | AR-SGD | AR-SGD |" in table and "| 10 | 8 | OSGP + SlowMo, −" in table


def test_what_costs_least_is_clearly_less():
    cells = pd.DataFrame({"cell": ["ar_sgd", "slowmo_sgp", "slowmo_osgp"], "over AllReduce": [1.0, 0.995, 0.992]})
    assert report.least(cells) == ("ar_sgd", 1.0)
    assert report.least(cells.assign(**{"over AllReduce": [1.0, 0.9, 0.8]})) == ("slowmo_osgp", 0.8)


def test_exponents_of_what_grows_with_its_size():
    grid = [("step", m, 10**6, 1e-3 * m) for m in (1, 8, 16, 64)] + [("step", 2, d, d**0.9) for d in (10**4, 10**7, 10**8)]
    grid += [("memory", m, 10**6, 5.0 * m**0.5) for m in (4, 64)] + [("start", 8, 0, 2.5), ("import", 0, 0, 1.2)]
    lines = pd.DataFrame(grid, columns=["what", "m", "d", "value"])
    slower = [("step", 8, 10**6, 3, 1, 16e-3), ("buckets", 2, 10**6, 12, 1, 0.5), ("buckets", 2, 10**6, 12, 9, 0.6)]
    lines = pd.concat([lines, pd.DataFrame(slower, columns=["what", "m", "d", "tau", "buckets", "value"])]).assign(
        commit="abc", machine="x"
    )
    lines.loc[(lines["what"] == "step") & lines["tau"].isna(), "tau"] = 12
    text = report.exponents(lines)
    assert "step against m 1.00, step against d 0.90, memory against m 0.50" in text and "2.5 s" in text and "1.2 s" in text
    assert "by τ: 1.00 (12), 2.00 (3)." in text and "buckets: 1.00 (1), 1.20 (9)." in text
