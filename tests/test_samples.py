"""References of many samples: readers, donors held out, moments, pseudobulks, states, trainings."""

import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import bulk2sc
import generation
import train_encoder
from conftest import (
    CELL_TYPES,
    OF_SAMPLES,
    ROOT,
    assert_one_line_error,
    make_sample_bulks,
    make_sample_cells,
    run_inside,
)
from counts.genes import choose_state_genes
from counts.pseudobulks import batch_bulks_of_samples
from data import (
    Reference,
    TrainingSettings,
    align_genes,
    choose_held_out,
    load_cells,
)
from generation import Model
from models import BulkEncoder, encode_cells, scGMVAE
from readers.labels import FOUND_FILE
from runtime.errors import InputError
from runtime.weights import load_model
from states.directions import fit_states, group_bulks
from states.moments import SampleMoments, mix_moments, sample_moments, shrink_moments
from states.pseudobulks import BulkCells, draw_from_samples, draw_samples, simulate_bulks
from test_distributed import assert_files_close, final_messages, start_two
from test_interruption import FILE, UNIT, left_behind, same_weights, stop_at

# A few steps of each training, for tests of splits and files. Fewer genes than there are, so that
# they are chosen.
FEW = {
    "train_gmvae.py": [
        *("--epochs", 3, "--vae-epochs", 1, "--batch-size", 32, "--n-hidden", 16),
        *("--n-latent", 3, "--n-genes", 50),
    ],
    "train_decoder.py": ["--epochs", 2, "--batch-size", 32, "--n-hidden", 16, "--n-components", 2],
    "train_encoder.py": [
        *("--steps", 4, "--batch-size", 32, "--n-hidden", 16),
        *("--n-genes", 30, "--n-state-genes", 20),
    ],
}
STAGES = list(FEW)


@pytest.fixture(autouse=True)
def few_state_bulks(monkeypatch):
    """States are learned from fewer bulks, a second faster each."""
    monkeypatch.setattr(train_encoder, "N_STATE_BULKS", 320)


def train_few(h5ad, weights, *flags, **extra):
    """Run the three trainings for a few steps; extra: further flags, by the script's stem.

    Returns:
        what they printed, in one text.
    """
    texts = []
    for script, few in FEW.items():
        more = extra.get(script.removesuffix(".py"), [])
        done = run_inside(script, "--data", h5ad, "--weights", weights, *flags, *few, *more)
        assert done.returncode == 0, (script, done.stderr[-2000:])
        texts.append(done.stdout + done.stderr)
    return "\n".join(texts)


def card(weights, script):
    """All that the model's file of a stage holds."""
    return torch.load(weights / f"{FILE[script][0]}_model.pt", weights_only=True)


def equal(a, b):
    """Whether two dicts hold the same tensors, to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def write(path, cells):
    cells.write_h5ad(path)
    return path


def load(path, **settings):
    """Cells as the trainings read them."""
    return load_cells(TrainingSettings(data=str(path), **settings))


@pytest.fixture(scope="session")
def few(tmp_path_factory, sample_h5ad):
    """Weights after a few steps of the three trainings, donor d2 held out."""
    weights = tmp_path_factory.mktemp("few")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_encoder, "N_STATE_BULKS", 320)
        named = ["--held-out-donors", "d2"]
        train_few(sample_h5ad, weights, *OF_SAMPLES, train_gmvae=named)
    return weights


# ------------------------------------------------------------------------------------- reading


def test_samples_donors_and_conditions_are_read_from_columns_or_tables(sample_h5ad, tmp_path):
    cells = make_sample_cells()
    lines = [
        f"{barcode},{sample},{donor}"
        for barcode, sample, donor in zip(
            cells.obs_names, cells.obs["sample"], cells.obs["donor"], strict=True
        )
    ]
    table = tmp_path / "samples.csv"
    table.write_text("\n".join(["barcode,sample,donor", *lines]) + "\n")
    by_column = load(sample_h5ad, samples="sample", donors="donor")
    by_table = load(sample_h5ad, samples=str(table), donors=str(table))
    for read in (by_column, by_table):
        assert list(read.obs["sample"].astype(str)) == list(cells.obs["sample"])
        assert list(read.obs["donor"].astype(str)) == list(cells.obs["donor"])
    reference = Reference(by_table)
    names = reference.samples
    assert names == sorted(set(cells.obs["sample"])) and len(names) == 8
    assert [names[code] for code in reference.sample] == list(cells.obs["sample"])
    assert list(reference.by_sample(reference.codes_in("donor"))) == [0, 0, 1, 1, 2, 2, 3, 3]
    alone = load(sample_h5ad, samples="sample")  # each sample a donor of its own
    assert list(alone.obs["donor"]) == list(cells.obs["sample"])
    settings = TrainingSettings(data=str(sample_h5ad), samples="sample")
    settings.conditions = "treatment"  # a setting of evaluate.py
    assert list(load_cells(settings).obs["condition"]) == list(cells.obs["treatment"])


@pytest.mark.parametrize("backed", [False, True])
def test_cells_without_a_sample_are_counted_and_left_out(tmp_path, capsys, backed):
    """And with them a cell type that only such cells are of."""
    cells = make_sample_cells(4)
    unknown = (cells.obs["cell_type"] == CELL_TYPES[1]).to_numpy()
    unknown[[0, 1]] = True
    cells.obs.loc[unknown, "sample"] = "NA"
    read = load(write(tmp_path / "cells.h5ad", cells), samples="sample", backed=backed)
    assert list(read.obs_names) == list(cells.obs_names[~unknown])
    assert Reference.of(read).cell_types == [CELL_TYPES[0], CELL_TYPES[2]]
    assert f"{unknown.sum()} of 96 cells have no sample and are left out" in capsys.readouterr().out
    rows = cells.obs_names[~unknown] + ",a\n"
    (tmp_path / "samples.csv").write_text("barcode,sample\n" + "".join(rows) + "elsewhere,b\n")
    read = load(tmp_path / "cells.h5ad", samples=str(tmp_path / "samples.csv"))
    assert list(read.obs_names) == list(cells.obs_names[~unknown])
    assert Reference.of(read).samples == ["a"]  # the other one has no cell


def test_columns_named_sample_and_donor_mean_nothing_without_the_flag(sample_h5ad):
    """Regression: a reference with such columns was split by donors though no flag said so."""
    cells = load(sample_h5ad)
    reference = Reference.of(cells)
    assert not reference.sample.any() and len(reference.sample) == 288
    assert reference.samples == ["all cells"]
    mask, fraction = choose_held_out(cells, Reference.of(cells).codes, TrainingSettings())
    assert fraction == 0.2 and mask.sum() == 57
    assert len(set(make_sample_cells().obs["donor"][mask])) == 4


def test_samples_and_donors_in_numbers_keep_their_order(tmp_path):
    cells = make_sample_cells(2)
    number = {f"d{i}": 5 * i for i in range(1, 5)}
    cells.obs["donor"] = cells.obs["donor"].map(number)
    read = load(write(tmp_path / "cells.h5ad", cells), samples="donor")
    assert Reference.of(read).samples == ["5", "10", "15", "20"]


BAD_TABLES = {
    "empty.csv": "",
    "header.csv": "barcode,sample\n",
    "foreign.csv": "barcode,sample\nAAA-1,s1\nCCC-1,s2\n",
    "twice.csv": "barcode,sample\nCELL000-1,s1\nCELL000-1,s2\n",
    "three.csv": "cell,who,donor\nCELL000-1,s1,d1\n",
}


ALL_OUT = ["--held-out-donors", "d1", "d2", "d3", "d4"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--samples", "batch"], ["--samples batch", "neither a file nor a column", "treatment"]),
        (["--samples", ""], ["--samples", "neither a file nor a column"]),
        (["--samples", "empty.csv"], ["empty.csv", "not a readable table"]),
        (["--samples", "header.csv"], ["header.csv", "none of its 0 barcodes"]),
        (["--samples", "foreign.csv"], ["foreign.csv", "AAA-1", "CELL"]),
        (["--samples", "twice.csv"], ["twice.csv", "two different labels", "CELL000-1"]),
        (["--samples", "three.csv"], ["three.csv", "barcode and sample"]),
        (["--samples", "nothing"], ["--samples nothing", "found no cell with a sample"]),
        (["--samples", "of_unlabelled"], ["of_unlabelled", "no labelled cell with a sample"]),
        (["--samples", "sample", "--donors", "who"], ["--donors who", "neither a file nor"]),
        (["--samples", "treatment", "--donors", "donor"], ["--donors donor", "several", "control"]),
        (["--samples", "sample", "--donors", "gaps"], ["--donors gaps", "none", "d1 control"]),
        (["--donors", "donor"], ["--donors", "found no --samples"]),
        (["--held-out-donors", "d1"], ["--held-out-donors", "found no --samples"]),
        ([*OF_SAMPLES, "--held-out-donors", "d1", "d9"], ["found d9", "d1, d2, d3, d4"]),
        ([*OF_SAMPLES, "--held-out-donors", "d1", "--held-out", 0.5], ["--held-out as well"]),
        ([*OF_SAMPLES, "--held-out-donors", "d3"], ["every cell of rare", "(d3)"]),
        ([*OF_SAMPLES, *ALL_OUT], ["every cell of B cells"]),
        ([*OF_SAMPLES, "--n-types", 3, *ALL_OUT], ["every cell of any type"]),
    ],
)
def test_samples_that_cannot_be_used_are_one_line_errors(bad_samples, flags, words):
    weights = bad_samples / "weights"
    done = run_inside(
        "train_gmvae.py", "--data", "cells.h5ad", "--weights", weights, *flags, cwd=bad_samples
    )
    assert_one_line_error(done, *words)
    assert not weights.exists()


@pytest.fixture(scope="module")
def bad_samples(tmp_path_factory):
    """A folder with cells whose columns, and with tables that, cannot be used in some way."""
    folder = tmp_path_factory.mktemp("bad")
    cells = make_sample_cells(2)
    obs = cells.obs
    first = obs.index[(obs["sample"] == "d1 control") & (obs["cell_type"] == CELL_TYPES[0])][0]
    obs["nothing"] = " "
    obs["gaps"] = obs["donor"].where(obs.index != first, "")
    obs["of_unlabelled"] = np.where(obs.index == obs.index[-1], "s1", "NA")
    obs.loc[obs.index[-1], "cell_type"] = "Unknown"
    of_d3 = obs.index[obs["donor"] == "d3"][:2]
    obs.loc[of_d3, "cell_type"] = "rare"
    write(folder / "cells.h5ad", cells)
    for name, text in BAD_TABLES.items():
        (folder / name).write_text(text)
    return folder


def test_a_condition_that_differs_within_a_sample_is_an_error(sample_h5ad):
    settings = TrainingSettings(data=str(sample_h5ad), samples="donor")
    settings.conditions = "treatment"
    with pytest.raises(InputError, match=r"--conditions treatment: found several .* in sample d1"):
        load_cells(settings)


# --------------------------------------------------------------------------- donors held out


def held_out_donors(cells, **settings):
    """Names of the donors that are held out of cells; none of their cells is trained on."""
    cfg = TrainingSettings(samples="sample", **settings)
    mask, fraction = choose_held_out(cells, Reference.of(cells).codes, cfg)
    names = set(cells.obs["donor"][mask])
    assert not names & set(cells.obs["donor"][~mask]) and fraction == mask.mean()
    return names


def test_a_fraction_holds_out_whole_donors(sample_h5ad):
    cells = load(sample_h5ad, samples="sample", donors="donor")
    assert [len(held_out_donors(cells, held_out=f)) for f in (0, 0.01, 0.5, 0.99)] == [0, 1, 2, 3]
    assert len(held_out_donors(cells)) == 1
    chosen = [frozenset(held_out_donors(cells, seed=seed)) for seed in range(20)]
    assert len(set(chosen)) == 4 and chosen[3] == held_out_donors(cells, seed=3)
    named = held_out_donors(cells, held_out_donors=("d4", "d2", "d4"))
    assert named == {"d2", "d4"}


def test_a_donor_whose_cells_training_needs_is_never_drawn(tmp_path):
    """Regression: this ended in an error about a flag that was not given."""
    cells = make_sample_cells(2)
    only = (cells.obs["cell_type"] != CELL_TYPES[0]) | (cells.obs["donor"] == "d2")
    path = write(tmp_path / "cells.h5ad", cells[only.to_numpy()].copy())
    cells = load(path, samples="sample", donors="donor")
    for seed in range(10):
        assert "d2" not in held_out_donors(cells, held_out=0.75, seed=seed)


def test_cells_are_held_out_where_all_samples_are_of_one_donor(tmp_path):
    cells = make_sample_cells(10)
    path = write(tmp_path / "cells.h5ad", cells[(cells.obs["donor"] == "d1").to_numpy()].copy())
    cells = load(path, samples="sample", donors="donor")
    mask, fraction = choose_held_out(cells, Reference.of(cells).codes, TrainingSettings())
    assert fraction == 0.2 and list(cells.obs["cell_type"][mask].value_counts()) == [4, 4, 4]


def test_no_stage_trains_on_a_cell_of_a_held_out_donor(few, sample_h5ad, tmp_path, monkeypatch):
    """Other counts in these cells change no weight; bulks that are only looked at come from them.

    The latter are drawn by a generator of their own here, as the numbers they take from the common
    one depend on their counts.
    """
    cells = make_sample_cells()
    held_out = (cells.obs["donor"] == "d2").to_numpy()
    for script in STAGES:
        assert card(few, script)["held_out"] == list(cells.obs_names[held_out])
        assert card(few, script)["held_out_fraction"] == 0.25
    names = [f"d{i} {condition}" for i in (1, 3, 4) for condition in ("control", "treated")]
    assert card(few, "train_gmvae.py")["samples"]["names"] == names
    really, seen = train_encoder.simulate_test_bulks, []

    def apart(model, cells, cfg, rng):
        seen.append(cells)
        return really(model, cells, cfg, np.random.default_rng(0))

    monkeypatch.setattr(train_encoder, "simulate_test_bulks", apart)
    X = cells.X.toarray()
    X[held_out] = X[held_out][:, ::-1]
    cells.X = sp.csr_matrix(X)
    for name, data in (("same", sample_h5ad), ("other", write(tmp_path / "c.h5ad", cells))):
        shutil.copytree(few, tmp_path / name)
        scripts = STAGES[2:] if name == "same" else STAGES
        for script in scripts:
            flags = ["--data", data, "--weights", tmp_path / name, *OF_SAMPLES, *FEW[script]]
            flags += ["--held-out-donors", "d2"] * (script == STAGES[0])
            assert run_inside(script, *flags).returncode == 0
    assert (seen[0].X != seen[1].X).nnz > 0  # or nothing was compared
    assert not any(cells.mixed for cells in seen)  # so that raw moments are those of one sample
    for script, same in zip(STAGES, (few, few, tmp_path / "same"), strict=True):
        assert equal(card(same, script)["state"], card(tmp_path / "other", script)["state"])
    moments = [card(folder, STAGES[0])["samples"] for folder in (few, tmp_path / "other")]
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in ("mu", "var"))


def test_later_stages_take_the_split_from_the_file(few, sample_h5ad, tmp_path):
    """Without --samples as well, and whatever the seed; other donors are an error."""
    for script in STAGES[1:]:
        shutil.copytree(few, tmp_path / "w")
        flags = ["--data", sample_h5ad, "--weights", tmp_path / "w", *FEW[script]]
        # One donor of four: another seed would draw another one, but none is drawn.
        for extra in ([], [*OF_SAMPLES, "--held-out", 0.25, "--seed", 5]):
            done = run_inside(script, *flags, *extra)
            assert done.returncode == 0 and "216 training cells" in done.stdout
            assert card(tmp_path / "w", script)["held_out"] == card(few, script)["held_out"]
        other = ["--held-out-donors", "d1"], ["--held-out-donors", "d1", "d2"], ["--held-out", 0.5]
        for extra in other:
            done = run_inside(script, *flags, *OF_SAMPLES, *extra)
            assert_one_line_error(done, "_model.pt", "other donors held out")
        shutil.rmtree(tmp_path / "w")


def test_counts_of_several_donors_shrink_the_means_of_genes(few, sample_h5ad, tmp_path):
    """Without --samples the same network gives types the very means of their cells."""
    shutil.copytree(few, tmp_path / "w")
    flags = ["--data", sample_h5ad, "--weights", tmp_path / "w", *FEW[STAGES[1]]]
    assert run_inside(STAGES[1], *flags).returncode == 0
    shrunk, plain = (card(folder, STAGES[1])["state"] for folder in (few, tmp_path / "w"))
    for name in shrunk:
        same = torch.equal(shrunk[name], plain[name])
        assert same == (name not in ("type_log_factor", "type_log_theta")), name
    factors = [part["type_log_factor"].abs().mean() for part in (shrunk, plain)]
    assert factors[0] < factors[1]


def test_stage_3_needs_a_stage_1_of_the_same_samples(few, sample_h5ad, tmp_path):
    shutil.copytree(few, tmp_path / "w")
    flags = ["--data", sample_h5ad, "--weights", tmp_path / "w", *FEW[STAGES[2]]]
    done = run_inside(STAGES[2], *flags, "--samples", "donor")
    assert_one_line_error(done, "scGMVAE_model.pt", "6 samples", "found 3", "d1, d3, d4")
    content = card(few, STAGES[0])
    mu = content["state"]["mu"]
    torch.save(content | {"state": content["state"] | {"mu": mu + 1}}, tmp_path / "w" / "g.pt")
    shutil.move(tmp_path / "w" / "g.pt", tmp_path / "w" / "scGMVAE_model.pt")
    done = run_inside(STAGES[2], *flags, *OF_SAMPLES)
    assert_one_line_error(done, "scGMVAE_model.pt", "another Gaussian mixture")
    del content["samples"]
    torch.save(content, tmp_path / "w" / "scGMVAE_model.pt")
    done = run_inside(STAGES[2], *flags, *OF_SAMPLES)
    assert_one_line_error(done, "scGMVAE_model.pt", "trained without --samples")


# --------------------------------------------------------------------------- unusual samples


def with_samples(cells, names):
    cells.obs["sample"] = names
    return cells


def test_one_sample_works_as_none(tmp_path):
    """Weights are the same to the bit, and cells, not donors, are held out."""
    path = write(tmp_path / "cells.h5ad", with_samples(make_sample_cells(6), "only"))
    train_few(path, tmp_path / "without")
    text = train_few(path, tmp_path / "with", "--samples", "sample")
    assert "1 samples, 1 donors" in text
    for script in STAGES:
        one, none = card(tmp_path / "with", script), card(tmp_path / "without", script)
        assert equal(one["state"], none["state"]) and one["held_out"] == none["held_out"]
        assert len(one["held_out"]) == 30 and "n_state" not in one["config"]
    # Its own moments are the mixture's.
    stage_1 = card(tmp_path / "with", STAGES[0])
    samples, state = stage_1["samples"], stage_1["state"]
    torch.testing.assert_close(samples["mu"][0], state["mu"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(samples["var"][0], state["log_var"].exp(), rtol=1e-3, atol=0)


def test_two_samples_of_one_donor(tmp_path):
    cells = make_sample_cells(10)
    path = write(tmp_path / "cells.h5ad", cells[(cells.obs["donor"] == "d3").to_numpy()].copy())
    text = train_few(path, tmp_path / "w", *OF_SAMPLES)
    assert "2 samples, 1 donors" in text and "samples of one donor: the encoder answers" in text
    assert "n_state" not in card(tmp_path / "w", STAGES[2])["config"]
    assert card(tmp_path / "w", STAGES[0])["samples"]["names"] == ["d3 control", "d3 treated"]


def test_one_cell_per_sample_says_nothing_of_states(tmp_path):
    """Regression: directions were learned from the rounding error of moments that are all equal."""
    cells = make_sample_cells(6)
    path = write(tmp_path / "cells.h5ad", with_samples(cells, list(cells.obs_names)))
    text = train_few(path, tmp_path / "w", "--samples", "sample")
    assert "144 samples, 144 donors" in text and "held out: 29 of 144 donors" in text
    assert "the encoder answers with the cell types' moments" in text
    assert "n_state" not in card(tmp_path / "w", STAGES[2])["config"]
    content = card(tmp_path / "w", STAGES[0])
    assert content["samples"]["mu"].shape == (115, 3, 3)
    mu = content["state"]["mu"].expand(115, 3, 3)
    torch.testing.assert_close(content["samples"]["mu"], mu, rtol=1e-4, atol=1e-4)


def test_five_hundred_samples(tmp_path):
    cells = make_sample_cells(42)[:1000].copy()
    names = np.array([f"s{i}" for i in range(500)])[np.arange(1000) % 500]
    path = write(tmp_path / "cells.h5ad", with_samples(cells, names))
    text = train_few(path, tmp_path / "w", "--samples", "sample")
    assert "500 samples" in text and "held out: 100 of 500 donors" in text
    assert card(tmp_path / "w", STAGES[0])["samples"]["mu"].shape == (400, 3, 3)
    assert torch.isfinite(card(tmp_path / "w", STAGES[2])["state"]["pi_head.weight"]).all()


def test_a_type_that_a_sample_lacks_has_the_moments_of_the_type(tmp_path):
    cells = make_sample_cells(8)
    lacks = (cells.obs["sample"] == "d1 control") & (cells.obs["cell_type"] == CELL_TYPES[2])
    path = write(tmp_path / "cells.h5ad", cells[~lacks.to_numpy()].copy())
    train_few(path, tmp_path / "w", *OF_SAMPLES, train_gmvae=["--held-out-donors", "d3"])
    content = card(tmp_path / "w", STAGES[0])
    samples, state = content["samples"], content["state"]
    assert samples["names"][0] == "d1 control" and samples["n_cells"][0].tolist() == [8, 8, 0]
    torch.testing.assert_close(samples["mu"][0, 2], state["mu"][2])
    torch.testing.assert_close(samples["var"][0, 2], state["log_var"][2].exp())


def test_types_found_without_labels_go_with_samples(sample_h5ad, tmp_path):
    """Regression: labels in the file made every donor look as if it held all cells of a type.

    And with a single type found, whose proportion is always 1, the last message divided by zero.
    """
    weights = tmp_path / "w"
    text = train_few(sample_h5ad, weights, *OF_SAMPLES, train_gmvae=["--n-types", 1])
    assert "held out: 1 of 4 donors" in text and (weights / FOUND_FILE).exists()
    assert card(weights, STAGES[0])["samples"]["n_cells"].sum() == 216
    assert card(weights, STAGES[2])["cell_types"] == card(weights, STAGES[0])["cell_types"]
    assert len(card(weights, STAGES[2])["cell_types"]) == 1


# ------------------------------------------------------- other ways to train, the same weights


def test_backed_trainings_are_those_in_memory(few, sample_h5ad, tmp_path):
    named = ["--held-out-donors", "d2"]
    train_few(sample_h5ad, tmp_path / "w", *OF_SAMPLES, "--backed", train_gmvae=named)
    for script in STAGES:
        assert equal(card(few, script)["state"], card(tmp_path / "w", script)["state"])
        assert same_weights(few, tmp_path / "w", script)
    samples = [card(folder, STAGES[0])["samples"] for folder in (few, tmp_path / "w")]
    assert samples[0].pop("names") == samples[1].pop("names")
    assert equal(*samples)


@pytest.mark.parametrize(("script", "step"), [(STAGES[0], 11), (STAGES[1], 9), (STAGES[2], 2)])
def test_stopped_run_resumes_to_the_same_weights(
    few, sample_h5ad, tmp_path, monkeypatch, script, step
):
    weights = tmp_path / "w"
    shutil.copytree(few, weights)
    (weights / f"{FILE[script][0]}_model.pt").unlink()
    flags = ["--data", sample_h5ad, "--weights", weights, *OF_SAMPLES, *FEW[script], "--resume"]
    flags += ["--held-out-donors", "d2"] * (script == STAGES[0])
    with monkeypatch.context() as patch:
        stop_at(patch, signal.SIGTERM, step)
        assert run_inside(script, *flags).returncode == 128 + signal.SIGTERM
    assert left_behind(weights) == [f"{FILE[script][0]}_checkpoint.pt"]
    done = run_inside(script, *flags)
    assert done.returncode == 0 and f"going on at {UNIT[script]} " in done.stdout
    assert same_weights(weights, few, script) and left_behind(weights) == []
    if script == STAGES[0]:
        samples = [card(folder, script)["samples"] for folder in (few, weights)]
        assert samples[0].pop("names") == samples[1].pop("names") and equal(*samples)
    assert "nothing left to do" in run_inside(script, *flags).stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", STAGES)
def test_two_processes_train_as_one(few, sample_h5ad, tmp_path, monkeypatch, script):
    """Each process learns the same states from bulks of its own."""
    monkeypatch.undo()  # the processes of torchrun learn from as many bulks
    for name in ("one", "two"):
        shutil.copytree(few, tmp_path / name)
    data = ["--data", sample_h5ad, *OF_SAMPLES, *FEW[script]]
    data += ["--held-out-donors", "d2"] * (script == STAGES[0])
    assert run_inside(script, *data, "--weights", tmp_path / "one").returncode == 0
    process, _ = start_two(script, *data, "--weights", tmp_path / "two")
    assert final_messages(process) == [] and process.returncode == 0
    assert_files_close(tmp_path / "two", tmp_path / "one", script)
    if script == STAGES[0]:
        one, two = (card(tmp_path / name, script)["samples"] for name in ("one", "two"))
        torch.testing.assert_close(two["mu"], one["mu"], rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------- moments


def simulate_samples(n, tau2, rng, n_samples=40, n_latent=6):
    """Cells of one type in samples whose means vary by tau2, within which cells vary by 1.

    Returns:
        means of the samples (S, D), and their raw moments and the type's, mu and var (1, D).
    """
    truth = rng.normal(0, np.sqrt(tau2), (n_samples, n_latent))
    sizes = rng.integers(1, 2 * n, n_samples)
    sample = np.repeat(np.arange(n_samples), sizes)
    z = truth[sample] + rng.normal(0, np.sqrt(0.9), (len(sample), n_latent))
    raw = sample_moments(z, np.full_like(z, 0.1), 0 * sample, sample, (n_samples, 1))
    return truth, raw, z.mean(axis=0)[None], 0.1 + z.var(axis=0)[None]


def test_raw_moments_are_the_closed_form_of_the_mixture():
    """E[m] and E[v] + Var[m] over the cells of a sample and type, as stage 1 has it of types."""
    rng = np.random.default_rng(0)
    mean, var = rng.normal(3, 1, (50, 4)), rng.gamma(2, 1, (50, 4))
    codes, sample = rng.integers(2, size=50), rng.integers(3, size=50)
    codes[sample == 2] = 0
    moments = sample_moments(mean, var, codes, sample, (4, 2))
    for s in range(4):
        for k in range(2):
            inside = (sample == s) & (codes == k)
            assert moments.n_cells[s, k] == inside.sum()
            if not inside.any():
                assert not moments.mu[s, k].any() and not moments.var[s, k].any()
                continue
            np.testing.assert_allclose(moments.mu[s, k], mean[inside].mean(axis=0))
            expected = var[inside].mean(axis=0) + mean[inside].var(axis=0)
            np.testing.assert_allclose(moments.var[s, k], expected)


def test_no_cell_gives_the_types_moments_and_thousands_give_their_own():
    """Regression: with few samples the variances of well-filled ones came out too small."""
    rng = np.random.default_rng(1)
    sizes, truth = [5000, 5000, 0, 3], np.array([-2.0, 2.0, 0.0, 1.0])
    sample = np.repeat(np.arange(4), sizes)
    z = truth[sample, None] + rng.normal(0, np.where(sample == 0, 0.5, 1.0)[:, None], (10003, 3))
    raw = sample_moments(z, np.full_like(z, 1e-4), 0 * sample, sample, (4, 1))
    mu, var = z.mean(axis=0)[None], z.var(axis=0)[None]
    shrunk = shrink_moments(raw, mu, var)
    np.testing.assert_allclose(shrunk.mu[:2], raw.mu[:2], atol=0.01)
    np.testing.assert_allclose(shrunk.var[:2], raw.var[:2], rtol=0.02)
    np.testing.assert_array_equal(shrunk.mu[2], mu)
    np.testing.assert_allclose(shrunk.var[2], var)
    assert (shrunk.var > 0).all()
    distance = abs(shrunk.mu[3] - raw.mu[3])
    assert (distance > 0).all()  # three cells are shrunk


def test_samples_that_do_not_differ_have_the_types_means():
    """Exactly, where sampled cells explain more than all of the difference between them."""
    cells = np.tile([-1.0, 1.0], 20)[:, None]  # every sample has mean 0
    sample = np.repeat(np.arange(4), 10)
    raw = sample_moments(cells, np.full((40, 1), 0.1), 0 * sample, sample, (4, 1))
    mu, var = np.zeros((1, 1)), np.full((1, 1), 1.1)
    shrunk = shrink_moments(raw, mu, var)
    np.testing.assert_array_equal(shrunk.mu, np.zeros((4, 1, 1)))
    np.testing.assert_allclose(shrunk.var, 1.1, rtol=0.01)


@pytest.mark.parametrize(("n", "tau2"), [(3, 0.1), (3, 1.0), (20, 0.1), (20, 1.0)])
def test_shrunk_means_are_nearer_to_the_truth_than_either(n, tau2):
    rng = np.random.default_rng(2)
    truth, raw, mu, var = simulate_samples(n, tau2, rng)
    shrunk = shrink_moments(raw, mu, var)
    error = [np.mean((part[:, 0] - truth) ** 2) for part in (shrunk.mu, raw.mu)]
    constant = np.mean((mu - truth) ** 2)
    assert error[0] < 0.98 * min(error[1], constant)
    best = np.mean(tau2 / (1 + tau2 * raw.n_cells))  # of the posterior mean with known variances
    assert error[0] < 1.4 * best


def test_variances_of_few_cells_are_shrunk_too():
    rng = np.random.default_rng(3)
    _, raw, mu, var = simulate_samples(4, 0.5, rng)
    shrunk = shrink_moments(raw, mu, var)
    error = [np.mean(np.log(part.var) ** 2) for part in (shrunk, raw)]  # the truth is 1
    assert error[0] < 0.2 * error[1]
    single = raw.n_cells[:, 0] == 1  # whose raw variance is that of their posterior alone
    assert single.any() and (shrunk.var[single] > 0.5).all()


def test_moments_of_a_mixture_are_those_of_its_cells():
    rng = np.random.default_rng(4)
    mean, var = rng.normal(0, 1, (60, 3)), rng.gamma(2, 1, (60, 3))
    sample, codes = np.repeat([0, 1, 2], [10, 20, 30]), rng.integers(2, size=60)
    raw = sample_moments(mean, var, codes, sample, (3, 2))
    used = sample > 0
    pooled = sample_moments(mean[used], var[used], codes[used], 0 * sample[used], (1, 2))
    share = raw.n_cells * [[0], [1], [1]]
    mu, v = mix_moments((share / share.sum(axis=0))[None], raw)
    np.testing.assert_allclose(mu, pooled.mu)
    np.testing.assert_allclose(v, pooled.var)


# --------------------------------------------------------------------------------- pseudobulks


@pytest.fixture
def tagged():
    """Cells of three samples and two types, each with a gene of its own; sample 1 lacks type 1."""
    group = np.repeat([0, 1, 2, 4, 5], 8)  # sample * 2 + type
    X = sp.csr_matrix((np.ones(40, np.float32), (np.arange(40), group)), shape=(40, 6))
    rng = np.random.default_rng(0)
    n = np.bincount(group, minlength=6).reshape(3, 2)
    moments = SampleMoments(n, rng.normal(0, 1, (3, 2, 4)), rng.gamma(2, 1, (3, 2, 4)))
    return BulkCells(X, group % 2, 2, group // 2, moments)


def test_bulks_are_of_one_sample_or_two(tagged):
    rng = np.random.default_rng(0)
    share = draw_samples(tagged, 400, rng)
    np.testing.assert_allclose(share.sum(axis=1), 1)
    n_samples = (share > 0).sum(axis=1)
    assert set(n_samples) == {1, 2} and 0.4 < np.mean(n_samples == 2) < 0.6
    assert (share > 0).any(axis=0).all()
    tagged.mixed = False
    assert ((draw_samples(tagged, 50, rng) > 0).sum(axis=1) == 1).all()
    some = draw_samples(tagged.take(np.flatnonzero(tagged.sample != 1)), 100, rng)
    assert not some[:, 1].any()  # a sample without cells here, as one that is held out


@pytest.mark.parametrize("pool", [None, 3])
def test_targets_of_bulks_are_the_moments_of_their_cells(tagged, pool):
    """Counts are of the samples that the bulk claims, and of no type that they lack."""
    rng, n = np.random.default_rng(1), 60
    share = draw_samples(tagged, n, rng)
    pools = None if pool is None else np.full(n, pool)
    counts, bulks = draw_from_samples(tagged, share, np.full(n, 50), pools, rng)
    drawn = counts.reshape(n, 3, 2) / 50  # each gene counts the cells of one sample and type
    np.testing.assert_allclose(drawn.sum(axis=1), bulks.pi, atol=1e-6)
    np.testing.assert_allclose(drawn.sum(axis=2), bulks.share, atol=1e-6)
    assert not drawn[:, 1, 1].any() and (bulks.share[share == 0] == 0).all()
    for b in range(n):
        for k in range(2):
            of_type = drawn[b, :, k]
            weight = of_type if of_type.any() else bulks.share[b]
            mu, var = mix_moments(
                np.broadcast_to((weight / weight.sum())[:, None], (1, 3, 2)), tagged.moments
            )
            np.testing.assert_allclose(bulks.mu[b, k], mu[0, k], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(bulks.var[b, k], var[0, k], rtol=1e-5, atol=1e-6)


def test_simulated_bulks_without_samples_have_the_mixture_as_target(tagged):
    cfg = train_encoder.Settings(batch_size=8)
    alone = BulkCells(tagged.X, tagged.codes, 2)
    bulks = simulate_bulks(alone, cfg, np.random.default_rng(0))
    model = SimpleNamespace(mu=torch.zeros(2, 4), var=torch.ones(2, 4))
    mu, var, pi = bulks.target(model)
    assert mu is model.mu and var is model.var and torch.equal(pi, torch.from_numpy(bulks.pi))
    bulks = simulate_bulks(tagged, cfg, np.random.default_rng(0))
    assert bulks.target(model)[0].shape == (8, 2, 4) and bulks.counts.shape == (8, 6)


def test_held_out_losses_are_over_types_of_samples_that_are_drawn():
    """Regression: where the one large sample was in no bulk, no type counted, and losses were nan.

    Where it is in one, only its moments are worth a comparison.
    """
    sample = np.r_[np.arange(60), np.full(30, 60)]
    X = sp.csr_matrix(np.ones((90, 5), np.float32))
    raw = sample_moments(np.zeros((90, 3)), np.ones((90, 3)), 0 * sample, sample, (61, 1))
    model = SimpleNamespace(mu=torch.zeros(1, 3), var=torch.ones(1, 3))
    cells = BulkCells(X, 0 * sample, 1, sample, raw, mixed=False)
    cfg = train_encoder.Settings(batch_size=1)
    for seed in range(5):
        test = train_encoder.simulate_test_bulks(model, cells, cfg, np.random.default_rng(seed))
        assert test.known.any() and np.isfinite(list(test.beside.values())).all()
        drawn = test.bulks.share.argmax(axis=1)
        assert test.known[:, 0].tolist() == [60 not in drawn or s == 60 for s in drawn]


def test_state_genes_differ_between_samples_not_between_types():
    cells = make_sample_cells()
    cells.var_names = [f"RPL{i}" if i == 52 else f"GENE{i}" for i in range(60)]
    codes = cells.obs["cell_type"].map(CELL_TYPES.index).to_numpy()
    sample = np.unique(cells.obs["sample"], return_inverse=True)[1]
    genes = choose_state_genes(cells, codes, sample, 15)
    treated = {f"GENE{i}" for i in (*range(10, 20), *range(50, 60))}
    # Some others differ as well: where these rise, all others have a smaller share of the counts.
    assert len(genes) == 15 and len(treated & set(genes)) >= 11 and "RPL52" not in genes
    assert genes == [name for name in cells.var_names if name in genes]
    shuffled = np.random.default_rng(0).permutation(sample)
    assert len(choose_state_genes(cells, codes, shuffled, 60)) < 40  # most differ by chance alone
    assert choose_state_genes(cells, codes, np.arange(len(codes)), 60) == []  # one cell each


# -------------------------------------------------------------------------------------- states


def simulate_states(rng, n_donors=10, n_genes=40, noise=0.5):
    """Log-ratios of bulks that two hidden directions of donors show in, and their moments.

    Returns:
        ratio (n, G), mu and log_var (n, 2, 3), donor (n).
    """
    donor = np.repeat(np.arange(n_donors), 30)
    hidden = rng.normal(0, 1, (n_donors, 2))[donor] * rng.uniform(0.5, 1.5, (len(donor), 1))
    ratio = hidden @ rng.normal(0, 0.5, (2, n_genes)) + 0.3
    ratio += rng.normal(0, noise, ratio.shape)
    mu = (hidden @ rng.normal(0, 1, (2, 6))).reshape(-1, 2, 3)
    return ratio, mu, 0.2 * mu, donor


def predict(states, ratio):
    """mu (n, K, D) that States give for log-ratios (n, G)."""
    return np.einsum("nr,rkd->nkd", (ratio - states.center) @ states.weight, states.mu)


def test_states_are_found_in_noisy_log_ratios():
    """A linear map of rank 2, learned from eight donors, tells the states of two others."""
    ratio, mu, log_var, donor = simulate_states(np.random.default_rng(0))
    known = donor < 8
    states, left = fit_states(ratio[known], mu[known], log_var[known], donor[known] % 5)
    assert left < 0.3 and states.weight.shape == (40, 2)
    error = predict(states, ratio[~known]) - mu[~known]
    assert np.mean(error**2) < 0.2 * np.mean(mu[~known] ** 2)
    np.testing.assert_allclose(states.share.sum(axis=0), 1)
    np.testing.assert_allclose(states.log_var, 0.2 * states.mu, atol=0.02)


def test_states_that_no_bulk_shows_are_not_learned():
    rng = np.random.default_rng(1)
    ratio, mu, log_var, donor = simulate_states(rng)
    unrelated = rng.normal(0, 1, (10, 2, 3))[donor]
    states, left = fit_states(ratio, unrelated, log_var, donor % 5)
    assert states is None and left >= 1
    one_group = np.where(donor < 5, 0, -1)  # the others are of several groups
    states, left = fit_states(ratio, mu, log_var, one_group)
    assert states is None and np.isnan(left)


def test_moments_that_differ_by_rounding_alone_teach_nothing():
    ratio, mu, log_var, donor = simulate_states(np.random.default_rng(2))
    assert fit_states(ratio, 1e-7 * mu, log_var, donor % 5)[0] is None
    assert fit_states(ratio, 0 * mu, 0 * log_var, donor % 5)[0] is None


def test_bulks_are_grouped_by_donor():
    """Two donors are two groups, however many more are held out; a mixture of both is neither."""
    donor = np.repeat(np.arange(12), 2)  # of each sample
    share = np.zeros((6, 24))
    share[[0, 1, 2, 3], [4, 5, 20, 21]] = 1
    share[4, [4, 5]] = 0.5  # two samples of one donor
    share[5, [5, 20]] = 0.5
    for seed in range(200):
        group = group_bulks(share, donor, np.random.default_rng(seed))
        assert group[0] == group[1] == group[4] >= 0 and group[2] == group[3] >= 0
        assert group[0] != group[2] and group[5] == -1


# -------------------------------------------------------------------------- the Bulk Encoder


@pytest.fixture
def encoder(trained_samples):
    """The Bulk Encoder of a reference of samples, bulks of all of them (8, G), and their names."""
    model, content = load_model(trained_samples / "bulkEncoder_model.pt", BulkEncoder)
    table = make_sample_bulks(make_sample_cells())
    bulk = torch.from_numpy(table.loc[content["genes"]].to_numpy().T.copy()).float()
    return model, bulk, list(table.columns)


@torch.no_grad()
def test_encoder_answers_with_the_state_of_an_unseen_donor(trained_samples, encoder):
    """Moments of control and treated bulks are nearer to those of their own cells than the types'.

    In units of each type's variance, over the donor that no stage has seen.
    """
    model, bulk, names = encoder
    gmvae, content = load_model(trained_samples / "scGMVAE_model.pt", scGMVAE)
    cells = make_sample_cells()
    X, _ = align_genes(cells.X, cells.var_names, content["genes"], "cells")
    mean, var = (part.numpy() for part in encode_cells(gmvae, X))
    codes = cells.obs["cell_type"].map(CELL_TYPES.index).to_numpy()
    sample = cells.obs["sample"].map(names.index).to_numpy()
    own = sample_moments(mean, var, codes, sample, (8, 3))
    mu, var, _ = (part.numpy() for part in model(bulk))
    for s in (names.index("d4 control"), names.index("d4 treated")):
        error = np.mean((mu[s] - own.mu[s]) ** 2 / model.var.numpy(), axis=1)  # (K)
        constant = np.mean((model.mu.numpy() - own.mu[s]) ** 2 / model.var.numpy(), axis=1)
        assert (error < 0.5 * constant).all(), (names[s], error, constant)
        error, constant = (
            np.mean((np.log(v) - np.log(own.var[s])) ** 2) for v in (var[s], model.var.numpy())
        )
        assert error < constant


def test_losses_stand_beside_those_of_the_constant_answer(trained_samples):
    curve = np.genfromtxt(trained_samples / "bulkEncoder_loss.csv", delimiter=",", names=True)
    last = curve[-1]
    for name in ("mu", "var", "pi"):
        assert 0 < last[f"held_out_{name}"] < 0.5 * last[f"constant_{name}"]
    assert 0 < last["noise_mu"] < last["constant_mu"]


@torch.no_grad()
def test_absent_genes_do_not_pull_the_state_to_zero(encoder):
    """With half of what shows a direction, t is about as long as with all of it."""
    model, bulk, names = encoder
    treated = np.array([name.endswith("treated") for name in names])

    def contrast(present):
        fractions = model.normalise(bulk, present)
        first = model.deconvolve(fractions, present)
        t = model.state(model.ratio_to(first @ model.signature, fractions, present), present)
        return (t[treated] - t[~treated]).mean(dim=0)  # (R)

    full, rng = contrast(torch.ones(bulk.shape[1])), np.random.default_rng(0)
    r = int(full.abs().argmax())
    lengths, shares = [], []
    for _ in range(20):
        half = torch.ones(bulk.shape[1])  # half of those genes that show it best
        half[model.state_share[:, r].topk(16).indices[rng.permutation(16)[:8]]] = 0
        lengths.append(float(contrast(half)[r] / full[r]))
        shares.append(float((half @ model.state_share)[r]))
    assert np.mean(shares) < 0.65 and 0.85 < np.mean(lengths) < 1.15


@torch.no_grad()
def test_encoder_without_states_is_as_it_was():
    """Shipped files are from before there were samples: no n_state, no samples, no new tensors."""
    model, content = load_model(ROOT / "weights" / "bulkEncoder_model.pt", BulkEncoder)
    assert model.n_state == 0 and "samples" not in content and "n_state" not in content["config"]
    assert not any(name.startswith("state") for name in model.state_dict())
    bulk = torch.rand(4, len(content["genes"]), generator=torch.Generator().manual_seed(0))
    mu, var, _ = model(bulk)
    x = torch.log1p(model.normalise(bulk, torch.ones_like(model.profile)) * 1e4) - model.center
    h = model.hidden((x / model.scale).clamp(-6, 6))
    assert torch.equal(mu, model.mu + model.mu_head(h).view(mu.shape))
    assert torch.equal(var, model.var * model.var_head(h).view(mu.shape).clamp(-5, 5).exp())
    with_states = BulkEncoder(**content["config"], n_state=2)
    with_states.load_state_dict(model.state_dict(), strict=False)
    for a, b in zip(with_states.eval()(bulk), model(bulk), strict=True):
        assert torch.equal(a, b)  # directions that lead nowhere


@torch.no_grad()
def test_states_move_means_by_standard_deviations_and_variances_by_factors():
    """Along each direction, on top of what the heads have learned."""
    torch.manual_seed(0)
    model = BulkEncoder(30, 3, 4, n_hidden=8, dropout=0.0, n_state=2).eval()
    model.signature.copy_(model.scale_signature(torch.rand(3, 30)))
    model.mu.normal_(), model.var.uniform_(0.5, 2)
    bulk, present = torch.rand(5, 30), torch.ones(30)
    plain = model(bulk)
    assert torch.equal(plain[0], model.mu.expand(5, 3, 4))
    for name in ("weight", "mu", "log_var"):
        getattr(model, f"state_{name}").normal_(0, 0.1)
    fractions = model.normalise(bulk, present)
    ratio = model.ratio_to(
        model.deconvolve(fractions, present) @ model.signature, fractions, present
    )
    t = ratio @ model.state_weight  # (S, R)
    mu, var, pi = model(bulk)
    moved = torch.einsum("sr,rkd->skd", t, model.state_mu) * model.var.sqrt()
    torch.testing.assert_close(mu, model.mu + moved)
    factor = torch.einsum("sr,rkd->skd", t, model.state_log_var).exp()
    torch.testing.assert_close(var, model.var * factor)
    assert torch.equal(pi, plain[2]) and t.abs().max() > 0.1


def broken_samples(samples):
    """What a file says of its samples, each time wrong in one way."""
    for name in ("n_cells", "mu", "var"):
        value = samples[name]
        yield samples | {name: value[:-1]}
        yield samples | {name: value[:, :-1]}
        yield samples | {name: value[..., None]}
        yield samples | {name: value * torch.nan}
        yield samples | {name: value * torch.inf}
        yield samples | {name: value.double()}
        yield samples | {name: torch.zeros(1).expand(value.shape)[:1].expand(value.shape)}
        yield samples | {name: value.tolist()}
        yield {key: part for key, part in samples.items() if key != name}
    yield samples | {"n_cells": samples["n_cells"] - 100}
    yield samples | {"var": -samples["var"]}
    yield samples | {"var": 0 * samples["var"]}
    yield samples | {"names": ["same"] * len(samples["names"])}
    yield samples | {"names": samples["names"][:-1]}
    yield samples | {"names": ["a\0b", *samples["names"][1:]]}
    yield samples | {"names": list(range(len(samples["names"])))}
    yield samples | {"names": None}
    yield {key: part for key, part in samples.items() if key != "names"}
    yield []
    yield "all of them"


def test_broken_samples_in_a_file_end_in_one_line(few, sample_h5ad, tmp_path):
    path, content = tmp_path / "scGMVAE_model.pt", card(few, STAGES[0])
    for samples in broken_samples(content["samples"]):
        torch.save(content | {"samples": samples}, path)
        with pytest.raises(InputError, match="scGMVAE_model.pt: its parts do not fit together"):
            load_model(path, scGMVAE)
    torch.save(content, path)
    assert load_model(path, scGMVAE)[1]["samples"]["names"] == content["samples"]["names"]
    shutil.copytree(few, tmp_path / "w")
    torch.save(content | {"samples": {"names": []}}, tmp_path / "w" / path.name)
    flags = ["--data", sample_h5ad, "--weights", tmp_path / "w", *OF_SAMPLES, *FEW[STAGES[2]]]
    assert_one_line_error(run_inside(STAGES[2], *flags), path.name, "do not fit together")


def test_bulks_of_reference_cells_are_of_one_sample_each():
    cells, rng = make_sample_cells(), np.random.default_rng(0)
    sample = np.unique(cells.obs["sample"], return_inverse=True)[1]
    keep = np.flatnonzero((sample > 0) | (np.cumsum(sample == 0) <= 5))  # five cells of the first
    X, sample = cells.X[keep], sample[keep]
    parts = list(batch_bulks_of_samples(X, sample, 20, 50, rng, 16))
    bulk, members = (np.concatenate(part) for part in zip(*parts, strict=True))
    assert bulk.shape == (50, cells.n_vars) and members.shape == (50, 20)
    assert all(len(set(row)) == 20 and len(set(sample[row])) == 1 for row in members)
    assert set(sample[members[:, 0]]) == set(sample) - {0}  # too few cells for a bulk
    np.testing.assert_array_equal(bulk[7], X[members[7]].toarray().sum(axis=0))


def test_batches_of_the_reference_by_sample(trained_samples, sample_h5ad, tmp_path):
    flags = ["--data", sample_h5ad, "--samples", "sample", "--weights", trained_samples]
    out = ["--n-cells", 12, "--out", tmp_path / "g.h5ad"]
    done = run_inside("bulk2sc.py", *flags, *out, "--batch-size", 20)
    assert done.returncode == 0, done.stderr
    assert "12 bulks, each the sum of 20 reference cells of one of 8 samples" in done.stdout
    done = run_inside("bulk2sc.py", *flags, *out, "--batch-size", 50)  # of 36 in each sample
    assert_one_line_error(done, "--batch-size: found 50", "36", "--samples")


def test_a_batch_starts_at_the_composition_of_its_own_sample(
    trained_samples, tmp_path, monkeypatch
):
    """The quarter of the updates that it gets would not lead there from that of all cells."""
    cells = make_sample_cells()
    other = (cells.obs["sample"] == "d1 control") & (cells.obs["cell_type"] != CELL_TYPES[0])
    write(tmp_path / "x.h5ad", cells[~other].copy())
    model = Model.load(trained_samples)
    starts, encode_bulks = [], generation.encode_bulks

    def spy(*arguments, start):
        starts.append(start)
        return encode_bulks(*arguments, start=start)

    monkeypatch.setattr(generation, "encode_bulks", spy)
    settings = bulk2sc.Settings(data=str(tmp_path / "x.h5ad"), samples="sample", batch_size=10)
    rng = np.random.default_rng(0)
    parts = generation.encode_batches(settings, 60, model, rng)
    pi, start = torch.cat([part[2] for part in parts]), torch.cat(starts)  # (60, K) each
    pure = start[:, 0] > 0.9
    assert 0 < pure.sum() < 30
    assert (pi[pure, 0] > 0.9).all() and (start[~pure] < 0.6).all()
