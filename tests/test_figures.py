"""make_figures.py: every picture is written, and shows what it is said to show."""

import numpy as np
import pytest
import torch

import plotting
from conftest import assert_one_line_error, make_cells, run_inside
from data import codes_of, load_cells
from generation import load_weights
from make_figures import Settings, generate, mixing, principal_components, reconstruct
from models import scGMVAE
from runtime.weights import load_model

PICTURES = {
    *("pbmc1k", "Latent", "reconstructed", "generated", "labels", "joint", "markers"),
    *("proportions", "sums", "losses", "schematic"),
}


def test_every_picture_is_written_and_no_other_file(tmp_path, trained, h5ad, monkeypatch):
    n_points = {}  # figure -> number of points
    draw = plotting.scatter_types

    def record(axis, points, names, cell_types):
        n_points[axis.figure] = len(points)
        return draw(axis, points, names, cell_types)

    monkeypatch.setattr(plotting, "scatter_types", record)
    done = run_inside("make_figures.py", "--data", h5ad, "--weights", trained, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.png" for name in PICTURES}
    for name in PICTURES:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    # All cells in each of the four panels; 18 held-out ones and as many generated; 100 x 3 points.
    assert sorted(n_points.values()) == [36, 90, 90, 90, 90, 300]
    assert "generated cells among the 30 nearest neighbours" in done.stdout


def test_bad_input_ends_in_one_line(tmp_path, trained, h5ad):
    where = ["--data", h5ad, "--weights", tmp_path / "none", "--out", tmp_path / "out"]
    assert_one_line_error(run_inside("make_figures.py", *where), "scDecoder_model.pt")
    assert not (tmp_path / "out").exists()
    assert_one_line_error(run_inside("make_figures.py", "--max-cells", 3), "--max-cells", "3")


@pytest.fixture(scope="module")
def loaded(trained, h5ad):
    cfg = Settings(data=h5ad, weights=trained)
    cells = load_cells(cfg)
    codes, cell_types = codes_of(cells)
    decoder, card, *_ = load_weights(trained, cells, cell_types, "cpu")
    return cfg, cells, codes, decoder, card, load_model(trained / "scGMVAE_model.pt", scGMVAE)


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
