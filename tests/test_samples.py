"""References of many samples: readers, donors held out, trainings, pseudobulks, states."""

import re
import shutil
import signal
from dataclasses import replace
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
    TREATED_EVERYWHERE,
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
    choose_held_out,
    load_cells,
)
from deconvolution.samples import BulkSamples
from generation import Model
from models import BulkEncoder, scDecoder
from readers.bulk import read_bulk
from readers.labels import FOUND_FILE
from runtime.errors import InputError
from runtime.weights import load_model
from states.pseudobulks import BulkCells, draw_from_samples, draw_samples, simulate_bulks
from states.reading import normalise, read_shares
from states.weights import ReferenceStates, choose_baseline, weights_of
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
    train_few(sample_h5ad, weights, *OF_SAMPLES, train_gmvae=["--held-out-donors", "d2"])
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
    assert card(few, "train_decoder.py")["states"]["samples"] == names
    really, seen = train_encoder.simulate_bulks, []

    def apart(cells, cfg, rng, clean=False):
        if clean:
            seen.append(cells)
            rng = np.random.default_rng(0)
        return really(cells, cfg, rng, clean)

    monkeypatch.setattr(train_encoder, "simulate_bulks", apart)
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
    assert (seen[0].X != seen[-1].X).nnz > 0  # or nothing was compared
    for script, same in zip(STAGES, (few, few, tmp_path / "same"), strict=True):
        assert equal(card(same, script)["state"], card(tmp_path / "other", script)["state"])
    states = [card(folder, STAGES[1])["states"] for folder in (few, tmp_path / "other")]
    assert torch.equal(states[0]["weight"], states[1]["weight"])


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
        assert len(one["held_out"]) == 30 and "states" not in one


def test_two_samples_of_one_donor(tmp_path):
    cells = make_sample_cells(10)
    path = write(tmp_path / "cells.h5ad", cells[(cells.obs["donor"] == "d3").to_numpy()].copy())
    text = train_few(path, tmp_path / "w", *OF_SAMPLES, "--conditions", "treatment")
    assert "2 samples, 1 donors" in text and "baseline: control; --baseline" in text
    assert card(tmp_path / "w", STAGES[1])["states"]["samples"] == ["d3 control", "d3 treated"]


def test_one_cell_per_sample_says_nothing_of_states(tmp_path):
    """All samples have nearly the weights of the cloud: a cell counts little against the prior."""
    cells = make_sample_cells(6)
    path = write(tmp_path / "cells.h5ad", with_samples(cells, list(cells.obs_names)))
    text = train_few(path, tmp_path / "w", "--samples", "sample")
    assert "144 samples, 144 donors" in text and "held out: 29 of 144 donors" in text
    content = card(tmp_path / "w", STAGES[1])
    weight = content["states"]["weight"]
    assert weight.shape == (115, 3, 2)
    assert (weight - content["state"]["shape_weight"]).abs().max() < 0.15


def test_a_type_that_a_sample_lacks_has_the_weights_of_its_group(tmp_path):
    cells = make_sample_cells(8)
    lacks = (cells.obs["sample"] == "d1 control") & (cells.obs["cell_type"] == CELL_TYPES[2])
    path = write(tmp_path / "cells.h5ad", cells[~lacks.to_numpy()].copy())
    train_few(path, tmp_path / "w", *OF_SAMPLES, train_gmvae=["--held-out-donors", "d3"])
    content = card(tmp_path / "w", STAGES[1])
    states, weight = content["states"], content["states"]["weight"]
    assert states["samples"][0] == "d1 control" and states["n_cells"][0].tolist() == [8, 8, 0]
    torch.testing.assert_close(weight[0, 2], content["state"]["shape_weight"][2], atol=0.1, rtol=0)


def test_types_found_without_labels_go_with_samples(sample_h5ad, tmp_path):
    """Regression: labels in the file made every donor look as if it held all cells of a type.

    And with a single type found, whose proportion is always 1, the last message divided by zero.
    """
    weights = tmp_path / "w"
    text = train_few(sample_h5ad, weights, *OF_SAMPLES, train_gmvae=["--n-types", 1])
    assert "held out: 1 of 4 donors" in text and (weights / FOUND_FILE).exists()
    assert card(weights, STAGES[1])["states"]["n_cells"].sum() == 216
    assert card(weights, STAGES[2])["cell_types"] == card(weights, STAGES[0])["cell_types"]
    assert len(card(weights, STAGES[2])["cell_types"]) == 1


# ------------------------------------------------------- other ways to train, the same weights


def test_backed_trainings_are_those_in_memory(few, sample_h5ad, tmp_path):
    named = ["--held-out-donors", "d2"]
    train_few(sample_h5ad, tmp_path / "w", *OF_SAMPLES, "--backed", train_gmvae=named)
    for script in STAGES:
        assert equal(card(few, script)["state"], card(tmp_path / "w", script)["state"])
        assert same_weights(few, tmp_path / "w", script)
    states = [card(folder, STAGES[1])["states"] for folder in (few, tmp_path / "w")]
    assert torch.equal(states[0]["weight"], states[1]["weight"])


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
    if script == STAGES[1]:
        states = [card(folder, script)["states"]["weight"] for folder in (few, weights)]
        assert torch.equal(*states)
    assert "nothing left to do" in run_inside(script, *flags).stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", STAGES)
def test_two_processes_train_as_one(few, sample_h5ad, tmp_path, script):
    for name in ("one", "two"):
        shutil.copytree(few, tmp_path / name)
    data = ["--data", sample_h5ad, *OF_SAMPLES, *FEW[script]]
    data += ["--held-out-donors", "d2"] * (script == STAGES[0])
    assert run_inside(script, *data, "--weights", tmp_path / "one").returncode == 0
    process, _ = start_two(script, *data, "--weights", tmp_path / "two")
    assert final_messages(process) == [] and process.returncode == 0
    assert_files_close(tmp_path / "two", tmp_path / "one", script)
    if script == STAGES[1]:
        one, two = (card(tmp_path / name, script)["states"] for name in ("one", "two"))
        torch.testing.assert_close(two["weight"], one["weight"], rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------- weights of the parts


def test_weights_of_samples_are_those_their_cells_are_drawn_with():
    """Of hundreds of cells nearly; of none they are the prior's, and of a few between the two."""
    rng, truth = np.random.default_rng(0), np.array([0.8, 0.2, 0.0])
    prior = np.full((3, 1, 3), 1 / 3)
    sample = np.repeat([0, 1], [600, 4])
    part = np.r_[rng.choice(3, 600, p=truth), np.zeros(4, int)]
    seen = part[:, None] + rng.normal(0, 0.2, (604, 1))
    likelihood = np.exp(-0.5 * (seen - np.arange(3)) ** 2 / 0.04)
    weight, n_cells = weights_of(likelihood, 0 * sample, sample, prior, 10.0)
    assert n_cells[:, 0].tolist() == [600, 4, 0]
    np.testing.assert_allclose(weight[0, 0], truth, atol=0.05)
    np.testing.assert_allclose(weight[1, 0], np.array([22, 10, 10]) / 42, atol=0.1)
    assert np.array_equal(weight[2], prior[2])


@pytest.mark.parametrize(
    ("asked", "conditions", "batches", "chosen"),
    [
        ([], "aabab", "11111", ["a"]),
        ([], "bbaa", "1111", ["a"]),  # as many: by name
        ([], "aabbc", "11122", ["a", "b"]),  # the second batch has no a
        (["b"], "aabab", "11111", ["b"]),
        (["b", "c"], "aabc", "1112", ["b", "c"]),
        (["b"], "aabc", "1112", "batch 2 has none of these, expected one of its conditions (c)"),
        (["x"], "ab", "11", "found x, expected some of a, b"),
    ],
)
def test_baseline_is_what_is_asked_for_or_most_common(asked, conditions, batches, chosen):
    if isinstance(chosen, list):
        assert choose_baseline(asked, list(conditions), list(batches)) == chosen
    else:
        with pytest.raises(InputError, match=re.escape(chosen)):
            choose_baseline(asked, list(conditions), list(batches))


def test_baseline_samples_are_of_the_first_condition_that_a_batch_has():
    n, weight = torch.ones(5, 1), torch.ones(5, 1, 1)
    states = ReferenceStates(list("vwxyz"), list("aabcd"), list("11122"), ["a", "c"], n, weight)
    assert states.baseline_of("1") == states.baseline_of() == [0, 1]
    assert states.baseline_of("2") == [3] and states.others == [2, 4]
    without = replace(states, baseline=[])
    assert without.baseline_of("2") == [3, 4] and without.others == [0, 1, 2, 3, 4]


# --------------------------------------------------------------------------------- pseudobulks


@pytest.fixture
def tagged():
    """Cells of three samples and two types, each with a gene of its own; sample 1 lacks type 1."""
    group = np.repeat([0, 1, 2, 4, 5], 8)  # sample * 2 + type
    X = sp.csr_matrix((np.ones(40, np.float32), (np.arange(40), group)), shape=(40, 6))
    return BulkCells(X, group % 2, 2, group // 2)


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
def test_bulks_are_of_the_cells_of_their_samples(tagged, pool):
    """Counts are of the samples that the bulk claims, and of no type that they lack."""
    rng, n = np.random.default_rng(1), 60
    share = draw_samples(tagged, n, rng)
    pools = None if pool is None else np.full(n, pool)
    counts, pi = draw_from_samples(tagged, share, np.full(n, 50), pools, rng)
    drawn = counts.reshape(n, 3, 2) / 50  # each gene counts the cells of one sample and type
    np.testing.assert_allclose(drawn.sum(axis=1), pi, atol=1e-6)
    assert not drawn[:, 1, 1].any() and (drawn.sum(axis=2)[share == 0] == 0).all()


def test_simulated_bulks_have_the_mixture_as_target(tagged):
    cfg = train_encoder.Settings(batch_size=8)
    model = SimpleNamespace(mu=torch.zeros(2, 4), var=torch.ones(2, 4))
    for cells in (BulkCells(tagged.X, tagged.codes, 2), tagged):
        bulks = simulate_bulks(cells, cfg, np.random.default_rng(0))
        mu, var, pi = bulks.target(model)
        assert mu is model.mu and var is model.var and torch.equal(pi, torch.from_numpy(bulks.pi))
        assert bulks.counts.shape == (8, 6)


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


@pytest.mark.parametrize("seed", range(3))
def test_states_are_read_beneath_what_platforms_change(seed):
    """A bulk of no state reads 0, also of another batch; of a mixture, its share."""
    rng = np.random.default_rng(seed)
    n, other = 2000, np.exp(rng.normal(0, 0.8, 2000))
    base = normalise(rng.gamma(0.7, 1, n) + 0.02)
    effect = np.exp(np.where(rng.random(n) < 0.08, rng.normal(1.5, 0.5, n), 0))
    moved, batch = normalise((base * effect)[None]), normalise(np.stack([base, base * other]))
    for share in (0.0, 0.5, 1.0):
        for platform in (np.exp(rng.normal(0, 0.7, n)), other):
            bulk = rng.poisson(normalise((base + share * (moved[0] - base)) * platform) * 2e6)
            found, covariance = read_shares(bulk, base, moved, batch)
            assert abs(found[0] - share) < 0.2 and 0 < covariance[0, 0] < 0.1
            assert share or found[0] < 0.02


@pytest.mark.parametrize("platform", [0.0, 0.7])
def test_the_state_of_an_unseen_donor_is_read(trained_samples, platform):
    """Of the reference's platform and of another one; and cells are of that state."""
    model, table = Model.load(trained_samples), make_sample_bulks(make_sample_cells())
    names = ["d4 control", "d4 treated"]
    factor = np.exp(np.random.default_rng(0).normal(0, platform, len(table)))
    samples = BulkSamples(read_bulk(table[names].mul(factor, axis=0).T, model.genes), model)
    assert samples.states.names == ["treated"]
    control, treated = samples.states.by_condition()[:, 0]
    assert control < 0.15 and treated > 0.5 and (samples.states.share[:, :2] <= 1).all()
    assert not {"d4 treated", "d1 control"} & set(samples.states.samples)
    fit = samples.fit
    assert (fit["state treated_low"] <= fit["state treated"]).all()
    assert (fit["state treated"] <= fit["state treated_high"]).all()
    mu, var, _, weight = samples.encoded
    assert mu.shape == var.shape == (2, 3, 4) and (var > 0).all()
    torch.testing.assert_close(weight.sum(dim=2), torch.ones(2, 3))
    change = samples.profiles[1:2] / samples.profiles[:1]
    assert np.median(change[0][:, TREATED_EVERYWHERE]) > 2 * np.median(change[0])


@torch.no_grad()
def test_an_encoder_of_version_2_answers_with_the_types_moments(few, tmp_path, capsys):
    """Its directions of states and what its heads added to them are left out, and that is said."""
    content = card(few, STAGES[2])
    old = {"state_center": torch.zeros(len(content["genes"])), "state_mu": torch.ones(2, 3, 3)}
    old |= {"mu_head.weight": torch.ones_like(content["state"]["mu_head.weight"])}
    config = content["config"] | {"n_state": 2}
    torch.save(content | {"config": config, "state": content["state"] | old}, tmp_path / "b.pt")
    model, _ = load_model(tmp_path / "b.pt", BulkEncoder)
    assert "of an earlier version, whose states" in capsys.readouterr().out
    mu, var, _ = model(torch.rand(2, len(content["genes"])))
    assert torch.equal(mu, model.mu.expand(2, 3, 3)) and torch.equal(var, model.var.expand(2, 3, 3))


def broken_states(states):
    """What a file says of its samples, each time wrong in one way."""
    for name in ("n_cells", "weight"):
        value = states[name]
        for wrong in (value[:-1], value[:, :-1], value[..., None], value * torch.nan, -value - 1):
            yield states | {name: wrong}
        for wrong in (value * torch.inf, value.double(), value.tolist()):
            yield states | {name: wrong}
        yield {key: part for key, part in states.items() if key != name}
    yield states | {"weight": 2 * states["weight"]}
    for name in ("samples", "conditions", "batches"):
        names = states[name]
        for wrong in (names[:-1], [*names[1:], "a\0b"], [1] * len(names), None):
            yield states | {name: wrong}
    yield states | {"samples": ["same"] * len(states["samples"])}
    yield states | {"baseline": "control"}
    yield []
    yield "all of them"


def test_broken_states_in_a_file_end_in_one_line(few, tmp_path):
    path, content = tmp_path / "scDecoder_model.pt", card(few, STAGES[1])
    for states in broken_states(content["states"]):
        torch.save(content | {"states": states}, path)
        with pytest.raises(InputError, match="scDecoder_model.pt: its parts do not fit together"):
            load_model(path, scDecoder)
    torch.save(content, path)
    assert load_model(path, scDecoder)[1]["states"]["samples"] == content["states"]["samples"]


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
