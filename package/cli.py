"""The commands of an installed bulk2sc: each runs the script of the same name."""

import runpy


def run(script):
    """Run a script of the package as ``python script.py`` would."""
    runpy.run_module(f"bulk2sc.{script}", run_name="__main__")


def bulk2sc():
    run("bulk2sc")


def train():
    run("train")


def train_gmvae():
    run("train_gmvae")


def train_decoder():
    run("train_decoder")


def train_encoder():
    run("train_encoder")


def evaluate():
    run("evaluate")


def annotate():
    run("annotate")


def make_figures():
    run("make_figures")


def simulate_bulks():
    run("simulate_bulks")
