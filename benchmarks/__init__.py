"""How fast, how exact, how large: `cases` says what is measured, `contestants` who, `run` does it.

``python -m benchmarks.run`` on a CPU, ``python -m benchmarks.gpu`` for everything on a GPU,
``python -m benchmarks.versions OLD`` for two commits in turn.
"""
