"""Trainings that are stopped, killed or out of room, and go on: nothing lost, nothing half-written.

``python -m pytest -m slow tests/test_interruption.py`` kills the trainings thirty times.
"""

import errno
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import training
from conftest import ROOT, TINY, assert_one_line_error, run, run_inside, train
from models import BulkEncoder, scDecoder, scGMVAE
from runtime import writing
from runtime.errors import InputError
from runtime.weights import load_mixture, load_model
from runtime.writing import write_whole

FILE = {
    "train_gmvae.py": ("scGMVAE", scGMVAE),
    "train_decoder.py": ("scDecoder", scDecoder),
    "train_encoder.py": ("bulkEncoder", BulkEncoder),
}
# What a stage needs of the stages before it.
BEFORE = {
    "train_gmvae.py": [],
    "train_decoder.py": ["scGMVAE_model.pt", "gmm_mu_c.pt", "gmm_var_c.pt"],
    "train_encoder.py": ["gmm_mu_c.pt", "gmm_var_c.pt", "scDecoder_model.pt"],
}


def start_folder(tmp_path, trained, script):
    """A folder of weights as a stage finds it."""
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in BEFORE[script]:
        (weights / name).write_bytes((trained / name).read_bytes())
    return weights


def same_weights(folder, other, script):
    """Whether a stage's files in two folders hold the same tensors and loss curve, to the bit."""
    name = FILE[script][0]
    cards = [torch.load(where / f"{name}_model.pt", weights_only=True) for where in (folder, other)]
    states = [card["state"] for card in cards]
    same = states[0].keys() == states[1].keys()
    same = same and all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    curves = [(where / f"{name}_loss.csv").read_text() for where in (folder, other)]
    same = same and curves[0] == curves[1]
    if script == "train_gmvae.py":
        K = cards[0]["config"]["n_types"]
        pairs = zip(load_mixture(folder, K), load_mixture(other, K), strict=True)
        same = same and all(torch.equal(a, b) for a, b in pairs)
    return same


def arguments(script, h5ad, weights):
    return ["--data", h5ad, "--weights", weights, *TINY[script]]


def left_behind(weights):
    return [p.name for p in weights.iterdir() if ".tmp" in p.name or "checkpoint" in p.name]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, h5ad):
    """What the trainings of this process are compared with: whole ones of this process.

    Libraries that other tests have loaded (t-SNE's, say) change how it rounds; :func:`trained` is
    for those that run as processes of their own.
    """
    weights = tmp_path_factory.mktemp("unbroken")
    train("--data", h5ad, "--weights", weights)
    return weights


# ------------------------------------------------------------------------------------ signals


def stop_at(monkeypatch, number, n):
    """Send this process a signal while step ``n`` of a training (over all its epochs) is done."""
    done = {"steps": 0}
    check = training.TrainingRun.check_loss

    def counted(self, loss):
        check(self, loss)
        done["steps"] += 1
        if done["steps"] == n:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(training.TrainingRun, "check_loss", counted)


@pytest.mark.parametrize(
    "script, number, steps",
    [
        # 9 steps an epoch: within the first, at the end of one, as the mixture is fitted, at last.
        ("train_gmvae.py", signal.SIGINT, (4, 9, 172, 187)),
        ("train_gmvae.py", signal.SIGTERM, (540,)),
        ("train_decoder.py", signal.SIGTERM, (1, 13, 300)),
        ("train_encoder.py", signal.SIGHUP, (25, 200)),
    ],
)
def test_stopped_run_resumes_to_the_same_weights(
    unbroken, h5ad, tmp_path, monkeypatch, script, number, steps
):
    weights = start_folder(tmp_path, unbroken, script)
    own, before = arguments(script, h5ad, weights), 0
    for step in steps:
        with monkeypatch.context() as patch:
            stop_at(patch, number, step - before)
            done = run_inside(script, *own, "--resume")
        before = step
        assert done.returncode == 128 + number
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith(f"interrupted ({signal.Signals(number).name}) at epoch ")
        assert "--resume" in last and "Traceback" not in done.stderr
        assert left_behind(weights) == [f"{FILE[script][0]}_checkpoint.pt"]
        assert not (weights / f"{FILE[script][0]}_model.pt").exists()
    done = run_inside(script, *own, "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "going on at epoch" in done.stdout
    assert same_weights(weights, unbroken, script)
    assert left_behind(weights) == []


@pytest.mark.parametrize("step", [3, 31, 100])
def test_run_without_labels_resumes(h5ad, tmp_path, monkeypatch, step):
    """The types that were found on the way are part of the checkpoint."""
    flags = ["--data", h5ad, *TINY["train_gmvae.py"], "--epochs", 12, "--vae-epochs", 3]
    flags += ["--n-types", 3]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_inside("train_gmvae.py", *flags, "--weights", whole).returncode == 0
    with monkeypatch.context() as patch:
        stop_at(patch, signal.SIGTERM, step)
        assert run_inside("train_gmvae.py", *flags, "--weights", broken).returncode == 143
    assert run_inside("train_gmvae.py", *flags, "--weights", broken, "--resume").returncode == 0
    assert same_weights(broken, whole, "train_gmvae.py")
    found = [(folder / "found_celltypes.csv").read_text() for folder in (whole, broken)]
    assert found[0] == found[1]


def test_signal_while_results_are_written_loses_nothing(unbroken, h5ad, tmp_path, monkeypatch):
    """After the last step, until the last file is there, the checkpoint stays."""
    weights = start_folder(tmp_path, unbroken, "train_decoder.py")
    own = arguments("train_decoder.py", h5ad, weights)
    with monkeypatch.context() as patch:
        fit = scDecoder.fit_types
        patch.setattr(
            scDecoder, "fit_types", lambda *a, **k: (fit(*a, **k), os.kill(os.getpid(), 15))
        )
        done = run_inside("train_decoder.py", *own)
    assert done.returncode == 143
    assert done.stderr.strip().splitlines()[-1].startswith("interrupted")
    assert left_behind(weights) == ["scDecoder_checkpoint.pt"]
    assert run_inside("train_decoder.py", *own, "--resume").returncode == 0
    assert same_weights(weights, unbroken, "train_decoder.py")


def test_resume_of_a_run_that_ended_leaves_it_alone(trained, h5ad):
    for script in TINY:
        before = (trained / f"{FILE[script][0]}_model.pt").stat().st_mtime_ns
        done = run_inside(script, *arguments(script, h5ad, trained), "--resume")
        assert done.returncode == 0 and "nothing left to do" in done.stdout
        assert (trained / f"{FILE[script][0]}_model.pt").stat().st_mtime_ns == before


@pytest.fixture
def stopped_decoder(unbroken, h5ad, tmp_path, monkeypatch):
    """Flags of a run of stage 2 that was stopped at its 30th step, and its checkpoint."""
    weights = start_folder(tmp_path, unbroken, "train_decoder.py")
    own = arguments("train_decoder.py", h5ad, weights)
    with monkeypatch.context() as patch:
        stop_at(patch, signal.SIGTERM, 30)
        run_inside("train_decoder.py", *own)
    return own, weights / "scDecoder_checkpoint.pt"


def test_resume_is_of_the_same_run(stopped_decoder):
    """Another setting or other data than the checkpoint's is an error, and leaves it untouched."""
    own, checkpoint = stopped_decoder
    weights = checkpoint.parent
    before = checkpoint.read_bytes()
    assert_one_line_error(
        run_inside("train_decoder.py", *own, "--resume", "--lr", 0.5), checkpoint, "--lr", "0.5"
    )
    card = torch.load(weights / "gmm_mu_c.pt")
    torch.save(card + 1e-6, weights / "gmm_mu_c.pt")
    assert_one_line_error(
        run_inside("train_decoder.py", *own, "--resume"), checkpoint, "earlier weights"
    )
    assert checkpoint.read_bytes() == before
    done = run_inside("train_decoder.py", *own, "--epochs", 2)  # no --resume: said, then replaced
    assert "--resume would go on" in done.stdout and left_behind(weights) == []


def broken_checkpoints(card):
    """Ways in which a checkpoint can be unsound, each a changed copy of its content."""
    first = next(iter(card["model"]))
    moment = next(iter(card["optimizer"]["state"]))
    yield card | {"version": 99}
    yield card | {"name": "scGMVAE"}
    yield card | {"epoch": -3}
    yield card | {"epoch": "5"}
    yield card | {"model": card["model"] | {first: torch.zeros(3)}}
    yield card | {"model": card["model"] | {first: card["model"][first] * torch.nan}}
    yield card | {"model": {}}
    yield card | {"torch_rng": torch.zeros(3)}
    yield card | {"rng": {"bit_generator": "MT19937"}}
    yield card | {"kept": [1]}
    yield card | {"schedule": card["schedule"] | {"step": 1}}
    state = card["optimizer"]["state"]
    wrong = state | {moment: state[moment] | {"exp_avg": torch.zeros(7, 7)}}
    yield card | {"optimizer": card["optimizer"] | {"state": wrong}}
    yield {name: value for name, value in card.items() if name != "optimizer"}
    yield [1, 2, 3]


def test_broken_checkpoints_end_in_one_line(stopped_decoder):
    own, checkpoint = stopped_decoder
    whole = checkpoint.read_bytes()
    for card in broken_checkpoints(torch.load(checkpoint, weights_only=True)):
        torch.save(card, checkpoint)
        assert_one_line_error(run_inside("train_decoder.py", *own, "--resume"), checkpoint)
    checkpoint.write_bytes(whole[: len(whole) // 2])
    assert_one_line_error(run_inside("train_decoder.py", *own, "--resume"), checkpoint)


# -------------------------------------------------------------------------------------- kills


def kill_and_resume(script, h5ad, weights, n_kills, rng):
    """Start a training, kill it after a random time, start it again, ...; then let it end.

    Returns:
        int: kills that met the process alive.
    """
    command = [sys.executable, str(ROOT / script), *map(str, arguments(script, h5ad, weights))]
    command += ["--resume", "--checkpoint-every", "0.2"]
    kills = 0
    while kills < n_kills:
        # Output to nowhere: a full pipe would stop the process at a place of its own.
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        model = weights / f"{FILE[script][0]}_model.pt"
        time.sleep(rng.uniform(0, 1.5))  # while it starts, or
        if rng.random() < 0.85:  # while it trains and writes: wait for a file that is its own
            started = time.time()
            checkpoint = weights / f"{FILE[script][0]}_checkpoint.pt"
            before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
            while process.poll() is None and time.time() < started + 60:
                if checkpoint.exists() and checkpoint.stat().st_mtime_ns != before:
                    break
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.4))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if process.returncode == 0:  # it has ended before: once more from the beginning
            model.unlink()
        elif model.exists():  # killed between its last files: what is there is whole
            load_model(model, FILE[script][1])
    run(script, *command[2:])
    return kills


def test_killed_run_resumes_to_the_same_weights(trained, h5ad, tmp_path, script="train_gmvae.py"):
    """Once; the others, and more often, in the next test."""
    weights = start_folder(tmp_path, trained, script)
    assert kill_and_resume(script, h5ad, weights, 1, np.random.default_rng(1)) == 1
    assert same_weights(weights, trained, script)


@pytest.mark.slow
@pytest.mark.parametrize("script", TINY)
def test_ten_kills_at_random(trained, h5ad, tmp_path, script):
    """Two minutes each."""
    weights = start_folder(tmp_path, trained, script)
    assert kill_and_resume(script, h5ad, weights, 10, np.random.default_rng()) == 10
    assert same_weights(weights, trained, script)


def test_signal_ends_generation_and_leaves_no_file(trained, h5ad, tmp_path):
    """A process of its own, stopped while it draws cells."""
    out = tmp_path / "cells.h5ad"
    bulk = tmp_path / "bulk.csv"
    bulk.write_text("gene,a,b\n" + "".join(f"GENE{i},{i},{60 - i}\n" for i in range(60)))
    command = [sys.executable, ROOT / "bulk2sc.py", "--bulk", bulk, "--weights", trained]
    command += ["--n-cells", 3000000, "--out", out]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    started = time.time()
    while len(list(tmp_path.iterdir())) == 1 and time.time() < started + 100:
        assert process.poll() is None, process.stderr.read()[-2000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert process.stderr.read().strip().splitlines()[-1].startswith("interrupted")
    assert list(tmp_path.iterdir()) == [bulk]


# --------------------------------------------------------------------- loss that goes astray


@pytest.mark.parametrize("script", ["train_gmvae.py", "train_encoder.py"])
def test_diverging_loss_stops_with_step_and_keeps_the_last_checkpoint(
    unbroken, h5ad, tmp_path, monkeypatch, script
):
    """From step 40 on the loss is nan; the checkpoint before it goes on to the usual end."""
    weights, calls = start_folder(tmp_path, unbroken, script), []
    own = [*arguments(script, h5ad, weights), "--checkpoint-every", 0]
    check = training.TrainingRun.check_loss

    def poisoned(self, loss):
        calls.append(1)
        check(self, loss * torch.nan if len(calls) >= 40 else loss)

    with monkeypatch.context() as patch:
        patch.setattr(training.TrainingRun, "check_loss", poisoned)
        done = run_inside(script, *own)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {FILE[script][0]} diverged at epoch ")
    assert "step" in last and "checkpoint.pt" in last and "--lr" in last
    assert not (weights / f"{FILE[script][0]}_model.pt").exists()
    assert run_inside(script, *own[:-2], "--resume").returncode == 0
    assert same_weights(weights, unbroken, script)


@pytest.mark.parametrize("script", TINY)
def test_absurd_learning_rate_is_noticed(trained, h5ad, tmp_path, script):
    weights = start_folder(tmp_path, trained, script)
    done = run_inside(script, *arguments(script, h5ad, weights), "--lr", 1e18)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert " diverged at epoch " in done.stderr.strip().splitlines()[-1]
    assert not (weights / f"{FILE[script][0]}_model.pt").exists()


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """Even when the loss has not shown it yet; the older checkpoint stays as it was."""
    model = torch.nn.Linear(3, 2)
    cfg = training_settings(tmp_path)
    optimizer, schedule = training.two_rate_optimizer(model, [], cfg, 10)
    rng = np.random.default_rng(0)
    one = training.TrainingRun("linear", cfg, model, optimizer, schedule, rng, "data")
    one.bar = training.tqdm(disable=True)
    one.save()
    before = one.checkpoint.path.read_bytes()
    with torch.no_grad():
        model.weight[0, 0] = torch.inf
    with pytest.raises(InputError, match="weights are not finite"):
        one.save()
    assert one.checkpoint.path.read_bytes() == before


def training_settings(folder):
    from train_decoder import Settings

    return Settings(weights=folder)


# ------------------------------------------------------------------------------ faulty writes


def test_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    errors = [
        OSError(errno.ENOSPC, "No space left on device"),
        InputError("x"),
        KeyboardInterrupt(),
    ]
    for error in errors:

        def write(part, error=error):
            part.write_text("half")
            raise error

        expected = InputError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected):
            write_whole(path, write)
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_every_step_of_a_write_may_fail(tmp_path, monkeypatch, step):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(*arguments, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(writing.os, step, fail)
    with pytest.raises(InputError, match=r"a\.txt: could not be written \(Input/output error\)"):
        write_whole(path, lambda part: part.write_text("new"))
    monkeypatch.undo()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_temporary_file_follows_no_link(tmp_path, monkeypatch):
    """Somebody else's link under the name of our temporary file is not written through."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(writing.secrets, "token_hex", lambda n: "0" * 8)
    (tmp_path / ".a.00000000.tmp.txt").symlink_to(victim)
    with pytest.raises(InputError, match="File exists"):
        write_whole(tmp_path / "a.txt", lambda part: part.write_text("new"))
    assert victim.read_text() == "precious"


def test_link_is_replaced_not_written_through(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link.txt"
    target.write_text("precious")
    link.symlink_to(target)
    write_whole(link, lambda part: part.write_text("new"))
    assert target.read_text() == "precious" and link.read_text() == "new"
    assert not link.is_symlink()


def test_left_over_temporary_files_are_removed_once_old(tmp_path, capsys):
    old, young = tmp_path / ".a.0123abcd.tmp.txt", tmp_path / ".a.fedcba98.tmp.txt"
    other = tmp_path / ".b.0123abcd.tmp.txt"
    for path in (old, young, other):
        path.write_text("x")
    for path in (old, other):
        os.utime(path, (time.time() - 2 * writing.OLD,) * 2)
    write_whole(tmp_path / "a.txt", lambda part: part.write_text("new"))
    assert not old.exists() and young.exists() and other.exists()
    assert str(old) in capsys.readouterr().out


def limited(command, n_bytes):
    """Run a command none of whose files may become larger than this, as on a full disk."""
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes)),
    )


@pytest.mark.parametrize("script", ["train_decoder.py", "bulk2sc.py"])
def test_full_disk_is_an_error_and_the_old_file_stays(trained, h5ad, tmp_path, script):
    weights = start_folder(tmp_path, trained, "train_decoder.py")
    out = weights / "scDecoder_model.pt"
    own = arguments(script, h5ad, weights) if script in TINY else []
    if script == "bulk2sc.py":
        out = tmp_path / "cells.h5ad"
        own = ["--data", h5ad, "--weights", trained, "--batch-size", 20, "--out", out]
    out.write_bytes(b"old")
    before = sorted(p.name for p in out.parent.iterdir())
    done = limited([sys.executable, ROOT / script, *own], 8192)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "could not be written" in last and "untouched" in last
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in out.parent.iterdir()) == before


@pytest.mark.parametrize("script", TINY)
def test_folder_that_cannot_be_written_to_is_said_before_training(trained, h5ad, tmp_path, script):
    """A file in the folder's place: permissions would not stop the superuser."""
    (tmp_path / "file").write_text("")
    done = run_inside(script, "--data", h5ad, "--weights", tmp_path / "file")
    assert done.returncode == 1 and "it/s" not in done.stderr
    assert_one_line_error(done, tmp_path / "file")
