"""Trainings that are stopped, killed or out of disk space: they resume, and no file is partial.

``python -m pytest -m slow tests/test_interruption.py`` kills the trainings thirty times.
"""

import errno
import importlib
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
from conftest import QUICK, ROOT, TINY, assert_one_line_error, run, run_inside, train
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
# What a training is counted in.
UNIT = {"train_gmvae.py": "epoch", "train_decoder.py": "epoch", "train_encoder.py": "step"}
# Files that a stage reads from the stages before it.
INPUTS = {
    "train_gmvae.py": [],
    "train_decoder.py": ["scGMVAE_model.pt", "gmm_mu_c.pt", "gmm_var_c.pt"],
    "train_encoder.py": ["gmm_mu_c.pt", "gmm_var_c.pt", "scDecoder_model.pt"],
}


def start_folder(tmp_path, trained, script):
    """A new folder of weights that holds what a stage reads from the stages before it."""
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in INPUTS[script]:
        (weights / name).write_bytes((trained / name).read_bytes())
    return weights


def same_weights(folder, other, script):
    """Whether a stage's files in two folders hold the same tensors and loss curve, to the bit."""
    name = FILE[script][0]
    cards = [torch.load(path / f"{name}_model.pt", weights_only=True) for path in (folder, other)]
    states = [card["state"] for card in cards]
    same = states[0].keys() == states[1].keys()
    same = same and all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    curves = [(path / f"{name}_loss.csv").read_text() for path in (folder, other)]
    same = same and curves[0] == curves[1]
    if script == "train_gmvae.py":
        K = cards[0]["config"]["n_types"]
        pairs = zip(load_mixture(folder, K), load_mixture(other, K), strict=True)
        same = same and all(torch.equal(a, b) for a, b in pairs)
    return same


def arguments(script, h5ad, weights, settings=QUICK):
    return ["--data", h5ad, "--weights", weights, *settings[script]]


def left_behind(weights):
    """Names of the temporary files and checkpoints in a folder."""
    return [p.name for p in weights.iterdir() if ".tmp" in p.name or "checkpoint" in p.name]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, h5ad):
    """Weights of uninterrupted trainings within this process.

    Libraries that other tests load (such as t-SNE's) change how this process rounds. Trainings in
    separate processes are compared with :func:`trained` instead.
    """
    weights = tmp_path_factory.mktemp("uninterrupted")
    train("--data", h5ad, "--weights", weights, settings=QUICK)
    return weights


# ------------------------------------------------------------------------------------ signals


def stop_at(monkeypatch, number, n):
    """Send this process a signal during step ``n`` of a training, counted over all epochs."""
    count = {"steps": 0}
    check = training.TrainingRun.check_loss

    def counted(self, loss):
        check(self, loss)
        count["steps"] += 1
        if count["steps"] == n:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(training.TrainingRun, "check_loss", counted)


@pytest.mark.parametrize(
    "script, number, steps",
    [
        # 9 steps an epoch: within one, at its end, around the fit of the mixture (18), at the end.
        ("train_gmvae.py", signal.SIGINT, (4, 9, 16, 21)),
        ("train_gmvae.py", signal.SIGTERM, (54,)),
        ("train_decoder.py", signal.SIGTERM, (1, 13, 30)),
        ("train_encoder.py", signal.SIGHUP, (7, 20)),
    ],
)
def test_stopped_run_resumes_to_the_same_weights(
    uninterrupted, h5ad, tmp_path, monkeypatch, script, number, steps
):
    weights = start_folder(tmp_path, uninterrupted, script)
    flags, stopped_after = arguments(script, h5ad, weights), 0
    for step in steps:
        with monkeypatch.context() as patch:
            stop_at(patch, number, step - stopped_after)
            done = run_inside(script, *flags, "--resume")
        stopped_after = step
        assert done.returncode == 128 + number
        last_line = done.stderr.strip().splitlines()[-1]
        name = signal.Signals(number).name
        assert last_line.startswith(f"interrupted ({name}) at {UNIT[script]} ")
        assert "--resume" in last_line and "Traceback" not in done.stderr
        assert left_behind(weights) == [f"{FILE[script][0]}_checkpoint.pt"]
        assert not (weights / f"{FILE[script][0]}_model.pt").exists()
    done = run_inside(script, *flags, "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"going on at {UNIT[script]} " in done.stdout
    assert same_weights(weights, uninterrupted, script)
    assert left_behind(weights) == []


def test_run_without_labels_resumes(h5ad, tmp_path, monkeypatch):
    """The checkpoint includes the cell types found so far."""
    flags = ["--data", h5ad, *TINY["train_gmvae.py"], "--epochs", 12, "--vae-epochs", 3]
    flags += ["--n-types", 3]
    whole = tmp_path / "whole"
    assert run_inside("train_gmvae.py", *flags, "--weights", whole).returncode == 0
    for step in (3, 31, 100):
        broken = tmp_path / str(step)
        with monkeypatch.context() as patch:
            stop_at(patch, signal.SIGTERM, step)
            assert run_inside("train_gmvae.py", *flags, "--weights", broken).returncode == 143
        assert run_inside("train_gmvae.py", *flags, "--weights", broken, "--resume").returncode == 0
        assert same_weights(broken, whole, "train_gmvae.py"), step
        tables = [(folder / "found_celltypes.csv").read_text() for folder in (whole, broken)]
        assert tables[0] == tables[1], step


def test_signal_while_results_are_written_loses_nothing(uninterrupted, h5ad, tmp_path, monkeypatch):
    """The checkpoint is kept until the last output file is written."""
    weights = start_folder(tmp_path, uninterrupted, "train_decoder.py")
    flags = arguments("train_decoder.py", h5ad, weights)
    with monkeypatch.context() as patch:
        fit = scDecoder.fit_types
        patch.setattr(
            scDecoder, "fit_types", lambda *a, **k: (fit(*a, **k), os.kill(os.getpid(), 15))
        )
        done = run_inside("train_decoder.py", *flags)
    assert done.returncode == 143
    assert done.stderr.strip().splitlines()[-1].startswith("interrupted")
    assert left_behind(weights) == ["scDecoder_checkpoint.pt"]
    assert run_inside("train_decoder.py", *flags, "--resume").returncode == 0
    assert same_weights(weights, uninterrupted, "train_decoder.py")


def test_resume_of_a_run_that_ended_leaves_it_alone(trained, h5ad):
    for script in TINY:
        before = (trained / f"{FILE[script][0]}_model.pt").stat().st_mtime_ns
        done = run_inside(script, *arguments(script, h5ad, trained, TINY), "--resume")
        assert done.returncode == 0 and "nothing left to do" in done.stdout
        assert (trained / f"{FILE[script][0]}_model.pt").stat().st_mtime_ns == before


@pytest.fixture
def stopped_decoder(uninterrupted, h5ad, tmp_path, monkeypatch):
    """Flags and checkpoint of a run of stage 2 that was stopped at its 30th step."""
    weights = start_folder(tmp_path, uninterrupted, "train_decoder.py")
    flags = arguments("train_decoder.py", h5ad, weights)
    with monkeypatch.context() as patch:
        stop_at(patch, signal.SIGTERM, 30)
        run_inside("train_decoder.py", *flags)
    return flags, weights / "scDecoder_checkpoint.pt"


def test_resume_is_of_the_same_run(stopped_decoder):
    """Resuming with another setting or other data is an error and keeps the checkpoint."""
    flags, checkpoint = stopped_decoder
    weights = checkpoint.parent
    before = checkpoint.read_bytes()
    assert_one_line_error(
        run_inside("train_decoder.py", *flags, "--resume", "--lr", 0.5), checkpoint, "--lr", "0.5"
    )
    mixture_mean = torch.load(weights / "gmm_mu_c.pt")
    torch.save(mixture_mean + 1e-6, weights / "gmm_mu_c.pt")
    assert_one_line_error(
        run_inside("train_decoder.py", *flags, "--resume"), checkpoint, "earlier weights"
    )
    assert checkpoint.read_bytes() == before
    # Without --resume the checkpoint is overwritten, with a message.
    done = run_inside("train_decoder.py", *flags, "--epochs", 2)
    assert "--resume would go on" in done.stdout and left_behind(weights) == []


@pytest.mark.parametrize("script", ["train_gmvae.py", "train_encoder.py"])
def test_checkpoint_with_settings_of_an_earlier_version(
    uninterrupted, h5ad, tmp_path, monkeypatch, script
):
    """Renamed settings count by their new name; those that are gone must have had the default."""
    weights = start_folder(tmp_path, uninterrupted, script)
    flags = [*arguments(script, h5ad, weights), "--resume"]
    with monkeypatch.context() as patch:
        stop_at(patch, signal.SIGTERM, 12)
        run_inside(script, *flags)
    settings_class = importlib.import_module(script.removesuffix(".py")).Settings
    checkpoint = weights / f"{FILE[script][0]}_checkpoint.pt"
    card = torch.load(checkpoint, weights_only=True)
    old_name = {new: old for old, new in settings_class.renamed.items()}
    settings = {old_name.get(name, name): value for name, value in card["settings"].items()}
    for name in settings_class.gone:
        changed = card | {"settings": settings | settings_class.gone | {name: 0.02}}
        torch.save(changed, checkpoint)
        named = f"--{name.replace('_', '-')} 0.02"
        assert_one_line_error(run_inside(script, *flags), checkpoint, named)
    torch.save(card | {"settings": settings | settings_class.gone}, checkpoint)
    done = run_inside(script, *flags)
    assert f"going on at {UNIT[script]} " in done.stdout
    assert same_weights(weights, uninterrupted, script)
    # The model of a run that ended, too.
    model = weights / f"{FILE[script][0]}_model.pt"
    card = torch.load(model, weights_only=True)
    torch.save(card | {"settings": settings | settings_class.gone}, model)
    assert "nothing left to do" in run_inside(script, *flags).stdout


def broken_checkpoints(card):
    """Copies of a checkpoint's content, each invalid in one way."""
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
    wrong_shape = state | {moment: state[moment] | {"exp_avg": torch.zeros(7, 7)}}
    yield card | {"optimizer": card["optimizer"] | {"state": wrong_shape}}
    unknown_parameter = state | {999: state[moment]}
    yield card | {"optimizer": card["optimizer"] | {"state": unknown_parameter}}
    yield {name: value for name, value in card.items() if name != "optimizer"}
    yield [1, 2, 3]


def test_broken_checkpoints_end_in_one_line(stopped_decoder):
    flags, checkpoint = stopped_decoder
    content = checkpoint.read_bytes()
    for card in broken_checkpoints(torch.load(checkpoint, weights_only=True)):
        torch.save(card, checkpoint)
        assert_one_line_error(run_inside("train_decoder.py", *flags, "--resume"), checkpoint)
    checkpoint.write_bytes(content[: len(content) // 2])
    assert_one_line_error(run_inside("train_decoder.py", *flags, "--resume"), checkpoint)


# -------------------------------------------------------------------------------------- kills


def kill_and_resume(script, h5ad, weights, n_kills, rng):
    """Kill a training at random times, resume it after each kill, and let the last run finish.

    Returns:
        int: kills that hit a running process.
    """
    flags = arguments(script, h5ad, weights, TINY)
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    command += ["--resume", "--checkpoint-every", "0.2"]
    kills = 0
    while kills < n_kills:
        # The output is discarded: a full pipe would block the process.
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        model = weights / f"{FILE[script][0]}_model.pt"
        time.sleep(rng.uniform(0, 1.5))  # during start-up, or
        if rng.random() < 0.85:  # after its first checkpoint, in training and writing
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
        if process.returncode == 0:  # finished before the kill: train once more
            model.unlink()
        elif model.exists():  # killed between its last files: this one must be complete
            load_model(model, FILE[script][1])
    run(script, *command[2:])
    return kills


def test_killed_run_resumes_to_the_same_weights(trained, h5ad, tmp_path, script="train_gmvae.py"):
    """One kill of one stage; the next test covers all stages with ten kills each."""
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
    """A separate process, stopped while it draws cells."""
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


# ---------------------------------------------------------------------------- diverging loss


@pytest.mark.parametrize("script", ["train_gmvae.py", "train_encoder.py"])
def test_diverging_loss_stops_with_step_and_keeps_the_last_checkpoint(
    uninterrupted, h5ad, tmp_path, monkeypatch, script
):
    """The loss is nan from step 15 on; resuming from the checkpoint gives the same weights."""
    weights, calls = start_folder(tmp_path, uninterrupted, script), []
    flags = [*arguments(script, h5ad, weights), "--checkpoint-every", 0]
    check_loss = training.TrainingRun.check_loss

    def nan_from_step_15(self, loss):
        calls.append(1)
        check_loss(self, loss * torch.nan if len(calls) >= 15 else loss)

    with monkeypatch.context() as patch:
        patch.setattr(training.TrainingRun, "check_loss", nan_from_step_15)
        done = run_inside(script, *flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith(f"error: {FILE[script][0]} diverged at {UNIT[script]} ")
    assert "step" in last_line and "checkpoint.pt" in last_line and "--lr" in last_line
    assert not (weights / f"{FILE[script][0]}_model.pt").exists()
    assert run_inside(script, *flags[:-2], "--resume").returncode == 0
    assert same_weights(weights, uninterrupted, script)


@pytest.mark.parametrize("script", TINY)
def test_absurd_learning_rate_is_noticed(trained, h5ad, tmp_path, script):
    weights = start_folder(tmp_path, trained, script)
    done = run_inside(script, *arguments(script, h5ad, weights), "--lr", 1e18)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f" diverged at {UNIT[script]} " in done.stderr.strip().splitlines()[-1]
    assert not (weights / f"{FILE[script][0]}_model.pt").exists()


def test_reading_losses_never_overwrites_a_signal(tmp_path):
    """Its handler may run at any moment; assigning None again would lose the signal."""
    assigned = []

    class Run(training.TrainingRun):
        def __setattr__(self, name, value):
            assigned.append(name)
            super().__setattr__(name, value)

    model = torch.nn.Linear(3, 2)
    cfg = training_settings(tmp_path)
    plan = training.Plan(10, 1, 8, 1e-3)
    optimizer, schedule = training.two_rate_optimizer(model, [], plan, 0.01)
    run = Run("linear", cfg, plan, model, optimizer, schedule, np.random.default_rng(0), "data")
    assert "signal" in assigned
    assigned.clear()
    run.read_losses()
    run.barrier()
    assert assigned and "signal" not in assigned
    run.group.signal_counts = torch.eye(65)[15]  # of another process
    run.read_losses()
    assert run.signal == 15


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """Even if the loss is still finite; the older checkpoint is kept."""
    model = torch.nn.Linear(3, 2)
    cfg = training_settings(tmp_path)
    plan = training.Plan(10, 1, 8, 1e-3)
    optimizer, schedule = training.two_rate_optimizer(model, [], plan, 0.01)
    rng = np.random.default_rng(0)
    linear_run = training.TrainingRun("linear", cfg, plan, model, optimizer, schedule, rng, "data")
    linear_run.bar = training.tqdm(disable=True)
    linear_run.save()
    before = linear_run.checkpoint.path.read_bytes()
    with torch.no_grad():
        model.weight[0, 0] = torch.inf
    with pytest.raises(InputError, match="weights are not finite"):
        linear_run.save()
    assert linear_run.checkpoint.path.read_bytes() == before


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
    """A link planted under the name of the temporary file is not written through."""
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
    old, recent = tmp_path / ".a.0123abcd.tmp.txt", tmp_path / ".a.fedcba98.tmp.txt"
    other = tmp_path / ".b.0123abcd.tmp.txt"
    for path in (old, recent, other):
        path.write_text("x")
    for path in (old, other):
        os.utime(path, (time.time() - 2 * writing.OLD,) * 2)
    write_whole(tmp_path / "a.txt", lambda part: part.write_text("new"))
    assert not old.exists() and recent.exists() and other.exists()
    assert str(old) in capsys.readouterr().out


def limited(command, n_bytes):
    """Run a command with a limit on the size of its files, in place of a full disk."""
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
    flags = arguments(script, h5ad, weights) if script in TINY else []
    if script == "bulk2sc.py":
        out = tmp_path / "cells.h5ad"
        flags = ["--data", h5ad, "--weights", trained, "--batch-size", 20, "--n-cells", 100]
        flags += ["--out", out, "--force"]
    out.write_bytes(b"old")
    before = sorted(p.name for p in out.parent.iterdir())
    done = limited([sys.executable, ROOT / script, *flags], 8192)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ") and "could not be written" in error and "untouched" in error
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in out.parent.iterdir()) == before


@pytest.mark.parametrize("script", TINY)
def test_folder_that_cannot_be_written_to_is_said_before_training(trained, h5ad, tmp_path, script):
    """A file stands in the folder's place, as permissions would not stop the superuser."""
    (tmp_path / "file").write_text("")
    done = run_inside(script, "--data", h5ad, "--weights", tmp_path / "file")
    assert done.returncode == 1 and "it/s" not in done.stderr
    assert_one_line_error(done, tmp_path / "file")
