"""For authors of drivers: contract tests, hypothesis strategies, the model, the crashing disk.

Needs pytest and hypothesis (the extra ``dev``); nothing else of the package imports it.
"""
