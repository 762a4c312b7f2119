"""One small check for every leaf of the configuration; see :mod:`knobs.table`."""
