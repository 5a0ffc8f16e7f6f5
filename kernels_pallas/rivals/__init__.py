"""What the kernels are timed against, one file for each family, and how all of them are timed.

A family is a module here with `measurements(case, settings)`, which yields (name, function) pairs; the function
builds, checks and times one implementation and returns what it measured (`families.py` lists them). Families run
in processes of their own (`worker.py`), so that a crash, a hang or a hoard of memory costs one row, not the run.
No family is imported before it is asked for: torch, transformers, liger-kernel and tokamax are optional.
"""
