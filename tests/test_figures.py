"""make_figures.py: every picture is written, and shows what it is said to show."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import make_figures
from conftest import (
    CELL_TYPES,
    OF_SAMPLES,
    TREATED_EVERYWHERE,
    TREATED_HERE,
    assert_one_line_error,
    make_cells,
    run_inside,
)
from counts.genes import HOUSEKEEPING
from counts.markers import markers_of_one_type
from data import Reference
from generation import Model
from make_figures import (
    Settings,
    generate,
    mixing,
    principal_components,
    reconstruct,
)
from models import scGMVAE
from plots import cells as cell_plots
from plots import states as state_figures
from plots import training as training_plots
from plots.style import TYPE_COLORS
from runtime.errors import InputError
from runtime.weights import load_model

pytestmark = pytest.mark.draws
PICTURES = {
    *("pbmc1k", "Latent", "reconstructed", "generated", "labels", "joint", "markers"),
    *("proportions", "sums", "losses", "schematic"),
}


def test_every_picture_is_written_and_no_other_file(tmp_path, trained, h5ad, monkeypatch):
    n_points = {}  # figure -> number of points
    draw = cell_plots.scatter_types

    def record(axis, points, names, cell_types):
        n_points[axis.figure] = len(points)
        return draw(axis, points, names, cell_types)

    monkeypatch.setattr(cell_plots, "scatter_types", record)
    done = run_inside("make_figures.py", "--data", h5ad, "--weights", trained, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.png" for name in PICTURES}
    for name in PICTURES:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    # All cells in each of the four panels; 18 held-out ones and as many generated.
    assert sorted(n_points.values()) == [36, 90, 90, 90, 90]
    assert "generated cells among the 30 nearest neighbours" in done.stdout
    assert "state_genes.png left out: they need --samples and --conditions" in done.stdout


def test_vector_pictures_hold_text_as_text(tmp_path, trained, h5ad):
    """--format svg gives the same pictures under the same names, and no other file."""
    where = ["--data", h5ad, "--weights", trained, "--out", tmp_path]
    done = run_inside("make_figures.py", *where, "--format", "svg", "--max-cells", 30)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.svg" for name in PICTURES}
    assert "joint.svg" in done.stdout and ".png" not in done.stdout
    for name, text in {"joint": "t-SNE 1", "schematic": "genVAE", "losses": "epoch"}.items():
        assert text in (tmp_path / f"{name}.svg").read_text(encoding="utf-8")


def test_only_three_formats():
    assert_one_line_error(
        run_inside("make_figures.py", "--format", "jpg"), "--format", "jpg", "svg"
    )


@pytest.mark.parametrize("n", [100, 600])
def test_layers_of_many_points_are_images_in_vector_files(tmp_path, n):
    points = np.random.default_rng(0).normal(size=(n, 2))
    names = np.repeat(["B", "T"], n // 2)
    for ending in ("svg", "pdf", "png"):
        cell_plots.write_panel(tmp_path / f"a.{ending}", points, names, ["B", "T"], "cells")
    assert (b"<image" in (tmp_path / "a.svg").read_bytes()) == (n > 500)
    pdf = (tmp_path / "a.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and b"/Type3" not in pdf  # fonts whose text can be edited
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_ends_in_one_line(tmp_path, trained, h5ad):
    where = ["--data", h5ad, "--weights", tmp_path / "none", "--out", tmp_path / "out"]
    assert_one_line_error(run_inside("make_figures.py", *where), "bulkEncoder_model.pt")
    assert not (tmp_path / "out").exists()
    assert_one_line_error(run_inside("make_figures.py", "--max-cells", 3), "--max-cells", "3")


@pytest.fixture(scope="module")
def loaded(trained, h5ad):
    cfg = Settings(data=h5ad, weights=trained)
    reference, model = Reference.load(cfg), Model.load(trained)
    parts = reference.cells, reference.codes, model.decoder, model.metadata
    return cfg, *parts, load_model(trained / "scGMVAE_model.pt", scGMVAE)


def test_reconstructed_cells_are_those_cells(loaded):
    """Each is nearer to its own type, and has its own library size up to sampling."""
    _, cells, codes, decoder, card, gmvae = loaded
    for model in (gmvae, None):
        generator = torch.Generator().manual_seed(0)
        X = reconstruct(cells.X, codes, decoder, model, card["genes"], generator)
        assert X.shape == cells.X.shape and X.dtype == np.int32
        rebuilt, real = (np.asarray(x.sum(axis=1)).ravel() for x in (X, cells.X))
        assert np.corrcoef(np.log(rebuilt + 1), np.log(real))[0, 1] > 0.5
        means = np.stack([np.asarray(cells.X[codes == k].mean(axis=0)).ravel() for k in range(3)])
        nearest = np.corrcoef(np.log1p(X.toarray()), np.log1p(means))[:-3, -3:].argmax(axis=1)
        assert np.mean(nearest == codes) > 0.9


def test_generated_panel_is_what_bulk2sc_gives(loaded, tmp_path):
    from anndata import read_h5ad

    cfg, cells, *_ = loaded
    X, types = generate(cfg, 25, cells.n_obs)
    out = tmp_path / "out.h5ad"
    where = ["--data", cfg.data, "--weights", cfg.weights, "--n-cells", 25, "--batch-size", 90]
    assert run_inside("bulk2sc.py", *where, "--out", out).returncode == 0
    direct = read_h5ad(out)
    assert (direct.X != X).nnz == 0 and list(direct.obs["cell_type"]) == list(types)


def test_mixing_is_half_for_the_same_cells_and_none_for_others():
    rng = np.random.default_rng(0)
    generated = np.repeat([False, True], 300)
    points = rng.normal(size=(600, 5))
    assert mixing(points, generated) == pytest.approx(0.5, abs=0.03)
    assert mixing(points + 50 * generated[:, None], generated) == 0


def test_principal_components_tell_types_apart_and_allow_empty_genes():
    cells = make_cells()
    X = cells.X.tolil()
    X[:, 3] = 0
    pcs = principal_components(X.tocsr())
    assert np.isfinite(pcs).all() and pcs.shape == (90, 50)
    names = cells.obs["cell_type"].to_numpy()
    center = {name: pcs[names == name, :3].mean(axis=0) for name in set(names)}
    nearest = [min(center, key=lambda n: np.linalg.norm(p[:3] - center[n])) for p in pcs]
    assert np.mean(np.array(nearest) == names) > 0.9


# ---------------------------------------------------------------------------------- marker genes


def marker_cells(genes, rates):
    """Log-normalised cells (3 x 60, G) with mean counts ``rates`` (3, G); types; gene names."""
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1, 2], 60)
    X = sp.csr_matrix(rng.poisson(np.array(rates)[codes]))
    return make_figures.log_cells(X).X, codes, genes


def test_markers_are_specific_to_their_type():
    """Neither what two types share, nor what all have, nor a housekeeping gene however specific."""
    genes = ["CD79A", "RPS12", "FTL", "MT-CO1", "SHARED", "EVERYWHERE", "REST", "LYZ"]
    rates = [
        [9, 30, 30, 30, 9, 40, 9999, 0.1],
        [0.1, 1, 1, 1, 9, 9, 9999, 9],
        [0.1, 1, 1, 1, 0.1, 9, 9999, 0.3],
    ]
    markers = markers_of_one_type(*marker_cells(genes, rates)[:2], 3, genes)
    assert [[genes[i] for i in own] for own in markers] == [["CD79A"], ["LYZ"], []]


def test_housekeeping_genes_never_mark_a_type():
    never = ["RPS12", "RPL3", "RPLP0", "RPSA", "RPS4X", "MRPL12", "MRPS6", "MT-ND1", "mt-Nd1"]
    never += ["Rps3", "FTL", "FTH1", "MALAT1", "B2M", "TMSB4X", "ACTB", "EEF1A1"]
    assert all(HOUSEKEEPING.match(name) for name in never)
    allowed = ["MTOR", "RPN1", "RPE", "ACTBL2", "B2MX", "LYZ", "MS4A1", "MT1X", "FTLP3", "RPGR"]
    assert not [name for name in allowed if HOUSEKEEPING.match(name)]
    others = [f"GENE{i}" for i in range(60)]
    rates = np.full((3, len(never) + 60), 0.3)  # not common
    rates[0, : len(never)] = 20  # specific, and yet no marker
    markers = markers_of_one_type(*marker_cells(never + others, rates)[:2], 3, never + others)
    assert not set(np.concatenate(markers).astype(int)) & set(range(len(never)))


def test_rare_types_have_no_markers():
    log, codes, genes = marker_cells(["A", "B"], [[9, 0.1], [0.1, 9], [0.1, 0.1]])
    codes = np.where(np.arange(180) < 2, 3, codes)
    assert markers_of_one_type(log, codes, 5, genes)[3:] == [[], []]  # of two cells, and of none
    assert not any(markers_of_one_type(log, np.zeros(180, int), 1, genes))


# ------------------------------------------------------------------------------------ the palette

TO_LMS = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.63]])
TO_LAB = np.array([[0.2105, 0.7936, -0.0041], [1.978, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])
# Protanopia and deuteranopia, Machado et al., IEEE TVCG 2009, severity 1; linear RGB.
BLIND = [
    [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.052]],
    [[0.3673, 0.8606, -0.228], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
]


def distances(colors, seen_as=None):
    """Distances in Oklab between colours "#RRGGBB" (n), as (n, n) with inf on the diagonal."""
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colors])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = linear if seen_as is None else (linear @ np.transpose(seen_as)).clip(0, 1)
    lab = np.cbrt(linear @ TO_LMS.T) @ TO_LAB.T
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=2)
    return apart + np.diag(np.full(len(colors), np.inf))


def test_colours_of_thirty_types_can_be_told_apart():
    """Oklab distances, black to white 1; neighbours in the legend are farther apart than others."""
    for n, least in ((12, 0.15), (20, 0.11), (30, 0.09)):
        apart = distances(TYPE_COLORS[:n])
        assert apart.min() > least and np.diag(apart, 1).min() > 0.12
    for blind in BLIND:
        apart = distances(TYPE_COLORS[:30], blind)
        assert apart.min() > 0.05 and np.diag(apart, 1).min() > 0.08
    assert distances([*TYPE_COLORS[:30], "#FFFFFF"])[-1].min() > 0.1  # pale dots would vanish


# ------------------------------------------------------------- a donor's cells under two conditions

CONDITIONS = [*OF_SAMPLES, "--conditions", "treatment"]


def test_states_of_a_held_out_donor(tmp_path, trained_samples, sample_h5ad, monkeypatch):
    """Both pictures, with the cells of donor d4 and as many generated, and the changed genes."""
    shown, save = {}, make_figures.save

    def record(cfg, name, write, *arguments):
        shown[name] = arguments
        save(cfg, name, write, *arguments)

    monkeypatch.setattr(make_figures, "save", record)
    where = ["--data", sample_h5ad, "--weights", trained_samples, "--out", tmp_path]
    done = run_inside("make_figures.py", *where, *CONDITIONS, "--states-only")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"states.png", "state_genes.png"}

    points, names, cell_types, origins, caption = shown["states"]
    assert points.shape == (144, 2) and list(cell_types) == CELL_TYPES  # 2 x 3 x 12 real cells
    groups = [f"{o}, {c}" for o in ("real", "generated") for c in ("control", "treated")]
    assert list(dict.fromkeys(origins)) == groups  # the order of the colours
    counts = pd.crosstab(np.array(origins), np.array(names))
    assert (counts.to_numpy() == 12).all()
    assert "donor d4" in caption and caption in done.stdout

    table, genes, types, conditions, donor = shown["state_genes"]
    treated = [f"GENE{i}" for part in (TREATED_HERE, TREATED_EVERYWHERE) for i in range(60)[part]]
    assert len(genes) == 5 and set(genes) <= set(treated)
    assert (conditions, donor) == (("control", "treated"), "d4")
    assert {name: tuple(n) for name, n in types.items()} == dict.fromkeys(CELL_TYPES, (12, 12))
    assert table["real"].shape == (3, 2, 3, 5) and table["expected"].shape == (2, 3, 5)
    value, low, high = table["generated"]
    assert (low <= value).all() and (value <= high).all()
    # Generated cells of the first type, which responds to all of these genes, respond as well.
    for values in (value, table["expected"], table["real"][0]):
        assert np.mean(values[1, 0] - values[0, 0]) > 0.8


def test_asked_genes_are_checked_first(tmp_path, trained_samples, sample_h5ad):
    where = ["--data", sample_h5ad, "--weights", trained_samples, "--out", tmp_path / "out"]
    flags = [*where, *CONDITIONS, "--states-only", "--state-genes", "GENE3", "NOGENE"]
    assert_one_line_error(run_inside("make_figures.py", *flags), "--state-genes", "NOGENE", "GENE0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        (["--donors", "donor"], "--samples"),
        (["--conditions", "treatment"], "--samples"),
        (["--contrast", "a", "b"], "--conditions"),
        (["--state-genes", "GENE1"], "--conditions"),
        (["--states-only"], "--conditions"),
    ],
)
def test_flags_of_states_need_others(flags, needed):
    assert_one_line_error(run_inside("make_figures.py", *flags), flags[0], needed)


def find(rows, capsys, **settings):
    """find_donor in cells (sample, donor, condition, held out); and what it printed."""
    obs = pd.DataFrame([row[:3] for row in rows], columns=["sample", "donor", "condition"])
    held_out = np.array([row[3] for row in rows])
    defaults = {"samples": "s", "conditions": "c", "contrast": None, "weights": "w"}
    defaults |= {"format": "png"}
    settings = SimpleNamespace(**defaults | settings)
    return state_figures.find_donor(obs, held_out, settings), capsys.readouterr().out


def test_donor_with_both_conditions_is_found(capsys):
    rows = [
        *(("d1a", "d1", "a", False), ("d1b", "d1", "b", False)),
        *(("d2a", "d2", "a", True), ("d2b", "d2", "b", False)),  # held out in part
        *(("d3a", "d3", "a", True), ("d3a", "d3", "a", True)),  # one condition alone
        *(("d10a", "d10", "a", True), ("d10b", "d10", "b", True)),
        *(("d4b", "d4", "b", True), ("d4 a2", "d4", "a", True), ("d4 a10", "d4", "a", True)),
    ]
    found, printed = find(rows, capsys)
    assert (found.donor, found.samples) == ("d4", ("d4 a2", "d4b")) and not printed
    found, _ = find(rows, capsys, contrast=("b", "a"))
    assert (found.conditions, found.samples) == (("b", "a"), ("d4b", "d4 a2"))
    assert find(rows[:-3], capsys)[0].donor == "d10"


def test_without_a_donor_a_line_says_why(capsys):
    rows = [("d1a", "d1", "a", False), ("d1b", "d1", "b", False), ("d2a", "d2", "a", True)]
    for given, words in (
        ({}, "w holds out no donor with samples of both a and b"),
        ({"conditions": None}, "they need --samples and --conditions"),
        ({"samples": None}, "they need --samples and --conditions"),
    ):
        found, printed = find(rows, capsys, **given)
        assert found is None and printed.count("\n") == 1 and words in printed
    found, printed = find([rows[0], rows[2]], capsys)
    assert found is None and "has a alone" in printed


def test_of_several_conditions_two_must_be_named(capsys):
    rows = [(f"d1{c}", "d1", c, True) for c in "abc"]
    with pytest.raises(InputError, match="--contrast.*3 conditions"):
        find(rows, capsys)
    with pytest.raises(InputError, match="--contrast.*x"):
        find(rows, capsys, contrast=("a", "x"))
    assert find(rows, capsys, contrast=("c", "a"))[0].samples == ("d1c", "d1a")


def test_bulks_are_sums_of_all_cells(tmp_path):
    """Unlabelled cells count as well, and the genes are the model's."""
    cells = make_cells()
    cells.obs["cell_type"] = np.where(np.arange(90) < 30, "Unknown", cells.obs["cell_type"])
    cells.obs["sample"] = np.tile(["s1", "s2", "s3"], 30)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    settings = Settings(data=tmp_path / "cells.h5ad", samples="sample")
    genes = ["GENE7", "absent", "GENE0"]
    bulk = state_figures.sum_all_cells(settings, ("s3", "s1"), genes)
    values = bulk.dense()
    sums = [cells.X[i::3].sum(axis=0).A1 for i in (2, 0)]
    columns = cells.var_names.get_indexer(["GENE7", "GENE0"])
    assert (values[:, [0, 2]] == np.array(sums)[:, columns]).all()
    assert list(bulk.measured) == [True, False, True] and not values[:, 1].any()


def test_state_mixing_is_a_quarter_each_for_the_same_cells_and_a_half_for_others():
    rng = np.random.default_rng(0)
    condition = np.repeat([0, 1], 150)
    points = rng.normal(size=(600, 5))

    def shares(points):
        return state_figures.state_mixing(make_figures.nearest_neighbors(points), condition)

    assert shares(points) == pytest.approx(np.full((2, 2), 0.25), abs=0.03)
    apart = points + 50 * np.tile(condition, 2)[:, None]
    assert shares(apart) == pytest.approx(np.array([[0.5, 0], [0.5, 0]]), abs=0.03)
    alone = points + 50 * np.repeat([0, 1], 300)[:, None]  # generated cells away from real ones
    assert shares(alone) == pytest.approx(np.array([[0.5, 0.5], [0, 0]]), abs=0.03)


def test_standard_error_of_cpm_is_that_of_the_bootstrap():
    rng = np.random.default_rng(0)
    library = rng.lognormal(7, 0.5, 60).round()
    X = rng.poisson(library[:, None] * np.array([0.02, 0.001, 0]))
    mean, error = state_figures.mean_cpm(X, library)
    assert mean == pytest.approx(1e6 * X.sum(axis=0) / library.sum())
    draws = rng.integers(60, size=(2000, 60))
    bootstrap = 1e6 * X[draws].sum(axis=1) / library[draws].sum(axis=1)[:, None]
    assert error == pytest.approx(bootstrap.std(axis=0), rel=0.1)
    one_cell = state_figures.mean_cpm(X[:1], library[:1])
    assert np.isfinite(one_cell).all() and (one_cell[1] == 0).all()


def test_state_table_holds_the_cells_of_each_group():
    X = np.array([[10, 90], [30, 70], [0, 100], [50, 50]])
    codes, condition = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    expected = np.full((2, 2, 2), 0.5)
    counts = sp.csr_matrix(X), sp.csr_matrix(X[:, ::-1])
    cells = state_figures.DonorCells(None, codes, condition, *counts, expected)
    table = state_figures.state_table(cells, [0], [0, 1])
    assert 2 ** table["real"][0, :, :, 0] == pytest.approx(1e4 * np.array([[10, 0], [30, 50]]) + 10)
    assert 2 ** table["generated"][0, 0, 1, 0] == pytest.approx(1e6 + 10)
    assert 2 ** table["expected"] == pytest.approx(np.full((2, 2, 1), 5e5 + 10))


def test_types_with_too_few_cells_or_beyond_the_largest_are_not_shown(monkeypatch):
    n_cells = np.array([[9, 4, 30, 5, 0], [9, 90, 3, 40, 0]])
    assert list(state_figures.shown_types(n_cells)) == [0, 3]
    monkeypatch.setattr(state_figures, "MAX_TYPES", 1)
    assert list(state_figures.shown_types(n_cells)) == [3]


def test_default_genes_are_shown_if_the_model_has_all_of_them():
    reference = SimpleNamespace(genes=["X", *state_figures.STATE_GENES])
    assert state_figures.pick_genes((), reference, "ab") == list(state_figures.STATE_GENES)
    assert state_figures.pick_genes(("X", "CD14", "X"), reference, "ab") == ["X", "CD14"]


# ------------------------------------------------------------------------------------------- losses


@pytest.fixture
def drawn(monkeypatch):
    """The figures of losses and evaluation, in place of files."""
    figures = []
    monkeypatch.setattr(
        training_plots, "write_whole_figure", lambda path, figure: figures.append(figure)
    )
    yield figures
    for figure in figures:
        cell_plots.pyplot().close(figure)


def shown_text(figure):
    """All words of a figure, in one line."""
    texts = figure.findobj(cell_plots.pyplot().Text)
    return " ".join(" ".join(text.get_text().split()) for text in texts)


def test_what_losses_are_read_beside_shares_their_panels(tmp_path, drawn):
    """The constant answer's losses are lines with their name in the panels of mu, var and pi."""
    names = ("mu", "var", "pi")
    beside = {f"constant_{name}": 3.0 for name in names} | {"noise_mu": 0.5}
    rows = [
        {"epoch": i} | dict.fromkeys(names, 2.0) | {f"held_out_{n}": 2.5 for n in names} | beside
        for i in (25, 50)
    ]
    training_plots.write_losses(tmp_path / "bulkEncoder", rows)
    table = pd.read_csv(tmp_path / "bulkEncoder_loss.csv")
    assert list(table) == ["step", *list(rows[0])[1:]]
    training_plots.write_curves(tmp_path / "losses.png", {"bulkEncoder": table})
    assert len(drawn) == 2
    for figure in drawn:
        titles = [axis.get_title(loc="left") for axis in figure.axes]
        assert titles == ["Bulk Encoder: μ̂ₖ", "Bulk Encoder: σ̂ₖ²", "Bulk Encoder: π̂"]
        flat = [[y.get_ydata()[0] for y in a.lines if y.get_color() == "0.35"] for a in figure.axes]
        assert flat == [[3.0, 0.5], [3.0], [3.0]]
        styles = [y.get_linestyle() for y in figure.axes[0].lines if y.get_color() == "0.35"]
        assert styles == ["--", ":"]
        legend = [text.get_text() for text in figure.legends[0].texts]
        assert legend == ["training", "held out, never trained on"]
        text = shown_text(figure)
        assert text.count("ends 17 % below") == 3 and "sampling noise of the target" in text


def test_losses_have_no_empty_panel_and_say_what_they_count(tmp_path, drawn):
    """A loss of 0 throughout has no panel, and a line says so; steps are not called epochs."""
    zero = {"mu": 0.0, "var": 0.0, "held_out_mu": 0.0, "held_out_var": None}
    rows = [{"epoch": i, "pi": 1.0 / i, "deconvolved": 2.0} | zero for i in (25, 50)]
    training_plots.write_losses(tmp_path / "bulkEncoder", rows)
    epochs = [{"epoch": i, "reconstruction": 9.0 / i} for i in range(1, 5)]
    # The csv of an earlier version calls steps epochs, too.
    curves = {"scDecoder": pd.DataFrame(epochs), "bulkEncoder": pd.DataFrame(rows)}
    training_plots.write_curves(tmp_path / "losses.png", curves)
    assert [len(figure.axes) for figure in drawn] == [2, 3]
    for figure in drawn:
        for axis in figure.axes:
            assert any(np.ptp(y.get_ydata()) or y.get_ydata()[0] for y in axis.lines)
            assert axis.get_xlabel() and axis.get_ylabel() and axis.get_title(loc="left")
        assert "Not drawn: Bulk Encoder, μ̂ₖ and σ̂ₖ²" in shown_text(figure)
    assert drawn[1].axes[0].get_xlabel().startswith("epoch")
    assert {axis.get_xlabel().split()[0] for axis in drawn[0].axes} == {"step"}
    assert [text.get_text() for text in drawn[0].legends[0].texts][:1] == ["training"]


@pytest.mark.parametrize(
    ("held_out", "words"),
    [
        ([9, 4, 5], "lowest at epoch 2, ends 25.0 % higher"),
        ([9, 5, 4.0], "ends at its lowest"),
        ([None] * 3, ""),
    ],
)
def test_picture_says_whether_the_held_out_loss_rises(tmp_path, drawn, held_out, words):
    rows = [
        {"epoch": i + 1, "reconstruction": 3.0 - i, "held_out_reconstruction": value}
        for i, value in enumerate(held_out)
    ]
    training_plots.write_losses(tmp_path / "scDecoder", rows)
    text = shown_text(drawn[0])
    assert words in text and ("no early stopping" in text) == ("higher" in words)
    assert ("held out" in text) == bool(words)


# -------------------------------------------------------------------------------------- evaluation


def test_evaluation_is_grouped_and_says_what_is_better(tmp_path, drawn):
    """Headings in a fixed order, bulk2sc first, the constant answer last; what is better."""
    rows = [
        *(("proportions CCC", 1, name, 0.5, 0.1, "within") for name in ("constant answer", "X")),
        ("proportions CCC", 1, "bulk2sc", 0.9, np.nan, "within"),
        *((m, b, "bulk2sc", 0.6, 0.1, "") for m, b in (("MMD2, PCs", 0), ("macro-F1", 1))),
        *(("random-forest AUROC, PCs", 0.5, n, 0.7, 0.1, "") for n in ("scVI", "bulk2sc")),
        ("within-type variance ratio", 1, "bulk2sc", 0.7, 0.1, ""),
        ("excess of AUROC, PCs", 0, "bulk2sc", -0.1, 0.1, ""),
        ("fold-change slope", 1, "bulk2sc", 1.1, 0.1, ""),
    ]
    columns = ["metric", "best", "method", "mean", "std", "setting"]
    training_plots.write_evaluation(tmp_path / "e.png", pd.DataFrame(rows, columns=columns))
    [figure] = drawn
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert list(panels) == [
        *("MMD2, PCs", "random-forest AUROC, PCs", "excess of AUROC, PCs"),
        *("within-type variance ratio", "macro-F1", "fold-change slope", "CCC"),
    ]
    better = {title: axis.get_xlabel() for title, axis in panels.items()}
    assert "lower is better" in better["MMD2, PCs"] and "higher is better" in better["macro-F1"]
    assert better["random-forest AUROC, PCs"] == "0.5 is best"
    assert better["within-type variance ratio"] == better["fold-change slope"] == "1 is best"
    assert better["excess of AUROC, PCs"] == "0 is best"
    names = [text.get_text() for text in panels["CCC"].get_yticklabels()]
    assert names == ["bulk2sc", "X", "constant answer"]
    text = shown_text(figure)
    assert text.index("Realism: can") < text.index("Cell types:") < text.index("Proportions:")
