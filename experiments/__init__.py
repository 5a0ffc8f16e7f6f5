"""Entry points: run, sweep, report, logits, generate, replay."""
