"""Blocks of README.md and docs/ are made of runs; what stands around them stays."""

import pandas as pd
import pytest
from listed import lines, written

from results import blocks, store, timing


def test_a_block_is_made_anew(tmp_path):
    runs = store.Runs(written(tmp_path, lines("cifar10_small_sgp", [60.0, 61.0])))
    page = tmp_path / "page.md"
    page.write_text("before <!-- a comment -->\n<!-- table1 cifar10_small: python -m results docs -->\nold\n<!-- end -->\nafter\n")
    text = blocks.filled(page, runs)
    assert text.startswith("before <!-- a comment -->\n<!-- table1 cifar10_small") and text.endswith("<!-- end -->\nafter\n")
    assert "60.50" in text and "old" not in text
    page.write_text(text)
    assert blocks.filled(page, runs) == text


def test_a_table_without_runs_is_the_command_that_fills_it(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- table1 cifar10_small: python -m results docs -->\n<!-- end -->\n")
    runs = store.Runs(written(tmp_path, lines("wmt16_small_sgp", [4.0], "train_loss_best")))
    assert "\nNot run yet: `python scripts/reproduce.py table1 --data cifar10_small`.\n<!-- end" in blocks.filled(page, runs)
    diverged = store.Runs(written(tmp_path, lines("cifar10_small_sgp", [60.0], status="diverged")))
    assert "diverged: 1 of 1" in blocks.filled(page, diverged)


@pytest.mark.parametrize(
    "text, remedy",
    [
        ("<!-- table9 cifar10_small: python -m results docs -->\n<!-- end -->\n", "a table table9 cifar10_small that there is not"),
        ("<!-- claims: python -m results docs -->\nold\n", "the block claims has no <!-- end -->"),
        (
            "<!-- claims: python -m results docs -->\nold\n<!-- status: python -m results docs -->\n<!-- end -->\n",
            "the block claims has no",
        ),
    ],
)
def test_what_is_no_block_is_named(text, remedy, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=remedy):
        blocks.filled(page, store.Runs(written(tmp_path, lines("cifar10_small_sgp", [60.0]))))


def test_status_counts_runs_on_the_papers_own_data(tmp_path):
    of_stand_ins = store.Runs(written(tmp_path, lines("imagenet_small_sgp", [60.0])))
    cifar10, imagenet, wmt16 = (line.split(" | ") for line in blocks.status(of_stand_ins).splitlines()[2:])
    assert [line[3] for line in (cifar10, imagenet, wmt16)] == ["no"] * 3
    assert (cifar10[1], imagenet[1], wmt16[1]) == ("7 `cifar10_*`", "10 `imagenet_*`", "6 `wmt16_*`")
    assert (
        cifar10[4] == "`cifar10_small_*`: not run; `cifar10_small_loss_*`: not run |"
        and imagenet[4] == "`imagenet_small_*`: too few seeds |"
    )
    assert wmt16[4] == "`wmt16_small_*`: not run |"
    own = store.Runs(written(tmp_path, lines("cifar10_sgp", [93.0, 94.0])))
    assert [line.split(" | ")[3] for line in blocks.status(own).splitlines()[2:]] == ["2 runs", "no", "no"]


def test_the_matrix_has_a_verdict_for_each_stand_in_with_runs(tmp_path):
    """Translation's claims stand in the line of the same claim on pictures; what was not run has no column."""
    cells = [
        lines(f"cifar10_small_{cell}", [60.0 + k + seed / 100 for seed in range(5)])
        for k, cell in enumerate(("local_sgd", "slowmo_local_sgd"))
    ]
    cells += [
        lines(f"wmt16_small_{cell}", [20.0 + seed / 100 for seed in range(5)], "bleu_test") for cell in ("local_adam", "slowmo_local_adam")
    ]
    page = tmp_path / "page.md"
    page.write_text("<!-- matrix: python -m results docs -->\n<!-- end -->\n")
    head, _, *rows = blocks.filled(page, store.Runs(written(tmp_path, *cells))).splitlines()[1:-1]
    assert head == "| claim | `cifar10_small` | `wmt16_small` |"
    assert "| SlowMo raises the accuracy of Local SGD | **supported** | **equivalent** |" in rows
    assert "| SlowMo raises the accuracy of SGP | **not run** | **not run** |" in rows


def test_table_1_in_the_papers_form_has_a_line_for_each_base(tmp_path):
    cells = [
        lines(f"cifar10_small_{cell}", [60.0 + gain + seed / 100 for seed in range(5)])
        for cell, gain in (("sgp", 0), ("slowmo_sgp", 1), ("ar_sgd", 2))
    ]
    page = tmp_path / "page.md"
    page.write_text("<!-- pairs cifar10_small: python -m results docs -->\n<!-- end -->\n")
    head, _, local, _, sgp, every, *_ = blocks.filled(page, store.Runs(written(tmp_path, *cells))).splitlines()[1:]
    assert head == "|  | training loss, last | + SlowMo | accuracy, last | + SlowMo | change of accuracy | paper | verdict |"
    assert local.endswith("| – | – | – | – |  | +1.47 | not run |")
    assert "| 60.02 ± 0.02 (5) | 61.02 ± 0.02 (5) | +1 ± 0.022 | +0.42 | supported |" in sgp
    assert every == "| AR-SGD | – |  | 62.02 ± 0.02 (5) |  |  |  |  |"


def test_where_two_outcomes_are_primary_both_verdicts_stand(tmp_path):
    """SlowMo raises BLEU clearly and leaves the training loss as it is."""
    cells = (("sgp", 20.0), ("slowmo_sgp", 25.0))
    bleu = [lines(f"wmt16_small_{cell}", [level + seed / 100 for seed in range(5)], "bleu_test") for cell, level in cells]
    losses = [lines(f"wmt16_small_{cell}", [3.0, 3.01, 2.99, 3.02, 2.98], "train_loss_last") for cell, _ in cells]
    for line, other in zip(bleu, losses):
        line["train_loss_last"] = other["train_loss_last"]
    page = tmp_path / "page.md"
    page.write_text("<!-- pairs wmt16_small: python -m results docs -->\n<!-- end -->\n")
    local, sgp = blocks.filled(page, store.Runs(written(tmp_path, *bleu))).splitlines()[3:5]
    assert local.endswith("| not run |") and sgp.endswith("| training loss equivalent, BLEU supported |")


def test_trials_of_beta_stand_beside_their_base_at_its_rate():
    """Two seeds of each: the base at two rates, β at the chosen one alone; a mean with a diverged seed is none."""
    points = [
        *(("sgp", 0.1, None, 60.0, 0.4, False), ("sgp", 0.3, None, 61.0, 0.2, True), ("ar_sgd", 0.3, None, 63.0, 0.1, True)),
        *(("slowmo_sgp", 0.1, 0.4, 70.0, 0.1, False), ("slowmo_sgp", 0.3, 0.2, 62.0, 0.3, True)),
        ("slowmo_sgp", 0.3, 0.8, 50.0, 0.1, False),
    ]
    trials = pd.DataFrame(
        [
            {"experiment": f"cifar10_small_{cell}", "lr": lr, "beta": beta, "seed": seed, "status": "done", "value": value + seed,
             "train_loss_last": loss, "chosen": chosen}
            for cell, lr, beta, value, loss, chosen in points for seed in (0, -1)
        ]
    )  # fmt: skip
    trials.loc[(trials["beta"] == 0.8) & (trials["seed"] == 0), "status"] = "diverged"
    head, _, sgp, every = blocks.trials("cifar10_small", trials).splitlines()
    assert head == "|  | rate | without | β = 0.2 | β = 0.4 | β = 0.8 |"
    assert sgp == "| SGP | 0.3 | 60.50 | **61.50**, × 1.50 |  | diverged |"
    assert every == "| AR-SGD | 0.3 | 62.50 |  |  |  |"
    assert blocks.trials("cifar10_small", trials.iloc[:0]) == "Not run yet: `python scripts/tune.py cifar10_small`.\n"


def test_a_picture_that_is_not_drawn_is_said(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- forest: python -m results docs -->\n<!-- end -->\n<!-- loss cifar10_small: python -m results docs -->\n<!-- end -->\n"
    )
    runs = store.Runs(written(tmp_path, lines("cifar10_small_sgp", [60.0])))
    monkeypatch.setattr(blocks, "PUBLISHED", store.Store(tmp_path / "results"))
    assert blocks.filled(page, runs).count("No figure yet") == 2
    for name in ("forest", "loss_cifar10_small"):
        (tmp_path / f"results/figures/{name}.png").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"results/figures/{name}.png").touch()
    text = blocks.filled(page, runs)
    assert "](results/figures/forest.png)" in text and "](results/figures/loss_cifar10_small.png)" in text and "training loss" in text


def test_what_a_gpu_found_is_a_table_and_what_failed_stands_in_it(tmp_path):
    found = store.Store(tmp_path)
    assert timing.gpu(found).startswith("**Never run on a GPU**")
    about = {"commit": "0123456789ab", "machine": "a GPU"}
    rows = [
        {"part": "resnet18", "what": "one plain model", "m": 1, "batch": 4096, "value": 23000.0, "unit": "pictures/s"},
        {
            "part": "resnet18",
            "what": "graphs",
            "m": 32,
            "batch": 4096,
            "value": 21000.0,
            "unit": "pictures/s",
            "ratio": 0.913,
            "memory": 1.5,
        },
        {"part": "resnet18", "what": "vmap", "m": 32, "batch": 4096, "error": "out of memory"},
    ]
    found.write("gpu", pd.DataFrame([row | about for row in rows], columns=store.COLUMNS["gpu"]))
    text = timing.gpu(found)
    assert "| one plain model | 23,000 pictures/s |  |  |" in text and "| graphs | 21,000 pictures/s | 0.913 | 1.500 |" in text
    assert "| vmap | out of memory |  |  |" in text and "a GPU; commit 0123456789" in text
