"""Configurations; see ``configs/base.py`` for every field."""
