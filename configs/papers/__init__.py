"""One config for each paper; its variants are ``:tiny``, ``:h100`` and ``:paper``."""
