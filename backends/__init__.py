"""The built-in backends, one file for each place that bytes can be."""

if __name__ != "tierstore.backends":  # a second copy of every class would fail isinstance checks in silence
    raise ImportError("import tierstore.backends, not backends: run Python outside the repository root, or with -P")
