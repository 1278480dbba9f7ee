"""How long the trainings are: steps by the number of cells, early stopping, learning rate."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import train_decoder
import train_gmvae
import training
from conftest import TINY, assert_one_line_error, run_inside
from test_interruption import FILE, left_behind, same_weights, start_folder, stop_at


def settings(**given):
    return SimpleNamespace(**{"epochs": None, "batch_size": None, "lr": 1e-3, "seed": 0} | given)


def test_steps_are_fixed_and_batches_grow_for_large_references():
    plans = [training.plan_training(settings(), n, 10) for n in (100, 1000, 4000, 16_000, 10**6)]
    assert [plan.batch_size for plan in plans] == [32, 32, 64, 128, 256]
    assert [plan.n_steps for plan in plans[:2]] == [10 * 4, 10 * 32]  # ten passes
    # Never much more than ten times 64 steps, in epochs of at most a hundred.
    assert [plan.n_steps for plan in plans[2:]] == [63 * 10, 600, 600]
    assert max(plan.epoch_steps for plan in plans) == 100
    np.testing.assert_allclose([p.lr for p in plans], 1e-3 * np.sqrt([1, 1, 2, 4, 8]))


def test_given_epochs_and_batch_size_are_taken_as_they_are():
    plan = training.plan_training(settings(epochs=3, batch_size=7), 10_000, 10)
    assert plan == training.Plan(n_epochs=3, epoch_steps=1429, batch_size=7, lr=1e-3)


@pytest.mark.parametrize("n_steps", [1, 2, 3, 10, 1000])
def test_rate_rises_stays_and_falls_to_nothing(n_steps):
    rate = training.Rate(n_steps)
    rates = [rate(step) for step in range(n_steps + 1)]
    assert all(0 < r <= 1 for r in rates[:-1]) and rates[-1] < 1
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and max(rates) > 0.4
    if n_steps == 1000:
        assert rates[99] == rates[666] == 1 and rates[999] == pytest.approx(2 / 335)


def test_rate_falls_early():
    rate = training.Rate(1000)
    rate.fall(300)
    assert rate.n_steps == 450 and rate(299) == 1
    assert [round(rate(step), 2) for step in (300, 375, 449)] == [1, 0.5, 0.01]
    rate = training.Rate(1000)
    rate.fall(900)  # the plan is never exceeded
    assert rate.n_steps == 1000


def test_flat_losses_are_told_from_falling_ones():
    rng = np.random.default_rng(0)
    curve = 100 * np.exp(-np.arange(60) / 5)
    first = next(n for n in range(61) if training.is_flat(list(curve[:n])))
    assert 15 < first < 40  # e^(-n/5) is below a hundredth from 23 on
    noisy = curve + 0.1 * rng.standard_normal(60)
    assert training.is_flat(list(noisy)) and not training.is_flat(list(noisy[:12]))
    assert not training.is_flat(list(np.arange(60, 0, -1.0)))
    assert training.is_flat([1.0] * 20)


def test_cells_for_validation_come_from_large_references_alone():
    codes = np.repeat([0, 1, 2], [12_000, 2000, 100])
    train = np.flatnonzero(np.arange(14_100) % 2)
    fitted, aside = training.split_validation(train, codes, settings())
    assert sorted([*fitted, *aside]) == train.tolist()
    assert len(aside) == pytest.approx(training.MOST_VALIDATION, abs=2)
    assert set(codes[aside]) == {0, 1, 2}
    for cells, given in ((train[:1999], {}), (train, {"epochs": 5})):
        fitted, aside = training.split_validation(cells, codes, settings(**given))
        assert fitted is cells and len(aside) == 0


@pytest.fixture
def short(monkeypatch):
    """Early stopping on ninety cells: a loss is flat as soon as there are nine of it."""
    for name, value in {"VALIDATION_FROM": 20, "EPOCH_STEPS": 2, "FLAT": 2.0}.items():
        monkeypatch.setattr(training, name, value)
    monkeypatch.setattr(train_gmvae, "PASSES", 20)
    monkeypatch.setattr(train_decoder, "PASSES", 20)


@pytest.mark.parametrize("script", ["train_gmvae.py", "train_decoder.py"])
def test_training_ends_early_and_resumes_to_the_bit(
    short, trained, h5ad, tmp_path, monkeypatch, script
):
    """72 training cells of which 7 are set aside: 3 batches of 32, 60 steps in 30 epochs."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    whole, broken = (start_folder(tmp_path / f, trained, script) for f in ("a", "b"))
    flags = ["--data", h5ad, *TINY[script]]
    for option in ("--epochs", "--vae-epochs", "--batch-size"):
        if option in flags:
            i = flags.index(option)
            flags = flags[:i] + flags[i + 2 :]
    name = FILE[script][0]
    assert run_inside(script, *flags, "--weights", whole).returncode == 0
    card = torch.load(whole / f"{name}_model.pt", weights_only=True)
    curve = pd.read_csv(whole / f"{name}_loss.csv")
    # Flat at the ninth epoch that is watched; then half as many again.
    first = {"scGMVAE": 8, "scDecoder": 0}[name] + 9
    assert card["plan"]["n_epochs"] == 30
    assert card["epoch"] == len(curve) == -(-first * 3 // 2) < 30
    for step in (3, 2 * first - 2, 4):  # at the start, around the turn, and in the fall
        with monkeypatch.context() as patch:
            stop_at(patch, 15, step)
            done = run_inside(script, *flags, "--weights", broken, "--resume")
        assert done.returncode == 128 + 15
        if step == 3:
            assert left_behind(broken) == [f"{name}_checkpoint.pt"]
    assert run_inside(script, *flags, "--weights", broken, "--resume").returncode == 0
    assert same_weights(broken, whole, script)


def test_one_command_trains_all_three(h5ad, trained, tmp_path):
    """train.py is the three scripts in one process; --resume finds nothing left to do."""
    flags = ["--data", h5ad, "--weights", tmp_path / "all", "--epochs", 2, 2, 3]
    done = run_inside("train.py", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    names = "B cells 40, CD4+/CD25 T 30, Natural killer  cells 20"
    assert done.stdout.count(f"cell types: {names}\n") == 1 and "alone" not in done.stderr
    for script, n in zip(TINY, (2, 2, 3), strict=True):
        alone = run_inside(script, "--data", h5ad, "--weights", tmp_path / "each", "--epochs", n)
        assert alone.returncode == 0, alone.stderr[-2000:]
        assert same_weights(tmp_path / "all", tmp_path / "each", script)
    again = run_inside("train.py", *flags, "--resume")
    assert again.returncode == 0 and again.stdout.count("nothing left to do") == 3


def test_names_of_types_that_are_nearly_the_same_are_warned_of(capsys):
    train_gmvae.print_types(np.array([300, 2, 1, 1000]), ["B", "b", "NK T", "NKT"])
    printed = capsys.readouterr()
    assert printed.out == "cell types: NKT 1,000, B 300, b 2, NK T 1\n"
    assert "'NKT', 'B', 'b', 'NK T' differ in case or blanks alone" in printed.err


def test_settings_of_all_stages_are_checked_before_any_is_trained(h5ad, tmp_path):
    done = run_inside("train.py", "--data", h5ad, "--weights", tmp_path / "w", "--epochs", 2, 0, 3)
    assert_one_line_error(done, "--epochs: found 0")
    assert not (tmp_path / "w").exists()
