"""The version of bulk2sc, which outputs name."""

VERSION = "1.1.0.dev0"
