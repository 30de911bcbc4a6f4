"""Figures: drawn where there are runs, from the numbers that are there."""

import matplotlib.pyplot as plt
import pytest
from listed import curve, lines, written
from matplotlib.colors import to_rgb

from results import cost_model, figures, store, tables

VISION = ("local_sgd", "slowmo_local_sgd", "osgp", "slowmo_osgp", "sgp", "slowmo_sgp", "ar_sgd")


@pytest.fixture
def path(tmp_path):
    runs = [lines(f"cifar10_small_{cell}", [60.0 + k, 61.0 + k]) for k, cell in enumerate(VISION)]
    runs += [lines(f"cifar10_small_slowmo_sgp,outer.tau={t}", [50.0, 52.0]) for t in (24, 48)]
    curves = [curve(f"cifar10_small_{cell}", seed, 60 + k + seed) for k, cell in enumerate(VISION) for seed in (1, 2)]
    return written(tmp_path, *runs, curves=curves)


def test_what_there_are_runs_for(path, tmp_path, capsys):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/alpha_cifar10_small.png").write_bytes(b"of runs that are gone")
    figures.main(path)
    made = {file.name for file in (tmp_path / "figures").iterdir()}
    assert made == {f"{name}_cifar10_small.{kind}" for name in ("fig2", "loss", "wallclock", "fig3") for kind in ("pdf", "png")} | {
        "teaser.pdf",
        "teaser.png",
        "forest.pdf",
        "forest.png",
    }  # no sweep of α and β
    assert "fig3_cifar10_small" in capsys.readouterr().out


def loaded(path):
    runs = store.Runs(path)
    return runs, store.Curves(runs)


def test_the_teaser_says_how_many_seeds_and_their_interval(path, tmp_path):
    figure = figures.teaser(*loaded(path))
    slow, base = figure.axes[0].lines
    assert (slow.get_label(), base.get_label()) == ("Local SGD + SlowMo (n = 2)", "Local SGD (n = 2)")
    of_seeds = [curve("cifar10_small_slowmo_local_sgd", seed, 61 + seed)["accuracy"].to_numpy() for seed in (1, 2)]
    assert slow.get_ydata() == pytest.approx(sum(of_seeds) / 2)
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    half = 12.706 * abs(of_seeds[1] - of_seeds[0]).max() / 2  # Student's t of two
    assert band.max() == pytest.approx((sum(of_seeds) / 2).max() + half, rel=1e-3)
    plt.close(figure)
    one = written(tmp_path / "one", lines("cifar10_small_local_sgd", [60.0]), curves=[curve("cifar10_small_local_sgd", 1)])
    assert figures.teaser(*loaded(one)) is None


def test_the_band_is_over_workers_and_seeds(path):
    _, curves = loaded(path)
    found, first = curves.of("cifar10_small_sgp"), curve("cifar10_small_sgp", 1, 65.0)
    assert found["seeds"].tolist() == [2] * 10
    assert found["accuracy"].to_numpy() == pytest.approx(first["accuracy"] + 0.5)
    assert found["accuracy_worker_min"].to_numpy() == pytest.approx(first["accuracy"] - 2 + 0.5)
    assert found["accuracy_worker_max"].to_numpy() == pytest.approx(first["accuracy"] + 3 + 0.5)


def test_runs_with_a_band_lend_it_to_the_line(tmp_path):
    """They are fewer and may lie lower or higher: the band keeps its distance to their own averaged model."""
    run, judged = "cifar10_small_sgp", "cifar10_small_sgp,evaluate.band=true"
    path = written(tmp_path, lines(run, [60.0]), lines(judged, [60.0]), curves=[curve(run, 1), curve(judged, 1, 70.0)])
    figure = figures.fig2("cifar10_small", *loaded(path))
    (axis,) = (axis for axis in figure.axes if axis.lines)
    assert axis.lines[0].get_ydata() == pytest.approx(curve(run, 1)["accuracy"])
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    own = curve(judged, 1, 70.0)
    distance = own["accuracy_worker_max"] - own["accuracy"]
    assert band.max() == pytest.approx((curve(run, 1)["accuracy"] + distance).max()) and (distance > 0).any()
    plt.close(figure)


def test_curves_of_runs_that_do_not_count_are_not_drawn(tmp_path):
    path = written(tmp_path, lines("cifar10_small_sgp", [60.0]), lines("cifar10_small_osgp", [1.0], status="diverged"),
                   curves=[curve("cifar10_small_sgp", 1), curve("cifar10_small_sgp", 2), curve("cifar10_small_osgp", 1)])  # fmt: skip
    _, curves = loaded(path)
    assert curves.of("cifar10_small_osgp").empty and curves.of("cifar10_small_sgp")["seeds"].tolist() == [1] * 10


def test_the_grid_of_other_clusters_says_what_costs_least(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "save", lambda figure, out, name: drawn.update({name: [[text.get_text() for text in axis.texts]
                                                                                        for axis in figure.axes]}))  # fmt: skip
    figures.clusters(tmp_path, (8, 64), (1, 400))
    assert set(drawn) == {"runtime_imagenet", "runtime_wmt16"}
    panels = drawn["runtime_imagenet"]
    assert len(panels) == 8 and all(len(panel) == 4 for panel in panels)  # machines and widths, during and after; rates and nodes
    assert panels[0][2:] == ["AR", "AR"] and all(panel[0].startswith("L\n−") for panel in panels)
    during, after = (float(panel[0].split("−")[1].rstrip("%")) for panel in (panels[1], panels[5]))
    assert during < after  # in bfloat16 AllReduce hides some of its bytes


def test_modelled_seconds_are_those_of_the_paper_s_cluster_and_say_so(path):
    runs, curves = loaded(path)
    seconds, how = figures.clock("cifar10_small", "ar_sgd", curves.of("cifar10_small_ar_sgd"))
    assert seconds[-1] == pytest.approx(1200 * cost_model.pace("imagenet", "ar_sgd")) and how.startswith("modelled")
    assert seconds[-1] == pytest.approx(1200 * 0.420, rel=0.15)  # Table 2
    figure = figures.wallclock("cifar10_small", runs, curves)
    assert "modelled" in figure.axes[0].get_xlabel() and len(figure.axes[0].lines) == 8  # AllReduce both ways
    plt.close(figure)


def test_measured_seconds_of_a_cluster(tmp_path):
    path = written(tmp_path, lines("cifar10_sgp", [60.0], processes=32), curves=[curve("cifar10_sgp", 1)])
    runs, curves = loaded(path)
    seconds, how = figures.clock("cifar10", "sgp", curves.of("cifar10_sgp"))
    assert how == "measured" and seconds.iloc[-1] == 60.0


def test_base_and_slowmo_differ_without_colour():
    for data in tables.TITLES:
        cells = tables.table1(data)
        styles = {cell: figures.styled(cell) for cell in cells}
        looks = [(style["linestyle"], style["marker"]) for cell, style in styles.items() if cell.startswith("slowmo_")]
        assert len(set(looks)) == len(looks)
        for cell in (cell for cell in cells if cell.startswith("slowmo_")):
            base = styles[cell.removeprefix("slowmo_")]
            assert base["color"] == styles[cell]["color"] and base["linestyle"] != styles[cell]["linestyle"]


def test_an_algorithm_looks_the_same_in_every_figure():
    looks = [{cell.split("_")[-2 if cell.endswith(("_sgd", "_adam")) else -1]: figures.styled(cell)["color"] for cell in tables.table1(data)
              if not cell.startswith("slowmo_")} for data in tables.TITLES]  # fmt: skip
    merged = {name: color for look in looks for name, color in look.items()}
    assert all(look.items() <= merged.items() for look in looks) and len(set(merged.values())) == len(merged) == 4


def test_the_colours_differ_in_grey():
    """Of the cells in one picture: luminance apart, or another line."""
    with plt.style.context(figures.STYLE):
        colors = plt.rcParams["axes.prop_cycle"].by_key()["color"][:4]
    grey = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in map(to_rgb, colors))
    assert len(set(figures.MARKERS)) >= 4 and grey[-1] - grey[0] > 0.15


def test_no_curves_names_the_remedy(tmp_path):
    path = written(tmp_path, lines("cifar10_small_sgp", [60.0]))
    (tmp_path / "data/curves.csv").unlink()
    with pytest.raises(FileNotFoundError, match="collect makes it"):
        figures.main(path)
    (tmp_path / "data/curves.csv").write_text("a\n1\n")
    with pytest.raises(ValueError, match="other columns"):
        figures.main(path)


def test_the_forest_has_the_papers_change_beside_ours(path):
    figure = figures.forest(store.Runs(path))
    (accuracy,) = (axis for axis in figure.axes if axis.get_xlabel() == "points of accuracy gained")
    points = [line.get_xdata()[0] for line in accuracy.lines if line.get_marker() not in ("None", "")]
    ours, papers = points[::2], points[1::2]
    assert ours == pytest.approx([1.0, 1.0, 1.0])  # a cell after its base in VISION
    assert papers == pytest.approx([93.20 - 91.73, 93.74 - 93.17, 94.32 - 93.90])
    plt.close(figure)


def test_no_forest_of_single_seeds(tmp_path):
    cells = [lines(f"cifar10_small_{cell}", [60.0]) for cell in VISION]
    assert figures.forest(store.Runs(written(tmp_path, *cells))) is None


@pytest.mark.parametrize("data, scale", [("cifar10_small_loss", "log"), ("cifar10_small", "linear")])
def test_training_losses_against_epochs(data, scale, tmp_path):
    curves = [curve(f"{data}_{cell}", 1) for cell in ("sgp", "slowmo_sgp")]
    figure = figures.loss(
        data, *loaded(written(tmp_path, *(lines(f"{data}_{cell}", [60.0]) for cell in ("sgp", "slowmo_sgp")), curves=curves))
    )
    (axis,) = figure.axes
    assert axis.get_yscale() == scale and axis.get_ylabel() == "training loss"
    assert axis.lines[0].get_ydata() == pytest.approx(curves[0]["train_loss"])
    plt.close(figure)
