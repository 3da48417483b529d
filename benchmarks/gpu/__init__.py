"""Everything that needs a GPU, in one call: build, check, test, sanitize, time and profile.

``python -m benchmarks.gpu`` runs it; docs/cuda-on-a-gpu.md says what it does and how to read it.
"""
